"""DDIM: the non-Markovian reverse step, from deterministic to ancestral."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from numerics import UserError, require_range
from samplers.base import GridSampler
from samplers.finite import StepWatch
from samplers.run import Run, numbers
from samplers.step import Step, affine
from sde_lib import SDE, Score, in_dtype
from sde_lib.flow_map import check_batch


@dataclass(frozen=True, kw_only=True, repr=False)
class DDIM(GridSampler):
    r"""The non-Markovian reverse step, from deterministic to ancestral.

    With D the denoised mean, eps the predicted noise and kappa = sigma / alpha,

        x_s = alpha_s D + sqrt(sigma_s^2 - w^2) eps + w z,     w = eta sigma_s sqrt(1 - kappa_s^2 / kappa_t^2)

    (Song, Meng, Ermon 2020, arXiv:2010.02502, equations (12) and (16), written for any linear SDE). eta = 1 is ancestral
    sampling with the posterior variance; eta = 0 is Euler's method on dx/alpha = eps dkappa, of order 1, and the same as
    DPM-Solver++ of order 1. Any sub-sequence of steps is a grid; the default grid and number of steps are those of
    `PredictorCorrector`, so the two can be compared directly, but 20 to 100 steps are usual here.

        DDIM(steps=50)(sde, score, (16, 3, 32, 32), generator=SampleStreams(0)).x

    Args:
        eta: in [0, 1]; 0 is deterministic, 1 ancestral.
        steps, grid, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for an eta outside [0, 1].
    """

    eta: float = 0.0

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.eta, "eta", 0, 1)

    @torch.no_grad()
    def encode(self, sde: SDE, score: Score, x: Tensor) -> Tensor:
        """The latent at T of data `x` `(B, *)`, taken as the state at t_end, by the loop walked backwards: `(B, *)`.

            x_t = (alpha_t / alpha_s) x_s + alpha_t (kappa_t - kappa_s) eps(x_s, s)

        (sections 4.3 and 5.4 there.) The noise of a step is asked for at s, where the step down asks for it at t; so this is
        Euler's method on the same flow, and the way down returns to `x` only up to an error of order 1 in the step.
        `ProbabilityFlow.encode` and `likelihood.encode` solve the flow instead.

        The state, and so the latent, is in float32 at least; the score is given x in its own dtype.

        Raises:
            UserError: for an eta above 0, which has no inverse, or an x that is not a floating batch.
            SamplingError: where values stop being finite, with the step and t.
        """
        if self.eta != 0:
            raise UserError(
                f"got eta={self.eta} to encode with; expected 0: steps with noise have no inverse, use DDIM(eta=0)"
            )
        check_batch(x)
        times = self._times(sde).flip(0)
        state = torch.promote_types(x.dtype, torch.float32)
        if state != x.dtype:
            score, x = in_dtype(score, x.dtype), x.to(state)
        run = Run(sde, score, self.corrections, None, x)
        alpha, kappa = sde.alpha(times), torch.exp(-sde.log_snr(times) / 2)
        of_x, of_score = numbers(alpha[1:] / alpha[:-1]), numbers(-alpha[1:] * kappa.diff() * sde.sigma(times[:-1]))
        x, watch = x.detach(), StepWatch(numbers(times), x.device)
        for i, now in enumerate(watch.times[:-1]):
            x = (x * of_x[i]).add_(run.score(x, now), alpha=of_score[i])
            watch.see(i, x)
        watch.check(x)
        return x

    def method(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`."""
        t, s = times[:-1], times[1:]
        h = (sde.log_snr(s) - sde.log_snr(t)) / 2  # the step in log(alpha / sigma)
        w = self.eta * (-torch.expm1(-2 * h)).sqrt()  # in units of sigma_s
        # x_s = a x_t + c score, a = alpha_s / alpha_t, c = alpha_s sigma_t (kappa_t - kappa_s sqrt(1 - w^2)),
        # and kappa_s = kappa_t exp(-h): the difference without cancellation at eta = 0
        q = (1 - w.square()).clamp(min=0).sqrt()
        loss = -torch.expm1(-h) + torch.exp(-h) * (1 - q)
        a = sde.alpha(s) / sde.alpha(t)
        return affine(t, x=a, score=a * sde.sigma(t).square() * loss, noise=sde.sigma(s) * w)
