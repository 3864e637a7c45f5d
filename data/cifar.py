"""CIFAR-10 from the tarballs that its authors publish (Krizhevsky 2009), or from the folders that they unpack to.

The binary version is preferred: a batch is 3,073-byte records, a label and 3x32x32 bytes. The Python version is pickled. A
pickle is a program, so it is not run as one: its opcodes are screened, and its names build inert records instead of the
classes that they name (`_Inert`), from which the bytes are taken.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from data.dataset import Dataset, Split
from data.errors import DataError
from data.files import Pieces, as_path, first_existing, gunzip, read_bytes, sha256

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
_MAX_MEMBERS = 64


def _size(field: bytes | bytearray, where: str) -> int:
    """A number of a tar header, in octal digits."""
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]+", digits):
        raise DataError(f"{where} is not a whole tar file (a member's size is {bytes(field)!r}); fetch it again")
    return int(digits, 8)


def _from_tarball(path: Path, names: tuple[str, ...]) -> dict[str, bytearray]:
    """The members whose file names are `names`, as bytes; nothing is unpacked to disk.

    The headers are read here (POSIX.1-1988, ustar; Python's tarfile reads a member's extended header into memory, however
    long it is): 512 bytes with the name at 0, the size at 124, a sum of all bytes at 148, the type at 156.
    """
    found: dict[str, bytearray] = {}
    pieces = Pieces(gunzip(path, _MAX_UNPACKED))
    for count in range(_MAX_MEMBERS + 1):
        header = pieces.read(512)
        if not any(header):  # an empty block, or nothing, ends the file
            break
        if count == _MAX_MEMBERS:
            raise DataError(f"{path} has more than {_MAX_MEMBERS} members, expected those of CIFAR-10")
        if len(header) < 512 or _size(header[148:156], str(path)) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise DataError(f"{path} is not a whole tar file (a header's sum is wrong); fetch it again")
        name = header[:100].partition(b"\0")[0].decode("latin1").rsplit("/", 1)[-1]
        size = _size(header[124:136], str(path))
        if name not in names:
            pieces.skip(size + -size % 512)
            continue
        if header[156] not in b"0\0" or not 0 < size <= _MAX_BATCH:
            raise DataError(f"{path}: {name} is not a plain file of 1..{_MAX_BATCH:,} bytes; fetch it again")
        found[name] = pieces.read(size)
        if len(found[name]) < size:
            raise DataError(f"{path}: {name} ends early; fetch it again")
        pieces.skip(-size % 512)
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}, expected the six batches of CIFAR-10")
    return found


def _from_folder(path: Path, names: tuple[str, ...]) -> dict[str, bytearray]:
    return {name: bytearray(read_bytes(path / name, _MAX_BATCH)) for name in names}


def _parse_binary(raw: bytearray, where: str) -> tuple[np.ndarray, np.ndarray]:
    record = 1 + _PIXELS
    if not raw or len(raw) % record:
        raise DataError(f"{where} has {len(raw):,} bytes, expected a multiple of {record}: a label and 3x32x32 pixels")
    rows = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].astype(np.int64)


class _Inert:
    """Stands for an object of a pickle and records what it was made of; it does nothing."""

    name: ClassVar[str] = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reconstruct(_Inert):
    name = "_reconstruct"


class _Array(_Inert):
    name = "ndarray"


class _Dtype(_Inert):
    name = "dtype"


class _Encode(_Inert):
    """_codecs.encode(text, "latin1"): how Python 3 writes bytes at protocol 2."""

    name = "encode"


_NAMES: dict[tuple[str, str], type[_Inert]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encode,
}

# What dictionaries of lists, numbers, strings and arrays are written with. No persistent ids, extension codes,
# out-of-band buffers, or protocol-0 text forms.
_OPCODES = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "SHORT_BINSTRING",
        "BINSTRING",
        "SHORT_BINBYTES",
        "BINBYTES",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "MEMOIZE",
    ]
)
_MALFORMED = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
)


class _Restricted(pickle._Unpickler):  # in Python, where a key can be looked at before it is hashed
    """Builds inert records, and dictionaries whose keys are text: the hash of nested tuples may take 2^depth steps, or the
    stack."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> type[_Inert]:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _NAMES[module, name]

    @staticmethod
    def _check(keys: list[Any]) -> None:
        for key in keys:
            if not isinstance(key, (bytes, str, _Encode)):
                raise pickle.UnpicklingError(f"a key of a dictionary is a {type(key).__name__}")

    def load_setitem(self) -> None:
        self._check(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        self._check(self.stack[::2])  # what lies above the mark
        super().load_setitems()  # type: ignore[misc]

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _unpickle(raw: bytearray, where: str) -> Any:
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if count == 0 and (opcode.name != "PROTO" or argument not in (2, 3, 4)):
                raise DataError(f"{where} is not of a protocol from 2 to 4; write it with pickle.dump(..., protocol=2)")
            if opcode.name not in _OPCODES:
                raise DataError(f"{where}: the pickle uses {opcode.name}, expected plain data and arrays of protocol 2")
        return _Restricted(io.BytesIO(raw), encoding="bytes").load()
    except DataError:
        raise
    except _MALFORMED as error:
        raise DataError(f"{where} is not a plain CIFAR-10 pickle ({error}); fetch it again") from error


def _text(value: Any) -> bytes | None:
    """A byte string, however it was written."""
    if isinstance(value, _Encode) and len(value.arguments) == 2 and isinstance(value.arguments[0], str):
        try:
            return value.arguments[0].encode("latin1")
        except UnicodeEncodeError:
            return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    return value if isinstance(value, bytes) else None


def _is_bytes_dtype(value: Any) -> bool:
    return isinstance(value, _Dtype) and bool(value.arguments) and _text(value.arguments[0]) == b"u1"


def _array_bytes(value: Any, where: str) -> tuple[tuple[int, ...], bytes]:
    """Shape and contents of a pickled uint8 array in C order."""
    state = value.state if isinstance(value, _Reconstruct) else None
    if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[1], tuple) and not state[3]):
        raise DataError(f"{where}: data are not an array in C order, expected uint8 (N, 3072)")
    shape, content = state[1], _text(state[4])
    if not _is_bytes_dtype(state[2]) or content is None or not all(type(n) is int for n in shape):
        raise DataError(f"{where}: data are not uint8, expected uint8 (N, 3072)")
    return shape, content


