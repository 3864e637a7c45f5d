"""Samples drawn in batches, and pictures of them, whatever their shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.pictures import save_grid, save_histogram, save_lines, save_scatter
from numerics import SampleStreams, take
from samplers import Sampler, StepInfo
from samplers.callbacks import all_of
from sde_lib import Score
from workflow import progress
from workflow.chunks import Chunks
from workflow.setup import Setup
from workflow.trained_run import TrainedRun
from workflow.versions import versions


def draw_samples(
    setup: Setup, score: Score, sampler: Sampler, n: int, *, shown: bool = True, name: str = "sampling"
) -> tuple[Tensor, int]:
    """`n` samples `(n, *)` in model units, on the CPU, and the evaluations of one batch.

    Noise is keyed by (seed, sample number), so a sample is the same for any `n` and batch size.
    """
    parts, nfe, size = [], 0, batch_size(setup)
    with torch.no_grad(), progress.bar(total=n, name=name, unit="sample", shown=shown) as bar:
        for first in range(0, n, size):
            last = min(first + size, n)
            ids = torch.arange(first, last)
            made = sampler(
                setup.sde,
                take(score, ids),
                (last - first, *setup.dataset.event_shape),
                generator=SampleStreams(setup.options.seed, ids),
                device=setup.device,
                callback=_show_steps(bar, last - first),
            )
            bar.update(last - first)
            parts.append(made.x.cpu())
            nfe = max(nfe, made.nfe)
    return torch.cat(parts), nfe


def batch_size(setup: Setup) -> int:
    """Samples at a time: 256 images, more of what is smaller."""
    return max(256, min(5000, 2**14 // setup.dataset.dim))


def draw_in_chunks(
    run: TrainedRun, sampler: Sampler, n: int, *, seed: int, batch_size: int, name: str
) -> tuple[Tensor | None, int, Path]:
    """`n` samples of a run in model units, kept as parts below RUN/samples; None where other processes have yet to write.

    Sample i is the same for any number of processes, and whether or not the work was interrupted.
    """
    score = run.score  # first: a system without one is refused before anything is written
    stated = {"sampler": repr(sampler), "seed": seed, "n": n, "chunk": batch_size, "model": run.fingerprint}
    stated["torch"] = versions()["torch"]
    chunks = Chunks(run.folder.path / "samples", name, stated, n, batch_size)
    with torch.no_grad(), progress.bar(total=n, initial=chunks.done, name=name, unit="sample") as bar:
        for k, first, last in chunks.todo():
            made = sampler(
                run.sde,
                score,
                (last - first, *run.dataset.event_shape),
                generator=SampleStreams(seed, torch.arange(first, last)),
                device=run.device,
                callback=all_of(_show_steps(bar, last - first), lambda _: chunks.poll()),  # a chunk may take hours
            )
            low, high = run.model.data_range
            chunks.save(k, x=made.x.cpu(), nfe=made.nfe, units=f"model units, data in [{low:g}, {high:g}]")
            bar.update(last - first)
    if not chunks.complete:
        return None, 0, chunks.folder
    parts = chunks.load()
    return torch.cat([torch.from_numpy(p["x"]) for p in parts]), max(int(p["nfe"]) for p in parts), chunks.folder


def _show_steps(bar: Any, size: int) -> Callable[[StepInfo], None]:
    """Shows how far the present batch is, without counting its samples before they are there."""

    def show(info: StepInfo) -> None:
        of = f" of {info.steps}" if info.steps else ""
        bar.set_postfix_str(f"batch of {size}: step {info.step}{of}, {info.nfe} evaluations", refresh=False)
        bar.update(0)

    return show


def save_samples(file: Path, x: Tensor, setup: Setup) -> None:
    """A picture of samples `(n, *)` in model units: a grid of images, of which the first three channels (or one) are shown;
    points, or lines `(n, C, L)`, beside the test set's; of anything else the histogram of all numbers, over the test set's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape, values, reference = tuple(x.shape[1:]), setup.transform.inverse(x), setup.dataset.split("test").x
    if len(shape) == 3:
        images = x[:, : 3 if shape[0] >= 3 else 1]
        save_grid(
            file, setup.transform.to_unit(images), scale=max(1, round(32 / shape[-1]))
        )  # small images are hard to see
    elif len(shape) == 2:
        save_lines(file, values, reference)
    elif len(shape) == 1 and shape[0] > 1:
        save_scatter(file, values, reference)
    else:
        save_histogram(file, values, reference)
