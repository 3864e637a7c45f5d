"""Tables over runs and pretrained folders, best bits/dim first: one for each data set and split, where numbers compare.

    score-sde leaderboard runs/* pretrained/*

A Fréchet distance stands beside that of held-out data (its floor), under the name of its features; `evaluate.py` measures it.
A folder whose files cannot be read as results is left out, with a line that says why.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numerics import UserError
from workflow.command_line import Parser
from workflow.run_folder import read_json
from workflow.tools import arguments as shared

_DISTANCES = ("FD[", "FID[")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table: a run, by one sampler."""

    run: str
    bits: dict[str, Any]
    sampler: str = "-"
    nfe: float | None = None
    distances: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any]

    @property
    def order(self) -> tuple[float, float]:
        """Of the lines: by bits/dim, then by the first distance; what is unknown comes last."""
        values = [_number(self.bits.get("mean"))]
        values.append(next((_number(_mapping(m.get("score")).get("value")) for m in self.distances.values()), None))
        first, second = (math.inf if value is None else value for value in values)
        return first, second


def main(arguments: list[str]) -> int:
    """Prints the tables."""
    parser = Parser(description="Tabulate finished runs, best bits/dim first.")
    parser.add_argument("runs", nargs="+", type=Path, help="run or pretrained folders; others are skipped")
    shared.add_quiet(parser)
    args = shared.parsed(parser, arguments)
    tables: dict[tuple[str, str, str], list[Line]] = {}
    for folder in args.runs:
        try:
            for key, line in lines(folder):
                tables.setdefault(key, []).append(line)
        except (OSError, UserError) as error:
            print(f"leaderboard.py: {' '.join(f'{folder} is left out: {error}'.split())}", file=sys.stderr)
    if not tables:
        raise UserError(f"got {len(args.runs)} folders, none with results; expected run folders")
    for i, ((data, fingerprint, split), found) in enumerate(sorted(tables.items())):
        print("\n" * (i > 0) + f"{data} (fingerprint {fingerprint or 'unknown'}), {split}:\n")
        _print(sorted(found, key=lambda line: line.order))
    return 0


def lines(folder: Path) -> Iterator[tuple[tuple[str, str, str], Line]]:
    """The lines of a folder, each with the data set's name, the first digits of its fingerprint, and the split; none where
    there are no results.

    Raises:
        UserError: what is there are no results.
    """
    results, config = _read(folder)
    if not results:
        return
    name = _mapping(config.get("data")).get("name")
    if not isinstance(name, str):
        raise UserError("its configuration names no data set")
    bits, training = _mapping(results.get("bits_per_dim")), _mapping(results.get("training"))
    protocol = _mapping(bits.get("protocol"))
    place = (name, str(protocol.get("data") or "")[:8], str(bits.get("split") or protocol.get("split") or "test"))
    measured = False
    for entry in _mapping(results.get("evaluation")).values():
        measures = _mapping(_mapping(entry).get("measures"))
        distances = {n: m for n, m in measures.items() if n.startswith(_DISTANCES) and isinstance(m, dict)}
        if not distances:
            continue
        there = (str(entry.get("dataset")), str(entry.get("fingerprint"))[:8], str(entry.get("split")))
        measured = measured or there == place
        yield (
            there,
            Line(
                run=str(folder),
                bits=bits if there == place else {},
                sampler=str(entry.get("sampler", "-")),
                nfe=_number(entry.get("nfe")),
                distances=distances,
                training=training,
            ),
        )
    if not measured:
        yield place, Line(run=str(folder), bits=bits, training=training)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and configuration, of a run folder or of a pretrained one, whose card holds both."""
    card, results, config = (
        read_json(file) if (file := folder / f"{name}.json").is_file() else {} for name in ("card", "results", "config")
    )
    return {**card, **results} if results or "bits_per_dim" in card else {}, config or _mapping(card.get("config"))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _shown(value: Any, error: Any) -> str:
    """value ± error, to the digit that the error reaches."""
    value, error = _number(value), _number(error)
    if value is None:
        return "-"
    if error is None or error <= 0:
        return f"{value:.4g}"
    digits = min(12, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _distance(measure: Any) -> str:
    score, floor = (_mapping(_mapping(measure).get(part)) for part in ("score", "floor"))
    if _number(score.get("value")) is None:
        return "-"
    return f"{_shown(score['value'], score.get('stderr'))} (floor {_shown(floor.get('value'), floor.get('stderr'))})"


def _count(value: Any) -> str:
    number = _number(value)
    return "-" if number is None else f"{number:,.0f}"


def _print(found: list[Line]) -> None:
    names = sorted({name for line in found for name in line.distances})
    head = ["run", "bits/dim", "images", *names, "sampler", "nfe", "steps", "seconds", "parameters"]
    table = [head]
    for line in found:
        table.append(
            [
                line.run,
                _shown(line.bits.get("mean"), line.bits.get("stderr")),
                _count(line.bits.get("images")),
                *(_distance(line.distances.get(name)) for name in names),
                line.sampler,
                _count(line.nfe),
                *(_count(line.training.get(name)) for name in ("steps", "seconds", "parameters")),
            ]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for i, row in enumerate(table):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
