"""Images that are none of the data's, and what a run's likelihood says of images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from data import Split
from likelihood import BitsPerDim, Hutchinson, Method, bits_per_dim
from numerics import SampleStreams
from workflow import progress
from workflow.trained_run import TrainedRun


def outside_of(part: Split, levels: int, seed: int) -> Mapping[str, Tensor]:
    """Four kinds of integer images `(n, C, H, W)`, as many as `part` has, by name: inverted grey values; the pixels of every
    image in one other order, which keeps their law; turned upside down; and uniform noise."""
    generator = torch.Generator().manual_seed(seed)
    x = part.x
    order = torch.randperm(x[0].numel(), generator=generator)
    return {
        "inverted": levels - 1 - x,
        "permuted": x.flatten(1)[:, order].reshape(x.shape),
        "flipped": x.flip(-2),
        "noise": torch.randint(0, levels, x.shape, generator=generator, dtype=x.dtype),
    }


def bits_of_images(
    run: TrainedRun,
    images: Tensor,
    ids: Tensor,
    *,
    method: Method,
    name: str,
    probes: int = 2,
    batch_size: int = 64,
    seed: int = 0,
) -> BitsPerDim:
    """The bits/dim of stored images `(n, *)`; a value depends neither on batch mates nor on the order, by the `ids` `(n,)`.

    Args:
        method: of the flow.
        name: what the bar says.
        probes: estimates of the trace.
    """
    parts = []
    with progress.bar(total=len(images), name=f"scoring {name}", unit="image") as bar:
        for i in range(0, len(images), batch_size):
            some = slice(i, i + batch_size)
            parts.append(
                bits_per_dim(
                    run.sde,
                    run.score,
                    images[some].to(run.device),
                    run.transform,
                    method=method,
                    divergence=Hutchinson(probes=probes),
                    companions=0,
                    generator=SampleStreams(seed, ids[some]),
                )
            )
            bar.update(len(ids[some]))
    return BitsPerDim.concatenate(parts)
