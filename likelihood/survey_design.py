r"""How large a survey's sample has to be, and which predictors pay.

The variance of the mean is (1 - f) S^2 / n + f tau^2 / n (`likelihood.regression_estimate`), S^2 the mean square of what the
predictions miss. For a precision p,

    n = S^2 / (p^2 + (S^2 - tau^2) / N)

is fixed once, from a pilot's S^2, made larger by 1.64 of its own standard errors: a survey that stopped where its error looks
small would stop where it is understated. Predictors that take network passes are added one by one as long as the whole becomes
cheaper,

    passes = L N + c n,      c those of an exact value, L levels

An exact value need not be a tight one. Where the method has N steps, values may be made with N / 2, and what is lost on average
is seen on a few random images, which the sample hardly ever reaches, from solutions of N / 2, N and 2 N steps with one and the
same probe: with d = bits_2N - bits_N/2,

    m = X^T b + mean of d,     stderr^2 + var(d) / k

Half the steps are taken where sqrt(var(d) / k) is at most a quarter of p; else the N that the method has, likewise corrected.
The mean |bits_2N - bits_N| is stated as the solver's error: what twice the steps of the method still changed.

Images whose predictors are far from all others' (`likelihood.suspects`) are scored in any case. They are no part of S, which
they would make too large: of a set of which the pilot says that a share q is suspect, n is for the other (1 - q) N, whose mean
is needed to p / (1 - q) only, and c q N passes more are counted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.regression_estimate import Fit, r_squared
from likelihood.surrogate import least_images
from likelihood.suspects import suspects

PILOT, LARGEST_PILOT = 64, 128
DIFFERENCES, LEAST_DIFFERENCES = 16, 4
REPEATS = 24
MOST_SUSPECT_IN_PILOT = 0.1  # more than of the set: of few images there may be many by chance
SAFETY = 1.64  # standard errors of the pilot's S^2: 19 surveys in 20 reach their precision
LEAST_R2 = 0.1
"""Predictions that know less than this are not worth their regression: the plain mean is taken."""


def pilot_size(size: int) -> int:
    """A twentieth of a set, 64 to 128 images: they are part of the sample, and tell its size the better the more they are."""
    return min(size, max(PILOT, min(LARGEST_PILOT, size // 20)))


@dataclass(frozen=True, kw_only=True)
class Values:
    """Exact values.

    Attributes:
        bits: `(k,)` bits/dim; NaN where the image failed.
        solver_error: `(k,)` bits/dim, as stated; NaN where there is none.
        passes: network passes: forward 1, vector-Jacobian product 2.
    """

    bits: Tensor
    solver_error: Tensor
    passes: int


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What more steps change.

    Attributes:
        half: `(k,)` bits/dim, of twice the method's steps less those of half of them; NaN where one failed.
        whole: `(k,)`, less those of the method itself.
        passes: network passes.
    """

    half: Tensor
    whole: Tensor
    passes: int


class Population(ABC):
    """What can be asked of a set of images. Images are numbered 0 ... size - 1; an index is `(k,)`, rising."""

    @property
    @abstractmethod
    def size(self) -> int:
        """N."""

    @property
    @abstractmethod
    def candidates(self) -> int:
        """How many predictors there are that take a network pass an image."""

    @abstractmethod
    def free(self, index: Tensor) -> Tensor:
        """`(k, F)`: the predictors that take none."""

    @abstractmethod
    def paid(self, index: Tensor, which: Sequence[int]) -> Tensor:
        """`(k, len(which))`: those of these numbers."""

    @abstractmethod
    def values(self, index: Tensor, repeat: int, half: bool) -> Values:
        """Exact values; another `repeat` has new noise and new probes, and `half` is with half the method's steps."""

    def differences(self, index: Tensor) -> Differences | None:
        """What more steps change; None of a method whose steps are its own affair."""
        return None


