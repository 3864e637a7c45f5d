"""Maximum mean discrepancies: squared distances between two laws in the space of a kernel, without bias.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)                                                          (1)

estimated by averages over pairs i != j (Gretton et al. 2012, JMLR 13, equation 3), so its mean is zero when
the two laws are equal, whatever the number of samples, and single values may be negative.

The kernel distance is (1) with k(x, y) = (x . y / F + 1)^3 on F features: on Inception features it is the KID
of Binkowski et al. 2018 (arXiv:1801.01401), here over all pairs instead of an average over subsets. `mmd` has
Gaussian kernels at three widths around the median distance.

The error and interval are bootstrap ones over both sets. A sample drawn twice must not be paired with itself,
so a resample is a vector of counts w, and pairs of equal index are left out:

    sum_(i != j) w_i w_j k_ij / ((sum_i w_i)^2 - sum_i w_i^2).                                             (2)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, check_alike, check_features

__all__ = ["kernel_distance", "mmd"]

Kernel = Callable[[Tensor, Tensor], Tensor]

_ROWS = 1024


def _counts(n: int, resamples: int, generator: torch.Generator) -> Tensor:
    """(1 + resamples, n): ones, for the estimate itself, then how often each sample is drawn."""
    drawn = torch.randint(n, (resamples, n), generator=generator)
    counts = torch.zeros((resamples, n), dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    return torch.cat([torch.ones((1, n), dtype=torch.float64), counts])


def _within(x: Tensor, weights: Tensor, kernel: Kernel) -> Tensor:
    """Equation (2) for every row of weights (R, n)."""
    total = torch.zeros(len(weights), dtype=torch.float64)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        block = kernel(x[rows], x[start:])
        # Leaving the diagonal out of the matrix, not out of the sum, loses no digits.
        index = torch.arange(len(block))
        block[index, index] = 0
        # The matrix is symmetric: what is right of this block on the diagonal stands for what is below it, too.
        block[:, len(block) :] *= 2
        total += ((weights[:, rows] @ block) * weights[:, start:]).sum(dim=1)
    pairs = weights.sum(dim=1).square() - weights.square().sum(dim=1)
    return total / pairs


def _between(x: Tensor, y: Tensor, x_weights: Tensor, y_weights: Tensor, kernel: Kernel) -> Tensor:
    total = torch.zeros(len(x_weights), dtype=torch.float64)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        total += ((x_weights[:, rows] @ kernel(x[rows], y)) * y_weights).sum(dim=1)
    return total / (x_weights.sum(dim=1) * y_weights.sum(dim=1))


def _discrepancy(x: Tensor, y: Tensor, kernel: Kernel, resamples: int, seed: int) -> Estimate:
    x, y = check_alike(x, y)
    if resamples < 2:
        raise DataError(f"got resamples={resamples}; expected at least 2 for an interval")
    generator = torch.Generator().manual_seed(seed)
    x_weights = _counts(len(x), resamples, generator)
    y_weights = _counts(len(y), resamples, generator)
    values = (
        _within(x, x_weights, kernel) + _within(y, y_weights, kernel) - 2 * _between(x, y, x_weights, y_weights, kernel)
    )
    estimate, draws = float(values[0]), values[1:]
    # With a handful of samples a resample can be one sample only, which has no pairs.
    draws = draws[torch.isfinite(draws)]
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value=estimate, stderr=float(draws.std()), interval=(low, high))


def kernel_distance(samples: Tensor, reference: Tensor, *, resamples: int = 100, seed: int = 0) -> Estimate:
    """The cubic kernel's MMD^2 of feature sets (N, F) and (M, F); on Inception features this is KID.

    Args:
        samples: (N, F).
        reference: (M, F).
        resamples: bootstrap draws for error and interval.
        seed: of the draws.

    Raises:
        DataError: fewer than 2 rows, different F, NaN or infinity.
    """
    size = samples.shape[-1]

    def cubic(a: Tensor, b: Tensor) -> Tensor:
        gram = (a @ b.T).div_(size).add_(1.0)
        return gram.square().mul_(gram)

    return _discrepancy(samples, reference, cubic, resamples, seed)


def mmd(samples: Tensor, reference: Tensor, *, resamples: int = 100, seed: int = 0) -> Estimate:
    """MMD^2 of (N, F) and (M, F) with the mean of three Gaussian kernels exp(-|x - y|^2 / (2 s^2)), s half,
    once and twice the median distance between reference points (of 1,000 of them), so the value is unchanged
    by scaling all features.

    Args:
        samples, reference, resamples, seed: as in `kernel_distance`.

    Raises:
        DataError: as there; or the reference is constant.
    """
    some = check_features(reference, "reference")
    some = some[:: max(1, len(some) // 1000)]
    median = float(torch.pdist(some).median())
    if median == 0:
        raise DataError("got a reference half of whose points are equal; expected data that vary")

    def gaussian(a: Tensor, b: Tensor) -> Tensor:
        gram = torch.addmm(a.square().sum(dim=1, keepdim=True), a, b.T, alpha=-2).add_(b.square().sum(dim=1))
        gram.clamp_(min=0).mul_(-1 / (8 * median**2))
        widest = gram.exp_()  # s = 2 median; s = median and median / 2 are its 4th and 16th powers
        middle = widest.square().square_()
        narrow = middle.square().square_()
        return widest.add_(middle).add_(narrow).div_(3)

    return _discrepancy(samples, reference, gaussian, resamples, seed)
