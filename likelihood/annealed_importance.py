r"""Annealed importance sampling: the normaliser of an energy, with bounds from both sides where exact samples are at hand.

Unnormalised densities f_0, ..., f_K lead from a normalised base f_0, which can be sampled, to f = f_K with log Z = log of its
integral. T_k is a Markov chain's transition that leaves f_k alone (`numerics.hamiltonian`). Then for

    (1)  x_1 ~ f_0,  x_{k+1} ~ T_k(x_k):          log w = sum_{k=1}^{K} log f_k(x_k) - log f_{k-1}(x_k),     E w = Z

(Neal 2001, "Annealed importance sampling", equations (4) to (9)). By Jensen's inequality E log w <= log Z: the mean of log w
is a *lower* bound of log Z in expectation, so densities f / Z with it are too large, and bits/dim too good. Run backwards
from exact samples of f,

    (2)  x_K ~ f / Z,  x_{k-1} ~ T_{k-1}(x_k):     log w' = sum_k log f_{k-1}(x_k) - log f_k(x_k),            E w' = 1 / Z

so -E log w' >= log Z: together a bracket, whose width is the sum of both chains' errors and closes as K grows. That is
bidirectional Monte Carlo (Grosse, Ghahramani, Adams 2015, arXiv:1511.02543, section 3.1). Without exact samples, as for a
trained energy, there is no upper bound.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from numerics import (
    Generator,
    Hamiltonian,
    LogDensity,
    Point,
    UserError,
    falls_outwards,
    normal,
    point,
    require_count,
    require_positive,
)
from sde_lib import SDE

Energy = Callable[[Tensor, Tensor], Tensor]
"""(x `(B, *)`, t `(B,)`) -> E(x, t) `(B,)` in nats: minus the log-density of x_t, up to a number that depends on t alone."""


class Path(ABC):
    """Unnormalised densities from a normalised base at u = 0 to the energy's at u = 1.

    Attributes:
        shape: of one sample.
        std: the standard deviation of the base, N(0, std^2 I).
    """

    shape: tuple[int, ...]
    std: float

    @abstractmethod
    def log_density(self, x: Tensor, u: float) -> Tensor:
        """log f_u(x), `(B,)` nats, for u > 0."""

    def scale(self, u: float) -> float:
        """What the transitions' step is multiplied by at u; 1 unless the path says otherwise."""
        return 1.0

    def at(self, u: float) -> LogDensity:
        """The log-density at u, the base's at 0."""
        return self.base_log_prob if u == 0 else lambda x: self.log_density(x, u)

    def base_log_prob(self, x: Tensor) -> Tensor:
        """The base's log-density, `(B,)` nats, normalised."""
        square = x.reshape(len(x), math.prod(self.shape)).square().sum(dim=1) / (2 * self.std**2)
        return -square - math.prod(self.shape) * (math.log(self.std) + 0.5 * math.log(2 * math.pi))

    def base_sample(
        self, n: int, *, generator: Generator, device: torch.device | str | None, dtype: torch.dtype
    ) -> Tensor:
        """`n` samples of the base, `(n, *)`."""
        return self.std * normal((n, *self.shape), generator, device=device, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class GeometricPath(Path):
    """log f_u = (1 - u) log N(x; 0, std^2 I) + u log f(x), for any unnormalised density f.

    Args:
        target: log f, x `(B, *)` -> `(B,)` nats.
        shape: of one sample.
        std: of the base; as wide as the target.

    Raises:
        UserError: a std that is not positive.
    """

    target: LogDensity
    shape: tuple[int, ...]
    std: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self.std, "std")

    def log_density(self, x: Tensor, u: float) -> Tensor:
        target = self.target(x)
        if target.shape != x.shape[:1]:  # added to the base's it would have another one
            raise UserError(
                f"got a target of shape {tuple(target.shape)} for x of shape {tuple(x.shape)}; expected ({x.shape[0]},)"
            )
        return (1 - u) * self.base_log_prob(x) + u * target


