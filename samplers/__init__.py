"""Samplers: ways of using `(sde, score)` to draw data. Each is called alike and returns a `SampleResult`."""

from __future__ import annotations

from numerics import SampleStreams
from samplers.adaptive_sde import AdaptiveSDE
from samplers.ancestral import Ancestral
from samplers.annealed_langevin import AnnealedLangevin, AnnealedLangevinCorrector
from samplers.base import GridSampler, Sampler
from samplers.callbacks import Progress, Trajectory, all_of
from samplers.catalogue import CORRECTIONS, CORRECTORS, PREDICTORS, SAMPLERS, available, create, options
from samplers.corrections import ClipDenoised, CorrectedScore, Correction, DynamicThreshold, Temperature
from samplers.correctors import Corrector
from samplers.ddim import DDIM
from samplers.ddnm import DDNM
from samplers.deis import DEIS
from samplers.dpm_solver import DPMSolver
from samplers.euler_maruyama import EulerMaruyama
from samplers.heun_edm import HeunEDM
from samplers.langevin import Langevin
from samplers.measured import MeasuredSampler
from samplers.predictor_corrector import PredictorCorrector
from samplers.predictors import Predictor
from samplers.probability_flow import ProbabilityFlow
from samplers.repaint import RePaint
from samplers.replacement import Replacement
from samplers.result import Callback, SampleResult, SamplingError, StepInfo
from samplers.reverse_diffusion import ReverseDiffusion
from samplers.run import Run
from samplers.sdedit import Edited, sdedit
from samplers.seeds import SEEDS
from samplers.step import StatefulStep, Step
from samplers.torchsde_solver import TorchSDE
from samplers.twisted_smc import TwistedSMC
from samplers.unipc import UniPC
from sde_lib import time_grids
from sde_lib.time_grids import (
    Cosine,
    Custom,
    DDPMIndices,
    Karras,
    Logistic,
    LogSNR,
    Quadratic,
    TimeGrid,
    Uniform,
)

__all__ = [
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "AnnealedLangevinCorrector",
    "CORRECTIONS",
    "CORRECTORS",
    "Callback",
    "ClipDenoised",
    "CorrectedScore",
    "Correction",
    "Corrector",
    "Cosine",
    "Custom",
    "DDIM",
    "DDNM",
    "DDPMIndices",
    "DEIS",
    "DPMSolver",
    "DynamicThreshold",
    "Edited",
    "EulerMaruyama",
    "GridSampler",
    "HeunEDM",
    "Karras",
    "Langevin",
    "LogSNR",
    "Logistic",
    "MeasuredSampler",
    "PREDICTORS",
    "Predictor",
    "PredictorCorrector",
    "ProbabilityFlow",
    "Progress",
    "Quadratic",
    "RePaint",
    "Replacement",
    "ReverseDiffusion",
    "Run",
    "SAMPLERS",
    "SEEDS",
    "SampleResult",
    "SampleStreams",
    "Sampler",
    "SamplingError",
    "StatefulStep",
    "Step",
    "StepInfo",
    "Temperature",
    "TimeGrid",
    "TorchSDE",
    "Trajectory",
    "TwistedSMC",
    "UniPC",
    "Uniform",
    "all_of",
    "available",
    "create",
    "options",
    "sdedit",
    "time_grids",
]
