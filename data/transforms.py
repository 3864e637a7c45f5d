"""The affine maps between data units and model units, and what they cost in nats.

A grey value k in {0, ..., levels - 1} is one of finitely many. Dequantised, it is a real number v = k + u
with u in [0, 1), so v lives in [0, levels] and has a density whose integral over [k, k + 1) is a probability
of k. A network wants numbers of order one, so it works on

    x = low + (high - low) v / levels                                                                      (1)

which is in [low, high]. Densities change by the Jacobian: per dimension

    log p(v) = log p(x) + log |dx/dv|,   log |dx/dv| = log((high - low) / levels)                          (2)

(Theis, van den Oord and Bethge 2016, arXiv:1511.01844, section 3.1). Equation (2) is the one place where the
number of grey levels enters a likelihood, and it is a visible number here: `Rescale.log_det`.

Continuous data have no levels. `Standardize` maps them by x = (v - shift) / scale, with log |dx/dv| =
-log(scale).
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import DataError
from data.grey_values import MAX_LEVELS, Reading, dtype_of_levels

__all__ = ["Rescale", "Standardize", "Transform"]


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise DataError(f"got {name}={value!r}; expected a finite number")
    return float(value)


def _floating(v: Tensor) -> Tensor:
    """Integers become the default floating type; floating tensors stay what they are."""
    return v if v.is_floating_point() else v.to(torch.get_default_dtype())


class Transform(ABC):
    """An invertible affine map from data units v to model units x, applied to tensors (B, *)."""

    levels: int | None
    """Number of grey levels, None for continuous data."""

    @property
    @abstractmethod
    def log_det(self) -> float:
        """log |dx/dv| in nats per dimension (its mean, where dimensions differ), equation (2)."""

    @abstractmethod
    def __call__(self, v: Tensor) -> Tensor:
        """Model units x (B, *) of data units v (B, *)."""

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """Data units v (B, *) of model units x (B, *)."""

    def grey_values(self, images: Tensor, name: str = "images") -> Tensor:
        """Images (B, *) whose grey values may be floats, as integers; what needs no conversion, as it is.

        Raises:
            DataError: a float that is no grey value.
        """
        return images

    @abstractmethod
    def centres(self, data: Tensor) -> Tensor:
        """Model units x (B, *) of stored data (B, *), without noise: the middle k + 1/2 of a grey value's
        interval."""

    @abstractmethod
    def to_data(self, x: Tensor) -> Tensor:
        """What a sample x (B, *) in model units would be in a file of this data set, in the file's type."""

    @abstractmethod
    def to_images(self, x: Tensor) -> Tensor:
        """Integer grey values of x (B, *); refuses where the data have no grey levels."""

    @abstractmethod
    def to_unit(self, x: Tensor) -> Tensor:
        """x (B, *) clamped into [0, 1], for pictures only."""


