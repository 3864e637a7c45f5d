"""The first stage: training."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image

from models import ScoreModel
from training import (
    Callback,
    Estimate,
    Group,
    TrainingResult,
    TrainState,
    UsageError,
    Validation,
    estimate,
    initialize_from,
    train,
)
from workflow import configuration, progress
from workflow.pictures import draw_samples, save_samples
from workflow.run_folder import CONFIG, RunFolder
from workflow.setup import Setup
from workflow.versions import versions

HARMLESS = (
    "threads",
    "device",
    *(f"training.{n}" for n in ("log_every", "checkpoint_every", "eval_every", "keep", "validation")),
)
"""Values that may differ when a run is resumed: they change no number."""


def fit(
    setup: Setup,
    folder: RunFolder,
    group: Group,
    *,
    resume: bool = False,
    allow_change: tuple[str, ...] = (),
    init_from: Path | None = None,
    quiet: bool = False,
) -> TrainingResult:
    """This process's share of the training; what can be refused is refused before the first file is written.

    Args:
        resume: continue from the newest checkpoint, or start where there is none.
        allow_change: names of values that may differ from the run's.
        init_from: weights to start from: a run folder, a checkpoint file, or a pretrained folder.
        quiet: say nothing of what the training will take.

    Raises:
        UsageError: a folder that holds a run, without `resume`; weights of another kind.
    """
    options = replace(setup.options, progress=bool(setup.options.progress) and not progress.is_silent())
    origin = _begin(setup, folder, init_from, resume, group)
    problem: Exception | None = None
    if group.is_main and not resume and folder.has_work:
        problem = UsageError(
            f"got the run folder {folder}, which holds a run; expected a new one: add --resume to continue it, "
            "or give another --workdir"
        )
    group.broadcast_error(problem)
    parameters = sum(p.numel() for p in setup.model.parameters())
    notes = list(setup.data_notes) if group.is_main else []
    started: dict[str, Any] = {"seed": options.seed, "data": {"name": setup.dataset.name, "notes": notes}}
    if origin is not None:
        started["init_from"] = origin
    callbacks = list(setup.system.callbacks(setup, folder))
    if setup.samplers:
        callbacks.append(_Pictures(setup, folder))
    if setup.validation and isinstance(setup.model, ScoreModel):
        validation = Validation(
            setup.held_out,
            setup.transform,
            objective=setup.objective,
            n=setup.validation,
            seed=options.seed,
            dequantize=options.dequantize,
        )
        callbacks.insert(0, validation)
        started["validation"] = {"images": len(validation.split), "seen": setup.seen}
    callbacks.append(_Began(folder, setup, started))
    if group.is_main and not quiet and not progress.is_silent():
        cost = estimate(
            setup.model,
            setup.training_data,
            setup.transform,
            options,
            objective=setup.objective,
            processes=group.world,
        )
        processes = f", {group.world} processes" if group.world > 1 else ""
        progress.say(
            f"{setup.name}: {shorten(_headline(setup), 150)}\n"
            f"{setup.dataset.name}, {len(setup.training_data):,} training samples of shape {setup.dataset.event_shape}; "
            f"{parameters:,} parameters; {options.steps:,} steps of {options.batch_size} on {setup.device}{processes}\n"
            f"{_cost(cost, folder)}" + "".join(f"\n{setup.dataset.name}: {note}" for note in notes)
        )
    trained = train(
        setup.model,
        setup.training_data,
        setup.transform,
        options,
        objective=setup.objective,
        folder=folder.path,
        config=setup.config,
        resume=resume,
        allow_change=(*HARMLESS, *(name.removeprefix("config.") for name in allow_change)),
        data_fingerprint=setup.dataset.fingerprint,
        callbacks=callbacks,
    )
    if group.is_main:
        folder.update_results(
            {
                "training": {
                    "steps": trained.steps,
                    "seconds": trained.seconds,
                    "cpu_seconds": trained.cpu_seconds,
                    "loss": trained.losses[-1][1],
                    "parameters": parameters,
                    "batch_size": options.batch_size,
                },
                "environment": {**versions(), "device": str(setup.device), "threads": torch.get_num_threads()},
            }
        )
    return trained


def _begin(setup: Setup, folder: RunFolder, source: Path | None, resume: bool, group: Group) -> dict[str, Any] | None:
    """Gives the model the weights to start from, if any; returns where they came from."""
    if source is None:
        return None
    if resume and folder.has_checkpoint:
        if group.is_main:
            progress.say(f"--init_from={source} is ignored: {folder} has a checkpoint to resume from")
        return None
    origin = initialize_from(setup.model, source)
    if origin.config:
        theirs, own = configuration.restored(origin.config, origin.path)["model"], setup.config["model"]
        for part in ("parametrization", "conditioning"):  # of systems without a score neither
            if part in theirs and part in own and theirs[part]["name"] != own[part]["name"]:
                raise UsageError(
                    f"got --init_from={source}, whose network has model.{part}={theirs[part]['name']!r}; expected "
                    f"{own[part]['name']!r} as here: add --config.model.{part}={theirs[part]['name']}"
                )
    return {"path": str(origin.path), "step": origin.step}


def _headline(setup: Setup) -> str:
    """What is trained: a model's own words, or its SDE."""
    model = setup.model
    return str(getattr(model, "headline", None) or getattr(model, "sde", ""))


def _cost(cost: Estimate, folder: RunFolder) -> str:
    """What the run will take of memory and disk."""
    free = folder.free_bytes
    warning = (
        ""
        if free > cost.disk
        else "\nwarning: the disk may become full; a full one stops the run, with its last checkpoint intact"
    )
    return (
        f"memory about {cost.memory / 2**30:.2f} GiB; checkpoints of {cost.checkpoint / 2**20:.1f} MiB, at most "
        f"{cost.disk / 2**20:.1f} MiB of the {free / 2**30:.1f} GiB free; the bar shows the time left{warning}"
    )


class _Began(Callback):
    """Writes config.json, and in results.json how a session began, once the run has accepted both."""

    def __init__(self, folder: RunFolder, setup: Setup, values: dict[str, Any]) -> None:
        self.folder, self.setup, self.values = folder, setup, values

    def on_start(self, state: TrainState) -> None:
        commands = self.folder.results().get("commands", [])
        program = Path(sys.argv[0])
        # an installed script is called by its name, a file by python
        command = shlex.join(["python", *sys.argv] if program.suffix == ".py" else [program.name, *sys.argv[1:]])
        self.folder.write_json(CONFIG, self.setup.config)
        self.folder.update_results({**self.values, "commands": [*(c for c in commands if c != command), command]})


class _Pictures(Callback):
    """A few samples of the averaged weights at every evaluation, as a file and in TensorBoard."""

    def __init__(self, setup: Setup, folder: RunFolder) -> None:
        self.setup, self.folder = setup, folder

    def on_eval(self, state: TrainState) -> None:
        setup = self.setup
        with state.averaged() as model:
            few = min(setup.n, 16 if setup.dataset.levels is not None else 500)
            *_, sampler = setup.samplers.values()
            x, _ = draw_samples(setup, model, sampler, few, shown=False)
        file = self.folder.path / "samples" / f"step_{state.step:08d}.png"
        save_samples(file, x, setup)
        with Image.open(file) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
        state.image("samples", pixels.permute(2, 0, 1) / 255)
