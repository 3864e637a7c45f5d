"""The curves of a training run, from its metrics.jsonl: a picture for the report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.reporting import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]
_NOISE = re.compile(r"loss_at_noise/(\d+)_of_(\d+)")
_BOUNDS = {"eval/bits_per_dim_bound": "bits/dim", "eval/nats_per_dim_bound": "nats per dimension"}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; torn ones are left out, and none are there without a file."""
    file = folder / METRICS
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
        except ValueError:
            continue
    return rows


def curve(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Steps and values of one quantity, where it was finite."""
    found = [(r["step"], float(r[name])) for r in rows if isinstance(r.get(name), int | float)]
    finite = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def save_curves(folder: Path) -> Path | None:
    """Draws them into RUN/curves.png; None where there are no metrics."""
    rows = read_metrics(folder)
    if not rows:
        return None
    file = folder / "curves.png"
    draw_curves(rows).savefig(file, dpi=100)
    return file


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, loss by noise level, bound, learning rate, gradient norm and speed, as far as they are there."""
    # a figure of its own on the Agg canvas: no global state and no display, whatever the user's backend
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loss, held_out = curve(rows, "loss"), curve(rows, "eval/loss")
    levels = sorted({(int(m[1]), int(m[2])) for row in rows for m in map(_NOISE.fullmatch, row) if m})
    bound = next((name for name in _BOUNDS if curve(rows, name)[0]), None)
    rest = [("learning rate", "learning_rate"), ("gradient norm", "gradient_norm"), ("images/s", "images_per_second")]
    rest = [(title, name) for title, name in rest if curve(rows, name)[0]]

    count = 1 + bool(levels) + (bound is not None) + len(rest)
    columns = min(3, count)
    figure = Figure(figsize=(4 * columns, 2.9 * -(-count // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    for panel in panels[:count]:
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=8)
    todo = iter(panels)

    panel = next(todo)
    panel.plot(*loss, marker=_marker(loss), markersize=3, label="training")
    if held_out[0]:
        panel.plot(*held_out, "o", markersize=4, label="validation, averaged weights")
        panel.legend(fontsize=8)
    panel.set_title("loss", fontsize=10)
    if loss[1] and min(loss[1]) > 0 and max(loss[1]) > 20 * min(loss[1]):
        panel.set_yscale("log")
    if levels:
        panel = next(todo)
        for i, of in levels:
            values = curve(rows, f"loss_at_noise/{i}_of_{of}")
            color = colormaps["viridis"](0.9 * (i - 1) / max(1, of - 1))
            panel.plot(*values, marker=_marker(values), markersize=3, color=color, label=f"{i} of {of}")
        low, high = panel.get_ylim()
        if all(min(curve(rows, f"loss_at_noise/{i}_of_{of}")[1], default=1.0) > 0 for i, of in levels):
            panel.set_yscale("log")
            low, high = panel.get_ylim()
            panel.set_ylim(low / (high / low) ** 0.2, high)  # room for the legend
        else:  # score matching without a target is negative
            panel.set_ylim(low - 0.2 * (high - low), high)
        panel.legend(fontsize=7, ncols=5, loc="lower center", handlelength=1, columnspacing=0.8)
        panel.set_title("loss by noise level, 1 the least", fontsize=10)
    if bound is not None:
        panel = next(todo)
        at, heights = curve(rows, bound)
        errors = dict(zip(*curve(rows, f"{bound}_stderr"), strict=True))
        panel.errorbar(at, heights, [errors.get(step, 0.0) for step in at], marker="o", markersize=4, capsize=2)
        panel.set_title(f"validation bound, {_BOUNDS[bound]}", fontsize=10)
    for panel, (title, name) in zip(todo, rest, strict=False):
        values = curve(rows, name)
        panel.plot(*values, marker=_marker(values), markersize=3)
        panel.set_ylim(bottom=0)
        panel.set_title(title, fontsize=10)
    for panel in panels[max(0, count - columns) : count]:
        panel.set_xlabel("step", fontsize=8)
    return figure


def _marker(values: Curve) -> str:
    """A line of few points shows them."""
    return "o" if len(values[0]) < 10 else ""
