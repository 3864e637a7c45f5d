r"""Adams-Bashforth-Moulton methods on a grid of any spacing, one evaluation of the field a step.

With slopes k_j = F(u_j, y_j) known at the last nodes, integrate the polynomial through them:

    predict    y*_{n+1} = y_n + integral over [u_n, u_{n+1}] of the polynomial through k_n, ..., k_{n-p+1}
    evaluate   k_{n+1}  = F(u_{n+1}, y*_{n+1})
    correct    y_{n+1}  = y_n + integral of the polynomial through k_{n+1}, k_n, ..., k_{n-q+2}

(Hairer, Norsett, Wanner 1993, "Solving Ordinary Differential Equations I", III.1 and III.5 for unequal steps). With
p = q - 1 this mode, PEC, has order q. Orders 2 and 3 start with the points that there are, whose errors are just small
enough; orders 4 and 5 take their first q - 2 steps by the classical Runge-Kutta method, at three more evaluations each.

The difference of the corrected values with q and with q - 1 points estimates the latter's error of a step. The sum of its
magnitudes over the steps is returned as the error, which is a rough scale rather than a bound; noise in the slopes adds to it.

"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from numerics.ode import Callback, Field, FiniteWatch, Solution, Solver, State, check_steps, combine, grid_nodes, rms


@dataclass(frozen=True, kw_only=True)
class Adams(Solver):
    """The predictor-corrector method of the module's text.

    Args:
        steps: of equal length in the clock, where no nodes are given.
        points: q, the corrector's points, 2 to 5, which is the order; the predictor uses q - 1.
    """

    steps: int = 50
    points: int = 3
    adaptive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.points not in (2, 3, 4, 5):
            raise ValueError(f"got points={self.points}; expected 2, 3, 4 or 5")

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.points

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
        start = min(self.points - 2, len(grid) - 1) if self.points > 3 else 0
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
            guess = _advance(y, slopes, integration_weights(past[:p], interval))
            slopes.appendleft(field(nodes[n + 1].expand(batch), guess))
            at = [grid[n + 1], *past]
            q = min(self.points, known + 1)
            y_new = _advance(y, slopes, integration_weights(at[:q], interval))
            lower = _advance(y, slopes, integration_weights(at[: q - 1], interval))
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


def integration_weights(at: list[float], interval: tuple[float, float]) -> list[float]:
    """Weights w_j with integral of p over `interval` = sum of w_j p(at_j) for every polynomial p of degree < len(at).

    From the Newton form: the j-th Lagrange polynomial is expanded in powers of (u - a) / h, which keeps the numbers of
    order one however small the step.
    """
    a, b = interval
    h = b - a
    nodes = [(u - a) / h for u in at]
    weights = []
    for j, node in enumerate(nodes):
        polynomial = [1.0]  # coefficients, lowest power first
        for m, other in enumerate(nodes):
            if m != j:
                scale = 1.0 / (node - other)
                shifted = [0.0, *polynomial]
                polynomial = [
                    scale * (s - other * (polynomial[i] if i < len(polynomial) else 0.0)) for i, s in enumerate(shifted)
                ]
        weights.append(h * sum(c / (i + 1) for i, c in enumerate(polynomial)))
    return weights
