r"""SDEs from less: from just alpha and sigma, or from a table of a discrete chain.

Any pair with alpha > 0 and alpha / sigma falling in time is the kernel of one linear SDE, whose f and g follow by
differentiation ((3) in `sde_lib.base`). A chain of betas or sigmas is such a pair known at N times; between them the
logarithm is interpolated by the monotone cubic of Fritsch and Carlson (1980), so that g is continuous and real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from numerics import UserError, as_time
from sde_lib.base import SDE, Time, check_times


@dataclass(frozen=True, kw_only=True)
class KernelSDE(SDE):
    """The SDE whose kernel has the given `alpha(t)` and `sigma(t)`; f and g by automatic differentiation.

    Args:
        alpha_fn, sigma_fn: functions of a float64 tensor of times, of any shape, made of torch operations.
        std_at_T: the prior's standard deviation; sigma(T) unless given.

    >>> cosine = KernelSDE(alpha_fn=lambda t: torch.cos(1.57 * t), sigma_fn=lambda t: torch.sin(1.57 * t))
    """

    alpha_fn: Callable[[Tensor], Tensor]
    sigma_fn: Callable[[Tensor], Tensor]
    T: float = 1.0
    t_min: float = 1e-5
    t_end: float = 1e-3
    std_at_T: float | None = None

    def __post_init__(self) -> None:
        check_times(self.T, self.t_min, self.t_end)
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
        return float(self.sigma(self.T)) if self.std_at_T is None else self.std_at_T


@dataclass(frozen=True)
class MonotoneCubic:
    """A piecewise cubic through `(x, y)` that is monotone where the data are, evaluated in torch."""

    knots: Tensor
    coefficients: Tensor  # (4, N), highest power first, of the distance to the left knot

    @classmethod
    def through(cls, x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> MonotoneCubic:
        from scipy.interpolate import PchipInterpolator

        spline = PchipInterpolator(torch.as_tensor(x).double().numpy(), torch.as_tensor(y).double().numpy())
        return cls(torch.from_numpy(spline.x.copy()), torch.from_numpy(spline.c.copy()))

    def __call__(self, t: Tensor) -> Tensor:
        """The value at `t`, of its shape; the ends' cubics go on outside."""
        knots, (a, b, c, d) = self.knots.to(t.device), self.coefficients.to(t.device)
        i = (torch.searchsorted(knots, t.detach().contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
        u = t - knots[i]
        return ((a[i] * u + b[i]) * u + c[i]) * u + d[i]


@dataclass(frozen=True, kw_only=True)
class TableVPSDE(SDE):
    """The VP SDE through a chain of DDPM betas.

    The chain x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps (Ho et al. 2020, arXiv:2006.11239, equation (2)) has
    alpha_i^2 = prod (1 - beta_j). Step i = 1 ... N stands at t = i T / N and the data at t = 0, and there the SDE's
    kernel is the chain's exactly.
    """

    betas: tuple[float, ...]
    T: float = 1.0
    t_min: float = 1e-5
    t_end: float = 1e-3
    integral: MonotoneCubic = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_times(self.T, self.t_min, self.t_end)
        betas = torch.as_tensor(self.betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise UserError(f"got betas of shape {tuple(betas.shape)}; expected (N,), N >= 2, all in (0, 1)")
        object.__setattr__(self, "betas", tuple(betas.tolist()))
        B = torch.cat([torch.zeros(1, dtype=torch.float64), -torch.log1p(-betas).cumsum(0)])
        times = torch.linspace(0, self.T, len(B), dtype=torch.float64)
        object.__setattr__(self, "integral", MonotoneCubic.through(times, B))

    def alpha(self, t: Time) -> Tensor:
        return torch.exp(-self.integral(as_time(t)) / 2)

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(-self.integral(as_time(t)))).sqrt()

    def log_snr(self, t: Time) -> Tensor:
        return -torch.expm1(self.integral(as_time(t))).log()

    @property
    def prior_std(self) -> float:
        return 1.0


@dataclass(frozen=True, kw_only=True)
class TableVESDE(SDE):
    """The VE SDE through a ladder of NCSN sigmas, in any order: the smallest at t = 0, the largest at t = T."""

    sigmas: tuple[float, ...]
    T: float = 1.0
    t_min: float = 1e-5
    t_end: float = 1e-5
    log_sigma: MonotoneCubic = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_times(self.T, self.t_min, self.t_end)
        sigmas = torch.as_tensor(self.sigmas, dtype=torch.float64).sort().values
        if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas > 0).all() & (sigmas.diff() > 0).all()):
            raise UserError(f"got sigmas of shape {tuple(sigmas.shape)}; expected (N,), N >= 2, positive and different")
        object.__setattr__(self, "sigmas", tuple(sigmas.tolist()))
        times = torch.linspace(0, self.T, len(sigmas), dtype=torch.float64)
        object.__setattr__(self, "log_sigma", MonotoneCubic.through(times, sigmas.log()))

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return self.log_sigma(as_time(t)).exp()

    def f(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def log_snr(self, t: Time) -> Tensor:
        return -2 * self.log_sigma(as_time(t))
