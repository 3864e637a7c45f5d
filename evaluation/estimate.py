"""A number with its standard error, and the jackknife that gives most of them.

Leave out one of g random groups of samples at a time, compute the statistic on the rest, and

    stderr^2 = (g - 1) / g * sum_j (theta_(-j) - mean)^2                                                   (1)

(Efron and Stein 1981, The jackknife estimate of variance). It is the error of having these samples and not
others; the reference that they are compared with is taken as given, unless a function says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data import DataError
from data.dataset import permutation

__all__ = ["Estimate", "check_features", "jackknife", "jackknife_groups"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured value.

    Args:
        value: the estimate.
        stderr: its standard error.
        interval: 95 % bootstrap interval (low, high), where there is one.
    """

    value: float
    stderr: float
    interval: tuple[float, float] | None = None


def check_features(features: Tensor, what: str, least: int = 2) -> Tensor:
    """float64 (N, F), after checks.

    Raises:
        DataError: not (N, F), fewer than `least` rows, or NaN or infinity in it.
    """
    if features.ndim != 2 or features.shape[1] == 0:
        raise DataError(f"{what} features have shape {tuple(features.shape)}, expected (N, F)")
    if features.shape[0] < least:
        raise DataError(f"{what} has {features.shape[0]} samples, expected at least {least}")
    features = features.detach().to(torch.float64)
    bad = int((~torch.isfinite(features).all(dim=1)).sum())
    if bad:
        raise DataError(
            f"{what} features are NaN or infinite for {bad} of {features.shape[0]} samples, expected "
            "finite numbers; look at those samples"
        )
    return features


def jackknife_groups(n: int, groups: int = 10) -> list[Tensor]:
    """Index sets (n / groups,) that partition 0..n - 1 in a fixed random way."""
    order = torch.from_numpy(permutation(n, seed=0))
    return list(order.tensor_split(min(groups, n)))


def jackknife(n: int, statistic: Callable[[Tensor], float], groups: int = 10) -> float:
    """Standard error (1) of a statistic of the samples at an index (M,)."""
    sets = jackknife_groups(n, groups)
    values = [statistic(torch.cat(sets[:j] + sets[j + 1 :])) for j in range(len(sets))]
    mean = math.fsum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * math.fsum((value - mean) ** 2 for value in values))