def _parse_pickled(raw: bytearray, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(raw, where)
    if not isinstance(batch, dict):
        raise DataError(f"{where} holds a {type(batch).__name__}, expected a dictionary with data and labels")
    named = {_text(key): value for key, value in batch.items()}
    shape, content = _array_bytes(named.get(b"data"), where)
    labels = named.get(b"labels")
    if len(shape) != 2 or shape[1] != _PIXELS or shape[0] < 1 or len(content) != shape[0] * _PIXELS:
        raise DataError(f"{where}: data have shape {shape} and {len(content):,} bytes, expected (N, {_PIXELS})")
    if not isinstance(labels, list) or len(labels) != shape[0] or not all(type(k) is int for k in labels):
        raise DataError(f"{where}: labels are not {shape[0]} integers, one per image")
    if not all(0 <= label < 10 for label in labels):
        raise DataError(f"{where}: labels run from {min(labels)} to {max(labels)}, expected 0..9")
    return np.frombuffer(content, np.uint8).reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _check_sum(path: Path) -> None:
    actual = sha256(path)
    if actual != SHA256[path.name]:
        raise DataError(
            f"{path} has SHA-256 {actual[:12]}..., expected {SHA256[path.name][:12]}...: it is damaged or not "
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
        validation: how many training images are set aside.
        seed: of that choice.

    Raises:
        DataError: files that are missing or wrong.
    """
    folder = as_path(root, "cifar10")
    sources = [folder / _BINARY, folder / "cifar-10-batches-bin", folder / _PICKLED, folder / "cifar-10-batches-py"]
    source = first_existing(sources)
    if source is None:
        raise DataError(
            f"{folder} has no {_BINARY} and no {_PICKLED}, expected one of them (or the folder it unpacks to)"
        )
    binary = source in sources[:2]
    suffix = ".bin" if binary else ""
    names = (*(f"data_batch_{i}{suffix}" for i in range(1, 6)), f"test_batch{suffix}")
    if source.is_dir():
        raw = _from_folder(source, names)
    else:
        if verify:
            _check_sum(source)
        raw = _from_tarball(source, names)
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
