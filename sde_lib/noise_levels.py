r"""NCSNv2's rules for a ladder of noise levels (Song and Ermon 2020, "Improved techniques for training score-based generative
models", arXiv:2006.09011).

    technique 1   sigma_1: as large as the largest distance between two of the data
    technique 2   the ratio gamma of neighbouring levels: a sample of one level should have a fair chance in the next. In D
                  dimensions |x| of N(0, sigma^2 I) is about N(sqrt(D) sigma, sigma^2 / 2), and the mass of a level's shell
                  within three deviations of the next one's is about
        (1)       C(gamma) = Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma) = 0.5
    technique 4   the step e sigma_i^2 / sigma_L^2 score + sqrt(2 e) (sigma_i / sigma_L) z: T of them from N(0, sigma_{i-1}^2),
                  on a level's own Gaussian, should end with that level's variance; with q = e / sigma_L^2 the ratio is
        (2)       c(q) = (1 - q)^{2T} (gamma^2 - v) + v,      v = 2 q / (1 - (1 - q)^2) = 1 / (1 - q / 2)
                  and q is where |c - 1| is least. v is the chain's own stationary variance, which is above 1.

For CIFAR-10 (D = 3,072, 50 to 0.01) C = 0.5 gives gamma = 1.0398 and 219 levels; the paper's 232 have C = 0.567. Its step,
6.2e-6 with T = 5, has c = 1.055.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from numerics import UserError, require_count, require_positive, require_range

_FEW = 10_000


def largest_distance(x: Tensor, *, few: int = _FEW) -> float:
    """The largest Euclidean distance between two of the first `few` data `(N, *)`: technique 1.

    Raises:
        UserError: fewer than two, or data that are no finite numbers.
    """
    require_count(few, "few", 2)
    if not isinstance(x, Tensor) or x.ndim == 0 or x.is_complex():
        raise UserError(f"got data {x!r:.60}; expected a tensor of real numbers, (N, *)")
    flat = x[:few].reshape(len(x[:few]), math.prod(x.shape[1:]))
    work = torch.promote_types(flat.dtype, torch.float32)
    flat = flat.to(torch.float32 if flat.device.type == "mps" else torch.float64)
    if len(flat) < 2:
        raise UserError(f"got {len(flat)} data; expected two or more, for a distance between them")
    bad = int((~flat.isfinite()).any(dim=1).sum())
    if bad:
        raise UserError(f"got {bad} of {len(flat)} data that are not finite; expected numbers: look at those")
    # by products of matrices, the sum |x|^2 + |y|^2 - 2 x.y loses the distance of data that are far from 0
    flat = (flat - flat.mean(dim=0)).to(work)
    return max(float(torch.cdist(rows, flat).max()) for rows in torch.split(flat, 1000))


def overlap(gamma: float, D: int) -> float:
    """C(gamma) of (1): the mass of one level's shell in the next, in D dimensions."""
    shift = math.sqrt(2 * D) * (gamma - 1)
    return _phi(shift + 3 * gamma) - _phi(shift - 3 * gamma)


def ratio(D: int, *, mass: float = 0.5) -> float:
    """The ratio gamma > 1 of neighbouring levels at which C(gamma) is `mass`, in D dimensions: technique 2.

    Raises:
        UserError: a mass outside (0, C(1)), which is 0.997; or four dimensions or fewer, in which C does not fall.
    """
    require_count(D, "D")
    require_range(mass, "mass", 1e-6, overlap(1.0, D) - 1e-6)
    low, high = 1.0, 2.0
    while overlap(high, D) > mass and high < 1e9:
        high *= 2
    if overlap(high, D) > mass:
        raise UserError(
            f"got mass={mass} in {D} dimensions, where levels of any ratio overlap more, so that it sets no number of them; "
            "expected 5 dimensions or more: give levels itself"
        )
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if overlap(middle, D) > mass else (low, middle)
    return (low + high) / 2


def number_of_levels(largest: float, smallest: float, D: int, *, mass: float = 0.5) -> int:
    """How many levels from `largest` down to `smallest` have a ratio nearest to that of `ratio`, at least 2."""
    require_positive(smallest, "smallest")
    require_positive(largest, "largest")
    if not largest > smallest:
        raise UserError(f"got largest={largest}, smallest={smallest}; expected largest > smallest")
    return max(2, 1 + round(math.log(largest / smallest) / math.log(ratio(D, mass=mass))))


def variance_left(q: float, gamma: float, steps: int) -> float:
    """c(q) of (2): the variance after T = `steps` of one level, in units of the level's.

    Raises:
        UserError: q outside [0, 2), from which on the steps diverge, a gamma that is not positive, or no steps.
    """
    require_range(q, "q", 0)
    if q >= 2:
        raise UserError(f"got q={q:g}; expected less than 2, from which on the steps diverge")
    require_positive(gamma, "gamma")
    require_count(steps, "steps")
    v = 1 / (1 - q / 2)
    return (1 - q) ** (2 * steps) * (gamma**2 - v) + v


def langevin_step(gamma: float, smallest: float, steps: int) -> float:
    """e, the step at the smallest level for which |c - 1| is least: technique 4.

    In x + e s + sqrt(2 e) z, as the published code has it; `samplers.AnnealedLangevin`'s step_size is twice that.

    Args:
        gamma: the ratio of neighbouring levels, > 1.
        smallest: sigma_L.
        steps: T, Langevin steps a level.

    Raises:
        UserError: values out of range.
    """
    require_positive(smallest, "smallest")
    require_count(steps, "steps")
    if not 1 < gamma < math.inf:
        raise UserError(f"got gamma={gamma}; expected a finite ratio of neighbouring levels > 1")
    q = torch.logspace(-8, 0, 200_001, dtype=torch.float64)
    v = 1 / (1 - q / 2)
    c = (1 - q) ** (2 * steps) * (gamma**2 - v) + v
    return float(q[int((c - 1).abs().argmin())]) * smallest**2


def _phi(z: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * math.erfc(-z / math.sqrt(2))
