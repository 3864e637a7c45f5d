"""Guidance: scores made from scores, for any sampler and any likelihood.

guided = guidance.classifier_free(model, labels, 3.0)                       # s_0 + scale (s_c - s_0)
guided = guidance.classifier_guidance(sde, score, classifier, labels, 2.0)  # s + scale grad log p(y | x_t)
samplers.DDIM(steps=50)(sde, guided, (64, 1, 28, 28))
"""

from __future__ import annotations

from guidance.classifier import Classifier, ClassifierGuidance, classifier_guidance
from guidance.classifier_free import ClassifierFree, Conditional, classifier_free

__all__ = [
    "Classifier",
    "ClassifierFree",
    "ClassifierGuidance",
    "Conditional",
    "classifier_free",
    "classifier_guidance",
]
