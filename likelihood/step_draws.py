r"""Which times a variational bound looks at, and how far its sum is off.

A bound is a sum over cells of the log-SNR, sum_i a_i e_i, e_i an expected squared error that a draw of the noise estimates.
The cells are drawn by importance: i with probability q_i, which counts a_i / q_i times. For data of variance s^2 and a
perfect score of N(0, s^2 I), e_i = w_i D with w = alpha^2 s^2 / (alpha^2 s^2 + sigma^2), so

    q_i = 0.9 a_i w_i / sum(a w) + 0.1 l_i / sum(l),        l_i the cell's length in log-SNR

Real data are easier than such a Gaussian where their structure shows, and a network may be worse than it where it has learned
little, each by a factor; no draw then counts much more than the others. (A chain that ends far below its first step has nearly
all of its bound in that step: 1,000 equal steps of VP down to t = 1e-5 draw it once in 1,000 times, when all are drawn alike.)
No pilot run chooses q: an image's bound stays its own, whatever its batch mates, and costs nothing more.

The draws lie in strata of equal probability, two independent ones in each, so that the spread within the strata is all of the
estimate's variance and is estimated without bias. Few draws make a bar that is itself uncertain, and an error of several bars
more likely than a normal law has it; so the variance stated is (1 + 3 / (2 K)) times the estimate from K strata. Measured over
2,000 repetitions (`benchmarks/bound_calibration.py`): rms(error) / rms(stated) 0.83 to 1.03 from 8 to 1,000 draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_DRAWS = 8
"""Fewer give four strata or less, of which no error bar can be made."""


def importance(lengths: Tensor, weights: Tensor, shares: Tensor) -> Tensor:
    """q `(B, N)`, which sums to 1.

    Args:
        lengths: l `(N,)`, of the cells in log-SNR.
        weights: a `(N,)`.
        shares: w `(B, N)`, from 0 to 1.
    """
    expected = weights * shares
    return 0.9 * expected / expected.sum(dim=1, keepdim=True) + 0.1 * lengths / lengths.sum()


@dataclass(frozen=True, kw_only=True)
class StepDraws:
    """n draws of cells for each image.

    Attributes:
        cells: i `(B, n)`.
        place: where in the cell `(B, n)`, uniform in [0, 1).
        factors: 1 / q_i `(B, n)`.
    """

    cells: Tensor
    place: Tensor
    factors: Tensor

    @classmethod
    def of(cls, q: Tensor, u: Tensor) -> StepDraws:
        """From the cells' probabilities `(B, N)` and independent uniform numbers `(B, n)`."""
        n = u.shape[1]
        K = max(1, n // 2)
        stratum = (torch.arange(n, device=u.device) // 2).clamp(max=K - 1)
        v = (stratum + u) / K
        ends = q.cumsum(dim=1)
        ends = ends / ends[:, -1:]
        cells = torch.searchsorted(ends, v, right=True).clamp(max=q.shape[1] - 1)
        before = torch.where(cells > 0, ends.gather(1, (cells - 1).clamp(min=0)), 0.0)
        width = ends.gather(1, cells) - before
        return cls(cells=cells, place=((v - before) / width).clamp(0, 1), factors=1 / width)

    def total(self, terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum's estimate from draws of a_i e_i `(B, n)`, its standard error, and that error's degrees of freedom, `(B,)`.

        With v_h the variance of stratum h's mean from its n_h draws, in K strata: the standard error is
        sqrt((1 + 3 / (2 K)) sum v_h) / K, and its degrees of freedom (sum v_h)^2 / sum(v_h^2 / (n_h + 1)), Satterthwaite's with
        the spread of the v_h themselves taken out; K + 2 for strata that are alike. Both are NaN below eight draws.
        """
        counted = terms * self.factors
        n = counted.shape[1]
        K = max(1, n // 2)
        pairs, last = counted[:, : 2 * (K - 1)].reshape(len(counted), K - 1, 2), counted[:, 2 * (K - 1) :]
        means = torch.cat([pairs.mean(dim=2), last.mean(dim=1, keepdim=True)], dim=1)
        if n < LEAST_DRAWS:
            unknown = torch.full_like(means[:, 0], math.nan)
            return means.mean(dim=1), unknown, unknown
        sizes = torch.full((K,), 2.0, dtype=torch.float64, device=counted.device)
        sizes[-1] = last.shape[1]
        v = torch.cat([pairs.var(dim=2), last.var(dim=1, keepdim=True)], dim=1) / sizes
        squares = (v.square() / (sizes + 1)).sum(dim=1)
        degrees = torch.where(squares > 0, v.sum(dim=1).square() / squares, math.inf)
        return means.mean(dim=1), (v.sum(dim=1) * (1 + 1.5 / K)).sqrt() / K, degrees