@dataclass(frozen=True, kw_only=True)
class DiffusionPath(Path):
    """log f_u = -E(x, t) with t from T down to `t`, at equal steps of log(sigma / alpha): the way that noise came.

    The energies of all noise levels are at hand where a network is trained as a score, and modes part as they do in sampling,
    where a geometric path has to carry chains over barriers. Steps follow the noise, sqrt(sigma^2 + (alpha width)^2).

    Args:
        sde: whose x_t the energies are of.
        energy: E(x, t).
        shape: of one sample.
        t: the time of the target.
        width: the data's smallest standard deviation in any direction, in model units; steps do not fall below it.
        std: of the base: the standard deviation of x_T; the prior's unless given.

    Raises:
        UserError: a time outside (0, T), or a negative width.
    """

    sde: SDE
    energy: Energy
    shape: tuple[int, ...]
    t: float
    width: float = 0.0
    std: float = field(default=0.0)

    def __post_init__(self) -> None:
        if not 0 < self.t < self.sde.T:
            raise UserError(f"got t={self.t}; expected a time in (0, {self.sde.T})")
        if not self.width >= 0:
            raise UserError(f"got width={self.width}; expected a standard deviation >= 0")
        if self.std == 0.0:
            object.__setattr__(self, "std", self.sde.prior_std)
        require_positive(self.std, "std")

    def time(self, u: float) -> float:
        """The time at u: T at 0, `t` at 1."""
        first, last = (float(self.sde.log_snr(v)) for v in (self.sde.T, self.t))
        if u >= 1:
            return self.t
        return float(self.sde.time_of_log_snr(torch.tensor(first + u * (last - first), dtype=torch.float64)))

    def log_density(self, x: Tensor, u: float) -> Tensor:
        t = torch.full((len(x),), self.time(u), dtype=torch.float64, device=x.device)
        return -self.energy(x, t)

    def scale(self, u: float) -> float:
        t = self.time(u)
        return math.hypot(float(self.sde.sigma(t)), float(self.sde.alpha(t)) * self.width)


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """Log-weights of independent chains.

    Attributes:
        log_w: `(N,)` nats, float64: (1), or minus (2), so that each is an estimate of log Z.
        acceptance: the mean probability of acceptance.
        evaluations: of the log-densities and their gradients, for the whole batch.
        upper: whether these are of chains that ran backwards.
    """

    log_w: Tensor = field(repr=False)
    acceptance: float
    evaluations: int
    upper: bool

    @property
    def bound(self) -> float:
        """The mean: a lower bound of log Z in expectation, or an upper one."""
        return float(self.log_w.mean())

    @property
    def stderr(self) -> float:
        """The standard error of `bound`; NaN for one chain."""
        if len(self.log_w) < 2:
            return math.nan
        return float(self.log_w.std()) / math.sqrt(len(self.log_w))

    @property
    def log_z(self) -> float:
        """log of the mean weight: unbiased for Z itself (for 1 / Z backwards), and closer than the bound."""
        sign = -1.0 if self.upper else 1.0
        return sign * float((sign * self.log_w).logsumexp(0) - math.log(len(self.log_w)))

    @property
    def effective(self) -> float:
        """The effective number of chains, (sum w)^2 / sum w^2."""
        l = self.log_w * (-1.0 if self.upper else 1.0)
        return float((2 * l.logsumexp(0) - (2 * l).logsumexp(0)).exp())


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """log Z from both sides.

    Attributes:
        lower, upper: the chains run forwards and backwards.
    """

    lower: Weights
    upper: Weights

    @property
    def gap(self) -> float:
        """Upper minus lower bound, nats."""
        return self.upper.bound - self.lower.bound

    def contains(self, log_z: float, errors: float = 3.0) -> bool:
        """Whether `log_z` lies between the bounds, widened by so many of their standard errors.

        Raises:
            UserError: bounds of one chain, whose error is not known.
        """
        if math.isnan(self.lower.stderr + self.upper.stderr):
            raise UserError(
                "got a bracket of one chain, whose errors are not known; expected two or more: take more chains"
            )
        low = self.lower.bound - errors * self.lower.stderr
        return low <= log_z <= self.upper.bound + errors * self.upper.stderr

    def __str__(self) -> str:
        return (
            f"{self.lower.bound:.4f} ± {self.lower.stderr:.4f} <= log Z <= "
            f"{self.upper.bound:.4f} ± {self.upper.stderr:.4f} nats"
        )


