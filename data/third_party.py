"""Data sets of Hugging Face `datasets` and of torchvision: optional, imported only when they are called.

Both are sequences of samples with a picture, or numbers, and perhaps a label; `from_pictures` and `data.from_tensor` take such
sequences. Neither library is asked to run code that comes with the data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.dataset import Dataset, Split, check_count, from_tensor, permutation
from data.errors import DataError
from data.files import MAX_BYTES, as_path
from data.label_names import are_names, numbered
from data.pictures import PictureDecoder

__all__ = ["from_pictures", "hugging_face", "torchvision_dataset"]


def from_pictures(
    splits: Mapping[str, Sequence[tuple[Any, int | None]]],
    decoder: PictureDecoder,
    *,
    name: str,
    classes: tuple[str, ...] = (),
    test_size: int | None = None,
    validation: int = 0,
    seed: int = 0,
) -> Dataset:
    """A data set of sequences of (Pillow image, label or None), decoded into memory.

    Args:
        splits: by name, train among them; without test, it is drawn from train.
        decoder: turns a picture into grey values.
        test_size: number of training samples that become the test split (a tenth), where there is none.
        name, classes, validation, seed: of the `Dataset`.

    Raises:
        DataError: samples of another kind, some without a label, or too many for the memory.
    """
    pictures: dict[str, Tensor] = {}
    given: dict[str, Any] = {}
    for part, samples in splits.items():
        count = len(samples)
        shape = (count, decoder.channels, decoder.height, decoder.width)
        if np.prod(shape, dtype=np.float64) * np.dtype(decoder.dtype).itemsize > MAX_BYTES:
            raise DataError(
                f"{name}: {part} has {count:,} pictures, too many for {MAX_BYTES:,} bytes of memory; save "
                "them to a folder and read it with image_folder and cache="
            )
        images = np.empty(shape, decoder.dtype)
        labels: list[Any] = []
        for i in range(count):
            picture, label = samples[i]
            if not hasattr(picture, "convert"):
                raise DataError(
                    f"{name}: got sample {i} of {part} of class {type(picture).__name__}; expected a picture"
                )
            images[i] = decoder(picture, f"{name}: sample {i} of {part}")
            labels.append(label)
        known = sum(label is not None for label in labels)
        if known and known != count:
            raise DataError(f"{name}: got {count - known} samples of {part} without a label; expected all or none")
        pictures[part], given[part] = torch.from_numpy(images), labels if known else None
    numbers, classes = numbered(given, classes, name)
    decoded: dict[str, Split] = {}
    first = 0
    for part, x in pictures.items():
        targets = None if numbers[part] is None else torch.tensor([int(label) for label in numbers[part]])
        decoded[part] = Split(x, targets, torch.arange(first, first + len(x)))
        first += len(x)
    if "test" not in decoded:
        decoded = {**decoded, **_drawn(decoded["train"], test_size, seed)}
    elif test_size is not None:
        raise DataError(f"{name}: got a test split and test_size={test_size}; expected one of them")
    return Dataset(name=name, splits=decoded, levels=decoder.levels, classes=classes, validation=validation, seed=seed)


def _drawn(train: Split, test_size: int | None, seed: int) -> dict[str, Split]:
    """Training and test samples from one split."""
    count = max(1, len(train) // 10) if test_size is None else test_size
    check_count("test_size", count, 1, len(train) - 1)
    order = permutation(len(train), seed)
    rows = {"train": order[count:], "test": order[:count]}
    return {part: train.take(torch.from_numpy(np.sort(index))) for part, index in rows.items()}


class _Columns(Sequence[tuple[Any, "int | None"]]):
    """Rows of a Hugging Face table as (picture, label)."""

    def __init__(self, table: Any, image: str, label: str | None) -> None:
        self._table, self._image, self._label = table, image, label

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        try:
            row = self._table[index]
        except (OSError, ValueError, RuntimeError, SyntaxError) as error:  # the library decodes as it reads
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"hugging_face: sample {index} cannot be read ({reason})") from error
        return row[self._image], None if self._label is None else row[self._label]


_IMAGE_NAMES = ("image", "img", "images", "picture", "pixel_values", "x")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "y")


def _column(table: Any, asked: str | None, names: tuple[str, ...], kind: str, what: str, where: str) -> str | None:
    """The column that was asked for; with "auto" the one of a usual name or of the library's own kind, or None."""
    columns = list(table.column_names)
    if asked is None or asked in columns:
        return asked
    if asked == "auto":
        found = [name for name in names if name in columns]
        typed = [name for name in columns if type((table.features or {}).get(name)).__name__ == kind]
        return next(iter([*found, *typed]), None)
    raise DataError(
        f"hugging_face: got {where} without a column {asked!r}; expected one of {', '.join(columns)}: say {what}= "
        f"(--config.data.{what})"
    )


