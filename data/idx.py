"""The idx format of MNIST, Fashion-MNIST and their relatives, plain or gzip-compressed.

A file is a magic number (two zero bytes, a type code, the number of dimensions), the dimensions as big-endian 32-bit
integers, and the values, big-endian, the last dimension fastest (the format's only description is at the foot of the MNIST
page of LeCun, Cortes and Burges). The header is believed only if the file has exactly the bytes that it promises.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch

from data.dataset import Dataset, Split
from data.errors import DataError
from data.files import MAX_BYTES, Pieces, as_path, first_existing, gunzip, plain

__all__ = ["fashion_mnist", "mnist", "read_idx"]

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_CLOTHES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read_idx(path: str | os.PathLike[str], *, limit: int = MAX_BYTES) -> np.ndarray:
    """The array of an idx file; a name that ends in .gz is decompressed.

    Args:
        path: the file.
        limit: refuse files whose header promises more bytes than this.

    Raises:
        DataError: not an idx file, or its length is not what its header says.
    """
    path = as_path(path, "read_idx")
    pieces = Pieces(gunzip(path) if path.suffix == ".gz" else plain(path))
    magic = pieces.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES:
        codes = ", ".join(f"{code:#04x}" for code in _TYPES)
        raise DataError(
            f"got {path}, which begins with {magic.hex() or 'nothing'}; expected the idx magic 0000, a type "
            f"({codes}) and a number of dimensions"
        )
    dimensions = magic[3]
    if not 1 <= dimensions <= 4:
        raise DataError(f"got {path} with {dimensions} dimensions; expected 1 to 4")
    sizes = pieces.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise DataError(f"{path} ends inside its header of {4 + 4 * dimensions} bytes; fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
    dtype = np.dtype(_TYPES[magic[2]])
    header, length = 4 + 4 * dimensions, math.prod(shape) * dtype.itemsize
    if not 0 < length <= limit:
        raise DataError(
            f"got {path}, which promises {length:,} bytes (shape {shape}); expected at least one and at most {limit:,}"
        )
    values = pieces.read(length)
    if len(values) < length or pieces.read(1):
        relation = f"{header + len(values):,} of" if len(values) < length else "more than"
        raise DataError(
            f"got {path} with {relation} the {header + length:,} bytes of its header's shape {shape}; fetch it again"
        )
    return np.frombuffer(values, dtype).reshape(shape)


def _find(folders: list[Path], stem: str, hint: str) -> Path:
    # The two spellings in use: train-images-idx3-ubyte and train-images.idx3-ubyte.
    names = [spelling + suffix for spelling in (stem, stem.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    found = first_existing([folder / name for folder in folders for name in names])
    if found is None:
        places = " or ".join(str(folder) for folder in folders)
        raise DataError(f"no {stem} (or {stem}.gz) in {places}; {hint}")
    return found


def _pair(folders: list[Path], part: str, hint: str) -> tuple[torch.Tensor, torch.Tensor]:
    image_path = _find(folders, f"{part}-images-idx3-ubyte", hint)
    label_path = _find(folders, f"{part}-labels-idx1-ubyte", hint)
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.dtype != np.uint8 or images.ndim != 3 or 0 in images.shape:
        raise DataError(f"got {image_path}, which holds {images.dtype} {images.shape}; expected uint8 (N, H, W)")
    if labels.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise DataError(
            f"got {label_path}, which holds {labels.dtype} {labels.shape}; expected uint8 ({images.shape[0]},), one per "
            f"image of {image_path.name}"
        )
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def _mnist_like(
    name: str, folders: list[Path], hint: str, classes: tuple[str, ...], validation: int, seed: int
) -> Dataset:
    train, train_labels = _pair(folders, "train", hint)
    test, test_labels = _pair(folders, "t10k", hint)
    return Dataset(
        name=name,
        levels=256,
        classes=classes,
        validation=validation,
        seed=seed,
        splits={
            "train": Split(train, train_labels, torch.arange(len(train))),
            "test": Split(test, test_labels, torch.arange(len(test)) + len(train)),
        },
    )


def mnist(root: str | os.PathLike[str] | None = None, *, validation: int = 5_000, seed: int = 0) -> Dataset:
    """MNIST, or anything in its four files: 60,000 + 10,000 images of 28x28.

    Args:
        root: the folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and the two t10k files, each
            plain or .gz.
        validation: number of training images set aside.
        seed: seed of the validation split.

    Raises:
        DataError: files that are missing or wrong.
    """
    folder = as_path(root, "mnist")
    hint = "put the four idx files of MNIST there"
    return _mnist_like("mnist", [folder, folder / "MNIST" / "raw"], hint, tuple("0123456789"), validation, seed)


def fashion_mnist(root: str | os.PathLike[str] | None = None, *, validation: int = 5_000, seed: int = 0) -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): 60,000 + 10,000 grey images of clothes, 28x28.

    Args:
        root: the folder with the four idx files; without it, where Debian's package dataset-fashion-mnist
            puts them.
        validation: number of training images set aside.
        seed: seed of the validation split.

    Raises:
        DataError: files that are missing or wrong.
    """
    folders = [_DEBIAN]
    if root is not None and str(root) != "":
        folder = as_path(root, "fashion_mnist")
        folders = [folder, folder / "FashionMNIST" / "raw"]
    hint = "on Debian or Ubuntu install the package dataset-fashion-mnist, elsewhere put its four idx files in root"
    return _mnist_like("fashion_mnist", folders, hint, _CLOTHES, validation, seed)
