"""Data sets in a folder of .npy files that are mapped into memory: for what does not fit it, or is slow to decode.

    <folder>/manifest.json            name, levels, classes, sizes and sums; written last, so a folder with it is whole
    <folder>/train.x.npy              rows in a fixed random order, so that any slice is a fair sample of the split
    <folder>/train.labels.npy         int64, where there are labels
    <folder>/train.ids.npy            int64: which sample of the source a row was

A folder is written under another name and renamed when it is whole; a second process that writes the same one at the same
time loses the race without harm. What a killed process has left is removed by the next one that writes there.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from data.dataset import Dataset, Split, permutation
from data.errors import DataError
from data.files import as_path, opening, read_bytes, sha256
from data.grey_values import Reading
from data.numpy_files import read_npy
from data.transforms import Rescale

__all__ = ["Rows", "exists", "mapped", "save", "write"]

FORMAT = 2
"""Of the files below; folders of another are not read."""
_MANIFEST = "manifest.json"
# Files up to this size are summed whenever they are mapped (about 0.2 s), larger ones where that is asked for.
_SUMMED_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One split to be written.

    Args:
        count: number of samples.
        row: the i-th sample as an array; called once for each i, in the order in which rows are stored.
        labels: int64 (count,), or None.
        ids: int64 (count,).
    """

    count: int
    row: Callable[[int], np.ndarray]
    labels: np.ndarray | None
    ids: np.ndarray


def _write_header(stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)


def _write_split(folder: Path, name: str, rows: Rows, order: np.ndarray) -> dict[str, Any]:
    files: dict[str, Any] = {}
    # Through a file object: a full disk is then an error here, where writing to a map would kill the process.
    with (folder / f"{name}.x.npy").open("wb") as stream:
        first = rows.row(int(order[0]))
        _write_header(stream, (rows.count, *first.shape), first.dtype)
        for position, index in enumerate(order):
            row = first if position == 0 else rows.row(int(index))
            if row.shape != first.shape or row.dtype != first.dtype:
                raise DataError(
                    f"{name}: sample {index} is {row.dtype} {row.shape}; expected {first.dtype} {first.shape}"
                )
            stream.write(np.ascontiguousarray(row).data)
    for part, values in (("labels", rows.labels), ("ids", rows.ids)):
        if values is not None:
            np.save(folder / f"{name}.{part}.npy", np.ascontiguousarray(values[order], dtype=np.int64))
    for part in ("x", "labels", "ids"):
        path = folder / f"{name}.{part}.npy"
        if path.exists():
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files


def exists(folder: Path) -> bool:
    """Whether `folder` holds a whole data set of this format's files.

    Raises:
        DataError: there is something else.
    """
    if not folder.exists():
        return False
    if not (folder / _MANIFEST).exists() and any(folder.iterdir()):
        raise DataError(f"got {folder}, which holds no {_MANIFEST}; expected a whole data set or nothing; delete it")
    return (folder / _MANIFEST).exists()


def _scratch(target: Path) -> Path:
    """A new folder beside `target`, named after this process; those of dead processes of this machine are removed."""
    stem = f".{target.name}.{socket.gethostname()}."
    for left in target.parent.glob(f"{glob.escape(stem)}*"):
        pid = left.name.removeprefix(stem).partition(".")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{stem}{os.getpid()}.", dir=target.parent))


