"""Models that a system trains beside its own, to compare: the same data, batches and optimiser, another model or objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

import training
from data import Split
from training import Callback, Objective
from workflow import progress
from workflow.setup import Setup

M = TypeVar("M", bound=nn.Module)


def seeded(seed: int, make: Callable[[], M]) -> M:
    """What `make` makes, its random weights drawn from `seed`, and nothing else touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def train_beside(
    setup: Setup,
    model: M,
    objective: Objective,
    *,
    steps: int,
    pairs: Split | None = None,
    folder: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> M:
    """`model` with its averaged weights after `steps` updates by the run's own options, in evaluation mode.

    Args:
        pairs: to train on, in model units, in place of the run's data.
        folder: for its metrics and last checkpoint; None keeps nothing. An earlier session's checkpoint there is gone on from.
        callbacks: looked at as often as the run looks at its own.
    """
    options = replace(
        setup.options,
        steps=steps,
        batch_size=setup.options.batch_size if pairs is None else min(setup.options.batch_size, len(pairs)),
        warmup=min(setup.options.warmup, max(1, steps // 10)),
        schedule="cosine",
        eval_every=setup.options.eval_every if callbacks else 0,
        checkpoint_every=0,
        log_every=max(1, steps // 20),
        label_dropout=0.0,
        progress=not progress.is_silent(),
    )
    model = model.to(setup.device).requires_grad_(True).train()
    found = training.train(
        model,
        setup.training_data if pairs is None else pairs,
        setup.transform if pairs is None else None,
        options,
        objective=objective,
        folder=folder,
        resume=folder is not None,
        callbacks=callbacks,
    )
    if found.averages:  # with ema=() the last weights stay, as in the run itself
        found.load_averages(model)
    return model.eval().requires_grad_(False)
