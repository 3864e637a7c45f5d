"""What the error of a set's bits/dim is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ErrorBudget:
    r"""The standard error of the mean bits/dim of n images, and its parts.

    From estimates e_ijk, of image i = 1 ... n with the j-th of m draws of the dequantisation noise and the k-th of K
    independent estimates of the trace; var is the unbiased variance over an index, and an index left out is averaged over:

        total           S^2 = var_i(e_i) / n,                                        in which all three parts are contained
        probe           P^2 = sum_ij var_k(e_ijk) / (K m^2 n^2)                      what new probes would change
        repetition      R^2 = sum_i var_j(e_ij) / (m n^2)                            what new noise and new probes would change
        dequantisation  sqrt(R^2 - P^2)                                              what new noise would change
        data            sqrt(S^2 - R^2)                                              what other images would change

    A part that would need two draws, or two estimates, where there is one cannot be known and is NaN, never 0; an exact trace,
    or no noise, is 0. The solver's error is a bias, not a spread: it stands beside them.

    Attributes:
        estimates: `(n, m, K)` bits/dim, of the images that converged.
        solver_errors: `(n,)` bits/dim, as stated for each image; NaN where there is none.
        exact: is the trace exact?
        noisy: was noise drawn?
    """

    estimates: Tensor
    solver_errors: Tensor
    exact: bool
    noisy: bool

    @property
    def mean(self) -> float:
        """The set's bits/dim."""
        return float(self.estimates.mean())

    @property
    def total(self) -> float:
        """S; NaN for one image."""
        n = len(self.estimates)
        return float(self.estimates.mean(dim=(1, 2)).std() / math.sqrt(n)) if n > 1 else math.nan

    @property
    def probe(self) -> float:
        """P; 0 for an exact trace, NaN with one estimate."""
        n, m, K = self.estimates.shape
        if self.exact:
            return 0.0
        if K < 2 or n < 1:
            return math.nan
        return float((self.estimates.var(dim=2) / K).mean(dim=1).div(m).sum().sqrt() / n)

    @property
    def dequantization(self) -> float:
        """sqrt(R^2 - P^2); 0 without noise, NaN with one draw, or one random estimate a draw.

        A single estimate's error cannot be told from the noise of its draw.
        """
        if not self.noisy:
            return 0.0
        between = self._repetition - self.probe**2
        return math.sqrt(max(between, 0.0)) if between == between else math.nan

    @property
    def data(self) -> float:
        """sqrt(S^2 - R^2); NaN where too few images give no estimate of it."""
        rest = self.total**2 - self._repetition  # NaN where that is
        return math.sqrt(rest) if rest >= 0 else math.nan

    @property
    def solver(self) -> float:
        """The mean of the solver's errors over the images that have one; NaN where none has."""
        known = self.solver_errors[self.solver_errors.isfinite()]
        return float(known.mean()) if len(known) else math.nan

    @property
    def _repetition(self) -> float:
        """R^2; NaN where it is unknown."""
        n, m, _ = self.estimates.shape
        if not self.noisy and (self.exact or m < 2):
            return self.probe**2
        if m < 2 or n < 1:
            return math.nan
        return float(self.estimates.mean(dim=2).var(dim=1).sum() / m / n**2)
