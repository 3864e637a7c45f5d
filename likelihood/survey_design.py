r"""How large a survey's sample has to be, and which predictors pay.

The variance of the mean is (1 - f) S^2 / n + f tau^2 / n (`likelihood.regression_estimate`), S^2 the mean square of what the
predictions miss. For a precision p,

    n = S^2 / (p^2 + (S^2 - tau^2) / N)

is fixed once, from a pilot's S^2, made larger by 1.64 of its own standard errors: a survey that stopped where its error looks
small would stop where it is understated. Predictors that take network passes are added one by one as long as the whole becomes
cheaper,

    passes = L N + c n,      c those of an exact value, L levels

to which what finds this out comes on top, the choice of the steps, the trial and the repetitions. All of it is weighed against
N c' and the choice of the steps alone, c' those of a value with all the steps.

What half the steps lose and the mean needs for it is in `likelihood.step_correction`, and what the pilot may take in
`likelihood.survey_budget`.

Images whose predictors are far from all others' (`likelihood.suspects`) are scored in any case. They are no part of S, which
they would make too large: of a set of which the pilot says that a share q is suspect, n is for the other (1 - q) N, whose mean
is needed to p / (1 - q) only, and c q N passes more are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from likelihood.regression_estimate import Fit, r_squared
from likelihood.step_correction import Correction
from likelihood.student_error import stated_error
from likelihood.surrogate import least_images
from likelihood.survey_budget import AT_ONCE
from likelihood.suspects import MOST_SUSPECT, suspects, telling
from likelihood.winners_curse import winners_curse

MOST_SUSPECT_IN_PILOT = 0.1  # more than of the set: of few images there may be many by chance
SAFETY = (
    1.64  # standard errors of the pilot's S^2, so that its own error alone lets 19 surveys in 20 reach their precision
)
LEAST_R2 = 0.1
"""Predictions that know less than this are not worth their regression: the plain mean is taken."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a pilot has found, and what is to be done.

    Attributes:
        size: N.
        precision: p.
        which: the predictors with passes that pay.
        looked: the one that is asked where none of them pays, to see which images are suspect; None where none is finite.
        free: are the predictors without passes used?
        residual: S, made larger by the pilot's own error, and by what its choice of predictors hides.
        curse: by how much the latter (`likelihood.winners_curse`).
        noise: tau; NaN where a set is too small for values to be made twice.
        degrees: of freedom of its square, the repetitions or draws from which it is known.
        r2: on the pilot's images, each left out.
        cost: c, passes of an exact value as they are made.
        full_cost: c', of one with all the steps.
        images: n, of those that are not suspect; N where scoring all is cheaper, or needed.
        suspect: q, the share of the pilot's images whose predictors are far from the others'.
        pilot: images of the pilot, whose values are made.
        spent: passes that are taken by now: `before`, and all of the pilot's.
        correction: for the steps that values have too few.
        before: passes that were taken before there was a pilot, such as for the choice of steps; a part of `spent`.
        at_once: are all images scored without asking a pilot, because a survey could not take less?
    """

    size: int
    precision: float
    which: tuple[int, ...]
    looked: int | None
    free: bool
    residual: float
    noise: float
    degrees: int
    r2: float
    cost: float
    full_cost: float
    images: int
    pilot: int
    spent: int
    suspect: float = 0.0
    curse: float = 1.0
    correction: Correction = Correction()
    before: int = 0
    at_once: bool = False

    @classmethod
    def of_all(
        cls,
        *,
        size: int,
        precision: float,
        noise: float,
        degrees: int,
        cost: float,
        pilot: int,
        spent: int,
        before: int,
    ) -> Design:
        """Every image scored, at once."""
        return cls(
            size=size,
            precision=precision,
            which=(),
            looked=None,
            free=False,
            residual=math.nan,
            noise=noise,
            degrees=degrees,
            r2=math.nan,
            cost=cost,
            full_cost=cost,
            images=size,
            pilot=pilot,
            spent=spent,
            before=before,
            at_once=True,
        )

    @property
    def everything(self) -> bool:
        """Are all images scored?"""
        return self.images >= self.size

    @property
    def _exactly(self) -> float:
        """How many images are scored, the suspect ones as the pilot has them."""
        return float(self.size) if self.everything else min(self.size, self.images + self.suspect * self.size)

    @property
    def _predicting(self) -> int:
        """Passes of all images' predictions."""
        # without a level there is one all the same, to see which images are suspect
        return 0 if self.everything else (len(self.which) or int(self.looked is not None)) * self.size

    @property
    def sampling(self) -> float:
        """Passes of the sample's values, the pilot's among them, and of the predictions: what a design can change."""
        return self.cost * self._exactly + self._predicting

    @property
    def passes(self) -> float:
        """Of the survey in all: what is spent by now, and what is still to come."""
        return self.spent + self.cost * (self._exactly - self.pilot) + self._predicting

    @property
    def whole(self) -> float:
        """Passes of all images' values with all the steps."""
        return self.full_cost * self.size

    @property
    def all_passes(self) -> float:
        """Of scoring all images with all the steps and no pilot, with what was taken before."""
        return self.before + self.whole

    @property
    def reached_by_all(self) -> float:
        """The error of this set's mean where all images are scored: the noise's and the correction's, bits/dim."""
        return stated_error([(self.noise**2 / self.size, self.degrees), self.correction.variance])

    @property
    def why_all(self) -> str:
        """Where all images are scored, why."""
        if self.at_once:
            return f"a survey cannot take less: of up to {AT_ONCE} images its pilot alone is most"
        return f"a sample that reaches ± {self.precision:g} would take no fewer passes"

    def __str__(self) -> str:
        c = self.correction
        steps = (
            f", with {'half' if c.half else 'all'} the steps and {c.mean:+.4f} ± {c.stderr:.2g} for it"
            if c.images
            else ""
        )
        spent = f"{self.spent:,} are spent, on the pilot and before it"
        if self.everything:
            reached = "unknown" if self.reached_by_all != self.reached_by_all else f"{self.reached_by_all:.2g}"
            wished = (
                "" if float(reached.replace("unknown", "nan")) <= self.precision else f" (asked for {self.precision:g})"
            )
            return (
                f"all {self.size:,} images{steps}, {self.passes:,.0f} network passes, ± {reached} bits/dim{wished}: "
                f"{self.why_all}; {spent}"
            )
        look = "" if self.looked is None else "one to see which are suspect, "
        used = f"{len(self.which)} forward passes an image" if self.which else f"{look}none"
        return (
            f"survey: {self.images:,} of {self.size:,} images exactly"
            f"{f' and some {self.suspect * self.size:,.0f} suspect ones' if self.suspect else ''}{steps}, "
            f"{used} for predictions (R2 {self.r2:.3f}): "
            f"{self.passes:,.0f} network passes in all, ± {self.precision:g} bits/dim; all images"
            f"{' with all the steps' if c.half else ''}: {self.all_passes:,.0f} passes, ± {self.reached_by_all:.2g}; {spent}"
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
    degrees: int,
    cost: float,
    full_cost: float,
    pilot: int,
    spent: int,
    before: int,
    correction: Correction,
    levels: Sequence[int],
    looked: int,
) -> Design:
    """The design from a pilot's values `y` `(n,)`, NaN where one failed, and predictors `free` `(n, F)` and `paid` `(n, C)`.

    Args:
        levels: `C` numbers, of the predictors that `paid` has.
        looked: the predictor that is asked where none pays, if the pilot has asked none.
        size: N, of the set.
        precision: p, bits/dim, of the set's mean.
        noise: tau of a value, bits/dim.
        degrees: of freedom of its square.
        cost, full_cost: passes of an exact value as they are made, and of one with all the steps.
        pilot: images whose values are made, or were to be.
        spent: passes of the pilot, and before it.
        before: of these those that were taken before it.
        correction: whose error is a part of p.
    """
    index, good = torch.arange(len(y)), y.isfinite()
    free = free if bool(telling(free).all()) else free[:, :0]
    asked: int | None = looked
    if len(levels):
        usable = telling(paid)
        levels, paid = [level for level, tells in zip(levels, usable.tolist(), strict=True) if tells], paid[:, usable]
        asked = levels[len(levels) // 2] if levels else None
    # what the correction leaves of the precision; at least half, or a poor correction would ask for all images
    wished = math.sqrt(max(precision**2 - correction.stderr**2, precision**2 / 4))

    everything = Design(
        size=size,
        precision=precision,
        which=(),
        looked=asked,
        free=False,
        residual=math.nan,
        noise=noise,
        degrees=degrees,
        r2=0.0,
        cost=cost,
        full_cost=full_cost,
        images=size,
        pilot=pilot,
        spent=spent,
        before=before,
        correction=correction,
    )

    def attempt(which: tuple[int, ...], with_free: bool, *, judged: bool = False) -> Design:
        x = torch.cat([free[:, : free.shape[1] if with_free else 0], paid[:, list(which)]], dim=1)
        P = x.shape[1]
        seen = [levels.index(asked)] if not which and asked in levels else []  # what `conduct` looks at
        far = suspects(torch.cat([x, paid[:, seen]], dim=1), most=MOST_SUSPECT_IN_PILOT)
        near = index[~far & good]
        q = float(far.double().mean())
        # predictors of which each misses other images: no sample is left that they predict
        if q > 0.5 or len(near) < P + 3:
            return everything
        off = Fit.of(x[near], torch.arange(len(near)), y[near]).left_out
        left = max(1, len(near) - P - 1)
        kurtosis = float(off.square().square().mean() / off.square().mean().square()) if bool((off != 0).any()) else 3.0
        larger = 1 + SAFETY * math.sqrt(max(kurtosis - 1, 2.0) / left)
        curse = 1.0
        if judged:
            finite = paid[near].isfinite().all(dim=0)
            kept = finite.nonzero().squeeze(1).tolist()
            given = free[near, : free.shape[1] if with_free else 0]
            curse = winners_curse(given, paid[near][:, kept], y[near], [kept.index(j) for j in which])
        residual = float(off.square().mean().sqrt()) * math.sqrt(larger) * curse
        rest = size - round(q * size)
        wanted = max(sample_size(residual, noise, rest, wished / (1 - q)), least_images(P))
        # of those that are not suspect as many fail as of the pilot's
        images = min(rest, max(math.ceil(wanted * int((~far).sum()) / len(near)), pilot))
        images = size if images >= rest else images
        made = replace(
            everything,
            which=tuple(levels[j] for j in which),
            free=with_free,
            residual=residual,
            curse=curse,
            r2=r_squared(y[near], off),
            suspect=q,
            images=images,
        )
        # as many may turn out to be suspect as there may be
        pays = made.sampling < (1 - MOST_SUSPECT) * cost * size
        return made if pays else replace(made, images=size, which=())

    best = attempt((), False)
    with_free = attempt((), True)
    # of two that take alike the one that knows more is nearer
    best = with_free if (with_free.sampling, -with_free.r2) < (best.sampling, -best.r2) else best
    for use_free in (True, False) if free.shape[1] else (False,):
        current = attempt((), use_free)
        used: tuple[int, ...] = ()
        while len(used) < paid.shape[1]:
            tries = [(*used, j) for j in range(paid.shape[1]) if j not in used]
            better, which = min(((attempt(t, use_free), t) for t in tries), key=lambda found: found[0].sampling)
            if better.sampling >= current.sampling or better.everything:
                break
            current, used = better, which
        if used:
            current = min(
                (attempt(used, use_free, judged=True), attempt((), use_free)), key=lambda found: found.sampling
            )
        best = current if current.sampling < best.sampling else best
    if not best.everything and best.r2 < LEAST_R2:
        return attempt((), False)
    return best
