r"""Correctors: steps of a Markov chain whose stationary law is the marginal at one time.

A corrector is prepared once for a grid and then called as `correct(i, x, run)`, which leaves x at t_i. The methods are
one file each: `langevin`, `annealed_langevin`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from samplers.base import Run
from sde_lib import SDE


class Corrector(ABC):
    """A way of staying at t_i and coming nearer to its law."""

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Calls of the score each time it is applied."""

    @abstractmethod
    def prepare(self, sde: SDE, times: Tensor) -> Callable[[int, Tensor, Run], Tensor]:
        """The chain on the grid `times` `(N+1,)`, float64, called as `correct(i, x, run)` with i = 0 ... N."""
