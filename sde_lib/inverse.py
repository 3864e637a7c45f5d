"""The time of a log-SNR, for SDEs that do not know it in closed form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sde_lib.monotone_cubic import MonotoneCubic

if TYPE_CHECKING:
    from sde_lib.base import SDE

_KNOTS = 8192


class TimeOfLogSNR:
    """The inverse of an SDE's log_snr: a table of log t, cubic between its knots, and two steps of Newton's method from there.

    The table goes from 1e-9 T to T, dense towards both ends, where log-SNRs change fast.

    Args:
        sde: whose log_snr is inverted; looked at here alone, and once for each value.
    """

    def __init__(self, sde: SDE) -> None:
        self._sde = sde
        near = torch.logspace(-9, math.log10(0.5), _KNOTS, dtype=torch.float64)
        t = torch.cat([near, 1 - near[:-1].flip(0), torch.ones(1, dtype=torch.float64)]) * sde.T
        with torch.no_grad():
            y = -sde.log_snr(t)
        # where rounding hides the differences, the later of equal values
        rising = torch.cat([y.diff() > 0, torch.ones(1, dtype=torch.bool)])
        self._table = MonotoneCubic(y[rising], t[rising].log())
        self._low, self._high = float(y[rising][0]), float(y[-1])

    def __call__(self, l: Tensor) -> Tensor:
        """The time at which log_snr is `l`, of its shape, in float64; 0 and T for what lies outside."""
        y = (-l).clamp(self._low, self._high)
        t, slope = self._table.value_and_slope(y)
        t = t.exp()
        for _ in range(2):
            t = (t * torch.exp((y + self._sde.log_snr(t)) * slope)).clamp(max=self._sde.T)
        return torch.where(-l < self._low, 0.0, t)
