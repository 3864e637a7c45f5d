"""Mistakes of a user and bugs are different things.

What a user can get wrong raises `UserError`: one line that says what was got, what was expected and what to do. A command
line prints that line and leaves with `exit_code`. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A value, an option, a file or a folder that does not fit.

    Attributes:
        exit_code: what a command line leaves with; 2 unless a subclass says otherwise.
    """

    exit_code: int = 2