class Table(Population):
    """A set whose values and predictors are known: for seeing how often a survey's stated errors hold.

    Args:
        free, paid: predictors `(N, F)` and `(N, C)`.
        bits: values `(R, N)`, of which repeat r gives row r (and of more repeats than rows the last).
        passes: of a value.
        differences: `(N,)`, what twice the steps change where values have half of them, which `bits` then are; of all the steps
            nothing is lost. None unless given.
    """

    def __init__(
        self, free: Tensor, paid: Tensor, bits: Tensor, *, passes: int = 100, differences: Tensor | None = None
    ) -> None:
        self._free, self._paid, self._bits, self._passes, self._differences = free, paid, bits, passes, differences

    @property
    def size(self) -> int:
        return self._bits.shape[1]

    @property
    def candidates(self) -> int:
        return self._paid.shape[1]

    def free(self, index: Tensor) -> Tensor:
        return self._free[index]

    def paid(self, index: Tensor, which: Sequence[int]) -> Tensor:
        return self._paid[index][:, list(which)]

    def values(self, index: Tensor, repeat: int, half: bool) -> Values:
        bits = self._bits[min(repeat, len(self._bits) - 1)][index]
        if self._differences is not None and not half:
            bits = bits + self._differences[index]
        return Values(bits=bits, solver_error=torch.full_like(bits, math.nan), passes=self._passes * len(index))

    def differences(self, index: Tensor) -> Differences | None:
        if self._differences is None:
            return None
        found = self._differences[index]
        return Differences(half=found, whole=torch.zeros_like(found), passes=7 * self._passes * len(index))


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
    def of(cls, found: Differences, precision: float, size: int) -> Correction:
        """From differences of random images of a set of `size`.

        None is made from fewer than four images. A set no larger than a pilot is scored with all steps, and what is left is
        stated: few images would make their own correction, and a poor one.
        """
        good = found.half.isfinite() & found.whole.isfinite()
        k = int(good.sum())
        if k < LEAST_DIFFERENCES:
            return cls()

        def error(d: Tensor) -> float:
            return float(d[good].std()) / math.sqrt(k)

        left = float(found.whole[good].abs().mean())
        if size <= PILOT:
            return cls(left=left, images=k)
        half = error(found.half) <= precision / 4
        used = found.half if half else found.whole
        return cls(half=half, mean=float(used[good].mean()), stderr=error(used), left=left, images=k)


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a pilot has found, and what is to be done.

    Attributes:
        size: N.
        precision: p.
        which: the predictors with passes that pay.
        free: are the predictors without passes used?
        residual: S, made larger by the pilot's own error.
        noise: tau.
        r2: on the pilot's images, each left out.
        cost: c, passes of an exact value.
        images: n, of those that are not suspect; N where scoring all is cheaper, or needed.
        suspect: q, the share of the pilot's images whose predictors are far from the others'.
        spent: passes of the pilot.
        correction: for the steps that values have too few.
    """

    size: int
    precision: float
    which: tuple[int, ...]
    free: bool
    residual: float
    noise: float
    r2: float
    cost: float
    images: int
    spent: int
    suspect: float = 0.0
    correction: Correction = Correction()

    @classmethod
    def of_all(
        cls, *, size: int, precision: float, noise: float, cost: float, spent: int, correction: Correction
    ) -> Design:
        """Every image scored."""
        return cls(
            size=size,
            precision=precision,
            which=(),
            free=False,
            residual=math.nan,
            noise=noise,
            r2=math.nan,
            cost=cost,
            images=size,
            spent=spent,
            correction=correction,
        )

    @property
    def everything(self) -> bool:
        """Are all images scored?"""
        return self.images >= self.size

    @property
    def passes(self) -> float:
        """Of the survey, without the pilot."""
        if self.everything:
            return self.cost * self.size
        levels = len(self.which) or 1  # without a level there is one all the same, to see which images are suspect
        return self.cost * (self.images + self.suspect * self.size) + levels * self.size

    @property
    def all_passes(self) -> float:
        """Of scoring all images."""
        return self.cost * self.size

    @property
    def reached_by_all(self) -> float:
        """The error of this set's mean where all images are scored: the noise's and the correction's, bits/dim."""
        return math.hypot(self.noise / math.sqrt(self.size), self.correction.stderr)

    def __str__(self) -> str:
        if self.everything:
            return (
                f"all {self.size:,} images, {self.all_passes:,.0f} network passes, ± {self.reached_by_all:.2g} bits/dim: a "
                f"sample that reaches ± {self.precision:g} would take no fewer"
            )
        c = self.correction
        steps = (
            f", with {'half' if c.half else 'all'} the steps and {c.mean:+.4f} ± {c.stderr:.2g} for it"
            if c.images
            else ""
        )
        used = f"{len(self.which)} forward passes an image" if self.which else "one to see which are suspect, none"
        return (
            f"survey: {self.images:,} of {self.size:,} images exactly"
            f"{f' and some {self.suspect * self.size:,.0f} suspect ones' if self.suspect else ''}{steps}, "
            f"{used} for predictions (R2 {self.r2:.3f}): "
            f"{self.passes:,.0f} network passes, ± {self.precision:g} bits/dim; all images: {self.all_passes:,.0f} passes, "
            f"± {self.reached_by_all:.2g}; the pilot took {self.spent:,}"
        )


