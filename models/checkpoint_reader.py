"""Reading other people's checkpoints without running them.

A pickle is a program. `torch.load(weights_only=True)` runs only the instructions that build tensors and plain
containers; on top of it, this reader allows NumPy scalars (optimizers of old checkpoints hold them, under the
names that NumPy 1 and 2 gave them), rebuilt by our own function from the bytes of a number; refuses
compressed archives, which can unfold to a thousand times their size; and refuses tensors larger than the
bytes that they stand on. Everything else that a file names is refused by name.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from numerics import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not fit.

    Attributes:
        missing, unexpected, misshapen: names of the tensors that do not fit, those of the wrong shape with both shapes.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        misshapen: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected, self.misshapen = missing, unexpected, misshapen


def _number(dtype: np.dtype[Any], data: bytes) -> float | int:
    """A NumPy scalar, as a plain number."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in "fiub" or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a NumPy scalar that is not a number")
    return np.frombuffer(data, dtype=dtype, count=1)[0].item()


_ALLOWED: list[Any] = [
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
]


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote to `path` (its zip and its older format), on the CPU, nothing in it executed.

    Raises:
        CheckpointError: where there is no such file, it is cut short, or it holds anything but tensors,
            numbers, strings and containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"got {path}, which does not exist; expected a checkpoint written by torch.save")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(
                        f"{path}: {entry.filename} is compressed, which torch.save never does; refused"
                    )
    try:
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about protocols: what cannot be read is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, {_reason(error)}") from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        KeyError,
        ValueError,
        AttributeError,
        IndexError,
        TypeError,
    ) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable checkpoint (cut short, or no torch.save file): {first}"
        ) from error
    for tensor in _tensors(content):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: a tensor of shape {tuple(tensor.shape)} is larger than its own data; refused"
            )
    return content


def _reason(error: pickle.UnpicklingError) -> str:
    """The one line of torch's long message that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if found := re.search(r"GLOBAL (\S+)", line):
            return f"it asks for {found[1]}, which is code and not data (expected tensors, numbers, containers)"
    found_line = next((line for line in lines if "Unsupported" in line), lines[0])
    return f"it does what torch.save's data never do: {found_line}"


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _tensors(value)
