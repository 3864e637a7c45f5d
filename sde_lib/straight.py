"""The straight path from data to noise, of rectified flow and flow matching."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError, as_time
from sde_lib.base import SDE, Time, require_limits


@dataclass(frozen=True, kw_only=True)
class StraightSDE(SDE):
    r"""The SDE whose kernel lies on straight lines between data and noise.

        alpha = 1 - t,   sigma = t,   x_t = (1 - t) x_0 + t eps,   dx_t/dt = eps - x_0 given both ends
        f = -1 / (1 - t),   g^2 = 2 t / (1 - t),   log_snr = 2 log((1 - t) / t),   its inverse sigmoid(-l / 2)

    (Liu, Gong, Liu 2023, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747, their optimal-transport path for
    sigma_min = 0. Both have noise at t = 0 and data at t = 1; here, as everywhere, data stand at 0.) The flow of it is
    v = E[eps - x_0 | x_t], which is finite at both ends, while f and g are not at t = 1: there all of the signal goes at once.
    So T is a little below 1. What freezes f and g over a step, as Euler-Maruyama and the reverse-diffusion predictor do, needs
    times that are even in the log-SNR there (`time_grids.LogSNR`). The prior is N(0, I).

    Args:
        T: below 1; x_T keeps 1 - T of the data, so that a log-density is off by about that much, times the data's size.
        t_min, t_end: as in `SDE`.

    Raises:
        UserError: unless T < 1 and 0 <= t_min, t_end < T.

    >>> sde = StraightSDE()
    >>> float(sde.alpha(0.25)), float(sde.sigma(0.25))
    (0.75, 0.25)
    """

    T: float = 1 - 1e-5
    t_min: float = 1e-5
    t_end: float = 1e-3

    def __post_init__(self) -> None:
        require_limits(self.T, self.t_min, self.t_end)
        if not self.T < 1:
            raise UserError(f"got T={self.T}; expected T < 1, where f and g are finite: the default is 1 - 1e-5")

    def alpha(self, t: Time) -> Tensor:
        return 1 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return as_time(t).clone()

    def f(self, t: Time) -> Tensor:
        return -1 / (1 - as_time(t))

    def g(self, t: Time) -> Tensor:
        t = as_time(t)
        return (2 * t / (1 - t)).sqrt()

    def log_snr(self, t: Time) -> Tensor:
        t = as_time(t)
        return 2 * (torch.log1p(-t) - t.log())

    def time_of_log_snr(self, l: Time) -> Tensor:
        return (-as_time(l) / 2).sigmoid().clamp(max=self.T)

    @property
    def prior_std(self) -> float:
        return 1.0
