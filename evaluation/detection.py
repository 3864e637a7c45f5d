r"""How well a number tells two sets of samples apart.

    AUROC = P(u > v) + P(u = v) / 2,        u of what is to be found, v of the rest

that is the area under the curve of hits against false alarms (Hanley and McNeil 1982). Its standard error is that of a
two-sample U-statistic: with h(u) the share of the rest below u and k(v) the share of the found above v, ties counting half,
var = var h / n_u + var k / n_v (DeLong, DeLong, Clarke-Pearson 1988).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, as_values

__all__ = ["auroc"]


def auroc(rest: Tensor, found: Tensor) -> Estimate:
    """The probability that a value of `found` `(n,)` is larger than one of `rest` `(m,)`, ties counting half.

    Raises:
        DataError: fewer than two of either, or NaN.
    """
    rest, found = (as_values(v, "values").detach().cpu().double() for v in (rest, found))
    if rest.ndim != 1 or found.ndim != 1 or min(len(rest), len(found)) < 2:
        raise DataError(
            f"got values of shapes {tuple(rest.shape)} and {tuple(found.shape)}; expected (m,) and (n,), 2 or more"
        )
    if bool(rest.isnan().any() | found.isnan().any()):
        raise DataError("got values that are NaN; expected numbers: look at those samples")
    below = _below(rest, found)
    above = 1 - _below(found, rest)
    # half a count in quadrature, as `calibration.share` adds it, so that a perfect separation has an error too
    variance = float(below.var()) / len(found) + float(above.var()) / len(rest) + 0.25 / min(len(found), len(rest)) ** 2
    return Estimate(value=float(below.mean()), stderr=math.sqrt(variance))


def _below(values: Tensor, x: Tensor) -> Tensor:
    """The share of `values` `(m,)` below each of `x` `(n,)`, ties counting half."""
    order = values.sort().values
    left, right = torch.searchsorted(order, x, side="left"), torch.searchsorted(order, x, side="right")
    return (left + right).double() / (2 * len(order))
