"""A deterministic multistep sampler whose times and weights are given, as fitted to one network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from numerics import UserError
from samplers.base import GridSampler
from samplers.exponential import Multistep
from samplers.run import Nodes
from sde_lib import SDE
from sde_lib.time_grids import Custom


@dataclass(frozen=True, kw_only=True, repr=False)
class Tuned(GridSampler):
    r"""A linear multistep method in the denoised mean D whose times and weights are numbers, not rules.

        x_{i+1} = a_i x_i + w_i0 D(x_i, t_i) + w_i1 D(x_{i-1}, t_{i-1}) + ...          i = 0 ... N-1

    `DPMSolver` and `DDIM` are of this form, with weights that follow from the times. `samplers.tuning` fits both to a network
    and its SDE; for another network they mean nothing. One evaluation a step, N in all: the last step takes the place of the
    denoising. Because the weights are free, a time says only what the network is told, and need not be the state's.

    Args:
        grid: the times `(N+1,)`; D is asked for at all but the last.
        of_x: a_i, `(N,)`.
        weights: w_i, N rows of 1 to i + 1 numbers, the newest first.
        steps: N, of the grid.
        denoise: False; the method has no further evaluation.
        corrections: as in every `Sampler`.

    Raises:
        UserError: for a grid that is no list of times, or weights that do not fit it.
    """

    of_x: Sequence[float]
    weights: Sequence[Sequence[float]]
    denoise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.grid, Custom):
            raise UserError(f"got grid={self.grid!r}; expected the times (N+1,) that the weights were fitted at")
        if self.denoise:
            raise UserError("got denoise=True; expected False: the last step of a tuned sampler ends with clean data")
        of_x, weights = (
            tuple(map(float, self.of_x)),
            tuple(tuple(map(float, row)) for row in self.weights),
        )
        n = self.steps
        fits = len(of_x) == len(weights) == n and all(1 <= len(row) <= i + 1 for i, row in enumerate(weights))
        if not fits or not all(math.isfinite(v) for row in (of_x, *weights) for v in row):
            raise UserError(
                f"got {len(of_x)} factors and rows of {[len(row) for row in weights]} weights for {n} steps; expected {n} "
                "factors and in row i from 1 to i + 1 weights, all finite"
            )
        self._settle(of_x=of_x, weights=weights)

    def within(self, evaluations: int) -> Self:
        """This sampler, for its own number of evaluations.

        Raises:
            UserError: for another number.
        """
        if evaluations != self.steps:
            raise UserError(
                f"got a budget of {evaluations} evaluations for a sampler tuned to {self.steps}; expected {self.steps}: tune "
                "another"
            )
        return self

    def method(self, sde: SDE, times: Tensor) -> Multistep:
        """The step on the grid `times` `(N+1,)`."""
        return Multistep(
            value=Nodes(times, sde.alpha(times), sde.sigma(times)).denoised,
            of_x=list(self.of_x),
            predicting=[list(row) for row in self.weights],
            correcting=[None] * self.steps,
        )

    def asdict(self) -> dict[str, Any]:
        """The numbers, plain."""
        assert isinstance(self.grid, Custom)
        return {
            "times": list(self.grid.times),
            "of_x": list(self.of_x),
            "weights": [list(row) for row in self.weights],
        }

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Any]) -> Self:
        """From what `asdict` gives.

        Raises:
            UserError: where something is missing, is no list of numbers, or does not fit.
        """
        try:
            return cls(grid=numbers["times"], of_x=numbers["of_x"], weights=numbers["weights"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"got a tuned sampler that cannot be read ({type(error).__name__}: {error}); expected times, of_x and weights: "
                "tune it again"
            ) from error
