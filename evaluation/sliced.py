"""The sliced Wasserstein distance: project on random directions, where optimal transport is sorting, and
average.

    SW_2^2 = E_theta int_0^1 (F^-1_theta(u) - G^-1_theta(u))^2 du                                          (1)

with F, G the two laws along the unit vector theta (Rabin et al. 2012; Bonneel et al. 2015, Sliced and Radon
Wasserstein barycenters, equation 6). The integral of the two step functions is exact, for unequal numbers of
points too.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, check_alike, jackknife

__all__ = ["sliced_wasserstein"]


def _transport(a: Tensor, b: Tensor) -> float:
    """Mean over columns of the squared 2-Wasserstein distance of the points in sorted columns (n, L) and (m,
    L)."""
    n, m = len(a), len(b)
    if n == m:
        return float((a - b).square().mean())
    # In units of 1 / (n m), so that the jumps of both quantile functions are integers.
    jumps = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    width = torch.from_numpy(np.diff(jumps, prepend=0) / (n * m))
    left = torch.from_numpy((jumps - 1) // m)
    right = torch.from_numpy((jumps - 1) // n)
    return float(width @ (a[left] - b[right]).square().mean(dim=1))


def sliced_wasserstein(samples: Tensor, reference: Tensor, *, directions: int = 128, seed: int = 0) -> Estimate:
    """SW_2 of (N, F) and (M, F), equation (1) with its root taken, with a jackknife error over the samples.

    Args:
        samples: (N, F).
        reference: (M, F).
        directions: how many random ones (one direction, exactly, where F is 1).
        seed: of the directions: values compare at the same seed.

    Raises:
        DataError: fewer than 2 rows, different F, NaN or infinity.
    """
    samples, reference = check_alike(samples, reference)
    if directions < 1:
        raise DataError(f"got directions={directions}; expected at least 1")
    size = samples.shape[1]
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn((size, 1 if size == 1 else directions), generator=generator, dtype=torch.float64)
    theta = theta / theta.norm(dim=0)
    projected = samples @ theta
    target = (reference @ theta).sort(dim=0).values
    order = projected.argsort(dim=0)
    ordered = projected.gather(0, order)

    def without(kept: Tensor) -> float:
        # Rows of the sorted columns whose sample is kept: no second sort.
        mask = torch.zeros(len(samples), dtype=torch.bool)
        mask[kept] = True
        rows = mask[order]
        remaining = ordered.T[rows.T].reshape(theta.shape[1], len(kept)).T
        return math.sqrt(_transport(remaining, target))

    return Estimate(value=math.sqrt(_transport(ordered, target)), stderr=jackknife(len(samples), without))
