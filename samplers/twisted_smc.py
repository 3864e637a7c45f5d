r"""Twisted sequential Monte Carlo: guided particles, and weights that make up for the guidance.

A chain of reverse steps p(x_s | x_t) is a model of x at t_end. To draw from it given y, K particles take guided steps

    q(x_s | x_t) = N(m + (v / a) grad log psi_t(x_t), s^2 I),      p(x_s | x_t) = N(m, s^2 I)

with psi_t an approximation of p(y | x_t), and carry the weights

    (1)  w <- w p(x_s | x_t) psi_s(x_s) / (q(x_s | x_t) psi_t(x_t))

so that, whatever psi is on the way, the weighted particles at t_end have the law p(x) psi_end(x) as K grows (Wu, Trippe,
Naesseth, Blei, Cunningham 2023, arXiv:2306.17775, algorithm 1; m, a and v are those of `Ancestral`). Where the weights have
become uneven, particles are drawn anew by them (systematic resampling; Douc, Cappe, Moulines 2005). Here

    (2)  psi_t(x) = N(y; A D(x, t), n^2 + r^2 A A^T),      r^2 = d^2 kappa^2 / (d^2 + kappa^2)

with the denoised mean D and the width of `guidance.PiGDM`; at t_end, where kappa is small, it is p(y | x_end) up to order
kappa^4. The steps' variance is that of the forward process's posterior and r^2 times the square of D's factor in m, so that
the chain is exact for N(m, d^2 I) data; for other data its bias falls with the steps, as that of `Ancestral` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from numerics import (
    Generator,
    UserError,
    normal,
    real_dtype,
    require_count,
    require_positive,
    require_range,
    take,
    uniform,
)
from samplers.finite import StepWatch
from samplers.measured import MeasuredSampler
from samplers.result import SampleResult, StepInfo
from samplers.run import Run, numbers
from samplers.step import StatefulStep, Step
from sde_lib import SDE, Measurement, Score, check_score
from sde_lib.score import tweedie
from sde_lib.time_grids import LogSNR, TimeGrid


@dataclass(frozen=True, kw_only=True, repr=False)
class TwistedSMC(MeasuredSampler):
    r"""Samples of the posterior from guided, weighted particles: exact as `particles` and `steps` grow
    (Wu et al. 2023, arXiv:2306.17775, algorithm 1).

    Each sample has particles of its own, of which one is drawn by its weight at the end: so samples are independent of each
    other, and the law of each is wrong by about 1 / particles. A run holds B * particles states and calls the score on all of
    them, with one vector-Jacobian product a step; cut large batches. The operator may be any: with singular values (2) is
    used as it is, with an adjoint A A^T is replaced by its diagonal's mean (a
    large matrix: by its diagonal), and otherwise by 0, where autograd has to follow the operator.

    Args:
        measurement: with noise.
        particles: K, of each sample.
        data_std: d of (2).
        resample_below: draw anew where the effective number of particles is below this share of K.
        steps, grid, denoise, corrections: as in every `GridSampler`. The last weights need an evaluation at t_end, of which
            `denoise` is a by-product.

    Raises:
        UserError: for a measurement without noise, or a number out of its range; when sampling, for an x_T or keep_path, a
            batch that the measurement is not of, or a score or an operator that autograd cannot follow.
    """

    steps: int = 200
    particles: int = 32
    data_std: float = 1.0
    resample_below: float = 0.5

    default_grid: ClassVar[TimeGrid] = LogSNR()
    needs_svd: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.particles, "particles")
        require_positive(self.data_std, "data_std")
        require_range(self.resample_below, "resample_below", 0, 1)
        if self.measurement.noiseless:
            raise UserError(
                "got a noise of std=0 for TwistedSMC, whose weights divide by it; expected std > 0: without noise use DDNM, or "
                "guidance.posterior with MomentMatching()"
            )

    @property
    def evaluations(self) -> int:
        """Calls of the score that a run makes."""
        return self.steps + 1

    def within(self, evaluations: int) -> TwistedSMC:
        """This sampler with as many steps as fit into a budget of `evaluations` calls of the score.

        Raises:
            UserError: where not one step fits.
        """
        if evaluations < 2:
            raise UserError(
                f"got a budget of {evaluations} evaluations for TwistedSMC; expected at least 2, which is one step"
            )
        return replace(self, steps=evaluations - 1)

    def method(self, sde: SDE, times: Tensor) -> Step | StatefulStep[Any]:
        """Refused: a step is one of all particles of a run.

        Raises:
            UserError: always.
        """
        raise UserError("got TwistedSMC as a step; expected a method without particles, such as DDIM")

    def _check(self, score: Score, keep_path: bool) -> None:
        if keep_path:
            raise UserError(
                "got keep_path=True with TwistedSMC, whose samples are drawn from particles at the end; expected a callback"
            )

    def _start(
        self,
        sde: SDE,
        t_start: float,
        shape: Sequence[int],
        x_T: Tensor | None,
        generator: Generator,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> tuple[torch.dtype, Tensor]:
        if x_T is not None:
            raise UserError("got x_T with TwistedSMC, which draws its particles from the prior; expected none")
        return super()._start(sde, t_start, shape, x_T, generator, device, dtype)

    def _sample(self, run: Run, x: Tensor, times: Tensor) -> SampleResult:
        self.measurement.check(x)
        B, K, event = len(x), self.particles, x.shape[1:]
        t, steps = numbers(times), len(times) - 1
        a, std = run.sde.alpha(times[:-1]) / run.sde.alpha(times[1:]), run.sde.transition_std(times[1:], times[:-1])
        of_x, of_score = numbers(1 / a), numbers(std.square() / a)
        sigma, kappa2 = run.sde.sigma(times), (-run.sde.log_snr(times[:-1])).exp()
        fixed = (std * sigma[1:] / sigma[:-1]).square()
        of_D = run.sde.alpha(times[1:]) * (std / sigma[:-1]).square()
        noise = numbers((fixed + of_D.square() * width(kappa2, self.data_std)).sqrt())
        owner = torch.arange(B, device=x.device).repeat_interleave(K)
        target = _Target(run, self.measurement, owner, self.data_std)
        more = run.sde.prior_std * _drawn(run, (B, K - 1, *event), x)
        x = torch.cat([x.unsqueeze(1), more], dim=1).flatten(0, 1)
        now = target(x, t[0])
        log_w = now.log_psi
        watch = StepWatch(t, x.device)
        for i in range(steps):
            z, push = _drawn(run, (B, K, *event), x).flatten(0, 1), of_score[i] * now.slope
            x = (now.x * of_x[i]).add_(now.score, alpha=of_score[i]).add_(push).add_(z, alpha=noise[i])
            new = target(x, t[i + 1])
            back = (z * push / noise[i] + push.square() / (2 * noise[i] ** 2)).flatten(1).sum(dim=1)
            log_w = log_w + new.log_psi - now.log_psi - back.to(log_w.dtype)
            now, log_w = self._resampled(run, new, log_w, B)
            watch.see(i, now.x)
            if run.callback is not None:
                one = _Particles(*(part[::K] for part in now))  # the first particle of each sample
                estimate = partial(tweedie, run.sde, one.score, one.x, run.times(t[i + 1]))
                run.callback(StepInfo(step=i + 1, steps=steps, t=t[i + 1], x=one.x, nfe=run.nfe, estimate=estimate))
        watch.check(now.x)
        share = log_w.reshape(B, K).softmax(dim=1)
        place = _places(share, uniform((B, 1), run.generator, device=x.device, dtype=share.dtype)).squeeze(1)
        chosen = place + K * torch.arange(B, device=x.device)
        x = now.x[chosen]
        if self.denoise:
            # of the posterior: the measurement's part of the score belongs to it
            x = tweedie(run.sde, now.score[chosen] + now.slope[chosen], x, run.times(t[-1]))
        return SampleResult(x=x, nfe=run.nfe, times=times)

    def _resampled(self, run: Run, now: _Particles, log_w: Tensor, B: int) -> tuple[_Particles, Tensor]:
        """The particles, drawn anew in those samples where the weights are uneven, and their weights."""
        K = self.particles
        share = log_w.reshape(B, K).softmax(dim=1)
        uneven = 1 / share.square().sum(dim=1, keepdim=True) < self.resample_below * K
        own = torch.arange(K, device=share.device).expand(B, K)
        u = (uniform((B, 1), run.generator, device=share.device, dtype=share.dtype) + own) / K
        kept = torch.where(uneven, _places(share, u), own)
        index = (kept + K * torch.arange(B, device=share.device).unsqueeze(1)).flatten()
        log_w = torch.where(uneven, 0.0, log_w.reshape(B, K)).flatten()
        return _Particles(*(part[index] for part in now)), log_w


class _Particles(NamedTuple):
    """States `(B K, *)` at one time, and what is known of them: the score, log psi `(B K,)` and its gradient."""

    x: Tensor
    score: Tensor
    log_psi: Tensor
    slope: Tensor


class _Target:
    """(2) and its gradient, at one evaluation and one vector-Jacobian product."""

    def __init__(self, run: Run, measurement: Measurement, owner: Tensor, data_std: float) -> None:
        self.sde, self.data_std = run.sde, data_std
        self.score = take(run.batched, owner)
        _ = measurement.svd  # found once, and taken along where the operator is one for all
        self.measurement = measurement.take(owner)
        self.svd = self.measurement.svd
        self.known = None if self.svd is None else self.svd.left(self.measurement.y)
        self.of_rows = torch.zeros((), device=owner.device)
        if self.svd is None and measurement.linear:
            sizes = measurement.row_size.square()
            self.of_rows = sizes[owner] if hasattr(measurement.operator, "take") else sizes
        self._time = run.times(0.0)[:1]

    def __call__(self, x: Tensor, t: float) -> _Particles:
        batch_t = torch.full_like(self._time, t).expand(len(x))
        r2 = float(width((-self.sde.log_snr(t)).exp(), self.data_std))
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = check_score(self.score(x, batch_t), x)
            at = tweedie(self.sde, value.detach(), x.detach(), batch_t).requires_grad_()
            if self.svd is None:
                self.measurement.require_derivative(at.detach())
            log_psi = self._log_psi(at, r2)
            (of_D,) = torch.autograd.grad(log_psi.sum(), at)
            of_D = of_D.to(value.dtype)
            # D = (x + sigma^2 score) / alpha; parameters of the score are enough for it to be followed, so that x is asked for
            alpha, variance = float(self.sde.alpha(t)), float(self.sde.sigma(t)) ** 2
            pulled = None
            if value.requires_grad:
                (pulled,) = torch.autograd.grad(value, x, of_D, allow_unused=True)
            if pulled is None:
                raise UserError(
                    "got a score that autograd cannot follow to x; expected one made of operations of torch, without detach(): "
                    "otherwise use Replacement, RePaint or DDNM"
                )
            slope = (of_D + variance * pulled) / alpha
        return _Particles(x.detach(), value.detach(), log_psi.detach(), slope)

    def _log_psi(self, D: Tensor, r2: float) -> Tensor:
        if self.svd is not None and self.known is not None:
            s, n = self.svd.values, self.svd.noise
            off = (self.known - s * self.svd.right(D)).abs()
            terms = off.square() / (n.square() + r2 * s.square())
        else:
            off = self.measurement.residual(D)
            terms = off.square() / (self.measurement.variance(off) + r2 * self.of_rows.to(off))
        return -0.5 * terms.flatten(1).to(real_dtype(D.device)).sum(dim=1)


def width(kappa2: Tensor, data_std: float) -> Tensor:
    """r^2 of (2), the variance of p(x_0 | x_t) for N(0, d^2 I) data, at kappa^2 = sigma^2 / alpha^2; of its shape."""
    return data_std**2 * kappa2 / (data_std**2 + kappa2)


def _drawn(run: Run, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normals `(B, K, *)`, of each sample's own stream."""
    return normal(shape, run.generator, device=like.device, dtype=like.dtype)


def _places(share: Tensor, u: Tensor) -> Tensor:
    """In each row, the particles at the quantiles `u` `(B, k)` of the weights `share` `(B, K)`."""
    return torch.searchsorted(share.cumsum(dim=1), u, right=True).clamp(max=share.shape[1] - 1)
