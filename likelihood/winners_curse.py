r"""What choosing predictors on few images hides of their error.

Of many predictors those with the smallest residual on the pilot's images are in part those to which chance was kind there.
Leaving out one image after the other does not see it, for the choice has seen them all. So the choice is left out, too: of
`FOLDS` parts of the pilot's images each is predicted by a fit on the others with levels that were chosen on the others, one by
one as they would be on all, and once more with the levels that were chosen on all,

    ratio^2 = mean of the first's squares / mean of the second's,     at least 1

Both are fits on as many images, so that the ratio is 1 where every part chooses the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from likelihood.regression_estimate import Fit

FOLDS = 5


def winners_curse(free: Tensor, paid: Tensor, y: Tensor, which: Sequence[int]) -> float:
    """By how much larger the standard deviation of what predictions miss is than it looks on the images that chose them.

    Args:
        free, paid: predictors `(n, F)` and `(n, C)`, float64; those of `free` are used in any case.
        y: values `(n,)`.
        which: the columns of `paid` that were chosen on these images.
    """
    n, K = len(y), len(which)
    if not 0 < K < paid.shape[1] or n < FOLDS * 2:
        return 1.0
    rows, nested, plain = torch.arange(n), 0.0, 0.0
    for fold in range(FOLDS):
        out = rows % FOLDS == fold
        rest = rows[~out]
        again = _chosen(free[rest], paid[rest], y[rest], K)
        for columns, first in ((again, True), (list(which), False)):
            x = torch.cat([free, paid[:, columns]], dim=1)
            missed = float((y - Fit.of(x, rest, y[rest]).predictions)[out].square().sum())
            nested, plain = (nested + missed, plain) if first else (nested, plain + missed)
    return math.sqrt(max(1.0, nested / plain)) if plain > 0 else 1.0


def _chosen(free: Tensor, paid: Tensor, y: Tensor, K: int) -> list[int]:
    """The K columns of `paid` that leave the least of `y`, one by one."""
    used: list[int] = []
    for _ in range(K):
        left = [j for j in range(paid.shape[1]) if j not in used]
        base = torch.cat([free, paid[:, used]], dim=1)
        x = torch.cat([base.expand(len(left), *base.shape), paid[:, left].T.unsqueeze(2)], dim=2)
        used.append(left[int(_left_out(x, y).argmin())])
    return used


def _left_out(x: Tensor, y: Tensor) -> Tensor:
    """`(C,)`: the mean square of what fits of `y` `(n,)` on `x` `(C, n, P)` miss of images that they have left out."""
    spread = x.std(dim=1, keepdim=True)
    scaled = (x - x.mean(dim=1, keepdim=True)) / torch.where(spread > 0, spread, 1.0)
    rows = torch.cat([torch.ones_like(x[:, :, :1]), scaled], dim=2)
    Q = torch.linalg.qr(rows).Q
    missed: Tensor = y - (Q @ (Q.mT @ y.unsqueeze(1))).squeeze(2)
    left_out: Tensor = missed / (1 - Q.square().sum(dim=2)).clamp(min=1e-9)
    return left_out.square().mean(dim=1)
