"""The weights of a run, for sampling, scoring and fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.checkpoint import CHECKPOINTS, FORMAT, Checkpoint, CheckpointFolder, load_plain
from training.errors import CheckpointError, UsageError
from training.state import load_named
from training.trainable import recall_classes

_CLASSES = "embedding.classes.table.weight"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where weights came from.

    Attributes:
        path: the file or folder.
        step: how many updates they had seen; None where it is not said.
        config: the configuration of their run, as far as it is stored.
    """

    path: Path
    step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def initialize_from(model: nn.Module, source: str | os.PathLike[str], *, weights: str = "ema") -> Origin:
    """Starts `model` from the weights of a run folder, of one checkpoint's file, or of a folder that `save_pretrained` wrote,
    to fine-tune it. A network that is told classes may begin from the same one without: its classes stay as they are.

    Raises:
        UsageError: any other source.
        CheckpointError: weights that do not fit the model.
    """
    source = Path(source)
    if (source / "card.json").is_file():
        return _from_pretrained(model, source)
    if source.is_file():
        found = _checkpoint(source)
        _take(model, found, weights, classes=True)
        return Origin(path=source, step=found.step, config=found.content.get("config") or {})
    if not source.is_dir():
        raise UsageError(
            f"got {source}, which has no checkpoint; expected a run folder, a checkpoint file, or a "
            "folder that save_pretrained wrote"
        )
    found = _newest(source, None)
    _take(model, found, weights, classes=True)
    return Origin(path=found.path, step=found.step, config=found.content.get("config") or {})


def load_weights(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    weights: str = "ema",
    decay: float | None = None,
    step: int | None = None,
) -> int:
    """Loads weights from a run folder into `model` and returns their step.

    Args:
        folder: of the run.
        weights: "ema" for the averages (of the first decay unless `decay` names one), "raw" for the last ones.
        step: of the checkpoint; the newest unless given.

    Raises:
        UsageError: a folder that has no checkpoint.
        CheckpointError: none that can be read, or that does not fit the model.
    """
    found = _newest(Path(folder), step)
    _take(model, found, weights, decay)
    return found.step


def _newest(folder: Path, step: int | None) -> Checkpoint:
    found = CheckpointFolder(folder / CHECKPOINTS).read(step)
    if found is None:
        raise UsageError(
            f"got the run folder {folder}, which has no checkpoint; expected one that an experiment has trained"
        )
    return found


def _checkpoint(file: Path) -> Checkpoint:
    """One file: checked against its manifest, if that lies beside it."""
    digits = file.stem.removeprefix("step_")
    if digits.isdecimal():
        folder = CheckpointFolder(file.parent)
        if folder.path(int(digits)) == file and int(digits) in folder.steps():
            found = folder.read(int(digits))
            assert found is not None
            return found
    content = load_plain(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT or type(content.get("step")) is not int:
        raise CheckpointError(
            f"{file}: is not a checkpoint of format {FORMAT}; expected one of a run's (models.load_score_sde reads those of "
            "score_sde, save_pretrained then writes a folder to begin with)"
        )
    return Checkpoint(content=content, step=content["step"], path=file)


def _from_pretrained(model: nn.Module, source: Path) -> Origin:
    from models import ScoreModel

    try:
        pretrained = ScoreModel.from_pretrained(source)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    for name in ("parametrization", "conditioning"):
        got, own = type(getattr(pretrained, name)), type(getattr(model, name, None))
        if got is not own:
            raise CheckpointError(
                f"got {source}, whose {name} is {got.__name__}; expected this model's, {own.__name__}: choose the same"
            )
    load_named(model, _with_classes(model, pretrained.state_dict()), "this model")
    recall_classes(model, pretrained.learned_without_class)
    card = pretrained.card
    step = card.get("step")
    return Origin(path=source, step=step if isinstance(step, int) else None, config=card.get("config") or {})


def _with_classes(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored weights, with the model's own table of classes where they have none."""
    tables = {k: v for k, v in model.state_dict().items() if k == _CLASSES or k.endswith(f".{_CLASSES}")}
    return {**tables, **stored}


@torch.no_grad()
def _take(
    model: nn.Module, found: Checkpoint, weights: str, decay: float | None = None, *, classes: bool = False
) -> None:
    """Copies the weights of a checkpoint into `model`; with `classes`, its own table of classes is enough."""
    if weights not in ("ema", "raw"):
        raise UsageError(f"got weights={weights!r}; expected 'ema' or 'raw'")
    content = found.content
    try:
        stored = dict(content["model"])
        if weights == "ema" and content["ema"]["weights"]:
            averages = content["ema"]["weights"]
            name = next(iter(averages)) if decay is None else str(float(decay))
            if name not in averages:
                raise UsageError(f"got the EMA decay {decay}; expected one of {', '.join(averages)}")
            stored.update(averages[name])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{found.path}: does not hold a model's weights ({type(error).__name__}: {error})"
        ) from error
    load_named(model, _with_classes(model, stored) if classes else stored, "this model")
    recall_classes(model, content.get("learned_without_class"))
