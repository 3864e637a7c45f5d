r"""Which times a variational bound looks at, and how far its sum is off.

A bound is a sum over cells of the log-SNR, sum_i a_i e_i, e_i an expected squared error that a draw of the noise estimates.
What it would be is known for the perfect score of N(0, s^2 I), s^2 the data's mean square:

    e_i = w_i D,    Var = D (2 w_i^4 + 4 w_i^3 (1 - w_i)) of one draw,    w = alpha^2 s^2 / (alpha^2 s^2 + sigma^2)

(the first of the variance's terms is the length of the noise, which is not there where it has been taken out). This serves
three times:

- Cells are drawn by importance, i with probability q_i = 0.9 a_i w_i / sum(a w) + 0.1 l_i / sum(l), l_i its length in log-SNR;
  it counts a_i / q_i times. Real data are easier than such a Gaussian where their structure shows, and a network may be worse
  than it where it has learned little, each by a factor; no draw then counts much more than the others. (A chain that ends far
  below its first step has nearly all of its bound in that step: 1,000 equal steps of VP down to t = 1e-5 draw it once in 1,000
  times, when all are drawn alike.)
- The Gaussian's sum is known without a draw, so a multiple b of it is a control variate: draws estimate a_i (e_i - b w_i D)
  only. The draws lie in K strata of equal probability; b is, for each stratum, the ratio of sums over the *others*, which
  leaves the estimate without bias.
- Few draws that miss what is rare (a noise that carries an image from one mode to another) do not show it in their spread. To
  the variance estimated, 1 / (K + 1) of the Gaussian's own is added, as if one stratum more had been drawn.

No pilot run chooses q: an image's bound stays its own, whatever its batch mates, and costs nothing more. Two independent draws
or more in each stratum estimate the variance within it without bias, and that is all of the estimate's variance.

docs/likelihood.md has rms(error) / rms(stated) from 8 to 1,000 draws, and how many errors are beyond four bars, as
`benchmarks/bound_calibration.py` measures them. Of a law far narrower than its mean square, seen at a noise far below it, few
draws state too large an error (8 draws of VP's chain of 200 steps, for two groups of 0.01 around -1 and 1: 20 times).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_DRAWS = 8
"""Fewer give three strata or less, of which no error bar can be made."""


@dataclass(frozen=True, kw_only=True)
class StepDraws:
    """n draws of cells for each image.

    Attributes:
        cells: i `(B, n)`.
        place: where in the cell `(B, n)`, uniform in [0, 1).
        factors: 1 / q_i `(B, n)`.
        expected: a_i w_i D of the draws' cells `(B, n)`, of the Gaussian.
        shares: its mean over each stratum of what a draw counts `(B, K)`; their mean is its sum.
        spread: variance of one draw of it within its cell `(B,)`.
    """

    cells: Tensor
    place: Tensor
    factors: Tensor
    expected: Tensor
    shares: Tensor
    spread: Tensor

    @classmethod
    def of(
        cls, u: Tensor, *, lengths: Tensor, weights: Tensor, w: Tensor, dimensions: int, without_length: bool = False
    ) -> StepDraws:
        """Draws of N cells.

        Args:
            u: independent uniform numbers `(B, n)`.
            lengths: l `(N,)`, of the cells in log-SNR. weights: a `(N,)`. w: `(B, N)`, from 0 to 1.
            dimensions: D.
            without_length: have the terms the length of the noise taken out?
        """
        n = u.shape[1]
        K = max(1, n // 2)
        expected = weights * w
        q = 0.9 * expected / expected.sum(dim=1, keepdim=True) + 0.1 * lengths / lengths.sum()
        expected = expected * dimensions
        ends = q.cumsum(dim=1)
        ends = ends / ends[:, -1:]
        below = torch.cat([torch.zeros_like(ends[:, :1]), ends], dim=1)

        def cell(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Of places `v` among the probabilities: the cell, how much of it lies before, and its probability."""
            i = torch.searchsorted(ends, v, right=True).clamp(max=q.shape[1] - 1)
            width = below.gather(1, i + 1) - below.gather(1, i)
            return i, ((v - below.gather(1, i)) / width).clamp(0, 1), width

        i, place, width = cell((_stratum(n, u.device) + u) / K)
        edges = torch.arange(1, K, dtype=u.dtype, device=u.device) / K
        at, part, _ = cell(edges.expand(len(u), -1).contiguous())
        total = torch.cat([torch.zeros_like(ends[:, :1]), expected.cumsum(dim=1)], dim=1)
        sums = torch.cat([total[:, :1], total.gather(1, at) + part * expected.gather(1, at), total[:, -1:]], dim=1)
        variance = 4 * w**3 * (1 - w) if without_length else 4 * w**3 - 2 * w**4
        return cls(
            cells=i,
            place=place,
            factors=1 / width,
            expected=expected.gather(1, i),
            shares=K * sums.diff(dim=1),
            spread=dimensions * (weights.square() / ends.diff(dim=1, prepend=below[:, :1]) * variance).sum(dim=1),
        )

    def total(self, terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum's estimate from draws of a_i e_i `(B, n)`, its standard error, and that error's degrees of freedom, `(B,)`.

        With v_h the variance of stratum h's mean from its n_h draws, in K strata: the standard error is
        sqrt(sum v_h / K^2 + spread / (n (K + 1))), and its degrees of freedom (sum v_h)^2 / sum(v_h^2 / (n_h + 1)),
        Satterthwaite's with the spread of the v_h themselves taken out; K + 2 for strata that are alike. Both are NaN below
        eight draws.
        """
        n = terms.shape[1]
        K = max(1, n // 2)
        stratum = _stratum(n, terms.device)
        members = torch.nn.functional.one_hot(stratum, K).to(terms.dtype)
        sizes = members.sum(dim=0)
        counted, expected = terms * self.factors, self.expected * self.factors
        if n < LEAST_DRAWS:
            unknown = torch.full_like(counted[:, 0], math.nan)
            return (counted @ (members / sizes)).mean(dim=1), unknown, unknown
        ours, theirs = counted @ members, expected @ members
        multiple = (ours.sum(dim=1, keepdim=True) - ours) / (theirs.sum(dim=1, keepdim=True) - theirs)
        rest = counted - multiple[:, stratum] * expected
        means = rest @ (members / sizes)
        v = (rest - means[:, stratum]).square() @ (members / (sizes * (sizes - 1)))
        squares = (v.square() / (sizes + 1)).sum(dim=1)
        degrees = torch.where(squares > 0, v.sum(dim=1).square() / squares, math.inf)
        estimate = (means + multiple * self.shares).mean(dim=1)
        return estimate, (v.sum(dim=1) / K**2 + self.spread / (n * (K + 1))).sqrt(), degrees


def _stratum(n: int, device: torch.device) -> Tensor:
    """Of each draw `(n,)`: two in each, three in the last where n is odd."""
    return (torch.arange(n, device=device) // 2).clamp(max=max(1, n // 2) - 1)
