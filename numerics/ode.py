"""Initial value problems dy/du = F(u, y) for a batch of independent samples.

The samples of a batch are separate problems that happen to be evaluated together. So everything here is *per sample*:
the step size, the error norm, the end and the status. A sample that has arrived leaves the batch, and what it gets
does not depend on its batch mates.

- A *state* is a tuple of tensors `(B, *)`, for instance `(x, log p)`.
- A *field* is called as `field(u, state) -> state` with `u` of shape `(B,)`, float64. One that holds per-sample data
  has `field.take(index) -> field` for the samples that remain. One whose slopes share a known factor of the clock has
  `field.weight(u) -> Tensor`, elementwise, which multistep methods integrate exactly (`numerics.multistep`).
- A *solver* is called as `solver(field, state, u_0, u_1) -> Solution`, forwards (u_1 > u_0) or backwards. It has
  `order`, its order of convergence, and is `adaptive`, or takes a fixed number of `steps`.

Here are two Runge-Kutta methods on a grid, `Heun` and `RK4`, and the adaptive pair `Dopri5`. `numerics.multistep` has methods
of one evaluation a step, and `numerics.external` other people's solvers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from numerics.broadcast import expand_as
from numerics.checks import require_count
from numerics.errors import UserError

State = tuple[Tensor, ...]
Field = Callable[[Tensor, State], State]
Callback = Callable[[Tensor, State], None]
Taken = TypeVar("Taken")


class Status(IntEnum):
    """How a sample's integration ended: `DONE` is 0, everything else a failure that `explain` puts into words."""

    DONE = 0
    MAX_STEPS = 1  # too many steps: loosen the tolerance or raise max_steps
    NONFINITE = 2  # the field or the state is not finite
    UNDERFLOW = 3  # the step has become too small for the clock's precision: the tolerance cannot be met

    def explain(self) -> str:
        """What happened and what to do about it, in a line."""
        return {
            Status.DONE: "done",
            Status.MAX_STEPS: "the maximum number of steps was reached: loosen the tolerance or raise max_steps",
            Status.NONFINITE: "the field is not finite: look at the network at the time that is named",
            Status.UNDERFLOW: "the step became too small: the tolerance cannot be met in this precision, loosen it",
        }[self]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a solver returns.

    Attributes:
        y: the state at the end, each part `(B, *)`.
        u: `(B,)`, the clock's value that each sample has reached: u_1 unless it failed.
        status: `(B,)`, int64, see `Status`.
        error: an estimate of the accumulated error for each part of the state, `(B,)` in the part's own units (root
            mean square over its entries), or NaN from a method that makes none.
        evaluations: `(B,)`, int64: how many evaluations of the field each sample took part in.
        nodes: `(N+1,)`, the grid, or None from an adaptive method.
        path: the first part of the state at the nodes, `(N+1, B, *)`, where asked for and fixed.
    """

    y: State
    u: Tensor
    status: Tensor
    error: tuple[Tensor, ...]
    evaluations: Tensor
    nodes: Tensor | None = None
    path: Tensor | None = None


def take(field: Taken, index: Tensor) -> Taken:
    """`field` (or a score) for the samples at `index` `(b,)`: its own `take` where it holds per-sample data, else itself."""
    taker: Callable[[Tensor], Taken] | None = getattr(field, "take", None)
    return field if taker is None else taker(index)


class Solver(ABC):
    """A method for initial value problems dy/du = F(u, y).

    A solver is a frozen dataclass of options. `adaptive` says all that a caller has to ask: an adaptive solver chooses its
    own steps by the error it estimates, takes no nodes and keeps no path; another one has `steps` equal ones, or goes along
    the nodes it is given.

    Attributes:
        order: of convergence: the error falls like the step's length to this power.
        adaptive: does it choose its steps by itself?
        steps: how many it takes, if it does not.
    """

    order: ClassVar[int]
    adaptive: ClassVar[bool]
    steps: int

    def evaluations(self, steps: int) -> int | None:
        """Evaluations of the field in a run of so many steps; None from an adaptive solver, which cannot know."""
        return None

    def with_steps(self, steps: int) -> Self:
        """The same method with another number of steps.

        Raises:
            UserError: from an adaptive solver.
        """
        if self.adaptive:
            raise UserError(
                f"got steps={steps} for {self!r}, which chooses its own steps; "
                "expected a solver of fixed steps, such as RK4(steps=...)"
            )
        method: Any = self  # a dataclass, of which this class cannot know
        changed: Self = replace(method, steps=steps)
        return changed

    @abstractmethod
    def __call__(
        self,
        field: Field,
        y: State,
        u_0: float,
        u_1: float,
        *,
        nodes: Tensor | None = None,
        keep_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        """Integrates from `u_0` to `u_1`.

        Args:
            field: dy/du, as `field(u, y)` with u `(B,)`, float64.
            y: the state at `u_0`, each part `(B, *)`, floating.
            u_0, u_1: the clock at the beginning and at the end; either may be the larger.
            nodes: `(N+1,)` for a method of fixed steps, strictly monotone from `u_0` to `u_1`.
            keep_path: keep the first part of the state at all nodes (methods of fixed steps only).
            callback: called as `callback(u, y)` after every step, with the whole batch.

        Raises:
            UserError: for nodes that are not monotone or do not lead from u_0 to u_1; for nodes or a path from an adaptive
                solver.
        """


class RungeKutta(Solver):
    """An explicit Runge-Kutta method on a grid that is the same for all samples; `stages` evaluations of the field a step."""

    adaptive: ClassVar[bool] = False

    @abstractmethod
    def step(self, field: Field, u: Tensor, h: Tensor, y: State) -> State:
        """One step from `u` to `u + h`, both `()`."""

    @property
    @abstractmethod
    def stages(self) -> int:
        """Evaluations of the field a step."""

    def evaluations(self, steps: int) -> int:
        """`stages` times `steps`."""
        return self.stages * steps

    def __call__(
        self,
        field: Field,
        y: State,
        u_0: float,
        u_1: float,
        *,
        nodes: Tensor | None = None,
        keep_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        x = y[0]
        nodes = grid_nodes(self.steps, u_0, u_1, nodes, x.device)
        watch = LastFinite(x.shape[0], nodes[0], x.device)
        path = [x] if keep_path else None
        for u, s in zip(nodes[:-1], nodes[1:], strict=True):
            y = self.step(field, u, s - u, y)
            watch.see(s, y)
            if path is not None:
                path.append(y[0])
            if callback is not None:
                callback(s.expand(x.shape[0]), y)
        nan = torch.full((x.shape[0],), math.nan, dtype=torch.float64, device=x.device)
        return Solution(
            y=y,
            u=watch.u,
            status=watch.status,
            error=(nan,) * len(y),
            evaluations=torch.full_like(watch.status, self.stages * (len(nodes) - 1)),
            nodes=nodes,
            path=None if path is None else torch.stack(path),
        )


def grid_nodes(steps: int, u_0: float, u_1: float, nodes: Tensor | None, device: torch.device | str | None) -> Tensor:
    """The nodes `(N+1,)` in float64: `steps` equal steps, or the caller's.

    Raises:
        UserError: for nodes that are not strictly monotone, or that do not begin at u_0 and end at u_1.
    """
    if nodes is None:
        return torch.linspace(u_0, u_1, steps + 1, dtype=torch.float64, device=device)
    h = nodes.diff()
    if nodes.ndim != 1 or len(nodes) < 2 or not bool(((h > 0).all() | (h < 0).all()) & nodes.isfinite().all()):
        raise UserError(
            f"got nodes of shape {tuple(nodes.shape)} that are not strictly monotone; "
            f"expected (N+1,) with N >= 1, from {u_0:.6g} to {u_1:.6g}"
        )
    first, last = float(nodes[0]), float(nodes[-1])
    if max(abs(first - u_0), abs(last - u_1)) > 1e-6 * abs(u_1 - u_0):  # nodes may come in float32
        raise UserError(
            f"got nodes from {first:.6g} to {last:.6g} for an integration from {u_0:.6g} to {u_1:.6g}; "
            "expected nodes that begin and end there: what is left out would not be integrated"
        )
    return nodes.to(device=device, dtype=torch.float64)


def refuse_grid(solver: Solver, nodes: Tensor | None, keep_path: bool) -> None:
    """Refuses nodes and a path for an adaptive solver, with a UserError."""
    if nodes is not None or keep_path:
        raise UserError(
            f"got {'nodes' if nodes is not None else 'keep_path=True'} with {type(solver).__name__}, which chooses its own "
            "steps; expected neither: use a solver of fixed steps, such as Heun(steps=...) or RK4(steps=...)"
        )


def require_tolerances(rtol: float, atol: float) -> None:
    """Refuses tolerances of which none is positive, or that are below what float64 can resolve, with a UserError."""
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0 and math.isfinite(rtol + atol)):
        raise UserError(f"got rtol={rtol}, atol={atol}; expected numbers >= 0, one of them > 0")
    if max(rtol, atol) < 1e-14:
        raise UserError(f"got rtol={rtol}, atol={atol}; expected one of them >= 1e-14: float64 has no more digits")


class LastFinite:
    """Which samples have become non-finite, and the last node at which each was finite; without stopping the device.

    Attributes:
        status: `(B,)`, int64, `Status.DONE` or `Status.NONFINITE` so far.
        u: `(B,)`, float64, the last node at which the sample was finite.
    """

    def __init__(self, batch: int, u_0: Tensor, device: torch.device | str | None) -> None:
        self.status = torch.zeros(batch, dtype=torch.int64, device=device)
        self.u = u_0.expand(batch)

    def see(self, u: Tensor, y: State) -> None:
        """Notes the state `y` at the node `u` `()`."""
        finite = _finite(y)
        self.status = torch.where(finite & (self.status == 0), self.status, int(Status.NONFINITE))
        self.u = torch.where(self.status == 0, u, self.u)


def combine(y: State, h: Tensor, slopes: Sequence[tuple[float, State]]) -> State:
    """`y + h * sum of c_i k_i`, part by part; `h` is `()` or `(B,)`."""
    return tuple(part + expand_as(h, part) * sum(c * k[i] for c, k in slopes if c != 0) for i, part in enumerate(y))


@dataclass(frozen=True, kw_only=True)
class Heun(RungeKutta):
    """Heun's method: order 2, two evaluations a step.

        k_1 = F(u, y),   k_2 = F(u + h, y + h k_1),   y(u + h) = y + h (k_1 + k_2) / 2

    (Hairer, Norsett, Wanner 1993, "Solving Ordinary Differential Equations I", II.1.)

    Args:
        steps: number of steps of equal length in the clock, where no nodes are given.

    >>> decay = lambda u, y: (-y[0],)
    >>> y = (torch.ones(1, 1, dtype=torch.float64),)
    >>> round(float(Heun(steps=100)(decay, y, 0.0, 1.0).y[0]), 4)
    0.3679
    """

    steps: int = 100
    order: ClassVar[int] = 2
    stages: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")

    def step(self, field: Field, u: Tensor, h: Tensor, y: State) -> State:
        u = u.expand(y[0].shape[0])
        k_1 = field(u, y)
        k_2 = field(u + h, combine(y, h, [(1.0, k_1)]))
        return combine(y, h, [(0.5, k_1), (0.5, k_2)])


@dataclass(frozen=True, kw_only=True)
class RK4(RungeKutta):
    """The classical Runge-Kutta method: order 4, four evaluations a step.

        k_1 = F(u, y),   k_2 = F(u + h/2, y + h k_1 / 2),   k_3 = F(u + h/2, y + h k_2 / 2),   k_4 = F(u + h, y + h k_3),
        y(u + h) = y + h (k_1 + 2 k_2 + 2 k_3 + k_4) / 6

    (Hairer, Norsett, Wanner 1993, "Solving Ordinary Differential Equations I", II.1.)

    Args:
        steps: number of steps of equal length in the clock, where no nodes are given.
    """

    steps: int = 50
    order: ClassVar[int] = 4
    stages: ClassVar[int] = 4

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")

    def step(self, field: Field, u: Tensor, h: Tensor, y: State) -> State:
        u = u.expand(y[0].shape[0])
        k_1 = field(u, y)
        k_2 = field(u + h / 2, combine(y, h, [(0.5, k_1)]))
        k_3 = field(u + h / 2, combine(y, h, [(0.5, k_2)]))
        k_4 = field(u + h, combine(y, h, [(1.0, k_3)]))
        return combine(y, h, [(1 / 6, k_1), (1 / 3, k_2), (1 / 3, k_3), (1 / 6, k_4)])


# Dormand and Prince (1980): nodes, weights of the stages, and the difference of the fifth and fourth order weights.
_C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


@dataclass(frozen=True, kw_only=True)
class Dopri5(Solver):
    """The Dormand-Prince pair of orders 5(4) with a step size, an error norm and a status per sample.

    A step h is accepted where, for every part of the state,

        rms over its entries of   e / (atol + rtol max(|y(u)|, |y(u + h)|))   <=   1,

    e the difference of the solutions of fifth and fourth order. The next step is 0.9 h r^-0.14 r_last^0.08 with that norm r,
    within factors of 0.2 and 5. Six evaluations a step (the seventh is the next step's first), those of refused steps
    counted. Backpropagation goes through the accepted steps; their sizes count as constants.

    (Dormand and Prince 1980; tableau and starting step in Hairer, Norsett, Wanner 1993, "Solving Ordinary Differential
    Equations I", II.5 and II.4; PI step control in Hairer and Wanner 1996, volume II, IV.2.)

    Args:
        rtol, atol: relative and absolute tolerance of a step, per entry of the state.
        max_steps: attempts after which a sample is given up with `Status.MAX_STEPS`.

    Raises:
        UserError: for tolerances that float64 cannot meet, or max_steps < 1.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 2_000
    order: ClassVar[int] = 5
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_tolerances(self.rtol, self.atol)
        require_count(self.max_steps, "max_steps")

    def __call__(
        self,
        field: Field,
        y: State,
        u_0: float,
        u_1: float,
        *,
        nodes: Tensor | None = None,
        keep_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        refuse_grid(self, nodes, keep_path)
        x = y[0]
        batch, device = x.shape[0], x.device
        ids = torch.arange(batch, device=device)
        done: list[tuple[Tensor, State]] = []
        end_u = torch.full((batch,), float(u_0), dtype=torch.float64, device=device)
        end_status = torch.zeros(batch, dtype=torch.int64, device=device)
        evaluations = torch.zeros(batch, dtype=torch.int64, device=device)
        total_error = [torch.zeros(batch, dtype=torch.float64, device=device) for _ in y]
        sign = 1.0 if u_1 >= u_0 else -1.0
        span = abs(float(u_1) - float(u_0))
        # below this a step is lost in the rounding of the clock
        tiny = 16 * torch.finfo(torch.float64).eps * max(abs(float(u_0)), abs(float(u_1)), span)

        u = torch.full((batch,), float(u_0), dtype=torch.float64, device=device)
        k_1 = field(u, y)
        h = self._first_step(field, u, y, k_1, sign, span)
        evaluations += 2
        last = torch.ones(
            batch, dtype=torch.float64, device=device
        )  # the last accepted step's error ratio, for the PI control
        broken = torch.zeros(batch, dtype=torch.bool, device=device)  # the last attempt met a value that is not finite

        for attempt in range(self.max_steps + 1):
            left = (float(u_1) - u).abs()
            status = torch.full_like(ids, -1)
            status[left <= tiny] = int(Status.DONE)
            running = status < 0
            status[running & ~_finite(k_1)] = int(Status.NONFINITE)
            stuck = running & (status < 0) & (h < tiny)
            status[stuck] = torch.where(broken, int(Status.NONFINITE), int(Status.UNDERFLOW))[stuck]
            if attempt == self.max_steps:
                status[status < 0] = int(Status.MAX_STEPS)
            leave = status >= 0
            if bool(leave.any()):
                gone = leave.nonzero().squeeze(1)
                end_u[ids[gone]], end_status[ids[gone]] = u[gone], status[gone]
                done.append((ids[gone], tuple(part[gone] for part in y)))
                stay = (~leave).nonzero().squeeze(1)
                if len(stay) == 0:
                    break
                ids, u, h, left = ids[stay], u[stay], h[stay], left[stay]
                last, broken = last[stay], broken[stay]
                y, k_1 = tuple(part[stay] for part in y), tuple(part[stay] for part in k_1)
                field = take(field, stay)

            h = torch.minimum(h, left)
            signed = sign * h
            ks = [k_1]
            for c, row in zip((*_C[1:], 1.0), _A, strict=False):
                y_new = combine(y, signed, list(zip(row, ks, strict=True)))
                # the last two stages are at the end itself, which rounding must not overstep
                u_stage = u + c * signed if c < 1 else torch.where(h >= left, float(u_1), u + signed)
                ks.append(field(u_stage, y_new))
            evaluations[ids] += 6
            errors = [
                (expand_as(signed, part) * sum(e * k[i] for e, k in zip(_E, ks, strict=True) if e != 0)).detach()
                for i, part in enumerate(y)
            ]
            ratio = torch.stack(
                [
                    rms(error / (self.atol + self.rtol * torch.maximum(a.detach().abs(), b.detach().abs())))
                    for error, a, b in zip(errors, y, y_new, strict=True)
                ]
            ).amax(dim=0)
            broken = ~(ratio.isfinite() & _finite(ks[-1]))
            ratio = torch.where(broken, math.inf, ratio)
            accept = ratio <= 1
            # PI control: exponents 0.7/5 and 0.4/5; after a rejection the plain one of the order
            ratio = ratio.clamp(min=1e-10)
            grow = torch.where(accept, 0.9 * ratio**-0.14 * last**0.08, 0.9 * ratio**-0.2)
            grow = grow.clamp(0.2, 5.0)
            u = torch.where(accept, u_stage, u)
            h = h * torch.where(accept, grow, grow.clamp(max=0.9))
            last = torch.where(accept, ratio, last)
            for total, error in zip(total_error, errors, strict=True):
                total[ids] += torch.where(accept, rms(error), 0.0)
            y = tuple(torch.where(expand_as(accept, new), new, old) for new, old in zip(y_new, y, strict=True))
            k_1 = tuple(torch.where(expand_as(accept, n), n, o) for n, o in zip(ks[-1], k_1, strict=True))
            if callback is not None:
                callback(*_whole(batch, u, ids, y, done, end_u))

        order = torch.cat([i for i, _ in done]).argsort()
        y_end = tuple(torch.cat(parts)[order] for parts in zip(*(parts for _, parts in done), strict=True))
        return Solution(y=y_end, u=end_u, status=end_status, error=tuple(total_error), evaluations=evaluations)

    def _first_step(self, field: Field, u: Tensor, y: State, k_1: State, sign: float, span: float) -> Tensor:
        """Hairer, Norsett, Wanner II.4, per sample."""

        def norm(parts: State, scales: list[Tensor]) -> Tensor:
            return torch.stack([rms(p.detach() / s) for p, s in zip(parts, scales, strict=True)]).amax(dim=0)

        scales = [self.atol + self.rtol * part.detach().abs() for part in y]
        d_0, d_1 = norm(y, scales), norm(k_1, scales)
        h_0 = torch.where((d_0 < 1e-5) | (d_1 < 1e-5), 1e-6, 0.01 * d_0 / d_1).clamp(max=span)
        k_2 = field(u + sign * h_0, combine(y, sign * h_0, [(1.0, k_1)]))
        d_2 = norm(tuple(b - a for a, b in zip(k_1, k_2, strict=True)), scales) / h_0
        biggest = torch.maximum(d_1, d_2)
        h_1 = torch.where(biggest <= 1e-15, (h_0 * 1e-3).clamp(min=1e-6), (0.01 / biggest) ** 0.2)
        h = torch.minimum(100 * h_0, h_1).clamp(max=span)
        return torch.where(h.isfinite() & (h > 0), h, 1e-3 * span)


def _whole(
    batch: int, u: Tensor, ids: Tensor, y: State, done: list[tuple[Tensor, State]], end_u: Tensor
) -> tuple[Tensor, State]:
    """The clock and the state of the whole batch, those that have left included."""
    order = torch.cat([ids, *(i for i, _ in done)]).argsort()
    state = tuple(torch.cat(parts)[order] for parts in zip(y, *(p for _, p in done), strict=True))
    return end_u.index_put((ids,), u), state


def rms(x: Tensor) -> Tensor:
    """Root mean square over all but the first axis, `(B,)`, float64."""
    return x.flatten(1).to(torch.float64).square().mean(dim=1).sqrt()


def _finite(parts: State) -> Tensor:
    return torch.stack([part.detach().flatten(1).isfinite().all(dim=1) for part in parts]).all(dim=0)
