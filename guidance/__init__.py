"""Guidance: scores made from scores, for any sampler and any likelihood.

guided = guidance.classifier_free(model, labels, 3.0)                       # s_0 + scale (s_c - s_0)
guided = guidance.classifier_guidance(sde, score, classifier, labels, 2.0)  # s + scale grad log p(y | x_t)
given = guidance.posterior(sde, score, Measurement(Mask(seen), y, 0.1))      # the score of p(x_t | y)
samplers.DDIM(steps=50)(sde, guided, (64, 1, 28, 28))
"""

from __future__ import annotations

from guidance.approximation import Approximation, Denoised
from guidance.classifier import Classifier, ClassifierGuidance, classifier_guidance
from guidance.classifier_free import ClassifierFree, Conditional, classifier_free
from guidance.dps import DPS, PublishedDPS
from guidance.moment_matching import Matched, MomentMatching
from guidance.pigdm import PiGDM
from guidance.posterior import Posterior, posterior
from guidance.tmpd import TMPD
from sde_lib import Blur, Downsample, Grey, Linear, LinearMap, Mask, Masks, Measurement, Operator

__all__ = [
    "Approximation",
    "Blur",
    "Classifier",
    "ClassifierFree",
    "ClassifierGuidance",
    "Conditional",
    "DPS",
    "Denoised",
    "Downsample",
    "Grey",
    "Linear",
    "LinearMap",
    "Mask",
    "Masks",
    "Matched",
    "Measurement",
    "MomentMatching",
    "Operator",
    "PiGDM",
    "Posterior",
    "PublishedDPS",
    "TMPD",
    "classifier_free",
    "classifier_guidance",
    "posterior",
]