def hugging_face(
    root: str | os.PathLike[str] | None = None,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    filter: str = "lanczos",
    crop: str = "centre",
    max_pixels: int = 10**8,
    levels: int | None = None,
    continuous: bool = False,
    image: str | None = "auto",
    label: str | None = "auto",
    subset: str | None = None,
    train: str = "train",
    test: str | None = "auto",
    test_size: int | None = None,
    validation: int = 0,
    validation_split: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Pictures, or arrays of numbers, of a data set of the Hugging Face hub, or of a local folder in its form (needs `pip
    install datasets`).

    Args:
        root: the data set's name on the hub, or a folder.
        size: height and width of pictures, or one number for both; pictures need it.
        channels, filter, crop, max_pixels: as in `PictureDecoder`.
        levels: grey levels, 256 for pictures unless they have 16 bits; as in `from_tensor` for arrays.
        continuous: arrays are real numbers, even where they look like grey values.
        image: column of pictures or arrays; "auto" for one of a usual name, or the first of pictures.
        label: column of labels, integers or names, None for none; "auto" for one of a usual name, or the first of classes.
        subset: name of a configuration of the data set.
        train: name of its training split.
        test: name of its test split; None to draw it from train; "auto" for "test", or drawn where there is none.
        test_size: number of training samples that become the test split (a tenth), where it is drawn.
        validation: number of training samples set aside.
        validation_split: name of its validation split; None to draw it from train.
        revision: revision of the data set on the hub.
        seed: seed of the splits.

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
    name = str(root)
    tables: dict[str, Any] = {}
    for part, which in (
        ("train", train),
        ("test", "test" if test == "auto" else test),
        ("validation", validation_split),
    ):
        if which is None:
            continue
        try:
            named = () if subset is None else (subset,)
            tables[part] = datasets.load_dataset(name, *named, split=which, revision=revision)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            # the library says ValueError of a split that is not there; files and networks that fail are something else
            if part == "test" and test == "auto" and isinstance(error, (ValueError, KeyError)):
                continue
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"hugging_face: {name} has no split {which!r} to read ({reason}); set train=, test= (--config.data.test)"
            ) from error
    first = tables["train"]
    pictures = _column(first, image, _IMAGE_NAMES, "Image", "image", name)
    if pictures is None:
        raise DataError(
            f"hugging_face: got {name} with the columns {', '.join(first.column_names)}; expected the name of that of the "
            "pictures: say image= (--config.data.image)"
        )
    labels = _column(first, label, _LABEL_NAMES, "ClassLabel", "label", name)
    for part, table in tables.items():
        if missing := [c for c in (pictures, labels) if c is not None and c not in table.column_names]:
            raise DataError(
                f"hugging_face: got the split {part} of {name} without a column {missing[0]!r}; expected it"
            )
    classes = tuple(getattr((first.features or {}).get(labels), "names", None) or ()) if labels else ()
    columns = {part: _Columns(table, pictures, labels) for part, table in tables.items()}
    title = name.rsplit("/", 1)[-1]
    if len(first) and not hasattr(columns["train"][0][0], "convert"):
        return _from_arrays(
            columns,
            levels=levels,
            continuous=continuous,
            name=title,
            classes=classes,
            test_size=test_size,
            validation=validation,
            seed=seed,
        )
    if size is None:
        raise DataError(
            f"hugging_face: got {name} without size; expected a number of pixels, or height and width: say size="
        )
    decoder = PictureDecoder(
        size=size,
        channels=channels,
        filter=filter,
        crop=crop,
        max_pixels=max_pixels,
        levels=256 if levels is None else levels,
    )
    return from_pictures(
        columns, decoder, name=title, classes=classes, test_size=test_size, validation=validation, seed=seed
    )


def _from_arrays(
    splits: Mapping[str, Sequence[tuple[Any, int | None]]], *, name: str, validation: int, **options: Any
) -> Dataset:
    """A data set of sequences of (array, label or None), by `from_tensor` and its rules of what are grey values."""
    given: dict[str, Any] = {}
    for part, samples in splits.items():
        rows = [samples[i] for i in range(len(samples))]
        try:
            given[part] = np.stack([np.asarray(x) for x, _ in rows])
        except ValueError as error:
            raise DataError(f"{name}: got arrays of {part} that are not of one shape; expected equal ones") from error
        labels = [label for _, label in rows]
        given[f"{part}_labels"] = (
            None if None in labels else labels if are_names(labels) else np.asarray(labels, np.int64)
        )
    own: dict[str, Any] = {"validation": validation}
    if "validation" in given:
        own = {part: given[part] for part in ("validation", "validation_labels")}
    return from_tensor(
        given["train"],
        given["train_labels"],
        test=given.get("test"),
        test_labels=given.get("test_labels"),
        name=name,
        **own,
        **options,
    )


def torchvision_dataset(
    root: str | os.PathLike[str] | None = None,
    *,
    dataset: str,
    size: int | tuple[int, int],
    channels: int = 3,
    filter: str = "lanczos",
    crop: str = "centre",
    max_pixels: int = 10**8,
    levels: int = 256,
    download: bool = False,
    validation: int = 0,
    seed: int = 0,
) -> Dataset:
    """A classification data set of torchvision (needs torchvision): one of those with `train=` or `split=`.

    Args:
        root: folder of its files.
        dataset: the class's name, such as "CIFAR100" or "SVHN".
        size, channels, filter, crop, max_pixels, levels: as in `PictureDecoder`.
        download: fetch what is missing.
        validation: number of training samples set aside.
        seed: seed of the validation split.

    Raises:
        DataError: torchvision is missing or does not import, has no such data set, or finds no files.
    """
    folder = as_path(root, "torchvision")
    decoder = PictureDecoder(
        size=size, channels=channels, filter=filter, crop=crop, max_pixels=max_pixels, levels=levels
    )
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
