"""A finished run, ready to sample and score."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from data import Dataset, Split
from data.transforms import Transform
from guidance import classifier_free
from models import ScoreModel
from numerics import UserError
from sde_lib import SDE, Score, WhitenedFlow
from training import CheckpointError, load_weights
from workflow import configuration
from workflow.run_folder import CARD, RunFolder
from workflow.setup import Setup, resolve


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run with its averaged weights.

    Attributes:
        folder: where it is.
        setup: what its configuration says; the model in it has the trained weights, in evaluation mode.
        step: of the checkpoint.
        fingerprint: names the weights (and the class, where one is chosen).
        label: the class that the score is given; None: without.
        guidance: scale of classifier-free guidance to it; None: the class alone.
    """

    folder: RunFolder
    setup: Setup
    step: int
    fingerprint: str
    label: int | None = None
    guidance: float | None = None

    @property
    def of_a_class_alone(self) -> bool:
        """Is the score given a class, without guidance or a caption?"""
        return self.label is not None and self.fingerprint.endswith(f"/{self.label}")

    @property
    def model(self) -> ScoreModel:
        """The score model.

        Raises:
            UserError: a run of a system without one.
        """
        return self.setup.score_model

    @cached_property
    def score(self) -> Score:
        """What is sampled and scored: the model, or the model given the class.

        Raises:
            UserError: a run of a system without a score, or a class that the model does not have.
        """
        if self.guidance is not None:
            return classifier_free(self.model, self.label, self.guidance)
        return self.model if self.label is None else self.model.condition(self.label)

    @property
    def sde(self) -> SDE:
        """The SDE that the model is a score of."""
        return self.setup.sde

    @property
    def dataset(self) -> Dataset:
        """The data set that it was trained on."""
        return self.setup.dataset

    @property
    def transform(self) -> Transform:
        """The map from data to model units."""
        return self.setup.transform

    @property
    def flow(self) -> WhitenedFlow:
        """The variables in which the probability flow of these data is best integrated."""
        return self.setup.flow

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.setup.device

    def pilot(self, n: int = 8) -> Tensor:
        """The first training data `(n, *)`, stored as they are, on the device: for pilot runs."""
        return self.dataset.split("train").x[:n].to(self.device)

    def given(self, label: int) -> TrainedRun:
        """The same run for one class.

        Raises:
            UserError: a model without classes, or without that one.
        """
        given = replace(self, label=label, fingerprint=f"{self.fingerprint}/{label}")
        _ = given.score  # refused here, if at all
        return given

    def of_class(self, label: int) -> TrainedRun:
        """The same run for one class, with the data of that class alone: to judge what is drawn of it, and to score its own.

        Raises:
            UserError: as `given`, or a class of which a split has no data.
        """
        given = self.given(label)
        return replace(given, setup=replace(self.setup, dataset=_of_class(self.dataset, label)))

    def captioned(self, caption: str) -> TrainedRun:
        """The same run given a caption, of any words that its network knows; it is class 0 then.

        Raises:
            UserError: a model that reads no captions, or a caption that it cannot read.
        """
        setup = replace(self.setup, model=self.model.reading([caption]))
        return replace(self, setup=setup, label=0, fingerprint=f"{self.fingerprint}/{' '.join(caption.split())!r}")

    def guided(self, label: int, scale: float) -> TrainedRun:
        """The same run guided to one class, see `guidance.classifier_free`.

        Raises:
            UserError: a model without classes, or without that one; a scale that is not finite.
        """
        name = f"{self.fingerprint}/{label}/guidance {scale:.15g}"
        guided = replace(self, label=label, guidance=scale, fingerprint=name)
        _ = guided.score  # refused here, if at all
        return guided


def _of_class(dataset: Dataset, label: int) -> Dataset:
    """The samples of one class, in every split that has some.

    Raises:
        UserError: there are none in train or in test.
    """
    splits: dict[str, Split] = {}
    for name in (n for n in dataset.split_names if n != "fit"):
        split = dataset.split(name)
        index = torch.empty(0) if split.labels is None else (split.labels == label).nonzero().squeeze(1)
        if len(index):
            splits[name] = split.take(index)
        elif name in ("train", "test"):
            raise UserError(f"got --label {label}; expected a class of {dataset.name}'s split {name}")
    return replace(dataset, splits=splits, validation=0, log_prob=None)


def load_run(folder: str | Path, device: str = "auto", *, setup: Setup | None = None) -> TrainedRun:
    """The model of a run folder's newest whole checkpoint, with its averaged weights; or of a folder that export.py wrote.

    Args:
        device: auto, cpu, cuda, ...
        setup: what the configuration says, where it is at hand.

    Raises:
        UserError: a folder without a configuration or without a whole checkpoint, or one of another network.
    """
    folder = Path(folder)
    if (folder / CARD).is_file():
        config = configuration.of_run(folder)
        pretrained = ScoreModel.from_pretrained(folder)
        setup, step = resolve(config, model=pretrained, device=device), int(pretrained.card["step"])
    else:
        setup = resolve(configuration.of_run(folder), device=device) if setup is None else setup
        try:
            step = load_weights(setup.model, folder)
        except CheckpointError as error:
            raise UserError(f"got the run folder {folder}, whose checkpoints cannot be used: {error}") from error
    model = setup.model.eval().requires_grad_(False)
    if isinstance(model, ScoreModel) and model.learned_without_class is None and model.num_classes is not None:
        model.learned_without_class = setup.options.label_dropout > 0  # a run of an earlier version
    return TrainedRun(folder=RunFolder(folder), setup=setup, step=step, fingerprint=fingerprint(model))


def fingerprint(model: nn.Module) -> str:
    """Names the weights: the first half of the SHA-256 of all of them."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
