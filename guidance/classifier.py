r"""Classifier guidance: a score, and the gradient of a classifier that knows the noise.

    s(x, t) = score(x, t) + scale grad_x log p(y | x_t = x)

(Dhariwal and Nichol 2021, arXiv:2105.05233, section 4; Song et al. 2021, arXiv:2011.13456, equation (14), has scale 1.) At
scale 1 and with an exact classifier this is Bayes' rule: the score of x_t given y. With the score of a class, scale 0 is that
class. In terms of the predicted noise it is eps - scale sigma grad log p, which DDIM and every other sampler here make of it.

The classifier is one of *noisy* samples. One that was trained on clean data says nothing about x_t, so two things are looked
at. When the guidance is made: can the classifier be called as `classifier(x, t)`? At the first call, when the shape of the
samples is known: do its answers on two made-up samples differ between t_min and T at all, and is the first one's the same
without the other? One that ignores t, or that mixes its batch, is refused; the look costs three forward passes of at most two
samples, once.

Gradients are per sample: that of the sum over the batch of log p(y_i | x_i). The mean would divide every sample's guidance by
the batch's size.

Whose density it is when it is scored, and what `nfe` counts, is said in `guidance.classifier_free`: the law that the guided
flow takes the prior to, and calls of the guided score, each of which is one evaluation of the score and one of the classifier
with its gradient.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from numerics import (
    UserError,
    batch_time,
    class_labels,
    ordinary,
    ordinary_mode,
    require_classes,
    require_range,
    take,
)
from sde_lib import SDE, Score, denoised, in_dtype, noise

Classifier = Callable[[Tensor, Tensor], Tensor]
"""`classifier(x, t)`, x `(B, *)` and t `(B,)` -> logits `(B, K)`."""
_ROUNDING = 1e-6
"""Of log-probabilities: less than this is no difference."""
_BESIDE = 0.02
"""Of logits, relative: what batches of other sizes may differ by in bfloat16."""


class ClassifierGuidance:
    """The guided score of `classifier_guidance`; see the head of this module.

    Args: as in `classifier_guidance`.

    Raises:
        UserError: as there.
    """

    def __init__(self, sde: SDE, score: Score, classifier: Classifier, labels: Tensor, scale: float) -> None:
        self.sde, self.score, self.classifier = sde, score, classifier
        self.labels, self.scale = labels, float(scale)
        self._looked = [False]  # shared with those that take() makes

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided score at `x` `(B, *)` and `t` `()` or `(B,)`, `(B, *)`."""
        t = batch_time(t, x)
        value = self.score(x, t)
        return value if self.scale == 0 else value + self.scale * self.gradient(x, t)

    def gradient(self, x: Tensor, t: Tensor) -> Tensor:
        """grad_x log p(y | x_t = x), `(B, *)`, sample by sample, in the dtype of x and in every autograd mode."""
        if not self._looked[0]:
            self._look(x)
            self._looked[0] = True
        labels = ordinary(self.labels.to(x.device))
        labels = labels.expand(len(x)) if labels.ndim == 0 else labels
        if len(labels) != len(x):
            raise UserError(f"got {len(labels)} labels for {len(x)} samples; expected one for each, or one integer")
        wanted = torch.is_grad_enabled()  # the trace of a likelihood differentiates the score
        with ordinary_mode(x.device), torch.enable_grad():
            x, t = ordinary(x), ordinary(t)
            if not (wanted and x.requires_grad):
                x = x.detach().requires_grad_()
            log_prob = self._logits(x, t).log_softmax(dim=1)
            chosen = log_prob.gather(1, labels.unsqueeze(1)).sum()
            slope = None
            if chosen.requires_grad:  # which parameters are enough for
                (slope,) = torch.autograd.grad(chosen, x, create_graph=wanted, allow_unused=True)
            if slope is None:
                raise UserError(
                    "got a classifier whose logits autograd cannot follow back to x; expected differentiable operations: "
                    "remove detach(), argmax and no_grad() from it"
                )
        return slope

    def _logits(self, x: Tensor, t: Tensor) -> Tensor:
        """The classifier's answer, `(B, K)`, to x in the dtype of its weights, in float32 at least."""
        weight = next(self.classifier.parameters(), None) if isinstance(self.classifier, nn.Module) else None
        logits = self.classifier(x if weight is None else x.to(weight.dtype), t)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = f"of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"as {type(logits).__name__}"
            raise UserError(f"got logits {got} for {len(x)} samples; expected ({len(x)}, K)")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _look(self, x: Tensor) -> None:
        """Refuses a classifier without the labels, or whose answers are no numbers or the same at least and most noise."""
        made_up = torch.randn(2, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x.device, x.dtype)
        with ordinary_mode(x.device), torch.no_grad():
            first, last = (
                self._logits(made_up, batch_time(torch.tensor(t, dtype=torch.float64), made_up))
                for t in (self.sde.t_min, self.sde.T)
            )
            alone = (
                first[:1]
                if self._in_train_mode()
                else self._logits(made_up[:1], batch_time(self.sde.t_min, made_up[:1]))
            )
        require_classes(self.labels, first.shape[1])
        if not bool(first.isfinite().all() & last.isfinite().all()):
            raise UserError(
                f"got a classifier whose logits are not finite at t = {self.sde.t_min:g} or t = {self.sde.T:g}; expected "
                "numbers at every noise level"
            )
        if torch.allclose(first.log_softmax(dim=1), last.log_softmax(dim=1), rtol=0, atol=_ROUNDING):
            raise UserError(
                f"got a classifier whose answers are the same at t = {self.sde.t_min:g} and t = {self.sde.T:g}; expected one "
                "that is told the noise level and was trained on noisy samples, such as models.NoiseClassifier"
            )
        if not float((alone - first[:1]).norm()) <= _BESIDE * float(first[:1].norm()):
            raise UserError(
                "got a classifier whose logits for a sample are others where the batch has another; expected each sample by "
                "itself: means and norms over all axes but the first"
            )

    def _in_train_mode(self) -> bool:
        """Is a part of the classifier in train mode? Samplers and likelihoods refuse it; its dropout would look like mates."""
        return isinstance(self.classifier, nn.Module) and any(part.training for part in self.classifier.modules())

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """The predicted noise -sigma s, `(B, *)`."""
        return noise(self.sde, self, x, t)

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """The denoised mean (x + sigma^2 s) / alpha, `(B, *)`."""
        return denoised(self.sde, self, x, t)

    def in_dtype(self, dtype: torch.dtype) -> ClassifierGuidance:
        """The same, whose score is given x in `dtype`; the classifier is given it in that of its weights."""
        made = ClassifierGuidance(self.sde, in_dtype(self.score, dtype), self.classifier, self.labels, self.scale)
        made._looked = self._looked
        return made

    def take(self, index: Tensor) -> ClassifierGuidance:
        """The score of the samples at `index` `(b,)`."""
        labels = self.labels if self.labels.ndim == 0 else self.labels[index.to(self.labels.device)]
        fewer = ClassifierGuidance(self.sde, take(self.score, index), self.classifier, labels, self.scale)
        fewer._looked = self._looked
        return fewer


