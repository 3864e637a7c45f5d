r"""What guidance gains and what it costs, scale by scale.

At each scale the same noise becomes samples of all classes in turn, which are judged by what guidance knows nothing of: a
classifier of clean data that had no part in drawing them (the share of samples that it puts into the class that was asked
for), and Fréchet distance, precision, recall and coverage against the data (`evaluation`). Large scales gain the first and lose
the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Dataset
from evaluation import Estimate, Features, default_features, evaluate_samples, nearest, share
from workflow.guidance_scales import Guided, ScalePoint, at_scales, draw_by_scale, finite
from workflow.trained_run import TrainedRun

MEASURES = ("FD", "precision", "recall", "coverage")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What says which class a sample is of, in data units, and has seen no sample of the model.

    Attributes:
        name: of it.
        features: in which samples are compared with data.
        classes: data `(N, *)` -> classes `(N,)`.
        log_probs: data `(N, *)` -> log-probabilities `(N, K)`, where it has them.
        accuracy: its share of right answers on the test split: what samples of a perfect model would be given.
    """

    name: str
    features: Features
    classes: Callable[[Tensor], Tensor]
    log_probs: Callable[[Tensor], Tensor] | None
    accuracy: Estimate


def judge_of(dataset: Dataset) -> Judge:
    """The classifier of `evaluation` for images; for other data the class of the nearest training sample."""
    features = default_features(dataset)
    train, test = dataset.split("train"), dataset.split("test")
    assert train.labels is not None and test.labels is not None  # the model has classes
    labels, log_probs = train.labels, None
    if dataset.levels is not None:

        def log_probs(x: Tensor) -> Tensor:
            found = features.extract(x).log_probs
            assert found is not None
            return found

        def classes(x: Tensor) -> Tensor:
            return log_probs(x).argmax(dim=1)

        name = features.name
    else:

        def classes(x: Tensor) -> Tensor:
            return labels[nearest(x.flatten(1), train.x.flatten(1))[1]]

        name = "the nearest training sample"
    right = classes(test.x) == test.labels
    return Judge(name=name, features=features, classes=classes, log_probs=log_probs, accuracy=share(right))


@dataclass(frozen=True, kw_only=True)
class SweepPoint(ScalePoint):
    """One scale, whose sample i is asked to be of class i mod K.

    Attributes:
        accuracy: the share of samples that the judge puts into the class that was asked for.
        by_class: the same of each class.
        measures: FD, precision, recall and coverage.
    """

    accuracy: Estimate
    by_class: tuple[Estimate, ...]
    measures: dict[str, Estimate]

    def measured(self) -> dict[str, Any]:
        return {
            "class_accuracy": self.accuracy.to_dict(),
            "by_class": [e.to_dict() for e in self.by_class],
            **{name: e.to_dict() for name, e in self.measures.items()},
        }


def sweep(
    run: TrainedRun, judge: Judge, guided: Guided, scales: Sequence[float], *, classes: int, n: int, name: str
) -> list[SweepPoint]:
    """The points of one kind of guidance.

    Args:
        scales: in order.
        classes: K; sample i is asked to be of class i mod K.
        n: samples at each scale.
        name: shown while they are drawn.
    """
    labels = torch.arange(n) % classes
    points = []
    for drawn in at_scales(run, guided, labels, scales, name=name):
        made = run.transform.to_data(drawn.x)
        right = judge.classes(made) == labels
        report = evaluate_samples(made, run.dataset, features=judge.features, measures=MEASURES)
        points.append(
            SweepPoint(
                drawn=drawn,
                accuracy=share(right),
                by_class=tuple(share(right[labels == k]) for k in range(classes)),
                measures={key: report[key].score for key in MEASURES},
            )
        )
    return points


def floors(run: TrainedRun, judge: Judge) -> dict[str, Estimate]:
    """What held-out data score in place of samples, with the judge's own accuracy."""
    held_out = run.dataset.split("test").x
    report = evaluate_samples(held_out, run.dataset, features=judge.features, measures=MEASURES)
    return {"class_accuracy": judge.accuracy, **{key: report[key].floor for key in MEASURES}}


def save_trade_off(file: Path, sweeps: dict[str, list[SweepPoint]], floor: dict[str, Estimate]) -> None:
    """Draws class accuracy against Fréchet distance, and precision, recall and coverage by scale, one line a kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    colors = [f"C{i}" for i in range(len(sweeps))]
    for color, (kind, points) in zip(colors, sweeps.items(), strict=True):
        fd = [p.measures["FD"] for p in points]
        accuracy = [p.accuracy for p in points]
        left.errorbar(
            [e.value for e in accuracy],
            [e.value for e in fd],
            xerr=[e.stderr for e in accuracy],
            yerr=[finite(e.stderr) for e in fd],
            marker="o",
            capsize=2,
            color=color,
            label=kind,
        )
        for point, a, d in zip(points, accuracy, fd, strict=True):
            left.annotate(f"{point.scale:g}", (a.value, d.value), textcoords="offset points", xytext=(5, 5), fontsize=8)
        for key, style in (("precision", "--"), ("recall", "-."), ("coverage", "-")):
            values = [p.measures[key] for p in points]
            draw_by_scale(right, points, values, linestyle=style, markersize=3, color=color, label=f"{key}, {kind}")
    left.axhline(floor["FD"].value, color="0.6", linewidth=1)
    left.axvline(floor["class_accuracy"].value, color="0.6", linewidth=1)
    left.set_xlabel("class accuracy by an independent classifier (grey: held-out data)")
    left.set_ylabel("Fréchet distance")
    left.set_yscale("log")
    right.set_xlabel("scale of the guidance")
    right.set_ylim(0, 1.02)
    for panel in (left, right):
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
