r"""Time grids: where a method on a grid steps, in sampling and in likelihood.

A grid is called as `grid(sde, steps)` and gives `(N+1,)` times in float64, N = steps, strictly decreasing from T to t_end. It
is a rule, not a list: the same object serves every SDE and every number of steps. Below, l = log_snr, kappa = sigma / alpha =
exp(-l/2), and i/N runs from 0 to 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from numerics import Catalogue, UserError, require_choice, require_count, require_positive, require_range
from sde_lib.base import SDE


@dataclass(frozen=True, kw_only=True)
class TimeGrid(ABC):
    """A rule for placing times.

    Args:
        t_start: the first time; the SDE's T unless given. A sampler that starts below T needs an x_T at that time; a
            likelihood has to start at T.
        t_end: the last time; the SDE's t_end unless given (in a likelihood, its t_min).
    """

    t_start: float | None = None
    t_end: float | None = None

    @abstractmethod
    def place(self, sde: SDE, start: float, end: float, steps: int) -> Tensor:
        """`(N+1,)` times, float64; the two ends are replaced by exactly `start` and `end`."""

    def __call__(self, sde: SDE, steps: int) -> Tensor:
        """The times `(N+1,)`, float64, strictly decreasing from t_start to t_end.

        Raises:
            UserError: for steps < 1, ends outside the SDE's [t_min, T], or times that do not decrease.
        """
        start = self._start(sde) if self.t_start is None else float(self.t_start)
        end = sde.resolved(sde.t_end if self.t_end is None else float(self.t_end))
        low = min(sde.t_min, sde.t_end)
        if not low <= end < start <= sde.T:
            raise UserError(
                f"got t_start={start:.6g}, t_end={end:.6g} in {self!r}; "
                f"expected t_end < t_start, both within [{low:.6g}, {sde.T:.6g}], the SDE's [t_min, T]"
            )
        return self.between(sde, start, end, steps)

    def _start(self, sde: SDE) -> float:
        return sde.t_start

    def between(self, sde: SDE, start: float, end: float, steps: int) -> Tensor:
        """The times `(N+1,)`, float64, strictly decreasing from exactly `start` to exactly `end`.

        Raises:
            UserError: for steps < 1, or times that do not decrease.
        """
        require_count(steps, "steps")
        times = self.place(sde, start, end, steps).to(torch.float64).clone()
        times[0], times[-1] = start, end
        if not bool((times.diff() < 0).all()):  # also where one is NaN
            raise UserError(
                f"got times that do not strictly decrease from {self!r} with steps={steps}; "
                "expected a grid that this SDE can resolve: take fewer steps or another grid"
            )
        return times


def _linear(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeGrid):
    """Equal steps in t: t_i = t_start + (t_end - t_start) i/N (Song et al. 2021, arXiv:2011.13456, algorithms 2 and 3).

    Args:
        t_start, t_end: as in `TimeGrid`.
    """

    def place(self, sde: SDE, start: float, end: float, steps: int) -> Tensor:
        return _linear(start, end, steps)


@dataclass(frozen=True, kw_only=True)
class Quadratic(TimeGrid):
    """Equal steps in sqrt(t), denser near the data (Song, Meng, Ermon 2020, arXiv:2010.02502, appendix D.2).

    Args:
        t_start, t_end: as in `TimeGrid`.
    """

    def place(self, sde: SDE, start: float, end: float, steps: int) -> Tensor:
        return _linear(math.sqrt(start), math.sqrt(end), steps).square()


class _OfLogSNR(TimeGrid):
    """A grid of log-SNRs."""

    @abstractmethod
    def levels(self, first: float, last: float, steps: int) -> Tensor:
        """`(N+1,)` log-SNRs from `first` up to `last`."""

    def place(self, sde: SDE, start: float, end: float, steps: int) -> Tensor:
        return sde.time_of_log_snr(self.levels(float(sde.log_snr(start)), float(sde.log_snr(end)), steps))


@dataclass(frozen=True, kw_only=True)
class LogSNR(_OfLogSNR):
    """Equal steps in l = log_snr (Lu et al. 2022, arXiv:2206.00927, section 3.3).

    Args:
        t_start, t_end: as in `TimeGrid`.
    """

    def levels(self, first: float, last: float, steps: int) -> Tensor:
        return _linear(first, last, steps)


@dataclass(frozen=True, kw_only=True)
class Karras(_OfLogSNR):
    """Equal steps in kappa^(1/rho) (Karras et al. 2022, arXiv:2206.00364, equation (5)).

    Args:
        rho: the power's root; 7 is the paper's choice, 3 nearly equalises the errors of Heun's method.
        t_start, t_end: as in `TimeGrid`.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        require_positive(self.rho, "rho")

    def levels(self, first: float, last: float, steps: int) -> Tensor:
        roots = _linear(math.exp(-first / (2 * self.rho)), math.exp(-last / (2 * self.rho)), steps)
        return -2 * self.rho * roots.log()


