"""SEEDS: exponential solvers of the reverse SDE, with several stages a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from numerics import require_choice
from samplers.base import GridSampler
from samplers.exponential import exponential_weights
from samplers.run import Nodes, Run
from samplers.step import Step
from sde_lib import SDE
from sde_lib.time_grids import LogSNR, TimeGrid


@dataclass(frozen=True, kw_only=True, repr=False)
class SEEDS(GridSampler):
    r"""SEEDS: exponential solvers of the reverse SDE, with several stages a step.

    In y = x / alpha and lambda = log(alpha / sigma), with kappa = exp(-lambda), the reverse SDE is, in two ways,

        noise    dy = 2 eps dkappa + dM                  M of independent increments, variance kappa_t^2 - kappa_s^2
        data     dy = -2 (y - D) dlambda + dN            the same process, D in place of eps

    Either is solved exactly but for eps or D, which is replaced, between t and s, by its values at up to three stages that
    lie on the same Brownian path. With c = -1 (and no factor before y) or c = 2 in (1) of `samplers.exponential`:

        order 1   from the value at t
        order 2   a first stage at lambda_t + h/2, then from its value alone (the exponential midpoint rule)
        order 3   stages at lambda_t + h/3 and + 2h/3, each from the line in lambda through the values at t and at the stage
                  before (DPM-Solver-3 with r_1 = 1/3 and r_2 = 2/3, Lu et al. 2022, arXiv:2206.00927)

    The noise between stages has its exact covariance, after Gonzalez et al. 2023 (arXiv:2305.14267, SEEDS-1, -2, -3).
    `order` is the order without noise; a step costs as many evaluations. Assumes that eps, or D, varies smoothly in lambda;
    any linear SDE. At few steps "noise" extrapolates eps by exp(h) and the variance explodes (on Gaussian data under VP, an
    error of 1e5 with 5 steps of order 3, against 2e-2), so "data" is the default; with many steps of order 1 and 2 "noise" is
    the more accurate.

    Args:
        order: 1, 2 or 3; a step takes as many evaluations.
        prediction: what is expanded, "data" or "noise".
        grid: the times; `LogSNR()` unless given.
        steps, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for another value of an option.
    """

    steps: int = 30
    order: int = 3
    prediction: Literal["data", "noise"] = "data"

    default_grid: ClassVar[TimeGrid] = LogSNR()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.order, "order", (1, 2, 3))
        require_choice(self.prediction, "prediction", ("data", "noise"))

    @property
    def evaluations_per_step(self) -> int:  # type: ignore[override]
        """Calls of the score a step."""
        return self.order

    def method(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`."""
        p = self.order
        l = sde.log_snr(times) / 2
        # the times of all stages, (N, p), and of the ends: (N, p + 1)
        parts = torch.arange(p, dtype=torch.float64) / p
        t = sde.time_of_log_snr(2 * (l[:-1, None] + parts * l.diff()[:, None]))
        t[:, 0] = times[:-1]
        t = torch.cat([t, times[1:, None]], dim=1)
        l = sde.log_snr(t) / 2
        h = l.diff(dim=1)
        kappa = (-l).exp()
        if self.prediction == "data":
            c, of_y, keep, scale = 2.0, (-2 * (l - l[:, :1])).exp(), (-2 * h).exp(), torch.ones_like(l)
            fresh = kappa[:, 1:] * (-torch.expm1(-2 * h)).sqrt()
        else:
            # dkappa is kappa_s times the kernel of rate -1
            c, of_y, keep, scale = -1.0, torch.ones_like(l), torch.ones_like(h), 2 * kappa
            fresh = kappa[:, :-1] * (-torch.expm1(-2 * h)).sqrt()
        weights = [
            [[s * w for w in self._weights(row, k, c)] for k, s in enumerate(scales[1:], start=1)]
            for row, scales in zip(l.tolist(), scale.tolist(), strict=True)
        ]
        of_start, kept, added = of_y.tolist(), keep.tolist(), fresh.tolist()
        flat = t.flatten()
        stages = Nodes(flat, sde.alpha(flat), sde.sigma(flat))  # the k-th of step i is the number i (p + 1) + k
        value = stages.denoised if self.prediction == "data" else stages.noise

        def step(i: int, x: Tensor, run: Run) -> Tensor:
            first = i * (p + 1)
            y, noise = x / stages.alpha[first], torch.zeros_like(x)
            known = [value(first, x, run)]
            for k in range(1, p + 1):
                noise = (noise * kept[i][k - 1]).add_(run.noise(x), alpha=added[i][k - 1])
                stage = torch.add(noise, y, alpha=of_start[i][k])
                for w, F in zip(weights[i][k - 1], known, strict=True):
                    if w != 0:
                        stage.add_(F, alpha=w)
                x = stage.mul_(stages.alpha[first + k])
                if k < p:
                    known.append(value(first + k, x, run))
            return x

        return step

    def _weights(self, l: list[float], k: int, c: float) -> list[float]:
        """The weights of the values at the stages before the `k`-th, for that stage."""
        (whole,) = exponential_weights([0.0], l[0], l[k], c)
        if k == 1:
            return [whole]
        if self.order == 2:
            return [0.0, whole]
        first, last = exponential_weights([l[0], l[k - 1]], l[0], l[k], c)
        return [first, last] if k == 2 else [first, 0.0, last]
