"""A set's mean bits/dim to a wished precision, from few exact values and many inexpensive predictions.

Every image gets predictors (`likelihood.surrogate`), a random sample its exact value, and the mean is the regression estimate
(`likelihood.regression_estimate`) from a sample whose size a pilot has fixed (`likelihood.survey_design`). Images whose
predictors are far from all others' are suspect: what predicts the others need not predict them, and a few of them in or out of
the sample would decide the mean. They are scored all. Which these are follows from predictors alone, so that what is drawn of
the rest is a random sample of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.transforms import Transform
from likelihood.bits_per_dim import BitsPerDim, bits_per_dim, in_bits
from likelihood.companion import with_one_probe
from likelihood.dequantization import Dequantizer, default_dequantizer
from likelihood.divergence import Divergence
from likelihood.method import Method
from likelihood.regression_estimate import RegressionEstimate, regression_estimate
from likelihood.roughness import roughness
from likelihood.surrogate import CANDIDATES, denoising_errors, noise_levels
from likelihood.survey_design import (
    DIFFERENCES,
    REPEATS,
    Correction,
    Design,
    Differences,
    Population,
    Values,
    design,
    pilot_size,
)
from likelihood.suspects import suspects
from numerics import SampleStreams, UserError, require_count, require_positive, take, uniform
from sde_lib import SDE, CountedScore, Score

FEWEST = 4
"""Images of a set from which a sample is thought of; fewer are all scored."""

FEWEST_STEPS = 16
"""Of a method of fewer steps no half is taken: its values are made with the steps that it has."""

_REPEAT_DRAWS = 1 << 26  # between the streams of a value and of its repetition
_COMPARED_DRAWS = 3 << 27  # where those begin of the images that show what more steps change


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a survey found.

    Attributes:
        estimate: the mean of values as they were made and its two errors, the correction apart.
        design: what the pilot had found.
        scored: the images with exact values, `(n,)`, rising.
        exact: their values `(n,)` bits/dim, as they were made, with half the steps where the design says so; NaN where one
            failed.
        solver_error: `(n,)` bits/dim, as stated.
        suspect: `(N,)`, the images scored in any case.
        passes: network passes in all, the pilot's included: forward 1, vector-Jacobian product 2.
    """

    estimate: RegressionEstimate
    design: Design
    scored: Tensor
    exact: Tensor
    solver_error: Tensor
    suspect: Tensor
    passes: int

    @property
    def mean(self) -> float:
        """Bits/dim of the set."""
        return self.estimate.mean + self.design.correction.mean

    @property
    def stderr(self) -> float:
        """The standard error of `mean`, the choice of the set's images included; the solver's bias is `solver`."""
        return math.hypot(self.estimate.total, self.design.correction.stderr)

    @property
    def estimate_stderr(self) -> float:
        """The standard error of `mean` as the mean of this set."""
        return math.hypot(self.estimate.stderr, self.design.correction.stderr)

    @property
    def solver(self) -> float:
        """Bits/dim, the solver's error as stated: a bias, which no sample makes smaller. NaN where it is not known.

        What twice the method's steps still changed, by which the mean has been corrected; else what the solver states.
        """
        if self.design.correction.images:
            return self.design.correction.left
        known = self.solver_error[self.solver_error.isfinite()]
        return float(known.mean()) if len(known) else math.nan

    @property
    def failed(self) -> Tensor:
        """`(k,)`: the scored images that have no value."""
        return self.scored[self.exact.isnan()]

    @property
    def _failing(self) -> float:
        """The share of the set that fails, from those scored: a suspect image stands for itself, another for more."""
        failed, suspect, N = self.exact.isnan(), self.suspect[self.scored], len(self.suspect)
        others = int((~suspect).sum())
        weight = int((~self.suspect).sum()) / others if others else 0.0
        return (int((failed & suspect).sum()) + weight * int((failed & ~suspect).sum())) / N

    @property
    def notes(self) -> list[str]:
        """What is to be said beside the numbers, a line each."""
        lines, e, d = [], self.estimate, self.design
        if self.solver > max(d.precision, self.estimate_stderr):
            lines.append("the solver's error is larger than the precision: take more steps, or a smaller tolerance")
        if d.everything:
            lines.append("all images were scored: a sample would take no fewer passes")
        elif not d.which and not d.free:
            lines.append("predictions say nothing of these images: the mean is the sample's own")
        if d.correction.stderr > d.precision / 2:
            lines.append(
                f"asked for ± {d.precision:g}: twice the steps change images by too different amounts: take more steps"
            )
        elif self.estimate_stderr > 1.25 * d.precision:
            lines.append(f"asked for ± {d.precision:g}: the pilot's images were easier to predict than the sample's")
        k = len(self.failed)
        if k:
            named = ", ".join(str(int(i)) for i in self.failed[:10]) + (", ..." if k > 10 else "")
            known = self.exact[~self.exact.isnan()]
            furthest = float((known - e.mean).abs().max()) if len(known) else math.nan
            share = self._failing
            lines.append(
                f"{k} of {len(self.scored):,} scored images failed ({named}) and have no value; were such images off "
                f"by {furthest:.2g} bits/dim, the furthest value, the mean would move by {share * furthest:.2g}"
            )
        return lines

    def __str__(self) -> str:
        e, d = self.estimate, self.design
        r2 = "" if e.r2 != e.r2 else f", R2 {e.r2:.3f}"
        text = (
            f"{self.mean:.4f} ± {self.estimate_stderr:.2g} bits/dim (this set's mean; with the choice of its images "
            f"± {self.stderr:.2g}; solver "
            f"{'unknown' if self.solver != self.solver else f'{self.solver:.2g}'}), from "
            f"{len(self.scored):,} of {d.size:,} images{r2}; {self.passes:,} network passes, {d.all_passes:,.0f} for all images"
        )
        return text + "".join(f"; {line}" for line in self.notes)

    def asdict(self) -> dict[str, object]:
        """Plain numbers for a results file."""
        e, c = self.estimate, self.design.correction
        return {
            "mean": self.mean,
            "stderr": self.stderr,
            "data_stderr": e.images_stderr,
            "solver_error": self.solver,
            "images": self.design.size,
            "not_converged": len(self.failed),
            "survey": {
                "images": self.design.size,
                "images_scored": len(self.scored),
                "estimate_stderr": self.estimate_stderr,
                "r2": e.r2,
                "evaluations": self.passes,
                "precision": self.design.precision,
                "predictors": list(self.design.which),
                "free_predictors": self.design.free,
                "residual": e.residual,
                "noise": self.design.noise,
                "correction": {"half_the_steps": c.half, "mean": c.mean, "stderr": c.stderr, "images": c.images},
                "suspect": int(self.suspect.sum()),
                "pilot_evaluations": self.design.spent,
                "evaluations_for_all": self.design.all_passes,
                "notes": self.notes,
            },
        }