def sample_size(residual: float, noise: float, size: int, precision: float) -> int:
    """n for the precision, at most N."""
    S, tau = residual**2, noise**2
    below = precision**2 + (S - min(tau, S)) / size
    return min(size, max(1, math.ceil(S / below)))


def design(
    free: Tensor,
    paid: Tensor,
    y: Tensor,
    *,
    size: int,
    precision: float,
    noise: float,
    cost: float,
    spent: int,
    correction: Correction,
) -> Design:
    """The design from a pilot's values `y` `(n,)` and predictors `free` `(n, F)` and `paid` `(n, C)`.

    Args:
        size: N, of the set.
        precision: p, bits/dim, of the set's mean.
        noise: tau of a value, bits/dim.
        cost: passes of an exact value.
        spent: passes of the pilot.
        correction: whose error is a part of p.
    """
    n, index = len(y), torch.arange(len(y))
    # what the correction leaves of the precision; at least half, or a poor correction would ask for all images
    wished = math.sqrt(max(precision**2 - correction.stderr**2, precision**2 / 4))

    def attempt(which: tuple[int, ...], with_free: bool) -> Design:
        x = torch.cat([free[:, : free.shape[1] if with_free else 0], paid[:, list(which)]], dim=1)
        P = x.shape[1]
        middle = () if which or not paid.shape[1] else (paid.shape[1] // 2,)  # what `conduct` looks at
        far = suspects(torch.cat([x, paid[:, list(middle)]], dim=1), most=MOST_SUSPECT_IN_PILOT)
        near = index[~far]
        q = 1 - len(near) / n
        off = Fit.of(x[near], torch.arange(len(near)), y[near]).left_out
        degrees = max(1, len(near) - P - 1)
        kurtosis = float(off.square().square().mean() / off.square().mean().square()) if bool((off != 0).any()) else 3.0
        larger = 1 + SAFETY * math.sqrt(max(kurtosis - 1, 2.0) / degrees)
        residual = float(off.square().mean().sqrt()) * math.sqrt(larger)
        # the pilot's images have their values already
        rest = size - round(q * size)
        images = min(rest, max(sample_size(residual, noise, rest, wished / (1 - q)), least_images(P), n))
        images = size if images >= rest else images
        made = Design(
            size=size,
            precision=precision,
            which=which,
            free=with_free,
            residual=residual,
            noise=noise,
            r2=r_squared(y[near], off),
            cost=cost,
            suspect=q,
            images=images,
            spent=spent,
            correction=correction,
        )
        return made if made.passes < made.all_passes else attempt_all(made)

    def attempt_all(made: Design) -> Design:
        return Design(**{**vars(made), "images": size, "which": ()})

    best = attempt((), False)
    with_free = attempt((), True)
    best = with_free if with_free.passes < best.passes else best
    for use_free in (True, False) if free.shape[1] else (False,):
        current = attempt((), use_free)
        while len(current.which) < paid.shape[1]:
            tries = [attempt((*current.which, j), use_free) for j in range(paid.shape[1]) if j not in current.which]
            better = min(tries, key=lambda d: d.passes)
            if better.passes >= current.passes or better.everything:
                break
            current = better
        best = current if current.passes < best.passes else best
    if not best.everything and best.r2 < LEAST_R2:
        return attempt((), False)
    return best
