r"""Half the steps for a survey's values, and what the mean needs for it.

An exact value need not be a tight one. Where the method has N steps, values may be made with N / 2, and what is lost on
average is seen on other random images in two levels (Giles 2008, "Multilevel Monte Carlo Path Simulation", Operations
Research 56): on k of them from solutions of N / 2 and N steps, and on l of these k of 2 N steps too, each with one and the
same probe,

    m = X^T b + mean_k of (bits_N - bits_N/2) + mean_l of (bits_2N - bits_N)

What twice the steps change differs far less from image to image than what half of them lose (Fashion-MNIST: standard
deviations of 0.0006 and 0.010 bits/dim), and takes three times the passes, so that l is small. With d_i and e_i how far an
image's two differences are from their means, u_i = d_i / k + e_i / l of the l and d_i / k of the others, the variance is

    l / (l - 1) sum_l of u_i^2 + k / (k - 1) sum of the others' u_i^2

Whether half the steps will do is a matter of the first difference's variance, for which *other* random images stand, those of
the trial: they say whether sqrt(var / k) is at most half the precision p (`PART`). The images that correct the mean know
nothing of that choice, so that given it they are a random sample of the set, and the means are without bias. (Were one
sample asked both, then half the steps would be taken the more often the fewer far images it happens to have, and what they
lose is skewed.)

An image of which half the steps lose far more than is allowed of the others is a rare one: the k may have none, and the
mean would lack what it loses without a word. The solver's own estimate of its state's error tells it, of every image that is
scored (`Refinement`). So those that are taken to lose more than `FAR` times the precision are a stratum of their own, all of
which that is scored is solved again with all the steps, and with twice as many where these err as much. What the means still
have to say is what the others lose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from likelihood.refinement import Refinement
from likelihood.student_error import degrees_of
from likelihood.survey_population import Differences, Halving

TRIAL, DOUBLED, LEAST_DIFFERENCES = 8, 8, 4
"""Images that say whether half the steps will do; l that tell what twice the steps change; and the fewest that say anything."""

PART = 2
"""The precision over the largest error v that half the steps' correction may have, as a standard error.

The sample grows by 1 / (1 - (v/p)^2), and each of its values takes half the passes: half the steps pay up to (v/p)^2 = 1/2.
Eight images know that variance to a factor of two, and with (v/p)^2 <= 1/4 they pay where it is twice what the images say.
"""

FAR = 8
"""What an image may lose before it is solved again, over the precision: 4 times the largest standard deviation allowed of
k = 16 images, 2.3 times that of 48."""

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


def half_will_do(found: Halving, precision: float, images: int, refinement: Refinement | None = None) -> bool:
    """Do images differ so little in what half the steps lose that k = `images` of them correct the mean? Those that are solved
    again do not count."""
    good = found.lost.isfinite()
    if refinement is not None and found.state_error is not None:
        good = good & ~refinement.too_large(found.state_error)
    lost = found.lost[good]
    return len(lost) >= LEAST_DIFFERENCES and float(lost.std()) / math.sqrt(images) <= precision / PART


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What is added to the mean for the steps that values have too few.

    Attributes:
        half: have values half the method's steps?
        mean: bits/dim.
        stderr: its standard error.
        degrees: of freedom of that.
        left: bits/dim, the mean of what twice the method's steps change; NaN where it is not known.
        images: from which it is known, k for half the steps and l for all of them.
        failed: images that were to show it, and have no value.
        refinement: which images are solved again; None for none.
        compared: images that were solved with more steps, those that failed and those of which nothing is corrected among them.
        doubled: those of them that were solved with twice the method's.
    """

    half: bool = False
    mean: float = 0.0
    stderr: float = 0.0
    degrees: float = 1.0
    left: float = math.nan
    images: int = 0
    failed: int = 0
    refinement: Refinement | None = None
    compared: int = 0
    doubled: int = 0

    @property
    def variance(self) -> tuple[float, float]:
        """Of its mean, and the degrees of freedom of that."""
        return self.stderr**2, self.degrees

    @classmethod
    def stated(cls, found: Differences) -> Correction:
        """None, of values with all the steps; it says what twice as many would change, of an image by its state's error."""
        left = found.whole[found.whole.isfinite()].abs()
        return cls(
            left=float(left.mean()) if len(left) else math.nan,
            refinement=stating(found.half, found.state_error),
            compared=len(found.whole),
            doubled=len(found.whole),
        )

    @classmethod
    def of_half(cls, found: Differences, halved: Halving, refinement: Refinement | None = None) -> Correction:
        """Of half the steps, from random images that had no part in the choice: `halved` are those of the k that are not of the
        l. From fewer than four of the l there is none, and values have all the steps."""
        good, others = found.half.isfinite() & found.whole.isfinite(), halved.lost[halved.lost.isfinite()]
        finer = found.whole[good]
        lost = found.half[good] - finer
        l, k, compared = len(lost), len(lost) + len(others), len(found.whole) + len(halved.lost)
        if l < LEAST_DIFFERENCES:
            return cls(failed=compared - k, refinement=refinement, compared=compared, doubled=len(found.whole))
        first, second = torch.cat([lost, others]).mean(), finer.mean()
        both = float(((lost - first) / k + (finer - second) / l).square().sum()) * l / (l - 1)
        rest = float(((others - first) / k).square().sum()) * k / (k - 1)
        parts = [(both, l - 1), (rest, max(1, len(others) - 1))]
        return cls(
            half=True,
            mean=float(first + second),
            stderr=math.sqrt(both + rest),
            degrees=degrees_of(parts),
            left=float(finer.abs().mean()),
            images=k,
            failed=compared - k,
            refinement=refinement,
            compared=compared,
            doubled=len(found.whole),
        )

    @classmethod
    def of_all(cls, found: Differences, refinement: Refinement | None = None) -> Correction:
        """Of all the steps, from random images; from fewer than four there is none."""
        finer = found.whole[found.half.isfinite() & found.whole.isfinite()]
        l, compared = len(finer), len(found.whole)
        if l < LEAST_DIFFERENCES:
            return cls(failed=compared - l, refinement=refinement, compared=compared, doubled=compared)
        return cls(
            mean=float(finer.mean()),
            stderr=float(finer.std()) / math.sqrt(l),
            degrees=l - 1,
            left=float(finer.abs().mean()),
            images=l,
            failed=compared - l,
            refinement=refinement,
            compared=compared,
            doubled=compared,
        )
