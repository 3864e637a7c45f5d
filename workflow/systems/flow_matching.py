r"""Rectified flow, alias conditional flow matching, as a member of the same family.

    x_t = (1 - t) x_0 + t eps,    L = E_t |(eps - x_0) - v(x_t, t)|^2,    dx/dt = v(x, t) from t = 1 to 0

(Liu, Gong, Liu 2023, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747, equation (23); there noise stands at t = 0.)
The path is the kernel of a linear SDE, `StraightSDE`, and so

    score(x, t) = -(x + (1 - t) v(x, t)) / t

makes the velocity a score: every sampler takes it, also those that add noise, and the same code scores it. Euler's method on v
is `DDIM(eta=0)` on a uniform grid, step for step.

The run draws by that Euler method and by ancestral sampling. Then by all samplers for the same number of evaluations, from the
same noise. One round of *reflow* follows: the network goes on from its weights with pairs of noise and sample that its own flow
has joined (`training.flow_matching`), and the two flows are compared by straightness, by few-step samples and by bits/dim. What
reflow gives is a velocity, whose flow and likelihood hold; it is no score, so no sampler that adds noise is asked.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from ml_collections import ConfigDict

import models
import samplers
import training
from data import Split
from evaluation import compare_samplers, straightness
from evaluation.pictures import save_grid, shown_channels
from numerics import Catalogue, SampleStreams, UserError, require_count
from samplers import DDIM, Sampler
from sde_lib import SDE, StraightSDE
from sde_lib.time_grids import LogSNR
from training import Reflow, StratifiedTime, joined
from training.objectives import TimedObjective
from workflow import presets, progress
from workflow.beside import train_beside
from workflow.defaults import base_config
from workflow.report import table
from workflow.score import score_split
from workflow.sections import section
from workflow.system import Config, System
from workflow.trained_run import fingerprint

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

PATHS: Catalogue[SDE] = Catalogue("path", {"straight": StraightSDE})
ALIASES = ("ddpm", "euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde")
"""Second names of samplers, which need not be drawn by twice."""

EVEN_IN_LOG_SNR = ("pc", "ald", "reverse_diffusion", "euler_maruyama")
"""Samplers that freeze what is unbounded at t = 1, so that their default grid is even in the log-SNR here."""


class FlowMatching(System):
    """A velocity of the straight path, trained with its own squared error."""

    name = "flow_matching"
    counts_evaluations = True
    about = (
        "Rectified flow / flow matching (Liu et al. 2023, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747): a velocity "
        "that is a score too, all samplers, the exact likelihood, and a round of reflow."
    )
    help: ClassVar[Mapping[str, str]] = {
        "reflow.pairs": "pairs of noise and sample that a round of reflow is trained on",
        "reflow.evaluations": "evaluations of the solver that joins a pair",
        "reflow.steps": "steps of that training; 0 for no reflow",
        "reflow.scored": "images scored before and after it",
        "compared.evaluations": "evaluations of every sampler",
        "compared.samples": "samples by every sampler; 0 for no comparison",
        "compared.adaptive": "whether samplers that choose their own steps take part",
    }

    def get_config(self) -> ConfigDict:
        """The digits' settings, on the straight path."""
        config = base_config("flow_matching")
        config.sde = section(PATHS, "straight")
        config.model.parametrization = section(models.PARAMETRIZATIONS, "difference")
        # the papers' loss: the velocity's error, at uniform times
        config.training.objective = section(
            training.OBJECTIVES, "dsm", weighting={"name": "flow_matching"}, times={"name": "uniform"}
        )
        config.sampling.sampler = section(samplers.SAMPLERS, "ddim", steps=50)
        config.sampling.second = section(samplers.SAMPLERS, "ancestral", steps=250)
        # two flows are trained and scored within minutes: fewer images than other systems score, each once, as the images'
        # own spread is ten times what a second probe or draw would save, in steps that need no pilot runs
        config.training.steps = 1000
        config.threads = 2  # a third less time on two free cores
        config.likelihood.update({"steps": 128, "limit": 100, "draws": 1, "probes": 1})
        # reflow: pairs of noise and sample, evaluations for each, steps of training on them, images scored after it;
        # compared: evaluations and samples for each of all samplers, and whether those that choose their own steps take part
        config.reflow = ConfigDict({"pairs": 1000, "evaluations": 40, "steps": 250, "scored": 50})
        config.compared = ConfigDict({"evaluations": 50, "samples": 12, "adaptive": True})
        return config

    @property
    def presets(self) -> Mapping[str, presets.Changes]:
        """Those of a score of images."""
        return presets.of(self.name)

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the straight path in place of an SDE."""
        return {**super().catalogues, "sde": PATHS}

    def sampler(self, config: Config, section: Config) -> Sampler:
        """A sampler; one that freezes coefficients over a step gets times that are even in the log-SNR, if none were chosen."""
        return _suited(section["name"], super().sampler(config, section))

    def check(self, config: Config) -> None:
        """The numbers of reflow and of the comparison."""
        if config["model"]["class_conditional"] and config["reflow"]["steps"]:
            raise UserError(
                "got config.model.class_conditional=True with a round of reflow, whose pairs have no classes; expected one of "
                "them: --config.reflow.steps=0"
            )
        for group, name, least in (
            ("reflow", "pairs", 2),
            ("reflow", "evaluations", 2),
            ("reflow", "steps", 0),
            ("reflow", "scored", 2),
            ("compared", "evaluations", 6),
            ("compared", "samples", 0),
        ):
            require_count(config[group][name], f"config.{group}.{name}", least)

    def rehearsal(self, setup: Setup) -> Setup:
        """With few pairs, evaluations and steps."""
        small = {
            "reflow": {"pairs": 64, "evaluations": 2, "steps": min(2, setup.config["reflow"]["steps"]), "scored": 8},
            "compared": {"evaluations": 6, "samples": min(2, setup.config["compared"]["samples"]), "adaptive": False},
        }
        return replace(setup, config={**setup.config, **small})

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of the network for one image, a step of training as three of each of its images."""
        own = setup.config["reflow"]
        return float(
            own["pairs"] * own["evaluations"]
            + 3 * own["steps"] * setup.options.batch_size
            + min(images, own["scored"]) * 1000
        )

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """All samplers side by side, and a round of reflow."""
        if run.setup.config["compared"]["samples"]:
            _all_samplers(run, folder)
        if run.setup.config["reflow"]["steps"]:
            _reflow(run, folder)


