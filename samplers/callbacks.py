"""Callbacks: what to do after each step of a run. Any function of a `StepInfo` is one; these are the usual ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from numerics import UserError, require_choice, require_count
from samplers.result import Callback, StepInfo


class Trajectory:
    """Records a run, on the CPU: for pictures and animations.

    Args:
        every: keep every so many-th step, and always the last where the number of steps is known.
        what: "x", the state, or "denoised", the clean data as the score saw them.

    Attributes:
        times: the times reached (`(B,)` each, from methods with a step size per sample).
        frames: the states, each `(B, *)`.
    """

    def __init__(self, every: int = 1, what: Literal["x", "denoised"] = "x") -> None:
        require_count(every, "every")
        require_choice(what, "what", ("x", "denoised"))
        self.every, self.what = every, what
        self.times: list[float | Tensor] = []
        self.frames: list[Tensor] = []

    def __call__(self, info: StepInfo) -> None:
        if info.step % self.every and info.step != info.steps:
            return
        frame = info.x if self.what == "x" else info.denoised
        if frame is None:
            raise UserError(
                'got what="denoised" from a sampler that has no denoised estimate; expected what="x", '
                "or a method on a grid"
            )
        self.times.append(info.t)
        self.frames.append(frame.detach().to("cpu").clone())


class Progress:
    """A progress bar of steps, with t and the number of evaluations; close it, or use it as a context.

    Args:
        description: the text before the bar.
        options: options of `tqdm`.
    """

    def __init__(self, description: str = "sampling", **options: Any) -> None:
        self.description, self.options = description, options
        self.bar: Any = None

    def __call__(self, info: StepInfo) -> None:
        if self.bar is None:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=info.steps, desc=self.description, **self.options)
        t = info.t if isinstance(info.t, float) else float(info.t.max())
        self.bar.set_postfix({"t": f"{t:.3g}", "nfe": info.nfe}, refresh=False)
        self.bar.update(info.step - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def all_of(*callbacks: Callback | None) -> Callable[[StepInfo], None]:
    """One callback that calls each of them in turn; None is left out."""
    present = [callback for callback in callbacks if callback is not None]

    def call(info: StepInfo) -> None:
        for callback in present:
            callback(info)

    return call
