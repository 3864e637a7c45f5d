"""Likelihoods: from a score to log-densities in nats and bits per dimension, with their errors."""

from __future__ import annotations

from likelihood.annealed_importance import (
    AnnealedImportance,
    Bracket,
    DiffusionPath,
    GeometricPath,
    Path,
    Weights,
)
from likelihood.bits_per_dim import BitsPerDim, bits_per_dim
from likelihood.bounds import Bins, Bound, Decoder, DiscretizedGaussian, GaussianDecoder, elbo
from likelihood.catalogue import DEQUANTIZERS, DIVERGENCES, available, create, describe, options
from likelihood.companion import companion_error
from likelihood.dequantization import Dequantizer, NoDequantization, TruncatedNormal, Uniform, UniformDequantizer
from likelihood.divergence import Coloured, Divergence, Exact, Hutchinson
from likelihood.error_budget import ErrorBudget
from likelihood.gaussian_chain import GaussianChain
from likelihood.integration import Likelihood
from likelihood.latent import (
    Interpolation,
    RoundTrip,
    SampledLikelihood,
    decode,
    encode,
    interpolate,
    round_trip,
    sample_with_log_prob,
)
from likelihood.latent_edits import SlerpGrid, attribute_direction, edit_latents, slerp_grid
from likelihood.method import Method
from likelihood.methods import accurate, fast
from likelihood.noise_level import NoiseLevel, estimate_noise_level
from likelihood.pilot import pilot_grid
from likelihood.probability_flow import log_likelihood
from likelihood.refinement import Refinement
from likelihood.steps import Choice, choose_steps
from likelihood.survey import Survey, survey
from sde_lib import Transported

__all__ = [
    "DEQUANTIZERS",
    "DIVERGENCES",
    "AnnealedImportance",
    "Bins",
    "BitsPerDim",
    "Bound",
    "Choice",
    "Bracket",
    "Coloured",
    "Decoder",
    "Dequantizer",
    "DiscretizedGaussian",
    "DiffusionPath",
    "Divergence",
    "ErrorBudget",
    "Exact",
    "GeometricPath",
    "GaussianChain",
    "GaussianDecoder",
    "Hutchinson",
    "Interpolation",
    "Likelihood",
    "Method",
    "NoDequantization",
    "NoiseLevel",
    "Refinement",
    "Path",
    "RoundTrip",
    "SampledLikelihood",
    "SlerpGrid",
    "Survey",
    "Transported",
    "TruncatedNormal",
    "Uniform",
    "UniformDequantizer",
    "Weights",
    "accurate",
    "attribute_direction",
    "available",
    "bits_per_dim",
    "choose_steps",
    "companion_error",
    "create",
    "decode",
    "describe",
    "edit_latents",
    "elbo",
    "encode",
    "estimate_noise_level",
    "fast",
    "interpolate",
    "log_likelihood",
    "options",
    "pilot_grid",
    "round_trip",
    "sample_with_log_prob",
    "slerp_grid",
    "survey",
]
