r"""Classifier-free guidance: further along the way from "anything" to "this class".

    s(x, t) = s_0(x, t) + scale (s_c(x, t) - s_0(x, t))

with s_0 the score without a class and s_c the one given it, both of one network that was trained with some labels hidden
(Ho and Salimans 2022, arXiv:2207.12598, equation (6), whose w is scale - 1). So 0 is the unconditional score and 1 the
conditional one; each then costs one evaluation of the network and every other scale two.

The guidance can be confined to an interval of log-SNR, outside which the score is the conditional one, at one evaluation
(Kynkäänniemi et al. 2024, arXiv:2404.07724): at high noise it narrows the variety of the samples, at low noise it changes
nothing. Outside it the scale is 1, whatever it is within: so scale 0 with an interval is the unconditional score within it
only, and not the unconditional law.

A large scale also makes the denoised mean D = (x + sigma^2 s) / alpha too large. Rescaling (Lin et al. 2024,
arXiv:2305.08891, section 3.4) takes back what its standard deviation over a sample's numbers has more than that of the
conditional D_c:

    D <- ((1 - rescale) + rescale min(1, std(D_c) / std(D))) D

There it is the network's output that is rescaled; the denoised mean means the same whatever the network predicts. There, too,
a deviation that is smaller than D_c's is raised. Here it is left, for guidance added nothing: of two numbers that happen to be
nearly equal the factor would be any. At scale 0 and 1 there is no guidance, and nothing is taken back.

Whose density is it? At another scale than 0 and 1, s is the score of no diffused law: not of p(x | c), nor of
p(x) p(c | x)^scale. Its probability flow is a flow all the same, and takes the prior to one normalised law at t_min. That is
the law of which `likelihood.log_likelihood` gives the density, and from which samplers of the flow draw (`ProbabilityFlow`,
`DDIM(eta=0)`, `DPMSolver`); stochastic samplers of the same score draw from another one.

The `nfe` of results counts calls of the guided score, as papers on guided samplers do; a call is two evaluations of the network
unless said otherwise above.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from numerics import UserError, batch_time, expand_as, require_range, take
from sde_lib import SDE, Score, denoised, in_dtype, noise


class Conditional(Protocol):
    """What guidance asks of a model; `models.ScoreModel` has it."""

    @property
    def sde(self) -> SDE:
        """The SDE that it is a score of."""

    def condition(self, labels: Any) -> Score:
        """The score given labels, or without them, for None."""


def require_interval(interval: Any) -> None:
    """Refuses what is neither None nor (low, high) in log-SNR with low < high; either may be infinite.

    Raises:
        UserError: with the value.
    """
    if interval is None:
        return
    ends = tuple(interval) if isinstance(interval, Sequence) else ()
    numbers = all(isinstance(end, Real) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not numbers or not ends[0] < ends[1]:
        raise UserError(
            f"got interval={interval!r}; expected (low, high) in log-SNR, low < high, such as (-4.0, 4.0); None guides "
            "everywhere"
        )


class ClassifierFree:
    """The guided score of `classifier_free`; see the head of this module.

    Args:
        sde: the SDE of both scores.
        conditional, unconditional: the scores s_c and s_0.
        scale, interval, rescale: as in `classifier_free`.

    Raises:
        UserError: a scale that is not finite, an interval that is none, a rescale outside [0, 1].
    """

    def __init__(
        self,
        sde: SDE,
        conditional: Score,
        unconditional: Score,
        scale: float,
        *,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ) -> None:
        require_range(scale, "scale", -math.inf)
        require_range(rescale, "rescale", 0, 1)
        require_interval(interval)
        self.sde, self.conditional, self.unconditional = sde, conditional, unconditional
        self.scale, self.interval, self.rescale = float(scale), interval, float(rescale)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided score at `x` `(B, *)` and `t` `()` or `(B,)`, `(B, *)`."""
        t = batch_time(t, x)
        if self.scale == 1:
            return self.conditional(x, t)
        if self.interval is None:
            return self._guided(x, t)
        low, high = self.interval
        log_snr = self.sde.log_snr(t)
        within = (log_snr >= low) & (log_snr <= high)
        # the one place that waits for the device: to save the second evaluation the host has to know
        count = int(within.sum())
        if count == 0:
            return self.conditional(x, t)
        if count == len(x):
            return self._guided(x, t)
        # samples at times of their own: each gets the evaluations that it needs
        order = within.to(torch.int8).argsort(descending=True, stable=True)
        inner, outer = order[:count], order[count:]
        parts = [self.take(inner)._guided(x[inner], t[inner]), take(self.conditional, outer)(x[outer], t[outer])]
        return torch.cat(parts)[order.argsort()]

    def _guided(self, x: Tensor, t: Tensor) -> Tensor:
        s_0 = self.unconditional(x, t)
        if self.scale == 0:
            return s_0
        s_c = self.conditional(x, t)
        guided = s_0 + self.scale * (s_c - s_0)
        return self._rescaled(guided, s_c, x, t) if self.rescale else guided

    def _rescaled(self, guided: Tensor, s_c: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if math.prod(x.shape[1:]) < 2:
            raise UserError(
                f"got rescale={self.rescale} for samples of one number, which have no standard deviation; expected rescale=0"
            )
        if len(x) == 0:
            return guided
        variance = expand_as(self.sde.sigma(t).square(), x)
        D, D_c = x + variance * guided, x + variance * s_c  # alpha times the denoised means
        spread, wanted = D.flatten(1).std(dim=1), D_c.flatten(1).std(dim=1)
        # of equal numbers a deviation is rounding, also of the noise that was taken out: nothing to rescale
        rounding = 1e-4 * torch.maximum(D.flatten(1).square().mean(dim=1), x.flatten(1).square().mean(dim=1)).sqrt()
        excess = spread > torch.maximum(rounding, wanted)
        ratio = torch.where(excess, wanted / spread.clamp(min=torch.finfo(x.dtype).tiny), 1.0)
        factor = expand_as(1 + self.rescale * (ratio - 1), x)
        return (factor * D - x) / variance

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """The predicted noise -sigma s, `(B, *)`."""
        return noise(self.sde, self, x, t)

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoised mean (x + sigma^2 s) / alpha, `(B, *)`."""
        return denoised(self.sde, self, x, t)

    def in_dtype(self, dtype: torch.dtype) -> ClassifierFree:
        """The same, whose scores are given x in `dtype`."""
        return ClassifierFree(
            self.sde,
            in_dtype(self.conditional, dtype),
            in_dtype(self.unconditional, dtype),
            self.scale,
            interval=self.interval,
            rescale=self.rescale,
        )

    def take(self, index: Tensor) -> ClassifierFree:
        """The score of the samples at `index` `(b,)`."""
        return ClassifierFree(
            self.sde,
            take(self.conditional, index),
            take(self.unconditional, index),
            self.scale,
            interval=self.interval,
            rescale=self.rescale,
        )


def classifier_free(
    model: Conditional,
    labels: Any,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> ClassifierFree:
    """The score s_0 + scale (s_c - s_0) of a model that was trained with classes, some of them hidden.

    Args:
        model: its `condition(labels)` is s_c and its `condition(None)` s_0.
        labels: what `model.condition` takes: `(B,)` integers, one for each sample, or one integer for all.
        scale: 0 for the unconditional score, 1 for the conditional one, more to exaggerate; below 0 away from the class.
        interval: (low, high) in log-SNR, both ends included, in which the scale holds; outside, the score is the conditional
            one, also at scale 0. None: it holds everywhere.
        rescale: how much of the denoised mean's excess standard deviation is taken back, in [0, 1]; it is never raised.

    Raises:
        UserError: labels that the model does not have, or values out of their range.

    >>> from sde_lib import VPSDE
    >>> from models import MLP, ScoreModel
    >>> model = ScoreModel(MLP(2, num_classes=3, width=16, depth=1), VPSDE())
    >>> classifier_free(model, [0, 2, 1], 3.0)(torch.zeros(3, 2), torch.tensor(0.5)).shape
    torch.Size([3, 2])
    """
    if labels is None:
        raise UserError("got labels=None; expected classes: without one there is nothing to guide to, use model itself")
    if not callable(getattr(model, "condition", None)):
        raise UserError(
            f"got {type(model).__name__}, which has no condition(labels); expected a model with classes such as ScoreModel: "
            "ClassifierFree(sde, conditional, unconditional, scale) takes two scores"
        )
    return ClassifierFree(
        model.sde, model.condition(labels), model.condition(None), scale, interval=interval, rescale=rescale
    )
