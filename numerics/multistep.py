r"""Adams-Bashforth-Moulton methods on a grid of any spacing, one evaluation of the field a step.

With slopes k_j = F(u_j, y_j) known at the last nodes, integrate the polynomial through them:

    predict    y*_{n+1} = y_n + integral over [u_n, u_{n+1}] of the polynomial through k_n, ..., k_{n-p+1}
    evaluate   k_{n+1}  = F(u_{n+1}, y*_{n+1})
    correct    y_{n+1}  = y_n + integral of the polynomial through k_{n+1}, k_n, ..., k_{n-q+2}

(Hairer, Norsett, Wanner 1993, "Solving Ordinary Differential Equations I", III.1 and III.5 for unequal steps). With
p = q - 1 this mode, PEC, has order q.

Where all slopes share a factor g(u) that is known and varies faster than the rest, the field names it as
`field.weight`: the polynomial then goes through k_j / g(u_j), and g times it is integrated, which only changes the
weights of the k_j. (Exponential multistep methods do so for a linear part: Hochbruck and Ostermann 2010, "Exponential
integrators", Acta Numerica 19.)

The first steps have no past. Either the first q - 3 are taken by the classical Runge-Kutta method at three more evaluations
each, and the order is q; or the points just rise one by one ("rising"), which costs nothing, is formally of third order, and
as good where g is small at the start: there the first steps move nothing, and at either end of a probability flow they do not.

The difference of the corrected values with q and with q - 1 points estimates the latter's error of a step. The sum of its
magnitudes over the steps is returned as the error, which is a rough scale rather than a bound; noise in the slopes adds to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from numerics.errors import UserError
from numerics.ode import Callback, Field, FiniteWatch, Solution, Solver, State, check_steps, combine, grid_nodes, rms

Weight = Callable[[Tensor], Tensor]
"""The slopes' known factor g > 0, elementwise in the clock, float64."""

# Gauss-Legendre: exact for polynomials up to degree 31, and for an analytic weight to rounding on any reasonable step
_ABSCISSAE, _GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True, kw_only=True)
class Adams(Solver):
    """The predictor-corrector method of the module's text.

    Args:
        steps: of equal length in the clock, where no nodes are given.
        points: q, the corrector's points, 2 to 5, which is the order; the predictor uses q - 1.
        start: "runge_kutta", or "rising"; see the module's text.
    """

    steps: int = 50
    points: int = 3
    start: str = "runge_kutta"
    adaptive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.points not in (2, 3, 4, 5):
            raise UserError(f"got points={self.points}; expected 2, 3, 4 or 5")
        if self.start not in ("runge_kutta", "rising"):
            raise UserError(f"got start={self.start!r}; expected 'runge_kutta' or 'rising'")

    @property
    def order(self) -> int:  # type: ignore[override]
        return min(self.points, 3) if self.start == "rising" else self.points

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
        batch, device = x.shape[0], x.device
        nodes = grid_nodes(self.steps, u_0, u_1, nodes, device)
        # the weights depend on the nodes alone: all of them at once, on the host, before the loop
        grid = nodes.to("cpu", torch.float64).tolist()
        watch = FiniteWatch(batch, nodes[0], device)
        path = [x] if keep_path else None
        difference = [torch.zeros(batch, dtype=torch.float64, device=device) for _ in y]
        slopes: deque[State] = deque(maxlen=self.points)
        slopes.appendleft(field(nodes[0].expand(batch), y))
        weight: Weight | None = getattr(field, "weight", None)
        start = min(max(0, self.points - 3), len(grid) - 1) if self.start == "runge_kutta" else 0
        for n in range(start):
            y = _runge_kutta(field, nodes[n].expand(batch), nodes[n + 1] - nodes[n], y, slopes[0])
            slopes.appendleft(field(nodes[n + 1].expand(batch), y))
            watch.see(nodes[n + 1], y)
            if path is not None:
                path.append(y[0])
        for n in range(start, len(grid) - 1):
            past = grid[n::-1]
            interval = (grid[n], grid[n + 1])
            known = len(slopes)
            p = min(self.points - 1, known)
            guess = _advance(y, slopes, integration_weights(past[:p], interval, weight))
            slopes.appendleft(field(nodes[n + 1].expand(batch), guess))
            at = [grid[n + 1], *past]
            q = min(self.points, known + 1)
            y_new = _advance(y, slopes, integration_weights(at[:q], interval, weight))
            lower = _advance(y, slopes, integration_weights(at[: q - 1], interval, weight))
            for total, a, b in zip(difference, y_new, lower, strict=True):
                total += rms((a - b).detach())
            y = y_new
            watch.see(nodes[n + 1], y)
            if path is not None:
                path.append(y[0])
            if callback is not None:
                callback(nodes[n + 1].expand(batch), y)
        return Solution(
            y=y,
            u=watch.u,
            status=watch.status,
            error=tuple(difference),
            evaluations=torch.full_like(watch.status, len(grid) + 3 * start),
            nodes=nodes,
            path=None if path is None else torch.stack(path),
        )


def _runge_kutta(field: Field, u: Tensor, h: Tensor, y: State, k_1: State) -> State:
    """A step of the classical method whose first slope is known."""
    k_2 = field(u + h / 2, combine(y, h, [(0.5, k_1)]))
    k_3 = field(u + h / 2, combine(y, h, [(0.5, k_2)]))
    k_4 = field(u + h, combine(y, h, [(1.0, k_3)]))
    return combine(y, h, [(1 / 6, k_1), (1 / 3, k_2), (1 / 3, k_3), (1 / 6, k_4)])


def _advance(y: State, slopes: deque[State], weights: list[float]) -> State:
    """`y + sum of w_j k_j`, part by part, over the newest slopes."""
    return tuple(part + sum(w * k[i] for w, k in zip(weights, slopes, strict=False)) for i, part in enumerate(y))


def integration_weights(
    at: Sequence[float], interval: tuple[float, float], weight: Weight | None = None
) -> list[float]:
    """Weights w_j with integral of g p over `interval` = sum of w_j g(at_j) p(at_j) for all polynomials p of degree < len(at).

    g is `weight`, or 1. Gaussian quadrature of the Lagrange polynomials, in units of the interval, which keeps the numbers
    of order one however small the step.
    """
    (a, b), nodes = interval, np.asarray(at, dtype=np.float64)
    half, middle = (b - a) / 2, (a + b) / 2
    # (quadrature points, nodes, nodes): the factors of each Lagrange polynomial, with 1 in place of its own node's
    scaled = (nodes - middle) / half
    numerator = _ABSCISSAE.reshape(-1, 1, 1) - scaled
    denominator = scaled.reshape(-1, 1) - scaled
    own = np.eye(len(nodes), dtype=bool)
    lagrange = np.where(own, 1.0, numerator / np.where(own, 1.0, denominator)).prod(axis=2)
    quadrature = half * _GAUSS_WEIGHTS
    if weight is None:
        return (quadrature @ lagrange).tolist()
    inside = weight(torch.from_numpy(middle + half * _ABSCISSAE)).numpy()
    return (((quadrature * inside) @ lagrange) / weight(torch.from_numpy(nodes)).numpy()).tolist()
