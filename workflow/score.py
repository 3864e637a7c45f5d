"""The third stage: bits/dim of a whole split, every sample counted, in fixed chunks, resumable, shared out."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Split
from likelihood import BitsPerDim, Method, bits_per_dim, choose_steps, pilot_grid
from likelihood.steps import LEAST_SAMPLES, choice_of
from numerics import SampleStreams, UserError, require_count, take
from sde_lib import CountedScore, Score
from sde_lib.time_grids import StepDensity
from workflow import progress
from workflow.chunks import Chunks
from workflow.protocol import Protocol
from workflow.run_folder import read_json, write_once
from workflow.scored_entry import GRID, scored_entry
from workflow.splits import checked_split
from workflow.trained_run import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The bits/dim of a split.

    Attributes:
        result: the values, their mean and their errors.
        protocol: everything that they depend on, plain.
        parts: the folder of the values per sample.
        seconds: of wall clock, in this process.
    """

    result: BitsPerDim
    protocol: dict[str, Any]
    parts: Path
    seconds: float

    def entry(self, folder: Path) -> dict[str, Any]:
        """What results.json says of it."""
        return scored_entry(self.result, protocol=self.protocol, parts=self.parts, folder=folder, seconds=self.seconds)


def score(run: TrainedRun) -> Scored:
    """The bits/dim of a trained run by its own protocol, all chunks in this process; also in results.json."""
    scored = score_split(run, run.setup.protocol, alone=True)
    assert scored is not None  # this process wrote all parts
    run.folder.update_results({"bits_per_dim": scored.entry(run.folder.path)})
    return scored


def say_none(run: TrainedRun, reason: str) -> None:
    """Writes into results.json that there are no bits/dim, and why."""
    entry = {"mean": None, "stderr": None, "kind": "none", "unit": "bits/dim", "reason": reason, "seconds": 0.0}
    run.folder.update_results(
        {"bits_per_dim": {**entry, "split": run.setup.protocol.split, "text": f"no bits/dim: {reason}"}}
    )


