"""A configuration becomes objects, once.

`resolve` takes the plain values of a configuration and gives a `Setup`: data, transform, model, objective, options, samplers
and protocol, all made and checked. Every stage takes a Setup or a `TrainedRun` and asks the configuration nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

import data
from data import Dataset, Split
from data.transforms import Transform
from likelihood.pilot import ATTEMPTS
from models import ScoreModel
from numerics import Catalogue, UserError, require_count
from samplers import Sampler
from sde_lib import SDE, WhitenedFlow
from training import Objective, TrainingOptions
from workflow.device import chosen_device
from workflow.flow_only import fitting
from workflow.protocol import Protocol
from workflow.splits import checked_split, training_splits
from workflow.system import Config, System

_READ_FOR_DUPLICATES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that a run needs, made from its configuration and checked.

    Attributes:
        config: the configuration, plain, as config.json holds it.
        system: the system that it names.
        device: where the model is.
        dataset, transform: the data, and the map to model units.
        training_data, held_out: what is trained on, and what is validated on; `seen`: whether the second is part of the first.
        model: with fresh weights from the configuration's seed: a `models.ScoreModel`, or what the system has in its place.
        objective, options: what is minimised, and how.
        samplers: by name, in the order in which they draw (the last one also in the course of training); none where the system
            has a way of its own. n: how many samples each of them draws.
        protocol: how bits/dim are computed.
        validation: number of held-out samples that each evaluation measures.
        baselines: whether simple densities are scored beside the model.
        pilots: attempts of the runs that place the likelihood's steps, see `likelihood.pilot_grid`.
    """

    config: Config
    system: System
    device: torch.device
    dataset: Dataset
    transform: Transform
    training_data: Split
    held_out: Split
    seen: bool
    model: nn.Module
    objective: Objective
    options: TrainingOptions
    samplers: Mapping[str, Sampler]
    n: int
    protocol: Protocol
    validation: int
    baselines: bool
    pilots: tuple[tuple[float, int], ...] = ATTEMPTS

    @property
    def name(self) -> str:
        """The system's name."""
        return self.system.name

    @property
    def score_model(self) -> ScoreModel:
        """The model, where it is a score.

        Raises:
            UserError: a system without one, with what to use in its place.
        """
        if not isinstance(self.model, ScoreModel):
            raise UserError(f"got a run of {self.name}, which has no score: {self.system.no_score}")
        return self.model

    @property
    def sde(self) -> SDE:
        """The SDE that the model is a score of."""
        return self.score_model.sde

    @property
    def flow(self) -> WhitenedFlow:
        """The variables in which the probability flow of these data is best integrated."""
        return WhitenedFlow(data_std=self.score_model.data_std or 1.0)

    @cached_property
    def data_notes(self) -> tuple[str, ...]:
        """Notes on the data, a line each: what their reader skipped, and test samples that are in train."""
        if sum(s.x.numel() * s.x.element_size() for s in self.dataset.splits.values()) > _READ_FOR_DUPLICATES:
            return (
                *self.dataset.notes,
                "too many bytes to look for test samples in train; Dataset.duplicates() does it",
            )
        found = self.dataset.duplicates()
        if not len(found):
            return self.dataset.notes
        advice = "which makes its scores too good: --config.data.drop_duplicates=True leaves them out"
        return (*self.dataset.notes, f"{found}, {advice}")

    @property
    def noun(self) -> str:
        """What one sample is."""
        return "image" if self.dataset.levels is not None else "point"


