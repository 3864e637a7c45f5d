"""Members of a tar file in memory: nothing is unpacked to disk, and sizes are checked before memory is spent.

The headers are read here (POSIX.1-1988, ustar), since Python's tarfile reads a member's extended header into memory, however
long it is: 512 bytes with the name at 0, the size at 124, a sum of all bytes at 148, the type at 156.
"""

from __future__ import annotations

import re
from pathlib import Path

from data.errors import DataError
from data.files import Pieces, gunzip

__all__ = ["read_members"]


def _size(field: bytes | bytearray, where: str) -> int:
    """A number of a tar header, in octal digits."""
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]+", digits):
        raise DataError(f"{where} is not a whole tar file (a member's size is {bytes(field)!r}); fetch it again")
    return int(digits, 8)


def read_members(
    path: Path, names: tuple[str, ...], *, largest: int, unpacked: int, members: int = 64
) -> dict[str, bytearray]:
    """The members of a gzipped tar file whose file names (without folders) are `names`, as bytes.

    Args:
        path: the tar file.
        names: all of them have to be there.
        largest: bytes of one of these members, at most.
        unpacked: bytes of the whole tar file, at most.
        members: how many the tar file has, at most.

    Raises:
        DataError: a file that is no whole tar file, larger than said, or without one of the names.
    """
    found: dict[str, bytearray] = {}
    pieces = Pieces(gunzip(path, unpacked))
    for count in range(members + 1):
        header = pieces.read(512)
        if not any(header):  # an empty block, or nothing, ends the file
            break
        if count == members:
            raise DataError(f"got {path} with more than {members} members; expected at most that many")
        if len(header) < 512 or _size(header[148:156], str(path)) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise DataError(f"{path} is not a whole tar file (a header's sum is wrong); fetch it again")
        name = header[:100].partition(b"\0")[0].decode("latin1").rsplit("/", 1)[-1]
        size = _size(header[124:136], str(path))
        if name not in names:
            pieces.skip(size + -size % 512)
            continue
        if header[156] not in b"0\0" or not 0 < size <= largest:
            raise DataError(f"{path}: {name} is not a plain file of 1..{largest:,} bytes; fetch it again")
        found[name] = pieces.read(size)
        if len(found[name]) < size:
            raise DataError(f"{path}: {name} ends early; fetch it again")
        pieces.skip(-size % 512)
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"got {path} without {', '.join(missing)}; expected {', '.join(names)}")
    return found
