"""What every experiment does: train, sample, score, and leave a run folder.

config.json                     the configuration
checkpoints/step_XXXXXXXX.pt    with manifests, readable with torch.load(weights_only=True)
samples/*.png                   pictures
events.*, metrics.jsonl         what happened
nll/test-.../                   per-image values
results.json                    bits_per_dim, training, sampling, baselines
report.md                       the same to read
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image

from data import Dataset
from data.transforms import Transform
from experiments import build, command_line, presets
from experiments.baselines import bits_per_dim_of_baselines
from experiments.pictures import draw_samples, save_samples
from experiments.results import update_results, write_json
from experiments.scoring import Protocol, score_split
from likelihood import BitsPerDim
from samplers import Sampler
from training import (
    Callback,
    DiskError,
    Group,
    TrainingError,
    TrainingResult,
    TrainState,
    UsageError,
    process_group,
    train,
)
from training.configuration import check_same

Then = Callable[[ConfigDict], Callable[[Path], None]]
"""Checks a configuration; what it returns is done with the run folder in the end."""


def main(get_config: Callable[[], ConfigDict], arguments: list[str], description: str, then: Then | None = None) -> int:
    """Runs the experiment of a script, from its defaults; see the module's text."""
    preset, arguments = command_line.preset(arguments)
    config = presets.apply(get_config(), preset)
    config, workdir, resume, allow = command_line.parse_experiment(config, arguments, description)
    finish = None if then is None else then(config)
    results = run(config, Path(workdir), resume=resume, allow_change=tuple(allow))
    if finish is not None and results:
        finish(Path(workdir))
    return 0


