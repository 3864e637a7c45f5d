"""What a run leaves behind: results.json, changed atomically and never by deleting what another tool wrote."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def read_results(folder: Path) -> dict[str, Any]:
    """What the run folder's results.json holds; nothing where there is none."""
    file = folder / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def update_results(folder: Path, new: dict[str, Any]) -> dict[str, Any]:
    """Merges `new` into the run folder's results.json and returns the whole."""
    results = read_results(folder)
    results.update(_finite(new))
    write_json(folder / "results.json", results)
    return results


def write_json(file: Path, value: Any) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, file)


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is unknown becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
