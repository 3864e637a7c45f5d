"""Quality of samples over a table of samplers and numbers of evaluations: the table, and a heat map.

Images are judged by the Fréchet distance on a classifier's features (`evaluation.default_features`), points by the sliced
Wasserstein distance, both against the training data; beside them stands what held-out data score in groups of the same size.
All samplers start sample i from the same noise, so a column's differences are not the noise's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from evaluation import Estimate, Pixels, default_features, evaluate_samples
from evaluation.features import Features
from samplers import Sampler
from workflow import progress
from workflow.report import table

if TYPE_CHECKING:
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What samples of a data set are judged by.

    Attributes:
        setup: of a run on the data.
        features: in which they are compared.
        measure: "FD" or "SW".
        samples: how many are drawn for a judgement.
    """

    setup: Setup
    features: Features
    measure: str
    samples: int

    @classmethod
    def of(cls, setup: Setup, samples: int, *, quick: bool = False) -> Judge:
        """The judge of a run's data.

        Args:
            quick: judge images by their pixels, for which no classifier is trained: for a dry run.
        """
        levels = setup.dataset.levels
        features = Pixels(levels=levels) if quick and levels is not None else default_features(setup.dataset)
        return cls(setup=setup, features=features, measure="SW" if levels is None else "FD", samples=samples)

    def __call__(self, x: Tensor) -> tuple[Estimate, Estimate]:
        """The measure of samples `(n, *)` in model units, and of as many held-out data."""
        found = evaluate_samples(
            self.setup.transform.to_data(x), self.setup.dataset, features=self.features, measures=(self.measure,)
        )
        (measure,) = found.measures
        return measure.score, measure.floor


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One sampler at one number of evaluations.

    Attributes:
        quality: of its samples.
        nfe: evaluations that it made for a batch.
        seconds: of wall clock, for all samples.
        sampler: the code that makes it.
    """

    quality: Estimate
    nfe: int
    seconds: float
    sampler: str


@dataclass(frozen=True, kw_only=True)
class SamplerTable:
    """Judgements of samplers, by the name of a row and the number at the head of a column.

    Attributes:
        title: what it shows.
        measure: of quality, where less is better.
        samples: in a cell.
        floor: of held-out data.
        head: what a column's number counts.
        cells: some cells may be missing.
    """

    title: str
    measure: str
    samples: int
    floor: Estimate
    head: str
    cells: Mapping[tuple[str, int], Cell] = field(repr=False)

    @property
    def rows(self) -> list[str]:
        """Their names, in the order in which they were asked for."""
        return list(dict.fromkeys(row for row, _ in self.cells))

    @property
    def columns(self) -> list[int]:
        """Their numbers, rising."""
        return sorted({column for _, column in self.cells})

    def lines(self) -> list[str]:
        """As a table of Markdown, with what it shows."""
        body = [[row, *(self._shown(row, c) for c in self.columns)] for row in self.rows]
        return [
            f"{self.title}: {self.measure} of {self.samples:,} samples; held-out data score {self.floor}.",
            "",
            *table((self.head, *(f"{c:,}" for c in self.columns)), body),
        ]

    def asdict(self) -> dict[str, Any]:
        """In plain types."""
        cells = [
            {
                "row": row,
                "column": column,
                "value": cell.quality.value,
                "stderr": cell.quality.stderr,
                "nfe": cell.nfe,
                "seconds": cell.seconds,
                "sampler": cell.sampler,
            }
            for (row, column), cell in self.cells.items()
        ]
        return {
            "measure": self.measure,
            "samples": self.samples,
            "held_out": {"value": self.floor.value, "stderr": self.floor.stderr},
            "cells": cells,
        }

    def save(self, file: Path) -> None:
        """Draws it as a heat map, dark where samples are far from the data; a cell's number is the measure."""
        values = {key: cell.quality.value for key, cell in self.cells.items()}
        errors = {key: cell.quality.stderr for key, cell in self.cells.items()}
        save_heat_map(
            file,
            values,
            errors,
            rows=self.rows,
            columns=self.columns,
            head=self.head,
            title=f"{self.measure}; held-out data {self.floor.value:.2f} ± {self.floor.stderr:.2f}",
        )

    def _shown(self, row: str, column: int) -> str:
        cell = self.cells.get((row, column))
        return "" if cell is None else f"{cell.quality.value:.2f} ± {cell.quality.stderr:.2f}"


def fill(
    judge: Judge,
    asked: Mapping[tuple[str, int], tuple[TrainedRun, Sampler]],
    *,
    title: str,
    head: str,
    on_samples: Callable[[str, int, Tensor], None] | None = None,
) -> SamplerTable:
    """Draws and judges every cell.

    Args:
        asked: by row and column, the run that is sampled and the sampler.
        on_samples: told of each cell's samples `(n, *)`, in model units.
    """
    from workflow.pictures import draw_samples

    cells, floor = {}, Estimate(value=math.nan, stderr=math.nan)
    with progress.bar(total=len(asked), name=title, unit="cell") as bar:
        for (row, column), (run, sampler) in asked.items():
            begun = time.perf_counter()
            x, nfe = draw_samples(run.setup, run.score, sampler, judge.samples, shown=False)
            seconds = time.perf_counter() - begun
            quality, floor = judge(x)
            cells[row, column] = Cell(quality=quality, nfe=nfe, seconds=seconds, sampler=repr(sampler))
            if on_samples is not None:
                on_samples(row, column, x)
            bar.update(1)
            bar.set_postfix_str(f"{row}, {column}: {judge.measure} {quality.value:.2f}")
    return SamplerTable(title=title, measure=judge.measure, samples=judge.samples, floor=floor, head=head, cells=cells)


def save_heat_map(
    file: Path,
    values: Mapping[tuple[str, int], float],
    errors: Mapping[tuple[str, int], float],
    *,
    rows: Sequence[str],
    columns: Sequence[int],
    head: str,
    title: str,
) -> None:
    """Positive numbers by row and column, coloured by their logarithm; cells without a number stay white."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in values.items():
        grid[rows.index(row), columns.index(column)] = value if value > 0 else np.nan
    known = grid[np.isfinite(grid)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.5, 1.0)
    figure = Figure(figsize=(1.6 + 1.15 * len(columns), 1.0 + 0.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    norm = LogNorm(low, max(high, 1.01 * low))
    image = axes.imshow(grid, cmap="viridis_r", norm=norm, aspect="auto")
    for (row, column), value in values.items():
        i, j = rows.index(row), columns.index(column)
        dark = np.isfinite(grid[i, j]) and float(norm(grid[i, j])) > 0.5
        shown = ".2f" if abs(value) < 1e4 else ".1e"
        text = f"{value:{shown}}\n± {errors[row, column]:{shown}}" if math.isfinite(value) else "none"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), [f"{c:,}" for c in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(head, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7, which="both")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
