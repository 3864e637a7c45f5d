r"""Score matching, four ways: exact, sliced, by finite differences and denoising, on one density in the plane.

    E |s - grad log p|^2 = E[ |s|^2 + 2 tr grad s ] + E |grad log p|^2          Hyvarinen 2005, theorem 1

The run trains the score of every noise level of a VE SDE, which needs no target, and samples and scores it as any other:
`--config.training.objective=exact`, `sliced`, `finite_difference` or `dsm`. Then `workflow.score_matching_study` trains one
network of one noise level by each of the four, and puts beside each other their losses, the Fisher divergence to the truth,
the variance of their gradients and their cost; and denoising's bias at finite sigma beside theory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

import data
import training
from evaluation.pictures import Panel, save_plot
from numerics import Catalogue, argument_help
from sde_lib import VESDE
from workflow import plane, score_matching_study
from workflow.defaults import base_config
from workflow.report import table
from workflow.score_matching_study import Found, Study
from workflow.sections import fields_section, section, set_value
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

_SDES: Catalogue[VESDE] = Catalogue("SDE", {"ve": VESDE})
_STUDY: Catalogue[Study] = Catalogue("study", {"study": Study})


class ScoreMatching(System):
    """A score fitted without a target, and the four ways of fitting one beside each other."""

    name = "score_matching"
    about = (
        "Score matching in the plane (Hyvarinen 2005; Song et al. 2020, arXiv:1905.07088; Pang et al. 2020, arXiv:2007.03317; "
        "Vincent 2011): exact, sliced, finite-difference and denoising, their errors, variances and costs beside each other."
    )
    help = {f"study.{name}": text for name, text in argument_help(Study).items()}

    def get_config(self) -> ConfigDict:
        """Eight Gaussians on a ring, a VE SDE, and the sliced objective."""
        config = base_config("score_matching")
        set_value(config.data, "name", "gaussians", data.DATASETS)
        config.sde = section(_SDES, "ve", sigma_max=10.0)
        config.training.objective = section(
            training.OBJECTIVES, "sliced", times={"name": "log_normal", "mean": -1.5, "std": 2.2}
        )
        config.sampling.sampler.steps = 250
        # one training's error is anything within a factor of four
        config.study = fields_section(Study, leave=("seed",), steps=1500, repeats=3)
        return config

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the VE SDE alone."""
        return {**super().catalogues, "sde": _SDES}

    def plan(self, config: Config) -> Study:
        """The study of the section `study`."""
        made: Study = _STUDY.create("study", **config["study"], seed=config["seed"])
        return made

    def check(self, config: Config) -> None:
        """The study's values, and data whose density is known."""
        plane.require_plane(config, self.name, self.plan(config).sigmas)

    def rehearsal(self, setup: Setup) -> Setup:
        """With a study of seconds."""
        short = asdict(score_matching_study.shortened(self.plan(setup.config)))
        del short["seed"]
        return replace(setup, config={**setup.config, "study": short})

    def effort(self, setup: Setup, images: int) -> float:
        """Updates of the study's networks, and what takes as long as some 800 of them whatever their number."""
        return 800.0 + self.plan(setup.config).work

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The study: into results.json, report.md, score_matching.png and the terminal."""
        setup = run.setup
        truth = plane.truth(run.dataset, run.transform)
        found = score_matching_study.study(
            self.plan(setup.config), setup.training_data, run.transform, truth, run.device
        )
        entry = {name: asdict(f) for name, f in found.items()}
        folder.update_results({"score_matching": {"information": truth.information, "methods": entry}})
        save_plot(folder.path / "score_matching.png", _panels(found))
        lines = _lines(found, truth.information)
        folder.add_section("Four ways of matching a score", [*lines, "![four ways](score_matching.png)"])
        print("\n" + "\n".join(lines))


def _lines(found: Mapping[str, Found], information: float) -> list[str]:
    """The table of the report."""
    head = (
        "method",
        "loss",
        "its best",
        "E_p abs(s - grad log p)^2",
        "bias in it",
        "variance of a gradient",
        "ms a batch",
    )
    rows = [
        (
            name,
            f"{f.loss:.2f}",
            f"{f.best:.2f}",
            f"{f.error:.3g}" if len(f.fisher) == 1 else ", ".join(f"{e:.3g}" for e in f.fisher),
            f"{f.bias:.3g}" if f.bias else "0",
            f"{f.variance:.3g}",
            f"{f.milliseconds:.1f}",
        )
        for name, f in found.items()
    ]
    said = (
        f"One network of one noise level, trained each way on the same batches. E |grad log p|^2 = {information:.1f}. Losses "
        "are per dimension. The variance is the trace of the covariance of one sample's gradient at the weights that exact "
        "score matching found."
    )
    return [said, "", *table(head, rows)]


def _panels(found: Mapping[str, Found]) -> list[Panel]:
    """Errors and variances against the noise level."""
    denoising = score_matching_study.of_denoising(found)
    sigmas = [f.sigma for f in denoising]
    others = {name: f for name, f in found.items() if f not in denoising}
    ends = [sigmas[0], sigmas[-1]]
    flat = {name: (ends, [f.error] * 2) for name, f in others.items()}
    spread = {name: (ends, [f.variance] * 2) for name, f in others.items()}
    return [
        Panel(
            title="error against the data's score",
            x="sigma of denoising",
            y="E |s - grad log p|^2",
            lines={**flat, "denoising's bias, theory": (sigmas, [f.bias for f in denoising])},
            marks={"denoising": (sigmas, [f.error for f in denoising])},
            log="xy",
        ),
        Panel(
            title="variance of one sample's gradient",
            x="sigma of denoising",
            y="trace of the covariance",
            lines=spread,
            marks={"denoising": (sigmas, [f.variance for f in denoising])},
            log="xy",
        ),
    ]


get_config = ScoreMatching().get_config
