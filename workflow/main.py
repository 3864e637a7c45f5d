"""`score-sde NAME …`: a system by its name, or a tool on a finished run."""

from __future__ import annotations

import signal
from collections.abc import Callable
from importlib import import_module

TOOLS = {
    "sample": "draw samples from a run, by any sampler",
    "nll": "score a split in bits/dim, with an error budget",
    "evaluate": "measure samples, beside held-out data",
    "compare": "compare samplers",
    "tune": "tune a sampler of few evaluations to a run's own model",
    "restore": "restore images from measurements of them",
    "bounds": "state bits/dim in the three ways that papers do",
    "ood": "score other data in bits/dim",
    "leaderboard": "tabulate several runs",
    "systems_table": "train all systems for the same processor time, and tabulate them",
    "export": "write a run's model as a pretrained folder",
}
"""The tools, each a module of `workflow.tools` of that name."""


def entry() -> None:
    """The console script."""
    # Ctrl-C in the seconds that imports take ends the program without a traceback, until `command_line.run` takes over
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from workflow import command_line

    command_line.run(main)


def main(arguments: list[str]) -> int:
    """Runs what the first argument names with the rest of them.

    Raises:
        UserError: an unknown name.
    """
    from numerics import UserError, nearest
    from workflow import experiment, systems

    if not arguments or arguments[0] in ("--help", "-h"):
        print(_help())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name in TOOLS:
        return tool(name)(rest)
    if name not in systems.available():
        known = [*systems.available(), *TOOLS]
        raise UserError(f"got {name!r}{nearest(name, known)}; expected one of {', '.join(known)}")
    return experiment.main(name, rest)


def tool(name: str) -> Callable[[list[str]], int]:
    """The tool of that name."""
    made: Callable[[list[str]], int] = import_module(f"workflow.tools.{name}").main
    return made


def _help() -> str:
    from workflow import systems
    from workflow.command_line import EXIT_CODES

    lines = [
        "score-sde NAME [options]; score-sde NAME --help lists the options",
        "",
        "systems: train, sample and score",
    ]
    lines += [f"  {name:<12} {systems.create(name).about}" for name in systems.available()]
    lines += ["", "tools on a finished run"]
    lines += [f"  {name:<12} {text}" for name, text in TOOLS.items()]
    return "\n".join([*lines, "", EXIT_CODES])


if __name__ == "__main__":
    entry()
