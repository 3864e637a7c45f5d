"""Predictors: one step of a reverse process, from t to s < t. One file each: `euler_maruyama`, `reverse_diffusion`,
`ancestral`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from samplers.step import Step
from sde_lib import SDE, Score


class Predictor(ABC):
    """A way of going from t_i to t_{i+1}: `prepare(sde, times) -> step`, and then `x = step(i, x, run)`.

    Attributes:
        evaluations: calls of the score a step; 1 unless a subclass says otherwise.
    """

    evaluations: ClassVar[int] = 1

    @abstractmethod
    def prepare(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`, float64, called with i = 0 ... N-1."""

    def check(self, score: Score) -> None:  # noqa: B027  (most need nothing)
        """Refuses a score that lacks what the predictor needs."""
