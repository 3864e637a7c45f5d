"""A classifier of several attributes of a picture at once, such as the family, the weight and the letter of a glyph.

Its convolutions are shared and each attribute has its own scores, so that one training serves all. It is trained on real
pictures and says of others, real or sampled, what they show: samples of a caption are right where each attribute is what the
caption says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from data import DataError
from data.dataset import check_count
from evaluation.features import unit_images

__all__ = ["AttributeClassifier", "train_attribute_classifier"]

_BATCH, _WIDTH, _HIDDEN, _CHUNK = 128, 16, 128, 500
_PEAK = 4e-3


class _Network(nn.Module):
    """Images `(B, C, H, W)` in [0, 1] -> scores of each attribute's values, side by side."""

    def __init__(self, channels: int, scores: int) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int) -> nn.Module:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        w = _WIDTH
        self.body = nn.Sequential(
            layer(channels, w, 1),
            layer(w, 2 * w, 2),
            layer(2 * w, 2 * w, 1),
            layer(2 * w, 4 * w, 2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(4 * w * 16, _HIDDEN, bias=False),
            nn.BatchNorm1d(_HIDDEN),
            nn.ReLU(),
        )
        self.scores = nn.Linear(_HIDDEN, scores)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.scores(self.body(2 * x - 1))
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributeClassifier:
    """Says what pictures show.

    Args:
        network: trained, in eval mode.
        counts: of each attribute, how many values it has.
        levels: grey levels of the pictures.
    """

    network: nn.Module = field(repr=False)
    counts: Mapping[str, int]
    levels: int

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """The likeliest value of each attribute, `(N,)`, of uint8 images `(N, C, H, W)`."""
        with torch.no_grad():
            scores = torch.cat([self.network(unit_images(chunk, self.levels)) for chunk in images.cpu().split(_CHUNK)])
        parts = scores.split(list(self.counts.values()), dim=1)
        return {name: part.argmax(dim=1) for name, part in zip(self.counts, parts, strict=True)}

    def right(self, images: Tensor, attributes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whether each attribute is seen as it should be, `(N,)` truth values each.

        Raises:
            DataError: an attribute that is missing, or not one value for each image.
        """
        for name in self.counts:
            if name not in attributes or attributes[name].shape != (len(images),):
                got = f"{tuple(attributes[name].shape)}" if name in attributes else "none"
                raise DataError(f"got values {got} of the attribute {name}; expected ({len(images)},)")
        found = self(images)
        return {name: found[name] == attributes[name].cpu() for name in self.counts}


def train_attribute_classifier(
    images: Tensor, attributes: Mapping[str, Tensor], *, levels: int = 256, steps: int = 800, seed: int = 0
) -> AttributeClassifier:
    """Trains one on real pictures, on the CPU.

    Args:
        images: uint8 `(N, C, H, W)`.
        attributes: of each, the values `(N,)`, integers from 0.
        levels: grey levels.
        steps: of AdamW, with batches of 128.
        seed: of weights and batches.

    Raises:
        DataError: no images or attributes, values that are not one for each image, or of another kind.
    """
    check_count("steps", steps, 1, 10**6)
    if not len(images):
        raise DataError("got no images; expected pictures to learn from")
    for name, values in attributes.items():
        whole = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
        if values.shape != (len(images),) or not whole or int(values.min()) < 0:
            raise DataError(
                f"got the attribute {name} of {values.dtype} {tuple(values.shape)}; expected integers from 0, ({len(images)},)"
            )
    if not attributes:
        raise DataError("got no attributes; expected at least one, such as {'bold': values}")
    counts = {name: int(values.max()) + 1 for name, values in attributes.items()}
    images, wanted = images.cpu(), [values.cpu() for values in attributes.values()]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Network(images.shape[1], sum(counts.values()))
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK, weight_decay=2e-2)
    rise = max(1, steps // 4)

    def rate(step: int) -> float:
        return (
            (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
        )

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(steps):
        index = torch.randint(len(images), (_BATCH,), generator=generator)
        parts = network(unit_images(images[index], levels)).split(list(counts.values()), dim=1)
        losses = [functional.cross_entropy(part, v[index]) for part, v in zip(parts, wanted, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)
    return AttributeClassifier(network=network, counts=counts, levels=levels)
