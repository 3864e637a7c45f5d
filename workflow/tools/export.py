"""A finished run as a pretrained folder: its averaged weights as safetensors, and a card that says the rest.

    score-sde export --run runs/vp --to pretrained/vp_digits

`models.ScoreModel.from_pretrained(folder)` then samples and scores; `--run FOLDER` of the tools (sample, nll, ...) takes it
like a run, and `--init_from=FOLDER` of the systems begins with its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workflow.tools import arguments as shared
from workflow.trained_run import load_run

_KEPT = ("bits_per_dim", "training", "sampling", "environment")


def main(arguments: list[str]) -> int:
    """Writes the folder, and says how large it is."""
    parser = shared.parser("Write a run's model as a pretrained folder.")
    parser.add_argument("--to", required=True, type=Path, help="the folder to write; its model is replaced")
    args = shared.parsed(parser, arguments)
    run = load_run(args.run, args.device)
    results = run.folder.results()
    kept = {k: _untimed(results[k]) for k in _KEPT if k in results}
    run.model.save_pretrained(args.to, card={"config": run.setup.config, "step": run.step, **kept})
    size = sum(f.stat().st_size for f in args.to.iterdir() if f.is_file())
    print(f"{args.to}: step {run.step:,}, {size / 1e6:.2f} MB; ScoreModel.from_pretrained({str(args.to)!r}) reads it")
    return 0


def _untimed(value: Any) -> Any:
    """Results without their seconds, which are those of a machine and not of a model."""
    if not isinstance(value, dict):
        return value
    return {k: _untimed(v) for k, v in value.items() if k not in ("seconds", "cpu_seconds")}
