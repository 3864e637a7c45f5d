"""The sub-VP SDE, whose variance is bounded by VP's at every time."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from numerics import as_time
from sde_lib.base import SDE, Time, require_limits, require_numbers
from sde_lib.beta import LinearBeta


@dataclass(frozen=True, kw_only=True)
class SubVPSDE(SDE):
    """The sub-VP SDE, with beta rising linearly.

        dx = -beta(t)/2 x dt + sqrt(beta(t) (1 - exp(-2 B))) dw,      alpha = exp(-B/2),   sigma = 1 - exp(-B)

    with B the integral of beta (Song et al. 2021, arXiv:2011.13456, equations (12) and (34)); kappa = sigma / alpha =
    2 sinh(B/2). The prior is N(0, I).

    Args:
        beta_min, beta_max: beta at t = 0 and at t = T.
        T, t_min, t_end: as in `SDE`.

    Raises:
        UserError: unless 0 <= beta_min <= beta_max, beta_max > 0 and 0 <= t_min, t_end < T.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    t_min: float = 1e-5
    t_end: float = 1e-3
    beta: LinearBeta = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_limits(self.T, self.t_min, self.t_end)
        require_numbers(beta_min=self.beta_min, beta_max=self.beta_max)
        object.__setattr__(self, "beta", LinearBeta(beta_min=self.beta_min, beta_max=self.beta_max, T=self.T))

    def alpha(self, t: Time) -> Tensor:
        return torch.exp(-self.beta.integral(t) / 2)

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(-self.beta.integral(t))

    def f(self, t: Time) -> Tensor:
        return -self.beta.rate(t) / 2

    def g(self, t: Time) -> Tensor:
        return (self.beta.rate(t) * -torch.expm1(-2 * self.beta.integral(t))).sqrt()

    def log_snr(self, t: Time) -> Tensor:
        B = self.beta.integral(t)
        return -B - 2 * (-torch.expm1(-B)).log()

    def time_of_log_snr(self, l: Time) -> Tensor:
        # kappa = exp(-l/2) = 2 sinh(B/2), which overflows where the noise is large and B is -l in all but its last digits
        v = -as_time(l) / 2
        small = torch.asinh(torch.exp(v.clamp(max=0)) / 2)
        large = v + torch.log(0.5 + (0.25 + torch.exp(-2 * v.clamp(min=0))).sqrt())
        return self.beta.time_of_integral(2 * torch.where(v > 0, large, small)).clamp(max=self.T)

    @property
    def prior_std(self) -> float:
        return 1.0