def classifier_guidance(
    sde: SDE, score: Score, classifier: Classifier, labels: Tensor | Sequence[int] | int, scale: float
) -> ClassifierGuidance:
    """The score `score(x, t) + scale grad_x log p(y | x_t = x)`.

    Args:
        sde: that of the score, in whose time the classifier is asked.
        score: any; of a model without classes, or given a class already.
        classifier: `classifier(x, t)` -> logits `(B, K)`, of noisy samples. A module is given x in the dtype of its weights.
        labels: y, `(B,)` integers, one for each sample, or one integer for all.
        scale: 0 leaves the score as it is, 1 is Bayes' rule, more exaggerates.

    Raises:
        UserError: labels that are no integers >= 0, a scale that is not finite, a classifier that cannot be called with
            x and t, or whose own `sde` has other noise at a time; from the first call, labels that the classifier does not
            have, one that ignores the noise level, or one that mixes its batch.
    """
    require_range(scale, "scale", -math.inf)
    if not _takes_two(classifier):
        raise UserError(
            f"got the classifier {type(classifier).__name__}, which cannot be called as classifier(x, t); expected one that is "
            "told the noise level and was trained on noisy samples, such as models.NoiseClassifier"
        )
    _require_same_noise(sde, getattr(classifier, "sde", None))
    known = getattr(classifier, "num_classes", None)
    return ClassifierGuidance(sde, score, classifier, class_labels(labels, known), scale)


def _require_same_noise(sde: SDE, other: SDE | None) -> None:
    """Refuses a classifier that was taught another noise at a time: its t would say another level than is there."""
    if other is None:
        return
    times = torch.linspace(max(sde.t_min, other.t_min), min(sde.T, other.T), 7, dtype=torch.float64)
    for name in ("alpha", "sigma"):
        ours, its = (getattr(each, name)(times) for each in (sde, other))
        if not torch.allclose(ours, its, rtol=1e-3, atol=1e-6):
            raise UserError(
                f"got a classifier of noise by {type(other).__name__} for a score under {type(sde).__name__}, which has "
                f"another {name} at the same time; expected one SDE: train the classifier under the score's"
            )


def _takes_two(classifier: Classifier) -> bool:
    """Can it be called with two positional arguments, as far as Python can tell?"""
    if not callable(classifier):
        return False
    called = classifier.forward if isinstance(classifier, nn.Module) else classifier
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # a built-in function has none
        return True
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True
