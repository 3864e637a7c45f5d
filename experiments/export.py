"""A finished run as a pretrained folder: its averaged weights as safetensors, and a card that says the rest.

    python experiments/export.py --run runs/vp --to pretrained/vp_digits

`models.ScoreModel.from_pretrained(folder)` then samples and scores; `--run FOLDER` of the tools (sample.py, nll.py, ...)
takes it like a run, and `--init_from=FOLDER` of the experiments begins with its weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import build, command_line

_KEPT = ("bits_per_dim", "training", "sampling", "environment")


def _untimed(value: Any) -> Any:
    """Results without their seconds, which are those of a machine and not of a model."""
    return {k: _untimed(v) for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value


def main(arguments: list[str]) -> int:
    parser = command_line.Parser(description="Writes a run's model as a pretrained folder.")
    parser.add_argument("--run", required=True, type=Path, help="the run folder")
    parser.add_argument("--to", required=True, type=Path, help="the folder to write; its model is replaced")
    args = parser.parse_args(arguments)
    run = build.load_run(args.run)
    results = args.run / "results.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    kept = {k: _untimed(found[k]) for k in _KEPT if k in found}
    card = {"config": run.config.to_dict(), "step": run.step, **kept}
    run.model.save_pretrained(args.to, card=card)
    size = sum(f.stat().st_size for f in args.to.iterdir() if f.is_file())
    print(f"{args.to}: step {run.step:,}, {size / 1e6:.2f} MB; ScoreModel.from_pretrained({str(args.to)!r}) reads it")
    return 0


if __name__ == "__main__":
    command_line.run(main)
