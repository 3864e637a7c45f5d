"""Which samples a solver of fixed steps solves again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from likelihood.draw_places import MOST_DOUBLINGS
from numerics import UserError, require_count, require_positive


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """A sample whose own error is too large is solved again, with twice the steps.

    With e the embedded estimate of the state's error (of the solver's state, root mean square per entry), the error of log p is
    taken to be

        ratio e      nats per dimension

    e knows nothing of the trace, and so of its probes: it is there where probes are fresh, and choosing samples by it biases
    no value. An image that passes close to a place where its flow parts is found by it: there state and trace err alike.

    Args:
        ratio: nats per dimension for a unit of the state's error, as pilot runs have seen it (`likelihood.choose_steps`).
        above: nats per dimension; a sample whose error is taken to be larger is solved again.
        times: how often the steps are doubled, at most; 1 to 3, for so many are there draws that nothing else uses.
    """

    ratio: float
    above: float
    times: int = 2

    def __post_init__(self) -> None:
        require_positive(self.ratio, "ratio")
        require_positive(self.above, "above")
        require_count(self.times, "times")
        if self.times > MOST_DOUBLINGS:
            raise UserError(f"got times={self.times}; expected at most {MOST_DOUBLINGS}: take more steps to begin with")

    def too_large(self, state_error: Tensor) -> Tensor:
        """`(B,)`: whose error is taken to be above the limit?"""
        return self.ratio * state_error > self.above
