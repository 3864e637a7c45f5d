r"""The probability-flow ODE: deterministic sampling, and encoding.

    dx/dt = f x - g^2 score(x, t) / 2           (Song et al. 2021, arXiv:2011.13456, equation (13))

It has the marginals of the SDE, and a flow is invertible: `decode` takes a latent at T to data at t_end and `encode`
takes data back. It is integrated in the clock and the state of a `Flow` (whitened by default: see
`sde_lib.probability_flow`), in float64 whatever the dtype of x, by any solver of `numerics`: `Dopri5` with a step size
per sample, so that no sample depends on its batch mates; `Heun` and `RK4` on the grid's nodes; `TorchDiffEq` and
`SciPy`, which take the batch as one system.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from numerics import (
    Dopri5,
    FixedGridSolver,
    Solution,
    Solver,
    Status,
    UserError,
    batch_time,
    expand_as,
    take,
)
from samplers.base import Sampler
from samplers.result import Callback, SampleResult, SamplingError, StepInfo
from samplers.run import Run
from sde_lib import SDE, Flow, FlowTimes, Score, WhitenedFlow
from sde_lib.time_grids import Custom


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What `ProbabilityFlow.encode` returns.

    Attributes:
        latent: the state at T, `(B, *)`.
        nfe: calls of the score.
        nfe_per_sample: `(B,)`.
        solver_error: `(B,)`, an estimate of the latent's error, root mean square per entry; NaN from solvers without
            one.
    """

    latent: Tensor
    nfe: int
    nfe_per_sample: Tensor
    solver_error: Tensor