@dataclass(frozen=True, kw_only=True)
class Cosine(_OfLogSNR):
    """Equal steps in the angle arctan(kappa).

    The steps of the cosine schedule (Nichol and Dhariwal 2021, arXiv:2102.09672, equation (17)), carried over to any SDE by
    their log-SNR.

    Args:
        t_start, t_end: as in `TimeGrid`.
    """

    def levels(self, first: float, last: float, steps: int) -> Tensor:
        angle = _linear(math.atan(math.exp(-first / 2)), math.atan(math.exp(-last / 2)), steps)
        return -2 * angle.tan().log()


@dataclass(frozen=True, kw_only=True)
class Logistic(_OfLogSNR):
    """Log-SNRs at equally spaced probabilities of a logistic law: l_i = center + scale logit(p_i), p linear.

    Args:
        center: the log-SNR at which the steps are densest.
        scale: width of the law in units of log-SNR, > 0.
        t_start, t_end: as in `TimeGrid`.
    """

    center: float = 4.0
    scale: float = 5.0

    def __post_init__(self) -> None:
        require_range(self.center, "center", -math.inf)
        require_positive(self.scale, "scale")

    def levels(self, first: float, last: float, steps: int) -> Tensor:
        ends = torch.tensor([first, last], dtype=torch.float64)
        p = ((ends - self.center) / self.scale).sigmoid()
        return self.center + self.scale * _linear(float(p[0]), float(p[1]), steps).logit()


@dataclass(frozen=True, kw_only=True)
class StepDensity(_OfLogSNR):
    """Log-SNRs at equally spaced quantiles of a density that is known on a table: many steps where it is high.

    Args:
        knots: two or more rising log-SNRs.
        density: density of steps between each two knots, positive; the outer two densities hold beyond the knots.
    """

    knots: tuple[float, ...]
    density: tuple[float, ...]

    def __post_init__(self) -> None:
        given = (*self.knots, *self.density)
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in given):
            raise UserError("got knots or densities that are no finite numbers; expected numbers")
        knots, density = torch.tensor(self.knots), torch.tensor(self.density)
        if not (len(knots) == len(density) + 1 >= 2 and bool((knots.diff() > 0).all() & (density > 0).all())):
            raise UserError(
                f"got {len(knots)} knots and {len(density)} densities; expected knots that rise and, between each two, "
                "one density > 0"
            )

    def levels(self, first: float, last: float, steps: int) -> Tensor:
        knots = torch.tensor(self.knots, dtype=torch.float64)
        knots[0], knots[-1] = min(first, float(knots[0])), max(last, float(knots[-1]))
        mass = torch.cat(
            [knots.new_zeros(1), (torch.tensor(self.density, dtype=torch.float64) * knots.diff()).cumsum(0)]
        )

        def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
            i = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
            return ys[i - 1] + (x - xs[i - 1]) / (xs[i] - xs[i - 1]) * (ys[i] - ys[i - 1])

        ends = interpolate(torch.tensor([first, last], dtype=torch.float64), knots, mass)
        return interpolate(_linear(float(ends[0]), float(ends[1]), steps), mass, knots)


