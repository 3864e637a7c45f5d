"""From stored data to the batch of a step: gathered, dequantised freshly, mapped to model units, mirrored.

Grey values k become k + u with u uniform in [0, 1), drawn anew at every step, so that a continuous density is learned whose
integrals are the probabilities of the grey values (Theis, van den Oord, Bethge 2016, arXiv:1511.01844, section 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data import Split
from data.transforms import Transform
from numerics import expand_as, uniform
from training.errors import TrainingDataError
from training.streams import BatchOrder, StepStreams

_ON_DEVICE_BYTES = 2 * 2**30


@dataclass(frozen=True, eq=False)
class Batch:
    """Clean data `x_0` `(B, *)` in model units and `labels` `(B,)` or None, on the device."""

    x_0: Tensor
    labels: Tensor | None

    def part(self, rows: slice) -> Batch:
        """The samples at `rows`."""
        return Batch(self.x_0[rows], None if self.labels is None else self.labels[rows])


class Batches:
    """The batches of a run, by step.

    Args:
        split: integer grey values or continuous points.
        transform: from data units to model units; None leaves points as they are.
        batch_size: of the global batch.
        seed: of the run.
        device: where batches are wanted. Data of up to 2 GiB are kept there.
        dequantize: whether grey values get uniform noise, or are put at the centres of their bins.
        flip: whether images are mirrored, each with probability 1/2.
        label_dropout: probability with which a label becomes `num_classes`, which stands for no class.
        num_classes: of the network; None where it has no classes.

    Raises:
        TrainingDataError: labels that are needed and missing, grey values without a transform that knows their number.
        UsageError: a batch larger than the data.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform | None,
        *,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        dequantize: bool = True,
        flip: bool = False,
        label_dropout: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        self.order = BatchOrder(len(split), batch_size, seed)
        self.seed, self.device = seed, torch.device(device)
        self.transform, self.label_dropout, self.num_classes = transform, label_dropout, num_classes
        self.levels = None if transform is None else transform.levels
        if split.x.is_floating_point() == (self.levels is not None):
            raise TrainingDataError(
                f"got data of {split.x.dtype} with a transform for {self.levels} grey levels; expected integers with "
                "levels, or floating point without: use dataset.transform()"
            )
        if flip and split.x.ndim != 4:
            raise TrainingDataError(
                f"got flip=True for data of shape {tuple(split.x.shape)}; expected images (N, C, H, W)"
            )
        self.flip, self.dequantize = flip, dequantize
        if num_classes is not None:
            if split.labels is None:
                raise TrainingDataError(
                    f"got data without labels for a network of {num_classes} classes; expected labels: use other data or an "
                    "unconditional network"
                )
            if int(split.labels.max()) >= num_classes:
                raise TrainingDataError(
                    f"got a label {int(split.labels.max())} for a network of {num_classes} classes; "
                    f"expected 0 to {num_classes - 1}"
                )
        self.x, self.labels = split.x, split.labels if num_classes is not None else None
        if self.device.type != "cpu" and self.x.numel() * self.x.element_size() <= _ON_DEVICE_BYTES:
            self.x = self.x.to(self.device)
            self.labels = None if self.labels is None else self.labels.to(self.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(B, *)` of the global batch."""
        return (self.order.batch_size, *self.x.shape[1:])

    def stored(self, step: int) -> tuple[Tensor, Tensor | None]:
        """What is stored of the batch of `step`, on the device; the part that can be fetched ahead."""
        index = self.order(step)
        if self.x.device != index.device:
            index = index.pin_memory().to(self.x.device, non_blocking=True)
        x, labels = self.x[index], None if self.labels is None else self.labels[index]
        if x.device != self.device:
            x = x.pin_memory().to(self.device, non_blocking=True)
            labels = None if labels is None else labels.pin_memory().to(self.device, non_blocking=True)
        return x, labels

    def finish(self, stored: tuple[Tensor, Tensor | None], step: int) -> Batch:
        """The batch of `step` from what is stored of it."""
        x, labels = stored
        streams = StepStreams(self.seed, step, self.device)
        if self.levels is not None:
            u: Tensor | float = 0.5
            if self.dequantize:
                u = uniform(x.shape, streams.generator("dequantize"), device=self.device, dtype=torch.float32)
            x = x.to(torch.float32) + u
        elif x.dtype != torch.float32:
            x = x.to(torch.float32)
        if self.transform is not None:
            x = self.transform(x)
        if self.flip:
            coin = uniform((len(x),), streams.generator("flip"), device=self.device) < 0.5
            x = torch.where(expand_as(coin, x).bool(), x.flip(-1), x)
        if labels is not None and self.label_dropout:
            hidden = uniform(labels.shape, streams.generator("label dropout"), device=self.device) < self.label_dropout
            labels = torch.where(hidden, self.num_classes or 0, labels)
        return Batch(x, labels)

    def __call__(self, step: int) -> Batch:
        """The batch of `step`."""
        return self.finish(self.stored(step), step)
