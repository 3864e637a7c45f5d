"""One process per run folder.

The lock is an advisory `flock` on `<run>/run.lock`, which the kernel releases when its holder dies, however it dies: a
dead process's lock is free, with no guessing about process numbers. The file says who holds it, for the message.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from types import TracebackType

from training.errors import DiskError, LockedError

NAME = "run.lock"


class RunLock:
    """Holds the lock of `folder` as a context manager: `with RunLock("runs/vp"): ...`.

    Args:
        folder: of the run; made where it does not exist.

    Raises:
        LockedError: another process holds it; its number and host are named.
        DiskError: the folder cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / NAME
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        import fcntl  # here, since there is none on Windows

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._descriptor is None:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if self._is_current(descriptor):
                        self._descriptor = descriptor
                finally:
                    if self._descriptor is None:
                        os.close(descriptor)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BlockingIOError as error:
            raise LockedError(
                f"{self.path.parent}: {self._holder()} works in this run folder; wait for it, stop it, or use another folder"
            ) from error
        except OSError as error:
            self.release()
            raise DiskError(
                f"{self.path.parent}: cannot be used as a run folder ({error.strerror}); check the path and its permissions"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lock back."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        self.path.unlink(missing_ok=True)  # while still held; a waiting process notices that its file is gone
        os.close(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        """Whether the locked file is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            holder = json.loads(self.path.read_text())
            return f"process {int(holder['pid'])} on {str(holder['host'])[:100]}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
