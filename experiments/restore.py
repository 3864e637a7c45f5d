"""Restores images from measurements, with any finished run: `python experiments/restore.py --run runs/vp`.

See `workflow/tools/restore.py`, or --help.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import experiments  # noqa: F401 (answers Ctrl-C while the rest is imported)
from workflow import command_line
from workflow.tools.restore import main

if __name__ == "__main__":
    command_line.run(main)
