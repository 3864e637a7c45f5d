r"""What a caption is worth, in bits: how much shorter a picture's code gets when its caption is known.

    worth = log2 p(x | c) - log2 p(x)

by the exact likelihoods of the flows with and without the caption, from the same dequantisation noise, the same probes and the
same steps, so that much of their error cancels. Over pictures and their captions its mean is the mutual information, if both
densities are right; so it is at most the entropy of the captions, log2 K for K that are equally frequent. A model whose density
without captions is worse than the one with them shows more than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from evaluation import Estimate
from likelihood import Hutchinson, bits_per_dim
from numerics import SampleStreams
from workflow import progress
from workflow.class_likelihood import labelled_method
from workflow.splits import checked_split
from workflow.trained_run import TrainedRun

_BATCH = 50


@dataclass(frozen=True, kw_only=True)
class Worth:
    """Of pictures of one split.

    Attributes:
        given, without: bits/dim with captions and without.
        worth: bits a picture that a caption saves.
        images: how many.
        captions: how many different ones they have.
    """

    given: Estimate
    without: Estimate
    worth: Estimate
    images: int
    captions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        named = {name: getattr(self, name).to_dict() for name in ("given", "without", "worth")}
        return {**named, "images": self.images, "captions": self.captions}


def caption_worth(run: TrainedRun, split: str, *, n: int, steps: int) -> Worth:
    """What captions are worth for the first `n` pictures of a split.

    Args:
        steps: of the flow, on a grid placed by a pilot run on training data with their captions.
    """
    model, data, method = run.model, checked_split(run.dataset, split), labelled_method(run, steps)
    assert data.labels is not None  # the model has captions
    n = min(n, len(data))
    found: dict[str, list[torch.Tensor]] = {"given": [], "without": []}
    with progress.bar(total=n, name=f"with captions and without, {split}", unit=run.setup.noun) as bar:
        for first in range(0, n, _BATCH):
            part = slice(first, min(first + _BATCH, n))
            for name, score in (("given", model.condition(data.labels[part])), ("without", model.condition(None))):
                result = bits_per_dim(
                    run.sde,
                    score,
                    data.x[part].to(run.device),
                    run.transform,
                    method=method,
                    divergence=Hutchinson(probes=1),
                    companions=0,
                    generator=SampleStreams(run.setup.options.seed, data.ids[part]),
                )
                found[name].append(result.per_image.cpu().double())
            bar.update(part.stop - part.start)
    given, without = (torch.cat(found[name]) for name in ("given", "without"))
    return Worth(
        given=_mean(given),
        without=_mean(without),
        worth=_mean((without - given) * run.dataset.dim),
        images=n,
        captions=len(torch.unique(data.labels[:n])),
    )


def _mean(values: torch.Tensor) -> Estimate:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(value=float(values.mean()), stderr=error)
