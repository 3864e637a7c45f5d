"""The stages of an experiment, each of which leaves what it found in the run folder: fit, draw, score."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image

from data import Dataset, Split
from data.transforms import Transform
from experiments import build, report
from experiments.pictures import draw_samples, save_samples
from experiments.results import read_results, update_results, write_json
from experiments.scoring import Protocol, score_split
from models import ScoreModel
from numerics import UserError
from samplers import Sampler
from training import (
    Callback,
    CheckpointFolder,
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


def set_threads(config: ConfigDict) -> None:
    if config.threads < 0:
        raise UserError(f"got config.threads={config.threads}; expected an integer >= 0")
    if config.threads:
        torch.set_num_threads(config.threads)


def fit(
    config: ConfigDict,
    folder: Path,
    group: Group,
    *,
    resume: bool = False,
    allow_change: tuple[str, ...] = (),
    init_from: Path | None = None,
    quiet: bool = False,
) -> TrainingResult:
    """This process's share of the training; what can be refused is refused before the first file is written."""
    device, dataset = build.device(config.device), build.dataset(config)
    transform, options, objective = build.transform(config, dataset), build.options(config), build.objective(config)
    model = build.model(config, dataset).to(device)
    data, held_out, seen = splits(config, dataset)
    _, second, _ = plan(config, dataset)
    origin = _begin(model, config, folder, init_from, resume, group)
    problem: Exception | None = None
    if group.is_main and not resume and holds_run(folder):
        problem = UsageError(
            f"got the run folder {folder}, which holds a run; expected a new one: add --resume to go on with it, "
            "or give another --workdir"
        )
    group.broadcast_error(problem)
    plain = config.to_dict()
    parameters = sum(p.numel() for p in model.net.parameters())
    started: dict[str, Any] = {"seed": config.seed, **({} if origin is None else {"init_from": origin})}
    callbacks: list[Callback] = [_Pictures(second, transform, dataset, config.seed, folder)]
    if config.training.validation:
        validation = Validation(
            held_out,
            transform,
            objective=objective,
            n=config.training.validation,
            seed=config.seed,
            dequantize=options.dequantize,
        )
        callbacks.insert(0, validation)
        started["validation"] = {"images": len(validation.split), "seen": seen}
    callbacks.append(_Began(folder, plain, started))
    if group.is_main and not quiet:
        processes = f", {group.world} processes" if group.world > 1 else ""
        cost = estimate(model, data, transform, options, objective=objective, processes=group.world)
        print(
            f"{config.name}: {shorten(str(model.sde), 150)}\n"
            f"{dataset.name}, {len(data):,} training samples of shape {dataset.event_shape}; "
            f"{parameters:,} parameters; {options.steps:,} steps of {options.batch_size} on {device}{processes}\n"
            f"{_cost(cost, folder)}",
            flush=True,
        )
    trained = train(
        model,
        data,
        transform,
        options,
        objective=objective,
        folder=folder,
        config=plain,
        resume=resume,
        allow_change=_allowed(allow_change),
        data_fingerprint=dataset.fingerprint,
        callbacks=callbacks,
    )
    if group.is_main:
        update_results(
            folder,
            {
                "training": {
                    "steps": trained.steps,
                    "seconds": trained.seconds,
                    "loss": trained.losses[-1][1],
                    "parameters": parameters,
                    "batch_size": config.training.batch_size,
                },
                "environment": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "toolkit": report.version(),
                    "device": str(device),
                    "threads": torch.get_num_threads(),
                },
            },
        )
    return trained


def draw(run: build.Run, config: ConfigDict) -> dict[str, Any]:
    """Samples of a trained run by both samplers, as pictures; returns what results.json then holds."""
    main_sampler, second, _ = plan(config, run.dataset)
    sampling = {}
    for name, sampler in ((config.sampling.sampler, main_sampler), (config.sampling.second, second)):
        begun = time.perf_counter()
        x, nfe = draw_samples(
            run.sde,
            run.model,
            sampler,
            run.dataset.event_shape,
            config.sampling.n,
            seed=config.seed,
            device=next(run.model.parameters()).device,
            name=f"sampling, {name}",
        )
        picture = run.folder / "samples" / f"{name}.png"
        save_samples(picture, x, run.transform, run.dataset)
        sampling[name] = {
            "sampler": repr(sampler),
            "nfe": nfe,
            "seconds": time.perf_counter() - begun,
            "samples": len(x),
            "picture": str(picture.relative_to(run.folder)),
        }
    return update_results(run.folder, {"sampling": {**sampling[config.sampling.sampler], "all": sampling}})


def score(run: build.Run, config: ConfigDict) -> dict[str, Any]:
    """The bits/dim of a trained run; returns what results.json then holds."""
    begun = time.perf_counter()
    _, _, protocol = plan(config, run.dataset)
    found, parts = score_split(
        run.sde,
        run.model,
        run.dataset,
        run.transform,
        protocol,
        run.folder / "nll",
        fingerprint=run.fingerprint,
        flow=run.flow,
        device=next(run.model.parameters()).device,
        alone=True,
    )
    assert found is not None  # this process wrote all parts
    scored = {
        **found.asdict(),
        "split": protocol.split,
        "seconds": time.perf_counter() - begun,
        "text": str(found),
        "protocol": json.loads((parts / "index.json").read_text()),
    }
    return update_results(run.folder, {"bits_per_dim": scored})


