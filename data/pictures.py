"""Pictures as grey values: decoding with Pillow, resizing the shorter side, cropping the middle.

Both steps are explicit, because they decide the data: a likelihood or a Fréchet distance at 64x64 is that of
one resize filter. The default, "lanczos", is Pillow's, which does prefilter when it shrinks (Parmar et al.
2022, arXiv:2104.11222, on why that matters).
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from data.errors import DataError
from data.grey_values import MAX_LEVELS

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "PictureDecoder"]

# The formats people have, by Pillow's names, and their endings. Others (EPS, PSD, ...) have parsers that
# nothing needs here.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# From so many pixels on, a picture is made smaller as it is decoded, to no less than this times its final size.
_LARGE = 2**24
_REDUCED = 4
_FILTERS = ("nearest", "box", "bilinear", "bicubic", "lanczos")
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True, kw_only=True)
class PictureDecoder:
    """Turns a picture into grey values (C, height, width).

    Args:
        size: height and width, or one number for both.
        channels: 3 (RGB), 1 (grey, by Pillow's luma), or 4 and 2, which keep transparency as their last channel; without it,
            transparent pictures are put on white.
        filter: filter of the resize: nearest, box, bilinear, bicubic or lanczos.
        crop: "centre" scales the shorter side and cuts the middle; "none" requires the aspect ratio to be
            right.
        max_pixels: largest number of pixels before the resize; larger pictures are refused unread.
        levels: 256, or up to 65,536 for 16-bit grey pictures (channels=1).

    Raises:
        DataError: an option out of range; on calling, a picture that cannot be read.
    """

    size: int | tuple[int, int]
    channels: int = 3
    filter: str = "lanczos"
    crop: str = "centre"
    max_pixels: int = 10**8
    levels: int = 256

    def __post_init__(self) -> None:
        size = self.size if isinstance(self.size, (tuple, list)) else (self.size, self.size)
        if len(size) != 2 or not all(type(n) is int and 1 <= n <= 4096 for n in size):
            raise DataError(f"got size={self.size!r}; expected a number of pixels from 1 to 4096, or (height, width)")
        object.__setattr__(self, "size", tuple(size))
        if self.channels not in _MODES:
            raise DataError(f"got channels={self.channels!r}; expected 1 or 3, or 2 or 4 to keep transparency")
        if type(self.levels) is not int or not 256 <= self.levels <= MAX_LEVELS:
            raise DataError(f"got levels={self.levels!r}; expected 256, or up to {MAX_LEVELS:,} for 16-bit pictures")
        if self.levels > 256 and self.channels != 1:
            raise DataError(
                f"got levels={self.levels} with channels={self.channels}; expected channels=1 (--config.data.channels=1): "
                "16-bit pictures are read where they are grey"
            )
        if self.filter not in _FILTERS:
            raise DataError(f"got filter={self.filter!r}; expected one of {', '.join(_FILTERS)}")
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise DataError(f"got max_pixels={self.max_pixels!r}; expected a positive integer")
        if self.crop not in ("centre", "none"):
            raise DataError(f"got crop={self.crop!r}; expected 'centre' or 'none'")

    @property
    def height(self) -> int:
        return self.size[0]  # type: ignore[index]

    @property
    def width(self) -> int:
        return self.size[1]  # type: ignore[index]

    @property
    def dtype(self) -> type[np.generic]:
        """Of the grey values: uint8, int32 above 256 levels."""
        return np.uint8 if self.levels == 256 else np.int32

    def open(self, source: str | os.PathLike[str] | BinaryIO, name: str) -> np.ndarray:
        """Grey values (C, height, width) of an image file; `name` is what an error calls it."""
        pillow = _pillow()
        try:
            with _limit(pillow, self.max_pixels), pillow.open(source, formats=list(FORMATS)) as image:
                return self(image, name)
        except DataError:
            raise
        except pillow.DecompressionBombError as error:
            raise DataError(
                f"got {name} with more than {2 * self.max_pixels:,} pixels; expected 1 to {self.max_pixels:,}; {_RAISE}"
            ) from error
        except FileNotFoundError as error:
            raise DataError(f"{name} does not exist") from error
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{name} is not a readable picture ({reason})") from error

    def __call__(self, image: Image, name: str = "the picture") -> np.ndarray:
        """Grey values (C, height, width) of a Pillow image."""
        width, height = image.size
        if width < 1 or height < 1 or width * height > self.max_pixels:
            raise DataError(f"got {name} with {width}x{height} pixels; expected 1 to {self.max_pixels:,}; {_RAISE}")
        if _is_deep(image) != (self.levels > 256):
            self._refuse_depth(image, name)
        try:
            self._check_aspect((width, height) if _orientation(image) < 5 else (height, width), name)
            if width * height > _LARGE:
                self._draft(image)
            image = _upright(image)
            flat = self._flatten(image) if self.levels == 256 else self._deep(image, name)
            pixels = np.asarray(self._resized(flat, gap=_REDUCED if width * height > _LARGE else None))
            if self.levels > 256:
                # a filter's overshoot, and its fractions
                pixels = np.rint(pixels).clip(0, self.levels - 1)
        except DataError:
            raise
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{name} is not a readable picture ({reason})") from error
        return pixels.astype(self.dtype).reshape(self.height, self.width, self.channels).transpose(2, 0, 1)

    def _refuse_depth(self, image: Image, name: str) -> None:
        if self.levels > 256:
            raise DataError(f"got {name} with 8 bits a channel; expected 16 for levels={self.levels}; leave levels out")
        hint = (
            "levels=65536 and channels=1 (--config.data.levels=65536) keep them"
            if image.mode.startswith("I")
            else "convert it first, or read it as an array (.npy)"
        )
        raise DataError(
            f"got {name} with pixels of mode {image.mode}, deeper than 8 bits a channel; expected 8; {hint}"
        )

    def _draft(self, image: Image) -> None:
        """Lets the decoder of a large picture make it smaller, where its format can (JPEG, by powers of two)."""
        width, height = image.size
        # whichever way up it is
        scale = min(min(image.size) / max(self.height, self.width), max(image.size) / min(self.height, self.width))
        if scale > _REDUCED:
            image.draft(image.mode, (int(_REDUCED * width / scale), int(_REDUCED * height / scale)))

    def _flatten(self, image: Image) -> Image:
        """In the wanted channels; without transparency (shown on white), unless that is one of them."""
        pillow = _pillow()
        if self.channels in (1, 3) and ("A" in image.getbands() or "transparency" in image.info):
            opaque = image.convert("RGBA")
            image = pillow.alpha_composite(pillow.new("RGBA", opaque.size, "white"), opaque)
        mode = _MODES[self.channels]
        return image if image.mode == mode else image.convert(mode)

    def _deep(self, image: Image, name: str) -> Image:
        """The grey values of a 16-bit picture, as a Pillow image of floats, which all filters take."""
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= self.levels:
            raise DataError(
                f"got {name} with grey values from {low} to {high}; expected 0..{self.levels - 1}; check the number of levels"
            )
        return _pillow().fromarray(values.astype(np.float32))

    def _resized(self, image: Image, gap: float | None) -> Image:
        """The largest centred part of the wanted aspect ratio, in the wanted size."""
        width, height = image.size
        scale = min(width / self.width, height / self.height)
        kept_width, kept_height = scale * self.width, scale * self.height
        left, top = (width - kept_width) / 2, (height - kept_height) / 2
        box = (left, top, left + kept_width, top + kept_height)
        if box == (0, 0, *image.size) and image.size == (self.width, self.height):
            return image
        resample = getattr(_pillow().Resampling, self.filter.upper())
        return image.resize((self.width, self.height), resample, box=box, reducing_gap=gap)

    def _check_aspect(self, size: tuple[int, int], name: str) -> None:
        """Refuses a picture of which something would be cut off, where that is not wanted."""
        width, height = size
        scale = min(width / self.width, height / self.height)
        if self.crop == "none" and (round(scale * self.width) != width or round(scale * self.height) != height):
            raise DataError(
                f"got {name} with {width}x{height} pixels; expected the aspect ratio of {self.width}x{self.height}; "
                "crop='centre' cuts the rest off"
            )


_RAISE = "shrink it or raise max_pixels (--config.data.max_pixels)"


def _orientation(image: Image) -> int:
    """How a camera was held, by its own note (EXIF): 1 is upright, 5 to 8 are sideways."""
    found = image.getexif().get(0x0112, 1)
    return found if found in range(1, 9) else 1


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    # without a turn it would be a copy, of a large picture too
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _is_deep(image: Image) -> bool:
    """Whether pixels have more than 8 bits a channel; Pillow cuts those of colour pictures as it decodes them."""
    stored = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in getattr(image, "tile", ())]
    raw = [entry for entries in stored for entry in entries]
    wide = any(isinstance(e, str) and ";16" in e for e in raw)
    return wide or image.mode.startswith(("I", "F"))


@contextmanager
def _limit(pillow: Any, max_pixels: int) -> Iterator[None]:
    """Pillow's own guard against pictures that unpack to gigabytes, at our limit. Pictures above it are refused here, those
    above twice the limit by Pillow before anything is allocated."""
    before, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            yield
    finally:
        pillow.MAX_IMAGE_PIXELS = before


def _pillow():  # noqa: ANN202 - a module
    try:
        import PIL.Image
    except ImportError as error:
        raise DataError("pictures are read with Pillow, which is not installed; pip install pillow") from error
    return PIL.Image
