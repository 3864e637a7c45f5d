r"""The variational diffusion model: a score model that owns its noise schedule (Kingma et al. 2021, arXiv:2107.00630)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from models.conditioning import Conditioning
from models.parametrization import NOISE, Parametrization
from models.schedule import AsItIs, MonotoneSchedule
from models.score_model import ScoreModel
from numerics import batch_time
from sde_lib.scheduled import ScheduledVPSDE


class _Given:
    """A schedule that is known at the one batch of times that is asked for."""

    def __init__(self, gamma: Tensor, slope: Tensor) -> None:
        self.gamma, self.known = gamma, slope

    def __call__(self, t: Tensor) -> Tensor:
        return self.gamma

    def slope(self, t: Tensor) -> Tensor:
        return self.known


class VDM(ScoreModel):
    """A score model under `ScheduledVPSDE`, whose weights include the schedule's.

    Args:
        net, parametrization, conditioning, data_std, data_range: as in `ScoreModel`; a network that is told the log-SNR.
        schedule: gamma; a `MonotoneSchedule` is trained with the network.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: MonotoneSchedule,
        parametrization: Parametrization = NOISE,
        *,
        conditioning: Conditioning | None = None,
        data_std: float | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__(
            net,
            ScheduledVPSDE(schedule=AsItIs(schedule)),
            parametrization,
            conditioning=conditioning,
            data_std=data_std,
            data_range=data_range,
        )
        self.schedule = schedule

    def at(self, t: Tensor, through: Callable[[Tensor], Tensor] = lambda value: value) -> ScheduledVPSDE:
        """The SDE at the times `t` `(B,)` alone, gamma and its derivative having gone `through` a function."""
        return ScheduledVPSDE(schedule=_Given(through(self.schedule(t)), through(self.schedule.slope(t))))

    def noise_under(self, sde: ScheduledVPSDE, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """As `noise`, with the coefficients and the label from `sde`, such as `at` gives."""
        t = batch_time(t, x)
        one = self.evaluate_at(x, sde.alpha(t), sde.sigma(t), self.conditioning(sde, t), class_label)
        return self.parametrization.noise(one.output.to(one.x.dtype), *one[1:]).to(x.dtype)
