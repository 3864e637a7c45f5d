"""A folder of pictures as a data set; subfolders are classes.

root/*.png                          no labels, a test split is drawn
root/<class>/*.png                  labels, a test split is drawn
root/train/..., root/test/..., root/val/...     either of these, with a test or validation split of its own, or both

A folder val is the validation split. Where there is none called test, the test split is drawn from the training pictures, or is
the folder that `test` names. What operating systems and programs keep for themselves, such as `._a.png` or
`.ipynb_checkpoints/`, is passed over and counted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import cache as cached
from data.dataset import Dataset, Split, check_count, permutation
from data.errors import DataError
from data.files import MAX_BYTES, as_path, is_hidden, opening
from data.pictures import FORMATS, PictureDecoder

__all__ = ["image_folder"]

_ENDINGS = {ending for endings in FORMATS.values() for ending in endings}
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
}


@dataclass(frozen=True)
class _Listing:
    """Pictures of one split in a fixed order, with the class folder of each ('' for none), and what was passed over."""

    files: list[Path]
    folders: list[str]
    hidden: list[Path]


def _walk(folder: Path, hidden: list[Path]) -> list[Path]:
    """The pictures below a folder; files in hidden places go to `hidden`."""
    found = []
    for path in sorted(folder.rglob("*")):
        if any(map(is_hidden, path.relative_to(folder).parts)):
            if path.is_file():
                hidden.append(path)
        elif path.suffix.lower() in _ENDINGS and path.is_file():
            found.append(path)
    return found


def _children(folder: Path, hidden: list[Path]) -> tuple[list[Path], list[Path]]:
    """The pictures and the folders directly in a folder; files in hidden places go to `hidden`."""
    pictures, folders = [], []
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name):
            hidden += [path] if path.is_file() else sorted(inside for inside in path.rglob("*") if inside.is_file())
        elif path.is_dir():
            folders.append(path)
        elif path.suffix.lower() in _ENDINGS and path.is_file():
            pictures.append(path)
    return pictures, folders


def _list(folder: Path) -> _Listing:
    files: list[Path] = []
    folders: list[str] = []
    hidden: list[Path] = []
    loose, classes = _children(folder, hidden)
    for child in classes:
        inside = _walk(child, hidden)
        files += inside
        folders += [child.name] * len(inside)
    if loose and files:
        raise DataError(f"got {folder} with pictures both in itself and in subfolders; expected one of the two")
    if loose:
        return _Listing(loose, [""] * len(loose), hidden)
    empty = [child for child in classes if child.name not in folders]
    if files and empty:
        raise DataError(
            f"got {empty[0]} without pictures; expected some in every class's folder; fill it or move it away"
        )
    return _Listing(files, folders, hidden)


def _splits(root: Path, test: str | None) -> dict[str, _Listing]:
    hidden: list[Path] = []
    _, children = _children(root, hidden)
    if test is not None and test not in [child.name for child in children]:
        names = ", ".join(child.name for child in children) or "none"
        raise DataError(f"got test={test!r} for {root}, which has no such folder; expected one of {names}")
    named: dict[str, Path] = {}
    for child in children:
        split = "test" if child.name == test else _SPLITS.get(child.name.lower())
        if split in named:
            raise DataError(
                f"got {root} with a folder {named[split].name} and a folder {child.name}; expected one of them; "
                "put them together"
            )
        if split is not None:
            named[split] = child
    if "train" in named and (len(named) > 1 or len(children) == 1):
        listings = {split: _list(folder) for split, folder in named.items()}
        listings["train"].hidden.extend(hidden)
        return dict(sorted(listings.items(), key=lambda item: ("train", "test", "validation").index(item[0])))
    if "train" in named or "test" in named:
        raise DataError(
            f"got {root} with {', '.join(path.name for path in named.values())}; expected train and test or val (or neither)"
        )
    return {"train": _list(root)}


def _passed_over(listings: dict[str, _Listing]) -> tuple[str, ...]:
    """A note of the hidden files, where there are any."""
    hidden = [path for listing in listings.values() for path in listing.hidden]
    if not hidden:
        return ()
    first = ", ".join(str(path) for path in hidden[:3]) + (", ..." if len(hidden) > 3 else "")
    files = "hidden file is" if len(hidden) == 1 else "hidden files are"
    return (f"{len(hidden):,} {files} passed over ({first})",)


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
    max_pixels: int = 10**8,
    levels: int = 256,
    test: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    test_size: int | None = None,
    validation: int | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Dataset:
    """A data set of the pictures under a folder, decoded to grey values (C, H, W).

    Args:
        root: folder of the pictures.
        size, channels, filter, crop, max_pixels, levels: as in `PictureDecoder`.
        test: name of the folder that is the test split, for instance "val" to report on that.
        cache: folder for the decoded bytes, which are mapped into memory (see `data.cache`): for pictures that do not
            fit memory, and to decode only once.
        test_size: number of pictures that become the test split (a tenth), where no folder holds one.
        validation: number of training pictures set aside (a tenth), where there is no folder "val".
        name: name of the data set; the folder's unless given.
        seed: seed of the splits.

    Raises:
        DataError: no pictures, unreadable ones, or options out of range.
    """
    folder = as_path(root, "image_folder")
    decoder = PictureDecoder(
        size=size, channels=channels, filter=filter, crop=crop, max_pixels=max_pixels, levels=levels
    )
    with opening(folder):
        if not folder.is_dir():
            raise DataError(f"got {folder}, which is not a folder; expected a folder of pictures")
        listings = _splits(folder, test)
        for part, listing in listings.items():
            if not listing.files:
                raise DataError(f"got {folder} without pictures for {part} (endings {' '.join(sorted(_ENDINGS))})")
        key = _key(listings, f"{cached.FORMAT} {decoder} {test_size} {validation} {seed}")
    notes, names = _passed_over(listings), _Names(folder, [p for listing in listings.values() for p in listing.files])
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
        total = len(members["train"])
        count = max(1, total // 10) if test_size is None else test_size
        check_count("test_size", count, 1, total - 1)
        order = permutation(total, seed)
        drawn = {"train": np.sort(order[count:]), "test": np.sort(order[:count])}
        members = {**members, **{part: members["train"][index] for part, index in drawn.items()}}
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
            cached.write(place, rows, name=title, levels=levels, classes=classes, validation=validation, seed=seed)
        return replace(cached.mapped(place), notes=notes, names=names)

    pixels = decoder.channels * decoder.height * decoder.width * np.dtype(decoder.dtype).itemsize
    if len(flat) * pixels > MAX_BYTES:
        raise DataError(
            f"{title}: {len(flat):,} pictures are {len(flat) * pixels:,} bytes; expected at most "
            f"{MAX_BYTES:,} in memory; set cache= to map them from a file"
        )
    splits = {}
    for part, index in members.items():
        images = np.empty((len(index), decoder.channels, decoder.height, decoder.width), decoder.dtype)
        for position, i in enumerate(index):
            images[position] = decode(int(i))
        splits[part] = Split(
            torch.from_numpy(images),
            torch.from_numpy(targets[index]) if classes else None,
            torch.from_numpy(index.astype(np.int64)),
        )
    return Dataset(
        name=title,
        splits=splits,
        levels=levels,
        classes=classes,
        validation=validation,
        seed=seed,
        notes=notes,
        names=names,
    )


class _Names(Sequence[str]):
    """The files by their ids, below the folder; made when they are asked for, since there may be millions."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self._folder, self._files = folder, files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        return str(self._files[index].relative_to(self._folder))
