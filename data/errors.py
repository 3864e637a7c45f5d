"""The one error that a reader of data raises."""

from __future__ import annotations

from numerics.errors import UserError

_LONGEST = 1000


class DataError(UserError):
    """A file, an array or an option cannot be used as data.

    The message is one line: what was got, what was expected, and what to do. Whatever a file holds, the
    readers of this package raise this error or return data; nothing in a file is executed.
    """

    exit_code = 3

    def __init__(self, message: str) -> None:
        # The names of files and what they hold may have line breaks and escape sequences, or be very long.
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(line if len(line) <= _LONGEST else f"{line[:300]} ... {line[300 - _LONGEST :]}")
