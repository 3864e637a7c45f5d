"""What every experiment does: train, sample, score, and leave a run folder.

config.json                     the configuration
checkpoints/step_XXXXXXXX.pt    with manifests, readable with torch.load(weights_only=True)
samples/*.png                   pictures
events.*, metrics.jsonl         what happened
nll/test-.../                   per-image values
results.json                    bits_per_dim, training, sampling, baselines, commands
report.md, curves.png           the same to read
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import build, command_line, dry_run, presets, report, stages
from experiments.baselines import bits_per_dim_of_baselines
from experiments.results import read_results, update_results
from training import process_group
from training.signals import stopped_at_once

Then = Callable[[ConfigDict], Callable[[Path], None]]
"""Checks a configuration; what it returns is done with the run folder in the end."""


def main(get_config: Callable[[], ConfigDict], arguments: list[str], description: str, then: Then | None = None) -> int:
    """Runs the experiment of a script, from its defaults; see the module's text."""
    preset, arguments = command_line.preset(arguments)
    config = presets.apply(get_config(), preset)
    asked = command_line.parse_experiment(config, arguments, description)
    finish = None if then is None else then(asked.config)
    if asked.dry_run:
        dry_run.rehearse(asked.config, asked.workdir, keep=asked.given, init_from=asked.init_from, then=then)
        return 0
    results = run(
        asked.config,
        asked.workdir,
        resume=asked.resume,
        allow_change=asked.allow_change,
        init_from=asked.init_from,
    )
    if finish is not None and results:
        with _after_training(asked.workdir):
            finish(asked.workdir)
            report.tidy(asked.workdir)
    return 0


def run(
    config: ConfigDict,
    folder: Path,
    *,
    resume: bool = False,
    allow_change: tuple[str, ...] = (),
    init_from: Path | None = None,
) -> dict[str, Any]:
    """Trains, samples and scores; returns what results.json holds.

    Under `torchrun` all processes train together, and the first one goes on alone; the others return nothing.
    """
    started = time.perf_counter()
    stages.set_threads(config)
    with process_group() as group:
        stages.fit(config, folder, group, resume=resume, allow_change=allow_change, init_from=init_from)
        is_main = group.is_main
    if not is_main:
        return {}
    with _after_training(folder):
        return _look(config, folder, started)


def _after_training(folder: Path) -> AbstractContextManager[None]:
    return stopped_at_once(f"the training is saved in {folder}; the same command with --resume goes on")


def _look(config: ConfigDict, folder: Path, started: float) -> dict[str, Any]:
    """Samples and scores what was trained, and reports it; returns what results.json holds."""
    before = read_results(folder)
    averaged = build.load_run(folder, build.device(config.device))  # the averaged weights, as any tool will read them
    stages.draw(averaged, config)
    results = stages.score(averaged, config)
    if config.baselines and averaged.dataset.levels is not None:
        results = update_results(folder, {"baselines": bits_per_dim_of_baselines(averaged.dataset, config.seed)})
    results = update_results(folder, {"seconds": time.perf_counter() - started})
    same = before.get("bits_per_dim", {}).get("protocol", {}).get("model") == averaged.fingerprint
    report.write(folder, config, results, keep=same)
    report.show(folder, config, results)
    return results
