r"""Predictors: one step of a reverse process, t -> s < t, from one evaluation of the score.

A predictor is prepared once for a grid and then called as `predict(i, x, run)`, which takes x from t_i to t_{i+1}. The
methods are one file each: `euler_maruyama`, `reverse_diffusion`, `ancestral`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from samplers.base import Run
from sde_lib import SDE, Score


class Predictor(ABC):
    """A way of going from t_i to t_{i+1}."""

    evaluations: ClassVar[int] = 1

    @abstractmethod
    def prepare(self, sde: SDE, times: Tensor) -> Callable[[int, Tensor, Run], Tensor]:
        """The step on the grid `times` `(N+1,)`, float64, called as `predict(i, x, run)` with i = 0 ... N-1."""

    def check(self, score: Score) -> None:  # noqa: B027  (most need nothing)
        """Refuses a score that lacks what the predictor needs."""