def order_of(size: int, seed: int) -> Tensor:
    """A random order of the images `(size,)`, which the seed fixes."""
    return uniform((size, 1), SampleStreams(seed, torch.arange(size), draw=1 << 29)).squeeze(1).argsort()


def plan_survey(population: Population, *, precision: float, seed: int = 0, spent: int = 0) -> Design:
    """The design, from a pilot of random images with all predictors (`pilot_size`), 24 of them scored twice.

    Args:
        spent: passes that were taken before.

    Raises:
        UserError: for a precision that even all images would not reach, or a pilot of which fewer than half have a value.
    """
    require_positive(precision, "precision")
    N = population.size
    index = order_of(N, seed)[: pilot_size(N)].sort().values
    again = index[torch.arange(min(REPEATS, len(index))) * len(index) // min(REPEATS, len(index))]
    # images of the other end of the order, which the sample hardly ever reaches: two errors that know nothing of each other
    differences = population.differences(order_of(N, seed)[-min(N, DIFFERENCES) :].sort().values)
    correction = Correction() if differences is None else Correction.of(differences, precision, N)
    first, second = (population.values(i, k, correction.half) for k, i in enumerate((index, again)))
    good = first.bits.isfinite()
    if 2 * int(good.sum()) < len(index) or int(good.sum()) < min(N, FEWEST):
        raise UserError(
            f"got {int(good.sum())} values from a pilot of {len(index)} images; expected most of them, and {min(N, FEWEST)}: "
            "look at the score"
        )
    off = second.bits - first.bits[torch.isin(index, again)]
    noise = float((off[off.isfinite()].square().mean() / 2).sqrt())
    cost = first.passes / len(index)
    taken = first.passes + second.passes + (population.candidates * len(index) if N >= FEWEST else 0)
    taken += 0 if differences is None else differences.passes
    if N < FEWEST:
        made = Design.of_all(
            size=N, precision=precision, noise=noise, cost=cost, spent=spent + taken, correction=correction
        )
    else:
        made = design(
            population.free(index)[good],
            population.paid(index, range(population.candidates))[good],
            first.bits[good],
            size=N,
            precision=precision,
            noise=noise,
            cost=cost,
            spent=spent + taken,
            correction=correction,
        )
    if made.noise / math.sqrt(N) > precision:
        raise UserError(
            f"got precision={precision:g} for {N:,} images; expected {made.noise / math.sqrt(N):.2g} or more, what scoring all "
            "of them reaches: their values' own noise leaves that. Take more draws of it, or more probes"
        )
    return made


def conduct(population: Population, made: Design, *, seed: int = 0) -> Survey:
    """The survey of a design; the seed is that of `plan_survey`."""
    N = made.size
    everyone = torch.arange(N)
    order = order_of(N, seed)
    pilot = order[: pilot_size(N)].sort().values
    x = torch.empty(N, 0, dtype=torch.float64)
    suspect = torch.zeros(N, dtype=torch.bool)
    passes = made.spent
    if made.everything:
        sample = everyone
    else:
        if made.free:
            x = torch.cat([x, population.free(everyone)], dim=1)
        if made.which:
            x = torch.cat([x, population.paid(everyone, made.which)], dim=1)
            passes += len(made.which) * N
        looked = x
        if not made.which:  # nothing that asks the network: what it finds strange would stay hidden
            looked = torch.cat([x, population.paid(everyone, (population.candidates // 2,))], dim=1)
            passes += N
        suspect = suspects(looked)
        drawn = torch.zeros(N, dtype=torch.bool)
        drawn[order[~suspect[order]][: made.images]] = True
        drawn[pilot] = True  # they have their values, and are the first of the order
        sample = (drawn | suspect).nonzero().squeeze(1)
    half = made.correction.half
    before, rest = population.values(pilot, 0, half), sample[~torch.isin(sample, pilot)]
    bits = torch.full((N,), math.nan, dtype=torch.float64)
    solver = torch.full((N,), math.nan, dtype=torch.float64)
    bits[pilot], solver[pilot] = before.bits, before.solver_error
    if len(rest):
        found = population.values(rest, 0, half)
        bits[rest], solver[rest] = found.bits, found.solver_error
        passes += found.passes
    values = bits[sample]
    good = values.isfinite()
    if made.everything:  # images that failed are left out, as wherever all are scored
        estimate = regression_estimate(
            x[sample[good]],
            torch.arange(int(good.sum())),
            values[good],
            noise_variance=made.noise**2,
        )
    else:
        estimate = regression_estimate(x, sample[good], values[good], certain=suspect, noise_variance=made.noise**2)
    return Survey(
        estimate=estimate,
        design=made,
        scored=sample,
        exact=values,
        solver_error=solver[sample],
        suspect=suspect,
        passes=passes,
    )


class ImageSet(Population):
    """Images, asked in batches.

    Args:
        sde, score, images, transform, method, dequantizer, divergence, draws: as in `bits_per_dim`.
        data_std: the data's standard deviation in model units.
        seed: of noise and probes, keyed by an image's id.
        ids: `(N,)`, the images' ids; their numbers in the set unless given.
        batch_size: images at once.
    """

    def __init__(
        self,
        sde: SDE,
        score: Score,
        images: Tensor,
        transform: Transform,
        *,
        method: Method,
        dequantizer: Dequantizer,
        divergence: Divergence | None,
        draws: int,
        data_std: float,
        seed: int,
        batch_size: int,
        ids: Tensor | None = None,
    ) -> None:
        self.sde, self.score, self.images, self.transform = sde, score, images, transform
        self.method, self.dequantizer, self.divergence, self.draws = method, dequantizer, divergence, draws
        self.data_std, self.seed, self.batch_size = data_std, seed, batch_size
        self.ids = torch.arange(len(images)) if ids is None else ids
        self.times = noise_levels(sde, data_std=data_std, t_min=method.time(sde))
        steps = 0 if method.finer() is None else method.solver.steps
        self.fewer = method.with_steps(steps // 2 if steps >= FEWEST_STEPS else steps) if steps else None
        self._known: dict[tuple[int, ...], Values] = {}

    @property
    def size(self) -> int:
        return len(self.images)

    @property
    def candidates(self) -> int:
        return CANDIDATES

    def free(self, index: Tensor) -> Tensor:
        if self.transform.levels is None:
            return torch.empty(len(index), 0, dtype=torch.float64)
        return roughness(self.images[index])

    def paid(self, index: Tensor, which: Sequence[int]) -> Tensor:
        return torch.cat([self.predict(part, list(which)) for part in _batches(index, self.batch_size)])

    def values(self, index: Tensor, repeat: int, half: bool) -> Values:
        key = (repeat, half, *index.tolist())
        if key not in self._known:
            parts = [self.score_exactly(part, repeat, half) for part in _batches(index, self.batch_size)]
            self._known[key] = values_of(parts)
        return self._known[key]

    def differences(self, index: Tensor) -> Differences | None:
        if self.fewer is None:
            return None
        return differences_of([self.compare_steps(part) for part in _batches(index, self.batch_size)])

    def batch(self, index: Tensor) -> Tensor:
        """The images `(k, *)`, where the score is."""
        return self.images[index]

    def predict(self, index: Tensor, which: list[int]) -> Tensor:
        """The denoising errors of one batch, `(k, len(which))`."""
        x = self.transform.centres(self.batch(index)).to(torch.float32)
        return denoising_errors(
            self.sde,
            take(self.score, index),
            x,
            self.times,
            which,
            data_std=self.data_std,
            streams=SampleStreams(self.seed, self.ids[index]),
        ).cpu()

    def compare_steps(self, index: Tensor) -> Tensor:
        """Bits/dim of one batch with half, once and twice the steps, and the network passes of each, `(k, 4)`."""
        assert self.fewer is not None
        steps = self.method.solver.steps
        methods = (self.fewer, self.method.with_steps(steps), self.method.with_steps(2 * steps))
        streams = SampleStreams(self.seed, self.ids[index], draw=_COMPARED_DRAWS)
        t_min = self.method.time(self.sde)
        x, cost = self.dequantizer(
            self.batch(index), self.transform, self.sde, t_min, generator=streams, dtype=torch.float32
        )
        counted = CountedScore(take(self.score, index))
        exact = self.divergence is not None and self.divergence.exact
        found = with_one_probe(self.sde, counted, x, methods=methods, exact=exact, streams=streams)
        bits = [in_bits(-(each + cost), x[0].numel()) for each in found]
        products = x[0].numel() if exact else 1
        passes = torch.full_like(bits[0], (1 + 2 * products) * counted.evaluated / len(index))
        return torch.stack([*bits, passes], dim=1).cpu()

    def score_exactly(self, index: Tensor, repeat: int, half: bool) -> BitsPerDim:
        """The exact values of one batch."""
        return bits_per_dim(
            self.sde,
            take(self.score, index),
            self.batch(index),
            self.transform,
            method=self.fewer if half else self.method,
            dequantizer=self.dequantizer,
            divergence=self.divergence,
            draws=self.draws,
            companions=0,  # the solver's error is the differences'
            generator=SampleStreams(self.seed, self.ids[index], draw=repeat * _REPEAT_DRAWS),
        )


def _batches(index: Tensor, size: int) -> list[Tensor]:
    return [index[i : i + size] for i in range(0, len(index), size)]


def values_of(parts: list[BitsPerDim]) -> Values:
    """A survey's values from results of consecutive batches."""
    whole = BitsPerDim.concatenate(parts)
    bits = torch.where(whole.converged, whole.per_image, math.nan).cpu()
    passes = sum(int(p.evaluations.sum()) * (p.nfe + 2 * p.nbe) // max(1, p.nfe) for p in parts)
    return Values(bits=bits, solver_error=whole.stated_error.cpu(), passes=passes)


def differences_of(parts: list[Tensor]) -> Differences:
    """A survey's differences from results of `compare_steps`."""
    half, whole, twice, passes = torch.cat(parts).unbind(dim=1)
    return Differences(half=twice - half, whole=twice - whole, passes=round(float(passes.sum())))


def survey(
    sde: SDE,
    score: Score,
    images: Tensor,
    transform: Transform,
    *,
    method: Method | None = None,
    precision: float = 0.01,
    dequantizer: Dequantizer | None = None,
    divergence: Divergence | None = None,
    draws: int = 1,
    data_std: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Survey:
    """The mean bits/dim of a set of images to a precision, most of them not scored.

        survey(sde, score, images, transform, method=fast(sde, score, training_samples), precision=0.005).mean

    (The regression estimator of survey sampling, `likelihood.regression_estimate`.)

    Args:
        images, transform, method, dequantizer, divergence: as in `bits_per_dim`. Give a method, of `fast`: the default is
            adaptive.
        precision: bits/dim, the wished standard error of this set's mean.
        draws: of the dequantisation noise an image; one is best unless the noise is most of the error.
        data_std: the data's standard deviation in model units; that of the images unless given.
        seed: of the noise and of the sample: the same seed gives the same survey.
        batch_size: images at once.

    Raises:
        UserError: for a precision that all images would not reach, for images as in `bits_per_dim`, or where most of them fail.
    """
    require_count(batch_size, "batch_size")
    require_count(draws, "draws")
    images = transform.grey_values(images)
    dequantizer = default_dequantizer(transform) if dequantizer is None else dequantizer
    dequantizer.check(images, transform)
    population = ImageSet(
        sde,
        score,
        images,
        transform,
        method=Method.of(method),
        dequantizer=dequantizer,
        divergence=divergence,
        draws=draws,
        data_std=float(transform.centres(images).std()) if data_std is None else data_std,
        seed=seed,
        batch_size=batch_size,
    )
    return conduct(population, plan_survey(population, precision=precision, seed=seed), seed=seed)