@dataclass(frozen=True, kw_only=True)
class Rescale(Transform):
    """Grey levels v in [0, levels] to x in [low, high], equation (1).

    Args:
        levels: number of grey levels, 2 to 65,536 (256 for bytes, 65,536 for 16-bit pictures, 17 for scikit-learn's digits).
        low: model value of v = 0.
        high: model value of v = levels.

    Raises:
        DataError: levels is not an integer in 2..65536, or low and high are not finite with low < high.
    """

    levels: int = 256
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 2 <= self.levels <= MAX_LEVELS:
            raise DataError(f"got levels={self.levels!r}; expected an integer from 2 to {MAX_LEVELS:,}")
        low, high = _finite("low", self.low), _finite("high", self.high)
        if not low < high:
            raise DataError(f"got low={low}, high={high}; expected low < high")

    @property
    def log_det(self) -> float:
        return math.log((self.high - self.low) / self.levels)

    def __call__(self, v: Tensor) -> Tensor:
        return _floating(v) * ((self.high - self.low) / self.levels) + self.low

    def inverse(self, x: Tensor) -> Tensor:
        return (x - self.low) * (self.levels / (self.high - self.low))

    @property
    def dtype(self) -> torch.dtype:
        """In which grey values are stored: uint8, int32 above 256 levels."""
        return dtype_of_levels(self.levels)

    def grey_values(self, images: Tensor, name: str = "images") -> Tensor:
        """The integers k of images (B, *) of floats k, k / (levels - 1), or 2k / (levels - 1) - 1."""
        if not isinstance(images, Tensor):
            raise DataError(
                f"got {name} of class {type(images).__name__}; expected a tensor (B, *): torch.as_tensor(...)"
            )
        if images.dtype == torch.uint16:
            return images.to(torch.int32)  # torch has no arithmetic for uint16
        if not images.is_floating_point() or images.ndim == 0 or images.numel() == 0:
            return images
        return Reading.of(images, self.levels, name)(images, name)

    def check(self, images: Tensor) -> None:
        """Raise DataError unless `images` holds integers 0..levels - 1."""
        if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
            raise DataError(f"got images of {images.dtype}; expected integer grey values 0..{self.levels - 1}")
        if images.dtype == torch.uint16:
            images = images.to(torch.int32)  # torch does not compare uint16
        if images.numel() and not (int(images.min()) >= 0 and int(images.max()) < self.levels):
            raise DataError(
                f"got images with values from {int(images.min())} to {int(images.max())}; expected "
                f"0..{self.levels - 1}; check the number of levels"
            )

    def centres(self, images: Tensor) -> Tensor:
        """x (B, *) at k + 1/2 of the grey values k (B, *), which are checked."""
        self.check(images)
        return self(_floating(images) + 0.5)

    def to_images(self, x: Tensor) -> Tensor:
        """uint8 (B, *), int32 above 256 levels: the grey value k = floor(v) whose interval holds x, clamped to 0..levels - 1.

        Raises:
            DataError: x holds NaN, which is no grey value (infinities clamp).
        """
        if bool(torch.isnan(x).any()):
            raise DataError("got x with NaN; expected numbers: the sampler or the network diverged")
        return self.inverse(x).floor().clamp(0, self.levels - 1).to(self.dtype)

    def to_data(self, x: Tensor) -> Tensor:
        return self.to_images(x)

    def to_unit(self, x: Tensor) -> Tensor:
        """[0, 1] with low at 0 and high at 1."""
        return ((x - self.low) / (self.high - self.low)).clamp(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Standardize(Transform):
    """x = (v - shift) / scale for continuous data.

    Args:
        shift: one number, or one per feature (dimension 1 of the data: features of (B, D), channels of (B, C,
            H, W)).
        scale: likewise, positive.

    Raises:
        DataError: a value is not finite, a scale is not positive, or the numbers of features differ.
    """

    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        for name in ("shift", "scale"):
            value = getattr(self, name)
            if isinstance(value, (tuple, list)):
                # A list would make the frozen object unhashable.
                object.__setattr__(self, name, tuple(_finite(name, entry) for entry in value))
            else:
                object.__setattr__(self, name, _finite(name, value))
        if any(entry <= 0 for entry in self._entries(self.scale)) or not self._entries(self.scale):
            raise DataError(f"got scale={self.scale}; expected positive numbers")
        lengths = {len(value) for value in (self.shift, self.scale) if isinstance(value, tuple)}
        if len(lengths) > 1:
            raise DataError(f"got shift and scale of {sorted(lengths)} features; expected the same number")

    @staticmethod
    def _entries(value: float | tuple[float, ...]) -> tuple[float, ...]:
        return value if isinstance(value, tuple) else (value,)

    @property
    def levels(self) -> None:  # type: ignore[override]
        """None: continuous data have no grey levels."""
        return None

    @property
    def log_det(self) -> float:
        entries = self._entries(self.scale)
        return -math.fsum(math.log(entry) for entry in entries) / len(entries)

    def _like(self, value: float | tuple[float, ...], x: Tensor) -> float | Tensor:
        if not isinstance(value, tuple):
            return value
        if x.ndim < 2 or x.shape[1] != len(value):
            raise DataError(f"got data of shape {tuple(x.shape)}; expected {len(value)} features in dimension 1")
        return torch.tensor(value, dtype=x.dtype, device=x.device).reshape(-1, *(1 for _ in x.shape[2:]))

    def __call__(self, v: Tensor) -> Tensor:
        v = _floating(v)
        return (v - self._like(self.shift, v)) / self._like(self.scale, v)

    def inverse(self, x: Tensor) -> Tensor:
        return x * self._like(self.scale, x) + self._like(self.shift, x)

    def centres(self, data: Tensor) -> Tensor:
        """The points themselves: a real number is its own interval's centre."""
        return self(data)

    def to_data(self, x: Tensor) -> Tensor:
        return self.inverse(x)

    def to_images(self, x: Tensor) -> Tensor:
        raise DataError("continuous data have no grey levels; use to_data for data units or to_unit for a picture")

    def to_unit(self, x: Tensor) -> Tensor:
        """[0, 1] with three standard deviations below the mean at 0 and three above at 1."""
        return ((x + 3.0) / 6.0).clamp(0.0, 1.0)
