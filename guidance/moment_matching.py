r"""Moment matching: a Gaussian with the mean and the covariance of p(x_0 | x_t).

    (n^2 + A C A^T) w = y - A D,      C = (sigma^2 / alpha) J

with C as the score has it, and w by conjugate gradients, in which a product with C is a vector-Jacobian product (Rozet et al.
2024, arXiv:2405.13712, section 4 and algorithm 3). Entry i is in units of S_i = sqrt(n_i^2 + r^2 |A_i|^2), with the r below,

    S^-1 (n^2 + A C A^T) S^-1 v = S^-1 (y - A D),      w = S^-1 v

for beside an entry of large noise the others would be rounding. For Gaussian data p(x_0 | x_t) *is* that Gaussian, C does not
depend on x_t, and the posterior's score is exact once the iterations suffice: as many as that system has different eigenvalues,
at most the number of measured entries; in float32 one or two more, where the noise is hundreds of times below the data.

A network's derivative need not be a covariance. Where the noise is large C is a small difference times sigma^2 / alpha, and
what a network errs by comes out as variances far below 0: on digits -57, where the data's are below 1. No step along such a
direction leads to a solution. So a sample for which C is negative along A^T S^-2 (y - A D), by more than rounding, gets

    C' = r^2 I,    r^2 = d^2 kappa^2 / (d^2 + kappa^2)

of `PiGDM` instead; one that meets a negative variance later stops there. No exact score is such, and nothing changes there.
Neither has to do with iterations that are too few, which leave a residual: `Matched` says which of the three was the case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guidance.approximation import Approximation, Denoised
from numerics import conjugate_gradients, expand_as, inner, require_count, require_positive
from sde_lib import Measurement


@dataclass(frozen=True, kw_only=True)
class Matched:
    """What became of each sample's system.

    Attributes:
        u: `(B, *)`, A^T w.
        replaced: `(B,)`, true where the score's derivative is no covariance, and PiGDM's width stands for it.
        stopped: `(B,)`, true where a negative variance was met after the first direction: w is that of the directions before.
        residual: `(B,)`, |S^-1 (y - A D - (n^2 + A C' A^T) w)| / |S^-1 (y - A D)|: what the iterations have left; 0 where they
            sufficed.
    """

    u: Tensor
    replaced: Tensor
    stopped: Tensor
    residual: Tensor


@dataclass(frozen=True, kw_only=True)
class MomentMatching(Approximation):
    """The mean and covariance of p(x_0 | x_t), by conjugate gradients.

    Exact on Gaussians. Where p(x_0 | x_t) has several modes a Gaussian is none of them: a mode that y rules out keeps some
    weight. Cost: an evaluation and iterations + 1 products.

    Args:
        iterations: of conjugate gradients. 1 is too few where the data's entries depend on each other (docs/guidance.md has the
            errors).
        data_std: d, the standard deviation of the data, for where the derivative of the score is no covariance.

    Raises:
        UserError: for less than one iteration, or a data_std that is not above 0.
    """

    iterations: int = 5
    data_std: float = 1.0

    def __post_init__(self) -> None:
        require_count(self.iterations, "iterations")
        require_positive(self.data_std, "data_std")

    covaries: ClassVar[bool] = True

    def direction(self, at: Denoised, measurement: Measurement) -> Tensor:
        return self.solve(at, measurement).u

    def solve(self, at: Denoised, measurement: Measurement) -> Matched:
        """u and how it was come by, at what `Posterior.at` says of some x_t: costs what a direction costs."""
        r = measurement.residual(at.x_0)
        kappa2 = (-at.sde.log_snr(at.t)).exp()
        r2 = self.data_std**2 * kappa2 / (self.data_std**2 + kappa2)
        # what rounding leaves of C = kappa^2 (I + sigma^2 grad score), per unit of A^T w
        rounding = 10 * torch.finfo(at.x_0.dtype).eps * kappa2
        scale = measurement.scale(r2, r)
        b = r / scale
        up = measurement.adjoint(b / scale)
        first = at.covary(up)
        none = (inner(up, first) < -rounding * inner(up, up)) | (rounding > r2 / 10)
        no_covariance, wide = expand_as(none, at.x_0), expand_as(r2, at.x_0)

        def apply(v: Tensor) -> Tensor:
            w = v / scale
            up = measurement.adjoint(w)
            product = first if v is b else at.covary(up)
            seen = measurement.operator(torch.where(no_covariance, wide * up, product))
            return (measurement.variance(w) * w + seen) / scale

        def least(v: Tensor) -> Tensor:
            w = v / scale
            up = measurement.adjoint(w)
            return inner(w, measurement.variance(w) * w) - rounding * inner(up, up)

        v, residual, indefinite = conjugate_gradients(apply, b, self.iterations, least=least)
        return Matched(u=measurement.adjoint(v / scale), replaced=none, stopped=indefinite, residual=residual)
