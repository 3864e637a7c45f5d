"""What can go wrong in a run, and the exit code that a command line leaves with.

    0    done
    2    usage: an option, a configuration or a run folder that does not fit
    3    data (also `data.DataError`)
    4    a value that is not finite
    5    disk or checkpoint
    130  stopped by SIGINT, 143 by SIGTERM or SIGUSR1, with everything saved

Every message is one line: what was got, what was expected, what to do.
"""

from __future__ import annotations

import signal

from data import DataError
from numerics import UserError

OK, USAGE, DATA, NON_FINITE, DISK = 0, 2, 3, 4, 5


class TrainingError(Exception):
    """The base; `exit_code` is what a command line should leave with."""

    exit_code: int = 1


class UsageError(TrainingError, UserError):
    """An option, a configuration or a folder that does not fit."""

    exit_code = USAGE


class TrainingDataError(TrainingError, DataError):
    """Data that this run cannot be trained on."""

    exit_code = DATA


class NonFiniteError(TrainingError, ArithmeticError):
    """A loss or a gradient that is not finite; the update was not applied.

    Attributes:
        step: the number of the first such update, counted from 1.
        t: the time of the sample with the worst loss in that batch.
        loss: the batch's loss.
    """

    exit_code = NON_FINITE

    def __init__(self, message: str, *, step: int, t: float, loss: float) -> None:
        super().__init__(message)
        self.step, self.t, self.loss = step, t, loss


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read, is not what it says, or does not fit."""

    exit_code = DISK


class DiskError(TrainingError, OSError):
    """A file that could not be written, or a run folder that cannot be used.

    Attributes:
        needed: bytes that were to be written, or None.
        free: bytes that the disk still has, or None.
    """

    exit_code = DISK

    def __init__(self, message: str, *, needed: int | None = None, free: int | None = None) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free


class LockedError(DiskError):
    """Another process works in this run folder."""


class Interrupted(TrainingError):  # noqa: N818 (no error, as KeyboardInterrupt is none)
    """A signal asked the run to stop; everything was saved before this was raised.

    SIGINT leaves with 130, SIGTERM and SIGUSR1 (what schedulers send ahead of SIGTERM) with 143. Under torchrun a worker
    that leaves with another code than 0 makes the launcher report a failure, so there SIGUSR1 leaves with 0.
    """

    def __init__(self, message: str, *, signal_number: int, distributed: bool = False) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        if signal_number == signal.SIGINT:
            self.exit_code = 130
        elif signal_number == getattr(signal, "SIGUSR1", None) and distributed:
            self.exit_code = OK
        else:
            self.exit_code = 143
