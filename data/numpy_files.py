"""NumPy files: .npy, mapped into memory rather than read, and .npz. Never with pickled objects.

A header is read here, not believed: its type must be a plain number type, or text of a
fixed length (labels that are names), and shape times item size must be
the number of bytes that follow, before anything is allocated.
"""

from __future__ import annotations

import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from data.dataset import Dataset, from_tensor
from data.errors import DataError
from data.files import MAX_BYTES, as_path, is_hidden, opening
from data.label_names import are_names

__all__ = ["arrays", "read_npy", "read_npz"]

# Names in use for the parts: ours, Keras's, MedMNIST's.
_PARTS = {
    "train": ("train", "x_train", "train_images", "x", "images", "data", "arr_0"),
    "train_labels": ("train_labels", "y_train", "labels", "y"),
    "test": ("test", "x_test", "test_images"),
    "test_labels": ("test_labels", "y_test"),
    "validation": ("validation", "x_val", "val_images"),
    "validation_labels": ("validation_labels", "y_val", "val_labels"),
}
# Torch has no more dimensions than 64, and nobody's samples have more than these.
_MAX_DIMENSIONS = 8
_MAX_NAME = 4 * 256
"""Bytes of a label that is text; NumPy has four a character."""
_PIECE = 2**20
_BAD_HEADER = (
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    struct.error,
    tokenize.TokenError,
    RecursionError,
    MemoryError,
    OverflowError,
    EOFError,
    IndexError,
)
_BAD_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    struct.error,
    OverflowError,
    IndexError,
)


def _header(stream: BinaryIO, where: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, type, and where the values start; checked."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise DataError(f"got {where}, which is in version {version} of the npy format; expected (1, 0) or (2, 0)")
    except DataError:
        raise
    except _BAD_HEADER as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"got {where} without a sound npy header ({reason}); save it with numpy.save") from error
    numbers, names = (
        dtype.kind in "biuf" and dtype.itemsize <= 8,
        dtype.kind in "US" and 0 < dtype.itemsize <= _MAX_NAME,
    )
    if not (numbers or names) or dtype.subdtype is not None:
        raise DataError(
            f"got {where}, which holds {str(dtype)[:60]}; expected numbers, or names of at most {_MAX_NAME // 4} characters "
            "as labels (pickled objects are never read; labels.astype(str) makes names of them)"
        )
    if len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 < n < 2**48 for n in shape):
        raise DataError(
            f"got {where} with shape {shape}; expected at most {_MAX_DIMENSIONS} dimensions, none of them empty"
        )
    return shape, fortran, dtype, stream.tell()


def _check_length(where: str, shape: tuple[int, ...], dtype: np.dtype, available: int) -> None:
    expected = math.prod(shape) * dtype.itemsize
    if expected != available:
        raise DataError(f"got {where} with {available:,} bytes of values; expected {expected:,} for {dtype} {shape}")


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of a .npy file, mapped: values are read when they are used, and writes do not reach the file.

    Raises:
        DataError: not a .npy file of numbers, or its length is not what its header says.
    """
    path = as_path(path, "read_npy")
    with opening(path):
        with path.open("rb") as stream:
            shape, fortran, dtype, start = _header(stream, str(path))
            _check_length(str(path), shape, dtype, path.stat().st_size - start)
        return np.memmap(path, dtype, mode="c", offset=start, shape=shape, order="F" if fortran else "C")


def _is_array(member: str) -> bool:
    """Whether a member of an archive is an array, and not what an operating system has put beside one."""
    return member.endswith(".npy") and not any(is_hidden(part) for part in member.split("/"))


def read_npz(path: str | os.PathLike[str], *, limit: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name, read into memory.

    Args:
        path: the file.
        limit: refuse files that unpack to more bytes than this.

    Raises:
        DataError: not a .npz file of numbers, or damaged.
    """
    path = as_path(path, "read_npz")
    found: dict[str, np.ndarray] = {}
    with opening(path):
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if _is_array(member.filename)]
                total = sum(member.file_size for member in members)
                if total > limit:
                    raise DataError(
                        f"got {path}, which unpacks to {total:,} bytes; expected at most {limit:,}; use .npy files"
                    )
                for member in members:
                    where = f"{path}: {member.filename}"
                    # The other methods can be told to allocate a dictionary of gigabytes.
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise DataError(
                            f"got {where}, which is compressed by method {member.compress_type}; expected deflate"
                        )
                    # A bytearray, because tensors of read-only memory are not safe. In pieces, because all at once is
                    # unpacked before it is cut to the size that the archive states.
                    raw = bytearray()
                    with archive.open(member) as stream:
                        while piece := stream.read(_PIECE):
                            raw += piece
                    shape, fortran, dtype, start = _header(io.BytesIO(raw), where)
                    _check_length(where, shape, dtype, len(raw) - start)
                    values = np.frombuffer(raw, dtype, math.prod(shape), start)
                    found[member.filename[:-4]] = values.reshape(shape, order="F" if fortran else "C")
        except DataError:
            raise
        except _BAD_ZIP as error:
            raise DataError(f"{path} is not a whole npz file ({error}); save it with numpy.savez") from error
    if not found:
        raise DataError(f"got {path} without arrays; expected some of {', '.join(_PARTS['train'])}")
    return found


