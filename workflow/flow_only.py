"""Samplers for a model that is a flow's velocity and no score of noised data.

A flow that is trained by likelihood through its ODE is tied to the data by where its paths begin and end. What stands in the
place of a score is the score of nothing between: a sampler that adds noise goes on from states that the flow never sees, and
the final denoising takes Tweedie's mean, which is one of a score.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from numerics import UserError
from samplers import DDIM, DEIS, DPMSolver, HeunEDM, ProbabilityFlow, Sampler, UniPC
from training import Objective

if TYPE_CHECKING:
    from workflow.trained_run import TrainedRun

_OF_FLOWS = (ProbabilityFlow, DDIM, DPMSolver, UniPC, HeunEDM, DEIS)
_NAMES = "ode, ddim, dpm_solver, unipc, heun, deis, euler, dpmpp_2m"
_NOISE = ("eta", "stochastic", "churn")


def fitting(sampler: Sampler, objective: Objective) -> Sampler:
    """The sampler, without the final denoising where the objective trains a flow alone.

    Raises:
        UserError: one that adds noise, for such a flow.
    """
    if not objective.of_flow:
        return sampler
    noise = [name for name in _NOISE if getattr(sampler, name, 0)]
    if type(sampler) not in _OF_FLOWS or noise:
        raise UserError(
            f"got {type(sampler).__name__}{' with ' if noise else ''}{', '.join(noise)}, which adds noise or asks for a "
            f"denoised mean, for a flow trained by likelihood, which has no score of noised data; expected one of {_NAMES}, "
            "without noise"
        )
    return replace(sampler, denoise=False)


def require_score(run: TrainedRun, instead: str) -> None:
    """Refuses a run that is a flow alone, where a score of noised data is asked for.

    Args:
        instead: what to use.

    Raises:
        UserError: such a run.
    """
    if run.setup.objective.of_flow:
        raise UserError(
            f"got {run.folder}, a flow trained by likelihood, which has no score of noised data; expected a score: {instead}"
        )
