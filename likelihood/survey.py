"""A set's mean bits/dim to a wished precision, from few exact values and many inexpensive predictions.

Every image gets predictors (`likelihood.surrogate`), a random sample its exact value, and the mean is the regression estimate
(`likelihood.regression_estimate`) from a sample whose size a pilot has fixed (`likelihood.survey_design`). Images whose
predictors are far from all others' are suspect: what predicts the others need not predict them, and a few of them in or out of
the sample would decide the mean. They are scored all. Which these are follows from predictors alone, so that what is drawn of
the rest is a random sample of it. Images whose steps are far too few are told only when they are scored, and all of these are
solved again with more (`likelihood.step_correction`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.transforms import Transform
from likelihood.dequantization import Checked, Dequantizer, default_dequantizer
from likelihood.divergence import Divergence
from likelihood.draw_places import ORDER
from likelihood.image_set import ImageSet
from likelihood.method import Method
from likelihood.regression_estimate import regression_estimate
from likelihood.step_correction import DOUBLED, LEAST_DIFFERENCES, TRIAL, Correction, half_will_do, refinement_of
from likelihood.student_error import at_least
from likelihood.survey_budget import Budget
from likelihood.survey_design import Design, design
from likelihood.survey_population import Population, Values
from likelihood.survey_result import Survey
from likelihood.suspects import suspects, telling
from numerics import SampleStreams, UserError, require_count, require_positive, uniform
from sde_lib import SDE, Score

__all__ = ["Survey", "conduct", "order_of", "plan_survey", "survey"]


def order_of(size: int, seed: int) -> Tensor:
    """A random order of the images `(size,)`, which the seed fixes."""
    return uniform((size, 1), SampleStreams(seed, torch.arange(size), draw=ORDER)).squeeze(1).argsort(stable=True)


def plan_survey(population: Population, *, precision: float, seed: int = 0, before: int = 0) -> Design:
    """The design, from a pilot of random images (`likelihood.survey_budget`); of a small set, that all of it is scored.

    Args:
        before: passes that were taken before, such as for the choice of steps.

    Raises:
        UserError: for a precision that even all images would not reach, or a pilot of which fewer than half have a value.
    """
    require_positive(precision, "precision")
    N, order = population.size, order_of(population.size, seed)
    require_count(N, "the number of images")
    budget = Budget(size=N)
    correction, compared = (Correction(), 0) if budget.at_once else _correction(population, order, precision)
    population = population.refining(correction.refinement)
    index = order[: budget.pilot].sort().values
    first = population.values(index, 0, correction.half)
    good, noise, degrees, repeated = first.bits.isfinite(), first.noise, first.degrees, 0
    if not budget.at_once:
        _require_most(good)
    k = budget.repeats(compared > 0, correction)
    if noise != noise and k:
        again = index[torch.arange(k) * len(index) // k]
        second = population.values(again, 1, correction.half)
        off = second.bits - first.bits[torch.isin(index, again)]
        off = off[off.isfinite()]
        noise, degrees, repeated = float((off.square().mean() / 2).sqrt()), len(off), second.passes
        if noise != noise:
            raise UserError(f"got none of {k} images' values twice; expected most of them: look at the score")
    cost = first.passes / len(index)
    spent = before + compared + repeated + first.passes
    if budget.at_once:
        made = Design.of_all(
            size=N,
            precision=precision,
            noise=noise,
            degrees=degrees,
            cost=cost,
            pilot=len(index),
            spent=spent,
            before=before,
        )
    else:
        whole = _once(first) / len(index) * population.dearer if correction.half else cost
        levels = budget.candidates(whole, population.candidates)
        made = design(
            population.free(index),
            population.paid(index, levels),
            first.bits,
            size=N,
            precision=precision,
            noise=noise,
            degrees=degrees,
            cost=cost,
            full_cost=whole,
            pilot=len(index),
            spent=spent + len(levels) * len(index),
            before=before,
            correction=correction,
            levels=levels,
            looked=population.candidates // 2,
        )
    # a few repetitions know their noise poorly: what may be reached is tried, and what was reached is said
    if at_least(made.noise, made.degrees) / math.sqrt(N) > precision:
        raise UserError(
            f"got precision={precision:g} for {N:,} images; expected {made.noise / math.sqrt(N):.2g} or more, what scoring all "
            "of them reaches: their values' own noise leaves that. Take more draws of it, or more probes"
        )
    return made


def _correction(population: Population, order: Tensor, precision: float) -> tuple[Correction, int]:
    """How many steps values are made with, what the mean needs for it, and the passes that these took.

    The trial's images and the correction's are two ends of the order's end, which the sample hardly ever reaches: neither
    knows of the other, nor the correction's error of the sample's.
    """
    budget, passes = Budget(size=len(order)), 0
    trial = population.halving(order[-TRIAL:].sort().values) if budget.tries_half else None
    refinement = None if trial is None else refinement_of(trial, precision)
    # where nothing will be solved again, nothing may be judged as if it were
    refinement = None if population.refining(refinement) is population else refinement
    half = trial is not None and half_will_do(trial, precision, budget.halved, refinement)
    passes += 0 if trial is None else trial.passes
    if half or budget.corrects_all_steps:
        asked = population.refining(refinement)
        found = asked.differences(order[-TRIAL - DOUBLED : -TRIAL].sort().values)
        more = asked.halving(order[-TRIAL - budget.halved : -TRIAL - DOUBLED].sort().values) if half else None
        if found is not None and more is not None:
            return Correction.of_half(found, more, refinement), passes + found.passes + more.passes
        if found is not None:
            return Correction.of_all(found, refinement), passes + found.passes
    elif refinement is None and budget.states_all_steps:
        some = order[-TRIAL - LEAST_DIFFERENCES : -TRIAL].sort().values
        found = population.differences(some)
        if found is not None:
            return Correction.stated(found), passes + found.passes
    return Correction(refinement=refinement), passes


def _once(found: Values) -> float:
    """The passes of values had none been solved again: with twice the steps, and once more with four times as many."""
    if found.refined is None:
        return found.passes
    shares = 2.0 ** (found.refined.double() + 1) - 1
    return found.passes * len(shares) / float(shares.sum())


def _require_most(good: Tensor) -> None:
    """Refuses values of which fewer than half are there."""
    if 2 * int(good.sum()) < len(good):
        raise UserError(
            f"got {int(good.sum())} values of {len(good)} images; expected those of most: look at the score"
        )


def conduct(population: Population, made: Design, *, seed: int = 0) -> Survey:
    """The survey of a design; the seed is that of `plan_survey`."""
    N = made.size
    population = population.refining(made.correction.refinement)
    everyone = torch.arange(N)
    order = order_of(N, seed)
    pilot = order[: Budget(size=N).pilot].sort().values
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
        if not made.which and made.looked is not None:
            # nothing that asks the network: what it finds strange would stay hidden
            seen = population.paid(everyone, (made.looked,))
            looked = torch.cat([x, seen[:, telling(seen)]], dim=1)
            passes += N
        suspect = suspects(looked)
        drawn = torch.zeros(N, dtype=torch.bool)
        drawn[order[~suspect[order]][: made.images]] = True
        drawn[pilot] = True  # they have their values, and are the first of the order
        sample = (drawn | suspect).nonzero().squeeze(1)
    half = made.correction.half
    # what the pilot has scored is known by now
    before, rest = population.values(pilot, 0, half), sample[~torch.isin(sample, pilot)]
    bits = torch.full((N,), math.nan, dtype=torch.float64)
    solver = torch.full((N,), math.nan, dtype=torch.float64)
    refined = torch.zeros(N, dtype=torch.bool)
    bits[pilot], solver[pilot], refined[pilot] = before.bits, before.solver_error, _again(before)
    if len(rest):
        found = population.values(rest, 0, half)
        bits[rest], solver[rest], refined[rest] = found.bits, found.solver_error, _again(found)
        passes += found.passes
        if found.noise == found.noise and before.noise == before.noise:  # all the draws there are
            made = replace(
                made,
                noise=math.sqrt((len(pilot) * before.noise**2 + len(rest) * found.noise**2) / len(sample)),
                degrees=before.degrees + found.degrees,
            )
    values = bits[sample]
    good = values.isfinite()
    _require_most(good[~suspect[sample]])  # the others were sought out, and may fail all of them
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
        refined=sample[refined[sample]],
        passes=passes,
    )


def _again(found: Values) -> Tensor:
    """`(k,)`: which images were solved again."""
    return torch.zeros(len(found.bits), dtype=torch.bool) if found.refined is None else found.refined.cpu() > 0


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
    ids: Sequence[int] | Tensor | None = None,
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
        ids: `(N,)`, the images' numbers, by which noise and probes are keyed; 0 to N - 1 unless given. With them a value is an
            image's own, in any order and in any part of the set.

    Raises:
        UserError: for a precision that all images would not reach, for ids that are not one integer an image, for images as in
            `bits_per_dim`, or where most of them fail.
    """
    require_count(batch_size, "batch_size")
    require_count(draws, "draws")
    require_count(seed, "seed", 0)
    if data_std is not None:
        require_positive(data_std, "data_std")
    images = transform.grey_values(images)
    ids = None if ids is None else SampleStreams(seed, ids).ids
    different = 0 if ids is None else len(set(ids.tolist()))
    if ids is not None and not different == len(ids) == len(images):
        raise UserError(
            f"got {len(ids):,} ids, {different:,} different ones, for {len(images):,} images; expected an integer >= 0 "
            "of its own for each: images with one id would share their noise"
        )
    dequantizer = default_dequantizer(transform) if dequantizer is None else dequantizer
    dequantizer.check(images, transform)
    centres = transform.centres(images)
    if not bool(centres.isfinite().all()):
        raise UserError("got data that are not finite; expected finite numbers: look at them")
    population = ImageSet(
        sde,
        score,
        images,
        transform,
        method=Method.of(method),
        dequantizer=Checked(inner=dequantizer),
        divergence=Divergence.of(divergence),
        draws=draws,
        data_std=float(centres.std(correction=0)) if data_std is None else data_std,
        seed=seed,
        batch_size=batch_size,
        ids=ids,
    )
    return conduct(population, plan_survey(population, precision=precision, seed=seed), seed=seed)