def _select(found: dict[str, np.ndarray], part: str, key: str | None, where: str) -> np.ndarray | None:
    if key is not None:
        if key not in found:
            raise DataError(f"got {where} without an array {key!r}; expected one of {', '.join(sorted(found))}")
        return found[key]
    return next((found[name] for name in _PARTS[part] if name in found), None)


def _channels_first(x: np.ndarray, layout: str, where: str) -> np.ndarray:
    """(N, H, W, C) as (N, C, H, W)."""
    if x.ndim != 4:
        return x
    if layout == "auto":
        last, first = x.shape[3] in (1, 3), x.shape[1] in (1, 3)
        if last and first:
            raise DataError(
                f"{where}: got images of shape {x.shape}, which can be read both ways; set layout='NCHW' or 'NHWC'"
            )
        layout = "NHWC" if last else "NCHW"
    return np.moveaxis(x, 3, 1) if layout == "NHWC" else x


def arrays(
    root: str | os.PathLike[str] | None = None,
    *,
    x: str | None = None,
    labels: str | None = None,
    test: str | None = None,
    test_labels: str | None = None,
    layout: str = "auto",
    levels: int | None = None,
    continuous: bool = False,
    test_size: int | None = None,
    validation: int | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Dataset:
    """A data set from a .npz file, a .npy file, or a folder of .npy files (these are mapped, not read).

    Arrays are found by name: train (or x_train, train_images, x, images, data), test, validation (or x_val,
    val_images), and train_labels (or y_train, labels, y), test_labels, validation_labels; other names can be given. Labels
    are integers, or names, whose classes are those of the training data in alphabetical order. uint8
    and uint16 arrays (N, H, W), (N, C, H, W) and (N, H, W, C) are images, and others with `levels`; all else is continuous.

    Args:
        root: the file or folder.
        x: name of the training array, or of all data.
        labels: name of its labels.
        test: name of the test array; without one, `test_size` samples are set aside.
        test_labels: name of its labels.
        layout: axes of four-dimensional images: "NCHW", "NHWC", or "auto" (the channel axis is the one of size 1
            or 3).
        levels: grey levels, 256 for uint8 images and 65,536 for uint16 ones. With it, floats in [0, 1], in [-1, 1], or whole
            become these grey values exactly.
        continuous: the numbers are real ones, even where they look like grey values.
        test_size: number of samples that become the test split.
        validation: number of training samples set aside, where there is no array of that name.
        name: of the data set, the file's by default.
        seed: seed of the splits.

    Raises:
        DataError: files that are missing or wrong, arrays that do not fit together.
    """
    path = as_path(root, "arrays")
    if layout not in ("auto", "NCHW", "NHWC"):
        raise DataError(f"got layout={layout!r}; expected 'auto', 'NCHW' or 'NHWC'")
    with opening(path):
        path.stat()
        if path.is_dir():
            found = {file.stem: read_npy(file) for file in sorted(path.glob("*.npy")) if not is_hidden(file.name)}
        elif path.suffix == ".npy":
            found = {"x": read_npy(path)}
        else:
            found = read_npz(path)
    data = _select(found, "train", x, str(path))
    if data is None:
        raise DataError(
            f"got {path}, which holds {', '.join(sorted(found)) or 'no arrays'}; expected one of "
            f"{', '.join(_PARTS['train'])}; name it with x="
        )
    held_out = _select(found, "test", test, str(path))
    own = _select(found, "validation", None, str(path))
    if own is not None and validation is not None:
        raise DataError(f"got {path} with validation data; expected validation to be left out")

    def targets(part: str, key: str | None) -> Tensor | np.ndarray | None:
        array = _select(found, part, key, str(path))
        if array is None or are_names(array):
            return array
        if array.dtype.kind not in "iu" or array.ndim == 0 or array.size != len(array):
            raise DataError(f"{path}: got labels of {array.dtype} {array.shape}; expected integers or names (N,)")
        return torch.from_numpy(array.reshape(-1).astype(np.int64))

    def images(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else _channels_first(array, layout, str(path))

    return from_tensor(
        _channels_first(data, layout, str(path)),
        targets("train_labels", labels),
        test=images(held_out),
        test_labels=None if held_out is None else targets("test_labels", test_labels),
        levels=levels,
        continuous=continuous,
        test_size=test_size,
        validation=validation if own is None else images(own),
        validation_labels=None if own is None else targets("validation_labels", None),
        name=name or path.stem,
        seed=seed,
    )
