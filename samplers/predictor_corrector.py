"""Predictor-corrector sampling."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Literal

from torch import Tensor

from numerics import UserError, require_choice
from samplers.annealed_langevin import AnnealedLangevin
from samplers.base import GridSampler
from samplers.correctors import Corrector
from samplers.langevin import Langevin
from samplers.predictors import Predictor
from samplers.reverse_diffusion import ReverseDiffusion
from samplers.run import Run
from samplers.step import Step
from sde_lib import SDE, Score

Sequence = Literal["corrector_first", "predictor_first"]


@dataclass(frozen=True, kw_only=True, repr=False)
class PredictorCorrector(GridSampler):
    r"""A predictor goes from t to the next time s; a corrector stays at one time and brings x nearer to its law.

        "corrector_first"    x <- correct(x) at t,   x <- predict(x) from t to s       for each step t -> s
        "predictor_first"    x <- predict(x) from t to s,   x <- correct(x) at s

    A corrector runs a few steps of a Markov chain whose stationary law is (nearly) the marginal at its time (Song et al.
    2021, arXiv:2011.13456, algorithm 1). Any predictor goes with any corrector, on any linear SDE. The published code
    corrects first and ends with a prediction to t_end; the paper's algorithm predicts first and ends with a correction.

        PredictorCorrector(predictor=Ancestral(), corrector=Langevin(snr=0.1), steps=500)(sde, score, (16, 2)).x

    Args:
        predictor: `EulerMaruyama()`, `ReverseDiffusion()`, `Ancestral()`, or None, with which each step corrects at the
            time it arrives at.
        corrector: `Langevin()`, `AnnealedLangevin()` (which stands for its `.corrector`), or None.
        sequence: "corrector_first" or "predictor_first".
        order: an older name of `sequence`.
        steps, grid, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for a predictor or a corrector of another class, both None, or another sequence.
    """

    predictor: Predictor | None = field(default_factory=ReverseDiffusion)
    corrector: Corrector | AnnealedLangevin | None = field(default_factory=Langevin)
    sequence: Sequence = "corrector_first"
    order: InitVar[Sequence | None] = None

    def __post_init__(self, order: Sequence | None = None) -> None:
        super().__post_init__()
        self._settle(corrector=_corrector(self.corrector), sequence=self.sequence if order is None else order)
        for name, kind in (("predictor", Predictor), ("corrector", Corrector)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise UserError(f"got {name}={value!r}; expected an object such as {_EXAMPLES[name]}, or None")
        if self.predictor is None and self.corrector is None:
            raise UserError("got predictor=None and corrector=None; expected at least one of the two")
        require_choice(self.sequence, "sequence", ("corrector_first", "predictor_first"))

    @property
    def evaluations_per_step(self) -> int:  # type: ignore[override]
        """Calls of the score a step."""
        return sum(part.evaluations for part in (self.predictor, _corrector(self.corrector)) if part is not None)

    def _check(self, score: Score, keep_path: bool) -> None:
        if self.predictor is not None:
            self.predictor.check(score)

    def method(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`."""
        corrector = _corrector(self.corrector)
        predict = None if self.predictor is None else self.predictor.prepare(sde, times)
        correct = None if corrector is None else corrector.prepare(sde, times)
        if predict is None:
            assert correct is not None
            return lambda i, x, run: correct(i + 1, x, run)
        if correct is None:
            return predict

        def corrector_first(i: int, x: Tensor, run: Run) -> Tensor:
            return predict(i, correct(i, x, run), run)

        def predictor_first(i: int, x: Tensor, run: Run) -> Tensor:
            return correct(i + 1, predict(i, x, run), run)

        return corrector_first if self.sequence == "corrector_first" else predictor_first


_EXAMPLES = {"predictor": "ReverseDiffusion()", "corrector": "Langevin()"}


def _corrector(given: Corrector | AnnealedLangevin | None) -> Corrector | None:
    return given.corrector if isinstance(given, AnnealedLangevin) else given
