"""The variance-exploding SDE, the continuous limit of NCSN (Song and Ermon 2019, arXiv:1907.05600)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError, as_time
from sde_lib.base import SDE, Time, require_limits, require_numbers


@dataclass(frozen=True, kw_only=True)
class VESDE(SDE):
    """The variance-exploding SDE, with sigma rising geometrically.

        dx = sigma(t) sqrt(2 log(sigma_max / sigma_min) / T) dw
        alpha = 1,   sigma(t) = sigma_min (sigma_max / sigma_min)^(t/T)

    (Song et al. 2021, arXiv:2011.13456, equations (9), (30) and (31)). sigma(0) is here the limit at 0+, sigma_min (the paper
    sets it to 0 at t = 0 itself), so that x_0 in the kernel is the data and x at t = 0 is the data *already blurred* by
    sigma_min. The law at any t is the data's law convolved with N(0, sigma(t)^2 I), and the prior is N(0, sigma_max^2 I).

    Args:
        sigma_min: sigma at t = 0.
        sigma_max: sigma at t = T, about the largest distance between two data points (Song and Ermon 2020,
            arXiv:2006.09011, technique 1): 50 for 32x32 images in [0, 1].
        T, t_min, t_end: as in `SDE`.

    Raises:
        UserError: unless 0 < sigma_min < sigma_max and 0 <= t_min, t_end < T.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    T: float = 1.0
    t_min: float = 1e-5
    t_end: float = 1e-5

    def __post_init__(self) -> None:
        require_limits(self.T, self.t_min, self.t_end)
        require_numbers(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}; expected 0 < sigma_min < sigma_max"
            )

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_min * torch.exp(as_time(t) * (self._log_ratio / self.T))

    def f(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def g(self, t: Time) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * self._log_ratio / self.T)

    def log_snr(self, t: Time) -> Tensor:
        return -2 * (math.log(self.sigma_min) + as_time(t) * (self._log_ratio / self.T))

    def time_of_log_snr(self, l: Time) -> Tensor:
        t = (-as_time(l) / 2 - math.log(self.sigma_min)) * (self.T / self._log_ratio)
        return t.clamp(0, self.T)
