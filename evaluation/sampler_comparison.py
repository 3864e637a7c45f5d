"""Samplers side by side: quality against what they cost, from the same noise.

    comparison = compare_samplers(
        sde, score, {"ddim": DDIM(), "dpm_solver": DPMSolver()}, (1000, 1, 8, 8), nfe=(10, 20, 50), quality=quality
    )
    print(comparison)                        # a line for each sampler and budget
    comparison.save_plot("quality.png")
    comparison.save_contact_sheet("sheet.png", columns=8)

The cost is the counted number of calls of the score and the wall time; a budget is met by as many steps as fit into it,
and a method that chooses its own steps runs once. All methods start sample i from the same noise (`SampleStreams`), so a
row of pictures shows what each makes of it. Quality is any function of samples to named values with errors:
`dataset_quality` compares with a data set by the measures of `evaluation`; `flow_error` measures, where the score is exact
or for a given network, the distance to the tightly solved flow from the same noise, sample by sample, which is an error of
the deterministic methods alone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from data import DataError, Dataset, Transform
from evaluation.estimate import Estimate
from evaluation.features import Features
from evaluation.pictures import save_grid
from evaluation.report import evaluate_samples
from numerics import Dopri5, SampleStreams, UserError, take
from samplers import ProbabilityFlow, Sampler
from sde_lib import SDE, Score

__all__ = ["Comparison", "ComparisonRow", "compare_samplers", "dataset_quality", "flow_error"]

Quality = Callable[[Tensor], Mapping[str, Estimate]]


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One sampler at one budget.

    Attributes:
        name: as given.
        code: the code that makes the sampler.
        budget: evaluations it was allowed, or None for a method that chooses its own.
        nfe: calls of the score that it made, the mean over chunks.
        seconds: wall time for all samples.
        quality: named estimates.
        samples: the first samples, on the CPU, for pictures.
    """

    name: str
    code: str
    budget: int | None
    nfe: float
    seconds: float
    quality: Mapping[str, Estimate]
    samples: Tensor = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare_samplers` found.

    Attributes:
        rows: one row for each sampler and budget, in the order in which they were measured.
    """

    rows: tuple[ComparisonRow, ...]

    def __str__(self) -> str:
        keys = list(dict.fromkeys(key for row in self.rows for key in row.quality))
        head = ["sampler", "nfe", "seconds", *keys]
        body = [
            [row.name, f"{row.nfe:.4g}", f"{row.seconds:.2f}", *(_shown(row.quality.get(key)) for key in keys)]
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in [head, *body]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON (NaN as None)."""
        return {
            "rows": [
                {
                    "name": row.name,
                    "sampler": row.code,
                    "budget": row.budget,
                    "nfe": row.nfe,
                    "seconds": row.seconds,
                    "quality": {
                        key: {"value": _plain(e.value), "stderr": _plain(e.stderr)} for key, e in row.quality.items()
                    },
                }
                for row in self.rows
            ]
        }

    def save_plot(self, path: str | os.PathLike[str]) -> None:
        """Write each measure against evaluations and against seconds, on logarithmic axes.

        Raises:
            DataError: no measure, or the file cannot be written.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        keys = list(dict.fromkeys(key for row in self.rows for key in row.quality))
        if not keys:
            raise DataError("the comparison has no measure to plot; give compare_samplers a quality")
        figure = Figure(figsize=(9, 3.2 * len(keys)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(keys), 2, squeeze=False)
        names = list(dict.fromkeys(row.name for row in self.rows))
        for line, key in zip(axes, keys, strict=True):
            for axis, cost in zip(line, ("nfe", "seconds"), strict=True):
                for name in names:
                    rows = [row for row in self.rows if row.name == name and key in row.quality]
                    axis.errorbar(
                        [getattr(row, cost) for row in rows],
                        [row.quality[key].value for row in rows],
                        yerr=[2 * _or_zero(row.quality[key].stderr) for row in rows],
                        marker="o",
                        markersize=3,
                        label=name,
                    )
                axis.set(
                    xscale="log",
                    yscale="log",
                    xlabel="evaluations of the score" if cost == "nfe" else "seconds",
                    ylabel=f"{key} (2 standard errors)",
                )
        axes[0][1].legend(fontsize="small")
        try:
            figure.savefig(path, dpi=120)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be written: {error}") from error

    def save_contact_sheet(
        self,
        path: str | os.PathLike[str],
        columns: int = 8,
        *,
        to_unit: Callable[[Tensor], Tensor] | None = None,
        scale: int = 2,
    ) -> None:
        """Write one picture: a row for each of `rows`, with its name and evaluations, a column for each noise.

        Args:
            to_unit: samples `(n, C, H, W)` to pixels in [0, 1]; from [-1, 1] unless given.

        Raises:
            DataError: as `evaluation.save_grid`.
        """
        columns = min(columns, *(len(row.samples) for row in self.rows))
        images = torch.cat([row.samples[:columns] for row in self.rows])
        pixels = (images + 1) / 2 if to_unit is None else to_unit(images)
        save_grid(path, pixels, columns, scale=scale, rows=[f"{row.name}, {row.nfe:.0f}" for row in self.rows])


class ByBudget(Protocol):
    """What stands for another sampler at each budget, such as those that were tuned to a model."""

    @property
    def evaluations(self) -> int:
        """Of any of them."""

    def within(self, evaluations: int) -> Sampler:
        """The one for a budget; a UserError where there is none."""


def compare_samplers(
    sde: SDE,
    score: Score,
    samplers: Mapping[str, Sampler | ByBudget],
    shape: Sequence[int],
    *,
    nfe: Iterable[int] = (10, 20, 50, 100),
    quality: Quality | None = None,
    x_T: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 1000,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    keep: int = 64,
    progress: Callable[[ComparisonRow], None] | None = None,
) -> Comparison:
    """Runs every sampler at every budget from the same noise.

    Args:
        sde, score: what is sampled.
        samplers: by the name to show; their own numbers of steps are replaced.
        shape: `(N, *)`, all samples of a run.
        nfe: budgets of evaluations. One into which not a single step fits is left out for that sampler.
        quality: of all samples of a run, `(N, *)` on the CPU.
        x_T: the states to start from, `(N, *)`; draws from the prior unless given.
        seed: of the noise; sample i has stream i, whatever the batch size.
        batch_size: samples in one call.
        keep: how many samples of each run are kept for pictures.
        device, dtype: of the states.
        progress: called with each row when it is there.

    Raises:
        UserError: no samplers, no budgets, a shape or an x_T that does not fit.
    """
    shape, budgets = tuple(int(n) for n in shape), tuple(nfe)
    if not samplers or not budgets or len(shape) < 2 or min(shape) < 1 or batch_size < 1:
        raise UserError(
            f"got {len(samplers)} samplers, budgets {budgets}, shape {shape}, batch_size {batch_size}; expected at least "
            "one sampler, one budget, a shape (N, *) and a batch of at least 1"
        )
    if x_T is not None and tuple(x_T.shape) != shape:
        raise UserError(f"got x_T of shape {tuple(x_T.shape)}; expected shape={shape}")
    rows = []
    for name, sampler in samplers.items():
        for budget, one in _at_budgets(sampler, budgets):
            start, made, calls = time.perf_counter(), [], []
            for first in range(0, shape[0], batch_size):
                ids = torch.arange(first, min(first + batch_size, shape[0]))
                result = take(one, ids)(
                    sde,
                    take(score, ids),
                    (len(ids), *shape[1:]),
                    x_T=None if x_T is None else x_T[ids],
                    generator=SampleStreams(seed, ids),
                    device=device,
                    dtype=dtype,
                )
                made.append(result.x.to("cpu"))
                calls.append(result.nfe)
            seconds = time.perf_counter() - start
            x = torch.cat(made)
            row = ComparisonRow(
                name=name,
                code=repr(one),
                budget=budget,
                nfe=sum(calls) / len(calls),
                seconds=seconds,
                quality={} if quality is None else dict(quality(x)),
                samples=x[:keep].clone(),
            )
            rows.append(row)
            if progress is not None:
                progress(row)
    return Comparison(rows=tuple(rows))


def _at_budgets(sampler: Sampler | ByBudget, budgets: tuple[int, ...]) -> list[tuple[int | None, Sampler]]:
    if isinstance(sampler, Sampler) and sampler.evaluations is None:
        return [(None, sampler)]
    found: list[tuple[int | None, Sampler]] = []
    for budget in budgets:
        try:
            found.append((budget, sampler.within(budget)))
        except ValueError:
            continue
    if not found:
        sampler.within(max(budgets))  # says why
    return found


def dataset_quality(
    dataset: Dataset,
    transform: Transform,
    *,
    features: Features | None = None,
    measures: tuple[str, ...] | None = ("FD", "SW"),
) -> Quality:
    """Quality of samples in the model's units by the measures of `evaluation.evaluate_samples`."""

    def quality(x: Tensor) -> dict[str, Estimate]:
        report = evaluate_samples(transform.to_data(x), dataset, features=features, measures=measures)
        return {measure.name: measure.score for measure in report.measures}

    return quality


def flow_error(
    sde: SDE, score: Score, x_T: Tensor, *, denoise: bool = True, tolerance: float = 1e-6, batch_size: int = 1000
) -> Quality:
    """The root-mean-square distance, per entry, to the flow's solution from the same `x_T` `(N, *)`, with its error over
    the samples. Methods with noise do not approximate that solution, and score about the distance of two samples."""
    flow = ProbabilityFlow(solver=Dopri5(rtol=tolerance, atol=tolerance), denoise=denoise)
    parts = []
    for first in range(0, len(x_T), batch_size):
        ids = torch.arange(first, min(first + batch_size, len(x_T)))
        parts.append(flow(sde, take(score, ids), (len(ids), *x_T.shape[1:]), x_T=x_T[ids]).x.to("cpu"))
    truth = torch.cat(parts)

    def quality(x: Tensor) -> dict[str, Estimate]:
        if x.shape != truth.shape:
            raise UserError(f"got samples of shape {tuple(x.shape)}; expected {tuple(truth.shape)}, as x_T")
        squares = (x - truth).double().flatten(1).square().mean(dim=1)
        value = math.sqrt(float(squares.mean()))
        stderr = float(squares.std()) / math.sqrt(len(squares)) / (2 * value) if value > 0 and len(squares) > 1 else 0.0
        return {"flow error": Estimate(value=value, stderr=stderr)}

    return quality


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.3g}" + (f" ± {estimate.stderr:.1g}" if math.isfinite(estimate.stderr) else "")


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
