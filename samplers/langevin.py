"""The Langevin corrector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from numerics import UserError, expand_as, require_choice, require_count, require_range
from samplers.correctors import Corrector
from samplers.run import Run, numbers
from samplers.step import Step
from sde_lib import SDE


@dataclass(frozen=True, kw_only=True)
class Langevin(Corrector):
    r"""Langevin steps at one time.

        x <- x + e score(x, t) + sqrt(2 e) z,        e = 2 (alpha_t / alpha_s)^2 (snr r)^2

    r is sigma_t by default, and s is the grid's next time (the factor is 1 at the last). Song et al. 2021
    (arXiv:2011.13456, algorithms 4 and 5) take for r the ratio of norms |z| / |score|, each averaged over the batch:
    `norm="batch"`. In high dimension that ratio is about sigma_t (|z| is sqrt(D) and |score| sqrt(D) / sigma_t), so the
    default is its limit, in which a sample depends on nothing but its own noise; their published code has it as "ald".
    `norm="sample"` takes each sample's own norms. Both norms change the stationary law: per-sample norms multiplied the
    variance of N(0, I) by 27,000 in one dimension, 16 in two, 1.09 in 64.

    A chain of fixed snr has its own stationary law: on N(0, v) the variance is v / (1 - e / (2 v)). With the default
    snr = 0.16 it is up to 2.6 % too large where noise dominates (e / (2 v) = snr^2 for v = sigma_t^2) and right where the
    data do, at the end of a run: there 1,000 steps with the default predictor have the variance of data right to 0.7 % (VP,
    sub-VP) and 0.3 % (VE).

    Args:
        snr: the signal-to-noise ratio of a step, > 0; without a norm below 1, from where on the chain diverges.
        steps: number of Langevin steps each time, of one evaluation each.
        norm: None, "batch" (a sample then depends on its batch mates) or "sample".

    Raises:
        UserError: for an snr out of range, a number of steps that is not above 0, or another norm.
    """

    snr: float = 0.16
    steps: int = 1
    norm: Literal["batch", "sample"] | None = None

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")
        require_choice(self.norm, "norm", (None, "batch", "sample"))
        require_range(self.snr, "snr", 1e-12)
        if self.norm is None:
            require_contracting(self.snr)

    @property
    def evaluations(self) -> int:
        """Calls of the score each time it is applied."""
        return self.steps

    def prepare(self, sde: SDE, times: Tensor) -> Step:
        """The chain on the grid `times` `(N+1,)`."""
        factor = 2 * self.snr**2 * signal_ratio(sde, times).square()
        if self.norm is None:
            return langevin_steps(times, factor * sde.sigma(times).square(), self.steps)
        now, of_norms = numbers(times), numbers(factor)

        def correct(i: int, x: Tensor, run: Run) -> Tensor:
            for _ in range(self.steps):
                score, z = run.score(x, now[i]), run.noise(x)
                of_score, of_noise = (v.flatten(1).norm(dim=1) for v in (score, z))
                if self.norm == "batch":
                    of_score, of_noise = of_score.mean(), of_noise.mean()
                # a score that is exactly 0 would make the step infinite
                e = of_norms[i] * (of_noise / of_score.clamp(min=torch.finfo(score.dtype).tiny ** 0.5)).square()
                x = x + expand_as(e, x) * score + expand_as((2 * e).sqrt(), x) * z
            return x

        return correct


def require_contracting(snr: float) -> None:
    """Refuses a ratio at which a chain without norms diverges: on N(0, sigma_t^2 I) a step multiplies x by 1 - 2 snr^2.

    Raises:
        UserError: unless snr < 1.
    """
    if snr >= 1:
        raise UserError(
            f"got snr={snr:g}; expected less than 1, from where on the chain diverges (a step multiplies x by 1 - 2 snr^2): "
            "published values are 0.01 to 0.2"
        )


def signal_ratio(sde: SDE, times: Tensor) -> Tensor:
    """alpha_t / alpha_s along a grid `(N+1,)`, s being the next time, and 1 at the last."""
    alpha = sde.alpha(times)
    return torch.cat([alpha[:-1] / alpha[1:], torch.ones_like(alpha[:1])])


def langevin_steps(times: Tensor, e: Tensor, steps: int) -> Step:
    """`steps` times  x <- x + e_i score(x, t_i) + sqrt(2 e_i) z  at the i-th of `times`, e being `(N+1,)` too."""
    now, size = numbers(times), numbers(e)

    def correct(i: int, x: Tensor, run: Run) -> Tensor:
        for _ in range(steps):
            x = torch.add(x, run.score(x, now[i]), alpha=size[i]).add_(run.noise(x), alpha=(2 * size[i]) ** 0.5)
        return x

    return correct
