"""Fidelity and coverage apart: how many samples lie where data are, and how much of the data has samples
near.

Round every point of a set draw the ball that reaches its k-th nearest neighbour in the set. With balls B_k:

    precision = share of samples in some ball of the data                   (Kynkäänniemi et al. 2019,
    arXiv:1904.06991) recall    = share of data in some ball of the samples
              (the same) density   = mean over samples of (number of data balls it is in) / k          (Naeem
              et al. 2020, arXiv:2002.09797)
    coverage  = share of data points whose ball holds a sample                                         (the
    same)

When the two laws are equal, E density = 1 exactly, and with N data points and M samples (Naeem et al., lemma
2)

    E coverage = 1 - prod_(j=1..k) (N - j) / (N + M - j).

Each is a mean over samples or over data points; its standard error is that of the mean, given the balls. All
four depend on the numbers of points, so compare at equal ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, check_features

__all__ = ["Manifold", "manifold", "nearest"]

_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Manifold:
    """The four numbers; each is a share except density, which may exceed 1."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def _square_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) squared distances. By products, which is fast and in float64 exact to 1e-15 of the norms."""
    squares = torch.addmm(a.square().sum(dim=1, keepdim=True), a, b.T, alpha=-2).add_(b.square().sum(dim=1))
    return squares.clamp_(min=0)


def _radii(x: Tensor, k: tuple[int, ...]) -> list[Tensor]:
    """Squared distances (N,) to the k-th nearest other point, for every k."""
    found = []
    for start in range(0, len(x), _ROWS):
        block = _square_distances(x[start : start + _ROWS], x)
        index = torch.arange(len(block))
        block[index, index + start] = math.inf
        found.append(block.topk(max(k), dim=1, largest=False).values)
    nearest = torch.cat(found)
    return [nearest[:, i - 1] for i in k]


def _mean(values: Tensor) -> Estimate:
    values = values.double()
    return Estimate(value=float(values.mean()), stderr=float(values.std() / math.sqrt(len(values))))


def manifold(samples: Tensor, reference: Tensor, *, k: int = 3, k_density: int = 5) -> Manifold:
    """Precision, recall, density and coverage of samples (N, F) against data (M, F).

    Args:
        samples: (N, F).
        reference: (M, F).
        k: of precision and recall.
        k_density: of density and coverage.

    Raises:
        DataError: too few points for k, different F, NaN or infinity.
    """
    for name, value in (("k", k), ("k_density", k_density)):
        if value < 1:
            raise DataError(f"{name} is {value}, expected at least 1")
    least = max(k, k_density) + 1
    samples, reference = check_features(samples, "samples", least), check_features(reference, "reference", least)
    if samples.shape[1] != reference.shape[1]:
        raise DataError(
            f"samples have {samples.shape[1]} features and the reference {reference.shape[1]}, expected the same"
        )
    # Distances do not change when both sets are moved, and products are most accurate near zero.
    centre = reference.mean(dim=0)
    samples, reference = samples - centre, reference - centre
    # Equal points have distance zero up to this.
    slack = 1e-13 * float(torch.maximum(samples.square().sum(dim=1).max(), reference.square().sum(dim=1).max()))
    ball, ball_density = (radius + slack for radius in _radii(reference, (k, k_density)))
    sample_ball = _radii(samples, (k,))[0] + slack
    inside = torch.zeros(len(samples), dtype=torch.bool)
    holding = torch.zeros(len(samples))
    recalled, covered = [], []
    for start in range(0, len(reference), _ROWS):
        rows = slice(start, start + _ROWS)
        block = _square_distances(reference[rows], samples)
        inside |= (block <= ball[rows].unsqueeze(1)).any(dim=0)
        within = block <= ball_density[rows].unsqueeze(1)
        holding += within.sum(dim=0)
        covered.append(within.any(dim=1))
        recalled.append((block <= sample_ball).any(dim=1))
    return Manifold(
        precision=_mean(inside),
        recall=_mean(torch.cat(recalled)),
        density=_mean(holding / k_density),
        coverage=_mean(torch.cat(covered)),
    )


def nearest(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample (N, F), the distance (N,) to the nearest reference point (M, F) and its index (N,)
    int64: the check for memorised training data.

    Raises:
        DataError: no rows, different F, NaN or infinity.
    """
    samples, reference = check_features(samples, "samples", 1), check_features(reference, "reference", 1)
    if samples.shape[1] != reference.shape[1]:
        raise DataError(
            f"samples have {samples.shape[1]} features and the reference {reference.shape[1]}, expected the same"
        )
    best = [_square_distances(chunk, reference).min(dim=1) for chunk in samples.split(_ROWS)]
    index = torch.cat([entry.indices for entry in best])
    # Of the pairs found the distance is computed directly, so that a copy is at distance zero.
    return (samples - reference[index]).norm(dim=1), index
