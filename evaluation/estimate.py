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
from typing import Any

import torch
from torch import Tensor

from data import DataError
from data.dataset import permutation

__all__ = ["Estimate", "as_values", "check_alike", "check_features", "jackknife", "jackknife_groups", "plain"]

_LARGEST = 1e30
"""Of a feature: its sixth power, which the cubic kernel takes, is a number."""


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

    def __str__(self) -> str:
        """The value to the digit that its error reaches, as in 1.23 ± 0.04 [1.16, 1.32]."""
        if not math.isfinite(self.stderr) or self.stderr <= 0:
            return f"{self.value:.4g}"
        digits = min(12, max(0, 1 - math.floor(math.log10(self.stderr))))
        bounds = [f"{bound:.{digits}f}" for bound in self.interval or ()]
        return f"{self.value:.{digits}f} ± {self.stderr:.{digits}f}" + (f" [{', '.join(bounds)}]" if bounds else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON (NaN as None)."""
        found: dict[str, Any] = {"value": plain(self.value), "stderr": plain(self.stderr)}
        if self.interval is not None:
            found["interval"] = [plain(bound) for bound in self.interval]
        return found


def plain(value: float) -> float | None:
    """The number, or None for NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def check_features(features: Tensor, what: str, least: int = 2) -> Tensor:
    """float64 (N, F) on the CPU, where measures have their generators, after checks.

    Raises:
        DataError: not (N, F), fewer than `least` rows, complex numbers, NaN, infinity, or numbers above 1e30.
    """
    if not isinstance(features, Tensor) or features.is_complex():
        kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise DataError(f"got {what} features of {kind}; expected a tensor of real numbers (N, F)")
    if features.ndim != 2 or features.shape[1] == 0:
        raise DataError(f"got {what} features of shape {tuple(features.shape)}; expected (N, F)")
    if features.shape[0] < least:
        raise DataError(f"got {what} features of {features.shape[0]} samples; expected at least {least}")
    features = features.detach().to("cpu").to(torch.float64)
    bad = int((~torch.isfinite(features).all(dim=1)).sum())
    if bad:
        raise DataError(
            f"got {what} features that are NaN or infinite for {bad} of {features.shape[0]} samples; expected "
            "finite numbers; look at those samples"
        )
    largest = float(features.abs().max()) if len(features) else 0.0
    if largest > _LARGEST:
        raise DataError(f"got {what} features up to {largest:.3g}; expected numbers up to {_LARGEST:g}; scale them")
    return features


def check_alike(samples: Tensor, reference: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """float64 (N, F) and (M, F), after checks.

    Raises:
        DataError: as `check_features`, or different F.
    """
    samples, reference = check_features(samples, "samples", least), check_features(reference, "reference", least)
    if samples.shape[1] != reference.shape[1]:
        raise DataError(
            f"got samples of {samples.shape[1]} features and a reference of {reference.shape[1]}; expected the same"
        )
    return samples, reference


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


def as_values(values: Any, name: str) -> Tensor:
    """`values` as a tensor: lists and arrays will do.

    Raises:
        DataError: what is none, or has no values.
    """
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"got {name} of {type(values).__name__}; expected a tensor, an array or a list of numbers"
        ) from error
    if found.is_meta:
        raise DataError(f'got {name} on the device "meta", where tensors have no values; expected them elsewhere')
    return found
