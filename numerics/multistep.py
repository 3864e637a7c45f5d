r"""Adams-Bashforth-Moulton methods on a grid of any spacing, one evaluation of the field a step.

A multistep method integrates the polynomial through the slopes it has seen. Where the slopes share a factor g(u) that is known
and varies faster than the rest, it can integrate g times a polynomial instead, exactly: this only changes the weights of the
slopes, and makes the method an exponential one (Hochbruck and Ostermann 2010, "Exponential integrators", Acta Numerica 19).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from numerics.checks import require_choice, require_count
from numerics.ode import Callback, Field, LastFinite, Solution, Solver, State, combine, grid_nodes, rms

Weight = Callable[[Tensor], Tensor]
"""The slopes' known factor g > 0, elementwise in the clock, float64."""

# Gauss-Legendre: exact for polynomials up to degree 31, and for an analytic weight to rounding on any reasonable step
_ABSCISSAE, _GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True, kw_only=True)
class Adams(Solver):
    """The Adams-Bashforth-Moulton predictor-corrector method, on nodes of any spacing.

    With slopes k_j = F(u_j, y_j) known at the last nodes, integrate the polynomial through them:

        predict    y*_{n+1} = y_n + integral over [u_n, u_{n+1}] of the polynomial through k_n, ..., k_{n-q+2}
        evaluate   k_{n+1}  = F(u_{n+1}, y*_{n+1})
        correct    y_{n+1}  = y_n + integral of the polynomial through k_{n+1}, k_n, ..., k_{n-q+2}

    (Hairer, Norsett, Wanner 1993, "Solving Ordinary Differential Equations I", III.1, and III.5 for unequal steps). This mode,
    PEC, has order q. Where the field names a known factor g of its slopes as `field.weight`, the polynomial goes through
    k_j / g(u_j), and g times it is integrated exactly.

    The first steps have no past. With start="runge_kutta" the first q - 3 are taken by the classical Runge-Kutta method at
    three more evaluations each, and the order is q. With start="rising" the points just rise one by one, which costs
    nothing, is formally of third order, and is as good where g is small at the start: there the first steps move nothing,
    and at either end of a probability flow they do not.

    The error that is returned is the root of the sum over the steps of (corrected with q points - corrected with q - 1)^2, root
    mean square per entry: the steps' errors added as if their signs were independent. It is a scale rather than a bound, and
    noise in the slopes adds to it. (Their sum without signs overstated the error of trained networks 12 to 52 times.)

    Args:
        steps: number of steps of equal length in the clock, where no nodes are given.
        points: q, the corrector's points, 2 to 5; the predictor uses q - 1.
        start: "runge_kutta" or "rising".
    """

    steps: int = 50
    points: int = 3
    start: str = "runge_kutta"
    adaptive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")
        require_choice(self.points, "points", (2, 3, 4, 5))
        require_choice(self.start, "start", ("runge_kutta", "rising"))

    @property
    def order(self) -> int:  # type: ignore[override]
        """q, but at most 3 where the points rise from one."""
        return min(self.points, 3) if self.start == "rising" else self.points

    def evaluations(self, steps: int) -> int:
        """One a step, one at the beginning, and three for each step by Runge-Kutta."""
        return steps + 1 + 3 * self._first_steps(steps)

    def _first_steps(self, steps: int) -> int:
        """How many steps the Runge-Kutta method takes."""
        return min(max(0, self.points - 3), steps) if self.start == "runge_kutta" else 0

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
        watch = LastFinite(batch, nodes[0], device)
        path = [x] if keep_path else None
        difference = [torch.zeros(batch, dtype=torch.float64, device=device) for _ in y]
        slopes: deque[State] = deque(maxlen=self.points)
        slopes.appendleft(field(nodes[0].expand(batch), y))
        weight: Weight | None = getattr(field, "weight", None)
        start = self._first_steps(len(grid) - 1)
        for n in range(start):
            y = _runge_kutta(field, nodes[n].expand(batch), nodes[n + 1] - nodes[n], y, slopes[0])
            slopes.appendleft(field(nodes[n + 1].expand(batch), y))
            watch.see(nodes[n + 1], y)
            if path is not None:
                path.append(y[0])
            if callback is not None:
                callback(nodes[n + 1].expand(batch), y)
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
                total += rms((a - b).detach()).square()
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
            error=tuple(total.sqrt() for total in difference),
            evaluations=torch.full_like(watch.status, self.evaluations(len(grid) - 1)),
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

    Gaussian quadrature of the Lagrange polynomials, in units of the interval, which keeps the numbers of order one however
    small the step.

    Args:
        at: the nodes of the polynomial, all different.
        interval: what is integrated over; it need not contain the nodes.
        weight: g, elementwise in the clock; 1 unless given.
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
        return [float(w) for w in quadrature @ lagrange]
    inside = weight(torch.from_numpy(middle + half * _ABSCISSAE)).numpy()
    return [float(w) for w in ((quadrature * inside) @ lagrange) / weight(torch.from_numpy(nodes)).numpy()]
