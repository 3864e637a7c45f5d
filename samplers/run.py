r"""One run of a sampler: the counted score, the noise, and what one evaluation of the score says.

    (1)  D(x, t) = (x + sigma^2 score(x, t)) / alpha       the denoised mean
    (2)  eps(x, t) = -sigma score(x, t)                    the predicted noise

These are (2) and (1) of `sde_lib.score`. A step takes them from `Nodes`, where all samples are at one time of the grid and the
coefficients are plain numbers: one or two operations on tensors, and none that waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from numerics import Generator, expand_as, normal
from samplers.corrections import CorrectedScore, Correction
from samplers.result import Callback
from sde_lib import SDE, CountedScore, Score, check_score
from sde_lib.score import tweedie


class Run:
    """One run, as a step may use it: `run.score(x, t)` at the number t, and `run.noise(x)`.

    Args:
        sde: the forward process.
        score: `score(x, t)` with x `(B, *)`, t `(B,)`.
        corrections: of the score, applied at every evaluation, in order.
        generator: of the noise.
        like: the first state `(B, *)`.
        keep_path: the caller wants the states at all times.
        callback: called after each step.
    """

    def __init__(
        self,
        sde: SDE,
        score: Score,
        corrections: Sequence[Correction],
        generator: Generator,
        like: Tensor,
        *,
        keep_path: bool = False,
        callback: Callback | None = None,
    ) -> None:
        self.sde, self.generator, self.corrections = sde, generator, tuple(corrections)
        self.keep_path, self.callback = keep_path, callback
        self.original = score
        self.counted = _FirstLook(sde, score)
        self.batched: Score = CorrectedScore.around(sde, self.counted, self.corrections)
        self._pair: CountedScore | None = None
        self._batch, self._device = like.shape[0], like.device
        # there is no float64 on Apple's devices
        self._time_dtype = torch.float32 if like.device.type == "mps" else torch.float64
        self._last: tuple[Tensor, float, Tensor] | None = None

    @property
    def nfe(self) -> int:
        """Calls of the score so far."""
        return self.counted.nfe + (0 if self._pair is None else self._pair.nfe)

    def times(self, t: float) -> Tensor:
        """`t` for every sample, `(B,)`; a fill on the device, which waits for nothing."""
        return torch.full((self._batch,), t, dtype=self._time_dtype, device=self._device)

    def score(self, x: Tensor, t: float) -> Tensor:
        """The score at `x` `(B, *)` and the number `t`, corrected and counted."""
        return self._seen(x, t, self.batched(x, self.times(t)))

    def score_and_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The score and the learned variance's place between its bounds, both `(B, *)`, from one evaluation."""
        if self._pair is None:
            self._pair = CountedScore(self.original.score_and_variance)  # type: ignore[attr-defined]
        batch_t = self.times(t)
        value, place = self._pair(x, batch_t)
        for correction in self.corrections:
            value = correction.apply(self.sde, x, batch_t, value)
        return self._seen(x, t, value), place

    def noise(self, x: Tensor) -> Tensor:
        """Fresh standard normals shaped like `x`."""
        return normal(x.shape, self.generator, device=x.device, dtype=x.dtype)

    def denoised(self, x: Tensor, t: float) -> Tensor:
        """The denoised mean (1) given `x` at `t`, `(B, *)`; one evaluation."""
        return tweedie(self.sde, self.score(x, t), x, self.times(t))

    def estimate(self) -> Tensor | None:
        """The denoised mean as the last evaluation saw it; None where none was made, or without a callback."""
        if self._last is None:
            return None
        x, t, value = self._last
        return tweedie(self.sde, value, x, self.times(t))

    def _seen(self, x: Tensor, t: float, value: Tensor) -> Tensor:
        check_score(value, x)
        if self.callback is not None:
            self._last = (x, t, value)
        return value


class _FirstLook(CountedScore):
    """A counted score that notes, at its first call, how much of the data it sees in the noise.

    Attributes:
        shown: `()`, the mean over entries of (alpha D / prior_std)^2 / 2, D the denoised mean: nats a dimension, as
            `sde_lib.prior_mismatch` has them; None before.
    """

    def __init__(self, sde: SDE, score: Score) -> None:
        super().__init__(score)
        self.sde, self.shown = sde, cast("Tensor | None", None)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        value = super().__call__(x, t)
        if self.shown is None and value.shape == x.shape:
            signal = x + expand_as(self.sde.sigma(t).square(), x) * value
            self.shown = signal.square().mean() / (2 * self.sde.prior_std**2)
        return value


class Nodes:
    """The times of a grid and what the score says at them, with all coefficients computed beforehand.

    `nodes.denoised` and `nodes.noise` are steps' functions of `(i, x, run)`: (1) and (2) of `samplers.run` at t_i.

    Args:
        times: `(N+1,)`, float64, on the CPU.
        alpha, sigma: those of the SDE at `times`, `(N+1,)`.
    """

    def __init__(self, times: Tensor, alpha: Tensor, sigma: Tensor) -> None:
        self.t, self.alpha = numbers(times), numbers(alpha)
        self._variance, self._minus_sigma = numbers(sigma.square()), numbers(-sigma)

    def denoised(self, i: int, x: Tensor, run: Run) -> Tensor:
        """D(x, t_i), `(B, *)`."""
        return torch.add(x, run.score(x, self.t[i]), alpha=self._variance[i]).div_(self.alpha[i])

    def noise(self, i: int, x: Tensor, run: Run) -> Tensor:
        """eps(x, t_i), `(B, *)`."""
        return run.score(x, self.t[i]) * self._minus_sigma[i]


def numbers(values: Tensor) -> list[float]:
    """A vector `(N,)` as plain numbers."""
    found: list[float] = values.tolist()
    return found
