"""Training: objectives, time sampling, averages, checkpoints, and the loop.

from training import DSM, LogNormal, TrainingOptions, train

options, objective = TrainingOptions(steps=1000), DSM(times=LogNormal())
result = train(model, dataset.split("train"), dataset.transform(), options, objective=objective)
result.load_averages(model)
"""

from __future__ import annotations

from sde_lib import cosine_betas, geometric_sigmas, linear_betas, with_terminal_snr
from training.callbacks import Callback
from training.catalogue import OBJECTIVES, TIMES, WEIGHTINGS, available, create, options
from training.checkpoint import Checkpoint, CheckpointFolder, load_plain, to_plain
from training.discrete import SMLD, DDPMSimple, DiscreteTime
from training.distributed import Group, current_group, process_group
from training.dual_score_matching import DualScoreMatching, LevelledEnergy
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
from training.flow_matching import Reflow, joined
from training.hierarchical import NegativeELBO, OneStepELBO
from training.joint_energy import CrossEntropy, EnergyWatch, JointEnergy
from training.latent import LatentELBO
from training.loop import train
from training.loss_history import LossHistory
from training.maximum_likelihood import FlowPass, MaximumLikelihood
from training.noise_classifier import train_noise_classifier
from training.objectives import DSM, Objective, dsm_loss
from training.plan import Estimate, Plan, estimate, plan
from training.posthoc_ema import PowerEMA, reconstruct
from training.result import TrainingResult
from training.run_lock import RunLock
from training.score_matching import ExactScoreMatching, FiniteDifferenceScoreMatching, SlicedScoreMatching
from training.signals import Interruption
from training.stable_target import PosteriorNoise, StableTarget, posterior_noise, stable_noise
from training.state import TrainState
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
from training.trainable import NoisePredictor, Trainable, as_trainable
from training.training_options import TrainingOptions, options_help
from training.validation import Validation
from training.variational import VLB, Hybrid
from training.vdm import LearnedForwardLoss, VDMLoss
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
from training.weights import Origin, initialize_from, load_weights

__all__ = [
    "Adaptive",
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFolder",
    "CrossEntropy",
    "DDPMSimple",
    "DSM",
    "DiscreteTime",
    "DiskError",
    "DualScoreMatching",
    "EDMWeighting",
    "ELBO",
    "EMA",
    "EnergyWatch",
    "Estimate",
    "ExactScoreMatching",
    "FiniteDifferenceScoreMatching",
    "FlowMatching",
    "FlowPass",
    "Group",
    "Hybrid",
    "ImportanceTime",
    "Interrupted",
    "Interruption",
    "LevelledEnergy",
    "LikelihoodWeighting",
    "LockedError",
    "LogNormal",
    "MaximumLikelihood",
    "LossHistory",
    "MinSNR",
    "NoisePredictor",
    "NonFiniteError",
    "OBJECTIVES",
    "Objective",
    "Origin",
    "Plan",
    "PosteriorNoise",
    "PowerEMA",
    "Reflow",
    "RunLock",
    "SMLD",
    "ScoreError",
    "Simple",
    "SlicedScoreMatching",
    "SoftMinSNR",
    "StableTarget",
    "StratifiedTime",
    "TIMES",
    "TabulatedTime",
    "TimeSampler",
    "TrainState",
    "Trainable",
    "TrainingDataError",
    "TrainingError",
    "TrainingOptions",
    "TrainingResult",
    "UniformLogSNR",
    "UniformTime",
    "UsageError",
    "VLB",
    "Validation",
    "VelocityPrediction",
    "WEIGHTINGS",
    "Weighting",
    "as_trainable",
    "available",
    "cosine_betas",
    "create",
    "current_group",
    "dsm_loss",
    "estimate",
    "geometric_sigmas",
    "initialize_from",
    "joined",
    "linear_betas",
    "load_plain",
    "load_weights",
    "options",
    "options_help",
    "plan",
    "process_group",
    "reconstruct",
    "to_plain",
    "posterior_noise",
    "stable_noise",
    "train",
    "NegativeELBO",
    "OneStepELBO",
    "JointEnergy",
    "LatentELBO",
    "LearnedForwardLoss",
    "VDMLoss",
    "train_noise_classifier",
    "with_terminal_snr",
]
