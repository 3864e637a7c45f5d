"""The bits/dim of a split of any finished run, with its error budget.

    python experiments/nll.py --run runs/vp --split test
    torchrun --nproc-per-node 2 -- experiments/nll.py --run runs/vp     the same numbers, shared out

Interrupted, the same command goes on where it stopped. Per-image values lie in RUN/nll/SPLIT-.../part_*.npz, the numbers and
the protocol in RUN/results.json. (The `--` keeps torchrun from taking `--run` for one of its own options.)
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy
import torch

from experiments import build, command_line, report
from experiments.results import update_results
from experiments.scoring import Protocol, score_split
from likelihood import BitsPerDim


def entry(found: BitsPerDim, parts: Path, folder: Path) -> dict[str, Any]:
    """What results.json says of a score: the numbers, the protocol they depend on, and what computed them."""
    grid = parts / "grid.json"
    return {
        **found.asdict(),
        "text": str(found),
        "parts": str(parts.relative_to(folder)),
        "protocol": json.loads((parts / "index.json").read_text()),
        "grid_sha256": hashlib.sha256(grid.read_bytes()).hexdigest() if grid.exists() else None,
        "versions": {
            "toolkit": report.version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
    }


def main(arguments: list[str]) -> int:
    parser = command_line.Parser(description="Bits/dim of a finished run.")
    default = Protocol()
    parser.add_argument("--run", required=True, type=Path, help="the run folder")
    parser.add_argument("--split", default=default.split, help="of the run's data set")
    parser.add_argument("--solver", default=default.solver, help="fast, accurate, scipy or torchdiffeq")
    parser.add_argument("--steps", default=default.steps, type=int, help="of the fast solver")
    parser.add_argument("--tolerance", default=default.tolerance, type=float, help="of the other solvers")
    parser.add_argument("--probes", default=default.probes, type=int, help="trace estimates a draw; 0: exact trace")
    parser.add_argument(
        "--spacing",
        default=default.spacing,
        type=int,
        help="of coloured probes on pixel lattices; 0: independent probes",
    )
    parser.add_argument("--dequantizer", default=default.dequantizer, help="uniform or truncated_normal")
    parser.add_argument("--draws", default=default.draws, type=int, help="of the dequantisation noise")
    parser.add_argument("--batch_size", default=default.batch_size, type=int, help="images a chunk")
    parser.add_argument("--limit", default=default.limit, type=int, help="score only so many images; 0: all")
    parser.add_argument("--seed", default=default.seed, type=int, help="of noise and probes")
    parser.add_argument("--t_min", default=None, type=float, help="time of the density; None: as the dequantizer wants")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    options = vars(parser.parse_args(arguments))
    folder, device = options.pop("run"), build.device(options.pop("device"))
    protocol = Protocol(**options)
    run = build.load_run(folder, device)
    found, parts = score_split(
        run.sde,
        run.model,
        run.dataset,
        run.transform,
        protocol,
        folder / "nll",
        fingerprint=run.fingerprint,
        flow=run.flow,
        device=device,
    )
    if found is None:
        print(f"parts written to {parts}; other processes have still to write theirs")
        return 0
    update_results(folder, {f"nll/{parts.name}": entry(found, parts, folder)})
    print(found)
    return 0


if __name__ == "__main__":
    command_line.run(main)
