"""Captions: glyphs by what they are called: `workflow/systems/text.py`.

python experiments/text.py [--workdir=runs/text] [--resume] [--preset=...] [--config.training.steps=...] [--help]
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
    return experiment.main("text", arguments)


if __name__ == "__main__":
    command_line.run(main)
