"""Other people's solvers behind the same call as ours, for comparison with the literature.

Both take the batch as *one* system: the step size and the error norm are shared, so a sample's value depends on its
batch mates. Use `Dopri5` for values to quote, and these to reproduce what others did. The packages are imported when a
solver is called, not before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from numerics.checks import require_choice, require_count
from numerics.errors import UserError
from numerics.ode import Callback, Field, Solution, Solver, State, Status, refuse_grid, require_tolerances

if TYPE_CHECKING:
    import numpy as np

_SCIPY_ORDERS = {"RK45": 5, "RK23": 3, "DOP853": 8, "Radau": 5, "BDF": 5, "LSODA": 12}  # of the last two the highest
_TORCHDIFFEQ_ORDERS = {"dopri5": 5, "dopri8": 8, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}


class _Guarded:
    """The field for an outside solver: counted, bounded, kept inside the interval, finite."""

    def __init__(self, field: Field, u_0: float, u_1: float, limit: int) -> None:
        self.field, self.limit, self.calls = field, limit, 0
        self.low, self.high = min(u_0, u_1), max(u_0, u_1)

    def __call__(self, u: float, y: State) -> State:
        self.calls += 1
        if self.calls > self.limit:
            raise _IntegrationError(Status.MAX_STEPS, u)
        # torchdiffeq evaluates past the end of the interval, where a schedule may not be defined
        u = min(max(float(u), self.low), self.high)
        slope = self.field(torch.full((y[0].shape[0],), u, dtype=torch.float64, device=y[0].device), y)
        if not all(bool(part.isfinite().all()) for part in slope):
            raise _IntegrationError(Status.NONFINITE, u)
        return slope


class _IntegrationError(ArithmeticError):
    """Ends an integration; only from an adjoint one, whose caller is autograd, does it reach the user."""

    def __init__(self, status: Status, u: float) -> None:
        super().__init__(f"got a backward integration of torchdiffeq that ended at u = {u:.6g}: {status.explain()}")
        self.status, self.u = status, u


def _solution(y: State, status: Status, u: float, calls: int) -> Solution:
    batch, device = y[0].shape[0], y[0].device
    nan = torch.full((batch,), math.nan, dtype=torch.float64, device=device)
    if status is not Status.DONE:
        y = tuple(torch.full_like(part, math.nan) for part in y)
    return Solution(
        y=y,
        u=torch.full_like(nan, u),
        status=torch.full((batch,), int(status), dtype=torch.int64, device=device),
        error=(nan,) * len(y),
        evaluations=torch.full((batch,), calls, dtype=torch.int64, device=device),
    )


@dataclass(frozen=True)
class SciPy(Solver):
    """`scipy.integrate.solve_ivp` on the flattened batch in float64, as the score_sde code runs it.

    The batch is one system: a step is accepted where the root mean square of e / (atol + rtol |y|) over all samples' entries
    is at most 1, so a sample's value depends on its batch mates. It estimates no error of the whole (NaN).

    Args:
        method: RK45 (Dormand and Prince 1980), RK23, DOP853, Radau, BDF or LSODA.
        rtol, atol: tolerances of a step; `atol` equals `rtol` unless given.
        max_evaluations: more end the integration with `Status.MAX_STEPS`.

    Raises:
        UserError: for another method, or tolerances that float64 cannot meet.
    """

    method: str = "RK45"
    rtol: float = 1e-5
    atol: float | None = None
    max_evaluations: int = 20_000
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice(self.method, "method", tuple(_SCIPY_ORDERS))
        require_tolerances(self.rtol, _absolute(self.rtol, self.atol))
        require_count(self.max_evaluations, "max_evaluations")

    @property
    def order(self) -> int:  # type: ignore[override]
        """Of the method; the highest that one of variable order reaches."""
        return _SCIPY_ORDERS[self.method]

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
        from scipy.integrate import solve_ivp

        refuse_grid(self, nodes, keep_path)
        guarded = _Guarded(field, u_0, u_1, self.max_evaluations)

        def unpack(vector: np.ndarray[Any, np.dtype[np.float64]]) -> State:
            parts = torch.from_numpy(vector).split_with_sizes([part.numel() for part in y])
            return tuple(
                p.reshape(part.shape).to(dtype=part.dtype, device=part.device) for p, part in zip(parts, y, strict=True)
            )

        def pack(state: State) -> np.ndarray[Any, np.dtype[np.float64]]:
            return torch.cat([p.detach().to("cpu", torch.float64).flatten() for p in state]).numpy()

        def slope(u: float, vector: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
            state = unpack(vector)
            if callback is not None:
                callback(torch.full((state[0].shape[0],), u, dtype=torch.float64), state)
            return pack(guarded(u, state))

        try:
            atol = _absolute(self.rtol, self.atol)
            found = solve_ivp(slope, (u_0, u_1), pack(y), method=self.method, rtol=self.rtol, atol=atol)
        except _IntegrationError as stop:
            return _solution(y, stop.status, stop.u, guarded.calls)
        status = Status.DONE if found.success else Status.UNDERFLOW
        return _solution(unpack(found.y[:, -1]), status, float(found.t[-1]), guarded.calls)


@dataclass(frozen=True)
class TorchDiffEq(Solver):
    """`torchdiffeq.odeint`, or `odeint_adjoint`, on the batch as one system.

    Steps are accepted by the root mean square of e / (atol + rtol |y|) over the whole batch, so a sample's value depends on its
    batch mates. It gives no estimate of the total error (NaN). The state is float32 or float64.

    Args:
        method: dopri5, dopri8, bosh3, fehlberg2 or adaptive_heun.
        rtol, atol: tolerances; `atol` equals `rtol` unless given.
        max_evaluations: more end the integration with `Status.MAX_STEPS`; for an adjoint's way back, counted anew, with
            an ArithmeticError.
        adjoint: differentiate by a second integration, backwards (Chen et al. 2018, arXiv:1806.07366, algorithm 1): memory
            does not grow with the steps, and gradients are right to the tolerance, not to rounding.
        kept: with `adjoint`, at how many equal parts of the way the state is kept, from which the way back begins anew. From
            the end alone it retraces the whole: where the flow contracts, what it is off by grows on the way back, by e^12 for
            dx/du = -12 x, whose derivative by the rate is 7.5 times too large at 1e-3 with 1, and right to 0.1 % with 16.
        parameters: with `adjoint`, the tensors besides the state that gradients are wanted for, such as
            `tuple(network.parameters())`; the integration cannot find them by itself.

    Raises:
        UserError: for another method, tolerances that float64 cannot meet, or parameters without `adjoint`.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float | None = None
    max_evaluations: int = 20_000
    adjoint: bool = False
    kept: int = 16
    parameters: tuple[Tensor, ...] = dataclass_field(default=(), repr=False, compare=False)
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.parameters and not self.adjoint:
            raise UserError(
                f"got {len(self.parameters)} parameters for TorchDiffEq(adjoint=False), whose gradients autograd finds; "
                "expected none, or adjoint=True"
            )
        object.__setattr__(self, "parameters", tuple(self.parameters))  # not a generator, which serves only once
        require_choice(self.method, "method", tuple(_TORCHDIFFEQ_ORDERS))
        require_tolerances(self.rtol, _absolute(self.rtol, self.atol))
        require_count(self.max_evaluations, "max_evaluations")
        require_count(self.kept, "kept")

    @property
    def order(self) -> int:  # type: ignore[override]
        """Of the method."""
        return _TORCHDIFFEQ_ORDERS[self.method]

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
        from torchdiffeq import odeint, odeint_adjoint

        refuse_grid(self, nodes, keep_path)
        if any(part.dtype not in (torch.float32, torch.float64) for part in y):
            raise UserError(
                f"got a state of {[str(p.dtype) for p in y]}; expected float32 or float64, "
                "in which torchdiffeq is right"
            )
        guarded = _Guarded(field, u_0, u_1, self.max_evaluations)

        def slope(u: Tensor, state: State) -> State:
            if callback is not None:
                callback(u.to(torch.float64).expand(state[0].shape[0]), state)
            return guarded(float(u.detach()), state)

        parts = self.kept if self.adjoint else 1
        ends = torch.linspace(u_0, u_1, parts + 1, dtype=torch.float64, device=y[0].device)
        try:
            tolerances = {"method": self.method, "rtol": self.rtol, "atol": _absolute(self.rtol, self.atol)}
            if self.adjoint:
                found = odeint_adjoint(slope, y, ends, adjoint_params=self.parameters, **tolerances)
            else:
                found = odeint(slope, y, ends, **tolerances)
        except _IntegrationError as stop:
            return _solution(y, stop.status, stop.u, guarded.calls)
        except AssertionError:  # torchdiffeq's word for a step size that underflows
            return _solution(y, Status.UNDERFLOW, u_0, guarded.calls)
        calls, guarded.calls = guarded.calls, 0
        return _solution(tuple(part[-1] for part in found), Status.DONE, u_1, calls)


def _absolute(rtol: float, atol: float | None) -> float:
    """The absolute tolerance: the relative one where none is given; 0.0 is one."""
    return rtol if atol is None else atol
