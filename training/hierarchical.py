r"""The negative ELBO of a chain with networks of its own (`models.ddgm`) as an objective, in nats per dimension.

`NegativeELBO` takes all T steps of a chain at once, which is what few steps allow; `OneStepELBO` one step at a time, for many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from numerics import normal, require_choice, require_count, require_range
from sde_lib import SDE
from training.objectives import Draws, Objective
from training.streams import StepStreams
from training.trainable import NoisePredictor

ESTIMATORS = ("sampled", "closed_form")


class ChainModel(Protocol):
    """What these objectives ask of a model; `models.DDGM` has it."""

    def terms(self, x: Tensor, eps: Tensor, *, estimator: str) -> Tensor: ...

    def one_step(self, x: Tensor, i: Tensor, eps: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class NegativeELBO(Objective):
    """-ELBO / D from one chain of `steps` draws a sample, `(B,)`: the sum of `terms(x, eps, estimator=...)`.

    Args:
        steps: T of the model, at least 2.
        estimator: "sampled", every term at the chain that was drawn, or "closed_form", with the forward posterior integrated
            out; both have the same expectation.

    Raises:
        UserError: an option out of range.
    """

    needs: ClassVar[tuple[str, ...]] = ("terms",)
    steps: int = 5
    estimator: str = "sampled"

    def __post_init__(self) -> None:
        require_count(self.steps, "steps", 2)
        require_choice(self.estimator, "estimator", ESTIMATORS)

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        generator, B = streams.generator("noise"), int(shape[0])
        eps = normal((B, self.steps, *shape[1:]), generator, device=streams.device, dtype=dtype)
        ones = torch.ones(B, dtype=torch.float64, device=streams.device)
        return {"t": sde.T * ones, "weight": ones, "eps": eps}

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        chain: ChainModel = model  # type: ignore[assignment]
        return chain.terms(x_0, draws["eps"], estimator=self.estimator).sum(dim=1) / x_0[0].numel()


@dataclass(frozen=True, kw_only=True)
class OneStepELBO(Objective):
    """-ELBO / D estimated from one step of the chain a sample, `(B,)`; a batch has its steps evenly spread.

    Args:
        steps: T of the model, at least 2.
        first: how often i = 1 is drawn, the decoder's step, if that is more often than one in T; the weights undo it.

    Raises:
        UserError: fewer steps, or a part that is none.
    """

    needs: ClassVar[tuple[str, ...]] = ("one_step",)
    steps: int = 1000
    first: float = 0.1

    def __post_init__(self) -> None:
        require_count(self.steps, "steps", 2)
        require_range(self.first, "first", 0, 0.9)

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        B, T = int(shape[0]), self.steps
        first = max(self.first, 1 / T)
        u = torch.rand(1, generator=streams.generator("time"), device=streams.device)
        u = (torch.arange(B, device=streams.device) + u) / B
        rest = ((u - first) / (1 - first) * (T - 1)).long().clamp(0, T - 2) + 2
        i = torch.where(u < first, torch.ones_like(rest), rest)
        weight = torch.where(i == 1, 1 / (T * first), (T - 1) / (T * (1 - first))).to(torch.float64)
        eps = normal(shape, streams.generator("noise"), device=streams.device, dtype=dtype)
        return {
            "t": i.to(torch.float64) * (sde.T / self.steps),
            "weight": weight,
            "eps": eps,
            "i": i,
        }

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        chain: ChainModel = model  # type: ignore[assignment]
        return chain.one_step(x_0, draws["i"], draws["eps"]) / x_0[0].numel()