@dataclass(frozen=True, kw_only=True)
class DDPMIndices(TimeGrid):
    """Some of the steps of a chain of `train_steps` steps, by its published ways of choosing them.

    Index i = 0 ... train_steps - 1 of the chain stands at t_end + i (T - t_end) / (train_steps - 1): for VP with
    t_end = 1/1000 and 1000 steps that is (i + 1)/1000, as in DDPM. With r the whole ratio train_steps // steps:

        leading    r (steps-1), ..., r, 0                    preceded by the chain's first state, train_steps - 1
        trailing   train_steps - 1, ..., every train_steps/steps-th downwards, followed by 0
        linspace   train_steps - 1 ... 0 in equal parts, rounded

    All three begin at exactly T and end at exactly t_end, where published ones leave an end out (Lin et al. 2023,
    arXiv:2305.08891, table 2). DDPM's thousand evaluations are 999 steps and the final denoising.

    Args:
        spacing: "leading", "trailing" or "linspace".
        train_steps: number of steps of the chain, 2 or more.
        t_start, t_end: as in `TimeGrid`, but t_start is T itself unless given.
    """

    spacing: str = "leading"
    train_steps: int = 1000

    spacings: ClassVar[tuple[str, ...]] = ("leading", "trailing", "linspace")

    def __post_init__(self) -> None:
        require_choice(self.spacing, "spacing", self.spacings)
        require_count(self.train_steps, "train_steps", 2)

    def indices(self, steps: int) -> Tensor:
        """The chain's indices, `(N+1,)`, int64, decreasing.

        Raises:
            UserError: for more steps than the chain has.
        """
        n = self.train_steps
        if not 1 <= steps <= n - 1:
            raise UserError(
                f"got steps={steps} between the {n} states of a chain; expected 1 to {n - 1} "
                f"(with the final denoising that is {n} evaluations)"
            )
        if self.spacing == "linspace":
            return _linear(n - 1, 0, steps).round().long()
        if self.spacing == "leading":
            kept = torch.arange(steps - 1, -1, -1) * (n // steps)
            return torch.cat([torch.tensor([n - 1]), kept])
        k = torch.arange(steps)
        kept = (n - k.double() * (n / steps)).round().long() - 1
        # rounding must leave an index for every step that is still to come
        return torch.cat([torch.maximum(kept, steps - k), torch.tensor([0])])

    def _start(self, sde: SDE) -> float:
        return sde.T  # the chain's last row, however little signal it has: a later start would move every row

    def place(self, sde: SDE, start: float, end: float, steps: int) -> Tensor:
        return end + self.indices(steps).double() * ((start - end) / (self.train_steps - 1))


@dataclass(frozen=True, kw_only=True)
class Custom(TimeGrid):
    """The user's own times: unlike other grids it has its own number of steps and its own ends.

    Args:
        times: `(N+1,)`, strictly decreasing, N >= 1.
        t_start, t_end: the first and the last of these times; others are refused.

    Raises:
        UserError: for times that do not decrease, or other ends; when called, for another number of steps.

    >>> Custom(times=[1.0, 0.3, 0.001]).steps
    2
    """

    times: Sequence[float] | Tensor

    def __post_init__(self) -> None:
        times = torch.as_tensor(self.times, dtype=torch.float64)
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
            raise UserError(
                f"got times of shape {tuple(times.shape)} that are not two or more strictly decreasing ones; "
                "expected (N+1,) from T down to t_end"
            )
        own = tuple(times.tolist())
        for name, end in (("t_start", own[0]), ("t_end", own[-1])):
            if getattr(self, name) not in (None, end):
                raise UserError(
                    f"got {name}={getattr(self, name)} for times from {own[0]:.6g} to {own[-1]:.6g}; "
                    f"expected {name}={end:.6g}: leave it out, or cut the times"
                )
            object.__setattr__(self, name, end)
        object.__setattr__(self, "times", own)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.times) - 1

    def place(self, sde: SDE, start: float, end: float, steps: int) -> Tensor:
        # where sigma is 0 at the last of them, another time stands for it
        if steps != self.steps or start != self.t_start or end not in (self.t_end, sde.resolved(float(self.times[-1]))):
            raise UserError(
                f"got steps={steps} from {start:.6g} to {end:.6g} for {self.steps + 1} own times from {self.t_start:.6g} "
                f"to {self.t_end:.6g}; expected steps={self.steps} between these ends"
            )
        return torch.as_tensor(self.times, dtype=torch.float64)


TIME_GRIDS: Catalogue[TimeGrid] = Catalogue(
    "time grid",
    {
        "uniform": Uniform,
        "quadratic": Quadratic,
        "log_snr": LogSNR,
        "karras": Karras,
        "cosine": Cosine,
        "logistic": Logistic,
        "ddpm": DDPMIndices,
        "step_density": StepDensity,
        "custom": Custom,
    },
)
create, available, options, describe = TIME_GRIDS.create, TIME_GRIDS.available, TIME_GRIDS.options, TIME_GRIDS.describe
