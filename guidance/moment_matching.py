r"""Moment matching: a Gaussian with the mean and the covariance of p(x_0 | x_t).

    (n^2 + A C A^T) w = y - A D,      C = (sigma^2 / alpha) J

with C as the score has it, and w by conjugate gradients, in which a product with C is a vector-Jacobian product (Rozet et al.
2024, arXiv:2405.13712, section 4 and algorithm 3). For Gaussian data p(x_0 | x_t) *is* that Gaussian, C does not depend on x_t,
and the posterior's score is exact once the iterations suffice: as many as A C A^T + n^2 has different eigenvalues, at most the
number of measured entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from guidance.approximation import Approximation, Denoised
from numerics import conjugate_gradients, require_count
from sde_lib import Measurement


@dataclass(frozen=True, kw_only=True)
class MomentMatching(Approximation):
    """The mean and covariance of p(x_0 | x_t), by conjugate gradients.

    Exact on Gaussians. Where p(x_0 | x_t) has several modes a Gaussian is none of them: a mode that y rules out keeps some
    weight. Cost: an evaluation and iterations + 1 products.

    Args:
        iterations: of conjugate gradients. 1 is too few where the data's entries depend on each other (docs/guidance.md has the
            errors).

    Raises:
        UserError: for less than one iteration.
    """

    iterations: int = 5

    def __post_init__(self) -> None:
        require_count(self.iterations, "iterations")

    covaries: ClassVar[bool] = True

    def direction(self, at: Denoised, measurement: Measurement) -> Tensor:
        def apply(w: Tensor) -> Tensor:
            return measurement.variance(w) * w + measurement.operator(at.covary(measurement.adjoint(w)))

        r = measurement.residual(at.x_0)
        return measurement.adjoint(conjugate_gradients(apply, r, self.iterations))
