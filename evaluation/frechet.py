"""The Fréchet distance between two sets of features, each seen as one Gaussian.

Between N(m1, S1) and N(m2, S2) the 2-Wasserstein distance squared is (Dowson and Landau 1982, equation 4; used for images by
Heusel et al. 2017, arXiv:1706.08500)

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                                                 (1)

S1 S2 is not symmetric, and a general matrix square root of it is slow and, for singular covariances, may be complex. It is not
needed: with any factors S1 = A A^T and S2 = B B^T,

    tr (S1 S2)^(1/2) = sum of the singular values of A^T B,                                                (2)

since the eigenvalues of S1 S2 are those of A^T B B^T A. No small number is squared on the way, and the centred features
themselves are factors, so fewer samples than features cost less, not more.

Everything is float64. The estimate from n samples is biased upwards by about c / n (Chong and Forsyth 2020, arXiv:1911.07023),
so two numbers compare only at equal n, and a floor at that n belongs beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, check_alike, jackknife_groups

__all__ = ["Moments", "frechet_distance", "frechet_distance_of_moments"]

# Singular values of a matrix of twice this size take minutes, and a distance needs eleven such.
_MAX_SIZE = 4096
# Of a covariance that was written in float32, relative to its largest entry.
_ROUNDING = 1e-5


@dataclass(frozen=True, eq=False)
class Moments:
    """What a Fréchet distance is computed from.

    Args:
        mean: (F,), float64.
        covariance: (F, F), float64.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (N, F), the covariance with divisor N - 1."""
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1))


def _checked(moments: Moments, size: int) -> Moments:
    mean, covariance = moments.mean.double(), moments.covariance.double()
    if covariance.shape != (size, size):
        raise DataError(f"got a covariance of shape {tuple(covariance.shape)}; expected ({size}, {size})")
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise DataError("got a mean or covariance with NaN or infinity; expected finite numbers")
    allowed = _ROUNDING * float(covariance.abs().max())
    skew = float((covariance - covariance.T).abs().max())
    if skew > allowed:
        raise DataError(f"got a covariance that differs by {skew:.3g} from its transpose; expected a symmetric matrix")
    return Moments(mean, (covariance + covariance.T) / 2)


def _factor(covariance: Tensor) -> Tensor:
    """A with A A^T = covariance (F, F)."""
    values, vectors = torch.linalg.eigh(covariance)
    if float(values[0]) < -_ROUNDING * float(values.abs().max()):
        raise DataError(f"got a covariance with the eigenvalue {float(values[0]):.3g}; expected none below zero")
    return vectors * values.clamp(min=0).sqrt()


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """Equation (1), symmetric in its arguments, in squared units of the features.

    Raises:
        DataError: shapes that differ, numbers that are not finite, or a covariance that is not symmetric and positive
            semi-definite (up to the rounding of float32).
    """
    if a.mean.shape != b.mean.shape or a.mean.ndim != 1:
        raise DataError(f"got means of shapes {tuple(a.mean.shape)} and {tuple(b.mean.shape)}; expected two of (F,)")
    a, b = (_checked(moments, len(a.mean)) for moments in (a, b))
    root = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    spread = a.covariance.trace() + b.covariance.trace()
    return max(0.0, float((a.mean - b.mean).square().sum() + spread - 2 * root))


@dataclass(frozen=True, eq=False)
class _Cloud:
    """Mean (F,), tr S and a factor (K, F) with S = factor^T factor, K the smaller of N and F."""

    mean: Tensor
    trace: Tensor
    factor: Tensor

    @classmethod
    def of(cls, features: Tensor) -> _Cloud:
        mean = features.mean(dim=0)
        centred = (features - mean) / math.sqrt(len(features) - 1)
        factor = torch.linalg.qr(centred, mode="r").R if len(features) > features.shape[1] else centred
        return cls(mean, centred.square().sum(), factor)

    def distance(self, other: _Cloud) -> float:
        root = torch.linalg.svdvals(self.factor @ other.factor.T).sum()
        return max(0.0, float((self.mean - other.mean).square().sum() + self.trace + other.trace - 2 * root))


def frechet_distance(samples: Tensor, reference: Tensor) -> Estimate:
    """Fréchet distance of feature sets (N, F) and (M, F), with a jackknife error over the samples.

    Raises:
        DataError: fewer than 2 rows, different F, NaN or infinity, or more than 4,096 of both features and samples.
    """
    samples, reference = check_alike(samples, reference)
    n, size = len(samples), samples.shape[1]
    if min(n, size) > _MAX_SIZE and min(len(reference), size) > _MAX_SIZE:
        raise DataError(
            f"got {n:,} samples of {size:,} features; expected at most {_MAX_SIZE:,} of one of them: take fewer "
            "samples or data (max_reference), or other features"
        )
    target = _Cloud.of(reference)
    value = _Cloud.of(samples).distance(target)
    kept = torch.ones(n, dtype=torch.bool)
    left_out = []
    for group in jackknife_groups(n):
        if n - len(group) >= 2:
            kept[group] = False
            left_out.append(_Cloud.of(samples[kept]).distance(target))
            kept[group] = True
    if len(left_out) < 2:
        return Estimate(value=value, stderr=math.nan)
    mean = math.fsum(left_out) / len(left_out)
    variance = math.fsum((entry - mean) ** 2 for entry in left_out) * (len(left_out) - 1) / len(left_out)
    return Estimate(value=value, stderr=math.sqrt(variance))
