"""Carrying a batch along the probability flow, from one time to another: encoding, decoding, and sampling by the ODE.

The flow is invertible: from small times up to T it takes data to latents, and back down latents to data (Song et al. 2021,
"Score-Based Generative Modeling through Stochastic Differential Equations", arXiv:2011.13456, section 4.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from numerics import Solver, Status, UserError, batch_time, expand_as, ordinary, ordinary_mode, require_float64
from sde_lib.probability_flow import FlowField, FlowTimes
from sde_lib.score import CountedScore, Score
from sde_lib.time_grids import TimeGrid

OnStep = Callable[[Tensor, Tensor, int], None]
"""Called after a step as `on_step(t, x, nfe)`: times `(B,)`, states `(B, *)`, and calls of the score so far."""


@dataclass(frozen=True, kw_only=True)
class Transported:
    """Where the flow has taken a batch.

    Attributes:
        x: the state at the other end, `(B, *)`: a latent from `encode`, data from `decode`. Only samples that `converged` are
            right.
        solver_error: `(B,)`, the solver's estimate of the error of `x`, root mean square per entry; NaN where it makes none.
        status: `(B,)`, see `numerics.Status`.
        reached: `(B,)`, the time to which each sample came.
        nfe: calls of the score, whatever the batch; evaluations: `(B,)`, those that each sample took part in.
        times: `(N+1,)`, float64, on the CPU, the grid's; None from an adaptive solver.
        path: `(N+1, B, *)`, the states at those times, where they were asked for.
    """

    x: Tensor
    solver_error: Tensor
    status: Tensor
    reached: Tensor
    nfe: int
    evaluations: Tensor
    times: Tensor | None = None
    path: Tensor | None = None

    @property
    def converged(self) -> Tensor:
        """`(B,)`: arrived, and finite."""
        return (self.status == int(Status.DONE)) & self.x.flatten(1).isfinite().all(dim=1)


def transport(
    times: FlowTimes,
    score: Score,
    x: Tensor,
    solver: Solver,
    *,
    nodes: Tensor | None = None,
    keep_path: bool = False,
    on_step: OnStep | None = None,
) -> Transported:
    """The states at `times.end` of the states `x` `(B, *)` at `times.start`, without gradients.

    In float64 whatever the dtype of x, which is that of the result and in which the score is asked.

    Args:
        times: the clock of the flow, with its SDE, its beginning and its end.
        solver: of `numerics`.
        nodes: the clock's values `(N+1,)` at which a solver of fixed steps stops, as `times.nodes` makes them.
        keep_path: keep the states at all nodes.
        on_step: called after each step.

    Raises:
        UserError: for an `x` that is not a floating batch `(B, *)`, and as the solver does.
    """
    check_batch(x)
    require_float64(x, "an ODE's state")
    flow, sde = times.flow, times.sde
    counted = CountedScore(score)
    w = ordinary(x.detach()).to(torch.float64)
    w = w / expand_as(flow.scale(sde, batch_time(times.start, w)), w)

    def inform(u: Tensor, state: tuple[Tensor, ...]) -> None:
        t = times.time(u)
        now = (expand_as(flow.scale(sde, t), state[0]) * state[0]).to(x.dtype)
        on_step(t, now, counted.nfe)  # type: ignore[misc]

    with ordinary_mode(x.device), torch.no_grad():
        found = solver(
            FlowField(times, counted, x.dtype),
            (w,),
            times.u_0,
            times.u_1,
            nodes=None if nodes is None else nodes.to(x.device),
            keep_path=keep_path,
            callback=None if on_step is None else inform,
        )
    scale = flow.scale(sde, batch_time(times.end, w))
    at, path = None, None
    if found.nodes is not None:
        at = times.time(found.nodes).to("cpu")
        at[0], at[-1] = times.start, times.end
        if found.path is not None:
            path = (expand_as(flow.scale(sde, at), found.path) * found.path).to(x.dtype)
    return Transported(
        x=(expand_as(scale, w) * found.y[0]).to(x.dtype),
        solver_error=found.error[0] * scale,
        status=found.status,
        reached=times.time(found.u),
        nfe=counted.nfe,
        evaluations=found.evaluations,
        times=at,
        path=path,
    )


def check_batch(x: Tensor) -> None:
    """Refuses what is not a floating batch `(B, *)` of one sample or more, with a UserError."""
    if not x.is_floating_point():
        raise UserError(
            f"got x of {x.dtype}; expected a floating batch (B, *): convert it with x.to(torch.float32), or score grey "
            "values with bits_per_dim"
        )
    if x.ndim < 2 or x.numel() == 0:
        hint = f": give {len(x)} samples of one dimension as x.unsqueeze(1)" if x.ndim == 1 and len(x) else ""
        raise UserError(f"got x of shape {tuple(x.shape)}; expected a floating batch (B, *), B >= 1{hint}")


def fit_steps(solver: Solver, grid: TimeGrid | None) -> Solver:
    """`solver` with the number of steps of a `grid` that has its own (`Custom`); else as it is.

    Raises:
        UserError: where the solver asks for another number than its class does by default.
    """
    own: int | None = getattr(grid, "steps", None)
    if own is None or solver.adaptive or solver.steps == own:
        return solver
    default = next((f.default for f in fields(solver) if f.name == "steps"), None)  # type: ignore[arg-type]
    if solver.steps != default:
        raise UserError(
            f"got {solver!r} and a grid of {own + 1} times; expected steps={own}: leave steps out of the solver"
        )
    return solver.with_steps(own)
