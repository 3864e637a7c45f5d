r"""Predictor-corrector sampling.

A predictor goes from t to the next time s; a corrector stays at one time and runs a few steps of a Markov chain whose
stationary law is (nearly) the marginal there (Song et al. 2021, arXiv:2011.13456, algorithm 1). Any predictor goes
with any corrector, on any linear SDE.

The published code corrects at t and then predicts to s, `order="corrector_first"`; the paper's algorithm predicts to s
and then corrects there, `order="predictor_first"`. The first ends with a prediction to t_end, the second with a
correction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from numerics import UserError, require_choice
from samplers.base import GridSampler, Run, Step
from samplers.correctors import Corrector
from samplers.langevin import Langevin
from samplers.predictors import Predictor
from samplers.reverse_diffusion import ReverseDiffusion
from sde_lib import SDE, Score


@dataclass(frozen=True, kw_only=True, repr=False)
class PredictorCorrector(GridSampler):
    """See the module's text.

    Args:
        predictor: `EulerMaruyama()`, `ReverseDiffusion()`, `Ancestral()`, or None: then each step corrects at the time
            it arrives at.
        corrector: `Langevin()`, `AnnealedLangevin()`, or None.
        order: "corrector_first" or "predictor_first".
    """

    predictor: Predictor | None = field(default_factory=ReverseDiffusion)
    corrector: Corrector | None = field(default_factory=Langevin)
    order: Literal["corrector_first", "predictor_first"] = "corrector_first"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("predictor", Predictor), ("corrector", Corrector)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise UserError(f"got {name}={value!r}; expected an object such as {_EXAMPLES[name]}, or None")
        if self.predictor is None and self.corrector is None:
            raise UserError("got predictor=None and corrector=None; expected at least one of the two")
        require_choice(self.order, "order", ("corrector_first", "predictor_first"))

    @property
    def evaluations_per_step(self) -> int:  # type: ignore[override]
        predicting = 0 if self.predictor is None else self.predictor.evaluations
        if self.corrector is None:
            return predicting
        steps: int = self.corrector.steps  # type: ignore[attr-defined]
        return predicting + steps

    def _check(self, score: Score) -> None:
        if self.predictor is not None:
            self.predictor.check(score)

    def method(self, sde: SDE, times: Tensor) -> Step:
        predict = None if self.predictor is None else self.predictor.prepare(sde, times)
        correct = None if self.corrector is None else self.corrector.prepare(sde, times)

        def step(i: int, x: Tensor, run: Run) -> Tensor:
            if predict is None:
                return correct(i + 1, x, run)  # type: ignore[misc]
            if correct is None:
                return predict(i, x, run)
            if self.order == "corrector_first":
                return predict(i, correct(i, x, run), run)
            return correct(i + 1, predict(i, x, run), run)

        return step


_EXAMPLES = {"predictor": "ReverseDiffusion()", "corrector": "Langevin()"}
