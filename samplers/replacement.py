"""Replacement: steps without condition, in which the measured part is put back each time."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from numerics import UserError
from samplers.ancestral import Ancestral
from samplers.measured import Clamp, MeasuredSampler
from samplers.predictors import Predictor
from samplers.run import Run
from samplers.step import Step
from sde_lib import SDE


@dataclass(frozen=True, kw_only=True, repr=False)
class Replacement(MeasuredSampler):
    r"""Unconditional steps; after each one the measured coordinates are replaced by y, noised to that time.

    (Song et al. 2021, arXiv:2011.13456, appendix I.2, for pixels, and, by an orthogonal change of coordinates as here, for
    colours.) The noise of the measurement is a part of what is added, see `samplers.measured.Clamp`. It is not exact, however
    many the steps: x_t is drawn with y in sight, but what is not measured learns of y only through the score. Measured with
    less noise than the last step begins at, and than data of size 1, the values are put in a last time, after denoising: few
    steps would lose them. One evaluation a step, no derivative.

    Args:
        measurement: of an operator with an SVD.
        predictor: of the unconditional step.
        steps, grid, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for an operator without an SVD; when sampling, for a batch that the measurement is not of.
    """

    predictor: Predictor = field(default_factory=Ancestral)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.predictor, Predictor):
            raise UserError(f"got predictor={self.predictor!r}; expected an object such as Ancestral()")

    def method(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`."""
        down, clamp = self.predictor.prepare(sde, times), Clamp(self.measurement, self._svd, sde, times)

        def step(i: int, x: Tensor, run: Run) -> Tensor:
            return clamp(i + 1, down(i, x, run), run)

        return step
