"""Objectives, weightings and times by name; `create` makes an objective with its parts.

create("dsm", weighting="likelihood", times="importance")
create("dsm", weighting={"name": "min_snr", "gamma": 3.0}, times={"name": "tabulated", "weighting": "simple"})
"""

from __future__ import annotations

from typing import Any

from numerics import Catalogue, Option
from training.discrete import SMLD, DDPMSimple, DiscreteTime
from training.dual_score_matching import DualScoreMatching
from training.loss_history import LossHistory
from training.maximum_likelihood import MaximumLikelihood
from training.objectives import DSM, Objective
from training.score_matching import ExactScoreMatching, FiniteDifferenceScoreMatching, SlicedScoreMatching
from training.stable_target import StableTarget
from training.time_sampling import (
    Adaptive,
    ImportanceTime,
    LogNormal,
    StratifiedTime,
    TabulatedTime,
    TimeSampler,
    UniformLogSNR,
    UniformTime,
)
from training.variational import VLB, Hybrid
from training.weighting import (
    ELBO,
    EDMWeighting,
    FlowMatching,
    LikelihoodWeighting,
    MinSNR,
    ScoreError,
    Simple,
    SoftMinSNR,
    VelocityPrediction,
    Weighting,
)

WEIGHTINGS: Catalogue[Weighting] = Catalogue(
    "weighting",
    {
        "simple": Simple,
        "score": ScoreError,
        "likelihood": LikelihoodWeighting,
        "elbo": ELBO,
        "min_snr": MinSNR,
        "soft_min_snr": SoftMinSNR,
        "edm": EDMWeighting,
        "velocity": VelocityPrediction,
        "flow_matching": FlowMatching,
    },
)
"""The factor w(t) of a denoising loss."""

TIMES: Catalogue[TimeSampler] = Catalogue(
    "time sampler",
    {
        "uniform": StratifiedTime,
        "independent_uniform": UniformTime,
        "log_snr": UniformLogSNR,
        "importance": ImportanceTime,
        "tabulated": TabulatedTime,
        "log_normal": LogNormal,
        "adaptive": Adaptive,
        "discrete": DiscreteTime,
        "loss_history": LossHistory,
    },
    parts={"weighting": WEIGHTINGS},
)
"""At which times the loss is evaluated."""

OBJECTIVES: Catalogue[Objective] = Catalogue(
    "objective",
    {
        "dsm": DSM,
        "stable_target": StableTarget,
        "dual": DualScoreMatching,
        "ddpm_simple": DDPMSimple,
        "smld": SMLD,
        "vlb": VLB,
        "hybrid": Hybrid,
        "exact": ExactScoreMatching,
        "sliced": SlicedScoreMatching,
        "finite_difference": FiniteDifferenceScoreMatching,
        "maximum_likelihood": MaximumLikelihood,
    },
    parts={"weighting": WEIGHTINGS, "times": TIMES},
)
"""What is minimised."""


def create(name: str, **options: Any) -> Objective:
    """The objective of that name; its `weighting` and `times` may be objects, names, or mappings `{name, **options}`.

    Raises:
        UserError: an unknown name or option, or a value that is refused.

    >>> create("dsm", weighting={"name": "min_snr", "gamma": 3.0})
    DSM(times=StratifiedTime(stratified=True), t_min=None, weighting=MinSNR(gamma=3.0))
    """
    return OBJECTIVES.create(name, **options)


def available() -> tuple[str, ...]:
    """The names of the objectives."""
    return OBJECTIVES.available()


def options(name: str) -> dict[str, Option]:
    """The options of the objective of that name.

    Raises:
        UserError: an unknown name.
    """
    return OBJECTIVES.options(name)
