"""A folder of pictures as a data set; subfolders are classes.

root/*.png                          no labels, a test split is drawn
root/<class>/*.png                  labels, a test split is drawn
root/train/..., root/test/...       either of these, with a test split of its own (and root/val/... or root/validation/...)
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import cache as cached
from data.dataset import Dataset, Split, check_count, permutation
from data.errors import DataError
from data.files import MAX_BYTES, as_path, opening
from data.pictures import FORMATS, PictureDecoder

__all__ = ["image_folder"]

_ENDINGS = {ending for endings in FORMATS.values() for ending in endings}
_SPLITS = {"train": "train", "test": "test", "val": "validation", "validation": "validation"}


@dataclass(frozen=True)
class _Listing:
    """Pictures of one split in a fixed order, with the class folder of each ('' for none)."""

    files: list[Path]
    folders: list[str]


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS and path.is_file())


def _list(folder: Path) -> _Listing:
    files: list[Path] = []
    folders: list[str] = []
    loose = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS and path.is_file())
    classes = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    for child in classes:
        inside = _pictures(child)
        files += inside
        folders += [child.name] * len(inside)
    if loose and files:
        raise DataError(f"got {folder} with pictures both in itself and in subfolders; expected one of the two")
    if loose:
        return _Listing(loose, [""] * len(loose))
    empty = [child for child in classes if child.name not in folders]
    if files and empty:
        raise DataError(
            f"got {empty[0]} without pictures; expected some in every class's folder; fill it or move it away"
        )
    return _Listing(files, folders)


def _splits(root: Path) -> dict[str, _Listing]:
    if all((root / child).is_dir() for child in ("val", "validation")):
        raise DataError(
            f"got {root} with a folder val and a folder validation; expected one of them; put them together"
        )
    named = {name: root / child for child, name in _SPLITS.items() if (root / child).is_dir()}
    if "train" in named and "test" in named:
        return {name: _list(folder) for name, folder in named.items()}
    if "train" in named or "test" in named:
        raise DataError(
            f"got {root} with {', '.join(path.name for path in named.values())}; expected both train and test (or neither)"
        )
    return {"train": _list(root)}


def _key(listings: dict[str, _Listing], options: str) -> str:
    """Of the files' names, sizes and times and of the options: what decides the decoded bytes."""
    digest = hashlib.sha256(options.encode())
    for name, listing in listings.items():
        for path in listing.files:
            status = path.stat()
            digest.update(f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:12]


def image_folder(
    root: str | os.PathLike[str] | None = None,
    *,
    size: int | tuple[int, int],
    channels: int = 3,
    filter: str = "lanczos",
    crop: str = "centre",
    max_pixels: int = 2**24,
    cache: str | os.PathLike[str] | None = None,
    test_size: int | None = None,
    validation: int | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Dataset:
    """A data set of the pictures under a folder, decoded to uint8 (C, H, W).

    Args:
        root: the folder.
        size, channels, filter, crop, max_pixels: as in `PictureDecoder`.
        cache: a folder to keep the decoded bytes in, mapped into memory (see `data.cache`): needed for what
            does not fit memory, and the second time nothing is decoded.
        test_size: how many pictures become the test split (a tenth), where there is no folder "test".
        validation: how many training pictures are set aside (a tenth), where there is no folder "val".
        name: of the data set, the folder's by default.
        seed: of the splits.

    Raises:
        DataError: no pictures, unreadable ones, or options out of range.
    """
    folder = as_path(root, "image_folder")
    decoder = PictureDecoder(size=size, channels=channels, filter=filter, crop=crop, max_pixels=max_pixels)
    with opening(folder):
        if not folder.is_dir():
            raise DataError(f"got {folder}, which is no folder; expected a folder of pictures")
        listings = _splits(folder)
        for part, listing in listings.items():
            if not listing.files:
                raise DataError(f"got {folder} without pictures for {part} (endings {' '.join(sorted(_ENDINGS))})")
        key = _key(listings, f"{cached.FORMAT} {decoder} {test_size} {validation} {seed}")
    title = name or folder.resolve().name
    classes = tuple(sorted({c for listing in listings.values() for c in listing.folders} - {""}))
    number = {c: i for i, c in enumerate(classes)}
    flat = [
        (part, path, number.get(label, -1))
        for part, listing in listings.items()
        for path, label in zip(listing.files, listing.folders, strict=True)
    ]
    members = {part: np.array([i for i, row in enumerate(flat) if row[0] == part]) for part in listings}
    if "test" not in members:
        total = len(flat)
        count = max(1, total // 10) if test_size is None else test_size
        check_count("test_size", count, 1, total - 1)
        order = permutation(total, seed)
        members = {"train": np.sort(order[count:]), "test": np.sort(order[:count])}
    elif test_size is not None:
        raise DataError(f"got {folder} with a folder test; expected test_size to be left out")
    if validation is None:
        validation = 0 if "validation" in members else len(members["train"]) // 10
    targets = np.array([row[2] for row in flat], dtype=np.int64)

    def decode(index: int) -> np.ndarray:
        path = flat[index][1]
        return decoder.open(path, str(path))

    if cache is not None:
        place = as_path(cache, "cache") / f"{title}-{key}"
        if not cached.exists(place):
            rows = {
                part: cached.Rows(
                    count=len(index),
                    row=lambda i, index=index: decode(int(index[i])),  # type: ignore
                    labels=targets[index] if classes else None,
                    ids=index,
                )
                for part, index in members.items()
            }
            cached.write(place, rows, name=title, levels=256, classes=classes, validation=validation, seed=seed)
        return cached.mapped(place)

    pixels = decoder.channels * decoder.height * decoder.width
    if len(flat) * pixels > MAX_BYTES:
        raise DataError(
            f"{title}: {len(flat):,} pictures are {len(flat) * pixels:,} bytes; expected at most "
            f"{MAX_BYTES:,} in memory; say cache= to map them from a file"
        )
    splits = {}
    for part, index in members.items():
        images = np.empty((len(index), decoder.channels, decoder.height, decoder.width), np.uint8)
        for position, i in enumerate(index):
            images[position] = decode(int(i))
        splits[part] = Split(
            torch.from_numpy(images),
            torch.from_numpy(targets[index]) if classes else None,
            torch.from_numpy(index.astype(np.int64)),
        )
    return Dataset(name=title, splits=splits, levels=256, classes=classes, validation=validation, seed=seed)
