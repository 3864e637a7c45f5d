r"""Corrections of a score, as score -> score.

A correction changes what one evaluation says, before a sampler uses it. All are stated through the denoised mean
D = (x + sigma^2 score) / alpha ((2) in `sde_lib.score`), so they mean the same for every sampler and every SDE.

- `ClipDenoised`: D is clipped to the data's range (Ho et al. 2020, arXiv:2006.11239, its published code).
- `DynamicThreshold`: D is clipped per sample at a quantile of its own magnitudes and scaled back into the range
  (Saharia et al. 2022, arXiv:2205.11487, section 2.3), against the saturation that strong guidance brings.
- `Temperature`: the score of data made colder or hotter, p^(1/tau), as it would be for N(0, data_std^2 I) data
  (Ingraham et al. 2023, "Illuminating protein space with a programmable generative model", its low-temperature sampling).

A sampler takes them as `corrections=(ClipDenoised(), ...)`; `correction(sde, score)` wraps a score anywhere else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError, expand_as, take
from sde_lib import SDE, Score
from sde_lib.score import score_of_denoised, tweedie


class Correction(ABC):
    """A change of what a score says; `correction(sde, score)` is the corrected score."""

    @abstractmethod
    def apply(self, sde: SDE, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """The corrected value `(B, *)` of `score` `(B, *)`, evaluated at `x` `(B, *)` and `t` `(B,)`."""

    def __call__(self, sde: SDE, score: Score) -> CorrectedScore:
        return CorrectedScore(sde, score, (self,))


class CorrectedScore:
    """A score with corrections applied in order; itself a score."""

    def __init__(self, sde: SDE, score: Score, corrections: Sequence[Correction]) -> None:
        self.sde, self.score, self.corrections = sde, score, tuple(corrections)

    @staticmethod
    def around(sde: SDE, score: Score, corrections: Sequence[Correction]) -> Score:
        """`score` itself where there is nothing to correct."""
        return CorrectedScore(sde, score, corrections) if corrections else score

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        value = self.score(x, t)
        for correction in self.corrections:
            value = correction.apply(self.sde, x, t, value)
        return value

    def score_and_variance(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The corrected score and the learned variance's place, as it is, both `(B, *)`, from one evaluation.

        Raises:
            UserError: for a score that has no variance.
        """
        asked: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = getattr(
            self.score, "score_and_variance", None
        )
        if asked is None:
            raise UserError(
                "got a score without score_and_variance(x, t); expected a model trained with a learned variance"
            )
        value, place = asked(x, t)
        for correction in self.corrections:
            value = correction.apply(self.sde, x, t, value)
        return value, place

    def take(self, index: Tensor) -> CorrectedScore:
        return CorrectedScore(self.sde, take(self.score, index), self.corrections)


class _OfDenoised(Correction):
    """A correction that changes the denoised mean."""

    @abstractmethod
    def denoised(self, x_0: Tensor) -> Tensor:
        """The corrected mean, `(B, *)`."""

    def apply(self, sde: SDE, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
        return score_of_denoised(sde, self.denoised(tweedie(sde, score, x, t)), x, t)


@dataclass(frozen=True, kw_only=True)
class ClipDenoised(_OfDenoised):
    """The denoised mean clipped to [low, high], the range of the data as the score sees them."""

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"got low={self.low}, high={self.high}; expected low < high")

    def denoised(self, x_0: Tensor) -> Tensor:
        return x_0.clamp(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class DynamicThreshold(_OfDenoised):
    """With s the `quantile` of |D - middle| in a sample, but at least the half range: D clipped to +- s, then scaled so
    that s becomes the half range.

    Args:
        quantile: in (0, 1).
        low, high: the range of the data.
    """

    quantile: float = 0.995
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise UserError(f"got quantile={self.quantile}; expected a number in (0, 1)")
        if not self.low < self.high:
            raise UserError(f"got low={self.low}, high={self.high}; expected low < high")

    def denoised(self, x_0: Tensor) -> Tensor:
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        centred = x_0 - middle
        # by sorting: torch.quantile refuses large inputs and half precision
        magnitudes = centred.abs().flatten(1).sort(dim=1).values
        s = magnitudes[:, math.ceil(self.quantile * magnitudes.shape[1]) - 1].clamp(min=half)
        s = expand_as(s, x_0)
        return torch.maximum(torch.minimum(centred, s), -s) * (half / s) + middle


@dataclass(frozen=True, kw_only=True)
class Temperature(Correction):
    """The score times (alpha^2 v + sigma^2) / (alpha^2 v tau + sigma^2), v = data_std^2.

    That is the score of N(0, tau v I) data where the given one is of N(0, v I); for other data it sharpens (tau < 1) or
    broadens (tau > 1), and leaves pure noise alone.
    """

    tau: float = 1.0
    data_std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tau", "data_std"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"got {name}={value}; expected a finite number > 0")

    def apply(self, sde: SDE, x: Tensor, t: Tensor, score: Tensor) -> Tensor:
        signal, variance = (sde.alpha(t) * self.data_std).square(), sde.sigma(t).square()
        return score * expand_as((signal + variance) / (signal * self.tau + variance), x)
