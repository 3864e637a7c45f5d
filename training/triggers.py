"""What is due after a step: a look at the losses, an evaluation, a checkpoint, the end.

Several processes must agree, or one would wait for another for ever. Everything but signals and the time follows from the
step; these two are asked for together, at every eighth step.
"""

from __future__ import annotations

from dataclasses import dataclass

from training.distributed import Group
from training.training_options import TrainingOptions

_POLL_EVERY = 8


@dataclass(frozen=True, kw_only=True)
class Due:
    """What is due after a step, in this order.

    Attributes:
        log: report the losses.
        evaluate: ask the callbacks for an evaluation.
        save: write a checkpoint.
        signal: the number of a signal that asks for the end, or 0.
        late: whether the time, or the processor time, is up.
    """

    log: bool
    evaluate: bool
    save: bool
    signal: int
    late: bool

    def __bool__(self) -> bool:
        """Whether anything is."""
        return self.log or self.evaluate or self.save or self.signal != 0 or self.late


class Triggers:
    """Says what is due, the same in all processes.

    Args:
        options: `steps`, `log_every`, `eval_every`, `checkpoint_every`, `max_seconds` and `cpu_seconds` of these.
        group: the processes.
        saves: whether checkpoints are kept at all.
    """

    def __init__(self, options: TrainingOptions, group: Group, *, saves: bool = True) -> None:
        self.options, self.group, self.saves = options, group, saves

    def due(self, step: int, seconds: float, signal_number: int | None, cpu_seconds: float = 0.0) -> Due:
        """What is due after `step` updates, `seconds` and `cpu_seconds` of training, with `signal_number` received by this
        process."""
        options = self.options
        signal_number, late = self._stop(step, seconds, cpu_seconds, signal_number or 0)
        last = step == options.steps
        return Due(
            log=_every(options.log_every, step) or last or late,
            evaluate=_every(options.eval_every, step) or (last and options.eval_every > 0),
            save=self.saves and _every(options.checkpoint_every, step),
            signal=signal_number,
            late=late,
        )

    def spent(self, seconds: float, cpu_seconds: float) -> bool:
        """Whether an earlier session has used up the time, so that no update is left to this one."""
        return bool(self.group.maximum(float(self._late(seconds, cpu_seconds))))

    def _late(self, seconds: float, cpu_seconds: float) -> bool:
        limits = ((self.options.max_seconds, seconds), (self.options.cpu_seconds, cpu_seconds))
        return any(limit is not None and spent >= limit for limit, spent in limits)

    def _stop(self, step: int, seconds: float, cpu_seconds: float, signal_number: int) -> tuple[int, bool]:
        late = self._late(seconds, cpu_seconds)
        if self.group.world > 1:
            if step % _POLL_EVERY:
                return 0, False
            late = bool(self.group.maximum(float(late)))
            signal_number = int(self.group.maximum(float(signal_number)))
        return signal_number, late


def _every(n: int, step: int) -> bool:
    return n > 0 and step % n == 0
