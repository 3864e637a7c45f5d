r"""The probability-flow ODE as an initial value problem, in a clock and a state that suit a solver.

With kappa = sigma / alpha, y = x / alpha and eps = -sigma score, the flow (6) of `sde_lib.base` is, for *any*
linear SDE,

    (1)  dy / dkappa = eps(x, t)

(the semi-linear form of Lu et al. 2022, arXiv:2206.00927, proposition 3.1, in the variables of Karras et al. 2022,
arXiv:2206.00364): the linear part is gone. A `Flow` is a choice of clock and state. `WhitenedFlow` takes from (1) also what a
Gaussian guess of the data would predict; `PlainFlow` is the textbook's. `FlowField` is the right side that a solver of
`numerics` integrates, and there is one, whether for sampling, for encoding or, with a trace beside it, for a likelihood.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from numerics import UserError, expand_as, require_positive, take
from sde_lib.base import SDE, Time
from sde_lib.score import Score, check_score


class Flow(ABC):
    """A way of writing the probability flow: the clock u, the state w = x / scale, and the linear form

        dw / du = a(t) w + b(t) eps(x, t),     eps = -sigma score,

    whose two coefficients are all that a solver needs besides the network. A subclass is a frozen dataclass of options.
    """

    @abstractmethod
    def clock(self, sde: SDE, t: Time) -> Tensor:
        """u at `t`, of its shape, float64."""

    @abstractmethod
    def time(self, sde: SDE, u: Time) -> Tensor:
        """t at `u`, of its shape, float64."""

    @abstractmethod
    def scale(self, sde: SDE, t: Time) -> Tensor:
        """x / w at `t`, of its shape, float64."""

    @abstractmethod
    def coefficients(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        """a and b at `t`, of its shape, float64."""

    @property
    def weight(self) -> Callable[[Tensor], Tensor] | None:
        """The factor of the slopes dw / du that is known, elementwise in the clock; None where there is none.

        Multistep methods integrate it exactly (`numerics.Adams`).
        """
        return None


@dataclass(frozen=True, kw_only=True)
class WhitenedFlow(Flow):
    r"""The clock u = log kappa and the state w = x / (alpha r), whitened for data of standard deviation s = `data_std`.

    With kappa = sigma / alpha and r = sqrt(s^2 + kappa^2) the state has unit scale at all times and

        (2)  dw / du = (kappa / r) eps - (kappa / r)^2 w
        (3)  d log p_w / du = -div_w (dw / du) = -sigma div_x eps + D (kappa / r)^2
        (4)  log p_x = log p_w - D log(alpha r)

    For data that are N(0, s^2 I) the right side of (2) is 0 and one step is exact, under every SDE. Writing
    eps = (kappa w + s F) / r, where F is what a network adds to that guess (F_theta of Karras et al. 2022,
    arXiv:2206.00364, equation (7), up to its sign), (2) is

        (5)  dw / du = g(u) F,    g = kappa s / r^2 = 1 / (2 cosh(u - log s)),

    and (3) likewise: F is smooth and of order one, while the `weight` g falls off exponentially on both sides.

    Args:
        data_std: s, in model units; a guess of it changes the number of steps that are needed, not the solution.

    Raises:
        UserError: where it is not a finite number > 0.
    """

    data_std: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self.data_std, "data_std")

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
        """g of (5)."""
        centre = math.log(self.data_std)
        return lambda u: 0.5 / torch.cosh(u - centre)


@dataclass(frozen=True, kw_only=True)
class PlainFlow(Flow):
    """The textbook's variables: the clock t and the state x, dx/dt = f x + g^2 / (2 sigma) eps.

    (Song et al. 2021, arXiv:2011.13456, equation (13), for a linear drift.) Compare with the literature by it; it takes more
    steps than `WhitenedFlow`.
    """

    def clock(self, sde: SDE, t: Time) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float64)

    def time(self, sde: SDE, u: Time) -> Tensor:
        return torch.as_tensor(u, dtype=torch.float64)

    def scale(self, sde: SDE, t: Time) -> Tensor:
        return torch.ones_like(sde.alpha(t))

    def coefficients(self, sde: SDE, t: Time) -> tuple[Tensor, Tensor]:
        return sde.f(t), sde.g(t).square() / (2 * sde.sigma(t))


class FlowTimes:
    """The clock of a flow from the time `start` to the time `end`, in either direction.

    Args:
        flow: whose clock it is.
        sde: the forward process.
        start, end: the two times.

    Attributes:
        u_0, u_1: the clock at `start` and at `end`.

    Raises:
        UserError: where the clock is infinite at one of them.
    """

    def __init__(self, flow: Flow, sde: SDE, start: float, end: float) -> None:
        self.flow, self.sde, self.start, self.end = flow, sde, start, end
        self._low, self._high = min(start, end), max(start, end)
        self.u_0, self.u_1 = (float(flow.clock(sde, t)) for t in (start, end))
        if not (math.isfinite(self.u_0) and math.isfinite(self.u_1)):
            raise UserError(
                f"got times from {start} to {end}, at one of which the clock of {flow!r} is infinite; "
                f"expected times > 0: use t_min={sde.t_min}"
            )

    def time(self, u: Tensor) -> Tensor:
        """t at `u`, of its shape, kept inside the interval: the inverse is exact only to rounding."""
        return self.flow.time(self.sde, u).clamp(self._low, self._high)

    def nodes(self, t: Tensor) -> Tensor:
        """The clock at the times `t` `(N+1,)` from `start` to `end`, whose ends are exactly `u_0` and `u_1`."""
        nodes = self.flow.clock(self.sde, t)
        nodes[0], nodes[-1] = self.u_0, self.u_1
        return nodes


class FlowPoint(NamedTuple):
    """Where a flow is at a value of its clock, each `(B,)`, float64: dw/du = of_state w + of_score score(scale w, t)."""

    t: Tensor
    scale: Tensor
    of_state: Tensor
    of_score: Tensor


class FlowField:
    """The right side dw/du = a w + b eps(c w, t) of a `Flow`, eps = -sigma score, as a field for the solvers of `numerics`.

    Coefficients and state are float64, the score is asked in its own `dtype`, and there is one cast each way.

    Args:
        times: the clock.
        score: score(x, t), with x `(B, *)` and t `(B,)`.
        dtype: in which the score is given x.

    Attributes:
        weight: the factor of the slopes that is known, or None; see `Flow.weight`.
    """

    def __init__(self, times: FlowTimes, score: Score, dtype: torch.dtype) -> None:
        self.times, self.score, self.dtype = times, score, dtype
        self.weight = times.flow.weight

    def take(self, index: Tensor) -> FlowField:
        """The field for the samples at `index` `(b,)`."""
        return FlowField(self.times, take(self.score, index), self.dtype)

    def at(self, u: Tensor) -> FlowPoint:
        """Time and coefficients at the clock's values `u` `(B,)`."""
        sde, flow = self.times.sde, self.times.flow
        t = self.times.time(u)
        a, b = flow.coefficients(sde, t)
        return FlowPoint(t=t, scale=flow.scale(sde, t), of_state=a, of_score=-b * sde.sigma(t))

    def data(self, point: FlowPoint, w: Tensor) -> Tensor:
        """x = c w `(B, *)`, in the score's dtype."""
        return (expand_as(point.scale, w) * w).to(self.dtype)

    def slope(self, point: FlowPoint, w: Tensor, score: Tensor) -> Tensor:
        """dw/du `(B, *)`, given the value of the score at `data(point, w)`."""
        return expand_as(point.of_state, w) * w + expand_as(point.of_score, w) * score.to(w.dtype)

    def __call__(self, u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The slope of the state `(w,)`, w `(B, *)`, at `u` `(B,)`.

        Raises:
            UserError: for a score of another shape than x.
        """
        (w,) = state
        point = self.at(u)
        x = self.data(point, w)
        return (self.slope(point, w, check_score(self.score(x, point.t), x)),)
