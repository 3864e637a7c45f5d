"""A set of images and a score, as a survey asks them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.transforms import Transform
from likelihood.bits_per_dim import BitsPerDim, bits_per_dim, in_bits
from likelihood.companion import with_one_probe
from likelihood.dequantization import Dequantizer
from likelihood.divergence import Divergence
from likelihood.draw_places import COMPARED, REPEATED
from likelihood.method import Method
from likelihood.refinement import Refinement
from likelihood.roughness import roughness
from likelihood.surrogate import CANDIDATES, denoising_errors, noise_levels
from likelihood.survey_population import Differences, Halving, Population, Values
from numerics import SampleStreams, take
from sde_lib import SDE, CountedScore, Score

FEWEST_STEPS = 16
"""Of a method of fewer steps no half is taken."""


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
        self.steps = 0 if method.finer() is None else method.solver.steps
        self.refinement: Refinement | None = None
        self._known: dict[object, Values] = {}

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
        key = (self.refinement, repeat, half, *index.tolist())
        if key not in self._known:
            parts = [self.score_exactly(part, repeat, half) for part in _batches(index, self.batch_size)]
            self._known[key] = values_of(parts)
        return self._known[key]

    @property
    def has_half(self) -> bool:
        """Can values be made with half the steps?"""
        return self.steps >= FEWEST_STEPS

    @property
    def dearer(self) -> float:
        return (self.steps + 1) / (self.steps // 2 + 1)  # an evaluation a step, and one at the start

    def refining(self, refinement: Refinement | None) -> ImageSet:
        if refinement is None or refinement == self.refinement or not self.steps:
            return self
        made = copy.copy(self)
        made.refinement = refinement
        return made

    def made_with(self, half: bool) -> Method:
        """The method of values. One that solves images again by a rule of its own goes on to, where it has all its steps."""
        if half:
            return replace(self.method.with_steps(self.steps // 2), refinement=self.refinement)
        return replace(self.method, refinement=self.method.refinement or self.refinement)

    def halving(self, index: Tensor) -> Halving | None:
        if not self.has_half:
            return None
        return halving_of([self.compare_steps(part, twice=False) for part in _batches(index, self.batch_size)])

    def differences(self, index: Tensor) -> Differences | None:
        if not self.steps:
            return None
        return differences_of([self.compare_steps(part, twice=True) for part in _batches(index, self.batch_size)])

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

    def compare_steps(self, index: Tensor, *, twice: bool) -> Tensor:
        """Bits/dim of one batch with half, once and, where asked for, twice the steps, the first one's estimate of its state's
        error, and the network passes of each, `(k, 4)` or `(k, 5)`; once in the place of half where no half is taken."""
        # as values are made, refinement and all: what it mends must not be mended again
        more = [self.method.with_steps(2 * self.steps)] if twice else []
        methods = [self.made_with(self.has_half), self.made_with(False), *more]
        streams = SampleStreams(self.seed, self.ids[index], draw=COMPARED)
        t_min = self.method.time(self.sde)
        x, cost = self.dequantizer(
            self.batch(index), self.transform, self.sde, t_min, generator=streams, dtype=torch.float32
        )
        counted = CountedScore(take(self.score, index))
        exact = self.divergence is not None and self.divergence.exact
        found = with_one_probe(self.sde, counted, x, methods=methods, exact=exact, streams=streams)
        bits = [in_bits(-(each.log_prob + cost), x[0].numel()) for each in found]
        products = x[0].numel() if exact else 1
        passes = torch.full_like(bits[0], (1 + 2 * products) * counted.evaluated / len(index))
        return torch.stack([*bits, found[0].state_error, passes], dim=1).cpu()

    def score_exactly(self, index: Tensor, repeat: int, half: bool) -> BitsPerDim:
        """The exact values of one batch."""
        return bits_per_dim(
            self.sde,
            take(self.score, index),
            self.batch(index),
            self.transform,
            method=self.made_with(half),
            dequantizer=self.dequantizer,
            divergence=self.divergence,
            draws=self.draws,
            companions=0,  # the solver's error is the differences'
            generator=SampleStreams(self.seed, self.ids[index], draw=repeat * REPEATED),
        )


def _batches(index: Tensor, size: int) -> list[Tensor]:
    return [index[i : i + size] for i in range(0, len(index), size)]


def values_of(parts: list[BitsPerDim]) -> Values:
    """A survey's values from results of consecutive batches."""
    whole = BitsPerDim.concatenate(parts)
    bits = torch.where(whole.converged, whole.per_image, math.nan).cpu()
    passes = sum(int(p.evaluations.sum()) * (p.nfe + 2 * p.nbe) // max(1, p.nfe) for p in parts)
    solver_error, refined = whole.stated_error.cpu(), whole.refined.cpu()
    noise, degrees = _noise(whole)
    return Values(bits=bits, solver_error=solver_error, passes=passes, noise=noise, degrees=degrees, refined=refined)


def _noise(whole: BitsPerDim) -> tuple[float, int]:
    """The standard deviation of an image's value by its own noise, from the spread of its draws, and the degrees of freedom
    of that; 0 of an exact trace without noise, which is one number each time, and else NaN of one draw."""
    if whole.exact and not whole.noisy:
        return 0.0, 0
    draws = whole.estimates.mean(dim=2)[whole.converged]
    n, m = draws.shape
    return (float((draws.var(dim=1).mean() / m).sqrt()), n * (m - 1)) if m > 1 and n else (math.nan, 0)


def halving_of(parts: list[Tensor]) -> Halving:
    """What half the steps lose, from results of `compare_steps`."""
    half, whole, error, passes = torch.cat(parts).unbind(dim=1)
    return Halving(lost=whole - half, passes=round(float(passes.sum())), state_error=error)


def differences_of(parts: list[Tensor]) -> Differences:
    """A survey's differences from results of `compare_steps`."""
    half, whole, twice, error, passes = torch.cat(parts).unbind(dim=1)
    return Differences(half=twice - half, whole=twice - whole, passes=round(float(passes.sum())), state_error=error)
