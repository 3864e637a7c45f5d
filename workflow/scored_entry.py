"""What results.json says of a split that was scored, all of it or by a survey."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

from workflow.run_folder import read_json
from workflow.versions import versions

GRID = "grid.json"
"""In the folder of the values: where the solver's steps are, and how many where pilot runs have chosen them."""


class Result(Protocol):
    """Numbers with their errors, as plain values and in words."""

    def asdict(self) -> dict[str, object]: ...


def scored_entry(
    result: Result, *, protocol: dict[str, Any], parts: Path, folder: Path, seconds: float
) -> dict[str, Any]:
    """The entry: `mean`, `stderr` and what else the result has, and how it came about.

    Args:
        protocol: everything that the numbers depend on, plain.
        parts: the folder of the values, in the run's `folder`.
        seconds: of wall clock.
    """
    grid = parts / GRID
    table = read_json(grid) if grid.exists() else {}
    return {
        **result.asdict(),
        "kind": "exact",
        "unit": "bits/dim",
        "reason": "",
        "split": protocol["split"],
        "seconds": seconds,
        "text": str(result),
        "parts": parts.relative_to(folder).as_posix(),
        "protocol": protocol,
        "grid_sha256": hashlib.sha256(grid.read_bytes()).hexdigest() if grid.exists() else None,
        "chosen": {k: table[k] for k in ("steps", "tolerance", "error", "reached", "passes") if k in table} or None,
        "versions": versions(),
    }
