"""Bits/dim of a whole split, every image counted: in fixed chunks, resumable, shared out (`experiments.chunks`)."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from data import Dataset
from data.transforms import Transform
from experiments.build import split as build_split
from experiments.chunks import Chunks
from likelihood import BitsPerDim, Divergence, Exact, Hutchinson, Uniform, bits_per_dim, pilot_grid
from numerics import Adams, Dopri5, SampleStreams, SciPy, Solver, TorchDiffEq
from sde_lib import SDE, Score, WhitenedFlow
from sde_lib.time_grids import StepDensity


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that the numbers depend on, besides the model.

    Args:
        split: of the data set.
        solver: fast (Adams on a grid of `steps` that a pilot run on training images has placed, fresh probes),
            accurate (adaptive per sample at `tolerance`), scipy (RK45) or torchdiffeq (dopri5), at `tolerance`, whose
            values depend on the chunk.
        probes: trace estimates a draw; 0 for the exact trace.
        draws: of the dequantisation noise, for each image.
        batch_size: images a chunk.
        limit: score only the first so many images; 0 for all.
    """

    split: str = "test"
    solver: str = "fast"
    steps: int = 128
    tolerance: float = 1e-5
    probes: int = 2
    draws: int = 2
    batch_size: int = 256
    limit: int = 0
    seed: int = 0
    t_min: float | None = None

    def __post_init__(self) -> None:
        known = ("fast", "accurate", "scipy", "torchdiffeq")
        if self.solver not in known:
            raise ValueError(f"got solver={self.solver!r}; expected one of {', '.join(known)}")
        for name, least in (("steps", 1), ("probes", 0), ("draws", 1), ("batch_size", 1), ("limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"got {name}={getattr(self, name)}; expected an integer >= {least}")

    def make_solver(self) -> Solver:
        return {
            "fast": lambda: Adams(steps=self.steps, points=4),
            "accurate": lambda: Dopri5(rtol=self.tolerance, atol=self.tolerance),
            "scipy": lambda: SciPy("RK45", self.tolerance),
            "torchdiffeq": lambda: TorchDiffEq("dopri5", self.tolerance),
        }[self.solver]()

    def make_divergence(self) -> Divergence:
        return Hutchinson(probes=self.probes) if self.probes else Exact()


def score_split(
    sde: SDE,
    score: Score,
    dataset: Dataset,
    transform: Transform,
    protocol: Protocol,
    folder: Path,
    *,
    fingerprint: str,
    flow: WhitenedFlow | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
    alone: bool = False,
) -> tuple[BitsPerDim | None, Path]:
    """The bits/dim of a split, and the folder of its parts.

    Args:
        folder: parts go to a folder below it, named after the split and the protocol; parts that are there are kept.
        fingerprint: names the model's weights, so that another model's parts are not taken for this one's.
        alone: do all chunks here, also under `torchrun`.

    Returns:
        The result, or None where other processes have still to write parts; and the parts' folder, with `index.json`.
    """
    data = build_split(dataset, protocol.split)
    if transform.levels is None:
        protocol = dataclasses.replace(protocol, draws=1)  # there is no noise to draw
    n = min(len(data), protocol.limit or len(data))
    stated = {
        **dataclasses.asdict(protocol),
        "model": fingerprint,
        "data": dataset.fingerprint,
        "images": n,
        "dequantization": "uniform" if transform.levels else "none",
        "levels": transform.levels,
        "solver_object": repr(protocol.make_solver()),
        "divergence_object": repr(protocol.make_divergence()),
        "t_min_used": protocol.t_min or sde.t_min,
        "sde": repr(sde),
        "torch": torch.__version__,
    }
    chunks = Chunks(folder, protocol.split, stated, n, protocol.batch_size)
    grid = None
    if not protocol.make_solver().adaptive and not chunks.complete:
        grid = _pilot(sde, score, dataset, transform, protocol, flow, chunks.folder / "grid.json", device)
    bar = tqdm(total=n, initial=chunks.done, desc=f"scoring {protocol.split}", unit="image", disable=not progress)
    with bar:
        for k, first, last in chunks.todo(alone):
            ids = data.ids[first:last]
            found = bits_per_dim(
                sde,
                score,
                data.x[first:last].to(device),
                transform,
                draws=protocol.draws,
                divergence=protocol.make_divergence(),
                solver=protocol.make_solver(),
                flow=flow,
                grid=grid,
                t_min=protocol.t_min,
                generator=SampleStreams(protocol.seed, ids),
            )
            chunks.save(
                k,
                ids=ids,
                estimates=found.estimates.cpu(),
                solver_error=found.solver_error.cpu(),
                converged=found.converged.cpu(),
                counts=[found.nfe, found.nbe, int(found.exact)],
            )
            bar.update(last - first)
            bar.set_postfix_str(f"{found.mean:.3f} bits/dim")
    if not chunks.complete:
        return None, chunks.folder
    return BitsPerDim.concatenate([_result(part) for part in chunks.load()]), chunks.folder


def _pilot(
    sde: SDE,
    score: Score,
    dataset: Dataset,
    transform: Transform,
    protocol: Protocol,
    flow: WhitenedFlow | None,
    file: Path,
    device: torch.device | str,
) -> StepDensity:
    """The grid of a pilot run on eight training images, kept in `file`, so that all processes use the very same."""
    if not file.exists():
        data = dataset.split("train").x[:8].to(device)
        streams = SampleStreams(protocol.seed)
        t_min = protocol.t_min or sde.t_min
        x = (
            transform(data)
            if transform.levels is None
            else Uniform()(data, transform, sde, t_min, generator=streams)[0]
        )
        grid = pilot_grid(sde, score, x.to(torch.float32), flow=flow, t_min=protocol.t_min)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"knots": grid.knots, "density": grid.density}))
        try:
            os.link(temporary, file)  # fails where another process was first, whose grid then holds
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    table = json.loads(file.read_text())
    return StepDensity(knots=tuple(table["knots"]), density=tuple(table["density"]))


def _result(part: dict[str, np.ndarray]) -> BitsPerDim:
    return BitsPerDim(
        estimates=torch.from_numpy(part["estimates"]),
        solver_error=torch.from_numpy(part["solver_error"]),
        converged=torch.from_numpy(part["converged"]),
        nfe=int(part["counts"][0]),
        nbe=int(part["counts"][1]),
        exact=bool(part["counts"][2]),
    )
