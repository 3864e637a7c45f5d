r"""What every sampler is: a way of using `(sde, score)` to walk from noise at T to data at t_end.

A sampler is called as

    result = sampler(sde, score, shape, generator=...)        # SampleResult

and sees nothing but an SDE, a score and a shape. Most samplers walk a grid of times T = t_0 > t_1 > ... > t_N = t_end
that is the same for all samples. Their loop is written once, in `GridSampler`; such a sampler is a frozen dataclass of
options and one function of them,

    method(sde, times) -> step,     x_{t_{i+1}} = step(i, x_{t_i}, run)

where `run.score(x, t)` is the counted score at the number t and `run.noise(x)` is fresh noise shaped like x. All
coefficients are computed in float64 for the whole grid before the loop and are plain numbers in it, so that a step is a
few fused multiply-adds in the dtype of x and nothing waits for the device.

`denoise=True` ends a run with Tweedie's mean of the clean data given x at t_end ((2) in `sde_lib.score`), which is one
more evaluation of the score.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from numerics import Generator, UserError, normal, require_count
from samplers.corrections import CorrectedScore, Correction
from sde_lib import SDE, CountedScore, Score
from sde_lib.time_grids import Custom, TimeGrid, Uniform

Callback = Callable[["StepInfo"], None]


class SamplingError(RuntimeError):
    """A run that met values which are not finite, or whose solver gave up. Nothing is returned."""


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


class Run:
    """One run: the counted score and the source of noise, as a step may use them."""

    def __init__(
        self,
        sde: SDE,
        score: Score,
        corrections: Sequence[Correction],
        generator: Generator,
        like: Tensor,
        record: bool = False,
    ) -> None:
        self.sde, self.generator, self.corrections = sde, generator, tuple(corrections)
        self.original = score
        self.counted = CountedScore(score)
        self.batched: Score = CorrectedScore.around(sde, self.counted, self.corrections)
        self._pair: CountedScore | None = None
        self._batch, self._device = like.shape[0], like.device
        # there is no float64 on Apple's devices
        self._time_dtype = torch.float32 if like.device.type == "mps" else torch.float64
        self._record = record
        self.last: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def nfe(self) -> int:
        return self.counted.nfe + (0 if self._pair is None else self._pair.nfe)

    def times(self, t: float) -> Tensor:
        """`t` for every sample, `(B,)`; a fill on the device, which waits for nothing."""
        return torch.full((self._batch,), t, dtype=self._time_dtype, device=self._device)

    def score(self, x: Tensor, t: float) -> Tensor:
        """The score at `x` `(B, *)` and the number `t`, corrected and counted."""
        batch_t = self.times(t)
        return self._seen(x, batch_t, self.batched(x, batch_t))

    def score_and_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The score and the learned variance's place between its bounds, both `(B, *)`, from one evaluation."""
        if self._pair is None:
            self._pair = CountedScore(self.original.score_and_variance)  # type: ignore[attr-defined]
        batch_t = self.times(t)
        value, place = self._pair(x, batch_t)
        for correction in self.corrections:
            value = correction.apply(self.sde, x, batch_t, value)
        return self._seen(x, batch_t, value), place

    def noise(self, x: Tensor) -> Tensor:
        """Fresh standard normals shaped like `x`."""
        return normal(x.shape, self.generator, device=x.device, dtype=x.dtype)

    def denoised(self, x: Tensor, t: float) -> Tensor:
        """Tweedie's mean of the clean data given `x` at `t`, `(B, *)`; one evaluation."""
        return tweedie(self.sde, x, t, self.score(x, t))

    def estimate(self) -> Tensor | None:
        """The clean data as the last evaluation saw them."""
        if self.last is None:
            return None
        x, t, value = self.last
        return tweedie(self.sde, x, float(t[0]), value)

    def _seen(self, x: Tensor, t: Tensor, value: Tensor) -> Tensor:
        if value.shape != x.shape:
            raise UserError(
                f"got a score of shape {tuple(value.shape)} for x of shape {tuple(x.shape)}; expected the same shape"
            )
        if self._record:
            self.last = (x, t, value)
        return value