def splits(config: ConfigDict, dataset: Dataset) -> tuple[Split, Split, bool]:
    """What is trained on, what is validated on, and whether the second is part of the first."""
    name, n = config.training.split, config.training.validation
    if name not in ("train", "fit") or n < 0:
        raise UserError(
            f"got config.training.split={name!r}, validation={n}; expected train or fit, and an integer >= 0"
        )
    data = dataset.split(name)
    if "validation" in dataset.split_names:
        return data, dataset.split("validation"), name == "train" and "validation" not in dataset.splits
    if name == "fit":
        raise UserError(
            f"got config.training.split='fit' for {dataset.name}, which sets no images aside; expected train"
        )
    return data, data.take(slice(max(0, len(data) - n) if n else None, None)), True


def plan(config: ConfigDict, dataset: Dataset) -> tuple[Sampler, Sampler, Protocol]:
    """The two samplers and the way of scoring, all checked."""
    c = config.sampling
    if c.n < 1 or c.sampler == c.second:
        raise UserError(
            f"got config.sampling.n={c.n}, sampler={c.sampler!r}, second={c.second!r}; expected n >= 1 and two samplers"
        )
    build.split(dataset, config.likelihood.split)
    first, second = (
        build.sampler(config, name, steps) for name, steps in ((c.sampler, c.steps), (c.second, c.second_steps))
    )
    return first, second, _protocol(config)


@build.values_of("likelihood")
def _protocol(config: ConfigDict) -> Protocol:
    c = config.likelihood
    return Protocol(
        split=c.split,
        solver=c.solver,
        steps=c.steps,
        probes=c.probes,
        draws=c.draws,
        batch_size=c.batch_size,
        limit=c.limit,
        seed=config.seed,
    )


def _begin(
    model: ScoreModel, config: ConfigDict, folder: Path, source: Path | None, resume: bool, group: Group
) -> dict[str, Any] | None:
    """Gives `model` the weights to begin with, where that is asked for; returns where they came from."""
    if source is None:
        return None
    if resume and CheckpointFolder(folder / "checkpoints").exists():
        if group.is_main:
            print(f"--init_from={source} is not looked at: {folder} has a checkpoint to go on from", flush=True)
        return None
    origin = initialize_from(model, source)
    theirs = origin.config.get("model", {})
    for name in ("parametrization", "conditioning"):
        own = config.model[name]
        if theirs.get(name, own) != own:
            raise UsageError(
                f"got --init_from={source}, whose network has model.{name}={theirs[name]!r}; expected {own!r} as here: "
                f"add --config.model.{name}={theirs[name]}"
            )
    return {"path": str(origin.path), "step": origin.step}


def _cost(cost: Estimate, folder: Path) -> str:
    """What the run will take of memory and disk."""
    free = free_bytes(folder)
    warning = (
        ""
        if free > cost.disk
        else "\nwarning: the disk may become full; a full one stops the run, with its last checkpoint intact"
    )
    return (
        f"memory about {cost.memory / 2**30:.2f} GiB; checkpoints of {cost.checkpoint / 2**20:.1f} MiB, at most "
        f"{cost.disk / 2**20:.1f} MiB of the {free / 2**30:.1f} GiB free; the bar shows the time left{warning}"
    )


def free_bytes(folder: Path) -> int:
    """What the disk has left where `folder` is, or would be."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def holds_run(folder: Path) -> bool:
    """Whether there is work in `folder`; where a session came to no checkpoint, there is none."""
    return CheckpointFolder(folder / "checkpoints").exists() or "training" in read_results(folder)


def _allowed(names: tuple[str, ...]) -> tuple[str, ...]:
    """Values that may differ on --resume: those that are named, and those that change no number."""
    harmless = (
        "threads",
        "device",
        *(f"training.{n}" for n in ("log_every", "checkpoint_every", "eval_every", "validation", "keep")),
    )
    return (*harmless, *(name.removeprefix("config.") for name in names))


class _Began(Callback):
    """Writes config.json, and in results.json how a session began, once the run has accepted both."""

    def __init__(self, folder: Path, config: dict[str, Any], values: dict[str, Any]) -> None:
        self.folder, self.config, self.values = folder, config, values

    def on_start(self, state: TrainState) -> None:
        commands = read_results(self.folder).get("commands", [])
        command = shlex.join(["python", *sys.argv])
        write_json(self.folder / "config.json", self.config)
        update_results(self.folder, {**self.values, "commands": [*(c for c in commands if c != command), command]})


class _Pictures(Callback):
    """A few samples of the averaged weights at every evaluation, as a file and in TensorBoard."""

    def __init__(self, sampler: Sampler, transform: Transform, dataset: Dataset, seed: int, folder: Path) -> None:
        self.sampler, self.transform, self.dataset, self.seed, self.folder = sampler, transform, dataset, seed, folder

    def on_eval(self, state: TrainState) -> None:
        with state.averaged() as model:
            device = next(model.parameters()).device
            x, _ = draw_samples(
                model.sde,
                model,
                self.sampler,
                self.dataset.event_shape,
                16,
                seed=self.seed,
                device=device,
                progress=False,
            )
        file = self.folder / "samples" / f"step_{state.step:08d}.png"
        save_samples(file, x, self.transform, self.dataset)
        with Image.open(file) as picture:
            pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
        state.image("samples", pixels.permute(2, 0, 1) / 255)
