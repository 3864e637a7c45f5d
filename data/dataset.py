"""What a data set is here: named splits of tensors, and the few facts that a model or a score needs about
them.

An image data set holds grey values: x is uint8 (N, C, H, W), int32 above 256 levels, with values 0..levels - 1, so nothing is
lost and nothing is rescaled before the model asks (`Dataset.transform`). A continuous data set holds floating-point x (N, *);
numbers that look like grey values are refused there, unless they are said to be real ones (`data.grey_values`).

Splits, always by these names:

    train        what may be learned from
    validation   a fixed random part of train, for choosing settings
    fit          train without validation
    test         what is reported on

Every sample has an `id`, unique in the data set and independent of the split it is looked at through, so that
noise and probes can be keyed by it and a score does not depend on batching or order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.duplicates import Duplicates, duplicates
from data.errors import DataError
from data.grey_values import Reading, dtype_of_levels, recognised
from data.label_names import numbered
from data.transforms import Rescale, Standardize, Transform

__all__ = ["Dataset", "Split", "check_count", "from_tensor", "permutation"]

# Up to this many bytes a fingerprint reads everything (about 0.1 s per 100 MB); above, evenly spaced rows.
_FINGERPRINT_BYTES = 256 * 2**20
_ROWS = 4096
# Class numbers become rows of tables, so one that is an identifier would fill the memory.
_MAX_CLASSES = 2**16


def permutation(n: int, seed: int) -> np.ndarray:
    """A permutation (n,) that is the same in every version of every library.

    NumPy freezes the streams of its legacy `RandomState` for ever and says of the newer generators that they
    may change, and a split that moves with a version would leak test samples into training.

    Raises:
        DataError: a seed that is not an integer from 0 to 2^32 - 1.
    """
    check_count("seed", seed, 0, 2**32 - 1)
    return np.random.RandomState(seed).permutation(n)


def check_count(what: str, value: int, least: int, most: int) -> None:
    """DataError unless `value` is an integer in least..most."""
    if most < least:
        raise DataError(f"got {what}={value!r} for too few samples; expected more data")
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise DataError(f"got {what}={value!r}; expected an integer from {least} to {most}")


@dataclass(frozen=True, eq=False)
class Split:
    """Samples of one split.

    Args:
        x: uint8 or int32 (N, C, H, W) grey values, or floating (N, *) continuous data.
        labels: int64 (N,), or None.
        ids: int64 (N,), unique in the data set.
    """

    x: Tensor
    labels: Tensor | None
    ids: Tensor

    def __post_init__(self) -> None:
        n = self.x.shape[0] if self.x.ndim else 0
        if self.x.ndim < 2 or n == 0:
            raise DataError(f"got data of shape {tuple(self.x.shape)}; expected (N, *) with N at least 1")
        for name, value in (("labels", self.labels), ("ids", self.ids)):
            if value is not None and (value.dtype != torch.int64 or value.shape != (n,)):
                raise DataError(
                    f"got {name} of {value.dtype} {tuple(value.shape)}; expected int64 ({n},), one per sample"
                )

    def __len__(self) -> int:
        return self.x.shape[0]

    def take(self, index: Tensor | slice) -> Split:
        """The samples at `index` (M,), or a slice (a view, for data mapped from a file)."""
        return Split(self.x[index], None if self.labels is None else self.labels[index], self.ids[index])


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A named data set.

    Args:
        name: short name, used in results.
        splits: at least "train" and "test"; may have its own "validation".
        levels: number of grey levels of image data, None for continuous data.
        continuous: the numbers are real ones, even where they look like grey values.
        classes: names of the classes that labels index, or ().
        validation: how many samples of "train" the carved "validation" split has (0: none).
        seed: of the choice of these samples.
        shuffled: the training samples are stored in a random order already, so validation is the last of them
            and both parts are views: for files that are mapped, not read.
        notes: what a reader has to say of the files, a line each, such as what it passed over.
        names: what samples are called, by their ids, such as their files; or ().
        log_prob: exact log-density in nats of data units, (B, *) -> (B,), where there is one.

    Raises:
        DataError: types, shapes, values or labels that do not fit together.
    """

    name: str
    splits: Mapping[str, Split]
    levels: int | None = None
    continuous: bool = False
    classes: tuple[str, ...] = ()
    validation: int = 0
    seed: int = 0
    shuffled: bool = False
    notes: tuple[str, ...] = ()
    names: Sequence[str] = field(default=(), repr=False)
    log_prob: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for required in ("train", "test"):
            if required not in self.splits:
                raise DataError(f"{self.name}: got splits {sorted(self.splits)}; expected train and test among them")
        if "fit" in self.splits:
            raise DataError(f"{self.name}: a split is called fit, which means train without validation; rename it")
        object.__setattr__(self, "splits", MappingProxyType(dict(self.splits)))
        train = self.splits["train"]
        if self.levels is not None and self.continuous:
            raise DataError(f"{self.name}: got levels={self.levels} with continuous=True; expected one of them")
        advice = None if self.levels is not None or self.continuous else recognised(train.x)
        if advice is not None:
            raise DataError(f"{self.name}: got {advice}")
        for name, split in self.splits.items():
            if split.x.dtype != train.x.dtype or split.x.shape[1:] != train.x.shape[1:]:
                raise DataError(
                    f"{self.name}: got split {name} of {split.x.dtype} {tuple(split.x.shape)}; expected "
                    f"{train.x.dtype} (N, {', '.join(map(str, train.x.shape[1:]))}) as in train"
                )
            self._check_values(name, split)
        check_count("seed", self.seed, 0, 2**32 - 1)
        check_count("validation", self.validation, 0, len(train) - 1)
        if self.validation and "validation" in self.splits:
            raise DataError(f"{self.name}: got a validation split of its own; expected validation=0")

    def _check_values(self, name: str, split: Split) -> None:
        if self.levels is None:
            if not split.x.is_floating_point():
                raise DataError(
                    f"{self.name}: got split {name} of {split.x.dtype}; expected floating point data; give "
                    "levels= for grey values"
                )
        else:
            transform = Rescale(levels=self.levels)
            if split.x.dtype != transform.dtype or split.x.ndim != 4:
                raise DataError(
                    f"{self.name}: got split {name} of {split.x.dtype} {tuple(split.x.shape)}; expected "
                    f"{str(transform.dtype).removeprefix('torch.')} (N, C, H, W) for {self.levels} grey levels"
                )
            if self.levels != 256:  # bytes cannot be outside 0..255, and reading a mapped file to see it is slow
                transform.check(split.x)
        if split.labels is not None:
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= _MAX_CLASSES:
                raise DataError(
                    f"{self.name}: got split {name} with a label {low if low < 0 else high}; expected class numbers from 0 "
                    f"(below {_MAX_CLASSES:,}); number the classes"
                )
            if self.classes and high >= len(self.classes):
                raise DataError(
                    f"{self.name}: got split {name} with a label {high}; expected one of the {len(self.classes)} classes"
                )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) for images."""
        return tuple(self.splits["train"].x.shape[1:])

    @property
    def dim(self) -> int:
        """Number of dimensions of one sample."""
        return math.prod(self.event_shape)

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without training labels."""
        if self.splits["train"].labels is None:
            return 0
        highest = max(int(split.labels.max()) for split in self.splits.values() if split.labels is not None)
        return len(self.classes) or highest + 1

    @property
    def split_names(self) -> tuple[str, ...]:
        """Names that `split` takes."""
        names = ["train", "test", *(name for name in self.splits if name not in ("train", "test"))]
        if self.validation:
            names.append("validation")
        return (*names, "fit")

    @cached_property
    def _carved(self) -> dict[str, Split]:
        if self.shuffled:
            first = len(self.splits["train"]) - self.validation
            train = self.splits["train"]
            return {"validation": train.take(slice(first, None)), "fit": train.take(slice(first))}
        order = permutation(len(self.splits["train"]), self.seed)
        held_out = torch.from_numpy(np.sort(order[: self.validation]))
        kept = torch.from_numpy(np.sort(order[self.validation :]))
        train = self.splits["train"]
        return {"validation": train.take(held_out), "fit": train.take(kept)}

    def split(self, name: str) -> Split:
        """The samples of a split.

        Raises:
            DataError: there is no split of that name.
        """
        if name in self.splits:
            return self.splits[name]
        if name == "fit" and not self.validation:
            return self.splits["train"]
        if name in ("fit", "validation") and self.validation:
            return self._carved[name]
        raise DataError(f"got {self.name} without a split {name!r}; expected one of {', '.join(self.split_names)}")

    def duplicates(self, of: str = "test", among: str = "train") -> Duplicates:
        """The samples of one split that are also in another, number for number; reads both, about a second a gigabyte.

        >>> import torch, data
        >>> x = torch.randn(10, 2)
        >>> found = data.from_tensor(x, test=torch.cat([x[3:4], x[:1] + 1])).duplicates()
        >>> len(found), found.ids.tolist(), found.first_ids.tolist()
        (1, [10], [3])

        Raises:
            DataError: there is no split of that name.
        """
        a, b = self.split(of), self.split(among)
        return duplicates((of, a.x, a.ids), (among, b.x, b.ids), self.names)

    def without_duplicates(self) -> Dataset:
        """The same without the training samples that are also in the test split.

        Raises:
            DataError: nothing would be left to train on.
        """
        found = self.duplicates()
        if not len(found):
            return self
        train = self.splits["train"]
        kept = torch.ones(len(train), dtype=torch.bool)
        kept[found.others] = False
        if not bool(kept.any()):
            raise DataError(
                f"{self.name}: got training samples that are all in test; expected others; give another test split"
            )
        left = train.take(kept.nonzero().squeeze(1))
        note = f"{len(found.others):,} training samples are left out, since they are in test"
        return replace(
            self,
            splits={**self.splits, "train": left},
            validation=min(self.validation, len(left) - 1),
            notes=(*self.notes, note),
        )

    def transform(self, low: float = -1.0, high: float = 1.0, *, scaling: str = "auto") -> Transform:
        """The affine map to model units: `Rescale` of grey levels to [low, high]; continuous data are standardised by the
        training split.

        Args:
            low, high: model values of the lowest and highest grey level.
            scaling: of continuous data. "joint": one mean and one standard deviation, so no direction is favoured; "columns":
                each column of (N, D), or channel, by its own; "auto": by columns where their standard deviations differ more
                than tenfold, or their means by more than ten of the smallest, and else jointly.

        Raises:
            DataError: another scaling, or a column that is constant.
        """
        if scaling not in ("auto", "joint", "columns"):
            raise DataError(f"{self.name}: got scaling={scaling!r}; expected auto, joint or columns")
        if self.levels is not None:
            return Rescale(levels=self.levels, low=low, high=high)
        if scaling == "columns" or (scaling == "auto" and self._unlike):
            means, stds = self._column_moments
            constant = [i for i, std in enumerate(stds) if not std > 0]
            if constant:
                raise DataError(
                    f"{self.name}: got training data that are constant in column {constant[0]}; expected columns that vary; "
                    "leave it out, or use scaling='joint'"
                )
            return Standardize(shift=means, scale=stds)
        mean, std = self._moments
        return Standardize(shift=mean, scale=std)

    @property
    def _unlike(self) -> bool:
        """Whether one mean and one standard deviation would misfit the columns."""
        means, stds = self._column_moments
        if len(stds) < 2 or not min(stds) > 0:
            return False
        return max(stds) > 10 * min(stds) or max(means) - min(means) > 10 * min(stds)

    @cached_property
    def _column_moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each column (dimension 1) of the training data; exactly 0 of a constant one."""
        x = self.splits["train"].x
        n = x.numel() // x.shape[1]

        def columns() -> Iterator[Tensor]:
            for rows in x.split(_ROWS):
                yield rows.transpose(0, 1).flatten(1).double()

        low = torch.stack([c.amin(dim=1) for c in columns()]).amin(dim=0)
        high = torch.stack([c.amax(dim=1) for c in columns()]).amax(dim=0)
        mean = torch.stack([c.sum(dim=1) for c in columns()]).sum(dim=0) / n
        square = torch.stack([(c - mean.unsqueeze(1)).square().sum(dim=1) for c in columns()]).sum(dim=0)
        std = (square / n).sqrt().where(low < high, 0.0)  # rounding leaves a constant column a tiny one
        return tuple(mean.tolist()), tuple(std.tolist())

    @cached_property
    def _moments(self) -> tuple[float, float]:
        x = self.splits["train"].x
        mean = x.mean(dtype=torch.float64)
        # Chunks, so that a file larger than memory is not turned into float64 at once.
        square = sum((chunk.double() - mean).square().sum() for chunk in x.split(_ROWS))
        std = math.sqrt(float(square) / x.numel())
        if not math.isfinite(std) or std == 0:
            raise DataError(
                f"{self.name}: the training data have mean {float(mean):g} and standard deviation {std:g}, "
                "expected finite data that are not constant"
            )
        return float(mean), std

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of what the splits hold; of splits above 256 MB, of 4,096 evenly spaced
        samples."""
        digest = hashlib.sha256()
        for name in sorted(self.splits):
            split = self.splits[name]
            stored = (("x", split.x), ("labels", split.labels))
            for part, value in stored:
                if value is None:
                    continue
                digest.update(f"{name}/{part} {value.dtype} {tuple(value.shape)}\n".encode())
                if value.numel() * value.element_size() > _FINGERPRINT_BYTES:
                    value = value[:: max(1, len(value) // _ROWS)]
                digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        digest.update(f"levels {self.levels} validation {self.validation} seed {self.seed}".encode())
        return digest.hexdigest()


def _as_tensor(x: Tensor | np.ndarray, what: str) -> Tensor:
    if isinstance(x, Tensor):
        if x.layout != torch.strided or x.is_quantized or x.is_nested or x.is_meta:
            raise DataError(f"got {what} that are not a dense tensor of numbers; expected one; call to_dense()")
        return x.detach()
    try:
        array = np.asarray(x)
    except ValueError as error:
        raise DataError(f"got {what} that are not an array ({error}); expected rows of equal length") from error
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"got {what} of dtype {array.dtype}; expected numbers (uint8 for grey values, float for the rest)"
        )
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(np.ascontiguousarray(native))
    except TypeError as error:
        raise DataError(
            f"got {what} of dtype {array.dtype}, which torch does not hold; expected uint8 or float32"
        ) from error


_LEVELS_OF = {torch.uint8: 256, torch.uint16: 2**16}
"""Of images whose levels are not stated, by their type."""


def _levels_of(x: Tensor) -> int | None:
    return _LEVELS_OF.get(x.dtype) if x.ndim in (3, 4) else None


def _as_data(x: Tensor, levels: int | None, name: str, reading: Reading | None = None) -> Tensor:
    """x as it is stored: grey values (N, C, H, W), where there are levels, or floating."""
    tensor = x.unsqueeze(1) if x.ndim == 3 and levels is not None else x
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise DataError(
            f"{name}: got data of shape {tuple(tensor.shape)}; expected (N, D), (N, C, L) or (N, C, H, W), "
            "none of them empty"
        )
    if levels is not None:
        if tensor.ndim != 4:
            raise DataError(
                f"{name}: got data of shape {tuple(tensor.shape)}; expected images (N, C, H, W); reshape them"
            )
        if tensor.shape[1] > 4 and tensor.shape[3] in (1, 3, 4):
            first = "x[..., :3]" if tensor.shape[3] == 4 else "x"
            raise DataError(
                f"{name}: got images of shape {tuple(tensor.shape)}, which reads as (N, H, W, C); expected (N, C, H, W) "
                f"with C 1 or 3; give np.moveaxis({first}, 3, 1)"
                + (" (or x, with transparency)" if first != "x" else "")
            )
        if reading is not None and tensor.is_floating_point():
            return reading(tensor, name)
        Rescale(levels=levels).check(tensor)
        return tensor.to(dtype_of_levels(levels))
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"{name}: got data of {tensor.dtype}; expected real numbers")
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    for chunk in tensor.split(_ROWS):
        if not bool(torch.isfinite(chunk).all()):
            raise DataError(
                f"{name}: got data with NaN or infinity; expected finite numbers; drop or repair those samples"
            )
    return tensor


