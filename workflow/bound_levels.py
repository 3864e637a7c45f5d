r"""The bound of a chain term by term, over its levels: L_T, L_{N-1}, ..., L_1, L_0.

Every level gets M independent draws of an image of the split and a noise, so a level's mean estimates the split's mean term.
The bar is sqrt((M - 1) / (M - 3)) times the mean's standard error: a Student ratio of M - 1 degrees of freedom has that
standard deviation, so the root mean square of error / bar is 1 where a level's draws are nearly normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from likelihood import GaussianChain
from numerics import Generator, require_count, uniform
from sde_lib import Score, prior_mismatch
from workflow import progress

if TYPE_CHECKING:
    from data.transforms import Transform

LEAST_DRAWS = 4


@dataclass(frozen=True, kw_only=True)
class BoundLevels:
    """The terms of a bound in bits/dim, from the least noise to the most.

    Attributes:
        means, bars: `(N + 2,)`: L_0, L_1 ... L_N of the chain's N steps, and L_T; the bars are standard errors.
        draws: M, of image and noise for each.
    """

    means: Tensor
    bars: Tensor
    draws: int

    @property
    def total(self) -> float:
        """The bound, bits/dim."""
        return float(self.means.sum())

    @property
    def stderr(self) -> float:
        """Of the total: the levels' draws are independent."""
        return float(self.bars.square().sum().sqrt())

    def asdict(self) -> dict[str, Any]:
        """In plain types."""
        return {
            "mean": self.total,
            "stderr": self.stderr,
            "draws": self.draws,
            "terms": self.means.tolist(),
            "bars": self.bars.tolist(),
        }


def levels_of(
    chain: GaussianChain,
    score: Score,
    x_0: Tensor,
    *,
    data: Tensor | None = None,
    transform: Transform | None = None,
    log_det: float = 0.0,
    draws: int = 32,
    generator: Generator = None,
    batch_size: int = 1024,
    shown: bool = True,
) -> BoundLevels:
    """The terms of the bound on images `x_0` `(n, *)`.

    Args:
        data, transform: grey values `(n, *)` and their map, where bins' masses are scored.
        log_det: of the transform in nats a dimension, where densities are.
        draws: M for each level, at least 4.
    """
    require_count(draws, "draws", LEAST_DRAWS)
    bits = x_0[0].numel() * math.log(2)
    n, N, device = len(x_0), chain.steps, x_0.device

    def chosen(count: int) -> Tensor:
        return (
            (uniform((count, 1), generator, device=device, dtype=torch.float64).squeeze(1) * n).long().clamp(max=n - 1)
        )

    with torch.no_grad():
        at = chosen(draws)
        first = chain.reconstruction(
            score, x_0[at], data=None if data is None else data[at], transform=transform, generator=generator
        )
        rows = [first / bits - log_det / math.log(2)]
        per_batch = max(1, batch_size // draws)
        with progress.bar(total=N, name="bound by level", unit="level", shown=shown) as bar:
            for begin in range(1, N + 1, per_batch):
                levels = torch.arange(begin, min(begin + per_batch, N + 1), device=device)
                found = chain.divergence(
                    score, x_0[chosen(len(levels) * draws)], levels.repeat_interleave(draws), generator
                )
                rows += list((found / bits).reshape(len(levels), draws))
                bar.update(len(levels))
        rows.append(prior_mismatch(chain.sde, x_0[chosen(draws)]) / bits)
    terms = torch.stack([row.double().cpu() for row in rows])
    bars = terms.std(dim=1) / math.sqrt(draws) * math.sqrt((draws - 1) / (draws - 3))
    return BoundLevels(means=terms.mean(dim=1), bars=bars, draws=draws)


def save_levels(file: Path, found: Mapping[str, BoundLevels], times: Tensor) -> None:
    """Draws the terms and their running sum from the noise down, for bounds of one chain's times `(N + 1,)` by their names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    terms, sums = figure.subplots(1, 2)
    t = times.tolist()
    floor = min(float(v.means[v.means > 0].min()) for v in found.values() if bool((v.means > 0).any()))
    for k, (name, values) in enumerate(found.items()):
        color, mean, bar = f"C{k}", values.means, values.bars
        low, high = (mean[1:-1] - bar[1:-1]).clamp(min=0.3 * floor), mean[1:-1] + bar[1:-1]
        terms.fill_between(t[1:], low.tolist(), high.tolist(), color=color, alpha=0.35, linewidth=0)
        terms.plot(t[1:], mean[1:-1].tolist(), color=color, linewidth=0.8, label=name)
        # L_0 may be a density's, below 0, where a logarithm has no place for it: its value stands beside its mark
        for x, value, error, mark, label in (
            (t[0], mean[0], bar[0], "s", "L_0"),
            (t[-1], mean[-1], bar[-1], "v", "L_T"),
        ):
            if float(value) > 0:
                terms.errorbar([x], [float(value)], [float(error)], marker=mark, color=color, capsize=3, markersize=5)
                terms.annotate(
                    label, (x, float(value)), xytext=(-6, 8), ha="center", textcoords="offset points", fontsize=8
                )
        running = mean.flip(0).cumsum(0).flip(0)
        spread = bar.square().flip(0).cumsum(0).flip(0).sqrt()
        order = [0.0, *t]  # L_0 is added at the data
        part, width = running, spread
        sums.fill_between(
            order, (part - 2 * width).tolist(), (part + 2 * width).tolist(), color=color, alpha=0.3, linewidth=0
        )
        sums.plot(
            order, part.tolist(), color=color, linewidth=1, label=f"{name}: {values.total:.3f} ± {values.stderr:.3f}"
        )
    terms.set(xscale="log", yscale="log", xlabel="t, from the data to the noise", ylabel="bits/dim a level")
    terms.set_title("terms of the bound, one standard error", fontsize=10)
    sums.set(xscale="symlog", xlabel="t", ylabel="bits/dim")
    sums.set_xscale("symlog", linthresh=t[0])
    sums.set_title("what has been paid from T down to t, two standard errors", fontsize=10)
    for axes in (terms, sums):
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
