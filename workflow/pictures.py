"""Samples drawn in batches, and pictures of them, whatever their shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.pictures import require_picture, save_grid, save_histogram, save_lines, save_scatter, shown_channels
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
    setup: Setup,
    score: Score,
    sampler: Sampler,
    n: int,
    *,
    first: int = 0,
    seed: int | None = None,
    shown: bool = True,
    name: str = "sampling",
) -> tuple[Tensor, int]:
    """`n` samples `(n, *)` in model units, on the CPU, and the evaluations of one batch.

    Noise is keyed by (seed, sample number), so a sample is the same for any `n` and batch size.

    Args:
        first: number of the first sample.
        seed: the run's unless given.
    """
    parts, nfe, size = [], 0, batch_size(setup)
    seed = setup.options.seed if seed is None else seed
    with torch.no_grad(), progress.bar(total=n, name=name, unit="sample", shown=shown) as bar:
        for ids in torch.split(torch.arange(first, first + n), size):
            made = sampler(
                setup.sde,
                take(score, ids),
                (len(ids), *setup.dataset.event_shape),
                generator=SampleStreams(seed, ids),
                device=setup.device,
                callback=_show_steps(bar, len(ids)),
            )
            bar.update(len(ids))
            parts.append(made.x.cpu())
            nfe = max(nfe, made.nfe)
    return torch.cat(parts), nfe


def batch_size(setup: Setup) -> int:
    """Samples at a time: 256 images, more of what is smaller."""
    return max(256, min(5000, 2**14 // setup.dataset.dim))


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Samples that are kept in parts.

    Attributes:
        x: `(n, *)` in model units; None where other processes have yet to write.
        nfe: calls of the network for a batch.
        sampler: the code that makes what drew them.
        folder: of the parts.
    """

    x: Tensor | None
    nfe: int
    sampler: str
    folder: Path


def draw_in_chunks(run: TrainedRun, sampler: Sampler | None, n: int, *, seed: int, batch_size: int, name: str) -> Parts:
    """`n` samples of a run, kept as parts below RUN/samples.

    Sample i is the same for any number of processes, and whether or not the work was interrupted.

    Args:
        sampler: None for what a system without a score draws by.
    """
    # first: a system without a score is refused before anything is written
    score = None if sampler is None else run.score
    own = {"config": run.setup.config} if sampler is None else {}
    stated = {"sampler": repr(sampler), "seed": seed, "n": n, "chunk": batch_size, "model": run.fingerprint, **own}
    stated["torch"] = versions()["torch"]
    chunks = Chunks(run.folder.path / "samples", name, stated, n, batch_size)
    low, high = (float(run.setup.config["data"][end]) for end in ("low", "high"))
    units = f"model units, data in [{low:g}, {high:g}]"
    with torch.no_grad(), progress.bar(total=n, initial=chunks.done, name=name, unit="sample") as bar:
        for k, first, last in chunks.todo():
            if sampler is None:
                drawn = run.setup.system.samples(run, last - first, first=first, seed=seed)
                chunks.save(k, x=drawn.x, nfe=drawn.nfe, sampler=drawn.sampler, units=units)
            else:
                assert score is not None
                made = sampler(
                    run.sde,
                    score,
                    (last - first, *run.dataset.event_shape),
                    generator=SampleStreams(seed, torch.arange(first, last)),
                    device=run.device,
                    callback=all_of(_show_steps(bar, last - first), lambda _: chunks.poll()),  # a chunk may take hours
                )
                chunks.save(k, x=made.x.cpu(), nfe=made.nfe, sampler=repr(sampler), units=units)
            bar.update(last - first)
    if not chunks.complete:
        return Parts(x=None, nfe=0, sampler=repr(sampler), folder=chunks.folder)
    parts = chunks.load("x", also=("nfe",))
    return Parts(
        x=torch.cat([torch.from_numpy(p["x"]) for p in parts]),
        nfe=max(int(p["nfe"]) for p in parts),
        sampler=str(parts[0].get("sampler", repr(sampler))),
        folder=chunks.folder,
    )


def _show_steps(bar: Any, size: int) -> Callable[[StepInfo], None]:
    """Shows how far the present batch is, without counting its samples before they are there."""

    def show(info: StepInfo) -> None:
        of = f" of {info.steps}" if info.steps else ""
        bar.set_postfix_str(f"batch of {size}: step {info.step}{of}, {info.nfe} evaluations", refresh=False)
        bar.update(0)

    return show


def require_samples_file(file: Path, setup: Setup) -> None:
    """Refuses a file that `save_samples` could not write.

    Raises:
        DataError: as `evaluation.pictures.require_picture`.
    """
    require_picture(file, plot=len(setup.dataset.event_shape) != 3)


def save_samples(file: Path, x: Tensor, setup: Setup) -> None:
    """A picture of samples `(n, *)` in model units: a grid of images, of which the first three channels (or one) are shown;
    points, or lines `(n, C, L)`, beside the test set's; of anything else the histogram of all numbers, over the test set's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape, values, reference = tuple(x.shape[1:]), setup.transform.inverse(x), setup.dataset.split("test").x
    if len(shape) == 3:
        images = shown_channels(x)
        save_grid(
            file, setup.transform.to_unit(images), scale=max(1, round(32 / shape[-1]))
        )  # small images are hard to see
    elif len(shape) == 2:
        save_lines(file, values, reference)
    elif len(shape) == 1 and shape[0] > 1:
        save_scatter(file, values, reference)
    else:
        save_histogram(file, values, reference)
