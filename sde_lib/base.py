r"""Linear SDEs, their Gaussian kernels, and what follows from them.

    (1)  dx = f(t) x dt + g(t) dw,                       0 <= t <= T, data at t = 0, noise at t = T
    (2)  x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I)
    (3)  alpha' = f alpha,    (sigma^2)' = 2 f sigma^2 + g^2
    (4)  x_t | x_s ~ N((alpha_t / alpha_s) x_s, (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) I),   s < t
    (5)  dx = [f x - g^2 score(x, t)] dt + g dw_bar      the reverse SDE
    (6)  dx/dt = f x - g^2 score(x, t) / 2               the probability-flow ODE

(1), (2), (5) and (6) are equations (5), (29), (6) and (13) of Song et al. 2021, "Score-Based Generative Modeling through
Stochastic Differential Equations" (arXiv:2011.13456), for linear drifts; (3) are the moment equations of Sarkka and Solin 2019,
"Applied Stochastic Differential Equations", (5.50) and (5.51).

Two clocks are natural: the noise-to-signal ratio kappa = sigma / alpha, and log_snr = 2 log(alpha / sigma), which
decreases in t. An SDE is known to samplers, likelihoods and networks only by the methods below.

Coefficients are computed and returned in float64 whatever the dtype of `t`, in the shape of `t`; `expand_as` casts
them once, where they meet a state.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from numerics import Generator, UserError, as_time, batch_time, expand_as, normal
from sde_lib.inverse import TimeOfLogSNR

if TYPE_CHECKING:
    from sde_lib.score import Score

Time = Tensor | float

_RESOLVED = 20.0  # log-SNRs beyond which, on either side, samplers see nothing


class SDE(ABC):
    """A linear SDE dx = f(t) x dt + g(t) dw, whose kernel is x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I).

    A subclass is a frozen, keyword-only dataclass that gives `alpha` and `sigma` and, where it knows better, `f`, `g`,
    `log_snr` and its inverse. Everything else follows, by (1) to (6) of the module's text.

    A time is `()` or `(B,)`, a state `(B, *)`. Coefficients come back in the shape of the time, in float64.

    Attributes:
        T: the time of pure noise.
        t_min: the smallest time of training and likelihood. At t = 0 the score of a data set is infinite.
        t_end: the time at which samplers stop.
    """

    T: float
    t_min: float
    t_end: float

    # -- the coefficients -------------------------------------------------------------------------------------------

    # They are defined for t in [0, T] and look at no value of t: solvers ask a little beyond, and a look would make the host
    # wait for the device.

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """The factor of the signal in (2), the shape of `t`."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """The standard deviation of the noise in (2), the shape of `t`."""

    def f(self, t: Time) -> Tensor:
        """The drift's factor, from (3): the derivative of log alpha, the shape of `t`; at t = 0 its limit.

        Raises:
            UserError: where automatic differentiation cannot follow alpha or sigma.
        """
        self._followed  # noqa: B018 - checks once
        return _derivative(lambda u: self.alpha(u).log(), self._inside(t))

    def g(self, t: Time) -> Tensor:
        """The diffusion, from (3), the shape of `t`: g^2 = -sigma^2 d log_snr / dt; at t = 0 its limit.

        Raises:
            UserError: as `f`.
        """
        self._followed  # noqa: B018 - checks once
        t = self._inside(t)
        return self.sigma(t) * (-_derivative(self.log_snr, t)).clamp(min=0).sqrt()

    def _inside(self, t: Time) -> Tensor:
        """`t`, kept off 0, where sigma may be 0 and its logarithm's slope infinite, by a billionth of T."""
        return as_time(t).clamp(min=1e-9 * self.T)

    @cached_property
    def _followed(self) -> bool:
        """Do the derivatives by autograd add up to the differences of the values? Looked at once, on the CPU.

        A function that looks values up in a table, or goes through NumPy, has none, which must not be read as 0.
        """
        t = torch.linspace(0.05, 0.95, 1801, dtype=torch.float64) * self.T
        for name, function in (("alpha", lambda u: self.alpha(u).log()), ("log_snr", self.log_snr)):
            try:
                summed = float(torch.trapezoid(_derivative(function, t), t))
            except RuntimeError as error:
                raise UserError(
                    f"got {name} of {type(self).__name__}, which autograd cannot follow: {error}"
                ) from error
            with torch.no_grad():
                ends = function(t[[0, -1]])
            change = float(ends[1] - ends[0])
            if not abs(summed - change) <= 0.05 * abs(change) + 1e-9:
                raise UserError(
                    f"got {name} of {type(self).__name__} whose logarithm changes by {change:.4g} from t = {float(t[0]):.3g} "
                    f"to {float(t[-1]):.3g}, where its derivative by autograd adds up to {summed:.4g}; expected functions made "
                    "of torch operations on t, not of a table's values: give f and g, or use TableVPSDE or TableVESDE"
                )
        return True

    def log_snr(self, t: Time) -> Tensor:
        """2 log(alpha / sigma), the shape of `t`; strictly decreasing, +inf where sigma is 0."""
        t = as_time(t)
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time_of_log_snr(self, l: Time) -> Tensor:
        """The time in [0, T] at which `log_snr` is `l`, of its shape, from a table; the ends for what lies outside."""
        return self._inverse(as_time(l))

    @cached_property
    def _inverse(self) -> TimeOfLogSNR:
        return TimeOfLogSNR(self)

    # -- what follows from them -------------------------------------------------------------------------------------
    #
    # A time that comes as a number must lie in [0, T]; the values of a tensor are not looked at, as above.

    @property
    def t_start(self) -> float:
        """The time at which samplers start: T, unless the signal is lost to float32 long before.

        Where log_snr(T) < -20, a signal of 1 in 22,000, and the noise does not grow any more, it is the time of that log-SNR:
        there the prior is right to 1e-9 nats a dimension, and from later times a step would be a step into the void.
        """
        lost = float(self.time_of_log_snr(-_RESOLVED))
        if float(self.log_snr(self.T)) >= -_RESOLVED:
            return self.T
        return lost if math.isclose(float(self.sigma(lost)), self.prior_std, rel_tol=1e-6) else self.T

    def resolved(self, t: float) -> float:
        """`t`, or, where sigma(t) = 0 and the score of a data set is infinite, a time that stands for it.

        That is t_min, or the time of log_snr = 20 where that is later. Samplers stop there; Tweedie's mean goes the rest of the
        way.
        """
        return t if float(self.sigma(t)) > 0 else max(self.t_min, float(self.time_of_log_snr(_RESOLVED)))

    @property
    def prior_std(self) -> float:
        """The standard deviation of the prior N(0, prior_std^2 I), which stands for the law of x_T."""
        return float(self.sigma(self.T))

    def _batch_time(self, t: Time, x: Tensor) -> Tensor:
        """`t` as `(B,)`, float64.

        Raises:
            UserError: for a number outside [0, T], or a shape that is neither `()` nor `(B,)`.
        """
        if not isinstance(t, Tensor) and not 0 <= t <= self.T:
            raise UserError(f"got t={t}; expected a time in [0, {self.T}]: 0 is data, {self.T} is noise")
        return batch_time(t, x)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f(t) x of (1), `(B, *)`."""
        return expand_as(self.f(self._batch_time(t, x)), x) * x

    def diffusion(self, t: Time) -> Tensor:
        """g(t) of (1), the shape of `t`."""
        return self.g(t)

    def marginal(self, x_0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Mean `(B, *)` and standard deviation `(B, 1, ..., 1)` of x_t given x_0, (2)."""
        t = self._batch_time(t, x_0)
        return expand_as(self.alpha(t), x_0) * x_0, expand_as(self.sigma(t), x_0)

    def perturb(self, x_0: Tensor, t: Time, eps: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps, `(B, *)`."""
        mean, std = self.marginal(x_0, t)
        return mean + std * eps

    def transition(self, x_s: Tensor, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """Mean `(B, *)` and standard deviation `(B, 1, ..., 1)` of x_t given x_s, s <= t, (4)."""
        s, t = self._batch_time(s, x_s), self._batch_time(t, x_s)
        return expand_as(self.alpha(t) / self.alpha(s), x_s) * x_s, expand_as(self.transition_std(s, t), x_s)

    def transition_std(self, s: Time, t: Time) -> Tensor:
        """The standard deviation in (4), the shape of the times.

        The difference of variances is sigma_t^2 (1 - snr_t / snr_s), whose second factor `expm1` gives to full
        precision however near s is to t.
        """
        s, t = as_time(s), as_time(t)
        return self.sigma(t) * (-torch.expm1(self.log_snr(t) - self.log_snr(s))).clamp(min=0).sqrt()

    def reverse_drift(self, score: Score, x: Tensor, t: Time) -> Tensor:
        """The drift of (5), `(B, *)`; the time in it runs from T down to 0, so a step is minus dt times this."""
        t = self._batch_time(t, x)
        return self.drift(x, t) - expand_as(self.g(t).square(), x) * score(x, t)

    def flow(self, score: Score, x: Tensor, t: Time) -> Tensor:
        """The velocity dx/dt of (6), `(B, *)`."""
        t = self._batch_time(t, x)
        return self.drift(x, t) - expand_as(self.g(t).square() / 2, x) * score(x, t)

    def prior_sample(
        self,
        shape: Sequence[int],
        *,
        generator: Generator = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A batch from the prior N(0, prior_std^2 I), of `shape` `(B, *)`."""
        return self.prior_std * normal(shape, generator, device=device, dtype=dtype)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """The log-density of the prior at `z` `(B, *)`, `(B,)` in nats, float64."""
        z = z.flatten(1).to(torch.float64)
        std = self.prior_std
        return -0.5 * (z / std).square().sum(dim=1) - z.shape[1] * (math.log(std) + 0.5 * math.log(2 * math.pi))


def require_numbers(**values: float) -> None:
    """Refuses what is not a finite number, by name, with a UserError."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"got {name}={value!r}; expected a finite number")


def require_limits(T: float, t_min: float, t_end: float) -> None:
    """Refuses times of which not 0 <= t_min, t_end < T, with a UserError."""
    require_numbers(T=T, t_min=t_min, t_end=t_end)
    if not (0 <= t_min < T and 0 <= t_end < T):
        raise UserError(f"got T={T}, t_min={t_min}, t_end={t_end}; expected 0 <= t_min < T and 0 <= t_end < T")


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of an elementwise `function` of `t`, the shape of `t`; differentiable where `t` asks for it.

    In every autograd mode: also under `torch.inference_mode()`, which is left for it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        u = t if t.requires_grad else t.detach().clone().requires_grad_()
        value = function(u)
        if not value.requires_grad:
            return torch.zeros_like(u, requires_grad=False)  # a constant: `_check_followed` has seen to that
        (slope,) = torch.autograd.grad(value.sum(), u, create_graph=t.requires_grad)
    return slope
