r"""Tweedie moment projection: the covariance of p(x_0 | x_t), its measured part made diagonal.

    n^2 + A C A^T   by   n^2 + diag(A C A^T 1),      C = (sigma^2 / alpha) J

(Boys et al. 2023, arXiv:2310.06721, section 3.1 for C and the row sums in place of the matrix for large problems). Where the
measured entries depend on each other only weakly it is nearly moment matching, at two products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guidance.approximation import Approximation, Denoised
from sde_lib import Measurement


@dataclass(frozen=True, kw_only=True)
class TMPD(Approximation):
    """Tweedie moment projection by row sums.

    Cost: an evaluation and two products. Row sums below 0, of entries that vary against each other, count as 0.

    Raises:
        UserError: in `posterior`, for a noise of 0.
    """

    divides: ClassVar[bool] = True

    covaries: ClassVar[bool] = True

    def direction(self, at: Denoised, measurement: Measurement) -> Tensor:
        r = measurement.residual(at.x_0)
        rows = measurement.operator(at.covary(measurement.adjoint(torch.ones_like(r))))
        return measurement.adjoint(r / (measurement.variance(r) + rows.clamp(min=0)))
