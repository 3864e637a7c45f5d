"""The variance-preserving SDE, the continuous limit of DDPM (Ho et al. 2020, arXiv:2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from numerics import as_time
from sde_lib.base import SDE, Time, require_limits, require_numbers
from sde_lib.beta import LinearBeta, softplus


@dataclass(frozen=True, kw_only=True)
class VPSDE(SDE):
    """The variance-preserving SDE, with beta rising linearly.

        dx = -beta(t)/2 x dt + sqrt(beta(t)) dw,      alpha = exp(-B/2),   sigma^2 = 1 - exp(-B),   B = integral of beta

    (Song et al. 2021, arXiv:2011.13456, equations (11), (32) and (33)). The prior is N(0, I).

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = T.
        T, t_min, t_end: as in `SDE`.

    Raises:
        UserError: unless 0 <= beta_min <= beta_max, beta_max > 0 and 0 <= t_min, t_end < T.

    >>> sde = VPSDE()
    >>> round(float(sde.alpha(0.5) ** 2 + sde.sigma(0.5) ** 2), 12)
    1.0
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
        return (-torch.expm1(-self.beta.integral(t))).sqrt()

    def f(self, t: Time) -> Tensor:
        return -self.beta.rate(t) / 2

    def g(self, t: Time) -> Tensor:
        return self.beta.rate(t).sqrt()

    def log_snr(self, t: Time) -> Tensor:
        B = self.beta.integral(t)
        return -B - (-torch.expm1(-B)).log()

    def time_of_log_snr(self, l: Time) -> Tensor:
        # kappa^2 = exp(-l) = expm1(B), and log(1 + exp(-l)) is softplus(-l) without overflow
        return self.beta.time_of_integral(softplus(-as_time(l))).clamp(max=self.T)

    @property
    def prior_std(self) -> float:
        return 1.0
