"""What a caller can do in the course of a run. Only the main process of several calls callbacks, except for `on_eval`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.result import TrainingResult
    from training.state import TrainState


class Callback:
    """Does nothing; override what is wanted.

    `state.step` is the number of updates done, `state.averaged()` a context in which the model has its averaged weights and is
    in evaluation mode, `state.scalar(name, value)` and `state.image(name, tensor)` write to TensorBoard.
    """

    def on_start(self, state: TrainState) -> None:
        """Before the first update, once the folder is this run's own and a checkpoint to resume from was accepted."""

    def on_step(self, state: TrainState) -> None:
        """After every update. Reading a value from the device here makes the host wait."""

    def on_eval(self, state: TrainState) -> Mapping[str, float] | None:
        """Every `eval_every` steps: what is returned is logged, and "metric" in it judges checkpoints (lower is better)."""
        return None

    def on_checkpoint(self, state: TrainState, path: Path) -> None:
        """After every checkpoint."""

    def on_end(self, state: TrainState, result: TrainingResult) -> None:
        """After the last step, when everything is saved."""
