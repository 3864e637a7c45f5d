"""Fetching stored data ahead of the step that needs it.

On the CPU, and for data that are kept on the device, fetching is a gather and is done in place. Otherwise a thread gathers,
pins and sends the next batches while the device computes. What comes is a function of the step, so nothing has to be saved.
"""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import Any

from training.batches import Batch, Batches

_AHEAD = 2


class Prefetch:
    """Batches from step `first` to `last` - 1, in order."""

    def __init__(self, batches: Batches, first: int, last: int) -> None:
        self.batches, self.step, self.last = batches, first, last
        self.ahead = batches.x.device != batches.device
        self._queue: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Prefetch:
        if self.ahead:
            self._thread = threading.Thread(target=self._work, args=(self.step,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _work(self, step: int) -> None:
        while step < self.last and not self._stop.is_set():
            try:
                item: Any = self.batches.stored(step)
            except Exception as error:  # raised again where the batch is asked for
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            step += 1

    def next(self) -> Batch:
        """The batch of the next step."""
        step, self.step = self.step, self.step + 1
        if not self.ahead:
            return self.batches(step)
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        return self.batches.finish(item, step)
