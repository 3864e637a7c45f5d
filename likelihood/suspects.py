"""Images whose predictors are far from all others': what predicts the others need not predict them."""

from __future__ import annotations

import torch
from torch import Tensor

SUSPECT, MOST_SUSPECT = 6.0, 0.05
"""How many robust standard deviations from the median make a predictor's value suspect, and the largest share of the set."""


def telling(x: Tensor) -> Tensor:
    """`(P,)`: the predictors `(N, P)` that are finite for at least half of the images; of others no image could be told."""
    return 2 * x.isfinite().sum(dim=0) >= len(x)


def suspects(x: Tensor, *, most: float = MOST_SUSPECT) -> Tensor:
    """`(N,)`: the images one of whose predictors `(N, P)` is far from all others', at most a share `most` of them; and all of
    which one is not finite.

    Far is more than six robust standard deviations, 1.4826 times the median distance from the median (1.2533 times the mean
    distance, where the median one is 0). A group that the pilot's images miss and no predictor tells apart is not seen.
    """
    if x.shape[1] == 0:
        return torch.zeros(len(x), dtype=torch.bool)
    broken = ~x.isfinite().all(dim=1)
    if bool(broken.any()):
        found = broken.clone()
        found[~broken] = suspects(x[~broken], most=most) if not bool(broken.all()) else False
        return found
    distance = (x - x.median(dim=0).values).abs()
    scale = 1.4826 * distance.median(dim=0).values
    # where most images share one value the median distance says nothing
    scale = torch.where(scale > 0, scale, 1.2533 * distance.mean(dim=0))
    worst = torch.where(scale > 0, distance / scale.clamp(min=1e-300), 0.0).amax(dim=1)
    allowed = int(most * len(x))
    limit = float(worst.sort(descending=True).values[allowed]) if allowed < len(x) else SUSPECT
    return worst > max(SUSPECT, limit)
