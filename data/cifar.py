"""CIFAR-10 from the tarballs that its authors publish (Krizhevsky 2009), or from the folders that they unpack to.

The binary version is preferred: a batch is 3,073-byte records, a label and 3x32x32 bytes. The Python version is pickled, and
read without running the pickle (`data.safe_pickle`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.dataset import Dataset, Split
from data.errors import DataError
from data.files import as_path, first_existing, read_bytes, sha256
from data.safe_pickle import as_bytes, uint8_array, unpickle
from data.tarball import read_members

__all__ = ["cifar10"]

_BINARY = "cifar-10-binary.tar.gz"
_PICKLED = "cifar-10-python.tar.gz"
SHA256 = {
    _BINARY: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    _PICKLED: "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
}
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_PIXELS = 3 * 32 * 32
# A real batch has 10,000 images (31 MB); all six batches are 184 MB.
_MAX_BATCH = 64 * 2**20
_MAX_UNPACKED = 512 * 2**20


def _from_folder(path: Path, names: tuple[str, ...]) -> dict[str, bytearray]:
    return {name: bytearray(read_bytes(path / name, _MAX_BATCH)) for name in names}


def _parse_binary(raw: bytearray, where: str) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + _PIXELS
    if not raw or len(raw) % record:
        raise DataError(
            f"got {where} with {len(raw):,} bytes; expected a multiple of {record}: a label and 3x32x32 pixels"
        )
    rows = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)


def _parse_pickled(raw: bytearray, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = unpickle(raw, where)
    if not isinstance(batch, dict):
        raise DataError(
            f"got {where}, which holds a {type(batch).__name__}; expected a dictionary with data and labels"
        )
    named = {as_bytes(key): value for key, value in batch.items()}
    shape, content = uint8_array(named.get(b"data"), where)
    labels = named.get(b"labels")
    if len(shape) != 2 or shape[1] != _PIXELS or shape[0] < 1 or len(content) != shape[0] * _PIXELS:
        raise DataError(f"{where}: got data of shape {shape} and {len(content):,} bytes; expected (N, {_PIXELS})")
    if not isinstance(labels, list) or len(labels) != shape[0] or not all(type(k) is int for k in labels):
        raise DataError(f"{where}: labels are not {shape[0]} integers, one per image")
    if not all(0 <= label < 10 for label in labels):
        raise DataError(f"{where}: got labels from {min(labels)} to {max(labels)}; expected 0..9")
    return np.frombuffer(content, np.uint8).reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _check_sum(path: Path) -> None:
    actual = sha256(path)
    if actual != SHA256[path.name]:
        raise DataError(
            f"got {path} with SHA-256 {actual[:12]}...; expected {SHA256[path.name][:12]}...: it is damaged or not "
            "the authors' file; fetch it again, or pass verify=False for a file of your own"
        )


def cifar10(
    root: str | os.PathLike[str] | None = None, *, verify: bool = True, validation: int = 5_000, seed: int = 0
) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32.

    Args:
        root: the folder with cifar-10-binary.tar.gz (preferred) or cifar-10-python.tar.gz, or with what they
            unpack to: cifar-10-batches-bin or cifar-10-batches-py.
        verify: check a tarball's SHA-256 against that of the authors' file.
        validation: number of training images set aside.
        seed: seed of the validation split.

    Raises:
        DataError: files that are missing or wrong.
    """
    folder = as_path(root, "cifar10")
    sources = [folder / _BINARY, folder / "cifar-10-batches-bin", folder / _PICKLED, folder / "cifar-10-batches-py"]
    source = first_existing(sources)
    if source is None:
        raise DataError(
            f"got {folder} without {_BINARY} or {_PICKLED}; expected one of them (or the folder it unpacks to)"
        )
    binary = source in sources[:2]
    suffix = ".bin" if binary else ""
    names = (*(f"data_batch_{i}{suffix}" for i in range(1, 6)), f"test_batch{suffix}")
    if source.is_dir():
        raw = _from_folder(source, names)
    else:
        if verify:
            _check_sum(source)
        raw = read_members(source, names, largest=_MAX_BATCH, unpacked=_MAX_UNPACKED)
    parse: Callable[[bytearray, str], tuple[np.ndarray, np.ndarray]] = _parse_binary if binary else _parse_pickled
    batches = [parse(raw.pop(name), f"{source}: {name}") for name in names]
    train = torch.from_numpy(np.concatenate([images for images, _ in batches[:5]]))
    train_labels = torch.from_numpy(np.concatenate([labels for _, labels in batches[:5]]))
    test, test_labels = (torch.from_numpy(np.array(part)) for part in batches[5])
    return Dataset(
        name="cifar10",
        levels=256,
        classes=_CLASSES,
        validation=validation,
        seed=seed,
        splits={
            "train": Split(train, train_labels, torch.arange(len(train))),
            "test": Split(test, test_labels, torch.arange(len(test)) + len(train)),
        },
    )
