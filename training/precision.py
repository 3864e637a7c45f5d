"""In which numbers the network runs, and how its gradients become a step.

    fp32   Full       everything in float32
    bf16   Autocast   the network's products in bfloat16, whose exponents are float32's: gradients need no care
    fp16   Scaled     the network's products in float16, whose smallest numbers swallow gradients: the loss is multiplied by a
                      scale before the backward pass and the gradients are divided by it after; a gradient that is not
                      finite means that the scale is too large, so it is halved and the step left out (Micikevicius et al.
                      2018, arXiv:1710.03740, section 3.2)

Weights, losses, gradients and averages are float32 with all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from training.update import FiniteGuard, apply_update, gradient_norm


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchLoss:
    """What came of a batch, on the device.

    Attributes:
        number: of the update, from 1.
        mean: of the weighted losses of the whole batch, `()`.
        t: times of this process's samples, `(B,)`.
        losses: of these samples, without importance weights, `(B,)`.
    """

    number: int
    mean: Tensor
    t: Tensor
    losses: Tensor

    def refused(self, guard: FiniteGuard, norm: Tensor) -> Tensor:
        """What `guard` says of an update with gradients of that `norm`, `()`: 1.0 for one that must not be applied."""
        return guard.check(self.number, self.mean, norm, self.t, self.losses)


class Precision(ABC):
    """The numbers of a run: a context for forwards, a backward pass, and the step that follows.

    Args:
        device: of the model.
    """

    dtype: ClassVar[torch.dtype | None]
    """Of the network's products; None for that of the weights."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def forward(self) -> torch.autocast:
        """The context in which the loss is computed."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    @abstractmethod
    def backward(self, loss: Tensor, guard: FiniteGuard) -> None:
        """Adds the gradients of `loss` `()` to those of the weights."""

    @abstractmethod
    def step(
        self, optimizer: torch.optim.Optimizer, guard: FiniteGuard, loss: BatchLoss, *, clip: float | None
    ) -> tuple[Tensor, Tensor]:
        """Clips the gradients to the norm `clip` and steps, unless `guard` refuses; returns the norm before clipping and
        1.0 or 0.0 for refused or not, both `()`."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, in plain types."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave; that of another precision is left alone."""


class _Unscaled(Precision):
    """Plain gradients: the guard's decision is handed to the optimiser, on the device."""

    def backward(self, loss: Tensor, guard: FiniteGuard) -> None:
        loss.backward()

    def step(
        self, optimizer: torch.optim.Optimizer, guard: FiniteGuard, loss: BatchLoss, *, clip: float | None
    ) -> tuple[Tensor, Tensor]:
        norm = gradient_norm(optimizer)
        refused = loss.refused(guard, norm)
        apply_update(optimizer, norm, refused, clip=clip)
        return norm, refused

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@final
class Full(_Unscaled):
    """Everything in float32.

    Args:
        device: of the model.
    """

    dtype = None


@final
class Autocast(_Unscaled):
    """The network's products in bfloat16.

    Args:
        device: of the model.
    """

    dtype = torch.bfloat16


@final
class Scaled(Precision):
    """The network's products in float16, the loss scaled.

    The scaler alone decides whether to step; gradients that overflow are its business and are no error, so the guard is
    shown the loss only.

    Args:
        device: of the model.
    """

    dtype = torch.float16

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.scaler = torch.amp.GradScaler(device.type)

    def backward(self, loss: Tensor, guard: FiniteGuard) -> None:
        if guard.sticky:  # after a refused update the scaler is given gradients that make it leave out all others
            loss = loss * torch.where(guard.refused > 0, torch.nan, 1.0)
        self.scaler.scale(loss).backward()

    def step(
        self, optimizer: torch.optim.Optimizer, guard: FiniteGuard, loss: BatchLoss, *, clip: float | None
    ) -> tuple[Tensor, Tensor]:
        self.scaler.unscale_(optimizer)
        norm = gradient_norm(optimizer)
        refused = loss.refused(guard, torch.ones_like(norm))
        if clip is not None:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        return norm, refused

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(dict(state))


PRECISIONS: dict[str, type[Precision]] = {"fp32": Full, "bf16": Autocast, "fp16": Scaled}
"""What `TrainingOptions.precision` may be."""
