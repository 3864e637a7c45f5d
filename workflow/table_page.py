"""The table of all systems, read from the cells' results.json and put between two marks of a page.

Of several seeds a number's mean stands with its standard deviation over them ("sd"); before that the error of a single one:
over the images for bits/dim, over the samples for the distance and the share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from numerics import UserError
from workflow.report import table
from workflow.run_folder import RunFolder
from workflow.table_rows import Row, Terms

HEAD = (
    "system",
    "bits/dim",
    "solver's error",
    "kind",
    "FD",
    "near training data",
    "evaluations",
    "sampling, s",
    "parameters",
    "updates",
    "training, s",
    "seeds",
)
Numbers = Mapping[str, Any]
"""Of one cell: see `numbers`."""


def numbers(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the table takes from a cell's results.json.

    Raises:
        UserError: an entry that is not there.
    """
    try:
        bits, training, sampling = (results[name] for name in ("bits_per_dim", "training", "sampling"))
        (measured,) = results["evaluation"].values()
        ((name, distance),) = measured["measures"].items()
        return {
            "bits_per_dim": {k: bits.get(k) for k in ("mean", "stderr", "solver_error", "kind", "unit", "reason")},
            "distance": {"name": name, **_pair(distance["score"])},
            "floor": _pair(distance["floor"]),
            "near_training": _pair(measured["nearest"]["share"]),
            "evaluations": sampling["nfe"],
            "sampler": sampling["sampler"],
            "not_finite": sampling.get("not_finite", 0),
            "sampling_cpu_seconds": sampling["cpu_seconds"],
            "parameters": training["parameters"],
            "updates": training["steps"],
            "training_cpu_seconds": training["cpu_seconds"],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"got results.json of a cell without what the table takes from it ({type(error).__name__}: {error}); expected what "
            "systems_table.py writes"
        ) from error


def _pair(estimate: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": estimate["value"], "stderr": estimate["stderr"]}


def lines(found: Mapping[Row, Mapping[int, Numbers]], terms: Terms, seeds: Sequence[int]) -> list[str]:
    """The table in Markdown, with what it says of itself.

    Args:
        found: by row and seed; rows without a cell are named below the table.
    """
    present = {row: cells for row, cells in found.items() if cells}
    if not present:
        return ["No cell has been made yet."]
    first = next(iter(next(iter(present.values())).values()))
    floor = _shown(first["floor"]["value"], first["floor"]["stderr"])
    what = (
        f"Digits, {terms.cpu_seconds:g} s of processor time of training on one core for each row and seed; bits/dim of "
        f"{terms.images} test images, with the bias that the flow's solver states of itself; "
        f"{terms.samples} samples by each system's own sampler, their {first['distance']['name']} "
        f"against the training data (held-out digits: {floor}), the share that is nearer to a training image than 95 % of "
        "held-out digits are (5 % where nothing is memorised), and the processor time of all of them. ± is the error of one "
        "seed's number, sd the standard deviation over seeds."
    )
    if terms.parameters is not None:
        what += f" Networks of about {terms.parameters:,} parameters."
    missing = [
        f"{row.system} ({'all' if not cells else ', '.join(str(s) for s in seeds if s not in cells)})"
        for row, cells in found.items()
        if any(s not in cells for s in seeds)
    ]
    notes = [f"- {row.system}: {row.note}." for row in present if row.note]
    reasons = {row.system: next(iter(cells.values()))["bits_per_dim"]["reason"] for row, cells in present.items()}
    notes += [f"- {name}: {reason}." for name, reason in reasons.items() if reason]
    lost = {row.system: sum(cell["not_finite"] for cell in cells.values()) for row, cells in present.items()}
    notes += [
        f"- {name}: {k} samples have values that are not finite; they were measured as 0."
        for name, k in lost.items()
        if k
    ]
    notes += [f"- Seeds that are missing: {'; '.join(missing)}."] if missing else []
    return [what, "", *table(HEAD, [_line(row, tuple(cells.values())) for row, cells in present.items()]), *notes]


def _line(row: Row, cells: Sequence[Numbers]) -> tuple[str, ...]:
    bits = [cell["bits_per_dim"] for cell in cells]
    unit = "" if bits[0]["unit"] == "bits/dim" else f" {bits[0]['unit']}"
    near = [_times(cell["near_training"], 100) for cell in cells]
    return (
        f"[{row.system}]({row.system}.md)" if row.system not in ("vp", "ve", "sub_vp") else row.system,
        _summary([{"value": b["mean"], "stderr": b["stderr"]} for b in bits]) + unit,
        _largest([b["solver_error"] for b in bits]),
        str(bits[0]["kind"]),
        _summary([cell["distance"] for cell in cells]),
        _summary(near) + " %",
        f"{cells[0]['evaluations']:,}",
        _summary([{"value": c["sampling_cpu_seconds"], "stderr": None} for c in cells], digits=0),
        f"{cells[0]['parameters']:,}",
        f"{fmean(c['updates'] for c in cells):,.0f}",
        f"{fmean(c['training_cpu_seconds'] for c in cells):.0f}",
        str(len(cells)),
    )


def _largest(errors: Sequence[float | None]) -> str:
    """Of an error that is a bias, which no mean over seeds makes smaller; a bound by no flow has none."""
    known = [error for error in errors if error is not None]
    return f"{max(known):.2g}" if known else ""


def _times(estimate: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {k: None if estimate[k] is None else factor * estimate[k] for k in ("value", "stderr")}


def _summary(estimates: Sequence[Mapping[str, Any]], digits: int | None = None) -> str:
    """The mean, the error of one, and the standard deviation over seeds; "none" where there is no number."""
    values = [e["value"] for e in estimates if e["value"] is not None]
    if not values:
        return "none"
    errors = [e["stderr"] for e in estimates if e["stderr"] is not None]
    text = _shown(fmean(values), fmean(errors) if errors else None, digits)
    if len(values) > 1 and errors:
        text += f", sd {stdev(values):.2g}"
    return text


def _shown(value: float, error: float | None, digits: int | None = None) -> str:
    """value ± error, to the second digit of the error."""
    if error is None or not error > 0:
        return f"{value:.{2 if digits is None else digits}f}"
    places = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{places}f} ± {error:.{places}f}"


def plain(found: Mapping[Row, Mapping[int, Numbers]], terms: Terms) -> dict[str, Any]:
    """The numbers for JSON: by system and seed."""
    rows = {row.system: {str(seed): cell for seed, cell in cells.items()} for row, cells in found.items()}
    return {**terms.stamp, "parameters": terms.parameters, "systems": rows}


def put(page: Path, name: str, text: Sequence[str]) -> None:
    """Puts lines between the marks `<!-- NAME -->` and `<!-- end of NAME -->` of a page, and leaves the rest as it is.

    Raises:
        UserError: as `require_marks`.
    """
    before, after = require_marks(page, name)
    begin, end = _marks(name)
    RunFolder(page.parent).write_text(page.name, f"{before}{begin}\n\n" + "\n".join(text) + f"\n\n{end}{after}")


def require_marks(page: Path, name: str) -> tuple[str, str]:
    """What stands before the mark `<!-- NAME -->` of a page, and after `<!-- end of NAME -->`.

    Raises:
        UserError: a page that cannot be read, without the marks, or with one of them twice.
    """
    try:
        old = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"got the page {page}, which cannot be read ({error.strerror}); expected a file of Markdown"
        ) from error
    begin, end = _marks(name)
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise UserError(f"got the page {page} without one line {begin} and one line {end} after it; expected both")
    before, rest = old.split(begin)
    _, after = rest.split(end)
    return before, after


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"
