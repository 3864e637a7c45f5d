"""Checks of what a user passes; each raises a `UserError` that says got, expected, and what to do."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from numerics.errors import UserError


def require_count(value: Any, name: str, least: int = 1) -> None:
    """Refuses what is not an integer >= `least`.

    Raises:
        UserError: with the value, by `name`.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise UserError(f"got {name}={value!r}; expected an integer >= {least}")


def require_choice(value: Any, name: str, choices: Sequence[Any]) -> None:
    """Refuses what is not one of `choices`.

    Raises:
        UserError: with the value, by `name`.
    """
    if value not in choices:
        raise UserError(f"got {name}={value!r}; expected one of {', '.join(map(repr, choices))}")


def require_range(value: Any, name: str, low: float, high: float = math.inf) -> None:
    """Refuses what is not a finite number in [low, high]; True and False are none.

    Raises:
        UserError: with the value, by `name`.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= float(value) <= high:
        above = "" if low == -math.inf else f" >= {low}"
        expected = f"a finite number{above}" if high == math.inf else f"a number in [{low}, {high}]"
        raise UserError(f"got {name}={value!r}; expected {expected}")


def require_positive(value: Any, name: str) -> None:
    """Refuses what is not a finite number > 0.

    Raises:
        UserError: with the value, by `name`.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise UserError(f"got {name}={value!r}; expected a finite number > 0")


def require_box(value: Any, name: str) -> None:
    """Refuses what is not (low, high), finite numbers with low < high.

    Raises:
        UserError: with the value, by `name`.
    """
    numbers_ = isinstance(value, Sequence) and all(isinstance(v, numbers.Real) and math.isfinite(v) for v in value)
    if not numbers_ or len(value) != 2 or not value[0] < value[1]:
        raise UserError(f"got {name}={value!r}; expected (low, high), finite, low < high")


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'b'?" for the known name nearest to `name`, and nothing where none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
