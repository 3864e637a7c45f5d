"""The score model that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import models
from data import Dataset
from data.transforms import Transform
from models import ScoreModel
from numerics import UserError
from sde_lib import SDE

_EMBEDDINGS = {"time": "positional", "continuous_time": "positional", "sigma": "fourier"}


def score_model(
    config: Mapping[str, Any], sde: SDE, dataset: Dataset, transform: Transform, data_std: float
) -> ScoreModel:
    """The score model of the section `model`, with weights from the configuration's seed.

    Raises:
        UserError: options that do not fit the data.
    """
    c = config
    m, shape = c["model"], dataset.event_shape
    classes = dataset.num_classes if m["class_conditional"] else None
    if m["class_conditional"] and not classes:
        raise UserError(f"got class_conditional=True for {dataset.name}, which has no labels; expected False")
    published = m["name"] in models.presets.available()  # what is left open stays as it was published
    options = {k: v for k, v in m.items() if k in models.options(m["name"])}
    if "embedding" in options and options["embedding"] is None:
        del options["embedding"]
        if not published:
            options["embedding"] = _EMBEDDINGS.get(m["conditioning"]["name"], "smooth")
    # above 256 levels the noise at t_min hides single ones, and features that turn in each make the flow too rough to solve
    few_levels = dataset.levels is not None and dataset.levels <= 256
    if "fourier_features" in options and not options["fourier_features"] and few_levels and not published:
        # a preconditioned network sees x / data_std at low noise
        spread = data_std if m["parametrization"]["name"] == "preconditioned" else 1.0
        spacing = (c["data"]["high"] - c["data"]["low"]) / (dataset.levels or 1)
        options["fourier_features"] = tuple(f * spread / spacing for f in m["grey_level_features"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c["seed"])
        names = dataset.classes if classes else ()
        net = models.for_data(m["name"], shape, classes, class_names=names, **options)
    return ScoreModel(
        net,
        sde,
        models.PARAMETRIZATIONS.make(m["parametrization"]),
        conditioning=models.CONDITIONINGS.make(m["conditioning"]),
        data_std=data_std,
        data_range=(c["data"]["low"], c["data"]["high"]),
    )
