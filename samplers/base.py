r"""What every sampler is: a way of using `(sde, score)` to walk from noise at T to data at t_end.

A sampler is called as

    result = sampler(sde, score, shape, generator=...)        # SampleResult

and sees nothing but an SDE, a score and a shape. Most samplers walk a grid of times T = t_0 > t_1 > ... > t_N = t_end
that is the same for all samples. Their loop is written once, in `Sampler`; such a `GridSampler` is a frozen dataclass of
options and one function of them,

    method(sde, times) -> step,     x_{t_{i+1}} = step(i, x_{t_i}, run)             (`samplers.step`)

`denoise=True` ends a run with Tweedie's mean of the clean data given x at t_end ((2) in `sde_lib.score`), which is one
more evaluation of the score.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from numerics import Generator, UserError, ordinary, require_count
from samplers.corrections import Correction
from samplers.finite import StepWatch
from samplers.result import Callback, SampleResult, StepInfo
from samplers.run import Run, numbers
from samplers.step import StatefulStep, Step
from sde_lib import SDE, Score, in_dtype, mismatch_warning
from sde_lib.time_grids import Custom, TimeGrid, Uniform


@dataclass(frozen=True, kw_only=True, repr=False)
class Sampler(ABC):
    """A method of sampling, as a frozen set of options.

    A subclass says in `_times` between which times it goes and in `_sample` how; `__call__` is the same for all.

    Args:
        grid: the times; None for the method's default. A tensor or a sequence of times is a `Custom` grid.
        denoise: whether to end with Tweedie's mean at t_end, one more evaluation.
        corrections: corrections of the score, applied in order at every evaluation; see `samplers.corrections`.
    """

    grid: TimeGrid | Sequence[float] | Tensor | None = None
    denoise: bool = True
    corrections: tuple[Correction, ...] = ()

    default_grid: ClassVar[TimeGrid] = Uniform()

    def __post_init__(self) -> None:
        if isinstance(self.grid, str):
            raise UserError(f"got grid={self.grid!r}; expected a grid such as Karras(), or times (N+1,)")
        grid = self.grid if self.grid is None or callable(self.grid) else Custom(times=self.grid)
        given: Any = () if self.corrections is None else self.corrections
        corrections = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        for correction in corrections:
            if not isinstance(correction, Correction):
                raise UserError(
                    f"got the correction {correction!r}; expected ClipDenoised(...), DynamicThreshold(...) "
                    "or Temperature(...)"
                )
        self._settle(grid=grid, corrections=corrections)

    def _settle(self, **values: Any) -> None:
        """Replaces what was given for some fields by what it stands for; only while the object is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        """The code that makes this sampler; options at their defaults are left out."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.init and f.repr and getattr(self, f.name) != _default(f)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @final
    def __call__(
        self,
        sde: SDE,
        score: Score,
        shape: Sequence[int],
        *,
        x_T: Tensor | None = None,
        generator: Generator = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        keep_path: bool = False,
        callback: Callback | None = None,
    ) -> SampleResult:
        """Samples.

        Args:
            sde: the forward process.
            score: `score(x, t)` with x `(B, *)`, t `(B,)`.
            shape: `(B, *)`.
            x_T: the state to start from, of `shape`; a draw from the prior unless given.
            generator: a `torch.Generator`, or `numerics.SampleStreams`, with which sample i is the same for any batch.
            device: of the samples; that of `x_T`, else the CPU.
            dtype: in which the score is given x; that of `x_T`, else torch's default. The state is float32 at least, and the
                samples are as the state is: bfloat16 cannot hold the small steps at the end.
            keep_path: return the states at all times too.
            callback: called with a `StepInfo` after each step.

        Raises:
            UserError: for a shape, an x_T, or a grid that does not fit; for an option that this method does not have.
            SamplingError: where values stop being finite, with the step and t.
        """
        with torch.inference_mode(False):
            return self._called(sde, score, shape, x_T, generator, device, dtype, keep_path, callback)

    @torch.no_grad()
    def _called(
        self,
        sde: SDE,
        score: Score,
        shape: Sequence[int],
        x_T: Tensor | None,
        generator: Generator,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        keep_path: bool,
        callback: Callback | None,
    ) -> SampleResult:
        times = self._times(sde)
        self._check(score, keep_path)
        asked, x = self._start(sde, float(times[0]), shape, x_T, generator, device, dtype)
        if asked != x.dtype:
            score = in_dtype(score, asked)
        run = Run(sde, score, self.corrections, generator, x, keep_path=keep_path, callback=callback)
        found = self._sample(run, x, times)
        # corrections keep the denoised mean in range, whatever the score makes of pure noise
        if x_T is None and run.counted.shown is not None and not self.corrections:
            nats = float(run.counted.shown)
            warning = mismatch_warning(sde, nats, "a score of data")
            if warning is not None:
                size = math.sqrt(2 * nats) * sde.prior_std / float(sde.alpha(sde.T))
                warnings.warn(
                    f"{warning}: the samples begin from another law than theirs; where data are not as large as its denoised "
                    f"mean at T, {size:.2g}, the score has not learned that noise: train longer, or clip",
                    stacklevel=4,
                )
        return found

    @abstractmethod
    def _times(self, sde: SDE) -> Tensor:
        """The times `(N+1,)`, float64, on the CPU: at least the first and the last."""

    @abstractmethod
    def _sample(self, run: Run, x: Tensor, times: Tensor) -> SampleResult:
        """From the state `x` `(B, *)` at `times[0]` to the samples."""

    def _check(self, score: Score, keep_path: bool) -> None:  # noqa: B027  (most need nothing)
        """Refuses a score that lacks what the method needs, and a path that it does not have."""

    @property
    @abstractmethod
    def evaluations(self) -> int | None:
        """Calls of the score that a run makes, or None from an adaptive method."""

    def within(self, evaluations: int) -> Sampler:
        """This sampler with as many steps as fit into a budget of `evaluations` calls of the score.

        Raises:
            UserError: where not one step fits, or the method is adaptive.
        """
        raise UserError(
            f"got a budget of {evaluations} evaluations for {type(self).__name__}, which chooses its own number; "
            "expected a method on a grid: set its tolerance instead"
        )

    def _nodes(self, sde: SDE, steps: int) -> Tensor:
        """The grid's times `(steps + 1,)`, checked."""
        grid = self.default_grid if self.grid is None else self.grid
        return _walkable(sde, grid(sde, steps), steps)  # type: ignore[operator]

    def _count(self, name: str, *, least: int = 1, beyond: int = 0) -> int:
        """How many steps the field `name` asks for; those of a grid that has its own number, and `beyond` more, where
        that field was left out.

        Raises:
            UserError: where it was given and the grid has another, or it is no integer >= `least`.
        """
        given, own = getattr(self, name), getattr(self.grid, "steps", None)
        if own is not None and given != own + beyond:
            if given != next(_default(f) for f in fields(self) if f.name == name):
                raise UserError(
                    f"got {name}={given} and a grid of {own + 1} times; expected {name}={own + beyond}: leave {name} out"
                )
            given = own + beyond
        require_count(given, name, least=least)
        return int(given)

    def _start(
        self,
        sde: SDE,
        t_start: float,
        shape: Sequence[int],
        x_T: Tensor | None,
        generator: Generator,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> tuple[torch.dtype, Tensor]:
        """The dtype that the score is asked in, and the state at the grid's beginning, checked or drawn."""
        whole = isinstance(shape, Sequence) and all(isinstance(n, int) for n in shape)
        sizes = tuple(int(n) for n in shape) if whole else ()
        if len(sizes) < 2 or any(n < 1 for n in sizes):
            hint = f": for {sizes[0]} samples of one dimension give ({sizes[0]}, 1)" if len(sizes) == 1 else ""
            raise UserError(f"got shape={shape!r}; expected (B, *) of integers >= 1, the batch first{hint}")
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"got dtype={dtype}; expected a floating-point one such as torch.float32")
        if x_T is None:
            if t_start < sde.t_start * (1 - 1e-6):
                raise UserError(
                    f"got a grid that starts at t = {t_start:.6g} and no x_T; expected T = {sde.T:.6g}, where the prior "
                    "is the law: give x_T, the state at the grid's first time"
                )
            asked = torch.get_default_dtype() if dtype is None else dtype
            state = torch.promote_types(asked, torch.float32)
            return asked, sde.prior_sample(sizes, generator=generator, device=device, dtype=state)
        if tuple(x_T.shape) != sizes:
            raise UserError(f"got x_T of shape {tuple(x_T.shape)}; expected shape={sizes}")
        if not x_T.is_floating_point():
            raise UserError(f"got x_T of {x_T.dtype}; expected a floating dtype: convert it with x_T.to(torch.float32)")
        asked = x_T.dtype if dtype is None else dtype
        state = torch.promote_types(torch.promote_types(x_T.dtype, asked), torch.float32)
        return asked, ordinary(x_T.detach()).to(device or x_T.device, state)

    def _walk(self, run: Run, x: Tensor, nodes: Tensor, step: Step | StatefulStep[Any]) -> SampleResult:
        """The loop: from `x` at `nodes[0]` over all `nodes` `(N+1,)`, then denoising."""
        t = numbers(nodes)
        steps = len(t) - 1
        watch = StepWatch(t, x.device)
        path = [x] if run.keep_path else None
        stateful = step if isinstance(step, StatefulStep) else _Plain(step)
        state = stateful.init(x, run)
        for i in range(steps):
            x, state = stateful(i, x, run, state)
            watch.see(i, x)
            if path is not None:
                path.append(x)
            if run.callback is not None:
                run.callback(StepInfo(step=i + 1, steps=steps, t=t[i + 1], x=x, nfe=run.nfe, estimate=run.estimate))
        if self.denoise:
            x = run.denoised(x, t[-1])
            watch.see(steps, x)
        watch.check(x)
        return SampleResult(
            x=x, nfe=run.nfe, times=nodes.to(torch.float64), path=None if path is None else torch.stack(path)
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class GridSampler(Sampler):
    """A sampler that walks one grid of times, the same for all samples.

    A subclass gives `method(sde, times) -> step`; `evaluations_per_step` is 1 unless it says otherwise.

    Args:
        steps: number of steps of the grid; a `Custom` grid has its own.
        grid, denoise, corrections: as in every `Sampler`.
    """

    steps: int = 1000

    evaluations_per_step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle(steps=self._count("steps"))

    @abstractmethod
    def method(self, sde: SDE, times: Tensor) -> Step | StatefulStep[Any]:
        """The step for the grid `times` `(N+1,)`, float64, on the CPU; compute here all that does not depend on x."""

    @property
    def evaluations(self) -> int:
        """Calls of the score that a run makes."""
        return self.steps * self.evaluations_per_step + int(self.denoise)

    def within(self, evaluations: int) -> Self:
        """This sampler with as many steps as fit into a budget of `evaluations` calls of the score.

        Raises:
            UserError: where not one step fits.
        """
        cost = self.evaluations_per_step
        steps = (evaluations - int(self.denoise)) // cost if cost > 0 else 0
        if steps < 1:
            raise UserError(
                f"got a budget of {evaluations} evaluations for {type(self).__name__}; expected at least "
                f"{cost + int(self.denoise)}, which is one step"
            )
        return replace(self, steps=steps)

    def _times(self, sde: SDE) -> Tensor:
        return self._nodes(sde, self.steps)

    def _sample(self, run: Run, x: Tensor, times: Tensor) -> SampleResult:
        return self._walk(run, x, times, self.method(run.sde, times))


class _Plain(StatefulStep[None]):
    """A `Step`, which remembers nothing."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def init(self, x: Tensor, run: Run) -> None:
        return None

    def __call__(self, i: int, x: Tensor, run: Run, state: None) -> tuple[Tensor, None]:
        return self.step(i, x, run), None


def _walkable(sde: SDE, times: Tensor, steps: int) -> Tensor:
    """A grid's answer `(N+1,)` in float64 on the CPU, or a refusal of what no sampler can walk."""
    times = torch.as_tensor(times).detach().to("cpu", torch.float64)
    if times.shape != (steps + 1,) or not bool((times.diff() < 0).all()):
        raise UserError(
            f"got a grid of shape {tuple(times.shape)} for steps={steps} that is not {steps + 1} strictly decreasing "
            f"times; expected ({steps + 1},) from T to t_end: check the grid and its ends"
        )
    low = min(sde.t_min, sde.t_end)
    if float(times[0]) > sde.T * (1 + 1e-9) or float(times[-1]) < low * (1 - 1e-9):
        raise UserError(
            f"got a grid from {float(times[0]):.6g} to {float(times[-1]):.6g}; expected it within "
            f"[{low:.6g}, {sde.T:.6g}], the SDE's [t_min, T]"
        )
    return times


def _default(f: Field[Any]) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()
