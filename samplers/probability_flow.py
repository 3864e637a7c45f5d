"""The probability-flow ODE: deterministic sampling, and encoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from numerics import Dopri5, Solver, Status, UserError
from samplers.base import Sampler
from samplers.result import SampleResult, SamplingError, StepInfo
from samplers.run import Run
from sde_lib import SDE, Flow, FlowTimes, Score, Transported, WhitenedFlow, transport
from sde_lib.flow_map import OnStep, fit_steps


@dataclass(frozen=True, kw_only=True, repr=False)
class ProbabilityFlow(Sampler):
    """The probability-flow ODE, whose states have the marginals of the SDE:

        dx/dt = f x - g^2 score(x, t) / 2           (Song et al. 2021, arXiv:2011.13456, equation (13))

    It is integrated in the clock and the state of a `Flow`, in float64 whatever the dtype of x, by any solver of `numerics`:
    `Dopri5` with a step size per sample, so that no sample depends on its batch mates; `Heun`, `RK4` and `Adams` on the
    grid's nodes; `TorchDiffEq` and `SciPy`, which take the batch as one system. In the whitened variables
    (`sde_lib.WhitenedFlow`) the slopes have a known factor, which `Adams` integrates exactly: an exponential method. A flow
    is invertible: `decode` takes a latent at T to data at t_end and `encode` takes data back.

    Args:
        solver: a solver of `numerics`. One of fixed steps takes its nodes from a given grid, or makes equal steps in the
            flow's clock; an adaptive one uses only the grid's two ends.
        flow: the clock and the state; `WhitenedFlow(data_std=...)` suits data of that standard deviation.
        denoise: whether to end with Tweedie's mean; off by default, so that `encode` inverts sampling.
        grid, corrections: as in every `Sampler`.
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
        object.__setattr__(self, "solver", fit_steps(self.solver, self.grid))  # type: ignore[arg-type]

    @property
    def evaluations(self) -> int | None:
        cost = None if self.solver.adaptive else self.solver.evaluations(self.solver.steps)
        return None if cost is None else cost + int(self.denoise)

    def within(self, evaluations: int) -> Sampler:
        if self.solver.adaptive:
            return super().within(evaluations)
        budget = evaluations - int(self.denoise)
        steps = next((n for n in range(budget, 0, -1) if (self.solver.evaluations(n) or 0) <= budget), 0)
        if steps < 1:
            raise UserError(
                f"got a budget of {evaluations} evaluations for {self!r}; expected at least "
                f"{(self.solver.evaluations(1) or 0) + int(self.denoise)}, which is one step"
            )
        return replace(self, solver=self.solver.with_steps(steps))

    def _times(self, sde: SDE) -> Tensor:
        return self._ends(sde)

    def _check(self, score: Score, keep_path: bool) -> None:
        if keep_path and self.solver.adaptive:
            raise UserError(
                f"got keep_path=True with {type(self.solver).__name__}, whose steps are its own; "
                "expected a solver on a grid: use ProbabilityFlow(solver=RK4(steps=...))"
            )

    def decode(self, sde: SDE, score: Score, latent: Tensor) -> Transported:
        """The data at the grid's end (t_end) that belong to `latent` `(B, *)` at its beginning (T): the inverse of `encode`.

        Never denoised, without gradients.

        Raises:
            UserError: for a latent that is not a floating batch.
            SamplingError: where a sample does not arrive.
        """
        return self._transport(sde, self._run(sde, score, latent), latent, self._ends(sde), False, None)

    def encode(self, sde: SDE, score: Score, x: Tensor) -> Transported:
        """The latent at the grid's beginning (T) that belongs to data `x` `(B, *)`, taken as the state at its end (t_end).

        `likelihood.encode` takes them as the state at t_min instead, and says of each sample whether it arrived.

        Raises:
            UserError: for an x that is not a floating batch.
            SamplingError: where a sample does not arrive.
        """
        return self._transport(sde, self._run(sde, score, x), x, self._ends(sde).flip(0), False, None)

    def _ends(self, sde: SDE) -> Tensor:
        """The grid's times, or just the two ends where the solver needs no more."""
        if self.grid is None:
            return torch.tensor([sde.t_start, sde.resolved(sde.t_end)], dtype=torch.float64)
        own: int | None = getattr(self.grid, "steps", None)
        return self._nodes(sde, own or (1 if self.solver.adaptive else self.solver.steps))

    def _run(self, sde: SDE, score: Score, x: Tensor) -> Run:
        return Run(sde, score, self.corrections, None, x)

    def _sample(self, run: Run, x: Tensor, times: Tensor) -> SampleResult:
        callback, keep_path = run.callback, run.keep_path
        made = 0

        def inform(t: Tensor, now: Tensor, nfe: int) -> None:
            nonlocal made
            made += 1
            fixed = not self.solver.adaptive
            info = StepInfo(
                step=made,
                steps=self.solver.steps if fixed else None,
                t=float(t[0]) if fixed else t,
                x=now,
                nfe=nfe,
            )
            callback(info)  # type: ignore[misc]

        found = self._transport(run.sde, run, x, times, keep_path, None if callback is None else inform)
        end = run.denoised(found.x, float(times[-1])) if self.denoise else found.x
        return SampleResult(
            x=end,
            nfe=run.nfe,
            times=found.times,
            path=found.path,
            nfe_per_sample=found.evaluations + int(self.denoise),
            solver_error=found.solver_error,
        )

    def _transport(
        self, sde: SDE, run: Run, x: Tensor, times: Tensor, keep_path: bool, on_step: OnStep | None
    ) -> Transported:
        clock = FlowTimes(self.flow, sde, float(times[0]), float(times[-1]))
        nodes = None if self.grid is None or self.solver.adaptive else clock.nodes(times)
        found = transport(clock, run.batched, x, self.solver, nodes=nodes, keep_path=keep_path, on_step=on_step)
        failed = found.status != int(Status.DONE)
        if bool(failed.any()):
            first = int(failed.nonzero()[0])
            raise SamplingError(
                f"got no solution for {int(failed.sum())} of {len(failed)} samples: the first was last right at "
                f"t = {float(found.reached[first]):.6g}, then {Status(int(found.status[first])).explain()}"
            )
        return found
