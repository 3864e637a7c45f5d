"""Progress bars of everything that takes more than a few seconds, and the way to silence them."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

_silent = False


def silence(quiet: bool = True) -> None:
    """Shows no bars from now on (`--quiet`), or shows them again."""
    global _silent
    _silent = quiet


def is_silent() -> bool:
    """Whether bars are silenced."""
    return _silent


def bar(*, total: int, name: str, unit: str, initial: int = 0, shown: bool = True) -> Any:
    """A bar of `total` units, as a context."""
    return tqdm(total=total, initial=initial, desc=name, unit=unit, disable=_silent or not shown)
