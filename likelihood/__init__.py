"""Likelihoods: from a score to log-densities in nats and bits per dimension, with their errors."""

from __future__ import annotations

from likelihood.bits_per_dim import BitsPerDim, bits_per_dim, companion_error
from likelihood.bounds import Bound, elbo
from likelihood.dequantization import Dequantizer, TruncatedNormal, Uniform
from likelihood.divergence import Coloured, Divergence, Exact, Hutchinson
from likelihood.integration import Likelihood
from likelihood.latent import (
    Interpolation,
    RoundTrip,
    SampledLikelihood,
    Transported,
    decode,
    encode,
    interpolate,
    round_trip,
    sample_with_log_prob,
)
from likelihood.methods import Method, accurate, fast
from likelihood.pilot import pilot_grid
from likelihood.probability_flow import log_likelihood
from numerics import UserError

_NAMES: dict[str, type[Divergence] | type[Dequantizer]] = {
    "exact": Exact,
    "hutchinson": Hutchinson,
    "coloured": Coloured,
    "uniform": Uniform,
    "truncated_normal": TruncatedNormal,
}


def available() -> tuple[str, ...]:
    """The names that `create` knows: trace estimators and dequantisers."""
    return tuple(_NAMES)


def create(name: str, **options: object) -> Divergence | Dequantizer:
    """The trace estimator or dequantiser of that name.

    Raises:
        UserError: for an unknown name or option.
    """
    if name not in _NAMES:
        raise UserError(f"got {name!r}; expected one of {', '.join(_NAMES)}")
    try:
        return _NAMES[name](**options)
    except TypeError as error:
        raise UserError(f"got options {sorted(options)} for {name!r}: {error}") from error


__all__ = [
    "BitsPerDim",
    "Bound",
    "Coloured",
    "Dequantizer",
    "Divergence",
    "Exact",
    "Hutchinson",
    "Interpolation",
    "Likelihood",
    "Method",
    "RoundTrip",
    "SampledLikelihood",
    "Transported",
    "TruncatedNormal",
    "Uniform",
    "accurate",
    "available",
    "bits_per_dim",
    "companion_error",
    "create",
    "decode",
    "elbo",
    "encode",
    "fast",
    "interpolate",
    "log_likelihood",
    "pilot_grid",
    "round_trip",
    "sample_with_log_prob",
]
