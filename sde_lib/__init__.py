"""Forward processes: linear SDEs, their scores, the probability flow, and exact oracles."""

from __future__ import annotations

from numerics import Catalogue
from sde_lib import analytic, time_grids
from sde_lib.base import SDE
from sde_lib.blur import Blur
from sde_lib.correlated_mixture import CorrelatedMixture
from sde_lib.custom import KernelSDE, TableVESDE, TableVPSDE
from sde_lib.flow_map import Transported, transport
from sde_lib.masks import Masks
from sde_lib.measurement import Measurement
from sde_lib.operators import SVD, Downsample, Grey, Linear, LinearMap, Mask, Operator
from sde_lib.probability_flow import Flow, FlowField, FlowTimes, PlainFlow, WhitenedFlow
from sde_lib.scheduled import ScheduledVPSDE
from sde_lib.score import CountedScore, Score, ScoreIn, check_score, denoised, in_dtype, noise
from sde_lib.straight import StraightSDE
from sde_lib.sub_vp import SubVPSDE
from sde_lib.tables import cosine_betas, geometric_sigmas, linear_betas, with_terminal_snr
from sde_lib.terminal import mismatch_warning, prior_mismatch
from sde_lib.time_grids import TIME_GRIDS, TimeGrid
from sde_lib.train_mode import networks_of, require_eval_mode
from sde_lib.ve import VESDE
from sde_lib.vp import VPSDE

SDES: Catalogue[SDE] = Catalogue(
    "SDE",
    {
        "vp": VPSDE,
        "ve": VESDE,
        "sub_vp": SubVPSDE,
        "straight": StraightSDE,
        "table_vp": TableVPSDE,
        "table_ve": TableVESDE,
    },
)
FLOWS: Catalogue[Flow] = Catalogue("flow", {"whitened": WhitenedFlow, "plain": PlainFlow})
create, available, options, describe = SDES.create, SDES.available, SDES.options, SDES.describe

__all__ = [
    "FLOWS",
    "SDE",
    "SDES",
    "SVD",
    "TIME_GRIDS",
    "Blur",
    "CorrelatedMixture",
    "CountedScore",
    "Downsample",
    "Flow",
    "FlowField",
    "FlowTimes",
    "Grey",
    "KernelSDE",
    "Linear",
    "LinearMap",
    "Mask",
    "Masks",
    "Measurement",
    "Operator",
    "PlainFlow",
    "Score",
    "ScoreIn",
    "in_dtype",
    "StraightSDE",
    "SubVPSDE",
    "TableVESDE",
    "TableVPSDE",
    "TimeGrid",
    "Transported",
    "VESDE",
    "VPSDE",
    "WhitenedFlow",
    "analytic",
    "available",
    "check_score",
    "cosine_betas",
    "mismatch_warning",
    "prior_mismatch",
    "create",
    "denoised",
    "describe",
    "geometric_sigmas",
    "linear_betas",
    "networks_of",
    "noise",
    "options",
    "require_eval_mode",
    "time_grids",
    "transport",
    "ScheduledVPSDE",
    "with_terminal_snr",
]
