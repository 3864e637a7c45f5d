"""How a session of a run begins: afresh, or from the newest checkpoint."""

from __future__ import annotations

import math
import warnings

from training.checkpoint import Checkpoint, CheckpointFolder
from training.configuration import check_same
from training.distributed import Group
from training.errors import UsageError
from training.state import TrainState

_JUMP = 0.01  # a relative change of the rate that is worth a warning


def begin(
    state: TrainState,
    checkpoints: CheckpointFolder | None,
    group: Group,
    *,
    resume: bool,
    allow_change: tuple[str, ...] = (),
) -> int:
    """Takes `state` to the newest checkpoint, where there is one and `resume`; returns its step, or -1.

    Raises:
        UsageError: checkpoints and no `resume`, another configuration, or a run that is beyond `options.steps`.
        CheckpointError: no checkpoint can be read, or it does not fit.
    """

    def found() -> Checkpoint | None:
        if checkpoints is None:
            return None
        if not resume and checkpoints.exists():
            raise UsageError(
                f"got {checkpoints.folder}, which has checkpoints up to step {max(checkpoints.steps(), default=0)}; expected "
                "an empty folder: resume that run, or choose another folder"
            )
        newest = checkpoints.read() if resume else None
        if newest is not None:
            check_same(newest.content.get("config") or {}, state.config, allow_change)
        return newest

    newest = group.everywhere(found)
    if newest is None:
        state.objective.forget()  # of an earlier training by the same object: a run is a function of its seed
        return -1
    if newest.step > state.options.steps:
        raise UsageError(
            f"got steps={state.options.steps} for a run that is at step {newest.step}; expected at least {newest.step}"
        )
    state.load(newest.content, newest.step)
    if group.is_main:
        _warn_of_a_jump(state, newest.content.get("learning_rate"))
    return newest.step


def _warn_of_a_jump(state: TrainState, was: float | None) -> None:
    """Warns where the schedule gives the update before this step another learning rate than `was`, the one that it had; a
    schedule that ends at `steps` does so when they are changed."""
    options, step = state.options, state.step
    if was is None or step == 0:
        return
    now = options.rate(step - 1, state.cpu_seconds)
    if not math.isclose(was, now, rel_tol=_JUMP) and step < options.steps:
        warnings.warn(
            f"got a schedule whose learning rate at step {step} is {now:.3g}, where the run's own was {was:.3g}; expected the "
            "same rate: keep steps, warmup, schedule and learning_rate as they were, unless the jump is meant",
            stacklevel=4,
        )
