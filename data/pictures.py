"""Pictures as bytes: decoding with Pillow, resizing the shorter side, cropping the middle.

Both steps are explicit, because they decide the data: a likelihood or a Fréchet distance at 64x64 is that of
one resize filter. The default, "lanczos", is Pillow's, which does prefilter when it shrinks (Parmar et al.
2022, arXiv:2104.11222, on why that matters).
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from data.errors import DataError

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
    """Turns a picture into bytes (C, height, width).

    Args:
        size: height and width, or one number for both.
        channels: 3 (RGB) or 1 (grey, by Pillow's luma).
        filter: of the resize: nearest, box, bilinear, bicubic or lanczos.
        crop: "centre" scales the shorter side and cuts the middle; "none" requires the aspect ratio to be
            right.
        max_pixels: of a picture before it is resized; larger ones are refused unread.

    Raises:
        DataError: an option out of range; on calling, a picture that cannot be read.
    """

    size: int | tuple[int, int]
    channels: int = 3
    filter: str = "lanczos"
    crop: str = "centre"
    max_pixels: int = 2**24

    def __post_init__(self) -> None:
        size = self.size if isinstance(self.size, (tuple, list)) else (self.size, self.size)
        if len(size) != 2 or not all(type(n) is int and 1 <= n <= 4096 for n in size):
            raise DataError(f"got size={self.size!r}; expected a number of pixels from 1 to 4096, or (height, width)")
        object.__setattr__(self, "size", tuple(size))
        if self.channels not in (1, 3):
            raise DataError(f"got channels={self.channels!r}; expected 1 or 3")
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

    def open(self, source: str | os.PathLike[str] | BinaryIO, name: str) -> np.ndarray:
        """uint8 (C, height, width) of an image file; `name` is what an error calls it."""
        pillow = _pillow()
        try:
            with pillow.open(source, formats=list(FORMATS)) as image:
                return self(image, name)
        except DataError:
            raise
        except FileNotFoundError as error:
            raise DataError(f"{name} does not exist") from error
        except (*_UNREADABLE, pillow.DecompressionBombError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{name} is not a readable picture ({reason})") from error

    def __call__(self, image: Image, name: str = "the picture") -> np.ndarray:
        """uint8 (C, height, width) of a Pillow image."""
        pillow = _pillow()
        width, height = image.size
        if width < 1 or height < 1 or width * height > self.max_pixels:
            raise DataError(
                f"got {name} with {width}x{height} pixels; expected 1 to {self.max_pixels:,}; shrink it or raise max_pixels"
            )
        if image.mode.startswith(("I", "F")):
            raise DataError(f"got {name} with pixels of mode {image.mode}; expected 8 bits a channel; convert it first")
        try:
            flat = self._flatten(image)
            box = self._box(flat.size, name)
            resample = getattr(pillow.Resampling, self.filter.upper())
            if box != (0, 0, *flat.size) or flat.size != (self.width, self.height):
                flat = flat.resize((self.width, self.height), resample, box=box)
            pixels = np.asarray(flat, dtype=np.uint8)
        except DataError:
            raise
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{name} is not a readable picture ({reason})") from error
        return pixels.reshape(self.height, self.width, self.channels).transpose(2, 0, 1)

    def _flatten(self, image: Image) -> Image:
        """Upright, without transparency (shown on white), in the wanted channels."""
        from PIL import ImageOps

        pillow = _pillow()
        image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or "transparency" in image.info:
            opaque = image.convert("RGBA")
            image = pillow.alpha_composite(pillow.new("RGBA", opaque.size, "white"), opaque)
        return image.convert("RGB" if self.channels == 3 else "L")

    def _box(self, size: tuple[int, int], name: str) -> tuple[float, float, float, float]:
        """The part of the picture that is kept, in its pixels: the largest centred one of the wanted aspect
        ratio."""
        width, height = size
        scale = min(width / self.width, height / self.height)
        kept_width, kept_height = scale * self.width, scale * self.height
        if self.crop == "none" and (round(kept_width) != width or round(kept_height) != height):
            raise DataError(
                f"got {name} with {width}x{height} pixels; expected the aspect ratio of {self.width}x{self.height}; "
                "crop='centre' cuts the rest off"
            )
        left, top = (width - kept_width) / 2, (height - kept_height) / 2
        return left, top, left + kept_width, top + kept_height


def _pillow():  # noqa: ANN202 - a module
    try:
        import PIL.Image
    except ImportError as error:
        raise DataError("pictures are read with Pillow, which is not installed; pip install pillow") from error
    return PIL.Image