def _as_labels(labels: Any, n: int, name: str) -> Tensor | None:
    if labels is None:
        return None
    tensor = _as_tensor(labels, f"{name}: labels")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.shape != (n,):
        raise DataError(
            f"{name}: got labels of {tensor.dtype} {tuple(tensor.shape)}; expected {n} integers, one per sample"
        )
    return tensor.to(torch.int64)


def from_tensor(
    x: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[str] | None = None,
    *,
    test: Tensor | np.ndarray | None = None,
    test_labels: Tensor | np.ndarray | Sequence[str] | None = None,
    levels: int | None = None,
    continuous: bool = False,
    test_size: int | None = None,
    validation: int | Tensor | np.ndarray | None = None,
    validation_labels: Tensor | np.ndarray | Sequence[str] | None = None,
    classes: tuple[str, ...] = (),
    name: str = "data",
    seed: int = 0,
    log_prob: Callable[[Tensor], Tensor] | None = None,
) -> Dataset:
    """A data set of a tensor or an array, in one line.

    uint8 and uint16 data (N, C, H, W) or (N, H, W) are images, of 256 and 65,536 levels unless `levels` says otherwise. Other
    numbers are images where `levels` is given: integers k, floats k, or floats in [0, 1] or [-1, 1], which become the
    integers k exactly. All else is continuous, but for numbers that look like grey values: these need one of `levels` and
    `continuous`.

    Args:
        x: (N, D), (N, C, L) or (N, C, H, W): all data, or the training data where `test` is given.
        labels: (N,) integers from 0, or names: an array or a list of text.
        test: test data (M, *); without it, `test_size` samples of x are drawn for it with the fixed `seed`.
        test_labels: (M,) as labels.
        levels: number of grey levels.
        continuous: the numbers are real ones, even where they look like grey values.
        test_size: number of samples that become the test split (a tenth, at least 1), where `test` is None.
        validation: number of training samples that become the validation split (a tenth; 0 for none); or validation data of
            their own (K, *).
        validation_labels: (K,) as labels.
        classes: names of the classes; for labels that are names, those of the training data in alphabetical order.
        name: of the data set.
        seed: seed of the splits.
        log_prob: exact log-density, (B, *) -> (B,) nats, where known.

    Raises:
        DataError: shape, type, range, or sizes that leave nothing to train on.
    """
    given = _as_tensor(x, f"{name}: data")
    if levels is None and not continuous:
        levels = _levels_of(given)
    reading = None
    if levels is not None and given.is_floating_point() and given.numel():
        Rescale(levels=levels)  # refuses what is no number of levels
        reading = Reading.of(given, levels, name)  # one for all splits: another may hold darker images only
    data = _as_data(given, levels, name, reading)
    parts = {"train": labels, "test": test_labels, "validation": validation_labels}
    numbers, classes = numbered(parts, classes, name)
    labels, test_labels, validation_labels = numbers.values()
    targets = _as_labels(labels, len(data), name)
    ids = torch.arange(len(data))
    if test is None:
        if test_labels is not None:
            raise DataError(f"{name}: got test_labels without test; expected both or neither")
        count = max(1, len(data) // 10) if test_size is None else test_size
        check_count("test_size", count, 1, len(data) - 1)
        order = permutation(len(data), seed)
        everything = Split(data, targets, ids)
        splits = {
            "train": everything.take(torch.from_numpy(np.sort(order[count:]))),
            "test": everything.take(torch.from_numpy(np.sort(order[:count]))),
        }
    else:
        if test_size is not None:
            raise DataError(f"{name}: got both test data and test_size={test_size}; expected one of them")
        held_out = _as_data(_as_tensor(test, f"{name}: test data"), levels, name, reading)
        held_out_labels = _as_labels(test_labels, len(held_out), name)
        if targets is not None and held_out_labels is not None and not classes:
            known, highest = int(targets.max()) + 1, int(held_out_labels.max())
            if highest >= known:
                raise DataError(
                    f"{name}: got test data with a label {highest}; expected one of the {known} classes of the training data; "
                    "name all of them with classes="
                )
        splits = {
            "train": Split(data, targets, ids),
            "test": Split(held_out, held_out_labels, torch.arange(len(held_out)) + len(data)),
        }
    if validation is None:
        validation = len(splits["train"]) // 10
    if isinstance(validation, (Tensor, np.ndarray, list)):
        own = _as_data(_as_tensor(validation, f"{name}: validation data"), levels, name, reading)
        first = sum(len(split) for split in splits.values())
        splits["validation"] = Split(
            own, _as_labels(validation_labels, len(own), name), torch.arange(first, first + len(own))
        )
        validation = 0
    elif validation_labels is not None:
        raise DataError(f"{name}: got validation_labels without validation data; expected both or neither")
    return Dataset(
        name=name,
        splits=splits,
        levels=levels,
        continuous=continuous,
        classes=classes,
        validation=validation,
        seed=seed,
        log_prob=log_prob,
    )
