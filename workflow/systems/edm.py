r"""EDM (Karras et al. 2022, arXiv:2206.00364): the design space, and their choices in it (table 1, last column).

    x = x_0 + sigma eps,    log sigma ~ N(-1.2, 1.2^2)
    D(x, sigma) = c_skip x + c_out F(c_in x, log(sigma)/4),
        c_skip = sd^2 / (sigma^2 + sd^2),  c_out = sigma sd / sqrt(sigma^2 + sd^2),  c_in = 1 / sqrt(sigma^2 + sd^2)
    loss = (sigma^2 + sd^2) / (sigma sd)^2 |D - x_0|^2 = |F - target|^2
    algorithm 2: Heun's method in sigma on the rho = 7 grid from 80 to 0.002, with churn

sd is the standard deviation of *these* data, measured. The SDE is VE's between the paper's two sigmas; its clock does not
matter to this method, whose times are sigmas. The paper's N = 18 steps, 35 evaluations, are 17 steps of Heun's method and the
final denoising, which is its Euler step to sigma = 0. Scored by the flow, whose law is that of data blurred by sigma_min.

The run draws by the deterministic sampler, then sweeps the churn over three budgets. `--ablation` trains the same network
with the design choices of the paper's table 2 switched one by one, from VP and VE as they were to this system, and with
v-prediction and (nearly) no signal at T (Salimans and Ho 2022, arXiv:2202.00512; Lin et al. 2023, arXiv:2305.08891) beside
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ml_collections import ConfigDict

import models
import samplers
import training
from numerics import UserError, require_count, require_range
from samplers import HeunEDM, Sampler
from sde_lib import VESDE
from workflow.sections import section
from workflow.system import Config
from workflow.systems.score_sde import ScoreSDE

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun


_STEPS = 64
"""Of the flow in the ablation, for all designs alike, unless the run's are fixed."""


