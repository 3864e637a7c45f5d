"""A table over runs, best bits/dim first.

python experiments/leaderboard.py runs/*
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import command_line


def main(arguments: list[str]) -> int:
    parser = command_line.Parser(description="A table over finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; those without results are passed over")
    args = parser.parse_args(arguments)
    rows = []
    for folder in args.runs:
        file = folder / "results.json"
        if not file.is_file():
            continue
        try:
            results = json.loads(file.read_text())
            config = json.loads((folder / "config.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"got {folder}, whose results cannot be read ({error}); expected a run folder") from error
        bits, training = results.get("bits_per_dim", {}), results.get("training", {})
        measures = results.get("evaluation", {}).get("measures", {})
        distance = next((f"{m['score']['value']:.3g}" for name, m in measures.items() if name.startswith("FD[")), "-")
        rows.append(
            (
                bits.get("mean", float("inf")),
                [
                    folder.name,
                    config["data"]["name"],
                    f"{bits['mean']:.3f} ± {bits['stderr']:.3f}" if bits else "-",
                    distance,
                    f"{training.get('steps', 0):,}",
                    f"{training.get('seconds', 0):.0f}",
                    f"{training.get('parameters', 0):,}",
                ],
            )
        )
    if not rows:
        raise ValueError(f"got {len(args.runs)} folders, none with a results.json; expected run folders")
    head = ["run", "data", "bits/dim", "FD", "steps", "seconds", "parameters"]
    table = [head, *(row for _, row in sorted(rows, key=lambda r: r[0]))]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for i, line in enumerate(table):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return 0


if __name__ == "__main__":
    command_line.run(main)
