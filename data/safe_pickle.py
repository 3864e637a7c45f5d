"""Pickles as data: a pickle is a program, so it is not run as one.

Its opcodes are screened first. Then its names build inert records instead of the classes that they name (`_Inert`), from which
`uint8_array` and `as_bytes` take what was stored. Everything else that a pickle could name is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, ClassVar

from data.errors import DataError

__all__ = ["as_bytes", "uint8_array", "unpickle"]


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


def unpickle(raw: bytes | bytearray, where: str) -> Any:
    """What a pickle of protocol 2 to 4 holds: dictionaries whose keys are text, lists, tuples, numbers, strings; arrays and
    Python 3's byte strings as records, for `uint8_array` and `as_bytes`.

    Args:
        raw: the pickle.
        where: what an error calls it.

    Raises:
        DataError: any other protocol, opcode or name, or a damaged pickle.
    """
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if count == 0 and (opcode.name != "PROTO" or argument not in (2, 3, 4)):
                raise DataError(f"{where} is not of a protocol from 2 to 4; write it with pickle.dump(..., protocol=2)")
            if opcode.name not in _OPCODES:
                raise DataError(
                    f"{where}: got a pickle that uses {opcode.name}; expected plain data and arrays of protocol 2"
                )
        return _Restricted(io.BytesIO(raw), encoding="bytes").load()
    except DataError:
        raise
    except _MALFORMED as error:
        raise DataError(f"{where} is not a plain pickle ({error}); fetch it again") from error


def as_bytes(value: Any) -> bytes | None:
    """The bytes of a byte string, however it was written, or of a text in UTF-8; None for anything else."""
    if isinstance(value, _Encode) and len(value.arguments) == 2 and isinstance(value.arguments[0], str):
        try:
            return value.arguments[0].encode("latin1")
        except UnicodeEncodeError:
            return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace")
    return value if isinstance(value, bytes) else None


def _is_bytes_dtype(value: Any) -> bool:
    return isinstance(value, _Dtype) and bool(value.arguments) and as_bytes(value.arguments[0]) == b"u1"


def uint8_array(value: Any, where: str) -> tuple[tuple[int, ...], bytes]:
    """Shape and contents of a pickled uint8 array in C order.

    Raises:
        DataError: it is none.
    """
    state = value.state if isinstance(value, _Reconstruct) else None
    if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[1], tuple) and not state[3]):
        raise DataError(f"{where}: got data that are not a uint8 array in C order; expected one")
    shape, content = state[1], as_bytes(state[4])
    if not _is_bytes_dtype(state[2]) or content is None or not all(type(n) is int for n in shape):
        raise DataError(f"{where}: got data that are not uint8; expected a uint8 array")
    return shape, content