def score_split(run: TrainedRun, protocol: Protocol, *, alone: bool = False) -> Scored | None:
    """The bits/dim of a split, or None where other processes have still to write parts.

    Parts go to a folder below RUN/nll, named after the split and the protocol; parts that are there are kept.

    Args:
        alone: do all chunks here, also under `torchrun`.

    Raises:
        UserError: an unknown split, or a part that cannot be read.
    """
    begun = time.perf_counter()
    task = Task.of(run, protocol)
    run, data, protocol, labels, n = task.run, task.data, task.protocol, task.labels, task.images
    sde, transform = run.sde, run.transform
    assert protocol.batch_size is not None
    chunks = Chunks(run.folder.path / "nll", protocol.split, task.stated, n, protocol.batch_size)
    method = None if chunks.complete else fixed_method(run, protocol, task.t_min, chunks.folder / GRID)[0]
    name = f"scoring {protocol.split}"
    with progress.bar(total=n, initial=chunks.done, name=name, unit=run.setup.noun) as bar:
        for k, first, last in chunks.todo(alone):
            ids = data.ids[first:last]
            result = bits_per_dim(
                sde,
                chunks.watched(run.score if labels is None else run.model.condition(labels[first:last])),
                data.x[first:last].to(run.device),
                transform,
                method=method,
                dequantizer=protocol.noise(transform),
                draws=protocol.draws or 1,
                divergence=protocol.divergence,
                companions=16 if k == 0 else 0,  # the solver's error, from the first images
                generator=SampleStreams(protocol.seed, ids),
            )
            chunks.save(k, ids=ids, **to_arrays(result))
            bar.update(last - first)
            bar.set_postfix_str(f"{result.mean:.3f} bits/dim")
    if not chunks.complete:
        return None
    return Scored(
        result=BitsPerDim.concatenate(
            [from_arrays(part) for part in chunks.load(*ROWS, also=("counts",), ids=data.ids)]
        ),
        protocol=json.loads((chunks.folder / "index.json").read_text(encoding="utf-8")),
        parts=chunks.folder,
        seconds=time.perf_counter() - begun,
    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is scored, with everything decided.

    Attributes:
        run: given its class, where one is chosen.
        data: the split.
        protocol: with nothing left open.
        labels: the samples' own classes `(N,)`, where they are given these.
        images: how many are scored.
        t_min: the time of the density.
        stated: everything that the numbers depend on, plain.
    """

    run: TrainedRun
    data: Split
    protocol: Protocol
    labels: Tensor | None
    images: int
    t_min: float
    stated: dict[str, Any]

    @classmethod
    def of(cls, run: TrainedRun, protocol: Protocol) -> Task:
        """From a run and a protocol.

        Raises:
            UserError: a model without a likelihood, an unknown split, or a class that the model does not have.
        """
        if run.setup.system.no_likelihood:
            raise UserError(f"got a run of {run.setup.name}, which has no likelihood: {run.setup.system.no_likelihood}")
        sde, transform = run.sde, run.transform
        data = checked_split(run.dataset, protocol.split)
        protocol = protocol.for_samples(run.dataset.dim, transform.levels)
        run, labels = _given(run, data, protocol.label)
        t_min = protocol.time(sde, transform)
        n = min(len(data), protocol.limit or len(data))
        stated = {
            **dataclasses.asdict(protocol),
            "model": run.fingerprint,
            "data": run.dataset.fingerprint,
            "images": n,
            "dequantization": protocol.dequantizer if transform.levels else "none",
            "levels": transform.levels,
            "solver_object": protocol.described_solver,
            "divergence_object": repr(protocol.divergence),
            "t_min_used": t_min,
            "sde": repr(sde),
            "flow": repr(run.flow),
            "torch": torch.__version__,
        }
        return cls(run=run, data=data, protocol=protocol, labels=labels, images=n, t_min=t_min, stated=stated)


def _given(run: TrainedRun, data: Split, label: str) -> tuple[TrainedRun, Tensor | None]:
    """The run given the class `label`, and the samples' own classes `(N,)` where these are asked for.

    Raises:
        UserError: a class for a model without classes, or one that it does not have; own classes of data without labels.
    """
    if label == "none":
        return run, None
    if run.model.num_classes is None:
        raise UserError(f"got label={label} for a model without classes; expected none")
    if label != "own":
        return run.given(int(label)), None
    if data.labels is None:
        raise UserError(f"got label=own for {run.dataset.name}, which has no labels; expected none or a class's number")
    return run, data.labels


def fixed_method(run: TrainedRun, protocol: Protocol, t_min: float, file: Path) -> tuple[Method, int]:
    """How the flow is integrated, and the network passes that pilot runs took for it.

    A pilot's grid, and the steps where it chooses them, are kept in `file`: all processes and resumed runs use the very same.
    """
    data_std = run.flow.data_std
    if protocol.solver != "fast":
        return protocol.method(data_std=data_std, t_min=t_min), 0
    if not file.exists():
        x, score = _pilot(run, protocol, t_min)
        if protocol.chooses_steps:
            progress.say(
                f"pilot runs on {len(x)} training {run.setup.noun}s choose the steps for {protocol.tolerance} bits/dim"
            )
            assert protocol.tolerance is not None
            choice = choose_steps(run.sde, score, x, tolerance=protocol.tolerance, data_std=data_std, t_min=t_min)
            choice = choice if protocol.refine else dataclasses.replace(choice, refinement=None)
            write_once(file, json.dumps(choice.asdict()))
        else:
            first = x[:LEAST_SAMPLES]
            counted = CountedScore(take(score, torch.arange(len(first))))
            grid = pilot_grid(run.sde, counted, first, flow=run.flow, t_min=t_min, attempts=run.setup.pilots)
            passes = 3 * counted.evaluated
            write_once(file, json.dumps({"knots": grid.knots, "density": grid.density, "passes": passes}))
    table = _read_grid(file)
    if not protocol.chooses_steps:
        try:
            grid = StepDensity(knots=tuple(table["knots"]), density=tuple(table["density"]))
            passes = table.get("passes", 0)
            require_count(passes, "passes", 0)
        except UserError as error:
            raise UserError(f"{error}: delete {file}, and the same command makes it again") from error
        return protocol.method(data_std=data_std, t_min=t_min, grid=grid), passes
    try:
        choice = choice_of(table)
    except UserError as error:
        raise UserError(f"{error}: delete {file}, and the same command makes it again") from error
    if not choice.reached:
        warnings.warn(choice.warning, stacklevel=3)
    return protocol.method(data_std=data_std, t_min=t_min, choice=choice), choice.passes


def _pilot(run: TrainedRun, protocol: Protocol, t_min: float) -> tuple[Tensor, Score]:
    """Training data for pilot runs, with noise `(n, *)`, and their score, given their own classes where that is asked for."""
    noise = protocol.noise(run.transform)
    x, _ = noise(
        run.pilot(16 if protocol.precision is None else LEAST_SAMPLES),
        run.transform,
        run.sde,
        t_min,
        generator=SampleStreams(protocol.seed),
    )
    own = run.dataset.split("train").labels if protocol.label == "own" else None
    return x.to(torch.float32), run.score if own is None else run.model.condition(own[: len(x)])


def _read_grid(file: Path) -> dict[str, Any]:
    try:
        table = read_json(file)
    except UserError as error:
        raise UserError(f"{error}: delete it, and the same command makes it again") from error
    if not all(isinstance(table.get(k), list) for k in ("knots", "density")):
        raise UserError(
            f"got the grid {file}, which has no knots and densities; expected what this command wrote: delete it"
        )
    return table


ROWS = ("estimates", "solver_error", "status")
"""Arrays of a part that have a row for each sample."""

_COUNTS = ("nfe", "nbe", "companion_nfe", "dimensions", "exact", "noisy")


def to_arrays(result: BitsPerDim) -> dict[str, Any]:
    """A result as arrays, for a part's file."""
    values = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    arrays = {name: v.cpu().numpy() for name, v in values.items() if isinstance(v, torch.Tensor)}
    return {**arrays, "counts": [int(values[name]) for name in _COUNTS]}


def from_arrays(part: dict[str, np.ndarray]) -> BitsPerDim:
    """The result that `to_arrays` took apart.

    Raises:
        UserError: for arrays of something else.
    """
    missing = sorted({*ROWS, "counts"} - set(part))
    if missing:
        raise UserError(
            f"got a part without {', '.join(missing)}, with {', '.join(sorted(part)) or 'nothing'}; expected one that this "
            "command has written: delete the folder's parts, and run it again"
        )
    kinds = {f.name: f.type for f in dataclasses.fields(BitsPerDim)}
    values: dict[str, Any] = {n: torch.from_numpy(part[n]) for n in kinds if n in part}
    # parts of version 0.1 have one error for both, which the companions' had replaced where there were any
    values.setdefault("companion_error", torch.full_like(values["solver_error"], torch.nan))
    values.setdefault("prior_mismatch", torch.full_like(values["solver_error"], torch.nan))  # earlier parts have none
    for name in ("refined", "evaluations"):  # nor these
        values.setdefault(name, torch.zeros(len(values["solver_error"]), dtype=torch.int64))
    for name, count in zip(_COUNTS, part["counts"], strict=True):
        values[name] = bool(count) if kinds[name] == "bool" else int(count)
    return BitsPerDim(**values)
