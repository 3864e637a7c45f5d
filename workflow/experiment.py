"""What every system does: train, sample, score, and leave a run folder (`workflow.run_folder`)."""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from numerics import UserError
from training import process_group
from training.checkpoint import to_plain
from training.configuration import flatten
from training.signals import stopped_at_once
from workflow import dry_run, progress, report, systems
from workflow.baselines import bits_per_dim_of_baselines
from workflow.command_line import Request, parse_system
from workflow.device import use_threads
from workflow.fit import fit
from workflow.run_folder import CONFIG, RunFolder, read_json
from workflow.setup import Setup, resolve
from workflow.system import System
from workflow.trained_run import load_run


def main(system: System | str, arguments: list[str]) -> int:
    """Runs a system from its command line; returns the exit code."""
    system = systems.create(system) if isinstance(system, str) else system
    asked = parse_system(system, arguments)
    progress.silence(asked.quiet)
    setup = resolve(asked.config)
    use_threads(setup.config["threads"])
    require_names(asked.allow_change, setup, asked.workdir)
    if asked.dry_run:
        dry_run.rehearse(setup, RunFolder(asked.workdir), keep=asked.given, init_from=asked.init_from)
    else:
        run(setup, RunFolder(asked.workdir), asked)
    return 0


def require_names(names: Sequence[str], setup: Setup, workdir: Path | None) -> None:
    """Refuses a value of --allow_change that neither this configuration has nor the run folder's; a section's name is one.

    Raises:
        UserError: with the nearest name.
    """
    stored = RunFolder(workdir).path / CONFIG if workdir is not None else None
    before = read_json(stored) if stored is not None and stored.exists() else {}
    known = {name for config in (setup.config, before) for name in flatten(to_plain(config))}
    for name in names:
        short = name.removeprefix("config.")
        if not any(each == short or each.startswith(f"{short}.") for each in known):
            near = difflib.get_close_matches(short, sorted(known), n=1)
            meant = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"got --allow_change={name}; expected a value of the configuration, see --help{meant}")


def run(setup: Setup, folder: RunFolder, asked: Request) -> None:
    """Trains, samples and scores.

    Under `torchrun` all processes train together, and the first one continues alone.
    """
    started = time.perf_counter()
    with process_group() as group:
        fit(setup, folder, group, resume=asked.resume, allow_change=asked.allow_change, init_from=asked.init_from)
        is_main = group.is_main
    if is_main:
        with _after_training(folder):
            look(setup, folder, started)


def look(setup: Setup, folder: RunFolder, started: float) -> None:
    """Samples and scores what was trained, and reports it; `started` is when the session began."""
    before = folder.results().get("weights")
    trained = load_run(folder.path, setup=setup)  # the averaged weights, as any tool will read them
    folder.update_results({"weights": trained.fingerprint})
    setup.system.draw(trained)
    setup.system.score(trained)
    if setup.baselines and setup.dataset.levels is not None:
        folder.update_results({"baselines": bits_per_dim_of_baselines(setup.dataset, setup.options.seed)})
    report.write(folder, setup, keep=before == trained.fingerprint)
    report.show(folder, setup)
    setup.system.finish(trained, folder)
    folder.update_results({"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time()})
    report.end(folder)


def _after_training(folder: RunFolder) -> AbstractContextManager[None]:
    return stopped_at_once(f"the training is saved in {folder}; the same command with --resume continues")
