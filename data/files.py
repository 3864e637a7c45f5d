"""Reading files that may be anything: sizes are checked before memory is spent, and every failure is a
DataError."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError

__all__ = ["as_path", "first_existing", "gunzip", "opening", "read_bytes", "sha256"]

MAX_BYTES = 4 * 2**30
"""No reader of this package puts more than this into memory from one file."""

_CHUNK = 2**20


def as_path(root: str | os.PathLike[str] | None, needed_for: str) -> Path:
    """`root` as a path; DataError where it is missing, since `needed_for` cannot be read from nowhere."""
    if root is None or str(root) == "":
        raise DataError(f"{needed_for} reads files, expected root= (--config.data.root) to say where they are")
    path = Path(root).expanduser()
    if "\0" in str(path):
        raise DataError(f"root is {str(path)!r}, expected a path")
    return path


def first_existing(candidates: list[Path]) -> Path | None:
    """The first of the paths that exists, or None."""
    return next((path for path in candidates if path.exists()), None)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Turns what the operating system says of `path` into a DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist, expected a file; check the root") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, expected a file") from error
    except gzip.BadGzipFile as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """The whole file, if it has at most `limit` bytes."""
    with opening(path):
        size = path.stat().st_size
        if size > limit:
            raise DataError(f"{path} has {size:,} bytes, expected at most {limit:,}")
        return path.read_bytes()


def gunzip(path: Path, limit: int = MAX_BYTES) -> Iterator[bytes]:
    """The decompressed contents in chunks, until the end or one chunk past `limit` bytes."""
    total = 0
    try:
        with opening(path), gzip.open(path, "rb") as stream:
            while total <= limit and (chunk := stream.read(_CHUNK)):
                total += len(chunk)
                yield chunk
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); fetch it again") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with opening(path), path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
