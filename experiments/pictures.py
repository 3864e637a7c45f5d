"""Samples drawn in batches, and pictures of them, whatever their shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from data import Dataset
from data.transforms import Transform
from evaluation.pictures import save_grid, save_histogram, save_lines, save_scatter
from experiments.build import Run
from experiments.chunks import Chunks
from numerics import SampleStreams
from samplers import Sampler, StepInfo
from samplers.callbacks import all_of
from sde_lib import SDE, Score


def draw_samples(
    sde: SDE,
    score: Score,
    sampler: Sampler,
    shape: tuple[int, ...],
    n: int,
    *,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    name: str = "sampling",
    progress: bool = True,
) -> tuple[Tensor, int]:
    """`n` samples `(n, *)` in model units, on the CPU, and the evaluations of one batch.

    Noise is keyed by (seed, sample number), so a sample is the same for any `n` and `batch_size`.
    """
    parts, nfe = [], 0
    with torch.no_grad(), tqdm(total=n, desc=name, unit="sample", disable=not progress) as bar:
        for first in range(0, n, batch_size):
            last = min(first + batch_size, n)
            streams = SampleStreams(seed, torch.arange(first, last))
            found = sampler(
                sde,
                score,
                (last - first, *shape),
                generator=streams,
                device=device,
                callback=_show_steps(bar, last - first),
            )
            bar.update(last - first)
            parts.append(found.x.cpu())
            nfe = max(nfe, found.nfe)
    return torch.cat(parts), nfe


def draw_in_chunks(
    run: Run, sampler: Sampler, n: int, *, seed: int, batch_size: int, name: str
) -> tuple[Tensor | None, int, Path]:
    """`n` samples of a run in model units, kept as parts below RUN/samples; None where other processes have yet to write.

    Sample i is the same for any number of processes, and whether or not the work was interrupted.
    """
    stated = {"sampler": repr(sampler), "seed": seed, "n": n, "chunk": batch_size, "model": run.fingerprint}
    chunks = Chunks(run.folder / "samples", name, {**stated, "torch": torch.__version__}, n, batch_size)
    device = next(run.model.parameters()).device
    with torch.no_grad(), tqdm(total=n, initial=chunks.done, desc=name, unit="sample") as bar:
        for k, first, last in chunks.todo():
            found = sampler(
                run.sde,
                run.score or run.model,
                (last - first, *run.dataset.event_shape),
                generator=SampleStreams(seed, torch.arange(first, last)),
                device=device,
                callback=all_of(_show_steps(bar, last - first), lambda _: chunks.poll()),  # a chunk may take hours
            )
            chunks.save(k, x=found.x.cpu(), nfe=found.nfe)
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


def save_samples(file: Path, x: Tensor, transform: Transform, dataset: Dataset) -> None:
    """A picture of samples `(n, *)` in model units: a grid of images, of which the first three channels (or one) are shown;
    points, or lines `(n, C, L)`, beside the test set's; of anything else the histogram of all numbers, over the test set's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape, values, reference = tuple(x.shape[1:]), transform.inverse(x), dataset.split("test").x
    if len(shape) == 3:
        shown = x[:, : 3 if shape[0] >= 3 else 1]
        save_grid(file, transform.to_unit(shown), scale=max(1, round(32 / shape[-1])))  # small images are hard to see
    elif len(shape) == 2:
        save_lines(file, values, reference)
    elif len(shape) == 1 and shape[0] > 1:
        save_scatter(file, values, reference)
    else:
        save_histogram(file, values, reference)