def _suited(name: str, sampler: Sampler) -> Sampler:
    return replace(sampler, grid=LogSNR()) if name in EVEN_IN_LOG_SNR and sampler.grid is None else sampler


def _all_samplers(run: TrainedRun, folder: RunFolder) -> None:
    """Some samples by every sampler, from the same noise: a picture with a row for each."""
    own = run.setup.config["compared"]
    found: dict[str, Sampler] = {}
    for name in samplers.available():
        if name in ALIASES:
            continue
        options: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2} if name == "ode" else {}
        sampler = _suited(name, samplers.create(name, **options))
        if own["adaptive"] or sampler.evaluations is not None:
            found[name] = sampler
    shape = (own["samples"], *run.dataset.event_shape)
    kept, lines, refused = [], [], {}
    bar = progress.bar(total=len(found), name="all samplers", unit="sampler")
    for name, sampler in found.items():
        bar.update()
        try:
            row = compare_samplers(
                run.sde,
                run.score,
                {name: sampler},
                shape,
                nfe=(own["evaluations"],),
                seed=run.setup.options.seed,
                device=run.device,
            ).rows[0]
        except UserError as error:
            refused[name] = str(error)
            continue
        kept.append(row)
        lines.append((f"`{row.code}`", f"{row.nfe:.0f}", f"{row.seconds:.2f}"))
    bar.close()
    picture = folder.path / "samples" / "all_samplers.png"
    if len(run.dataset.event_shape) == 3:
        images = shown_channels(torch.cat([run.transform.to_unit(row.samples) for row in kept]))
        names = [f"{row.name}, {row.nfe:.0f}" for row in kept]
        save_grid(picture, images, own["samples"], scale=max(1, round(24 / shape[-1])), rows=names)
    notes = [f"- {name}: {why}" for name, why in refused.items()]
    shown = [f"![a row for each]({picture.relative_to(folder.path).as_posix()})", ""] if picture.exists() else []
    folder.add_section(
        "The velocity as a score, by all samplers",
        [
            f"The same noise in every column; a row for each sampler, with its evaluations ({own['evaluations']} where these "
            "can be chosen):",
            "",
            *shown,
            *table(("sampler", "evaluations", "seconds"), lines),
            *notes,
        ],
    )
    folder.update_results(
        {
            "all_samplers": {row.name: {"sampler": row.code, "nfe": row.nfe, "seconds": row.seconds} for row in kept},
            "samplers_refused": refused,
        }
    )


def reflow_folder(run: TrainedRun, root: Path) -> Path:
    """Where a round of reflow is kept, to be gone on from: of these weights and these pairs, as a longer run has another."""
    own = run.setup.config["reflow"]
    return root / "reflow" / f"{run.fingerprint[:12]}-{own['pairs']}-{own['evaluations']}-{own['steps']}"


