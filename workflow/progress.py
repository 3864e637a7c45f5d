"""Progress bars and words on the way, of everything that takes more than a few seconds, and the way to silence both."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

_silent = False


def silence(quiet: bool = True) -> None:
    """Shows no bars and says nothing on the way from now on (`--quiet`), or again. Results are printed all the same."""
    global _silent
    _silent = quiet


def is_silent() -> bool:
    """Whether bars and words are silenced."""
    return _silent


def say(text: str) -> None:
    """Prints what is no result: what is about to be done, what was passed over. Nothing under `--quiet`."""
    if not _silent:
        print(text, flush=True)


def bar(*, total: int, name: str, unit: str, initial: int = 0, shown: bool = True) -> Any:
    """A bar of `total` units, as a context."""
    return tqdm(total=total, initial=initial, desc=name, unit=unit, disable=_silent or not shown)
