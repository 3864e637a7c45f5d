"""The weights of a run, for sampling, scoring and fine-tuning."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from training.checkpoint import CheckpointFolder
from training.errors import CheckpointError, UsageError
from training.state import load_named


def initialize_from(model: nn.Module, source: str | os.PathLike[str], *, weights: str = "ema") -> None:
    """Starts `model` from the weights of a run folder or of a folder that `save_pretrained` wrote, to fine-tune it.

    Raises:
        UsageError: a folder that is neither.
        CheckpointError: weights that do not fit the model.
    """
    if not (Path(source) / "card.json").is_file():
        load_weights(model, source, weights=weights)
        return
    from models import ScoreModel

    try:
        pretrained = ScoreModel.from_pretrained(source)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    load_named(model, pretrained.state_dict(), "this model")


@torch.no_grad()
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
    if weights not in ("ema", "raw"):
        raise UsageError(f"got weights={weights!r}; expected 'ema' or 'raw'")
    found = CheckpointFolder(Path(folder) / "checkpoints").read(step)
    if found is None:
        raise UsageError(
            f"got the run folder {folder}, which has no checkpoint; expected one that an experiment has trained"
        )
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
    load_named(model, stored, "this model")
    return found.step
