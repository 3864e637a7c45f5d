"""RePaint: replacement with steps taken again, so that the parts of a sample come to agree."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from numerics import UserError, require_count
from samplers.ancestral import Ancestral
from samplers.measured import Clamp, MeasuredSampler
from samplers.predictors import Predictor
from samplers.result import SampleResult
from samplers.run import Run, numbers
from samplers.step import Step
from sde_lib import SDE


@dataclass(frozen=True, kw_only=True, repr=False)
class RePaint(MeasuredSampler):
    r"""`Replacement` in blocks of `jump` steps, each walked `resamplings` times; between them the forward process leads back.

    From the end s of a block to its beginning t,

        x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) z

    (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1 and section 4.2; the difference of *variances*, not of standard
    deviations). Each round brings what is not measured closer to what is. Where y has noise, there is a time from which on it
    is not put in any more; a measured coordinate then begins each round from where it began the first, for fresh noise on the
    way back would wash y out. The times and the path of the result are the blocks' ends.

    Args:
        measurement: of an operator with an SVD.
        resamplings: how often each block is walked; 1 is `Replacement`.
        jump: steps in a block.
        predictor: of the unconditional step.
        steps: N, of the grid; a run costs steps * resamplings evaluations, and one more for `denoise`.
        grid, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for numbers below 1, or an operator without an SVD; when sampling, for a batch that the measurement is not
            of.
    """

    steps: int = 250
    resamplings: int = 10
    jump: int = 10
    predictor: Predictor = field(default_factory=Ancestral)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.resamplings, "resamplings")
        require_count(self.jump, "jump")
        if not isinstance(self.predictor, Predictor):
            raise UserError(f"got predictor={self.predictor!r}; expected an object such as Ancestral()")

    @property
    def evaluations_per_step(self) -> int:  # type: ignore[override]
        """Calls of the score a step."""
        return self.resamplings

    def _ends(self) -> list[int]:
        """Where blocks begin and the last one ends, as places in the grid."""
        return [*range(0, self.steps, self.jump), self.steps]

    def method(self, sde: SDE, times: Tensor) -> Step:
        """One block of the grid `times` `(N+1,)`, by its number."""
        ends = self._ends()
        down, clamp = self.predictor.prepare(sde, times), Clamp(self.measurement, self._svd, sde, times)
        t, s = times[ends[:-1]], times[ends[1:]]
        ratio, std = numbers(sde.alpha(t) / sde.alpha(s)), numbers(sde.transition_std(s, t))

        def block(k: int, x: Tensor, run: Run) -> Tensor:
            begun = x
            for again in range(self.resamplings):
                if again:
                    x = clamp(ends[k], (x * ratio[k]).add_(run.noise(x), alpha=std[k]), run, held=begun)
                for i in range(ends[k], ends[k + 1]):
                    x = clamp(i + 1, down(i, x, run), run)
            return x

        return block

    def _sample(self, run: Run, x: Tensor, times: Tensor) -> SampleResult:
        self.measurement.check(x)
        return self._finished(self._walk(run, x, times[self._ends()], self.method(run.sde, times)), run, times)
