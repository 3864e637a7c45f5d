"""Correctors: steps of a Markov chain whose stationary law is (nearly) the marginal at one time. One file each:
`langevin`, `annealed_langevin`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from samplers.step import Step
from sde_lib import SDE


class Corrector(ABC):
    """A way of staying at t_i and coming nearer to its law: `prepare(sde, times) -> step`, and then `x = step(i, x, run)`.

    These two members are all that is asked of a corrector.
    """

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Calls of the score each time it is applied."""

    @abstractmethod
    def prepare(self, sde: SDE, times: Tensor) -> Step:
        """The chain on the grid `times` `(N+1,)`, float64, called with i = 0 ... N; it leaves x at t_i."""
