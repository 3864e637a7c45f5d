r"""The diffusion losses of variational diffusion models, and how they teach a noise schedule.

    (1)  discrete     T/2 expm1(gamma(t) - gamma(s)) |eps - eps_hat(x_t, gamma(t))|^2,    t = i/T,  s = (i-1)/T,  i uniform
    (2)  continuous   1/2 gamma'(t) |eps - eps_hat(x_t, gamma(t))|^2,                     t uniform

(Kingma et al. 2021, arXiv:2107.00630, sections 4 and 5), in nats per dimension. As gamma' dt = dgamma, the
expectation of (2) depends on the schedule by its end points alone, for a network that is told gamma. What it changes between
them is the variance of the estimate, and so it is taught to lower E loss^2 while the network is taught to lower E loss (there,
section 5.3), both from one backward pass: the gradient of sample i's loss l_i reaches the schedule multiplied by
2 l_i, since d l^2 = 2 l dl.

The noise of the data at t = 0, the prior and the decoder have no part in either: with end points that stay they are constants,
but for the network, which they do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from numerics import require_choice, require_count
from training.objectives import TimedObjective
from training.trainable import NoisePredictor


@dataclass(frozen=True, kw_only=True)
class VDMLoss(TimedObjective):
    """(1) or (2), `(B,)`, for a model with `.schedule`, `.at(t, through)` and `.noise_under(sde, x, t)`: `models.VDM`.

    Args:
        times: uniform ones, unless given.
        t_min: as in `TimedObjective`; 0 here, where the schedule has an end point.
        steps: T of (1); 0 for (2).
        schedule: what the schedule is taught: a small "variance", or the "bound", which (2) does not depend on.

    Raises:
        UserError: an option out of range.
    """

    needs: ClassVar[tuple[str, ...]] = ("noise_under", "schedule")
    t_min: float | None = 0.0
    steps: int = 0
    schedule: Literal["variance", "bound"] = "variance"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.schedule, "schedule", ("variance", "bound"))
        if self.steps != 0:
            require_count(self.steps, "steps", 2)

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        vdm: Any = model
        factor = torch.ones((), dtype=torch.float64, device=x_0.device)

        def through(value: Tensor) -> Tensor:
            if self.schedule == "variance" and value.requires_grad:
                value.register_hook(lambda gradient: gradient * factor)
            return value

        t = draws["t"]
        if self.steps:
            t = ((t * self.steps).floor() + 1).clamp(max=self.steps) / self.steps
        sde = vdm.at(t, through)
        x_t = sde.perturb(x_0, t, draws["eps"])
        error = (draws["eps"] - vdm.noise_under(sde, x_t, t, labels)).flatten(1).square().mean(dim=1)
        loss = self._weight(vdm, sde, t, through).to(error.dtype) * error
        factor = 2 * loss.detach().double()
        return loss

    def _weight(self, vdm: Any, sde: Any, t: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.steps:
            slope: Tensor = sde.schedule.slope(t)
            return slope / 2
        before = through(vdm.schedule(t - 1 / self.steps))
        return torch.expm1(sde.schedule(t) - before) * (self.steps / 2)


@dataclass(frozen=True, kw_only=True)
class LearnedForwardLoss(TimedObjective):
    """The prior's and the diffusion's part of the bound of a learned forward process (`models.LearnedForward`), from one level
    gamma uniform between its ends, in nats per dimension, `(B,)`.

    Args:
        times, t_min: of the fraction of the way from gamma_min to gamma_max; uniform.
    """

    needs: ClassVar[tuple[str, ...]] = ("diffusion", "prior")
    t_min: float | None = 0.0

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        learned: Any = model
        span = learned.gamma_max - learned.gamma_min
        gamma = learned.gamma_min + span * draws["t"]
        nats = span * learned.diffusion(x_0, gamma, draws["eps"]) + learned.prior(x_0)
        loss: Tensor = nats / x_0[0].numel()
        return loss
