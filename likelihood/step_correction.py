r"""Half the steps for a survey's values, and what the mean needs for it.

An exact value need not be a tight one. Where the method has N steps, values may be made with N / 2, and what is lost on average
is seen on k random images from solutions of N / 2, N and 2 N steps with one and the same probe: with
d = bits_2N - bits_N/2,

    m = X^T b + mean of d,     stderr^2 + var(d) / k

Whether half the steps will do is a matter of var(d), for which *other* random images stand: those of the trial, with
e = bits_N - bits_N/2, say whether sqrt(var(e) / k) is at most a third of the precision p. The images that correct the mean
know nothing of that choice, so that given it they are a random sample of the set, and mean of d is without bias. (Were one
sample asked both, then half the steps would be taken the more often the fewer far images it happens to have, and d is skewed.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from likelihood.survey_population import Differences, Halving

TRIAL, DIFFERENCES, LEAST_DIFFERENCES = 8, 16, 4
"""Images that say whether half the steps will do, images that correct the mean, and the fewest of either that say anything."""

PART = 3
"""The precision over the largest error that half the steps' correction may have: for 12 % more images, which take half each."""


def half_will_do(found: Halving, precision: float) -> bool:
    """Do images differ so little in what half the steps lose that few of them correct the mean?"""
    lost = found.lost[found.lost.isfinite()]
    return len(lost) >= LEAST_DIFFERENCES and float(lost.std()) / math.sqrt(DIFFERENCES) <= precision / PART


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What is added to the mean for the steps that values have too few.

    Attributes:
        half: have values half the method's steps?
        mean: bits/dim.
        stderr: its standard error.
        left: bits/dim, the mean of what twice the method's steps change; NaN where it is not known.
        images: k, from which it is known.
    """

    half: bool = False
    mean: float = 0.0
    stderr: float = 0.0
    left: float = math.nan
    images: int = 0

    @classmethod
    def of(cls, found: Differences, half: bool) -> Correction | None:
        """From differences of random images that had no part in the choice of `half`; None from fewer than four."""
        good = found.half.isfinite() & found.whole.isfinite()
        k = int(good.sum())
        if k < LEAST_DIFFERENCES:
            return None
        d: Tensor = (found.half if half else found.whole)[good]
        left = float(found.whole[good].abs().mean())
        return cls(half=half, mean=float(d.mean()), stderr=float(d.std()) / math.sqrt(k), left=left, images=k)
