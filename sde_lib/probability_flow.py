r"""The probability-flow ODE as an initial value problem, in a clock and a state that suit a solver.

With kappa = sigma / alpha, y = x / alpha and eps = -sigma score, the flow (6) of `sde_lib.base` is, for *any*
linear SDE,

    (1)  dy / dkappa = eps(x, t)

(the semi-linear form of Lu et al. 2022, arXiv:2206.00927, proposition 3.1, in the variables of Karras et al. 2022,
arXiv:2206.00364): the linear part is gone. `WhitenedFlow` takes from it also what a Gaussian guess of the data would
predict. With data of standard deviation s, r = sqrt(s^2 + kappa^2) and the clock u = log kappa, the state
w = x / (alpha r) has unit scale at all times and

    (2)  dw / du = (kappa / r) eps - (kappa / r)^2 w
    (3)  d log p_w / du = -div_w (dw / du) = -sigma div_x eps + D (kappa / r)^2
    (4)  log p_x = log p_w - D log(alpha r)

For data that are N(0, s^2 I) the right side of (2) is 0 and one step is exact, under every SDE. Writing
eps = (kappa w + s F) / r, where F is what a network adds to that guess (F_theta of Karras et al. 2022, equation (7), up
to its sign), (2) is

    (5)  dw / du = g(u) F,    g = kappa s / r^2 = 1 / (2 cosh(u - log s))

and (3) likewise: F is smooth and of order one, while the weight g falls off exponentially on both sides. A multistep method
that integrates g exactly is an exponential one. `PlainFlow` is the textbook form: the state x, the clock t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError
from sde_lib.base import SDE, Time


class Flow(ABC):
    """A way of writing the probability flow: the clock u, the state w = x / scale, and its linear form

        dw / du = a(t) w + b(t) eps(x, t)

    whose two coefficients are all that a solver needs besides the network's eps.
    """

    @abstractmethod
    def clock(self, sde: SDE, t: Time) -> Tensor:
        """u at `t`, of its shape."""

    @abstractmethod
    def time(self, sde: SDE, u: Time) -> Tensor:
        """t at `u`, of its shape."""

    @abstractmethod
    def scale(self, sde: SDE, t: Time) -> Tensor:
        """x / w at `t`, of its shape."""

    @abstractmethod
    def coefficients(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        """a and b at `t`, of its shape."""

    @property
    def weight(self) -> Callable[[Tensor], Tensor] | None:
        """The factor of the slopes that is known, elementwise in the clock, (5); None where there is none."""
        return None


@dataclass(frozen=True, kw_only=True)
class WhitenedFlow(Flow):
    """(2) to (4): the clock log kappa and the state whitened for data of standard deviation `data_std`."""

    data_std: float = 1.0

    def __post_init__(self) -> None:
        if not (self.data_std > 0 and math.isfinite(self.data_std)):
            raise UserError(f"got data_std={self.data_std}; expected a finite number > 0")

    def clock(self, sde: SDE, t: Time) -> Tensor:
        return -sde.log_snr(t) / 2

    def time(self, sde: SDE, u: Time) -> Tensor:
        return sde.time_of_log_snr(-2 * u)

    def scale(self, sde: SDE, t: Time) -> Tensor:
        return torch.hypot(self.data_std * sde.alpha(t), sde.sigma(t))

    def coefficients(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        ratio = sde.sigma(t) / self.scale(sde, t)  # kappa / r
        return -ratio.square(), ratio

    @property
    def weight(self) -> Callable[[Tensor], Tensor]:
        centre = math.log(self.data_std)
        return lambda u: 0.5 / torch.cosh(u - centre)


@dataclass(frozen=True, kw_only=True)
class PlainFlow(Flow):
    """(6) of `sde_lib.base`: the clock t and the state x."""

    def clock(self, sde: SDE, t: Time) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float64)

    def time(self, sde: SDE, u: Time) -> Tensor:
        return torch.as_tensor(u, dtype=torch.float64)

    def scale(self, sde: SDE, t: Time) -> Tensor:
        return torch.ones_like(sde.alpha(t))

    def coefficients(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        return sde.f(t), sde.g(t).square() / (2 * sde.sigma(t))


class FlowTimes:
    """The clock of a flow between two times, whose ends come back as exactly those times."""

    def __init__(self, flow: Flow, sde: SDE, t_0: float, t_1: float) -> None:
        self.flow, self.sde = flow, sde
        self.t_low, self.t_high = min(t_0, t_1), max(t_0, t_1)
        self.u_0, self.u_1 = (float(flow.clock(sde, t)) for t in (t_0, t_1))
        if not (math.isfinite(self.u_0) and math.isfinite(self.u_1)):
            raise UserError(
                f"got times from {t_0} to {t_1}, at one of which the clock {type(flow).__name__} is infinite; "
                f"expected times > 0: use t_min={sde.t_min}"
            )

    def time(self, u: Tensor) -> Tensor:
        """t at `u`, kept inside the interval: the inverse is exact only to rounding."""
        return self.flow.time(self.sde, u).clamp(self.t_low, self.t_high)
