"""Interpolation that keeps a rising table rising."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class MonotoneCubic:
    """A piecewise cubic through points (x, y) that rises as they do, evaluated in torch, with its slope.

    (Fritsch and Carlson 1980, "Monotone Piecewise Cubic Interpolation"; the coefficients are SciPy's PCHIP.) The tables are
    copied once to each device that asks.

    Args:
        x, y: `(N+1,)`, rising.
    """

    def __init__(self, x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> None:
        from scipy.interpolate import PchipInterpolator

        spline = PchipInterpolator(torch.as_tensor(x).double().numpy(), torch.as_tensor(y).double().numpy())
        knots = torch.from_numpy(spline.x.copy())
        # a row for each piece: its left knot, and the coefficients of the distance to it, highest power first
        rows = torch.cat([knots[:-1].unsqueeze(0), torch.from_numpy(spline.c.copy())]).T.contiguous()
        self._tables = {torch.device("cpu"): (knots[1:-1].contiguous(), rows)}

    def _piece(self, t: Tensor) -> tuple[Tensor, ...]:
        """The distance to the left knot, and the piece's four coefficients, each of the shape of `t`."""
        if t.device not in self._tables:
            inner, rows = self._tables[torch.device("cpu")]
            self._tables[t.device] = inner.to(t.device), rows.to(t.device)
        inner, rows = self._tables[t.device]
        knot, a, b, c, d = rows[torch.searchsorted(inner, t.detach().contiguous(), right=True)].unbind(-1)
        return t - knot, a, b, c, d

    def __call__(self, t: Tensor) -> Tensor:
        """The value at `t`, of its shape; the ends' cubics go on outside."""
        u, a, b, c, d = self._piece(t)
        return ((a * u + b) * u + c) * u + d

    def slope(self, t: Tensor) -> Tensor:
        """The derivative at `t`, of its shape."""
        u, a, b, c, _ = self._piece(t)
        return (3 * a * u + 2 * b) * u + c

    def value_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for one look at the table."""
        u, a, b, c, d = self._piece(t)
        return ((a * u + b) * u + c) * u + d, (3 * a * u + 2 * b) * u + c
