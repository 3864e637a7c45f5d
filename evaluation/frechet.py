"""The Fréchet distance between two sets of features, each seen as one Gaussian.

Between N(m1, S1) and N(m2, S2) the 2-Wasserstein distance squared is (Dowson and Landau 1982, equation 4;
used for images by Heusel et al. 2017, arXiv:1706.08500)

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                                                 (1)

S1 S2 is not symmetric, and a general matrix square root of it is slow and, for singular covariances, may be
complex. It is not
needed: with any factor S1 = A A^T, the matrices S1 S2 and A^T S2 A have the same non-zero eigenvalues, the
latter is symmetric and positive semi-definite, and

    tr (S1 S2)^(1/2) = sum_i sqrt(lambda_i(A^T S2 A)).                                                     (2)

Everything is float64. The estimate from n samples is biased upwards by about c / n (Chong and Forsyth 2020,
arXiv:1911.07023), so two numbers compare only at equal n, and a floor at that n belongs beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, check_features, jackknife_groups

__all__ = ["Moments", "frechet_distance", "frechet_distance_of_moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (F,) and covariance (F, F), float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (N, F), the covariance with divisor N - 1."""
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1))


def _factor(covariance: Tensor) -> Tensor:
    """A with A A^T = covariance. Eigenvalues that are zero up to rounding are taken as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    tolerance = len(values) * torch.finfo(torch.float64).eps * values.abs().max()
    return vectors * torch.where(values > tolerance, values, 0.0).sqrt()


def _distance(mean: Tensor, trace: Tensor, factor: Tensor, other: Moments) -> float:
    product = factor.T @ other.covariance @ factor
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    # Rounding leaves eigenvalues of +-eps where zeros should be, and sqrt would turn each into 1e-8.
    tolerance = len(values) * torch.finfo(torch.float64).eps * values.abs().max()
    root = torch.where(values > tolerance, values, 0.0).sqrt().sum()
    shift = (mean - other.mean).square().sum()
    return max(0.0, float(shift + trace + other.covariance.trace() - 2 * root))


def frechet_distance_of_moments(a: Moments, b: Moments) -> float:
    """Equation (1), symmetric in its arguments, in squared units of the features.

    Raises:
        DataError: shapes that differ, or numbers that are not finite.
    """
    if a.mean.shape != b.mean.shape or a.mean.ndim != 1:
        raise DataError(f"means have shapes {tuple(a.mean.shape)} and {tuple(b.mean.shape)}, expected two of (F,)")
    size = len(a.mean)
    for moments in (a, b):
        if moments.covariance.shape != (size, size):
            raise DataError(f"a covariance has shape {tuple(moments.covariance.shape)}, expected ({size}, {size})")
        if not bool(torch.isfinite(moments.mean).all() and torch.isfinite(moments.covariance).all()):
            raise DataError("a mean or covariance holds NaN or infinity, expected finite numbers")
    a, b = (Moments(m.mean.double(), m.covariance.double()) for m in (a, b))
    return _distance(a.mean, a.covariance.trace(), _factor(a.covariance), b)


def frechet_distance(samples: Tensor, reference: Tensor) -> Estimate:
    """Fréchet distance of feature sets (N, F) and (M, F), with a jackknife error over the samples.

    Raises:
        DataError: fewer than 2 rows, different F, NaN or infinity.
    """
    samples, reference = check_features(samples, "samples"), check_features(reference, "reference")
    if samples.shape[1] != reference.shape[1]:
        raise DataError(
            f"samples have {samples.shape[1]} features and the reference {reference.shape[1]}, expected the same"
        )
    target = Moments.of(reference)
    factor, trace = _factor(target.covariance), target.covariance.trace()
    n = len(samples)
    # Moments without a group are those of everything minus the group's: one pass over the samples for all
    # groups. Shifting by the mean first keeps that subtraction accurate.
    centre = samples.mean(dim=0)
    shifted = samples - centre
    total = shifted.T @ shifted

    def distance(count: int, first: Tensor, second: Tensor) -> float:
        mean = first / count
        covariance = (second - count * torch.outer(mean, mean)) / (count - 1)
        return _distance(target.mean, trace, factor, Moments(mean + centre, covariance))

    value = distance(n, torch.zeros_like(centre), total)
    left_out = []
    for group in jackknife_groups(n):
        if n - len(group) >= 2:
            part = shifted[group]
            left_out.append(distance(n - len(group), -part.sum(dim=0), total - part.T @ part))
    if len(left_out) < 2:
        return Estimate(value=value, stderr=math.nan)
    mean = math.fsum(left_out) / len(left_out)
    variance = math.fsum((entry - mean) ** 2 for entry in left_out) * (len(left_out) - 1) / len(left_out)
    return Estimate(value=value, stderr=math.sqrt(variance))
