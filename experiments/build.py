"""From a configuration to objects: the one place where experiments look names up."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

import data
import models
import samplers
import sde_lib
from data import DataError, Dataset, Split
from data.transforms import Transform
from experiments import chains
from models import Conditioning, Parametrization, ScoreModel
from numerics import UserError
from samplers import Sampler
from sde_lib import SDE, Score, WhitenedFlow
from training import (
    DSM,
    ELBO,
    CheckpointError,
    ImportanceTime,
    LikelihoodWeighting,
    LogNormal,
    Objective,
    Simple,
    SoftMinSNR,
    StratifiedTime,
    TrainingOptions,
    load_weights,
)


@contextlib.contextmanager
def values_of(part: str) -> Iterator[None]:
    """Around what is made of `config.part`: whatever its values cannot make is refused in one line that names the part.

    Raises:
        UserError: a value out of its range, of the wrong type, or missing. Errors of the data stay what they are.
    """
    try:
        yield
    except DataError:
        raise
    except ValueError as error:
        if "config." in str(error):
            raise
        raise UserError(f"config.{part}: {error}") from error
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"got a config.{part} that nothing can be made of ({error}); expected values of the kinds that --help shows"
        ) from error


def device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    if name != "auto":
        try:
            chosen = torch.device(name)
            torch.empty(0, device=chosen)  # a device that torch knows need not be there
            return chosen
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"got the device {name!r}, which is not here; expected auto, cpu, cuda, cuda:N or mps"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@values_of("data")
def dataset(config: ConfigDict) -> Dataset:
    name = config.data.name
    if name not in data.available():
        raise UserError(f"got config.data.name={name!r}; expected one of {', '.join(data.available())}")
    takes = data.options(name)
    given = {key: config.data.get(key) for key in _DATA_OPTIONS if config.data.get(key)}
    for key, value in given.items():
        if key not in takes:
            raise UserError(
                f"got config.data.{key}={value!r} for the data set {name}, which has no {key}; leave it out"
            )
    for key, required in takes.items():
        if required and key not in given:
            raise UserError(f"got the data set {name} without config.data.{key}; add --config.data.{key}=...")
    return data.create(name, root=config.data.root or None, **given)


# what a data set may take; 0 and "" leave it out. Runs from before they were there do not have them
_DATA_OPTIONS = ("dataset", "size", "channels", "cache")


def split(dataset: Dataset, name: str) -> Split:
    """The split of that name, refused as a wrong value where there is none."""
    if name not in dataset.split_names:
        raise UserError(f"got the split {name!r} of {dataset.name}; expected one of {', '.join(dataset.split_names)}")
    return dataset.split(name)


@values_of("data")
def transform(config: ConfigDict, dataset: Dataset) -> Transform:
    low, high = config.data.low, config.data.high
    if not (all(isinstance(v, int | float) and math.isfinite(v) for v in (low, high)) and low < high):
        raise UserError(f"got config.data.low={low!r}, high={high!r}; expected finite numbers, low < high")
    return dataset.transform(low, high)


@values_of("sde")
def sde(config: ConfigDict) -> SDE:
    chain = chains.of(config)
    if chain is not None:
        return chain.sde
    options = config.sde.to_dict()
    return sde_lib.create(options.pop("name"), **options)


def data_std(config: ConfigDict, dataset: Dataset) -> float:
    """The standard deviation of the training data in model units, one number."""
    x = dataset.split("train").x[:10_000]
    centred = transform(config, dataset).centres(x).to(torch.float64)
    return round(float(centred.std()), 4)


_PARAMETRIZATIONS = ("preconditioned", "noise", "data", "velocity", "score")
_CONDITIONINGS: dict[str, Conditioning] = {
    "log_snr": models.LogSNR(),
    "time": models.ContinuousTime(),
    "log_sigma": models.LogSigma(),
    "sigma": models.Sigma(),
}

# how a network takes the label: 999 t by sines, sigma by random Fourier features of its logarithm, as published
_EMBEDDINGS = {"time": "positional", "sigma": "fourier"}


def parametrization(config: ConfigDict, std: float) -> Parametrization:
    name = config.model.parametrization
    known = dict(
        zip(
            _PARAMETRIZATIONS,
            (models.Preconditioned(data_std=std), models.NOISE, models.DATA, models.VELOCITY, models.SCORE),
            strict=True,
        )
    )
    if name not in known:
        raise UserError(f"got config.model.parametrization={name!r}; expected one of {', '.join(known)}")
    return known[name]


def network(config: ConfigDict, dataset: Dataset, std: float) -> torch.nn.Module:
    """A U-Net for images, an MLP for everything else, unless the configuration names another (or a published preset)."""
    shape, m = dataset.event_shape, config.model
    classes = dataset.num_classes if m.class_conditional else None
    if m.class_conditional and not classes:
        raise UserError(f"got config.model.class_conditional=True for {dataset.name}, which has no labels")
    name = m.name if m.name != "auto" else "unet" if len(shape) == 3 else "mlp"
    if name == "mlp":
        return models.create(name, dim=dataset.dim, width=m.mlp_width, depth=m.mlp_depth, num_classes=classes)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UserError(f"got the network {name!r} for samples of shape {shape}; expected square images, or mlp")
    if name in models.presets.available():
        return models.presets.create(
            name, in_channels=shape[0], image_size=shape[1], **({"num_classes": classes} if classes else {})
        )
    # sine features turn once, twice, ... per grey level; a preconditioned network sees x / data_std at low noise
    std = std if m.parametrization == "preconditioned" else 1.0
    spacing = (config.data.high - config.data.low) / dataset.levels if dataset.levels else 1.0
    features = tuple(f * std / spacing for f in m.fourier_features) if dataset.levels else ()
    return models.create(
        name,
        in_channels=shape[0],
        image_size=shape[1],
        channels=m.channels,
        multipliers=tuple(m.multipliers),
        blocks=m.blocks,
        dropout=m.dropout,
        num_classes=classes,
        fourier_features=features,
        embedding=_EMBEDDINGS.get(m.conditioning, "smooth"),
    )


@values_of("model")
def model(config: ConfigDict, dataset: Dataset) -> ScoreModel:
    """The score model with fresh weights, from the configuration's seed."""
    std = data_std(config, dataset)
    conditioning = config.model.conditioning
    if conditioning not in _CONDITIONINGS:
        raise UserError(f"got config.model.conditioning={conditioning!r}; expected one of {', '.join(_CONDITIONINGS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = network(config, dataset, std)
    return ScoreModel(
        net,
        sde(config),
        parametrization(config, std),
        conditioning=_CONDITIONINGS[conditioning],
        data_std=std,
        data_range=(config.data.low, config.data.high),
    )


@values_of("training")
def options(config: ConfigDict) -> TrainingOptions:
    """How to train."""
    names = ("steps", "batch_size", "learning_rate", "warmup", "schedule", "betas", "clip", "ema", "precision")
    names += (
        "log_every",
        "checkpoint_every",
        "eval_every",
        "keep",
        "nonfinite",
        "max_skips",
        "parallel",
        "compile",
        "flip",
    )
    c = config.training
    # a conditional network also learns to do without a class, which is how it is then sampled and scored
    dropout = c.label_dropout if config.model.class_conditional else 0.0
    values = {name: c[name] for name in names}
    values["dequantize"] = c.get("dequantize", True)
    return TrainingOptions(seed=config.seed, progress=True, label_dropout=dropout, **values)


@values_of("training")
def objective(config: ConfigDict) -> Objective:
    """What is minimised: which noise levels count how much, and at which times it is looked at."""
    chain = chains.of(config)
    if chain is not None:
        return chain.objective
    c = config.training
    weightings = {"simple": Simple, "likelihood": LikelihoodWeighting, "elbo": ELBO, "soft_min_snr": SoftMinSNR}
    times = {
        "uniform": StratifiedTime,
        "importance": ImportanceTime,
        "log_normal": lambda: LogNormal(mean=c.log_normal_mean, std=c.log_normal_std),
    }
    for name, value, known in (("weighting", c.weighting, weightings), ("times", c.times, times)):
        if value not in known:
            raise UserError(f"got config.training.{name}={value!r}; expected one of {', '.join(known)}")
    return DSM(weighting=weightings[c.weighting](), times=times[c.times]())


@values_of("sampling")
def sampler(config: ConfigDict, name: str, steps: int) -> Sampler:
    """The sampler of that name; a chain's own walks its table. 0 steps: the sampler's own number, or none."""
    chain = chains.of(config)
    if chain is not None and name == chain.algorithm:
        return chain.sampler(config.sampling, steps)
    return samplers.create(name, **({"steps": steps} if steps else {}))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run, ready to sample and score."""

    folder: Path
    config: ConfigDict
    dataset: Dataset
    transform: Transform
    model: ScoreModel
    step: int
    fingerprint: str
    score: Score | None = None  # in place of the model, for instance for one class

    @property
    def sde(self) -> SDE:
        return self.model.sde

    @property
    def flow(self) -> WhitenedFlow:
        return WhitenedFlow(data_std=self.model.data_std or 1.0)


def load_run(folder: Path, device: torch.device | str = "cpu") -> Run:
    """The model of a run folder's newest whole checkpoint, with its averaged weights; or of a folder that export.py wrote.

    Raises:
        UserError: for a folder without a configuration or without a whole checkpoint, or one of another network.
    """
    if (folder / "card.json").is_file():
        score_model = ScoreModel.from_pretrained(folder)
        if "config" not in score_model.card:
            raise UserError(
                f"got the pretrained folder {folder}, whose card names no configuration; expected one that "
                "experiments/export.py wrote: use it through ScoreModel.from_pretrained"
            )
        config, step = ConfigDict(_tuples(score_model.card["config"])), int(score_model.card["step"])
        data = dataset(config)
    else:
        config = config_of(folder)
        data = dataset(config)
        score_model = model(config, data)
        try:
            step = load_weights(score_model, folder)
        except CheckpointError as error:
            raise UserError(f"got the run folder {folder}, whose checkpoints cannot be used: {error}") from error
    return Run(
        folder=folder,
        config=config,
        dataset=data,
        transform=transform(config, data),
        model=score_model.eval().requires_grad_(False).to(device),
        step=step,
        fingerprint=fingerprint(score_model),
    )


def fingerprint(model: torch.nn.Module) -> str:
    """Names the weights: the first half of the SHA-256 of all of them."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def config_of(folder: Path) -> ConfigDict:
    """The configuration that a run folder was made with.

    Raises:
        UserError: where there is none, or none of a run.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"got the run folder {folder}, which has no config.json; expected one that an experiment has written: "
            "run experiments/vp.py --workdir=... first"
        )
    try:
        values = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"got {file}, which is not JSON ({error}); expected what an experiment wrote") from error
    missing = [p for p in _PARTS if not isinstance(values, dict) or not isinstance(values.get(p), dict)]
    missing += [n for n in ("name", "seed") if not isinstance(values, dict) or n not in values]
    if missing:
        raise UserError(
            f"got {file}, which is not a run's: it has no {', '.join(missing)}; expected what an experiment wrote"
        )
    return ConfigDict(_tuples(values))


_PARTS = ("data", "sde", "model", "training", "sampling", "likelihood")


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
