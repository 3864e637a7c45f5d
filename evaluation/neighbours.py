"""Fidelity and coverage apart: how many samples lie where data are, and how much of the data has samples near. And how near:
the check for memorised training data.

Round every point of a set draw the ball that reaches its k-th nearest neighbour in the set. With these balls:

    precision   share of samples in some ball of the data                   (Kynkäänniemi et al. 2019, arXiv:1904.06991)
    recall      share of data in some ball of the samples                   (the same)
    density     mean over samples of (number of data balls it is in) / k    (Naeem et al. 2020, arXiv:2002.09797)
    coverage    share of data points whose ball holds a sample              (the same)

When the two laws are equal, E density = 1 exactly, and with N data points and M samples (Naeem et al., lemma 2)

    E coverage = 1 - prod_(j=1..k) (N - j) / (N + M - j).

Each is a mean over samples or over data points; its standard error is that of the mean, given the balls. All four depend on
the numbers of points, so compare at equal ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, check_alike, plain

__all__ = ["Manifold", "Memorisation", "manifold", "memorisation", "nearest"]

_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Manifold:
    """How many samples lie where data are, and how much of the data has samples near; each a share except density, which may
    exceed 1. A set's balls reach from each of its points to the k-th nearest other one.

    Args:
        precision: share of samples in some ball of the data (Kynkäänniemi et al. 2019, arXiv:1904.06991).
        recall: share of data in some ball of the samples (the same).
        density: mean over samples of the number of data balls it is in, divided by k (Naeem et al. 2020, arXiv:2002.09797).
        coverage: share of data points whose ball holds a sample (the same).
    """

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


def _mean(counts: Tensor, unit: float = 1.0) -> Estimate:
    """Of counts (N,) times `unit`. That none of n is there says that a share is below about 1 / n, not that it is zero, so half
    a count is added to the error in quadrature: for a share, Wilson's half width at one standard deviation (Wilson 1927),
    sqrt(p (1 - p) / n + 1 / (4 n^2)), up to a factor 1 + 1 / n."""
    values, n = counts.double() * unit, len(counts)
    return Estimate(value=float(values.mean()), stderr=math.hypot(float(values.std()) / math.sqrt(n), unit / (2 * n)))


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
            raise DataError(f"got {name}={value}; expected at least 1")
    least = max(k, k_density) + 1
    samples, reference = check_alike(samples, reference, least)
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
        density=_mean(holding, 1 / k_density),
        coverage=_mean(torch.cat(covered)),
    )


def nearest(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample (N, F), the distance (N,) to the nearest reference point (M, F) and its index (N,) int64.

    Of the reference, which may be bytes mapped from a file, 1,024 rows at a time are turned into float64.

    Raises:
        DataError: no rows, different F, NaN or infinity.
    """
    if len(reference) == 0:
        raise DataError("got a reference of 0 samples; expected at least 1")
    squares, index = (
        torch.full((len(samples),), math.inf, dtype=torch.float64),
        torch.zeros(len(samples), dtype=torch.int64),
    )
    for start in range(0, len(reference), _ROWS):
        points, block = check_alike(samples, reference[start : start + _ROWS], 1)
        best = _square_distances(points, block).min(dim=1)
        nearer = best.values < squares
        squares, index = torch.where(nearer, best.values, squares), torch.where(nearer, best.indices + start, index)
    # Of the pairs found the distance is computed directly, so that a copy is at distance zero.
    return (points - reference[index].to("cpu").to(torch.float64)).norm(dim=1), index


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """How near samples come to training data, beside how near held-out data do.

    Args:
        levels: of the quantiles.
        samples: quantiles of the samples' distances to their nearest training neighbours.
        held_out: the same of held-out data.
        share: of the samples that are nearer than 95 % of held-out data are: 0.05 where nothing is memorised.
    """

    levels: tuple[float, ...]
    samples: tuple[float, ...]
    held_out: tuple[float, ...]
    share: Estimate

    @property
    def suspicious(self) -> bool:
        """Whether the share is five standard errors above 0.05."""
        return self.share.value > 0.05 + 5 * self.share.stderr

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "levels": list(self.levels),
            "samples": [plain(value) for value in self.samples],
            "held_out": [plain(value) for value in self.held_out],
            "share": self.share.to_dict(),
        }

    def __str__(self) -> str:
        def row(name: str, values: tuple[float, ...]) -> str:
            return f"{name:13}" + "".join(f"{value:>10.4g}" for value in values)

        share, error = 100 * self.share.value, 100 * self.share.stderr
        return "\n".join(
            [
                f"{'quantile':13}" + "".join(f"{f'{100 * level:g} %':>10}" for level in self.levels),
                row("samples", self.samples),
                row("held-out data", self.held_out),
                f"nearer to a training datum than 95 % of held-out data: {share:.1f} ± {error:.1f} % of the samples (expected "
                "5 %)" + (": look for memorised ones" if self.suspicious else ""),
            ]
        )


_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75)


def memorisation(samples: Tensor, held_out: Tensor, training: Tensor) -> Memorisation:
    """Distances of samples (N, F) and of held-out data (M, F) to their nearest training neighbours (K, F), in any features.
    (Distances between laws do not see copies: those of the training data follow its law.)

    Raises:
        DataError: as `nearest`.
    """
    near, usual = nearest(samples, training)[0], nearest(held_out, training)[0]
    levels = torch.tensor(_QUANTILES, dtype=torch.float64)
    share = float((near < torch.quantile(usual, 0.05)).double().mean())
    # The quantile is known only as well as the held-out data tell it.
    error = math.sqrt(max(share * (1 - share), 0.05 * 0.95) / len(near) + 0.05 * 0.95 / len(usual))
    return Memorisation(
        levels=_QUANTILES,
        samples=tuple(torch.quantile(near, levels).tolist()),
        held_out=tuple(torch.quantile(usual, levels).tolist()),
        share=Estimate(value=share, stderr=error),
    )
