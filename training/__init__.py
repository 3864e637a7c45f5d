"""Training: objectives, time sampling, averages, checkpoints, and the loop.

from training import DSM, ImportanceTime, Likelihood, TrainingOptions, train

result = train(model, dataset.split("train"), dataset.transform(), TrainingOptions(steps=1000), folder="runs/vp")
"""

from __future__ import annotations

from training.callbacks import Callback
from training.checkpoint import Checkpoint, CheckpointFolder, load_plain, to_plain
from training.discrete import SMLD, DDPMSimple, DiscreteTime
from training.distributed import Group, current_group, process_group
from training.ema import EMA
from training.errors import (
    CheckpointError,
    DiskError,
    Interrupted,
    LockedError,
    NonFiniteError,
    TrainingDataError,
    TrainingError,
    UsageError,
)
from training.loop import TrainingResult, train
from training.objectives import DSM, Objective, dsm_loss
from training.options import TrainingOptions
from training.plan import Estimate, Plan, estimate, plan
from training.posthoc_ema import PowerEMA, reconstruct
from training.run_lock import RunLock
from training.score_matching import ExactScoreMatching, SlicedScoreMatching
from training.signals import Interruption
from training.state import TrainState
from training.tables import cosine_betas, geometric_sigmas, linear_betas
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
from training.validation import Validation
from training.variational import VLB, Hybrid
from training.weighting import (
    EDM,
    ELBO,
    FlowMatching,
    Likelihood,
    MinSNR,
    Simple,
    SoftMinSNR,
    VelocityPrediction,
    Weighting,
)
from training.weights import Origin, initialize_from, load_weights

__all__ = [
    "estimate",
    "plan",
    "initialize_from",
    "Validation",
    "Estimate",
    "Plan",
    "Adaptive",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFolder",
    "DDPMSimple",
    "DSM",
    "DiscreteTime",
    "DiskError",
    "EDM",
    "ELBO",
    "EMA",
    "ExactScoreMatching",
    "FlowMatching",
    "Group",
    "Hybrid",
    "ImportanceTime",
    "Interrupted",
    "Interruption",
    "Likelihood",
    "LockedError",
    "LogNormal",
    "MinSNR",
    "NonFiniteError",
    "Objective",
    "Origin",
    "PowerEMA",
    "RunLock",
    "SMLD",
    "Simple",
    "SlicedScoreMatching",
    "SoftMinSNR",
    "StratifiedTime",
    "TabulatedTime",
    "TimeSampler",
    "TrainState",
    "TrainingDataError",
    "TrainingError",
    "TrainingOptions",
    "TrainingResult",
    "UniformLogSNR",
    "UniformTime",
    "UsageError",
    "VLB",
    "VelocityPrediction",
    "Weighting",
    "cosine_betas",
    "current_group",
    "dsm_loss",
    "geometric_sigmas",
    "linear_betas",
    "load_plain",
    "load_weights",
    "process_group",
    "reconstruct",
    "to_plain",
    "train",
]
