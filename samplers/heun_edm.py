"""Heun's method in kappa with churn: the samplers of EDM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from numerics import require_range
from samplers.base import GridSampler
from samplers.run import Run, numbers
from samplers.step import Step
from sde_lib import SDE
from sde_lib.time_grids import Karras, TimeGrid


@dataclass(frozen=True, kw_only=True, repr=False)
class HeunEDM(GridSampler):
    r"""Heun's method in kappa with churn, of second order: the samplers of EDM.

    In y = x / alpha and kappa = sigma / alpha the probability flow is dy/dkappa = eps. A step first adds noise, up to
    kappa^ = (1 + gamma) kappa, then takes a step of Heun's method from there to the next kappa:

        gamma = min(churn / N, sqrt(2) - 1) where churn_min <= kappa <= churn_max, else 0
        y^ = y + sqrt(kappa^^2 - kappa^2) noise_scale z
        y~ = y^ + (kappa_s - kappa^) eps(y^, kappa^)
        y_s = y^ + (kappa_s - kappa^) (eps(y^, kappa^) + eps(y~, kappa_s)) / 2

    (Karras et al. 2022, arXiv:2206.00364, algorithm 2, for any linear SDE.) Order 2 without churn; two evaluations a step.
    The paper's last, first-order step to kappa = 0 is the final denoising here. kappa^ never exceeds its value at T.

    Args:
        churn: S_churn >= 0, the noise added over the whole run; 0 is deterministic. In N steps, values above 0.41 N act as
            0.41 N.
        churn_min, churn_max: ends of the range of kappa with churn; None for no bound.
        noise_scale: S_noise; slightly above 1 offsets a network that removes too much noise (the paper's ImageNet: 1.003).
        grid: the times; `Karras()`, the paper's, unless given.
        steps, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for an option below 0.
    """

    steps: int = 18
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None
    noise_scale: float = 1.0

    default_grid: ClassVar[TimeGrid] = Karras()
    evaluations_per_step: ClassVar[int] = 2
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("churn", "churn_min", "noise_scale"):
            require_range(getattr(self, name), name, 0)
        if self.churn_max is not None:
            require_range(self.churn_max, "churn_max", 0)

    def method(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`."""
        kappa = torch.exp(-sde.log_snr(times) / 2)
        top = math.inf if self.churn_max is None else self.churn_max
        gamma = min(self.churn / (len(times) - 1), math.sqrt(2) - 1)
        churned = (kappa[:-1] >= self.churn_min) & (kappa[:-1] <= top)
        hat = torch.where(churned, kappa[:-1] * (1 + gamma), kappa[:-1]).clamp(max=float(kappa[0]))
        t_hat = torch.where(hat > kappa[:-1], sde.time_of_log_snr(-2 * hat.log()), times[:-1])
        alpha, alpha_hat = sde.alpha(times), sde.alpha(t_hat)
        added = (hat.square() - kappa[:-1].square()).clamp(min=0).sqrt()
        lifted: list[bool] = (hat > kappa[:-1]).tolist()
        lift, of_noise = numbers(alpha_hat / alpha[:-1]), numbers(alpha_hat * added * self.noise_scale)
        of_x, at, then = numbers(alpha[1:] / alpha_hat), numbers(t_hat), numbers(times[1:])
        # alpha_s (kappa_s - kappa^) eps, eps = -sigma score, at both ends
        span = alpha[1:] * (kappa[1:] - hat)
        first, second = numbers(-span * sde.sigma(t_hat)), numbers(-span * sde.sigma(times[1:]))

        def step(i: int, x: Tensor, run: Run) -> Tensor:
            if lifted[i]:
                x = x * lift[i]
            if of_noise[i] > 0:
                x = torch.add(x, run.noise(x), alpha=of_noise[i])
            slope = run.score(x, at[i]) * first[i]
            x = x * of_x[i]
            guess = x + slope
            slope.add_(run.score(guess, then[i]), alpha=second[i])
            return x.add_(slope, alpha=0.5)

        return step
