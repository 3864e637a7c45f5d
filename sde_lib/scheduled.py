"""Variance-preserving SDEs whose noise level follows a schedule of the log-SNR that may be learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from numerics import as_time
from sde_lib.base import SDE, Time, require_limits

_HALVINGS, _NEWTON = 24, 3


class Schedule(Protocol):
    """gamma(t) = -log_snr(t) on [0, 1], rising, and its derivative; float64 in the shape of `t`."""

    def __call__(self, t: Tensor) -> Tensor: ...

    def slope(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class ScheduledVPSDE(SDE):
    r"""The variance-preserving SDE with log_snr(t) = -gamma(t).

        alpha^2 = sigmoid(-gamma),   sigma^2 = sigmoid(gamma),   f = -sigma^2 gamma' / 2,   g^2 = sigma^2 gamma'

    (Kingma et al. 2021, arXiv:2107.00630, equations (2) to (4).) Nothing of the schedule is kept between calls, so that it may
    be a network that is being trained; at t = 0 the data have noise of variance sigmoid(gamma(0)). The prior is N(0, I).

    Args:
        schedule: gamma.
        T, t_min, t_end: as in `SDE`; T = 1 for a schedule on [0, 1].
    """

    schedule: Schedule
    T: float = 1.0
    t_min: float = 1e-5
    t_end: float = 1e-5

    def __post_init__(self) -> None:
        require_limits(self.T, self.t_min, self.t_end)

    def alpha(self, t: Time) -> Tensor:
        return (-self.schedule(as_time(t))).sigmoid().sqrt()

    def sigma(self, t: Time) -> Tensor:
        return self.schedule(as_time(t)).sigmoid().sqrt()

    def f(self, t: Time) -> Tensor:
        t = as_time(t)
        return -self.schedule(t).sigmoid() * self.schedule.slope(t) / 2

    def g(self, t: Time) -> Tensor:
        t = as_time(t)
        return (self.schedule(t).sigmoid() * self.schedule.slope(t)).sqrt()

    def log_snr(self, t: Time) -> Tensor:
        return -self.schedule(as_time(t))

    def time_of_log_snr(self, l: Time) -> Tensor:
        """By bisection and Newton's method on the schedule as it is now."""
        gamma = -as_time(l)
        low, high = torch.zeros_like(gamma), torch.full_like(gamma, self.T)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = self.schedule(middle) > gamma
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        t = (low + high) / 2
        for _ in range(_NEWTON):
            t = (t - (self.schedule(t) - gamma) / self.schedule.slope(t)).clamp(0, self.T)
        return t

    @property
    def prior_std(self) -> float:
        return 1.0
