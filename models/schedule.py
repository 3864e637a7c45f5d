r"""A learned monotone noise schedule whose end points stay.

    gamma(t) = gamma_0 + (gamma_1 - gamma_0) (m(t) - m(0)) / (m(1) - m(0)),
    m(t) = a t + sum over k of b_k sigmoid(c_k t + d_k),     a, b_k, c_k > 0

(Kingma et al. 2021, arXiv:2107.00630, has a network of positive weights; it is renormalised here at every call, so
that what the optimiser does to the weights moves no end point.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numerics import UserError, require_count


class MonotoneSchedule(nn.Module):
    """gamma(t) for t in [0, 1], float64, rising strictly from `gamma_min` to `gamma_max` whatever the weights.

    A fresh one is nearly linear.

    Args:
        gamma_min, gamma_max: -log_snr at t = 0 and at t = 1.
        units: of the sum.

    Raises:
        UserError: ends that do not rise, or no units.
    """

    def __init__(self, *, gamma_min: float = -13.3, gamma_max: float = 5.0, units: int = 64) -> None:
        super().__init__()
        require_count(units, "units")
        if not gamma_min < gamma_max:
            raise UserError(
                f"got a schedule from gamma_min={gamma_min} to gamma_max={gamma_max}; expected one that rises: "
                "gamma = -log_snr, so gamma_min is at the data"
            )
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)
        # steps of different places and widths, small beside the line
        self.line = nn.Parameter(torch.tensor(1.0))
        self.heights = nn.Parameter(torch.full((units,), -6.0))
        self.steepness = nn.Parameter(torch.full((units,), 8.0))
        self.places = nn.Parameter(torch.linspace(0, 1, units))

    def _parts(self, frozen: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights = (self.line, self.heights, self.steepness, self.places)
        line, heights, steepness, places = (w.detach().double() if frozen else w.double() for w in weights)
        a, b, c = F.softplus(line), F.softplus(heights), F.softplus(steepness)
        return a, b, c, -c * places

    def _rise(self, t: Tensor, frozen: bool) -> Tensor:
        a, b, c, d = self._parts(frozen)
        return a * t + (b * torch.sigmoid(t.unsqueeze(-1) * c + d)).sum(dim=-1)

    def _range(self, frozen: bool) -> tuple[Tensor, Tensor]:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.line.device)
        first, last = self._rise(ends, frozen).unbind()
        return first, last

    def forward(self, t: Tensor, frozen: bool = False) -> Tensor:
        """gamma at `t` of any shape, of its shape; `frozen`: without gradients of the weights."""
        first, last = self._range(frozen)
        rise = self._rise(t.double(), frozen)
        return self.gamma_min + (self.gamma_max - self.gamma_min) * (rise - first) / (last - first)

    def slope(self, t: Tensor, frozen: bool = False) -> Tensor:
        """Its derivative, of the shape of `t`."""
        a, b, c, d = self._parts(frozen)
        s = torch.sigmoid(t.double().unsqueeze(-1) * c + d)
        first, last = self._range(frozen)
        return (self.gamma_max - self.gamma_min) * (a + (b * c * s * (1 - s)).sum(dim=-1)) / (last - first)

    def extra_repr(self) -> str:
        return f"gamma_min={self.gamma_min}, gamma_max={self.gamma_max}, units={len(self.heights)}"


class AsItIs:
    """A `MonotoneSchedule` as samplers and likelihoods see it: its present values, without gradients of its weights.

    Args:
        schedule: which may go on learning.
    """

    def __init__(self, schedule: MonotoneSchedule) -> None:
        self.schedule = schedule

    def __repr__(self) -> str:
        return f"AsItIs({self.schedule!r})"

    def __call__(self, t: Tensor) -> Tensor:
        gamma: Tensor = self.schedule(t, frozen=True)
        return gamma

    def slope(self, t: Tensor) -> Tensor:
        """Its derivative, of the shape of `t`."""
        return self.schedule.slope(t, frozen=True)


class FixedSchedule:
    """gamma(t) = gamma_min + (gamma_max - gamma_min) w(t) for a known rising w with w(0) = 0 and w(1) = 1.

    Args:
        gamma_min, gamma_max: the ends.
        power: w(t) = t^power; 1 is the linear schedule.

    Raises:
        UserError: ends that do not rise, or a power that is not positive.
    """

    def __init__(self, *, gamma_min: float = -13.3, gamma_max: float = 5.0, power: float = 1.0) -> None:
        if not gamma_min < gamma_max or not power > 0:
            raise UserError(
                f"got a schedule from {gamma_min} to {gamma_max} with power={power}; expected one that rises, and power > 0"
            )
        self.gamma_min, self.gamma_max, self.power = float(gamma_min), float(gamma_max), float(power)

    def __repr__(self) -> str:
        return f"FixedSchedule(gamma_min={self.gamma_min}, gamma_max={self.gamma_max}, power={self.power})"

    def __call__(self, t: Tensor) -> Tensor:
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t.double() ** self.power

    def slope(self, t: Tensor) -> Tensor:
        """Its derivative."""
        return (self.gamma_max - self.gamma_min) * self.power * t.double() ** (self.power - 1)
