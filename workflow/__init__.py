"""What every run needs: a configuration resolved once, the stages, the run folder, the systems, the tools and the command line.

setup = resolve(configuration.plain(systems.create("vp").get_config()))   # data, model, objective, samplers: made and checked
run = load_run("runs/vp")                                                 # a finished run: run.sde, run.score, run.dataset
score_split(run, Protocol(split="test"))                                    # a stage: a result, kept in the run folder

Importing this package imports none of its modules: a command line answers Ctrl-C while torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workflow.draw import Drawn
    from workflow.protocol import Protocol
    from workflow.run_folder import RunFolder
    from workflow.score import Scored, score_split
    from workflow.setup import Setup, resolve
    from workflow.system import System
    from workflow.trained_run import TrainedRun, load_run

_HOMES = {
    "Drawn": "draw",
    "Protocol": "protocol",
    "RunFolder": "run_folder",
    "Scored": "score",
    "Setup": "setup",
    "System": "system",
    "TrainedRun": "trained_run",
    "load_run": "trained_run",
    "resolve": "setup",
    "score_split": "score",
}

__all__ = [
    "Drawn",
    "Protocol",
    "RunFolder",
    "Scored",
    "Setup",
    "System",
    "TrainedRun",
    "load_run",
    "resolve",
    "score_split",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"workflow.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'workflow' has no attribute {name!r}")
