"""A split's mean to a precision: `likelihood.survey` with its values kept in the run folder, resumable and shared out.

    RUN/nll/SPLIT-survey-.../index.json    what was asked for
                             grid.json     the solver's grid and steps
                             values-.../, repeats-.../, predictors-.../, steps-.../    parts, keyed by the images' ids
                             survey.npz    every image's prediction, the scored images' ids and values, the suspect ones, and
                                          the correction that their mean needs for the steps that values have too few

Each phase needs the one before it whole. No process waits: one that has done its share does what is still missing, so that
at most a chunk a phase is done twice, with the same numbers.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from likelihood import BitsPerDim, Method, Survey
from likelihood.image_set import ImageSet, differences_of, halving_of, values_of
from likelihood.refinement import Refinement
from likelihood.survey import conduct, plan_survey
from likelihood.survey_design import Design
from likelihood.survey_population import Differences, Halving, Values
from numerics import UserError
from training.checkpoint import write_atomically
from workflow import progress
from workflow.chunks import Chunks
from workflow.protocol import Protocol
from workflow.score import ROWS, Scored, Task, fixed_method, from_arrays, score, to_arrays
from workflow.scored_entry import GRID, scored_entry
from workflow.trained_run import TrainedRun

WITHOUT_STEPS = 24
"""Up to so many images no steps are chosen: that solves eight training images adaptively, and then each of them up a ladder of
steps, and takes more than solving three times as many adaptively (on digits some 21,000 passes, 450 an image)."""


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """The mean of a split from a survey.

    Attributes:
        result: the mean, its errors and what they rest on.
        protocol: everything that they depend on, plain.
        parts: the folder of the values.
        seconds: of wall clock, in this process.
    """

    result: Survey
    protocol: dict[str, Any]
    parts: Path
    seconds: float

    def entry(self, folder: Path) -> dict[str, Any]:
        """What results.json says of it."""
        stated = scored_entry(
            self.result, protocol=self.protocol, parts=self.parts, folder=folder, seconds=self.seconds
        )
        return {**stated, "probe_stderr": None, "dequantization_stderr": None}


def score_run(run: TrainedRun) -> Scored | Surveyed:
    """The bits/dim of a trained run by its own protocol, a survey where that has a precision; also in results.json."""
    if run.setup.protocol.precision is None:
        return score(run)
    found = survey_split(run, run.setup.protocol)
    run.folder.update_results({"bits_per_dim": found.entry(run.folder.path)})
    return found


@dataclass(frozen=True, kw_only=True)
class SurveyPlan:
    """What a survey of a split would take, and what all its images.

    Attributes:
        design: from the pilot.
        protocol: of the values, with nothing left open.
        noise: the dequantiser's name; none of data without grey levels.
        method: how their flow is integrated, where the design does not say half the steps.
        seconds_a_pass: of wall clock, a network pass of the pilot's; NaN where there is none.
    """

    design: Design
    protocol: Protocol
    noise: str
    method: Method
    seconds_a_pass: float

    @property
    def values(self) -> str:
        """How a value is made, in the survey as of all images but for half the steps: its steps, probes and draws."""
        asked, solver = self.protocol, self.method.solver
        if solver.adaptive:
            steps = f"its own steps at a tolerance of {asked.tolerance:g}"
        else:
            why = f"chosen for {asked.tolerance:g} bits/dim" if asked.chooses_steps else "asked for"
            n = solver.steps
            each = (
                f"{n // 2} steps in the survey and {n} of all images" if self.design.correction.half else f"{n} steps"
            )
            steps = f"{each}, {why}"
        coloured = f"coloured (spacing {asked.spacing}) " if asked.spacing else ""
        trace = f"{asked.probes} {coloured}{_plural('probe', asked.probes)}" if asked.probes else "the exact trace"
        draws = (
            f"{asked.draws} {_plural('draw', asked.draws)} of {self.noise} noise"
            if self.noise != "none"
            else "no noise"
        )
        return f"each value: {steps}; {trace}; {draws}"

    def __str__(self) -> str:
        lines = [str(self.design), self.values]
        if math.isfinite(self.seconds_a_pass):
            survey, whole = (self.seconds_a_pass * n / 60 for n in (self.design.passes, self.design.all_passes))
            lines.append(f"about {survey:.1f} minutes; all images {whole:.1f}")
        return "\n".join(lines)


def _plural(name: str, n: int | None) -> str:
    return name if n == 1 else f"{name}s"


def plan_split(run: TrainedRun, protocol: Protocol) -> SurveyPlan:
    """What a survey of a split would take, from its pilot, which the survey itself then uses again.

    Raises:
        UserError: as `survey_split`.
    """
    images, task = _images(run, protocol)
    made = _plan(images, protocol)
    return SurveyPlan(
        design=made,
        protocol=task.protocol,
        noise=task.stated["dequantization"],
        method=images.method,
        seconds_a_pass=images.seconds_a_pass,
    )


def survey_split(run: TrainedRun, protocol: Protocol) -> Surveyed:
    """The mean of a split to `protocol.precision`.

    Raises:
        UserError: a protocol without a precision, an unknown split, a precision that even all images would not reach, or a part
            that cannot be read.
    """
    begun = time.perf_counter()
    images, task = _images(run, protocol)
    made = _plan(images, protocol)
    progress.say(str(made))
    found = conduct(images, made, seed=protocol.seed)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids=images.ids.numpy(),
        predictions=found.estimate.predictions.numpy() if not made.everything else found.exact.numpy(),
        suspect=found.suspect.numpy(),
        solved_again_ids=images.ids[found.refined].numpy(),
        correction=np.asarray(made.correction.mean),
        scored_ids=images.ids[found.scored].numpy(),
        scored=found.exact.numpy(),
    )
    write_atomically(images.folder / "survey.npz", buffer.getvalue())
    stated = json.loads((images.folder / "index.json").read_text(encoding="utf-8"))
    return Surveyed(result=found, protocol=stated, parts=images.folder, seconds=time.perf_counter() - begun)


def _plan(images: StoredImages, protocol: Protocol) -> Design:
    assert protocol.precision is not None
    return plan_survey(images, precision=protocol.precision, seed=protocol.seed, before=images.before)


def _images(run: TrainedRun, protocol: Protocol) -> tuple[StoredImages, Task]:
    if protocol.precision is None:
        raise UserError("got a protocol without a precision; expected one for a survey, such as precision=0.005")
    task = Task.of(run, protocol)
    if protocol.follows_precision and task.images <= WITHOUT_STEPS:
        progress.say(f"{task.images} {run.setup.noun}s are solved adaptively: to choose steps for them would take more")
        task = Task.of(run, dataclasses.replace(protocol, solver="accurate", tolerance=None))
    size = task.protocol.batch_size
    assert size is not None
    whole = Chunks(task.run.folder.path / "nll", f"{protocol.split}-survey", task.stated, task.images, size)
    return StoredImages(task, whole.folder), task


class StoredImages(ImageSet):
    """The images of a split, whose values and predictors are kept as parts.

    Args:
        task: what is scored.
        folder: where the parts go.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        run, protocol, n = task.run, task.protocol, task.images
        method, self.before = fixed_method(run, protocol, task.t_min, folder / GRID)
        assert protocol.batch_size is not None
        super().__init__(
            run.sde,
            run.score if task.labels is None else run.model.condition(task.labels[:n]),
            task.data.x[:n],
            run.transform,
            method=method,
            dequantizer=protocol.noise(run.transform),
            divergence=protocol.divergence,
            draws=protocol.draws or 1,
            data_std=run.flow.data_std,
            seed=protocol.seed,
            batch_size=protocol.batch_size,
            ids=task.data.ids[:n],
        )
        self.run, self.folder = run, folder
        self.unwatched = self.score
        self.refines = protocol.refine
        self._timed: dict[str, tuple[float, int]] = {}

    @property
    def seconds_a_pass(self) -> float:
        """Of wall clock, from the values that have been asked for, also where an earlier run has made them."""
        seconds = sum(each for each, _ in self._timed.values())
        passes = sum(each for _, each in self._timed.values())
        return seconds / passes if passes else float("nan")

    def refining(self, refinement: Refinement | None) -> ImageSet:
        return super().refining(refinement) if self.refines else self

    def batch(self, index: Tensor) -> Tensor:
        return self.images[index].to(self.run.device)

    def paid(self, index: Tensor, which: Sequence[int]) -> Tensor:
        chunks = self._chunks("predictors", index, {"levels": list(which)})
        for k, part in self._todo(chunks, index, "predicting"):
            chunks.save(k, ids=self.ids[part].numpy(), predictors=self.predict(part, list(which)).numpy())
        return torch.cat(
            [torch.from_numpy(part["predictors"]) for part in chunks.load("predictors", ids=self.ids[index])]
        )

    def halving(self, index: Tensor) -> Halving | None:
        return halving_of(self._compared(index, twice=False)) if self.has_half else None

    def differences(self, index: Tensor) -> Differences | None:
        return differences_of(self._compared(index, twice=True)) if self.steps else None

    def _compared(self, index: Tensor, *, twice: bool) -> list[Tensor]:
        chunks = self._chunks("steps", index, {"twice": twice, "state_errors": True, **self._solved_again})
        for k, part in self._todo(chunks, index, "comparing steps"):
            chunks.save(k, ids=self.ids[part].numpy(), compared=self.compare_steps(part, twice=twice).numpy())
        return [torch.from_numpy(part["compared"]) for part in chunks.load("compared", ids=self.ids[index])]

    def values(self, index: Tensor, repeat: int, half: bool) -> Values:
        asked = {"repeat": repeat, "half_the_steps": half, **self._solved_again}
        chunks = self._chunks("repeats" if repeat else "values", index, asked)
        for k, part in self._todo(chunks, index, "scoring again" if repeat else "scoring"):
            begun = time.perf_counter()
            result = self.score_exactly(part, repeat, half)
            arrays = to_arrays(result)
            chunks.save(k, ids=self.ids[part].numpy(), seconds=time.perf_counter() - begun, **arrays)
        stored = chunks.load(*ROWS, also=("counts",), ids=self.ids[index])
        parts: list[BitsPerDim] = [from_arrays(part) for part in stored]
        for k, (kept, result) in enumerate(zip(stored, parts, strict=True)):
            if "seconds" in kept:  # earlier parts have none
                self._timed[str(chunks.file(k))] = (float(kept["seconds"]), values_of([result]).passes)
        return values_of(parts)

    @property
    def _solved_again(self) -> dict[str, Any]:
        """Which images are, as the parts' index states it."""
        return {} if self.refinement is None else {"solved_again": dataclasses.asdict(self.refinement)}

    def _chunks(self, name: str, index: Tensor, stated: dict[str, Any]) -> Chunks:
        ids = self.ids[index].tolist()
        return Chunks(self.folder, name, {**stated, "images": ids}, len(ids), self.batch_size)

    def _todo(self, chunks: Chunks, index: Tensor, name: str) -> Iterator[tuple[int, Tensor]]:
        """This process's chunks, and then whichever are still missing."""
        self.score = chunks.watched(self.unwatched)
        with progress.bar(total=len(index), initial=chunks.done, name=name, unit=self.run.setup.noun) as bar:
            for alone in (False, True):
                for k, first, last in chunks.todo(alone):
                    yield k, index[first:last]
                    bar.update(last - first)
