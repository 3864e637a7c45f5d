r"""Denoising score matching.

    (1)  loss = w(t) |eps - eps_hat(x_t, t)|^2 / D,      x_t = alpha(t) x_0 + sigma(t) eps

(Vincent 2011; Song et al. 2021, arXiv:2011.13456, equation (7), written for the predicted noise eps_hat = -sigma score.)
`training.weighting` gives w, `training.time_sampling` the times.

An *objective* says what is random in a loss and what the loss is, separately: `draw` makes the random numbers for a
whole batch at once, `loss` uses those of some of its samples. So the loop can divide a batch among processes or
accumulation steps without changing it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from numerics import expand_as, normal, require_range
from sde_lib import SDE
from training.errors import UsageError
from training.streams import StepStreams
from training.time_sampling import StratifiedTime, TimeSampler
from training.trainable import NoisePredictor
from training.weighting import Simple, Weighting, require_weighting

Draws = dict[str, Tensor]
"""Random numbers by name, each `(B, *)`; "t" `(B,)` and "weight" `(B,)` are always among them."""


def predicted_noise(model: NoisePredictor, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """eps_hat, `(B, *)`; models without classes are not asked about labels."""
    return model.noise(x, t) if labels is None else model.noise(x, t, labels)


def dsm_loss(
    model: NoisePredictor,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    *,
    weighting: Weighting,
    labels: Tensor | None = None,
) -> Tensor:
    """The loss (1) of each sample, `(B,)`.

    Args:
        model: has `.sde` and `.noise(x, t[, labels])`.
        x_0: clean data, `(B, *)`.
        t: times, `()` or `(B,)`.
        eps: standard normals, `(B, *)`.
        weighting: w.
        labels: classes `(B,)`, or None.
    """
    error = eps - predicted_noise(model, model.sde.perturb(x_0, t, eps), t, labels)
    loss = error.flatten(1).square().mean(dim=1)
    return loss * expand_as(weighting(model.sde, t), loss)


class Objective(ABC):
    """What is minimised: `draw` says what is random, `loss` what is computed from it.

    An objective of your own is a keyword-only dataclass with these two.

    Attributes:
        needs: what it asks of the model beside `.sde`, by name.
        of_flow: whether it trains the probability flow alone, so that the model is no score of noised data.
    """

    needs: ClassVar[tuple[str, ...]] = ("noise",)
    of_flow: ClassVar[bool] = False

    @abstractmethod
    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        """The random numbers for a batch of `shape` `(B, *)`."""

    @abstractmethod
    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        """The weighted loss of each sample, `(B,)`, *without* the importance weight `draws["weight"]`."""

    def observe(self, sde: SDE, t: Tensor, loss: Tensor) -> None:  # noqa: B027 (most objectives learn nothing)
        """Told the losses `(B,)` of a whole batch at `t` `(B,)`, for objectives that learn."""

    def state_dict(self) -> dict[str, Tensor]:
        """What an objective that learns has learned."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Takes back what `state_dict` gave."""

    def forget(self) -> None:  # noqa: B027
        """Drops what was learned: a training that begins anew takes nothing from an earlier one of the same object."""


@dataclass(frozen=True, kw_only=True)
class TimedObjective(Objective):
    """An objective with times from a `TimeSampler` and normal noise: it draws "t", "weight" `(B,)` and "eps" `(B, *)`.

    Args:
        times: the sampler.
        t_min: the smallest time; the SDE's unless given. A table's times are its own, so it does not go with `DiscreteTime`.

    Raises:
        UserError: times of another class, or a t_min that is negative or not used.
    """

    times: TimeSampler = StratifiedTime()
    t_min: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.times, TimeSampler):
            raise UsageError(
                f"got times={self.times!r}; expected an object such as StratifiedTime() or ImportanceTime()"
            )
        if self.t_min is not None:
            require_range(self.t_min, "t_min", 0)
            if self.times.discrete:
                raise UsageError(
                    f"got t_min={self.t_min} with {self.times}, whose times are fixed; expected no t_min: leave it out"
                )

    def _t_min(self, sde: SDE) -> float:
        return sde.t_min if self.t_min is None else self.t_min

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        t, weight = self.times(sde, int(shape[0]), streams.generator("time"), self._t_min(sde))
        eps = normal(shape, streams.generator("noise"), device=streams.device, dtype=dtype)
        return {"t": t, "weight": weight, "eps": eps}

    def observe(self, sde: SDE, t: Tensor, loss: Tensor) -> None:
        self.times.observe(sde, t, loss, self._t_min(sde))

    def state_dict(self) -> dict[str, Tensor]:
        return self.times.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.times.load_state_dict(state)

    def forget(self) -> None:
        self.times.forget()


@dataclass(frozen=True, kw_only=True)
class DSM(TimedObjective):
    """Denoising score matching: loss = w(t) |eps - eps_hat(x_t, t)|^2 / D, `(B,)`, x_t = alpha x_0 + sigma eps.

    Vincent 2011; Song et al. 2021 (arXiv:2011.13456), equation (7), written for the predicted noise eps_hat = -sigma score.

    Args:
        times: law of the times at which the loss is evaluated; uniform unless given.
        t_min: the smallest time; the SDE's unless given.
        weighting: the weighting w; 1 unless given.

    Raises:
        UserError: a weighting or times of another class, or a t_min that is negative or not used.
    """

    weighting: Weighting = Simple()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weighting(self.weighting)

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        return dsm_loss(model, x_0, draws["t"], draws["eps"], weighting=self.weighting, labels=labels)
