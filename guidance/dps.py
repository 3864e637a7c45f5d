r"""Diffusion posterior sampling: p(x_0 | x_t) as a point at its mean.

With C' = 0 in (2) of `guidance.approximation`, log p(y | x_t) is the measurement's log-likelihood at the denoised mean D, and

    grad log p(y | x_t) = -strength grad |(y - A D(x_t)) / n|^2 / 2

(Chung et al. 2022, arXiv:2209.14687, equation (14)). The published *algorithm* does something else: it subtracts
zeta grad |y - A D| after each ancestral step, the norm where the square belongs, so that zeta is a length and depends on the
grid; and public copies take that norm over the whole batch, so that a sample depends on its batch mates. Here a norm is
always a sample's own. The step (x_t + v score) / a of `samplers.Ancestral` turns an additional score of

    -zeta (a / v) grad |y - A D|,      a = alpha_t / alpha_s,  v = sigma_t^2 - a^2 sigma_s^2

into the published one, which is what `PublishedDPS` is on the grid that it is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from guidance.approximation import Approximation, Denoised
from numerics import UserError, expand_as, ordinary, require_positive
from sde_lib import Measurement

_LOOKS = 3
"""Calls in which the times are looked at: two grids have their first time in common, but not the next."""


@dataclass(frozen=True, kw_only=True)
class DPS(Approximation):
    """The measurement's log-likelihood at the denoised mean; the operator need not be linear.

    It takes the mean for certain, so that the pull towards y is much too strong while x_t is noise: modes and means are wrong
    by much (see docs/guidance.md), and with little noise samplers need small steps. Cost: an evaluation and one product.

    Args:
        strength: of the term, > 0; 1 is the formula's.

    Raises:
        UserError: for another strength; in `posterior`, for a noise of 0; when called, for an operator that autograd cannot
            follow.
    """

    strength: float = 1.0

    linear: ClassVar[bool] = False
    divides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(self.strength, "strength")

    def direction(self, at: Denoised, measurement: Measurement) -> Tensor:
        return self.strength * of_residual(at, measurement)


def of_residual(at: Denoised, measurement: Measurement) -> Tensor:
    """The gradient of log p(y | x_0) by x_0 at D, `(B, *)`: A^T (y - A D) / n^2, by autograd where there is no adjoint."""
    if measurement.linear:
        r = measurement.residual(at.x_0)
        return measurement.adjoint(r / measurement.variance(r))
    measurement.require_derivative(at.x_0)
    x_0 = at.x_0 if at.differentiable else at.x_0.detach().requires_grad_()
    value = measurement.log_likelihood(x_0)
    (slope,) = torch.autograd.grad(value.sum(), x_0, create_graph=at.differentiable)
    return slope


@dataclass(frozen=True, kw_only=True)
class PublishedDPS(Approximation):
    """The published algorithm's step as a score: -zeta (a / v) grad |y - A D|, norms per sample.

    With `PredictorCorrector(predictor=Ancestral(), corrector=None, grid=times)` on the same times it is algorithm 1 of Chung et
    al. 2022 (arXiv:2209.14687). The noise of the measurement is not asked for: how close samples come to y is zeta's doing.

    Args:
        zeta: the paper's; 0.3 to 1 there.
        times: `(N+1,)`, the sampler's grid, falling.

    Raises:
        UserError: for another zeta, times that do not fall, or an operator without an adjoint; in the first calls, at a time
            that is none of them. (Later ones give NaN there: to ask a GPU at every step would make it wait.)
    """

    zeta: float = 1.0
    times: Sequence[float] | Tensor
    _times: Tensor = field(init=False, repr=False, compare=False)
    _calls: list[int] = field(init=False, repr=False, compare=False, default_factory=lambda: [0])

    def __post_init__(self) -> None:
        require_positive(self.zeta, "zeta")
        try:
            times = torch.as_tensor(self.times, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"got times={self.times!r}; expected (N+1,) that fall: the grid of the sampler") from error
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() < 0).all()):
            raise UserError(
                f"got times of shape {tuple(times.shape)}; expected (N+1,) that fall: the grid of the sampler"
            )
        object.__setattr__(self, "_times", ordinary(times))

    def direction(self, at: Denoised, measurement: Measurement) -> Tensor:
        r = measurement.residual(at.x_0)
        norm = r.flatten(1).norm(dim=1).clamp(min=torch.finfo(r.dtype).tiny)
        return expand_as(self.zeta * self._per_step(at) / norm, at.x) * measurement.adjoint(r)

    def _per_step(self, at: Denoised) -> Tensor:
        """a / v of the step that begins at t, `(B,)`; none begins at the last time."""
        times = self._times.to(at.t.device)
        off, i = (times.unsqueeze(0) - at.t.unsqueeze(1)).abs().min(dim=1)
        other = off > 1e-5 * times[0]  # a sampler's time may be in float32
        self._calls[0] += 1
        if self._calls[0] <= _LOOKS and bool(other.any()):
            raise UserError(
                f"got t={float(at.t[other][0]):.6g} for PublishedDPS, which was told {float(times[i[other][0]]):.6g} at best; "
                "expected the sampler's own grid in times=: its steps' lengths are part of the method"
            )
        t, s = times[i], times[(i + 1).clamp(max=len(times) - 1)]
        ratio = at.sde.alpha(t) / at.sde.alpha(s)
        v = at.sde.transition_std(s, t).square()
        found = torch.where(v > 0, ratio / torch.where(v > 0, v, 1.0), 0.0)
        return torch.where(other, torch.nan, found)