def _alive(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)  # asks, and does nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def write(
    folder: str | os.PathLike[str],
    splits: Mapping[str, Rows],
    *,
    name: str,
    levels: int | None,
    continuous: bool = False,
    classes: tuple[str, ...] = (),
    validation: int = 0,
    seed: int = 0,
) -> None:
    """Write splits, row by row, to a new folder.

    Args:
        folder: does not exist yet, or is empty (where it appears meanwhile, it is kept and this copy dropped).
        splits: by name, at least train and test.
        name, levels, continuous, classes, validation, seed: of the `Dataset`; the seed also fixes the order of the rows.

    Raises:
        DataError: the folder exists, or cannot be written.
    """
    target = as_path(folder, "write")
    if exists(target):
        raise DataError(f"got {target}, which exists already; expected a new folder; delete it or choose another")
    scratch: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch(target)
        files: dict[str, Any] = {}
        for split, rows in splits.items():
            files |= _write_split(scratch, split, rows, permutation(rows.count, seed))
        manifest = {
            "format": FORMAT,
            "name": name,
            "levels": levels,
            "continuous": continuous,
            "classes": list(classes),
            "validation": validation,
            "seed": seed,
            "splits": list(splits),
            "files": files,
        }
        (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        scratch.rename(target)
    except OSError as error:
        if not (target / _MANIFEST).exists():
            raise DataError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        if scratch is not None and scratch.exists():
            shutil.rmtree(scratch)


def save(dataset: Dataset, folder: str | os.PathLike[str]) -> Dataset:
    """Write a data set to a new folder and return it mapped from there. `ids` keep saying which sample a row was; the
    validation split is drawn anew."""
    splits = {}
    for name, split in dataset.splits.items():
        splits[name] = Rows(
            count=len(split),
            row=lambda i, x=split.x: x[i].cpu().numpy(),  # type: ignore[misc]
            labels=None if split.labels is None else split.labels.cpu().numpy(),
            ids=split.ids.cpu().numpy(),
        )
    write(
        folder,
        splits,
        name=dataset.name,
        levels=dataset.levels,
        continuous=dataset.continuous,
        classes=dataset.classes,
        validation=dataset.validation,
        seed=dataset.seed,
    )
    return mapped(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(read_bytes(path, 2**24))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); delete {folder} and write it again") from error
    types = {"format": int, "name": str, "classes": list, "validation": int, "seed": int, "splits": list, "files": dict}
    if not isinstance(manifest, dict):
        raise DataError(
            f"got {path}, which holds a {type(manifest).__name__}; expected an object; delete {folder} and write it again"
        )
    wrong = [key for key, kind in types.items() if type(manifest.get(key)) is not kind]
    levels = manifest.get("levels", "")  # none is said as null
    if levels is not None and type(levels) is not int:
        wrong.append("levels")
    if type(manifest.setdefault("continuous", False)) is not bool:  # folders of earlier versions do not say
        wrong.append("continuous")
    if not all(isinstance(entry, str) for key in ("classes", "splits") if key not in wrong for entry in manifest[key]):
        wrong.append("names")
    if wrong or manifest["format"] != FORMAT:
        raise DataError(
            f"{path} lacks or mistypes {', '.join(wrong) or 'its format'}; delete {folder} and write it again"
        )
    return manifest


def mapped(
    root: str | os.PathLike[str] | None = None,
    *,
    levels: int | None = None,
    continuous: bool = False,
    verify: bool = False,
) -> Dataset:
    """The data set of a folder that `save` or `write` made. Samples are read from the file when they are used.

    Args:
        root: the folder.
        levels: number of grey levels of data stored as floats; they are then read into memory as integers.
        continuous: numbers stored as floats are real ones, even where they look like grey values.
        verify: check the SHA-256 of files above 256 MB too.

    Raises:
        DataError: no such folder, or its files are not those of its manifest.
    """
    folder = as_path(root, "mapped")
    manifest = _manifest(folder)
    splits: dict[str, Split] = {}
    for name in manifest["splits"]:
        parts: dict[str, torch.Tensor] = {}
        for part in ("x", "labels", "ids"):
            file = f"{name}.{part}.npy"
            if file not in manifest["files"] or Path(file).name != file or "\0" in file:
                continue
            path = folder / file
            with opening(path):
                size = path.stat().st_size
            stated = manifest["files"][file]
            if not isinstance(stated, dict) or size != stated.get("bytes"):
                raise DataError(
                    f"got {path} with {size:,} bytes, which differs from its manifest; delete {folder} and write it again"
                )
            if (verify or size <= _SUMMED_BYTES) and sha256(path) != stated.get("sha256"):
                raise DataError(
                    f"got {path}, whose SHA-256 differs from its manifest's; delete {folder} and write it again"
                )
            array = read_npy(path)
            if part != "x" and array.dtype != np.int64:
                raise DataError(
                    f"got {path}, which holds {array.dtype}; expected int64; delete {folder} and write it again"
                )
            if array.size == 0 or array.dtype.newbyteorder("=") != array.dtype:
                raise DataError(
                    f"got {path}, which holds {array.dtype} {array.shape}; expected samples in native byte order"
                )
            try:
                parts[part] = torch.from_numpy(array)
            except TypeError as error:
                raise DataError(f"got {path}, which holds {array.dtype}; expected uint8, float32 or float64") from error
        if "x" not in parts or "ids" not in parts:
            raise DataError(f"got {folder} without {name}.x.npy or {name}.ids.npy; delete it and write it again")
        splits[name] = Split(parts["x"], parts.get("labels"), parts["ids"])
    if levels is not None and levels != manifest["levels"]:
        splits = _as_grey_values(splits, levels, manifest["name"])
    return Dataset(
        name=manifest["name"],
        splits=splits,
        levels=manifest["levels"] if levels is None else levels,
        continuous=continuous or manifest["continuous"],
        classes=tuple(manifest["classes"]),
        validation=manifest["validation"],
        seed=manifest["seed"],
        shuffled=True,
    )


def _as_grey_values(splits: Mapping[str, Split], levels: int, name: str) -> dict[str, Split]:
    """Splits of floats as the grey values that they are."""
    train = splits.get("train")
    if train is None or not train.x.is_floating_point():
        raise DataError(
            f"{name}: got levels={levels} for data stored with levels of their own; expected none; leave it out"
        )
    Rescale(levels=levels)  # refuses what is no number of levels
    reading = Reading.of(train.x, levels, name)
    return {part: Split(reading(split.x, name), split.labels, split.ids) for part, split in splits.items()}
