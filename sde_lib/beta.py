"""The linear rate of VP and sub-VP."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError, as_time


@dataclass(frozen=True, kw_only=True)
class LinearBeta:
    """beta(t) = beta_min + (beta_max - beta_min) t / T, and its integral B(t) from 0 to t.

    (Song et al. 2021, arXiv:2011.13456, appendix C, where T = 1.)

    Raises:
        UserError: unless 0 <= beta_min <= beta_max and beta_max > 0.
    """

    beta_min: float
    beta_max: float
    T: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.beta_min <= self.beta_max and self.beta_max > 0):
            raise UserError(
                f"got beta_min={self.beta_min}, beta_max={self.beta_max}; "
                "expected 0 <= beta_min <= beta_max, beta_max > 0"
            )

    def rate(self, t: Tensor | float) -> Tensor:
        """beta(t), the shape of `t`, float64."""
        return self.beta_min + as_time(t) * ((self.beta_max - self.beta_min) / self.T)

    def integral(self, t: Tensor | float) -> Tensor:
        """B(t), the shape of `t`, float64."""
        t = as_time(t)
        return t * (self.beta_min + t * ((self.beta_max - self.beta_min) / (2 * self.T)))

    def time_of_integral(self, B: Tensor) -> Tensor:
        """The time at which the integral is `B` `>= 0`, the shape of `B`; the quadratic's root in its stable form."""
        slope = 2 * (self.beta_max - self.beta_min) / self.T
        root = torch.sqrt(self.beta_min**2 + slope * B)
        return torch.where(B > 0, 2 * B / (self.beta_min + root), 0.0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), of the shape of `x`, which for very negative x is exp(x) (torch's own loses its digits)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
