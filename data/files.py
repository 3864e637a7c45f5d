"""Reading files that may be anything: sizes are checked before memory is spent, every failure is a DataError."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError

__all__ = ["Pieces", "as_path", "first_existing", "gunzip", "is_hidden", "opening", "plain", "read_bytes", "sha256"]

MAX_BYTES = 4 * 2**30
"""No reader of this package puts more than this into memory from one file."""

_CHUNK = 2**20
_PIECE = 2**16
# bgzip begins a member every 64 kB; a file of nothing but beginnings would take for ever.
_MAX_MEMBERS = 2**16


def as_path(root: str | os.PathLike[str] | None, needed_for: str) -> Path:
    """`root` as a path; DataError where it is missing, since `needed_for` cannot be read from nowhere."""
    if root is None or str(root) == "":
        raise DataError(
            f"got no root for {needed_for}, which reads files; expected root= (--config.data.root) to say where they are"
        )
    if not isinstance(root, (str, os.PathLike)):
        raise DataError(f"got root={root!r}; expected the path of a file or folder")
    try:
        path = Path(root).expanduser()
        if b"\0" in os.fsencode(path):
            raise ValueError("it holds a zero byte")
    except (ValueError, TypeError, RuntimeError) as error:  # RuntimeError: ~ of somebody who is not here
        raise DataError(f"got root={str(root)!r}; expected a path ({error})") from error
    return path


_LEFT_BY_SYSTEMS = ("__macosx", "thumbs.db", "desktop.ini", "@eadir")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name was made by an operating system or a program for itself: one that begins with a
    dot (.DS_Store, ._x.png, .ipynb_checkpoints), __MACOSX, Thumbs.db, desktop.ini, @eaDir.

    >>> is_hidden("._cat.png"), is_hidden("cat.png")
    (True, False)
    """
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def first_existing(candidates: list[Path]) -> Path | None:
    """The first of the paths that exists, or None."""
    for path in candidates:
        with opening(path):
            if path.exists():
                return path
    return None


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Turns what the operating system says of `path` into a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"got {path}, which does not exist; expected a file; check the root") from error
    except IsADirectoryError as error:
        raise DataError(f"got {path}, which is a folder; expected a file") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The whole file, if it has at most `limit` bytes."""
    with opening(path):
        size = path.stat().st_size
        if size > limit:
            raise DataError(f"got {path} with {size:,} bytes; expected at most {limit:,}")
        return path.read_bytes()


def plain(path: Path) -> Iterator[bytes]:
    """The contents in chunks."""
    with opening(path), path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def gunzip(path: Path, limit: int = MAX_BYTES) -> Iterator[bytes]:
    """The decompressed contents in chunks; no chunk is large, whatever the file expands to.

    Raises:
        DataError: not a whole gzip file, or one of more than `limit` bytes, after that many.
    """
    total, members, waiting, full = 0, 1, b"", False
    # As gzip.open, but that looks through zeros behind the last member one by one.
    member = zlib.decompressobj(31)
    with opening(path), path.open("rb") as stream:
        try:
            while (waiting := waiting if waiting or full else stream.read(_PIECE)) or full:
                if member.eof:
                    full, waiting = False, waiting.lstrip(b"\0")
                    if not waiting:
                        continue
                    member, members = zlib.decompressobj(31), members + 1
                    if members > _MAX_MEMBERS:
                        raise DataError(
                            f"got {path} with more than {_MAX_MEMBERS:,} members; expected one; fetch it again"
                        )
                chunk = member.decompress(waiting, _CHUNK)
                # A chunk of full length may have more behind it, whether or not there is input left.
                full, waiting = len(chunk) == _CHUNK, member.unused_data if member.eof else member.unconsumed_tail
                total += len(chunk)
                if total > limit:
                    raise DataError(
                        f"got {path}, which unpacks to more than {limit:,} bytes; expected at most that many"
                    )
                if chunk:
                    yield chunk
        except zlib.error as error:
            raise DataError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    if not member.eof:
        raise DataError(f"{path} is not a whole gzip file (it ends early); fetch it again")


class Pieces:
    """Exact numbers of bytes from chunks of any length."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._buffer = chunks, bytearray()

    def read(self, count: int) -> bytearray:
        """The next `count` bytes, fewer where the chunks end. Holds them and one chunk in memory."""
        while len(self._buffer) < count and (chunk := next(self._chunks, None)) is not None:
            self._buffer += chunk
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

    def skip(self, count: int) -> None:
        """Leave out `count` bytes, or what there is of them."""
        while count > 0 and (passed := len(self.read(min(count, _CHUNK)))):
            count -= passed


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with opening(path), path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
