r"""What studies of guidance have in common, whatever samples are asked for: the scales, and the samples at each.

    s_0 + scale (s_c - s_0)

At every scale the same noise becomes samples of the same labels, so that what differs between two scales is guidance's doing.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from evaluation import Estimate
from guidance.classifier_free import classifier_free, require_interval
from numerics import UserError, require_count, require_range
from sde_lib import Score
from workflow.pictures import draw_samples
from workflow.trained_run import TrainedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Guided = Callable[[Tensor, float], Score]
"""Labels `(n,)` and a scale -> the guided score."""


@dataclass(frozen=True, kw_only=True)
class GuidanceStudy:
    """Scales of guidance, and what likelihoods say of the labels.

    Args:
        scales: of the guidance, finite and rising.
        interval: log-SNR (low, high) in which classifier-free guidance guides; outside it the score is the conditional one, at
            every scale. None for everywhere.
        rescale: how much of the denoised mean's excess standard deviation classifier-free guidance takes back, in [0, 1].
        images: test data whose labels likelihoods are asked about, at least 2; 0 for none.
        flow_steps: of the flow, for it.

    Raises:
        UserError: scales that do not rise, or another value out of its range.
    """

    scales: tuple[float, ...]
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    images: int
    flow_steps: int

    def __post_init__(self) -> None:
        several = isinstance(self.scales, Sequence) and len(self.scales) > 0
        if (
            not several
            or not all(isinstance(s, int | float) and math.isfinite(s) for s in self.scales)
            or list(self.scales) != sorted(set(self.scales))
        ):
            raise UserError(f"got scales={self.scales!r}; expected different numbers, rising, such as (0.0, 1.0, 3.0)")
        require_interval(self.interval)
        require_range(self.rescale, "rescale", 0, 1)
        require_count(self.images, "images", 0)
        if self.images == 1:
            raise UserError("got images=1, of which there are no errors; expected at least 2, or 0 for none")
        require_count(self.flow_steps, "flow_steps", 2)

    def classifier_free(self, run: TrainedRun) -> Guided:
        """The run's score with classifier-free guidance."""

        def guided(labels: Tensor, scale: float) -> Score:
            return classifier_free(run.model, labels, scale, interval=self.interval, rescale=self.rescale)

        return guided


class AtScale(NamedTuple):
    """Samples at one scale.

    Attributes:
        scale: of the guidance.
        nfe: calls of the guided score for a batch.
        seconds: of drawing, for all samples.
        x: `(n, *)`, the samples in model units.
    """

    scale: float
    nfe: int
    seconds: float
    x: Tensor


def at_scales(
    run: TrainedRun, guided: Guided, labels: Tensor, scales: Sequence[float], *, name: str
) -> Iterator[AtScale]:
    """A sample of each label at every scale, by the run's first sampler from the same noise.

    Args:
        labels: `(n,)`.
        name: shown while they are drawn.
    """
    sampler = next(iter(run.setup.samplers.values()))
    for scale in scales:
        begun = time.perf_counter()
        score = guided(labels.to(run.device), scale)
        x, nfe = draw_samples(run.setup, score, sampler, len(labels), name=f"{name}, scale {scale:g}")
        yield AtScale(float(scale), nfe, time.perf_counter() - begun, x)


@dataclass(frozen=True, kw_only=True)
class ScalePoint(ABC):
    """What was found of the samples at one scale: `drawn`, and what a study measured of them."""

    drawn: AtScale

    @property
    def scale(self) -> float:
        """Of the guidance."""
        return self.drawn.scale

    @property
    def nfe(self) -> int:
        """Calls of the guided score for a batch."""
        return self.drawn.nfe

    @property
    def x(self) -> Tensor:
        """The samples in model units, `(n, *)`."""
        return self.drawn.x

    @abstractmethod
    def measured(self) -> dict[str, Any]:
        """What was measured, in plain types."""

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        cost = {"samples": len(self.drawn.x), "nfe": self.nfe, "seconds": self.drawn.seconds}
        return {"scale": self.scale, **self.measured(), **cost}


def draw_by_scale(panel: Axes, points: Sequence[ScalePoint], values: Sequence[Estimate], **style: Any) -> None:
    """Draws an estimate of each point, with its error bar, against the scale."""
    errors = [finite(e.stderr) for e in values]
    panel.errorbar([p.scale for p in points], [e.value for e in values], yerr=errors, marker="o", **style)


def finite(error: float) -> float:
    """An error bar's length: nothing where the error is not known."""
    return error if math.isfinite(error) else 0.0
