r"""At which times the loss is evaluated.

A sampler draws t from a density q on [t_min, T] and returns the importance weight

    (1)  1 / ((T - t_min) q(t)),      so that  E_q[weight f(t)] = mean of f over [t_min, T]

whatever f: changing the sampler changes the variance of a weighted loss, never its expectation. The variance is smallest
where q is proportional to the root of the second moment of what is averaged, for a score that is nearly learned about
the weighting itself.

For the likelihood weighting g^2 / sigma^2 that density has a closed form on every linear SDE. From
(sigma^2)' = 2 f sigma^2 + g^2 and alpha' = f alpha follows

    (2)  g^2 / sigma^2 = -d log_snr / dt

so its integral is -log_snr and the times are uniform in log_snr: t = time_of_log_snr(u). For sub-VP
-log_snr = 2 log(2 sinh(B/2)), for VP it is log(exp(B) - 1), with B the integral of beta; for VE it is linear in t, so
importance sampling changes nothing there. (Song, Durkan, Murray, Ermon 2021, arXiv:2101.09258, section 5.1 and appendix
A.3, tabulate instead; Kingma et al. 2021 found the invariance (2).)

Draws are stratified unless asked otherwise: the n quantiles are (i + u) / n with one uniform u (Kingma et al. 2021,
appendix I.1), so a batch covers [t_min, T] evenly and its mean loss varies less; each t alone still has density q.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from numerics import real_dtype, require_count, require_positive
from sde_lib import SDE
from training.errors import UsageError
from training.weighting import LikelihoodWeighting, Weighting, require_weighting


class TimeSampler(ABC):
    """Draws times t from a density q on [t_min, T], with importance weights 1 / ((T - t_min) q(t)).

    A sampler of your own is a keyword-only dataclass, frozen unless it learns, with `quantile` and `density`.

    Args:
        stratified: whether one time is drawn from each n-th of q's mass, at (i + u) / n with one uniform u; else the n times
            are independent. Each time alone has density q either way.
    """

    stratified: bool
    discrete: ClassVar[bool] = False
    """Whether the times are those of a table, whatever t_min is."""

    @abstractmethod
    def quantile(self, sde: SDE, u: Tensor, t_min: float) -> Tensor:
        """The time `(n,)` at which q's distribution function is `u` `(n,)` (or one minus it), float64."""

    @abstractmethod
    def density(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        """q(t), `(n,)`, with respect to t."""

    def weight(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        """The importance weight (1), `(n,)`."""
        return 1 / ((sde.T - t_min) * self.density(sde, t, t_min))

    def __call__(
        self, sde: SDE, n: int, generator: torch.Generator | None = None, t_min: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """`n` times in [t_min, T] and their importance weights, both `(n,)`, float64, on the generator's device.

        `t_min`: the SDE's unless given.
        """
        t_min = sde.t_min if t_min is None else t_min
        if not t_min < sde.T:
            raise UsageError(f"got t_min={t_min:g} for times up to T={sde.T:g}; expected less")
        device = None if generator is None else generator.device
        draws = 1 if self.stratified else n
        u = torch.rand(draws, generator=generator, dtype=real_dtype(device), device=device)
        if self.stratified:
            u = (torch.arange(n, dtype=u.dtype, device=device) + u) / n
        t = self.quantile(sde, u, t_min).clamp(t_min, sde.T)
        return t, self.weight(sde, t, t_min)

    def observe(self, sde: SDE, t: Tensor, loss: Tensor, t_min: float) -> None:  # noqa: B027 (most samplers learn nothing)
        """Told the weighted losses `(n,)` at `t` `(n,)` of a whole batch, without importance weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a sampler that learns has learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Takes back what `state_dict` gave."""

    def forget(self) -> None:  # noqa: B027
        """Drops what was learned."""


@dataclass(frozen=True, kw_only=True)
class UniformTime(TimeSampler):
    """q = 1 / (T - t_min), weight 1: independent uniform times (Song et al. 2021, arXiv:2011.13456, equation (7)).

    Args:
        stratified: as in `TimeSampler`; False here.
    """

    stratified: bool = False

    def quantile(self, sde: SDE, u: Tensor, t_min: float) -> Tensor:
        return t_min + u * (sde.T - t_min)

    def density(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        return torch.full_like(t, 1 / (sde.T - t_min))


@dataclass(frozen=True, kw_only=True)
class StratifiedTime(UniformTime):
    """q = 1 / (T - t_min), weight 1: uniform times, one in each n-th of the interval (Kingma et al. 2021, arXiv:2107.00630,
    appendix I.1).

    Args:
        stratified: as in `TimeSampler`; True here.
    """

    stratified: bool = True


@dataclass(frozen=True, kw_only=True)
class UniformLogSNR(TimeSampler):
    """q proportional to g^2 / sigma^2 = -d log_snr / dt: times uniform in log_snr, t = time_of_log_snr(u).

    With the weight 1 / ((T - t_min) q) the loss is the same in expectation; without it the density is a part of the
    objective (Kingma and Gao 2023, arXiv:2303.00848).

    Args:
        stratified: as in `TimeSampler`.
        corrected: whether the weights undo the density; False gives the weight 1.
    """

    stratified: bool = True
    corrected: bool = True

    def quantile(self, sde: SDE, u: Tensor, t_min: float) -> Tensor:
        first, last = _ends(sde, t_min)
        return sde.time_of_log_snr(first + u * (last - first))

    def density(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        first, last = _ends(sde, t_min)
        return (sde.g(t) / sde.sigma(t)).square() / (first - last)

    def weight(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        return super().weight(sde, t, t_min) if self.corrected else torch.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class ImportanceTime(UniformLogSNR):
    """q proportional to g^2 / sigma^2: importance sampling for `LikelihoodWeighting` in closed form.

    Weight times weighting is the same at every t, so a step's loss varies by the noise's error alone. Song, Durkan, Murray,
    Ermon 2021 (arXiv:2101.09258), section 5.1, where the density is tabulated.

    Args:
        stratified: as in `TimeSampler`.
        corrected: whether the weights undo the density.
    """


@dataclass(frozen=True, kw_only=True)
class TabulatedTime(TimeSampler):
    """q proportional to any weighting w(t), by a table of its integral: importance sampling for a loss with that weighting.

    The density is constant between neighbouring nodes, which are uniform in log_snr, and the importance weights are those
    of this very density: a coarse table costs variance, not bias. Song, Durkan, Murray, Ermon 2021 (arXiv:2101.09258),
    appendix A.3, for the likelihood weighting.

    Args:
        weighting: the weighting w, positive and finite on [t_min, T].
        nodes: number of nodes of the table, at least 2.
        stratified: as in `TimeSampler`.

    Raises:
        UserError: a weighting of another class, or too few nodes.
    """

    weighting: Weighting = LikelihoodWeighting()
    nodes: int = 1024
    stratified: bool = True

    def __post_init__(self) -> None:
        require_weighting(self.weighting)
        require_count(self.nodes, "nodes", 2)

    def _table(self, sde: SDE, t_min: float, like: Tensor) -> tuple[Tensor, Tensor]:
        return _table(sde, self.weighting, t_min, self.nodes, like.device)

    def quantile(self, sde: SDE, u: Tensor, t_min: float) -> Tensor:
        times, cdf = self._table(sde, t_min, u)
        i = (torch.searchsorted(cdf, u, right=True) - 1).clamp(0, len(times) - 2)
        return times[i] + (u - cdf[i]) / (cdf[i + 1] - cdf[i]) * (times[i + 1] - times[i])

    def density(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        times, cdf = self._table(sde, t_min, t)
        i = (torch.searchsorted(times, t, right=True) - 1).clamp(0, len(times) - 2)
        return (cdf[i + 1] - cdf[i]) / (times[i + 1] - times[i])


@lru_cache(maxsize=16)
def _table(sde: SDE, weighting: Weighting, t_min: float, nodes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes `(nodes,)` rising in time, and the distribution function there. Kept on the device, so that no step copies."""
    u = torch.linspace(0, 1, nodes, dtype=torch.float64)
    first, last = _ends(sde, t_min)
    times = sde.time_of_log_snr(first + u * (last - first)).clamp(t_min, sde.T)
    times[0], times[-1] = t_min, sde.T
    value = weighting(sde, times)
    mass = (value[1:] + value[:-1]) / 2 * times.diff()
    if not bool((mass > 0).all() & mass.isfinite().all()):
        raise UsageError(f"got the weighting {weighting}, which is not positive and finite on [{t_min}, {sde.T}]")
    cdf = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
    return times.to(device, real_dtype(device)), (cdf / cdf[-1]).to(device, real_dtype(device))


@dataclass(frozen=True, kw_only=True)
class LogNormal(TimeSampler):
    """log(sigma / alpha) ~ N(mean, std^2), cut off at t_min and T: most draws fall where there is something to learn.

    Karras et al. 2022 (arXiv:2206.00364), table 1. There the density is a part of the objective, so the weight is 1.

    Args:
        mean: mean of log(sigma / alpha); the paper's is -1.2.
        std: standard deviation of log(sigma / alpha); the paper's is 1.2.
        stratified: as in `TimeSampler`.
        corrected: whether the weights undo the density, so that it only changes the loss's variance.

    Raises:
        UserError: a std that is not positive. When called: a law without mass between t_min and T.
    """

    mean: float = -1.2
    std: float = 1.2
    stratified: bool = True
    corrected: bool = False

    def __post_init__(self) -> None:
        require_positive(self.std, "std")

    def _cdf_ends(self, sde: SDE, t_min: float) -> tuple[float, float]:
        low, high = (NormalDist(self.mean, self.std).cdf(-l / 2) for l in _ends(sde, t_min))
        if not low < high:
            raise UsageError(f"got {self}, which has no mass on the noise levels of {sde}; expected a mean within them")
        return low, high

    def quantile(self, sde: SDE, u: Tensor, t_min: float) -> Tensor:
        low, high = self._cdf_ends(sde, t_min)
        z = torch.special.ndtri((low + u * (high - low)).clamp(1e-300, 1 - 1e-16))
        return sde.time_of_log_snr(-2 * (self.mean + self.std * z))

    def density(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        low, high = self._cdf_ends(sde, t_min)
        z = (-sde.log_snr(t) / 2 - self.mean) / self.std
        slope = (sde.g(t) / sde.sigma(t)).square() / 2  # of log(sigma / alpha) in t
        normal = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
        return normal / self.std * slope / (high - low)

    def weight(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        return super().weight(sde, t, t_min) if self.corrected else torch.ones_like(t)


@dataclass(kw_only=True, eq=False)
class Adaptive(TimeSampler):
    """q(t) proportional to sqrt(E loss(t)^2), learned in the course of training: the least variance of the loss.

    The second moment of the weighted loss is tracked in bins of equal width in log_snr, as an exponential average over the
    batches that hit the bin; a bin that no batch has hit shares the mean of the others. Nichol and Dhariwal 2021
    (arXiv:2102.09672), section 3.3.

    Args:
        bins: number of bins, at least 2.
        decay: decay of the exponential average, in (0, 1).
        floor: share of the draws that is uniform in log_snr, in (0, 1]; it keeps the weights bounded.
        stratified: as in `TimeSampler`.

    Attributes:
        moments, counts: `(bins,)`, the sums of the average and their normalisation, which checkpoints keep.

    Raises:
        UserError: bins, decay or floor out of range.
    """

    bins: int = 32
    decay: float = 0.99
    floor: float = 0.1
    stratified: bool = True
    moments: Tensor = field(init=False, repr=False)
    counts: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.bins < 2 or not 0 < self.decay < 1 or not 0 < self.floor <= 1:
            raise UsageError(
                f"got bins={self.bins}, decay={self.decay}, floor={self.floor}; "
                "expected bins >= 2, decay in (0, 1), floor in (0, 1]"
            )
        self.forget()

    def forget(self) -> None:
        self.moments = torch.zeros(self.bins, dtype=torch.float64)
        self.counts = torch.zeros(self.bins, dtype=torch.float64)

    def _probabilities(self, sde: SDE, t_min: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """The bins' edges in u = (first - log_snr) / (first - last), and their probabilities."""
        moments, counts = (v.to(like.device, real_dtype(like.device)) for v in (self.moments, self.counts))
        edges = torch.linspace(0, 1, self.bins + 1, dtype=moments.dtype, device=like.device)
        # q in t is proportional to the root of E[loss^2]; a bin's mass is that times its width in time
        first, last = _ends(sde, t_min)
        width = sde.time_of_log_snr(first + edges * (last - first)).diff()
        seen = counts > 0
        root = (moments / counts.clamp(min=1e-300)).sqrt()
        mean = torch.where(seen, root, 0.0).sum() / seen.sum().clamp(min=1)
        mass = torch.where(seen, root, mean) * width
        mass = torch.where(mass.sum() > 0, mass, torch.ones_like(mass))
        return edges, self.floor / self.bins + (1 - self.floor) * mass / mass.sum()

    def quantile(self, sde: SDE, u: Tensor, t_min: float) -> Tensor:
        edges, p = self._probabilities(sde, t_min, u)
        cdf = torch.cat([torch.zeros_like(p[:1]), p.cumsum(0)])
        i = (torch.searchsorted(cdf, u, right=True) - 1).clamp(0, self.bins - 1)
        place = edges[i] + (u - cdf[i]) / p[i] / self.bins
        first, last = _ends(sde, t_min)
        return sde.time_of_log_snr(first + place * (last - first))

    def _bin(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        first, last = _ends(sde, t_min)
        return ((first - sde.log_snr(t)) / (first - last) * self.bins).long().clamp(0, self.bins - 1)

    def density(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        first, last = _ends(sde, t_min)
        p = self._probabilities(sde, t_min, t)[1]
        slope = (sde.g(t) / sde.sigma(t)).square() / (first - last)
        return p[self._bin(sde, t, t_min)] * self.bins * slope

    def observe(self, sde: SDE, t: Tensor, loss: Tensor, t_min: float) -> None:
        if self.moments.device != t.device:
            self.moments, self.counts = (v.to(t.device, real_dtype(t.device)) for v in (self.moments, self.counts))
        index = self._bin(sde, t, t_min)
        finite = loss.isfinite()
        square = torch.where(finite, loss.detach().to(self.moments.dtype).square(), 0.0)
        zero = torch.zeros_like(self.moments)
        hits = zero.index_add(0, index, finite.to(zero.dtype))
        decay = torch.where(hits > 0, self.decay, 1.0)
        mean = zero.index_add(0, index, square) / hits.clamp(min=1)
        self.moments = decay * self.moments + (1 - decay) * mean
        self.counts = decay * self.counts + (1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        return {"moments": self.moments, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {"moments", "counts"} or any(len(v) != self.bins for v in state.values()):
            raise UsageError(f"got a state of {sorted(state)}; expected moments and counts of {self.bins} bins")
        self.moments, self.counts = state["moments"].clone(), state["counts"].clone()


@lru_cache(maxsize=64)
def _ends(sde: SDE, t_min: float) -> tuple[float, float]:
    """log_snr at `t_min` and at T."""
    first, last = (float(sde.log_snr(t)) for t in (t_min, sde.T))
    if not math.isfinite(first - last):
        raise UsageError(
            f"got t_min={t_min}, where log_snr is {first}; expected a time at which it is finite, such as {sde.T * 1e-5:g}"
        )
    return first, last
