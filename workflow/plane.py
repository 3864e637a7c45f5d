"""The truth beside a run on points in the plane: the data's law on a grid, in the model's units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data import Dataset
from data.transforms import Transform
from evaluation.plane import GridLaw, Plane
from numerics import LogDensity, UserError
from workflow.system import Config

_MARGIN = 1.0  # beyond the outermost point, in model units, where the data's standard deviation is about 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """The data's law and its score.

    Attributes:
        law: the density on a grid, in model units.
        score: `(n, n, 2)`, its gradient; 0 where there is no mass.
        log_density: the density at any points `(B, 2)`, `(B,)` nats.
    """

    law: GridLaw
    score: Tensor = field(repr=False)
    log_density: LogDensity = field(repr=False)

    @property
    def plane(self) -> Plane:
        """The grid."""
        return self.law.plane

    @property
    def information(self) -> float:
        """E |grad log p|^2, the Fisher information of a shift."""
        return self.law.fisher(self.score, torch.zeros_like(self.score))

    @property
    def narrowest(self) -> float:
        """The standard deviation of a Gaussian of as much information."""
        return math.sqrt(2 / self.information)


def require_plane(
    config: Config, system: str, sigmas: Sequence[float] = (), *, n: int = 400, margin: float = _MARGIN
) -> None:
    """Refuses data whose density in the plane is not known, or not resolved by the grid of `truth`, before anything is written.

    Args:
        sigmas: noise levels at which the law is to be known.
        n, margin: as in `truth`.

    Raises:
        UserError: data of another shape, without a log-density or with jumps in it, or a noise level below the grid's spacing.
    """
    from workflow.setup import load_data  # it imports the systems

    dataset, transform = load_data(config["data"])
    if dataset.event_shape != (2,) or dataset.log_prob is None:
        known = "moons, gaussians, rings, pinwheel, spirals or swiss_roll"
        raise UserError(
            f"got the data {dataset.name} of shape {dataset.event_shape} for {system}, which compares with the true density; "
            f"expected points in the plane with a known one: --config.data.name={known}"
        )
    spacing = truth(dataset, transform, n=n, margin=margin).plane.spacing
    for sigma in sigmas:
        if sigma < spacing:
            raise UserError(
                f"got the noise level {sigma:g} for {system}, whose grid of {n} x {n} points has a spacing of {spacing:.3g}; "
                "expected no less"
            )


def truth(
    dataset: Dataset, transform: Transform, *, n: int = 400, margin: float = _MARGIN, on: Plane | None = None
) -> Truth:
    """The law of the data set's points in model units.

    Args:
        n: points a side of the grid.
        margin: of the grid around the outermost point, in model units.
        on: the grid, in place of one of `n` points around the data.

    Raises:
        UserError: a density that such a grid does not resolve, as one with jumps, or points outside the grid.
    """
    log_prob = dataset.log_prob
    assert log_prob is not None and dataset.event_shape == (2,)  # `require_plane` has seen to that
    farthest = float(transform.centres(dataset.split("train").x).abs().max())
    plane = Plane(half=farthest + margin, n=n) if on is None else on
    if farthest > plane.half:
        raise UserError(
            f"got {dataset.name} with points as far out as {farthest:.3g}, in units of the data that are trained on first; "
            f"expected them in the plane around those, up to {plane.half:.3g}: take data of about the same extent"
        )
    per_point = 2 * transform.log_det

    def log_density(y: Tensor) -> Tensor:
        return log_prob(transform.inverse(y)) - per_point

    def score(y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_density(y).sum(), y)
        return slope

    law = plane.law(log_density)
    if abs(law.log_z) > 1e-4:
        raise UserError(
            f"got a density whose integral on a grid of {plane.n} x {plane.n} points is off by {abs(law.log_z):.1g}; expected "
            "next to nothing: take data without jumps, or more noise in them"
        )
    return Truth(law=law, score=law.field(score), log_density=log_density)
