"""The second stage: samples of a trained run by its two samplers, as pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

from torch import Tensor

from samplers import Sampler
from workflow.pictures import draw_samples, save_samples
from workflow.run_folder import RunFolder
from workflow.trained_run import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What one sampler drew.

    Attributes:
        sampler: the code that makes it.
        nfe: calls of the score for a batch.
        seconds: of wall clock, for all samples.
        samples: how many.
        picture: the file, relative to the run folder.
    """

    sampler: str
    nfe: int
    seconds: float
    samples: int
    picture: str


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of a run, and how they were drawn.

    Attributes:
        x: `(n, *)` in model units, on the CPU.
        nfe: calls of the network for a batch.
        sampler: the code that makes what drew them.
    """

    x: Tensor
    nfe: int
    sampler: str


def samples(run: TrainedRun, n: int, *, first: int = 0, seed: int | None = None) -> Samples:
    """Samples number `first` to `first + n` of the run's first sampler; the seed is the run's unless given."""
    name, sampler = next(iter(run.setup.samplers.items()))
    x, nfe = draw_samples(run.setup, run.score, sampler, n, first=first, seed=seed, name=f"sampling, {name}")
    return Samples(x=x, nfe=nfe, sampler=repr(sampler))


def draw(run: TrainedRun) -> dict[str, Drawn]:
    """Samples by both samplers, by the name of each, also in results.json."""
    setup = run.setup

    def by(name: str, sampler: Sampler) -> Samples:
        x, nfe = draw_samples(setup, run.score, sampler, setup.n, name=f"sampling, {name}")
        return Samples(x=x, nfe=nfe, sampler=repr(sampler))

    return draw_by(run, {name: partial(by, name, sampler) for name, sampler in setup.samplers.items()})


def draw_by(run: TrainedRun, makers: Mapping[str, Callable[[], Samples]]) -> dict[str, Drawn]:
    """What each maker draws: its picture `samples/NAME.png`, and its entry in results.json."""
    drawn = {}
    for name, make in makers.items():
        begun = time.perf_counter()
        made = make()
        picture = run.folder.path / "samples" / f"{name}.png"
        save_samples(picture, made.x, run.setup)
        drawn[name] = Drawn(
            sampler=made.sampler,
            nfe=made.nfe,
            seconds=time.perf_counter() - begun,
            samples=len(made.x),
            picture=picture.relative_to(run.folder.path).as_posix(),
        )
    report_drawn(run.folder, drawn)
    return drawn


def report_drawn(folder: RunFolder, drawn: Mapping[str, Drawn]) -> None:
    """Writes under `sampling` in results.json what was drawn: the entries of the first sampler, and all by name."""
    every = {name: asdict(d) for name, d in drawn.items()}
    folder.update_results({"sampling": {**next(iter(every.values())), "all": every}})