class EDM(ScoreSDE):
    """VE between the paper's sigmas, with its preconditioning, noise law, weighting and sampler."""

    name = "edm"
    counts_evaluations = True
    about = (
        "EDM (Karras et al. 2022, arXiv:2206.00364): preconditioning, log-normal noise, Heun's method with churn; --ablation "
        "switches the design choices one by one."
    )
    help: ClassVar[Mapping[str, str]] = {
        "sweep.churn": "values of S_churn",
        "sweep.steps": "numbers of Heun's steps",
        "sweep.samples": "samples for each Fréchet distance",
        "sweep.churn_min": "the smallest sigma at which noise is added",
        "sweep.churn_max": "the largest sigma at which noise is added",
        "ablation.run": "switch the design choices one by one, half an hour; the same as --ablation",
        "ablation.samples": "samples for each Fréchet distance of the ablation",
        "ablation.images": "images for each likelihood of the ablation",
    }
    kind = VESDE
    changes: ClassVar[Mapping[str, Any]] = {"sigma_min": 0.002, "sigma_max": 80.0, "t_end": 0.0}
    switches: ClassVar[Mapping[str, str]] = {"ablation": "ablation.run"}

    def get_config(self) -> ConfigDict:
        """The digits' settings."""
        config = super().get_config()
        config.model.parametrization = section(models.PARAMETRIZATIONS, "preconditioned")
        config.model.conditioning = section(models.CONDITIONINGS, "log_sigma")
        config.training.objective = section(
            training.OBJECTIVES, "dsm", times={"name": "log_normal", "mean": -1.2, "std": 1.2}, weighting="edm"
        )
        config.sampling.sampler = section(samplers.SAMPLERS, "heun", steps=17)
        # the sweep: S_churn, numbers of Heun's steps, samples a cell; churn between the paper's sigmas for CIFAR-10. In N steps
        # all S_churn from 0.41 N on are one, since gamma is at most sqrt(2) - 1
        config.sweep = ConfigDict(
            {
                "churn": (0.0, 1.0, 3.0, 7.0, 14.0),
                "steps": (8, 17, 35),
                "samples": 200,
                "churn_min": 0.05,
                "churn_max": 50.0,
            }
        )
        config.ablation = ConfigDict({"run": False, "samples": 297, "images": 100})
        return config

    def check(self, config: Config) -> None:
        """The sweep's numbers."""
        sweep = config["sweep"]
        for churn in sweep["churn"]:
            require_range(churn, "config.sweep.churn", 0)
        for steps in sweep["steps"]:
            require_count(steps, "config.sweep.steps")
        for part in ("sweep", "ablation"):
            require_count(config[part]["samples"], f"config.{part}.samples", 10)
        require_count(config["ablation"]["images"], "config.ablation.images", 2)
        low, high = sweep["churn_min"], sweep["churn_max"]
        require_range(low, "config.sweep.churn_min", 0)
        if high is not None and not high > low:
            raise UserError(
                f"got config.sweep.churn_min={low}, churn_max={high}; expected churn_min < churn_max, or None for no end"
            )

    def rehearsal(self, setup: Setup) -> Setup:
        """With few churns, steps and samples."""
        sweep = {**setup.config["sweep"], "churn": (0.0, 10.0), "steps": (2, 4), "samples": 16}
        ablation = {**setup.config["ablation"], "samples": 16, "images": 2}
        return replace(setup, config={**setup.config, "sweep": sweep, "ablation": ablation})

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of images in the sweep, and in the ablation, where a step of training is three of each image."""
        sweep, ablation, options = setup.config["sweep"], setup.config["ablation"], setup.options
        work = len(sweep["churn"]) * sum(2 * n + 1 for n in sweep["steps"]) * sweep["samples"]
        if ablation["run"]:
            trained = 3 * options.steps * options.batch_size
            looked_at = 35 * ablation["samples"] + 10 * (setup.protocol.steps or _STEPS) * ablation["images"]
            work += len(ABLATION) * (trained + looked_at)
        return float(work)

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The sweep over churn, and the ablation where it was asked for."""
        self.report_churn(run, folder)
        if run.setup.config["ablation"]["run"]:
            self.report_ablation(run, folder)

    def report_churn(self, run: TrainedRun, folder: RunFolder) -> None:
        """Quality by churn and evaluations: table and heat map."""
        from workflow.sampler_table import Judge, fill

        sweep = run.setup.config["sweep"]
        bounds = {"churn_min": sweep["churn_min"], "churn_max": sweep["churn_max"]}
        asked: dict[tuple[str, int], tuple[TrainedRun, Sampler]] = {
            (f"S_churn {churn:g}", 2 * steps + 1): (run, HeunEDM(steps=steps, churn=churn, **bounds))
            for churn in sweep["churn"]
            for steps in sweep["steps"]
        }
        judge = Judge.of(run.setup, sweep["samples"], quick=sweep["samples"] < 32)
        found = fill(judge, asked, title="Heun's method by churn", head="evaluations")
        found.save(folder.path / "churn_sweep.png")
        folder.update_results({"churn_sweep": found.asdict()})
        folder.add_section("Churn", [*found.lines(), "![churn](churn_sweep.png)"])
        print("\n" + "\n".join(found.lines()))

    def report_ablation(self, run: TrainedRun, folder: RunFolder) -> None:
        """The same network, trained with each of `ABLATION` and drawn from by Heun's method in 35 evaluations."""
        from workflow.report import table
        from workflow.sampler_table import Judge, fill
        from workflow.score import score_split
        from workflow.sub_run import sub_run

        config = run.setup.config
        asked, quick = config["ablation"], config["ablation"]["samples"] < 32
        runs = {row.name: sub_run(run, f"ablation/{row.folder}", row.system, row.changes) for row in ABLATION}
        runs["EDM: its own SDE and label"] = run
        judge = Judge.of(run.setup, asked["samples"], quick=quick)
        steps = 4 if quick else 17
        drawn = fill(
            judge,
            {(name, 2 * steps + 1): (r, HeunEDM(steps=steps)) for name, r in runs.items()},
            title="design choices, the same network and steps of training",
            head="evaluations",
        )
        scores = {}
        for name, r in runs.items():
            protocol = replace(r.setup.protocol, limit=asked["images"], steps=r.setup.protocol.steps or _STEPS)
            found = score_split(r, protocol, alone=True)
            assert found is not None  # this process wrote all parts
            scores[name] = found.result
        rows = [
            (name, f"{cell.quality}", f"{scores[name].mean:.3f} ± {scores[name].stderr:.3f}")
            for (name, _), cell in drawn.cells.items()
        ]
        lines = [
            f"{drawn.measure} of {drawn.samples} samples in {2 * steps + 1} evaluations (held-out data: "
            f"{drawn.floor}), and bits/dim of "
            f"{asked['images']} images by the flow; one network, one seed and {run.setup.options.steps:,} steps of "
            "training each.",
            "",
            *table(("design", drawn.measure, "bits/dim"), rows),
        ]
        folder.update_results(
            {
                "ablation": {
                    **drawn.asdict(),
                    "bits_per_dim": {name: {"mean": s.mean, "stderr": s.stderr} for name, s in scores.items()},
                }
            }
        )
        folder.add_section("Design choices", lines)
        print("\n" + "\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class Design:
    """One row of the ablation: a name, its folder, a system, and what differs from it."""

    name: str
    folder: str
    system: str
    changes: Mapping[str, Any]


_UNIFORM: Mapping[str, Any] = {"training.objective.times": "uniform", "training.objective.weighting": "simple"}
_LOG_NORMAL: Mapping[str, Any] = {
    "training.objective.times": "log_normal",
    "training.objective.times.mean": -1.2,
    "training.objective.times.std": 1.2,
    "training.objective.weighting": "edm",
}
_SMALL_END: Mapping[str, Any] = {"sampling.sampler": "heun", "sampling.sampler.steps": 17}

ABLATION = (
    Design(
        name="A: VP, noise prediction",
        folder="vp",
        system="vp",
        changes={"model.parametrization": "noise", **_UNIFORM, **_SMALL_END},
    ),
    Design(
        name="A: VE, noise prediction",
        folder="ve",
        system="ve",
        changes={"model.parametrization": "noise", **_UNIFORM, **_SMALL_END},
    ),
    Design(
        name="D: VP, preconditioned",
        folder="preconditioned",
        system="vp",
        changes={"model.parametrization": "preconditioned", **_UNIFORM, **_SMALL_END},
    ),
    Design(
        name="E: VP, preconditioned, log-normal noise and its weighting",
        folder="loss",
        system="vp",
        changes={"model.parametrization": "preconditioned", **_LOG_NORMAL, **_SMALL_END},
    ),
    Design(
        name="VP, v-prediction",
        folder="velocity",
        system="vp",
        changes={
            "model.parametrization": "velocity",
            **_UNIFORM,
            "training.objective.weighting": "velocity",
            **_SMALL_END,
        },
    ),
    Design(
        name="VP chain, v-prediction, SNR 1e-8 at T",
        folder="no_signal",
        system="ddpm",
        changes={
            "model.parametrization": "velocity",
            "sde.terminal_snr": 1e-8,
            "training.objective": "dsm",
            "training.objective.weighting": "velocity",
            **_SMALL_END,
        },
    ),
)
"""The letters are the paper's, table 2; its B and C are about its networks' sizes, and F about augmentation, which digits do
not take."""

get_config = EDM().get_config
