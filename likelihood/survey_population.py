"""What a survey asks of a set of images, and a set of which everything is known."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.refinement import Refinement


@dataclass(frozen=True, kw_only=True)
class Values:
    """Exact values.

    Attributes:
        bits: `(k,)` bits/dim; NaN where the image failed.
        solver_error: `(k,)` bits/dim, as stated; NaN where there is none.
        passes: network passes: forward 1, vector-Jacobian product 2.
        noise: bits/dim, the standard deviation of a value by its own noise, from the spread of an image's draws; 0 where it has
            none, NaN of one draw.
        degrees: of freedom of that, the draws beyond each image's first.
        refined: `(k,)`, how often an image's steps were doubled; None where they never are.
    """

    bits: Tensor
    solver_error: Tensor
    passes: int
    noise: float = math.nan
    degrees: int = 0
    refined: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What more steps change.

    Attributes:
        half: `(k,)` bits/dim, of twice the method's steps less those of half of them; NaN where one failed.
        whole: `(k,)`, less those of the method itself.
        passes: network passes.
        state_error: `(k,)`, the estimate of their state's error by half the steps, or by all of a method that has no half; None
            where there is none.
    """

    half: Tensor
    whole: Tensor
    passes: int
    state_error: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Halving:
    """What half the steps lose.

    Attributes:
        lost: `(k,)` bits/dim, of the method's steps less those of half of them; NaN where one failed.
        passes: network passes.
        state_error: `(k,)`, half the steps' own estimate of their state's error (`Refinement`); None where there is none.
    """

    lost: Tensor
    passes: int
    state_error: Tensor | None = None


class Population(ABC):
    """What can be asked of a set of images. Images are numbered 0 ... size - 1; an index is `(k,)`, rising."""

    @property
    @abstractmethod
    def size(self) -> int:
        """N."""

    @property
    @abstractmethod
    def candidates(self) -> int:
        """How many predictors there are that take a network pass an image."""

    @property
    def dearer(self) -> float:
        """How many times the passes of a value with half the steps one with all of them takes."""
        return 2.0

    @abstractmethod
    def free(self, index: Tensor) -> Tensor:
        """`(k, F)`: the predictors that take none."""

    @abstractmethod
    def paid(self, index: Tensor, which: Sequence[int]) -> Tensor:
        """`(k, len(which))`: those of these numbers."""

    @abstractmethod
    def values(self, index: Tensor, repeat: int, half: bool) -> Values:
        """Exact values; another `repeat` has new noise and new probes, and `half` is with half the method's steps."""

    def refining(self, refinement: Refinement | None) -> Population:
        """The same set, of which values are made again with twice the steps where the refinement says so; this very object
        where none ever is."""
        return self

    def halving(self, index: Tensor) -> Halving | None:
        """What half the steps lose; None of a method of which no half is taken."""
        return None

    def differences(self, index: Tensor) -> Differences | None:
        """What more steps change; None of a method whose steps are its own affair."""
        return None


class Table(Population):
    """A set whose values and predictors are known: for seeing how often a survey's stated errors hold.

    Args:
        free, paid: predictors `(N, F)` and `(N, C)`.
        bits: values `(R, N)`, of which repeat r gives row r (and of more repeats than rows the last).
        passes: of a value.
        differences: `(N,)`, what twice the steps change where values have half of them, which `bits` then are; all the steps
            take twice the passes. None unless given.
        finer: `(N,)`, what twice the steps change where values have all of them; nothing unless given.
        state_errors: `(N,)`, half the steps' own estimate of their state's error. None unless given.
    """

    def __init__(
        self,
        free: Tensor,
        paid: Tensor,
        bits: Tensor,
        *,
        passes: int = 100,
        differences: Tensor | None = None,
        finer: Tensor | None = None,
        state_errors: Tensor | None = None,
    ) -> None:
        self._free, self._paid, self._bits, self._passes, self._differences = free, paid, bits, passes, differences
        self._finer = torch.zeros_like(bits[0]) if finer is None else finer
        self._state_errors = state_errors
        self._refined = torch.zeros(bits.shape[1], dtype=torch.bool)

    @property
    def size(self) -> int:
        return self._bits.shape[1]

    @property
    def candidates(self) -> int:
        return self._paid.shape[1]

    def free(self, index: Tensor) -> Tensor:
        return self._free[index]

    def paid(self, index: Tensor, which: Sequence[int]) -> Tensor:
        return self._paid[index][:, list(which)]

    def refining(self, refinement: Refinement | None) -> Population:
        if refinement is None or self._state_errors is None or self._differences is None:
            return self
        made = copy.copy(self)
        made._refined = refinement.too_large(self._state_errors)
        return made

    def values(self, index: Tensor, repeat: int, half: bool) -> Values:
        bits, again = self._bits[min(repeat, len(self._bits) - 1)][index], self._refined[index]
        passes = self._passes * len(index)
        if self._differences is not None:
            more = self._differences[index]
            bits = torch.where(again, bits + more, bits) if half else bits + more - self._finer[index]
            passes = passes + 2 * self._passes * int(again.sum()) if half else 2 * passes
        return Values(
            bits=bits,
            solver_error=torch.full_like(bits, math.nan),
            passes=passes,
            refined=again.long() if half else None,
        )

    def halving(self, index: Tensor) -> Halving | None:
        if self._differences is None:
            return None
        error = None if self._state_errors is None else self._state_errors[index]
        lost = torch.where(self._refined, 0.0, self._differences - self._finer)[index]
        return Halving(lost=lost, passes=3 * self._passes * len(index), state_error=error)

    def differences(self, index: Tensor) -> Differences | None:
        if self._differences is None:
            return None
        # an image that is solved again has twice the steps at once
        half, finer = (torch.where(self._refined, 0.0, each)[index] for each in (self._differences, self._finer))
        return Differences(half=half, whole=finer, passes=7 * self._passes * len(index))