def tweedie(sde: SDE, x: Tensor, t: float, score: Tensor) -> Tensor:
    """(x + sigma^2 score) / alpha at the number `t`, `(B, *)`."""
    return (x + float(sde.sigma(t)) ** 2 * score) / float(sde.alpha(t))


Step = Callable[[int, Tensor, Run], Tensor]


@dataclass(frozen=True, kw_only=True, repr=False)
class Sampler(ABC):
    """A method of sampling, as a frozen set of options; see the module's text.

    Args:
        grid: the times; None is the method's own default. A tensor or a sequence of times is a `Custom` grid.
        denoise: end with Tweedie's mean at t_end, one more evaluation.
        corrections: of the score, applied at every evaluation, in order; see `samplers.corrections`.
    """

    grid: TimeGrid | Sequence[float] | Tensor | None = None
    denoise: bool = True
    corrections: tuple[Correction, ...] = ()

    default_grid: ClassVar[TimeGrid] = Uniform()

    def __post_init__(self) -> None:
        if isinstance(self.grid, str):
            raise UserError(f"got grid={self.grid!r}; expected a grid such as Karras(), or times (N+1,)")
        if self.grid is not None and not callable(self.grid):
            object.__setattr__(self, "grid", Custom(times=self.grid))
        corrections = self.corrections if isinstance(self.corrections, (tuple, list)) else (self.corrections,)
        for correction in corrections:
            if not isinstance(correction, Correction):
                raise UserError(
                    f"got the correction {correction!r}; expected ClipDenoised(...), DynamicThreshold(...) "
                    "or Temperature(...)"
                )
        object.__setattr__(self, "corrections", tuple(corrections))

    def __repr__(self) -> str:
        """The code that makes this sampler; options at their defaults are left out."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.init and f.repr and getattr(self, f.name) != _default(f)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @abstractmethod
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
            device, dtype: of the samples; those of `x_T`, else the CPU and torch's default dtype.
            keep_path: return the states at all times too.
            callback: called with a `StepInfo` after each step.

        Raises:
            UserError: for a shape, an x_T, or a grid that does not fit; for an option that this method does not have.
            SamplingError: where values stop being finite, with the step and t.
        """

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
        grid = self.default_grid if self.grid is None else self.grid
        return check_times(sde, grid(sde, steps), steps)  # type: ignore[operator]

    def _start(
        self,
        sde: SDE,
        t_start: float,
        shape: Sequence[int],
        x_T: Tensor | None,
        generator: Generator,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """The state at the grid's beginning, checked or drawn."""
        try:
            sizes = tuple(int(n) for n in shape)
        except TypeError:
            sizes = ()
        if len(sizes) < 1 or any(n < 1 for n in sizes):
            raise UserError(f"got shape={shape!r}; expected (B, *) of integers >= 1, the batch first")
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"got dtype={dtype}; expected a floating one such as torch.float32")
        if x_T is None:
            if not math.isclose(t_start, sde.T, rel_tol=1e-6):
                raise UserError(
                    f"got a grid that starts at t = {t_start:.6g} and no x_T; the prior is the law at T = {sde.T:.6g} "
                    "only: give x_T, the state at that time"
                )
            return sde.prior_sample(sizes, generator=generator, device=device, dtype=dtype)
        if tuple(x_T.shape) != sizes:
            raise UserError(f"got x_T of shape {tuple(x_T.shape)}; expected shape={sizes}")
        if not x_T.is_floating_point() or (dtype is not None and x_T.dtype != dtype):
            raise UserError(f"got x_T of {x_T.dtype}; expected {dtype or 'a floating dtype'}: convert it with x_T.to()")
        return x_T.detach() if device is None else x_T.detach().to(device)

    def _walk(
        self,
        sde: SDE,
        score: Score,
        x: Tensor,
        nodes: Tensor,
        step: Step,
        generator: Generator,
        keep_path: bool,
        callback: Callback | None,
    ) -> SampleResult:
        """The loop: from `x` at `nodes[0]` over all `nodes` `(N+1,)`, then denoising."""
        run = Run(sde, score, self.corrections, generator, x, record=callback is not None)
        t = nodes.tolist()
        steps = len(t) - 1
        watch = FiniteWatch(t, x.device)
        path = [x] if keep_path else None
        for i in range(steps):
            x = step(i, x, run)
            watch.see(i, x)
            if path is not None:
                path.append(x)
            if callback is not None:
                callback(StepInfo(step=i + 1, steps=steps, t=t[i + 1], x=x, nfe=run.nfe, estimate=run.estimate))
        if self.denoise:
            x = run.denoised(x, t[-1])
            watch.see(steps, x)
        watch.check(x)
        return SampleResult(
            x=x, nfe=run.nfe, times=nodes.to(torch.float64), path=None if path is None else torch.stack(path)
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class GridSampler(Sampler):
    """A sampler that walks one grid of times.

    Args:
        steps: steps of the grid.
    """

    steps: int = 1000

    evaluations_per_step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        set_steps(self)

    @abstractmethod
    def method(self, sde: SDE, times: Tensor) -> Step:
        """The step for the grid `times` `(N+1,)`, float64, on the CPU: everything that can be computed beforehand is."""

    @property
    def evaluations(self) -> int:
        return self.steps * self.evaluations_per_step + int(self.denoise)

    def within(self, evaluations: int) -> GridSampler:
        steps = (evaluations - int(self.denoise)) // self.evaluations_per_step
        if steps < 1:
            raise UserError(
                f"got a budget of {evaluations} evaluations for {type(self).__name__}; expected at least "
                f"{self.evaluations_per_step + int(self.denoise)}, which is one step"
            )
        return replace(self, steps=steps)

    @torch.no_grad()
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
        nodes = self._nodes(sde, self.steps)
        self._check(score)
        step = self.method(sde, nodes)
        x = self._start(sde, float(nodes[0]), shape, x_T, generator, device, dtype)
        return self._walk(sde, score, x, nodes, step, generator, keep_path, callback)

    def _check(self, score: Score) -> None:
        """Refuses a score that lacks what the method needs."""


class FiniteWatch:
    """Notes after which step values stopped being finite, asking the device only now and then."""

    every = 50

    def __init__(self, times: list[float], device: torch.device) -> None:
        self.times = times
        self.sums = torch.zeros(len(times), dtype=torch.float32, device=device)
        self.seen = 0

    def see(self, i: int, x: Tensor) -> None:
        # a sum is finite only where all its terms are
        self.sums[i] = x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        self.seen = i + 1
        if self.seen % self.every == 0:
            self.check(x)

    def check(self, x: Tensor) -> None:
        finite = self.sums[: self.seen].isfinite()
        if bool(finite.all()):
            return
        i = int((~finite).nonzero()[0])
        bad = int((~x.flatten(1).isfinite().all(dim=1)).sum())
        if i < len(self.times) - 1:
            where = f"step {i + 1} of {len(self.times) - 1}, from t = {self.times[i]:.6g} to {self.times[i + 1]:.6g}"
        else:
            where = f"the final denoising, at t = {self.times[-1]:.6g}"
        raise SamplingError(
            f"got values that are not finite in {where}, by now in {bad} of {len(x)} samples; "
            "expected finite ones: look at the score at that time, or take more steps"
        )


def check_times(sde: SDE, times: Tensor, steps: int) -> Tensor:
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


def set_steps(sampler: Any, name: str = "steps", extra: int = 0) -> None:
    """Checks the number of steps, and takes it from a grid that has its own."""
    own = getattr(sampler.grid, "steps", None)
    steps = getattr(sampler, name)
    default = next(f.default for f in fields(sampler) if f.name == name)
    if own is not None and steps != own + extra:
        if steps != default:
            raise UserError(
                f"got {name}={steps} and a grid of {own + 1} times; expected {name}={own + extra}: leave {name} out"
            )
        object.__setattr__(sampler, name, own + extra)
        return
    require_count(steps, name)


def _default(f: Any) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default
