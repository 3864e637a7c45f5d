"""What samples are compared in: a map from data to vectors, with a name that goes into the name of every
score.

A Fréchet distance says nothing without its features. Two scores compare only if their names are equal, so a
name holds what the values depend on: the network, and a hash of its weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data import DataError

__all__ = ["Coordinates", "Extracted", "Features", "Pixels", "RandomConvolutions", "convolution", "unit_images"]

_BATCH = 500


@dataclass(frozen=True, eq=False)
class Extracted:
    """What features give of N data.

    Args:
        values: features (N, F), float64.
        log_probs: log p(y | x) (N, K) of a classifier, or None where there is none.
    """

    values: Tensor
    log_probs: Tensor | None = None


class Features(ABC):
    """A fixed map of data (in data units: uint8 images (N, C, H, W), or points (N, *)) to vectors."""

    name: str
    """Goes into the brackets of a score, FD[name]."""

    inception: bool = False
    """Whether these are features of the Inception network, so that the usual names FID, KID and IS apply."""

    @abstractmethod
    def extract(self, data: Tensor) -> Extracted:
        """Features of data (N, *).

        Raises:
            DataError: data of another kind or shape than these features take.
        """


def unit_images(images: Tensor, levels: int) -> Tensor:
    """float32 in (0, 1), grey value k at (k + 1/2) / levels, of uint8 images (N, C, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise DataError(
            f"got images of {images.dtype} {tuple(images.shape)}; expected uint8 (N, C, H, W); samples in model "
            "units become that by transform.to_images"
        )
    return (images.float() + 0.5) / levels


@dataclass(frozen=True, kw_only=True)
class Pixels(Features):
    """The pixels themselves in [0, 1]: needs no training, and weighs a shift by one pixel more than a missing
    class.

    Args:
        levels: grey levels of the images.
        name: that goes into the scores' names.
    """

    levels: int = 256
    name: str = "pixels"

    def extract(self, data: Tensor) -> Extracted:
        return Extracted(unit_images(data, self.levels).flatten(1).double())


@dataclass(frozen=True, kw_only=True)
class Coordinates(Features):
    """The numbers themselves, for points (N, D) and other continuous data.

    Args:
        name: that goes into the scores' names.
    """

    name: str = "coordinates"

    def extract(self, data: Tensor) -> Extracted:
        if not data.is_floating_point() or data.ndim < 2:
            raise DataError(f"got data of {data.dtype} {tuple(data.shape)}; expected floating-point (N, *)")
        return Extracted(data.flatten(1).double())


def convolution(inputs: int, outputs: int, stride: int, generator: torch.Generator) -> nn.Conv2d:
    """A 3x3 convolution of `inputs` to `outputs` channels with that `stride`, drawn from `generator` (He et al. 2015) and from
    nothing else.
    """
    layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, stride=stride, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True, kw_only=True)
class RandomConvolutions(Features):
    """Means and standard deviations over the picture of two layers of random filters. Sees texture and noise,
    and was measured to be blind to a missing class: a check, not a default.

    Args:
        levels: grey levels of the images.
        width: filters a layer; there are 2 x width features.
        seed: of the filters.
    """

    levels: int = 256
    width: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise DataError(f"got width={self.width}; expected at least 1")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"random-{self.width}-{self.seed}"

    def extract(self, data: Tensor) -> Extracted:
        generator = torch.Generator().manual_seed(self.seed)
        layers = nn.Sequential(
            convolution(data.shape[1], self.width, 1, generator),
            nn.ReLU(),
            convolution(self.width, self.width, 2, generator),
            nn.ReLU(),
        )
        found = []
        with torch.no_grad():
            for chunk in data.split(_BATCH):
                maps = layers(2 * unit_images(chunk, self.levels) - 1).flatten(2)
                found.append(torch.cat([maps.mean(dim=2), maps.std(dim=2, correction=0)], dim=1).double())
        return Extracted(torch.cat(found))