def run(
    config: ConfigDict, folder: Path, *, resume: bool = False, allow_change: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Trains, samples and scores; returns what results.json holds.

    Under `torchrun` all processes train together, and the first one goes on alone; the others return nothing.
    """
    started = time.perf_counter()
    if config.threads < 0:
        raise ValueError(f"got config.threads={config.threads}; expected an integer >= 0")
    if config.threads:
        torch.set_num_threads(config.threads)
    with process_group() as group:
        trained, parameters = _train(config, folder, resume, allow_change, group)
        is_main = group.is_main
    if not is_main:
        return {}
    dataset, device = build.dataset(config), build.device(config.device)
    transform = build.transform(config, dataset)
    main_sampler, second, protocol = _plan(config, dataset)
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
                "device": str(device),
                "threads": torch.get_num_threads(),
            },
            "seed": config.seed,
        },
    )
    averaged = build.load_run(folder, device).model  # the averaged weights, as any tool will read them
    sampling = {}
    for name, sampler in ((config.sampling.sampler, main_sampler), (config.sampling.second, second)):
        begun = time.perf_counter()
        x, nfe = draw_samples(
            averaged.sde,
            averaged,
            sampler,
            dataset.event_shape,
            config.sampling.n,
            seed=config.seed,
            device=device,
            name=f"sampling, {name}",
        )
        picture = folder / "samples" / f"{name}.png"
        save_samples(picture, x, transform, dataset)
        sampling[name] = {
            "sampler": repr(sampler),
            "nfe": nfe,
            "seconds": time.perf_counter() - begun,
            "samples": len(x),
            "picture": str(picture.relative_to(folder)),
        }
    update_results(folder, {"sampling": {**sampling[config.sampling.sampler], "all": sampling}})

    begun = time.perf_counter()
    found, parts = score_split(
        averaged.sde,
        averaged,
        dataset,
        transform,
        protocol,
        folder / "nll",
        fingerprint=build.fingerprint(averaged),
        flow=build.WhitenedFlow(data_std=averaged.data_std or 1.0),
        device=device,
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
    results = update_results(folder, {"bits_per_dim": scored})
    if config.baselines and dataset.levels is not None:
        results = update_results(folder, {"baselines": bits_per_dim_of_baselines(dataset, config.seed)})
    seconds = time.perf_counter() - started
    results = update_results(folder, {"seconds": seconds})
    _report(folder, config, found, results)
    return results


def _train(
    config: ConfigDict, folder: Path, resume: bool, allow_change: tuple[str, ...], group: Group
) -> tuple[TrainingResult, int]:
    """This process's share of the training; what can be refused is refused before the first file is written."""
    device, dataset = build.device(config.device), build.dataset(config)
    transform, options, objective = build.transform(config, dataset), build.options(config), build.objective(config)
    model = build.model(config, dataset).to(device)
    _, second, _ = _plan(config, dataset)
    plain = config.to_dict()
    problem: Exception | None = None
    if group.is_main:
        try:
            _prepare(folder, plain, resume, allow_change)
        except (TrainingError, ValueError) as error:
            problem = error
    group.broadcast_error(problem)
    parameters = sum(p.numel() for p in model.net.parameters())
    if group.is_main:
        processes = f", {group.world} processes" if group.world > 1 else ""
        print(
            f"{config.name}: {shorten(str(model.sde), 150)}\n"
            f"{dataset.name}, {len(dataset.split('train')):,} training samples of shape {dataset.event_shape}; "
            f"{parameters:,} parameters; {options.steps:,} steps of {options.batch_size} on {device}{processes}",
            flush=True,
        )
    trained = train(
        model,
        dataset.split("train"),
        transform,
        options,
        objective=objective,
        folder=folder,
        config=plain,
        resume=resume,
        allow_change=_allowed(allow_change),
        data_fingerprint=dataset.fingerprint,
        callbacks=[_Pictures(second, transform, dataset, config.seed, folder)],
    )
    return trained, parameters


def _plan(config: ConfigDict, dataset: Dataset) -> tuple[Sampler, Sampler, Protocol]:
    """The two samplers and the way of scoring, all checked."""
    c = config.sampling
    if c.n < 1 or c.sampler == c.second:
        raise ValueError(
            f"got config.sampling.n={c.n}, sampler={c.sampler!r}, second={c.second!r}; expected n >= 1 and two samplers"
        )
    build.split(dataset, config.likelihood.split)
    first, second = (
        build.sampler(config, name, steps) for name, steps in ((c.sampler, c.steps), (c.second, c.second_steps))
    )
    return first, second, _protocol(config)


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


def _prepare(folder: Path, config: dict[str, Any], resume: bool, allow_change: tuple[str, ...]) -> None:
    """Writes config.json, or compares with the one that is there; overwrites nothing unasked."""
    if (folder / "config.json").exists():
        if not resume:
            raise UsageError(
                f"got the run folder {folder}, which holds a run; expected a new one: add --resume to go on with it, "
                "or give another --workdir"
            )
        check_same(build.config_of(folder).to_dict(), config, _allowed(allow_change))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
    except OSError as error:
        raise DiskError(
            f"got the run folder {folder}, which cannot be written ({error.strerror}): give another --workdir"
        ) from error


def _allowed(names: tuple[str, ...]) -> tuple[str, ...]:
    """Values that may differ on --resume: those that are named, and those that change no number."""
    harmless = (
        "threads",
        "device",
        *(f"training.{n}" for n in ("log_every", "checkpoint_every", "eval_every", "keep")),
    )
    return (*harmless, *(name.removeprefix("config.") for name in names))


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


def _report(folder: Path, config: ConfigDict, found: BitsPerDim, results: dict[str, Any]) -> None:
    sampling, training = results["sampling"], results["training"]
    baselines = results.get("baselines", {})
    rows = [(f"this run ({config.name})", f"{found.mean:.3f} ± {found.stderr:.3f}")]
    rows += [(name, f"{value:.3f}") for name, value in sorted(baselines.items(), key=lambda item: item[1])]
    what = (
        "bits/dim of the test set" if results["bits_per_dim"]["protocol"]["levels"] else "-log2 density per dimension"
    )
    lines = [
        f"# {config.name} on {config.data.name}",
        "",
        f"| density | {what} |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f"{found}",
        "",
        f"Training: {training['steps']:,} steps of {training['batch_size']} in {training['seconds']:.0f} s; "
        f"{training['parameters']:,} parameters; seed {results['seed']}.",
        "",
        *(
            f"- {s['samples']} samples by `{s['sampler']}`: {s['nfe']} evaluations, {s['seconds']:.1f} s "
            f"([picture]({s['picture']}))"
            for s in sampling["all"].values()
        ),
        "",
        f"Command: `{' '.join(sys.argv)}`; torch {results['environment']['torch']}, "
        f"{results['environment']['threads']} threads, device {results['environment']['device']}; "
        f"{results['seconds']:.0f} s in all.",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines))
    width = max(len(name) for name, _ in rows)
    print(f"\n{what}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print(f"  {found}")
    for s in sampling["all"].values():
        print(f"  {folder / s['picture']}: {s['samples']} samples, {s['nfe']} evaluations, {s['seconds']:.1f} s")
    print(f"  {results['seconds']:.0f} s in all, {training['seconds']:.0f} s of them training; {folder / 'report.md'}")
