"""The inception-like score: sure of each sample's class, and unsure of the class of a sample at random.

    score = exp E_x KL(p(y | x) || p(y)),   p(y) = E_x p(y | x)                                            (1)

(Salimans et al. 2016, arXiv:1606.03498, section 4). It is between 1 and the number of classes, sees no
difference between a class's samples, and is only as good as the classifier; with the Inception network it is
the inception score.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, check_features, jackknife

__all__ = ["class_score"]


def class_score(log_probs: Tensor) -> Estimate:
    """exp E_x KL(p(y | x) || p(y)), between 1 and K, of `log_probs` = log p(y | x) (N, K), over all samples at once, with a
    jackknife error (Salimans et al. 2016, arXiv:1606.03498, section 4).

    Raises:
        DataError: fewer than 2 samples, NaN, or rows that do not sum to one.
    """
    log_probs = check_features(log_probs.clamp(min=-700), "class log-probabilities")
    excess = float(torch.logsumexp(log_probs, dim=1).abs().max())
    if excess > 1e-3:
        raise DataError(
            f"got class log-probabilities that sum to exp({excess:.2g}); expected a sum of 1; apply log_softmax"
        )

    def score(index: Tensor) -> float:
        kept = log_probs[index]
        marginal = torch.logsumexp(kept, dim=0) - math.log(len(kept))
        return math.exp(float((kept.exp() * (kept - marginal)).sum(dim=1).mean()))

    everything = torch.arange(len(log_probs))
    return Estimate(value=score(everything), stderr=jackknife(len(log_probs), score))