@dataclass(frozen=True, kw_only=True)
class AnnealedImportance:
    """Annealed importance sampling with K levels; see `likelihood.annealed_importance`.

    Args:
        levels: K, densities after the base; the bounds close as it grows.
        kernel: the transition at each level, whose step is multiplied by the path's scale.

    Raises:
        UserError: fewer than two levels, or a transition that does not leave a density alone (`adjust=False`).
    """

    levels: int = 500
    kernel: Hamiltonian = Hamiltonian(step=0.4, leapfrog=4)

    def __post_init__(self) -> None:
        require_count(self.levels, "levels", 2)
        if not self.kernel.adjust:
            raise UserError(
                "got a kernel with adjust=False, which has a law of its own, so its weights estimate nothing; expected "
                "adjust=True"
            )

    def forward(
        self,
        path: Path,
        n: int,
        *,
        generator: Generator = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        callback: Callable[[int], None] | None = None,
    ) -> Weights:
        """The log-weights (1) of `n` chains from the base.

        Args:
            callback: called after each level with its number.

        Raises:
            UserError: weights that are not finite; or an energy that never rises from where the chains end, away from the
                base's centre, whose Z is infinite. One with a bottom there and none elsewhere is not seen; nor are chains that
                have not arrived, whose bound is bad and a bound.
        """
        require_count(n, "n")
        at_least = torch.promote_types(dtype, torch.float32)
        x = path.base_sample(n, generator=generator, device=device, dtype=at_least)
        return self._run(path, x, [k / self.levels for k in range(self.levels + 1)], generator, callback)

    def backward(
        self,
        path: Path,
        x: Tensor,
        *,
        generator: Generator = None,
        callback: Callable[[int], None] | None = None,
    ) -> Weights:
        """Minus the log-weights (2) of chains from exact samples `x` `(N, *)` of the target.

        Raises:
            UserError: samples of another shape than the path's, none, or none that are real floating-point numbers; or weights
                that are not finite.
        """
        _require_samples(path, x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return self._run(path, x, [k / self.levels for k in range(self.levels, -1, -1)], generator, callback)

    def bracket(self, path: Path, x: Tensor, *, generator: Generator = None) -> Bracket:
        """log Z from both sides, with as many chains forwards as there are exact samples `x` `(N, *)`.

        Raises:
            UserError: as `forward` and `backward`.
        """
        _require_samples(path, x)
        lower = self.forward(path, len(x), generator=generator, device=x.device, dtype=x.dtype)
        return Bracket(lower=lower, upper=self.backward(path, x, generator=generator))

    def _run(
        self, path: Path, x: Tensor, us: Sequence[float], generator: Generator, callback: Callable[[int], None] | None
    ) -> Weights:
        """Chains from `x` along the densities at `us`; between two changes of density, one transition."""
        upper = us[0] > us[-1]
        log_w = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        accepted = torch.zeros((), dtype=torch.float64, device=x.device)
        now = point(path.at(us[0]), x)
        for k in range(1, len(us)):
            density = path.at(us[k])
            then = point(density, now.x)
            log_w += (then.value - now.value).to(torch.float64)
            now = then
            if k + 1 < len(us):
                now, probability = self.kernel.move(density, then, generator=generator, scale=path.scale(us[k]))
                accepted += probability.mean()
            if callback is not None:
                callback(k)
        if not bool(log_w.isfinite().all()):
            bad = int((~log_w.isfinite()).sum())
            raise UserError(
                f"got {bad} of {len(x)} chains with weights that are not finite; expected energies that are finite where the "
                "base has mass, and bounded below: train longer, or take a narrower base"
            )
        if not upper:
            _require_bottom(path, now)
        changes = len(us) - 1
        return Weights(
            log_w=-log_w if upper else log_w,
            acceptance=float(accepted) / max(1, changes - 1),
            evaluations=1 + changes + (changes - 1) * self.kernel.leapfrog,
            upper=upper,
        )


def _require_samples(path: Path, x: Tensor) -> None:
    """Refuses what cannot be samples of the path's target: the base's density would be that of another dimension."""
    if x.shape[1:] != tuple(path.shape) or x.ndim == 0 or len(x) == 0 or not x.is_floating_point():
        raise UserError(
            f"got samples of shape {tuple(x.shape)} and {x.dtype} for a path of shape {tuple(path.shape)}; expected one or "
            f"more, ({', '.join(['N', *map(str, path.shape)])}), of real floating-point numbers"
        )


def _require_bottom(path: Path, at: Point) -> None:
    """Refuses a target that never falls from the highest of the states on, away from the base's centre."""
    if falls_outwards(path.at(1.0), at, at.x):
        raise UserError(
            "got an energy that is not bounded below, or level: from the chain that ended lowest it does not rise again "
            "however far out, so its log Z is infinite; expected one that grows outwards: train longer, or add a quadratic"
        )
