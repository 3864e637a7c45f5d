r"""SDEs from less: from just alpha and sigma, or from a table of a discrete chain.

Any pair with alpha > 0 and alpha / sigma falling in time is the kernel of one linear SDE, whose f and g follow by
differentiation ((3) in `sde_lib.base`). A chain of betas or sigmas is such a pair known at N times; between them the
logarithm is interpolated by the monotone cubic of Fritsch and Carlson (1980), so that g is continuous and real.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from numerics import UserError, as_time
from sde_lib.base import SDE, Time, require_limits
from sde_lib.monotone_cubic import MonotoneCubic


@dataclass(frozen=True, kw_only=True)
class KernelSDE(SDE):
    """The SDE whose kernel is N(alpha(t) x_0, sigma(t)^2 I) for the given functions.

    f = (log alpha)' and g^2 = (sigma^2)' - 2 f sigma^2 by automatic differentiation (Sarkka and Solin 2019, "Applied
    Stochastic Differential Equations", (5.50) and (5.51), solved for them).

    Args:
        alpha_fn, sigma_fn: functions of a float64 tensor of times, of any shape, made of torch operations.
        T: the time of pure noise. t_min, t_end: where likelihoods and samplers stop.
        terminal_std: the prior's standard deviation; sigma(T) unless given.

    Raises:
        UserError: where alpha / sigma is not finite and strictly falling on [t_min, T].

    >>> cosine = KernelSDE(alpha_fn=lambda t: torch.cos(1.57 * t), sigma_fn=lambda t: torch.sin(1.57 * t))
    >>> round(float(cosine.g(0.5)), 4)
    1.7713
    """

    alpha_fn: Callable[[Tensor], Tensor]
    sigma_fn: Callable[[Tensor], Tensor]
    T: float = 1.0
    t_min: float = 1e-5
    t_end: float = 1e-3
    terminal_std: float | None = None

    def __post_init__(self) -> None:
        require_limits(self.T, self.t_min, self.t_end)
        l = self.log_snr(torch.linspace(max(self.t_min, 1e-6 * self.T), self.T, 65, dtype=torch.float64))
        if not bool(l.isfinite().all() & (l.diff() < 0).all()):
            raise UserError(
                f"got alpha and sigma whose log signal-to-noise ratio is not finite and strictly decreasing on "
                f"[{self.t_min}, {self.T}]; expected alpha > 0, sigma > 0 and alpha / sigma falling in time"
            )

    def alpha(self, t: Time) -> Tensor:
        return self.alpha_fn(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_fn(as_time(t))

    @property
    def prior_std(self) -> float:
        return float(self.sigma(self.T)) if self.terminal_std is None else self.terminal_std


_FEW = 8


def _named(values: tuple[float, ...]) -> str:
    """A few numbers as they are; of more their number, the first, the last, and what tells them from others."""
    if len(values) <= _FEW:
        return repr(values)
    digest = hashlib.sha256(repr(values).encode()).hexdigest()[:16]
    return f"<{len(values)} from {values[0]!r} to {values[-1]!r}, sha256 {digest}>"


@dataclass(frozen=True, kw_only=True)
class TableVPSDE(SDE):
    """The VP SDE through a chain of DDPM betas.

    The chain x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps (Ho et al. 2020, arXiv:2006.11239, equation (2)) has
    alpha_i^2 = prod (1 - beta_j). Step i = 1 ... N stands at t = i T / N and the data at t = 0, and there the SDE's
    kernel is the chain's exactly. Between them -log alpha^2 is interpolated by a monotone cubic. The prior is N(0, I).

    Args:
        betas: beta_1 ... beta_N, N >= 2, all in (0, 1).
        T, t_min, t_end: as in `SDE`.
    """

    betas: tuple[float, ...]
    T: float = 1.0
    t_min: float = 1e-5
    t_end: float = 1e-3
    integral: MonotoneCubic = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_limits(self.T, self.t_min, self.t_end)
        betas = torch.as_tensor(self.betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise UserError(f"got betas of shape {tuple(betas.shape)}; expected (N,), N >= 2, all in (0, 1)")
        object.__setattr__(self, "betas", tuple(betas.tolist()))
        B = torch.cat([torch.zeros(1, dtype=torch.float64), -torch.log1p(-betas).cumsum(0)])
        times = torch.linspace(0, self.T, len(B), dtype=torch.float64)
        object.__setattr__(self, "integral", MonotoneCubic(times, B))

    def __repr__(self) -> str:
        return f"TableVPSDE(betas={_named(self.betas)}, T={self.T}, t_min={self.t_min}, t_end={self.t_end})"

    def alpha(self, t: Time) -> Tensor:
        return torch.exp(-self.integral(as_time(t)) / 2)

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(-self.integral(as_time(t)))).sqrt()

    def log_snr(self, t: Time) -> Tensor:
        B = self.integral(as_time(t))
        return -B - (-torch.expm1(-B)).log()

    def f(self, t: Time) -> Tensor:
        return -self.integral.slope(as_time(t)) / 2

    def g(self, t: Time) -> Tensor:
        return self.integral.slope(as_time(t)).clamp(min=0).sqrt()

    @property
    def prior_std(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class TableVESDE(SDE):
    """The VE SDE through a ladder of NCSN sigmas: the smallest at t = 0, the largest at t = T.

    alpha = 1, and log sigma through the ladder at equal distances in t, interpolated by a monotone cubic (Song and Ermon 2019,
    arXiv:1907.05600, has the ladder). The prior is N(0, sigma_max^2 I).

    Args:
        sigmas: two or more, positive and different, in any order.
        T, t_min, t_end: as in `SDE`.
    """

    sigmas: tuple[float, ...]
    T: float = 1.0
    t_min: float = 1e-5
    t_end: float = 1e-5
    log_sigma: MonotoneCubic = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_limits(self.T, self.t_min, self.t_end)
        sigmas = torch.as_tensor(self.sigmas, dtype=torch.float64).sort().values
        if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas > 0).all() & (sigmas.diff() > 0).all()):
            raise UserError(f"got sigmas of shape {tuple(sigmas.shape)}; expected (N,), N >= 2, positive and different")
        object.__setattr__(self, "sigmas", tuple(sigmas.tolist()))
        times = torch.linspace(0, self.T, len(sigmas), dtype=torch.float64)
        object.__setattr__(self, "log_sigma", MonotoneCubic(times, sigmas.log()))

    def __repr__(self) -> str:
        return f"TableVESDE(sigmas={_named(self.sigmas)}, T={self.T}, t_min={self.t_min}, t_end={self.t_end})"

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return self.log_sigma(as_time(t)).exp()

    def f(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def g(self, t: Time) -> Tensor:
        t = as_time(t)
        return self.sigma(t) * (2 * self.log_sigma.slope(t)).clamp(min=0).sqrt()

    def log_snr(self, t: Time) -> Tensor:
        return -2 * self.log_sigma(as_time(t))
