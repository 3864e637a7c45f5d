"""Signals that ask a run to stop are noted, and obeyed where it is safe.

SIGINT, SIGTERM and SIGUSR1 set a flag, and a line on stderr says so; loops over steps, batches or chunks poll it, save what
they have, and raise `Interrupted`. A second SIGINT interrupts at once, as Python does by default.

    with Interruption() as interruption:
        for chunk in chunks:
            work(chunk)
            interruption.poll("stopped after ...; run the same command again to continue")

Work of which nothing is lost needs no polls: `with stopped_at_once("the same command continues"): work()`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from training.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interruption:
    """Notes signals while it is entered; outside the main thread, where Python allows no handlers, it notes nothing.

    Attributes:
        requested: the number of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        if self.requested is None:
            self.requested = number
            again = " (again: at once)" if number == signal.SIGINT else ""
            with contextlib.suppress(
                OSError
            ):  # print may be what was interrupted, and does not bear being entered twice
                os.write(2, f"\n{signal.Signals(number).name}: stopping as soon as it is safe{again}\n".encode())

    def poll(self, message: str) -> None:
        """Raises `Interrupted` with `message` if a signal has come; call it when everything is saved."""
        if self.requested is not None:
            name = signal.Signals(self.requested).name
            raise Interrupted(f"{name}: {message}", signal_number=self.requested)


class _AtOnce(Interruption):
    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        raise KeyboardInterrupt


@contextlib.contextmanager
def stopped_at_once(message: str) -> Iterator[None]:
    """A signal ends the work inside where it is, or where that polls; for work of which nothing is lost.

    Raises:
        Interrupted: with `message`.
    """
    interruption = _AtOnce()
    try:
        with interruption:
            yield
    except (KeyboardInterrupt, Interrupted) as stop:
        number = getattr(stop, "signal_number", None) or interruption.requested or signal.SIGINT
        raise Interrupted(f"{signal.Signals(number).name}: {message}", signal_number=number) from stop
