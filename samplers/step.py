r"""Steps: what a method does between two times of a grid.

A method is prepared once for a grid: all its coefficients are computed in float64 and are plain numbers from then on, so
that a step is a few fused multiply-adds in the dtype of x and nothing waits for the device. What is prepared is

- a `Step`, a function of (i, x, run) that remembers nothing, or
- a `StatefulStep`, which is given what it remembers and returns it, as multistep methods do.

Either serves any number of runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from samplers.run import Run, numbers

Step = Callable[[int, Tensor, Run], Tensor]
"""`step(i, x, run)` takes x `(B, *)` from t_i to t_{i+1}; a corrector's leaves it at t_i."""

S = TypeVar("S")


class StatefulStep(ABC, Generic[S]):
    """A step that remembers something, `S`, from one step of a run to the next.

        state = step.init(x, run);    x, state = step(i, x, run, state)    for i = 0 ... N-1

    The object itself never changes.
    """

    @abstractmethod
    def init(self, x: Tensor, run: Run) -> S:
        """What is remembered at the beginning of `run`, at the state `x` `(B, *)`."""

    @abstractmethod
    def __call__(self, i: int, x: Tensor, run: Run, state: S) -> tuple[Tensor, S]:
        """The state at t_{i+1}, `(B, *)`, and what to remember then."""


def affine(t: Tensor, *, x: Tensor, score: Tensor, noise: Tensor) -> Step:
    r"""The step  x_s = a_i x + b_i score(x, t_i) + c_i z,  z ~ N(0, I), of one evaluation.

    Args:
        t: `(N,)`, the times t_i that steps go from.
        x: `(N,)`, the factors a_i of the state.
        score: `(N,)`, b_i.
        noise: `(N,)`, c_i. Where all are 0 no noise is drawn.
    """
    now, of_x, of_score, of_noise = (numbers(v) for v in (t, x, score, noise))
    noisy = any(c != 0 for c in of_noise)

    def step(i: int, x: Tensor, run: Run) -> Tensor:
        mean = (x * of_x[i]).add_(run.score(x, now[i]), alpha=of_score[i])
        return mean.add_(run.noise(x), alpha=of_noise[i]) if noisy else mean

    return step