def resolve(config: Config, *, model: nn.Module | None = None, device: str | None = None) -> Setup:
    """The set-up of a configuration.

    Args:
        config: plain values, all of them; `workflow.configuration` fills in defaults.
        model: in place of a fresh one, such as a pretrained folder's.
        device: in place of the configuration's.

    Raises:
        UserError: a value that does not fit, with the section that it stands in.
        DataError: data that are missing or damaged.
    """
    from workflow import systems  # which import the stages, and these a Setup

    system = systems.create(config["system"])
    require_count(config["seed"], "config.seed", 0)
    require_count(config["threads"], "config.threads", 0)
    c = dict(config)
    with _part("data"):
        dataset, transform = load_data(c["data"])
    data_std = _data_std(dataset, transform)
    for part in ("model", "training", "sampling"):
        c[part] = _filled(c[part], data_std)
    with _part("sde"):
        sde = system.sde(c)
    with _part("model"):
        model = system.model(c, sde, dataset, transform, data_std) if model is None else model
    with _part("training"):
        training_data, held_out, seen = training_splits(c["training"], dataset)
        objective, options = system.objective(c), _options(c, dataset, len(training_data))
    with _part("sampling"):
        n = (64 if dataset.levels is not None else 2000) if c["sampling"]["n"] is None else c["sampling"]["n"]
        require_count(n, "n")
        sections = [c["sampling"][k] for k in ("sampler", "second") if k in c["sampling"]]
        if sections and sections[0]["name"] == "none":
            raise UserError(
                "got sampler='none'; expected a sampler: --config.sampling.second=none leaves out the second alone"
            )
        sections = [s for s in sections if s["name"] != "none"]
        drawn_by = {s["name"]: system.sampler(c, s) for s in sections}
        if len(drawn_by) < len(sections):
            raise UserError(f"got sampler and second both {sections[0]['name']!r}; expected two different samplers")
    with _part("likelihood"):
        protocol = _PROTOCOL.create("protocol", seed=config["seed"], **c["likelihood"])
        checked_split(dataset, protocol.split)
    system.check(c)
    with _part("sampling"):
        drawn_by = {name: fitting(sampler, objective) for name, sampler in drawn_by.items()}
        for name, sampler in drawn_by.items():
            if asks_learned_variance(sampler) and not getattr(model, "learned_variance", False):
                raise UserError(
                    f"got variance='learned' for the sampler {name!r}, and {system.name} learns none; expected 'posterior' or "
                    "'transition': the system iddpm learns variances"
                )
    place = chosen_device(config["device"] if device is None else device)
    made = Setup(
        config=config,
        system=system,
        device=place,
        dataset=dataset,
        transform=transform,
        training_data=training_data,
        held_out=held_out,
        seen=seen,
        model=model.to(place),
        objective=objective,
        options=options,
        samplers=drawn_by,
        n=n,
        protocol=protocol.for_samples(dataset.dim, dataset.levels),
        validation=c["training"]["validation"],
        baselines=bool(config["baselines"]),
    )
    return system.settled(made)


def asks_learned_variance(sampler: Sampler) -> bool:
    """Whether its steps, or its predictor's, need a network that says the variance, too."""
    parts = (sampler, getattr(sampler, "predictor", None))
    return any(getattr(part, "variance", None) == "learned" for part in parts)


_PROTOCOL: Catalogue[Protocol] = Catalogue("likelihood", {"protocol": Protocol})
_OPTIONS: Catalogue[TrainingOptions] = Catalogue("training", {"options": TrainingOptions})


def load_data(section: Config) -> tuple[Dataset, Transform]:
    """The data set of the section `data`, and its map to model units."""
    low, high = section["low"], section["high"]
    if not (all(isinstance(v, int | float) and math.isfinite(v) for v in (low, high)) and low < high):
        raise UserError(f"got low={low!r}, high={high!r}; expected finite numbers, low < high")
    own = {k: o for k, o in data.options(section["name"]).items() if k not in data.DATASETS.derived}
    required = {k for k, o in own.items() if o.default is o.REQUIRED}
    given = {k: v for k, v in section.items() if k in own and not (v is None and k in required)}
    dataset = data.create(section["name"], **given)
    if section.get("drop_duplicates"):
        dataset = dataset.without_duplicates()
    return dataset, dataset.transform(low, high, scaling=section["scaling"])


def _data_std(dataset: Dataset, transform: Transform) -> float:
    """The standard deviation of the training data in model units, one number."""
    centred = transform.centres(dataset.split("train").x[:10_000]).to(torch.float64)
    return round(float(centred.std()), 4)


def _filled(values: Mapping[str, Any], data_std: float) -> dict[str, Any]:
    """With the data's standard deviation where it was left open."""
    return {
        k: _filled(v, data_std) if isinstance(v, Mapping) else data_std if k == "data_std" and v is None else v
        for k, v in values.items()
    }


def _options(c: Config, dataset: Dataset, samples: int) -> TrainingOptions:
    known = _OPTIONS.options("options")
    given = {k: v for k, v in c["training"].items() if k in known}
    if given["batch_size"] is None:
        given["batch_size"] = min(128 if dataset.levels is not None else 512, samples)
    if given["steps"] is None:
        given["steps"] = 1500 if dataset.levels is not None else 5000
    # a conditional network also learns to do without a class, which is how it is then sampled and scored
    if not c["model"]["class_conditional"]:
        given["label_dropout"] = 0.0
    return _OPTIONS.create("options", **given, seed=c["seed"], progress=True)


@contextlib.contextmanager
def _part(name: str) -> Iterator[None]:
    """Names the section in which a value does not fit."""
    try:
        yield
    except UserError as error:
        if type(error) is UserError or error.exit_code == UserError.exit_code:
            raise UserError(f"config.{name}: {error}") from error
        raise
