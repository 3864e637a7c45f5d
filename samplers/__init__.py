"""Samplers: ways of using `(sde, score)` to draw data. Each is called alike and returns a `SampleResult`."""

from __future__ import annotations

from numerics import RK4, Dopri5, Heun, SampleStreams, SciPy, TorchDiffEq
from samplers.adaptive_sde import AdaptiveSDE
from samplers.ancestral import Ancestral
from samplers.annealed_langevin import AnnealedLangevin
from samplers.base import GridSampler, Sampler, SampleResult, SamplingError, StepInfo
from samplers.callbacks import Progress, Trajectory, all_of
from samplers.catalogue import available, create
from samplers.corrections import ClipDenoised, CorrectedScore, Correction, DynamicThreshold, Temperature
from samplers.correctors import Corrector
from samplers.ddim import DDIM
from samplers.deis import DEIS
from samplers.dpm_solver import DPMSolver
from samplers.edm import EDM
from samplers.euler_maruyama import EulerMaruyama
from samplers.langevin import Langevin
from samplers.predictor_corrector import PredictorCorrector
from samplers.predictors import Predictor
from samplers.probability_flow import ProbabilityFlow
from samplers.reverse_diffusion import ReverseDiffusion
from samplers.seeds import SEEDS
from samplers.torchsde_solver import TorchSDE
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
    "DDIM",
    "DEIS",
    "EDM",
    "RK4",
    "SEEDS",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "ClipDenoised",
    "CorrectedScore",
    "Correction",
    "Corrector",
    "Cosine",
    "Custom",
    "DDPMIndices",
    "DPMSolver",
    "Dopri5",
    "DynamicThreshold",
    "EulerMaruyama",
    "GridSampler",
    "Heun",
    "Karras",
    "Langevin",
    "LogSNR",
    "Logistic",
    "Predictor",
    "PredictorCorrector",
    "ProbabilityFlow",
    "Progress",
    "Quadratic",
    "ReverseDiffusion",
    "SampleResult",
    "SampleStreams",
    "Sampler",
    "SamplingError",
    "SciPy",
    "StepInfo",
    "Temperature",
    "TimeGrid",
    "TorchDiffEq",
    "TorchSDE",
    "Trajectory",
    "UniPC",
    "Uniform",
    "all_of",
    "available",
    "create",
    "time_grids",
]
