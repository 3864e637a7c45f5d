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
from likelihood import (
    BitsPerDim,
    Coloured,
    Dequantizer,
    Divergence,
    Exact,
    Hutchinson,
    Method,
    NoDequantization,
    TruncatedNormal,
    UniformDequantizer,
    accurate,
    bits_per_dim,
    pilot_grid,
)
from numerics import Adams, SampleStreams, SciPy, Solver, TorchDiffEq, UserError
from sde_lib import SDE, Score, WhitenedFlow
from sde_lib.time_grids import StepDensity


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that the numbers depend on, besides the model.

    Args:
        split: of the data set.
        solver: fast (`likelihood.fast` with `steps`, its pilot run on training images, fresh probes), accurate (adaptive
            per sample at `tolerance`), scipy (RK45) or torchdiffeq (dopri5), at `tolerance`, whose values depend on the
            chunk.
        probes: trace estimates a draw; 0 for the exact trace.
        spacing: of coloured probes on pixel lattices, which take its square of products each; 0 for independent ones.
        dequantizer: uniform, or truncated_normal, at the time at which the noise is a quarter of a grey level.
        draws: of the dequantisation noise, for each image.
        batch_size: images a chunk.
        limit: score only the first so many images; 0 for all.
    """

    split: str = "test"
    solver: str = "fast"
    steps: int = 128
    tolerance: float = 1e-5
    probes: int = 2
    spacing: int = 0
    dequantizer: str = "uniform"
    draws: int = 2
    batch_size: int = 256
    limit: int = 0
    seed: int = 0
    t_min: float | None = None

    def __post_init__(self) -> None:
        known = ("fast", "accurate", "scipy", "torchdiffeq")
        if self.solver not in known:
            raise UserError(f"got solver={self.solver!r}; expected one of {', '.join(known)}")
        if self.dequantizer not in ("uniform", "truncated_normal"):
            raise UserError(f"got dequantizer={self.dequantizer!r}; expected uniform or truncated_normal")
        for name, least in (
            ("steps", 1),
            ("probes", 0),
            ("spacing", 0),
            ("draws", 1),
            ("batch_size", 1),
            ("limit", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"got {name}={getattr(self, name)}; expected an integer >= {least}")
        if not self.tolerance > 0:
            raise UserError(f"got tolerance={self.tolerance}; expected a number > 0")

    def make_solver(self) -> Solver:
        return {
            "fast": lambda: Adams(steps=self.steps, points=5, start="rising"),
            "accurate": lambda: accurate(tolerance=self.tolerance).solver,
            "scipy": lambda: SciPy("RK45", self.tolerance),
            "torchdiffeq": lambda: TorchDiffEq("dopri5", self.tolerance),
        }[self.solver]()

    def make_divergence(self) -> Divergence:
        if not self.probes:
            return Exact()
        return Coloured(spacing=self.spacing, sets=self.probes) if self.spacing else Hutchinson(probes=self.probes)

    def make_dequantizer(self, transform: Transform) -> Dequantizer:
        if transform.levels is None:
            return NoDequantization()
        return UniformDequantizer() if self.dequantizer == "uniform" else TruncatedNormal()

    def time(self, sde: SDE, transform: Transform) -> float:
        """t_min, the time of the density."""
        if self.t_min is not None:
            return self.t_min
        return TruncatedNormal.t_min(sde, transform) if self.dequantizer == "truncated_normal" else sde.t_min


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
        protocol = dataclasses.replace(protocol, draws=1, dequantizer="uniform")  # there is no noise to draw
    t_min = protocol.time(sde, transform)
    n = min(len(data), protocol.limit or len(data))
    stated = {
        **dataclasses.asdict(protocol),
        "model": fingerprint,
        "data": dataset.fingerprint,
        "images": n,
        "dequantization": protocol.dequantizer if transform.levels else "none",
        "levels": transform.levels,
        "solver_object": repr(protocol.make_solver()),
        "divergence_object": repr(protocol.make_divergence()),
        "t_min_used": t_min,
        "sde": repr(sde),
        "flow": repr(flow),
        "torch": torch.__version__,
    }
    chunks = Chunks(folder, protocol.split, stated, n, protocol.batch_size)
    grid = None
    if not protocol.make_solver().adaptive and not chunks.complete:
        grid = _pilot(sde, score, dataset, transform, protocol, flow, chunks.folder / "grid.json", device)
    method = Method(protocol.make_solver(), flow=flow or WhitenedFlow(), grid=grid, t_min=t_min)
    watched = chunks.watched(score)
    bar = tqdm(total=n, initial=chunks.done, desc=f"scoring {protocol.split}", unit="image", disable=not progress)
    with bar:
        for k, first, last in chunks.todo(alone):
            ids = data.ids[first:last]
            found = bits_per_dim(
                sde,
                watched,
                data.x[first:last].to(device),
                transform,
                method=method,
                dequantizer=protocol.make_dequantizer(transform),
                draws=protocol.draws,
                divergence=protocol.make_divergence(),
                companions=16 if k == 0 else 0,  # the solver's error, from the first images
                generator=SampleStreams(protocol.seed, ids),
            )
            chunks.save(
                k,
                ids=ids,
                estimates=found.estimates.cpu(),
                solver_error=found.solver_error.cpu(),
                companion_error=found.companion_error.cpu(),
                status=found.status.cpu(),
                failed_at=found.failed_at.cpu(),
                counts=[
                    found.nfe,
                    found.nbe,
                    found.companion_nfe,
                    found.dimensions,
                    int(found.exact),
                    int(found.noisy),
                ],
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
        t_min = protocol.time(sde, transform)
        noise = protocol.make_dequantizer(transform)
        x, _ = noise(data, transform, sde, t_min, generator=SampleStreams(protocol.seed))
        grid = pilot_grid(sde, score, x.to(torch.float32), flow=flow, t_min=t_min)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"knots": grid.knots, "density": grid.density}))
        try:
            os.link(temporary, file)  # fails where another process was first, whose grid then holds
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    try:
        table = json.loads(file.read_text())
        return StepDensity(knots=tuple(table["knots"]), density=tuple(table["density"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"got the grid {file}, which cannot be read ({error}); expected what this command wrote: delete it"
        ) from error


def _result(part: dict[str, np.ndarray]) -> BitsPerDim:
    nfe, nbe, companion_nfe, dimensions, exact, noisy = (int(v) for v in part["counts"])
    # older parts hold the companions' error as the solver's
    companion_error = part.get("companion_error", np.full_like(part["solver_error"], np.nan))
    return BitsPerDim(
        estimates=torch.from_numpy(part["estimates"]),
        solver_error=torch.from_numpy(part["solver_error"]),
        companion_error=torch.from_numpy(companion_error),
        status=torch.from_numpy(part["status"]),
        failed_at=torch.from_numpy(part["failed_at"]),
        nfe=nfe,
        nbe=nbe,
        companion_nfe=companion_nfe,
        dimensions=dimensions,
        exact=bool(exact),
        noisy=bool(noisy),
    )
