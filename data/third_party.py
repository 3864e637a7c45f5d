"""Data sets of Hugging Face `datasets` and of torchvision: optional, imported only when they are called.

Both are sequences of samples with a picture and perhaps a label; `from_pictures` is the part in common, and
serves any such sequence. Neither is asked to run code that comes with the data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data.dataset import Dataset, Split
from data.errors import DataError
from data.files import MAX_BYTES, as_path
from data.pictures import PictureDecoder

__all__ = ["from_pictures", "hugging_face", "torchvision_dataset"]


def from_pictures(
    splits: Mapping[str, Sequence[tuple[Any, int | None]]],
    decoder: PictureDecoder,
    *,
    name: str,
    classes: tuple[str, ...] = (),
    validation: int = 0,
    seed: int = 0,
) -> Dataset:
    """A data set of sequences of (Pillow image, label or None), decoded into memory.

    Args:
        splits: by name, at least train and test.
        decoder: turns a picture into bytes.
        name, classes, validation, seed: of the `Dataset`.

    Raises:
        DataError: samples of another kind, some without a label, or too many for the memory.
    """
    decoded: dict[str, Split] = {}
    first = 0
    for part, samples in splits.items():
        count = len(samples)
        shape = (count, decoder.channels, decoder.height, decoder.width)
        if np.prod(shape, dtype=np.float64) > MAX_BYTES:
            raise DataError(
                f"{name}: {part} has {count:,} pictures, too many for {MAX_BYTES:,} bytes of memory; save "
                "them to a folder and read it with image_folder and cache="
            )
        images = np.empty(shape, np.uint8)
        labels: list[int | None] = []
        for i in range(count):
            picture, label = samples[i]
            if not hasattr(picture, "convert"):
                raise DataError(
                    f"{name}: got sample {i} of {part} of class {type(picture).__name__}; expected a picture"
                )
            images[i] = decoder(picture, f"{name}: sample {i} of {part}")
            labels.append(None if label is None else int(label))
        known = [label for label in labels if label is not None]
        if known and len(known) != count:
            raise DataError(f"{name}: got {count - len(known)} samples of {part} without a label; expected all or none")
        decoded[part] = Split(
            torch.from_numpy(images), torch.tensor(known) if known else None, torch.arange(first, first + count)
        )
        first += count
    return Dataset(name=name, splits=decoded, levels=256, classes=classes, validation=validation, seed=seed)


class _Columns(Sequence[tuple[Any, "int | None"]]):
    """Rows of a Hugging Face table as (picture, label)."""

    def __init__(self, table: Any, image: str, label: str | None) -> None:
        self._table, self._image, self._label = table, image, label

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        row = self._table[index]
        return row[self._image], None if self._label is None else row[self._label]


def hugging_face(
    root: str | os.PathLike[str] | None = None,
    *,
    size: int | tuple[int, int],
    channels: int = 3,
    filter: str = "lanczos",
    crop: str = "centre",
    max_pixels: int = 2**24,
    image: str = "image",
    label: str | None = "label",
    train: str = "train",
    test: str = "test",
    validation: int = 0,
    revision: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Pictures of a data set of the Hugging Face hub, or of a local folder in its form (needs `pip install
    datasets`).

    Args:
        root: the data set's name on the hub, or a folder.
        size, channels, filter, crop, max_pixels: as in `PictureDecoder`.
        image: column of pictures.
        label: column of integer labels, None for none.
        train, test: which of its splits these are.
        validation: how many training samples are set aside.
        revision: of the data set.
        seed: of that choice.

    Raises:
        DataError: `datasets` is missing, or has no such data set, split or column.
    """
    as_path(root, "hugging_face")  # a name, too, is text
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "hugging_face needs the package datasets, which is not installed; pip install datasets"
        ) from error
    decoder = PictureDecoder(size=size, channels=channels, filter=filter, crop=crop, max_pixels=max_pixels)
    name = str(root)
    tables = {}
    for part, which in (("train", train), ("test", test)):
        try:
            tables[part] = datasets.load_dataset(name, split=which, revision=revision)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"hugging_face: {name} has no split {which!r} to read ({reason})") from error
        missing = [column for column in (image, label) if column and column not in tables[part].column_names]
        if missing:
            raise DataError(
                f"hugging_face: got {name} without a column {missing[0]!r}; expected one of "
                f"{', '.join(tables[part].column_names)}"
            )
    names = getattr(tables["train"].features.get(label), "names", None) if label else None
    return from_pictures(
        {part: _Columns(table, image, label) for part, table in tables.items()},
        decoder,
        name=name.rsplit("/", 1)[-1],
        classes=tuple(names or ()),
        validation=validation,
        seed=seed,
    )


def torchvision_dataset(
    root: str | os.PathLike[str] | None = None,
    *,
    dataset: str,
    size: int | tuple[int, int],
    channels: int = 3,
    filter: str = "lanczos",
    crop: str = "centre",
    max_pixels: int = 2**24,
    download: bool = False,
    validation: int = 0,
    seed: int = 0,
) -> Dataset:
    """A classification data set of torchvision (needs torchvision): one of those with `train=` or `split=`.

    Args:
        root: where its files are.
        dataset: the class's name, such as "CIFAR100" or "SVHN".
        size, channels, filter, crop, max_pixels: as in `PictureDecoder`.
        download: fetch what is missing.
        validation: how many training samples are set aside.
        seed: of that choice.

    Raises:
        DataError: torchvision is missing or does not import, has no such data set, or finds no files.
    """
    folder = as_path(root, "torchvision")
    decoder = PictureDecoder(size=size, channels=channels, filter=filter, crop=crop, max_pixels=max_pixels)
    try:
        from torchvision import datasets as zoo
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        reason = str(error).splitlines()[0]
        raise DataError(f"torchvision does not import here ({reason}); install the build for this torch") from error
    if dataset not in getattr(zoo, "__all__", ()):
        raise DataError(f"got the torchvision data set {dataset!r}; expected a name such as 'CIFAR100' or 'SVHN'")
    constructor = getattr(zoo, dataset)
    parts: dict[str, Any] = {}
    for part in ("train", "test"):
        try:
            try:
                parts[part] = constructor(folder, train=part == "train", download=download)
            except TypeError:
                parts[part] = constructor(folder, split=part, download=download)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"torchvision's {dataset} cannot be read from {folder} ({reason})") from error
    classes = tuple(str(c) for c in getattr(parts["train"], "classes", ()))
    return from_pictures(parts, decoder, name=dataset.lower(), classes=classes, validation=validation, seed=seed)
