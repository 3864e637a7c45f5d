"""A cell of the table of all systems: a run folder with a training, bits/dim, samples, and their measures.

    FOLDER/vp-seed0/results.json    training, bits_per_dim, sampling, evaluation as every run has them, and `cell`: the terms

`cell` is written last: a folder that has it is done, and one without it goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evaluation import Features
from numerics import UserError
from training import Group
from training.configuration import differences
from workflow import progress
from workflow.fit import fit
from workflow.measured import measure
from workflow.run_folder import CONFIG, RunFolder, read_json
from workflow.setup import Setup
from workflow.table_rows import Row, Terms, chosen, sized
from workflow.trained_run import TrainedRun, load_run


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A row's training from one seed.

    Attributes:
        row: what is trained.
        seed: of weights, training and samples.
        terms: what all cells have in common.
        folder: of all cells.
    """

    row: Row
    seed: int
    terms: Terms
    folder: Path

    def __str__(self) -> str:
        return f"{self.row.system}, seed {self.seed}"

    @property
    def stamp(self) -> dict[str, Any]:
        """What its numbers depend on beside its folder: the terms, and what the row changes."""
        return {**self.terms.stamp, **self.row.changes}

    def place(self, own_size: bool) -> Path:
        """Its run folder: tables with and without equal parameters share the cells of a system's own size."""
        size = "" if own_size else f"-{self.terms.parameters}"
        return self.folder / f"{self.row.system}{size}-seed{self.seed}"

    @property
    def done(self) -> Path | None:
        """The run folder of a cell that is done on these terms; None where it has yet to be made."""
        for own_size in (True, False):
            found = RunFolder(self.place(own_size)).results()
            if found.get("cell") == self.stamp and self.terms.fits(found["training"]["parameters"]):
                return self.place(own_size)
        return None

    def results(self) -> dict[str, Any] | None:
        """What results.json holds of a cell that is done."""
        place = self.done
        return None if place is None else RunFolder(place).results()


def cells(rows: tuple[Row, ...], seeds: tuple[int, ...], terms: Terms, folder: Path) -> Iterator[Cell]:
    """All cells, the first seed of every row before the second; a row that shares a training comes after its owner."""
    ordered = sorted(rows, key=lambda row: bool(row.trained_as))
    for seed in seeds:
        for row in ordered:
            yield Cell(row=row, seed=seed, terms=terms, folder=folder)


def make(cell: Cell, features: Features) -> None:
    """Trains, scores, draws and measures; what is there is not done again.

    Args:
        features: in which samples are compared with data.

    Raises:
        UserError: a system that does not run on these terms, or a training to share that is not there.
    """
    setup, own_size = sized(cell.row, cell.seed, cell.terms)
    folder = RunFolder(cell.place(own_size))
    _refuse_other_terms(cell, folder)
    folder.update_results({"terms": cell.stamp})
    if "training" not in folder.results():
        if cell.row.trained_as:
            _share(cell, setup, folder)
        else:
            progress.say(f"{cell}: training for {cell.terms.cpu_seconds:g} s of processor time")
            silent = replace(setup, options=replace(setup.options, progress=False))
            fit(silent, folder, Group(), resume=True, quiet=True)
    run = load_run(folder.path, setup=setup)
    folder.update_results({"weights": run.fingerprint})
    if "bits_per_dim" not in folder.results():
        setup.system.score(run)
    if "evaluation" not in folder.results():
        _draw(run, cell.terms.samples, features)
    folder.update_results({"cell": cell.stamp})


def _refuse_other_terms(cell: Cell, folder: RunFolder) -> None:
    there = folder.results().get("terms", cell.stamp)
    if there != cell.stamp:
        raise UserError(
            f"got the cell {folder}, made for {there}; expected {cell.stamp}: give another --workdir, or the same terms"
        )


def _draw(run: TrainedRun, n: int, features: Features) -> None:
    """Samples of the system's own sampler, and their measures."""
    begun, clock = time.perf_counter(), time.process_time()
    made = run.setup.system.samples(run, n)
    spent = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - clock}
    lost = int((~made.x.isfinite()).flatten(1).any(dim=1).sum())
    sampling = {"sampler": made.sampler, "nfe": made.nfe, **spent, "samples": n, "not_finite": lost}
    run.folder.update_results({"sampling": sampling})
    stored = run.transform.to_data(
        torch.nan_to_num(made.x, posinf=0.0, neginf=0.0)
    )  # a network that has learned little may diverge
    measure(run, stored, features=features, sampler=made.sampler, nfe=made.nfe, measures=("FD",))


def _share(cell: Cell, setup: Setup, folder: RunFolder) -> None:
    """Takes the weights and the bits/dim of the row whose training this one shares."""
    owner = replace(cell, row=chosen(cell.row.trained_as)[0])
    source = owner.done
    if source is None:
        raise UserError(f"got no finished {owner}, whose training {cell.row.system} shares; expected it first")
    if differences(read_json(source / CONFIG)["model"], setup.config["model"]):
        raise UserError(f"got {source}, of another network than {cell.row.system} has; expected the same")
    shutil.copytree(source / "checkpoints", folder.path / "checkpoints", dirs_exist_ok=True)
    folder.write_json(CONFIG, setup.config)
    theirs = RunFolder(source).results()
    folder.update_results({name: theirs[name] for name in ("training", "bits_per_dim")})