def _reflow(run: TrainedRun, folder: RunFolder) -> None:
    """A round of reflow, and both flows measured."""
    own, begun = run.setup.config["reflow"], time.perf_counter()
    pairs = _pairs(run, own["pairs"], own["evaluations"])
    times = run.setup.objective.times if isinstance(run.setup.objective, TimedObjective) else StratifiedTime()
    model = train_beside(
        run.setup,
        copy.deepcopy(run.model),
        Reflow(times=times),
        steps=own["steps"],
        pairs=pairs,
        folder=reflow_folder(run, folder.path),
    )
    after = replace(run, setup=replace(run.setup, model=model), fingerprint=fingerprint(model))
    results: dict[str, Any] = {"pairs": own["pairs"], "steps": own["steps"]}
    # the run's own parts, read again; of a survey, which scores some images of all, as many as are compared
    whole = run.setup.protocol
    before = score_split(
        run, whole if whole.precision is None else replace(whole, precision=None, limit=own["scored"]), alone=True
    )
    assert before is not None
    n = min(own["scored"], len(before.result.status))
    # in the steps that the first flow has: a pilot would cost as much as these images, and the companions state the error
    chosen = (before.entry(folder.path)["chosen"] or {}).get("steps", run.setup.protocol.steps)
    once_more = score_split(after, replace(run.setup.protocol, limit=n, steps=chosen), alone=True)
    assert once_more is not None
    rows = []
    for name, which, scored in (
        ("flow", run, replace(before, result=before.result.first(n))),
        ("after reflow", after, once_more),
    ):
        straight = straightness(
            which.sde,
            which.score,
            (min(256, own["pairs"]), *run.dataset.event_shape),
            steps=max(2, own["evaluations"] // 2),
            generator=SampleStreams(run.setup.options.seed),
            device=run.device,
        )
        results[name] = {
            "straightness": straight.to_dict(),
            "bits_per_dim": {**scored.entry(folder.path), "text": str(scored.result)},
        }
        rows.append((name, str(straight), f"{scored.result.mean:.3f} ± {scored.result.stderr:.3f}"))
    lines = table(("", "straightness S (0: straight)", f"bits/dim of {n} {run.setup.noun}s"), rows)
    lines += _few_steps(run, after, folder, results)
    results["seconds"] = time.perf_counter() - begun
    folder.update_results({"reflow": results})
    folder.add_section("A round of reflow", lines)
    print("\nreflow: straightness and bits/dim")
    for name, straight_text, bits in rows:
        print(f"  {name}: S = {straight_text}; {bits} bits/dim")


def _pairs(run: TrainedRun, n: int, evaluations: int) -> Split:
    """Noise and the sample that Heun's method on the flow makes of it, `(n, 2 C, *)`."""
    solver = samplers.create("ode", solver="heun", flow="plain", grid="uniform", denoise=True).within(
        max(3, evaluations + 1)
    )
    parts = []
    size = 250
    with progress.bar(total=n, name="pairs for reflow", unit="pair") as bar:
        for first in range(0, n, size):
            ids = torch.arange(first, min(first + size, n))
            shape = (len(ids), *run.dataset.event_shape)
            # keyed apart from the noise that samples are drawn from
            streams = SampleStreams(run.setup.options.seed + 1, ids)
            eps = run.sde.prior_sample(shape, generator=streams, device=run.device, dtype=torch.float32)
            made = solver(run.sde, run.score, shape, x_T=eps)
            parts.append(joined(made.x, eps).cpu())
            bar.update(len(ids))
    return Split(torch.cat(parts), None, torch.arange(n))


def _few_steps(run: TrainedRun, after: TrainedRun, folder: RunFolder, results: dict[str, Any]) -> list[str]:
    """Euler's method in 1, 2, 4 and 8 steps, before and after, from the same noise; and how far each is from its own flow."""
    n = min(12, run.setup.n)
    shape = (n, *run.dataset.event_shape)
    x_T = run.sde.prior_sample(shape, generator=SampleStreams(run.setup.options.seed), device=run.device)
    images, names, rows = [], [], []
    budgets = (1, 2, 4, 8)
    for name, which in (("flow", run), ("after reflow", after)):
        fine = DDIM(steps=100, denoise=True)(which.sde, which.score, shape, x_T=x_T).x
        errors = []
        for k in budgets:
            # k steps of Euler's method, and the denoising of what little noise is left
            x = DDIM(steps=k, denoise=True)(which.sde, which.score, shape, x_T=x_T).x
            errors.append(float((x - fine).square().mean().sqrt()))
            images.append(x)
            names.append(f"{name}, {k} steps" if k > 1 else f"{name}, 1 step")
        results[name]["few_steps"] = dict(zip(map(str, budgets), errors, strict=True))
        rows.append((name, *(f"{e:.3f}" for e in errors)))
        images.append(fine)
        names.append(f"{name}, 100 steps")
    head = ("rms distance to the flow's own end", "1 step", *(f"{k} steps" for k in budgets[1:]))
    lines = table(head, rows)
    if len(run.dataset.event_shape) == 3:
        picture = folder.path / "samples" / "reflow.png"
        both = shown_channels(run.transform.to_unit(torch.cat(images).cpu()))
        save_grid(picture, both, n, scale=max(1, round(24 / shape[-1])), rows=names)
        lines += [
            "Euler's method from the same noise, before reflow and after it:",
            "",
            f"![reflow]({picture.relative_to(folder.path).as_posix()})",
        ]
    return lines


get_config = FlowMatching().get_config
