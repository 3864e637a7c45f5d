r"""Do samples show what their caption says, also where the words were never seen together?

A classifier of each attribute that had no part in the training (`evaluation.attributes`) looks at samples of captions, at each
scale of the guidance from the same noise. What guidance costs is seen in the variety of a caption's samples:

    variety = mean over captions of the variance of a pixel among one caption's samples / the same of real pictures

which is 1 for samples as different from each other as real pictures of one caption are, and 0 for equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation import AttributeClassifier, Estimate, share
from numerics import UserError
from workflow.guidance_scales import Guided, ScalePoint, at_scales, draw_by_scale
from workflow.trained_run import TrainedRun

ALL = "all of them"
"""The share of samples in which every attribute is right."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What says whether pictures show their captions.

    Attributes:
        classifier: of the attributes.
        attributes: classes `(N,)` -> the values of each attribute, `(N,)`.
    """

    classifier: AttributeClassifier
    attributes: Callable[[Tensor], Mapping[str, Tensor]]

    def accuracy(self, images: Tensor, labels: Tensor) -> dict[str, Estimate]:
        """The share of images `(N, *)`, in data units, that show each attribute of classes `(N,)`, and all of them."""
        right = self.classifier.right(images, self.attributes(labels))
        every = torch.stack(list(right.values())).all(dim=0)
        return {**{name: share(ok) for name, ok in right.items()}, ALL: share(every)}


@dataclass(frozen=True, kw_only=True)
class CaptionPoint(ScalePoint):
    """Samples of captions at one scale.

    Attributes:
        accuracy: by attribute, and of all of them.
        variety: of a caption's samples, that of real pictures being 1.
        each: samples of a caption.
    """

    accuracy: dict[str, Estimate]
    variety: Estimate
    each: int

    @property
    def by_caption(self) -> Tensor:
        """The samples in model units, `(captions, each, *)`."""
        return self.x.reshape(-1, self.each, *self.x.shape[1:])

    def measured(self) -> dict[str, Any]:
        return {
            "accuracy": {name: e.to_dict() for name, e in self.accuracy.items()},
            "variety": self.variety.to_dict(),
            "captions": len(self.x) // self.each,
        }


def sweep(
    run: TrainedRun,
    judge: Judge,
    guided: Guided,
    labels: Tensor,
    scales: Sequence[float],
    *,
    each: int,
    real: Tensor,
    name: str,
) -> list[CaptionPoint]:
    """The points of some captions.

    Args:
        labels: the captions' classes, `(K,)`.
        each: samples of each, at least 2.
        real: real pictures of them, `(K, R, *)` in data units, R at least 2.
        name: shown while they are drawn.
    """
    asked = labels.repeat_interleave(each)
    points = []
    for drawn in at_scales(run, guided, asked, scales, name=name):
        made = run.transform.to_data(drawn.x)
        points.append(
            CaptionPoint(
                drawn=drawn,
                accuracy=judge.accuracy(made, asked),
                variety=variety(made.reshape(-1, each, *made.shape[1:]), real),
                each=each,
            )
        )
    return points


def variety(samples: Tensor, real: Tensor) -> Estimate:
    """How different samples `(K, S, *)` of one caption are from each other, in units of real pictures `(K, R, *)` of it.

    The standard error is that of a ratio of means over the captions.

    Raises:
        UserError: a single sample or picture of a caption.
    """
    if min(samples.shape[1], real.shape[1]) < 2:
        raise UserError(
            f"got {samples.shape[1]} samples and {real.shape[1]} pictures of a caption; expected at least 2 each"
        )
    own, wanted = (x.double().var(dim=1).flatten(1).mean(dim=1) for x in (samples, real))
    ratio, n = float(own.sum() / wanted.sum()), len(own)
    spread = float((own - ratio * wanted).square().sum().sqrt() / wanted.sum())
    return Estimate(value=ratio, stderr=spread * math.sqrt(n / (n - 1)) if n > 1 else math.nan)


def save_sweep(
    file: Path, sweeps: Mapping[str, list[CaptionPoint]], floor: Mapping[str, Mapping[str, Estimate]]
) -> None:
    """Draws the accuracy of each attribute by scale, a panel for each kind of captions (dashed: of real pictures), and the
    variety."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (len(sweeps) + 1), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    *panels, last = figure.subplots(1, len(sweeps) + 1)
    for panel, (kind, points) in zip(panels, sweeps.items(), strict=True):
        for i, name in enumerate(points[0].accuracy):
            draw_by_scale(panel, points, [p.accuracy[name] for p in points], capsize=2, color=f"C{i}", label=name)
            panel.axhline(floor[kind][name].value, color=f"C{i}", linestyle="--", linewidth=0.8)
        panel.set_title(kind, fontsize=10)
        panel.set_ylabel("share of samples that show it (dashed: of real glyphs)", fontsize=8)
        panel.set_ylim(0, 1.02)
    for kind, points in sweeps.items():
        draw_by_scale(last, points, [p.variety for p in points], label=kind)
    last.axhline(1, color="0.6", linewidth=0.8)
    last.set_title("variety of a caption's samples (real glyphs: 1)", fontsize=10)
    for panel in (*panels, last):
        panel.set_xlabel("scale of the guidance", fontsize=8)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
