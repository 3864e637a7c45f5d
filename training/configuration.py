"""Is this the run that it was? Comparing configurations on resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.checkpoint import to_plain
from training.errors import UsageError


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one dict of dotted names; lists and tuples count as the same."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = tuple(value) if isinstance(value, list) else value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ, with both; a missing value shows as None."""
    a, b = flatten(to_plain(old)), flatten(to_plain(new))
    return {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)}


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
    """Refuses a configuration that differs from the run's, except where allowed by name (or by a parent's name).

    Raises:
        UsageError: with every difference.
    """
    refused = {
        name: values
        for name, values in differences(old, new).items()
        if not any(name == a or name.startswith(f"{a}.") for a in allow)
    }
    if refused:
        listed = "; ".join(_change(name, *values) for name, values in refused.items())
        raise UsageError(
            f"got a configuration that differs from the run's ({listed}); expected the same: undo the change, or add "
            f"--allow_change={','.join(refused)} where it is meant"
        )


def _change(name: str, was: object, now: object) -> str:
    if now is None:
        return f"no {name}, which was {was!r}"
    return f"{name}={now!r}, which was {'not there' if was is None else repr(was)}"
