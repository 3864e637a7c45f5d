r"""One energy trained by each objective of a score, beside each other and the truth.

    denoising        |eps - eps_hat|^2                             a random target, one derivative of the energy
    stable target    |eps_bar - eps_hat|^2                         the batch's mean of it
    sliced           |eps_hat|^2 - 2 sigma v' (grad eps_hat) v     no target; a second derivative along a random direction
    exact            |eps_hat|^2 - 2 sigma tr grad eps_hat         no target; all second derivatives
    dual             stable target, and what the energy does from one noise level to the next

The first four have the same minimiser at every noise level (`training.score_matching`, `training.stable_target`), so that they
differ by the variance of their gradients and by their cost; the last ties the levels to each other, which makes the energy one
with log Z = 0 (`training.dual_score_matching`). Each starts from the same weights and sees the same batches, and is read as
the run's own energy is (`workflow.energy_reading.differences_at`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import training
from evaluation.plane import GridLaw
from models import EnergyModel
from numerics import UserError, require_count
from training import DSM, DualScoreMatching, ExactScoreMatching, Objective, SlicedScoreMatching, StableTarget
from training.objectives import TimedObjective
from workflow import energy_reading, progress
from workflow.energy_reading import Read, Reading
from workflow.fresh import fresh
from workflow.plane import Truth

if TYPE_CHECKING:
    from workflow.trained_run import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """How the objectives are compared.

    Args:
        steps: updates of each; 0 leaves the comparison out.
        batch_size: points of each update.

    Raises:
        UserError: a number below 0, or no points.
    """

    steps: int = 800
    batch_size: int = 256

    def __post_init__(self) -> None:
        require_count(self.steps, "config.objectives.steps", 0)
        require_count(self.batch_size, "config.objectives.batch_size")


def by_name(own: Objective) -> Mapping[str, Objective]:
    """The five, with the times of the run's own objective and every noise level's weight 1.

    Raises:
        UserError: an objective without times.
    """
    if not isinstance(own, TimedObjective):
        raise UserError(
            f"got the objective {type(own).__name__} for an energy, which has no law of times; expected one of a "
            "score, such as dsm"
        )
    return {
        "denoising": DSM(times=own.times, t_min=own.t_min),
        "stable target": StableTarget(times=own.times, t_min=own.t_min),
        "sliced": SlicedScoreMatching(times=own.times, t_min=own.t_min),
        "exact": ExactScoreMatching(times=own.times, t_min=own.t_min),
        "dual": DualScoreMatching(times=own.times, t_min=own.t_min),
    }


def compared(
    run: TrainedRun, plan: Objectives, reading: Reading, truth: Truth
) -> tuple[dict[str, dict[str, Any]], dict[str, GridLaw]]:
    """What each objective's energy is off by, what it took, and its law at the reading's noise level."""
    setup = run.setup
    options = replace(
        setup.options,
        steps=plan.steps,
        batch_size=min(plan.batch_size, len(setup.training_data)),
        warmup=max(1, plan.steps // 10),
        ema=(0.98,),
        progress=False,
        tensorboard=False,
        eval_every=0,
        checkpoint_every=0,
    )
    objectives = by_name(setup.objective)
    entries, laws = {}, {}
    with progress.bar(total=len(objectives), name="each objective", unit="network") as bar:
        for name, objective in objectives.items():
            bar.set_postfix_str(name)
            model = fresh(run)
            begun = time.process_time()
            found = training.train(model, setup.training_data, run.transform, options, objective=objective)
            seconds = time.process_time() - begun
            found.load_averages(model)
            energy = cast(EnergyModel, model.eval().requires_grad_(False))
            entry: dict[str, Any] = {"processor_seconds": seconds, "milliseconds": 1e3 * seconds / plan.steps}
            try:
                entry["differences_at"] = energy_reading.differences_at(reading, energy, truth)
                laws[name] = Read.of(energy, reading.sigma, truth.plane).law
            except UserError as error:  # an energy that has not come down at the edges yet
                entry["unbounded"] = str(error)
            entries[name] = entry
            bar.update(1)
    return entries, laws


def rows(entries: Mapping[str, Mapping[str, Any]], reading: Reading) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and the rows of the report's table."""
    sigmas = [f"{sigma:g}" for sigma in reading.sigmas]
    head = (
        "objective",
        *(f"off by at {sigma}" for sigma in sigmas),
        *(f"KL at {sigma}" for sigma in sigmas),
        *(f"log Z at {sigma}" for sigma in sigmas),
        "ms an update",
    )
    body = []
    for name, entry in entries.items():
        at = entry.get("differences_at")
        read = (
            [
                *(f"{100 * at[s]['relative']:.1f} %" for s in sigmas),
                *(f"{at[s]['kl']:.4f}" for s in sigmas),
                *(f"{at[s]['log_z']:+.3f}" for s in sigmas),
            ]
            if at
            else [entry["unbounded"], *[""] * (3 * len(sigmas) - 1)]
        )
        body.append((name, *read, f"{entry['milliseconds']:.1f}"))
    return head, body
