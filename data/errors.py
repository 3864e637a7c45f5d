"""The one error that a reader of data raises."""

from __future__ import annotations


class DataError(ValueError):
    """A file, an array or an option cannot be used as data.

    The message is one line: what was got, what was expected, and what to do. Whatever a file holds, the
    readers of this package raise this error or return data; nothing in a file is executed.
    """
