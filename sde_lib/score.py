r"""Scores, and what one evaluation of a score says.

A *score* is any callable `score(x, t)` with x `(B, *)` and t `(B,)` that returns grad_x log p_t(x), `(B, *)`. One that
holds per-sample data (labels, measurements) has `score.take(index)`, the score for some of the samples.

    (1)  eps(x, t) = -sigma score(x, t)                       the predicted noise
    (2)  E[x_0 | x_t] = (x_t + sigma^2 score(x_t, t)) / alpha  the denoised mean

(2) is Tweedie's formula (Robbins 1956; Efron 2011, "Tweedie's Formula and Selection Bias") for the kernel of an SDE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from numerics import UserError, batch_time, expand_as, take
from sde_lib.train_mode import require_eval_mode

if TYPE_CHECKING:
    from sde_lib.base import SDE, Time

Score = Callable[[Tensor, Tensor], Tensor]


class CountedScore:
    """A score that counts its calls: `nfe` of them, whatever the batch.

    Args:
        score: any, with or without a `take` of its own.

    Raises:
        UserError: a network in train mode that answers differently there; see `sde_lib.train_mode`.
    """

    def __init__(self, score: Score) -> None:
        require_eval_mode(score)
        self.score = score
        self._counts = [0, 0]  # shared with those that take() makes

    @property
    def nfe(self) -> int:
        """The number of calls so far."""
        return self._counts[0]

    @property
    def evaluated(self) -> int:
        """The samples of all calls together."""
        return self._counts[1]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score at `x` `(B, *)` and `t` `(B,)`, counted."""
        self._counts[0] += 1
        self._counts[1] += len(x)
        return self.score(x, t)

    def take(self, index: Tensor) -> CountedScore:
        """The score for the samples at `index` `(b,)`, which counts into the same number."""
        fewer = CountedScore.__new__(CountedScore)  # its network was looked at
        fewer.score, fewer._counts = take(self.score, index), self._counts
        return fewer


class ScoreIn:
    """A score that is given x in `dtype`, and whose value comes back in the dtype of x.

    So states can stay in float32 where a network runs in less.

    Args:
        score: any score.
        dtype: the dtype of x that the score sees.
    """

    def __init__(self, score: Score, dtype: torch.dtype) -> None:
        self.score, self.dtype = score, dtype

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score at `x` `(B, *)` and `t` `(B,)`."""
        return self.score(x.to(self.dtype), t).to(x.dtype)

    def score_and_variance(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Likewise of a score that has it."""
        value, place = self.score.score_and_variance(x.to(self.dtype), t)  # type: ignore[attr-defined]
        return value.to(x.dtype), place.to(x.dtype)

    def take(self, index: Tensor) -> ScoreIn:
        """The score of the samples at `index` `(b,)`."""
        return ScoreIn(take(self.score, index), self.dtype)


def in_dtype(score: Score, dtype: torch.dtype) -> Score:
    """The score whose network is given x in `dtype`, while the state stays as it is.

    A score made from scores has a method `in_dtype(dtype)` that passes it on: what it computes itself, such as a measurement's
    residual, would lose its digits.
    """
    own = getattr(score, "in_dtype", None)
    made: Score = ScoreIn(score, dtype) if own is None else own(dtype)
    return made


def check_score(value: Tensor, x: Tensor) -> Tensor:
    """`value`, what a score has returned for `x` `(B, *)`.

    Raises:
        UserError: where its shape is not that of `x`.
    """
    if value.shape != x.shape:
        raise UserError(
            f"got a score of shape {tuple(value.shape)} for x of shape {tuple(x.shape)}; expected the same shape"
        )
    return value


def noise(sde: SDE, score: Score, x: Tensor, t: Time) -> Tensor:
    """The predicted noise eps = -sigma(t) score(x, t), `(B, *)`, for `x` `(B, *)` and `t` `()` or `(B,)`; one evaluation."""
    t = batch_time(t, x)
    return -expand_as(sde.sigma(t), x) * score(x, t)


def denoised(sde: SDE, score: Score, x: Tensor, t: Time) -> Tensor:
    """Tweedie's mean E[x_0 | x_t = x] = (x + sigma^2 score(x, t)) / alpha, `(B, *)`; one evaluation.

    For `x` `(B, *)` and `t` `()` or `(B,)` (Efron 2011, "Tweedie's Formula and Selection Bias").
    """
    t = batch_time(t, x)
    return tweedie(sde, score(x, t), x, t)


def tweedie(sde: SDE, value: Tensor, x: Tensor, t: Time) -> Tensor:
    """`denoised` for a score's `value` `(B, *)` that is known already: (x + sigma^2 value) / alpha."""
    t = batch_time(t, x)
    return (x + expand_as(sde.sigma(t).square(), x) * value) / expand_as(sde.alpha(t), x)


def score_of_denoised(sde: SDE, x_0: Tensor, x: Tensor, t: Time) -> Tensor:
    """The inverse of `tweedie`: the score `(B, *)` whose denoised mean is `x_0` `(B, *)`, (alpha x_0 - x) / sigma^2."""
    t = batch_time(t, x)
    return (expand_as(sde.alpha(t), x) * x_0 - x) / expand_as(sde.sigma(t).square(), x)
