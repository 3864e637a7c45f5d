r"""Half the steps for a survey's values, and what the mean needs for it.

An exact value need not be a tight one. Where the method has N steps, values may be made with N / 2, and what is lost on average
is seen on k random images from solutions of N / 2, N and 2 N steps with one and the same probe: with
d = bits_2N - bits_N/2,

    m = X^T b + mean of d,     stderr^2 + var(d) / k

Whether half the steps will do is a matter of var(d), for which *other* random images stand: those of the trial, with
e = bits_N - bits_N/2, say whether sqrt(var(e) / k) is at most half the precision p (`PART`). The images that correct the mean
know nothing of that choice, so that given it they are a random sample of the set, and mean of d is without bias. (Were one
sample asked both, then half the steps would be taken the more often the fewer far images it happens to have, and d is skewed.)

An image of which half the steps lose far more than is allowed of the others is a rare one: sixteen hardly ever have it, and the
mean would lack what it loses without a word. The solver's own estimate of its state's error tells it, of every image that is
scored (`Refinement`). So those that are taken to lose more than `FAR` times the precision, four times the largest standard
deviation that is allowed, are a stratum of their own, all of which that is scored is solved again with all the steps, and with
twice as many where these err as much. What is left to d is what the others lose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from likelihood.refinement import Refinement
from likelihood.survey_population import Differences, Halving

TRIAL, DIFFERENCES, LEAST_DIFFERENCES = 8, 16, 4
"""Images that say whether half the steps will do, images that correct the mean, and the fewest of either that say anything."""

PART = 2
"""The precision over the largest error v that half the steps' correction may have, as a standard error.

The sample grows by 1 / (1 - (v/p)^2), and each of its values takes half the passes: half the steps pay up to (v/p)^2 = 1/2.
Eight images know that variance to a factor of two, and with (v/p)^2 <= 1/4 they pay where it is twice what the images say.
"""

FAR = 4 * math.sqrt(DIFFERENCES) / PART
"""What an image may lose before it is solved again, over the precision."""

MOST_FAR = 0.25
"""If more of the trial's images than this are far, then the steps are too few for all of them, and none is a rare one."""


NEVER = 1e9
"""Nats per dimension that no image loses: a rule that solves none again, and states what each errs by."""


def stating(lost: Tensor, state_error: Tensor | None) -> Refinement | None:
    """A rule that solves no image again, from what random ones lost `(k,)` bits/dim for a unit of their state's error, so that
    the solver's error is stated of every image; None where that is not known."""
    if state_error is None:
        return None
    off = lost.abs() * math.log(2)
    known = off.isfinite() & (state_error > 0)
    if int(known.sum()) < LEAST_DIFFERENCES:
        return None
    # nine in ten lose less for a unit
    ratio = float((off[known] / state_error[known]).quantile(0.9))
    return Refinement(ratio=ratio, above=NEVER) if ratio > 0 else None


def refinement_of(found: Halving, precision: float) -> Refinement | None:
    """Which images are to be solved again, from what the trial's lost for a unit of their state's error: none where too many
    would be; None where that is not known."""
    made = stating(found.lost, found.state_error)
    if made is None or found.state_error is None:
        return None
    far = replace(made, above=FAR * precision * math.log(2))
    return far if float(far.too_large(found.state_error).double().mean()) <= MOST_FAR else made


def half_will_do(found: Halving, precision: float, refinement: Refinement | None = None) -> bool:
    """Do images differ so little in what half the steps lose that few of them correct the mean? Those that are solved again do
    not count."""
    good = found.lost.isfinite()
    if refinement is not None and found.state_error is not None:
        good = good & ~refinement.too_large(found.state_error)
    lost = found.lost[good]
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
        failed: images that were to show it, and have no value.
        refinement: which images are solved again; None for none.
        compared: images that were solved with more steps, those that failed and those of which nothing is corrected among them.
    """

    half: bool = False
    mean: float = 0.0
    stderr: float = 0.0
    left: float = math.nan
    images: int = 0
    failed: int = 0
    refinement: Refinement | None = None
    compared: int = 0

    @property
    def variance(self) -> tuple[float, int]:
        """Of its mean, and the degrees of freedom of that."""
        return self.stderr**2, max(1, self.images - 1)

    @classmethod
    def stated(cls, found: Differences) -> Correction:
        """None, of values with all the steps; it says what twice as many would change, of an image by its state's error."""
        left = found.whole[found.whole.isfinite()].abs()
        return cls(
            left=float(left.mean()) if len(left) else math.nan,
            refinement=stating(found.half, found.state_error),
            compared=len(found.whole),
        )

    @classmethod
    def of(cls, found: Differences, half: bool, refinement: Refinement | None = None) -> Correction:
        """From differences of random images that had no part in the choice of `half`; from fewer than four there is none, and
        values have all the steps."""
        good = found.half.isfinite() & found.whole.isfinite()
        k = int(good.sum())
        if k < LEAST_DIFFERENCES:
            return cls(failed=len(good) - k, refinement=refinement, compared=len(good))
        d: Tensor = (found.half if half else found.whole)[good]
        left = float(found.whole[good].abs().mean())
        stderr = float(d.std()) / math.sqrt(k)
        return cls(
            half=half,
            mean=float(d.mean()),
            stderr=stderr,
            left=left,
            images=k,
            failed=len(good) - k,
            refinement=refinement,
            compared=len(good),
        )
