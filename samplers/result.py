"""What a sampler returns, what it tells a callback, and how it fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor


class SamplingError(RuntimeError):
    """A run that met values which are not finite, or whose solver gave up. Nothing is returned.

    Attributes:
        exit_code: what a command line leaves with, 4.
    """

    exit_code: ClassVar[int] = 4


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """What a sampler returns.

    Attributes:
        x: the samples, `(B, *)`.
        nfe: calls of the score, whatever the batch.
        times: `(N+1,)`, float64, the times of the path, or None from an adaptive method.
        path: `(N+1, B, *)`, the state at `times` before any final denoising, where it was asked for.
        nfe_per_sample: `(B,)`, evaluations each sample took part in, from methods with a step size per sample.
        solver_error: `(B,)`, from adaptive ODE solvers: an estimate of the error of x, root mean square per entry.
    """

    x: Tensor
    nfe: int
    times: Tensor | None = None
    path: Tensor | None = None
    nfe_per_sample: Tensor | None = None
    solver_error: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What a callback is told after each step.

    Attributes:
        step: how many steps have been made, from 1.
        steps: how many there are, or None where a method chooses its own.
        t: the time reached; `(B,)` from a method with a step size per sample.
        x: the state at `t`, `(B, *)`. Not to be changed in place.
        nfe: calls of the score so far.
        estimate: computes `denoised`.
    """

    step: int
    steps: int | None
    t: float | Tensor
    x: Tensor
    nfe: int
    estimate: Callable[[], Tensor | None] = field(repr=False, default=lambda: None)

    @property
    def denoised(self) -> Tensor | None:
        """The clean data as the step's last evaluation of the score saw them, `(B, *)`, computed when asked for and
        at no further evaluation; None from methods whose samples leave the batch one by one."""
        return self.estimate()


Callback = Callable[[StepInfo], None]