@dataclass(frozen=True, kw_only=True, repr=False)
class ProbabilityFlow(Sampler):
    """See the module's text.

    Args:
        solver: of `numerics`. One of fixed steps takes its nodes from the grid, if one is given, and else makes equal
            steps in the flow's clock; an adaptive one takes only the grid's two ends.
        flow: the clock and the state; `WhitenedFlow(data_std=...)` is made for data of that standard deviation.
        denoise: off by default, so that `encode` inverts it.
    """

    solver: Solver = field(default_factory=Dopri5)
    flow: Flow = field(default_factory=WhitenedFlow)
    denoise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.solver, Solver):
            raise UserError(
                f"got solver={self.solver!r}; expected a solver of numerics such as Dopri5() or RK4(steps=50)"
            )
        if not isinstance(self.flow, Flow):
            raise UserError(f"got flow={self.flow!r}; expected a flow of sde_lib such as WhitenedFlow()")

    @property
    def evaluations(self) -> int | None:
        if not isinstance(self.solver, FixedGridSolver):
            return None
        return self._steps * self.solver.stages + int(self.denoise)

    @property
    def _steps(self) -> int:
        own = self.grid.steps if isinstance(self.grid, Custom) else None
        return own or (self.solver.steps if isinstance(self.solver, FixedGridSolver) else 1)

    def within(self, evaluations: int) -> Sampler:
        if not isinstance(self.solver, FixedGridSolver):
            return super().within(evaluations)
        steps = (evaluations - int(self.denoise)) // self.solver.stages
        if steps < 1:
            raise UserError(
                f"got a budget of {evaluations} evaluations for {self!r}; expected at least "
                f"{self.solver.stages + int(self.denoise)}, which is one step"
            )
        return replace(self, solver=replace(self.solver, steps=steps))  # type: ignore[type-var]

    def _times(self, sde: SDE) -> Tensor:
        return self._ends(sde)

    def _check(self, score: Score, keep_path: bool) -> None:
        if keep_path and not isinstance(self.solver, FixedGridSolver):
            raise UserError(
                f"got keep_path=True with {type(self.solver).__name__}, whose steps are its own; "
                "expected a solver on a grid: use ProbabilityFlow(solver=RK4(steps=...))"
            )

    def _sample(self, run: Run, x: Tensor, times: Tensor) -> SampleResult:
        return self._solve(run.sde, run.original, x, times, self.denoise, run.keep_path, run.callback)

    @torch.no_grad()
    def decode(self, sde: SDE, score: Score, latent: Tensor) -> SampleResult:
        """The data at t_end that belong to `latent` `(B, *)` at T, never denoised: the inverse of `encode`."""
        return self._solve(sde, score, latent.detach(), self._ends(sde), False, False, None)

    @torch.no_grad()
    def encode(self, sde: SDE, score: Score, x: Tensor) -> Encoding:
        """The latent at T that belongs to data `x` `(B, *)`, taken as the state at t_end."""
        if not x.is_floating_point():
            raise UserError(f"got x of {x.dtype}; expected a floating dtype: convert it with x.to()")
        result = self._solve(sde, score, x.detach(), self._ends(sde).flip(0), False, False, None)
        assert result.nfe_per_sample is not None and result.solver_error is not None
        return Encoding(
            latent=result.x,
            nfe=result.nfe,
            nfe_per_sample=result.nfe_per_sample,
            solver_error=result.solver_error,
        )

    def _ends(self, sde: SDE) -> Tensor:
        """The grid's times, or just the two ends where the solver needs no more."""
        if self.grid is None:
            return torch.tensor([sde.T, sde.t_end], dtype=torch.float64)
        return self._nodes(sde, self._steps)

    def _solve(
        self,
        sde: SDE,
        score: Score,
        x: Tensor,
        times: Tensor,
        denoise: bool,
        keep_path: bool,
        callback: Callback | None,
    ) -> SampleResult:
        run = Run(sde, score, self.corrections, None, x)
        clock = FlowTimes(self.flow, sde, float(times[0]), float(times[-1]))
        fixed = isinstance(self.solver, FixedGridSolver)
        nodes = None
        if fixed and self.grid is not None:
            nodes = self.flow.clock(sde, times)
            nodes[0], nodes[-1] = clock.u_0, clock.u_1
        w = x.to(torch.float64) / expand_as(self.flow.scale(sde, times[0]), x.to(torch.float64))
        field_ = FlowField(sde, run.batched, clock, x.dtype)
        made = 0

        def inform(u: Tensor, state: tuple[Tensor, ...]) -> None:
            nonlocal made
            made += 1
            t = clock.time(u)
            now = (state[0] * expand_as(self.flow.scale(sde, t), state[0])).to(x.dtype)
            info = StepInfo(
                step=made,
                steps=self._steps if fixed else None,
                t=float(t[0]) if fixed else t,
                x=now,
                nfe=run.nfe,
            )
            callback(info)  # type: ignore[misc]

        solution = self.solver(
            field_,
            (w,),
            clock.u_0,
            clock.u_1,
            nodes=nodes,
            keep_path=keep_path,
            callback=None if callback is None else inform,
        )
        _check(solution, clock)
        scale = self.flow.scale(sde, float(times[-1]))
        end = (solution.y[0] * expand_as(scale, solution.y[0])).to(x.dtype)
        path, node_times = None, None
        if solution.nodes is not None:
            node_times = clock.time(solution.nodes).to("cpu")
            node_times[0], node_times[-1] = times[0], times[-1]
            if solution.path is not None:
                path = (solution.path * expand_as(self.flow.scale(sde, node_times), solution.path)).to(x.dtype)
        evaluations = solution.evaluations
        if denoise:
            end = run.denoised(end, float(times[-1]))
            evaluations = evaluations + 1
        return SampleResult(
            x=end,
            nfe=run.nfe,
            times=node_times,
            path=path,
            nfe_per_sample=evaluations,
            solver_error=solution.error[0] * float(scale),
        )


class FlowField:
    """dw/du = a w + b eps of `Flow`: coefficients and state in float64, the score in its own dtype, one cast between."""

    def __init__(self, sde: SDE, score: Score, clock: FlowTimes, dtype: torch.dtype) -> None:
        self.sde, self.score, self.clock, self.dtype = sde, score, clock, dtype

    def __call__(self, u: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (w,) = state
        t = batch_time(self.clock.time(u), w)
        a, b = self.clock.flow.coefficients(self.sde, t)
        x = (w * expand_as(self.clock.flow.scale(self.sde, t), w)).to(self.dtype)
        score = self.score(x, t)
        if score.shape != x.shape:
            raise UserError(
                f"got a score of shape {tuple(score.shape)} for x of shape {tuple(x.shape)}; expected the same shape"
            )
        return (expand_as(a, w) * w - expand_as(b * self.sde.sigma(t), w) * score.to(w.dtype),)

    def take(self, index: Tensor) -> FlowField:
        return FlowField(self.sde, take(self.score, index), self.clock, self.dtype)  # type: ignore[arg-type]


def _check(solution: Solution, clock: FlowTimes) -> None:
    failed = solution.status != int(Status.DONE)
    if not bool(failed.any()):
        return
    first = int(failed.nonzero()[0])
    status = Status(int(solution.status[first]))
    t = float(clock.time(solution.u[first : first + 1]))
    raise SamplingError(
        f"got no solution for {int(failed.sum())} of {len(failed)} samples: the first was last right at t = {t:.6g}, "
        f"then {status.explain()}"
    )
