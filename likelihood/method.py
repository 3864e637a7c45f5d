"""How a flow is integrated, resolved and checked in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

from torch import Tensor

from likelihood.refinement import Refinement
from numerics import Dopri5, Solver, UserError, require_positive
from sde_lib import SDE, Flow, FlowTimes, TimeGrid, WhitenedFlow
from sde_lib.flow_map import fit_steps
from sde_lib.time_grids import Custom


@dataclass(frozen=True)
class Method:
    """How the probability flow is integrated between data at t_min and latents at T: one argument of everything that does so.

        log_likelihood(sde, score, x, method=Method(Adams(steps=64, points=5), grid=Karras()))

    `likelihood.fast` and `likelihood.accurate` make one that suits a data set, or single values. For the literature's way take
    `Method(SciPy("RK45", 1e-5), flow=PlainFlow())`.

    Args:
        solver: any of `numerics`; `Dopri5` at tolerance 1e-5, with steps per sample, unless given.
        flow: the clock and the state. For data whose standard deviation is far from 1, `WhitenedFlow(data_std=...)` saves
            evaluations; the value is the same.
        grid: the times at which a solver of fixed steps stops, or these times from T down to t_min; equal steps in the flow's
            clock unless given. See `pilot_grid`. Its t_start has to be the SDE's T, and its t_end is t_min.
        t_min: the time at which the density is taken; the grid's t_end, else the SDE's t_min, unless given.
        refinement: which samples a log-likelihood solves again with more steps; none unless given.

    Raises:
        UserError: for a solver or a flow that is none, a grid for an adaptive solver, a t_min that is not positive or not
            the grid's t_end.

    >>> Method().solver
    Dopri5(rtol=1e-05, atol=1e-05, max_steps=2000)
    """

    solver: Solver = field(default_factory=Dopri5)
    _: KW_ONLY
    flow: Flow = field(default_factory=WhitenedFlow)
    grid: TimeGrid | Sequence[float] | Tensor | None = None
    t_min: float | None = None
    refinement: Refinement | None = None

    def __post_init__(self) -> None:
        if isinstance(self.solver, Method):
            raise UserError(
                "got a Method as the solver of a Method; expected a solver of numerics such as Dopri5(): give the method "
                "itself as method=..., or its solver as method.solver"
            )
        if not isinstance(self.solver, Solver):
            raise UserError(
                f"got solver={self.solver!r}; expected a solver of numerics, such as Dopri5() or Adams(steps=64): "
                "log_likelihood(sde, score, x, method=Method(Adams(steps=64)))"
            )
        if not isinstance(self.flow, Flow):
            raise UserError(f"got flow={self.flow!r}; expected a flow of sde_lib, such as WhitenedFlow(data_std=0.5)")
        if self.grid is not None and not isinstance(self.grid, TimeGrid):
            if not isinstance(self.grid, (Tensor, list, tuple)):
                raise UserError(
                    f"got grid={self.grid!r}; expected a grid such as Karras(), or times (N+1,) from T to t_min"
                )
            object.__setattr__(self, "grid", Custom(times=self.grid))
        if self.grid is not None and self.solver.adaptive:
            raise UserError(
                f"got a grid with {type(self.solver).__name__}, which chooses its own steps; "
                "expected a solver of fixed steps, such as Adams(steps=64), or no grid"
            )
        if self.refinement is not None and (self.solver.adaptive or getattr(self.grid, "steps", None) is not None):
            raise UserError(
                f"got a refinement with {type(self.solver).__name__} on {type(self.grid).__name__}; expected a solver of fixed "
                "steps on a grid that is a rule, or no refinement"
            )
        object.__setattr__(self, "solver", fit_steps(self.solver, self._grid))
        if self.t_min is not None:
            require_positive(self.t_min, "t_min")
        end = None if self._grid is None else self._grid.t_end
        if self.t_min is not None and end is not None and not math.isclose(end, self.t_min, rel_tol=1e-6):
            raise UserError(f"got t_min={self.t_min} and a grid that ends at {end}; expected one time: leave t_min out")

    @property
    def _grid(self) -> TimeGrid | None:
        return self.grid  # type: ignore[return-value]

    @classmethod
    def of(cls, method: Method | None) -> Method:
        """`method`, or the default one for None.

        Raises:
            UserError: for anything else, such as a solver.
        """
        if method is None:
            return cls()
        if isinstance(method, Solver):
            raise UserError(
                f"got method={method!r}, a solver; expected a Method: method=Method({type(method).__name__}(...))"
            )
        if not isinstance(method, Method):
            raise UserError(
                f"got method={method!r}; expected a Method, such as Method(), likelihood.accurate() or "
                "likelihood.fast(sde, score, x)"
            )
        return method

    def time(self, sde: SDE) -> float:
        """t_min, the time at which the density is taken.

        Raises:
            UserError: for one outside (0, T).
        """
        end = None if self._grid is None else self._grid.t_end
        t_min = next(float(t) for t in (self.t_min, end, sde.t_min) if t is not None)
        if not 0 < t_min < sde.T:
            raise UserError(f"got t_min={t_min}; expected a time in (0, {sde.T})")
        return t_min

    def finer(self) -> Method | None:
        """The same method with half as many steps again, not refined; None for an adaptive solver, or a grid of own times."""
        if self.solver.adaptive or getattr(self.grid, "steps", None) is not None:
            return None
        steps = self.solver.steps
        return self.with_steps(steps + max(1, steps // 2))

    def with_steps(self, steps: int) -> Method:
        """The same method with so many steps, and no refinement."""
        return replace(self, solver=self.solver.with_steps(steps), refinement=None)

    def clock(self, sde: SDE, *, down: bool = False) -> tuple[FlowTimes, Tensor | None]:
        """The flow's clock from t_min up to T, or `down` from T to t_min, and the nodes `(N+1,)` in it, if there is a grid.

        Raises:
            UserError: for a t_min outside (0, T), a grid that does not start at T, or one that the SDE cannot resolve.
        """
        t_min, grid = self.time(sde), self._grid
        times = FlowTimes(self.flow, sde, sde.T, t_min) if down else FlowTimes(self.flow, sde, t_min, sde.T)
        if grid is None:
            return times, None
        start = sde.T if grid.t_start is None else grid.t_start
        if not math.isclose(start, sde.T, rel_tol=1e-6):
            raise UserError(
                f"got a grid that starts at t = {start:.6g}; expected T = {sde.T:.6g}, the time at which the law is "
                "known, the prior: leave t_start out"
            )
        t = grid.between(sde, start, t_min if grid.t_end is None else grid.t_end, self.solver.steps)
        return times, times.nodes(t if down else t.flip(0))
