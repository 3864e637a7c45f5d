"""A classifier that is an energy, beside the plain classifier: `workflow/systems/jem.py`.

python experiments/jem.py [--workdir=runs/jem] [--resume] [--preset=...] [--config.training.steps=...] [--help]
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import experiments  # noqa: F401 (answers Ctrl-C while the rest is imported)
from workflow import command_line, experiment


def main(arguments: list[str]) -> int:
    """Trains, samples and scores."""
    return experiment.main("jem", arguments)


if __name__ == "__main__":
    command_line.run(main)
