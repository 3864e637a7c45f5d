"""One process per run folder.

The lock is an advisory `flock` on `<run>/run.lock`, which the kernel releases when its holder dies, however it dies: a
dead process's lock is free, with no guessing about process numbers. Where there is no `flock` (Windows), the package filelock,
which torch needs too, holds `<run>/run.lock.held` in the system's own way. The file says who holds it, for the message.
"""

from __future__ import annotations

import json
import os
import socket
import warnings
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

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
        self._held: _Held | None = None

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fcntl = _fcntl()
            self._held = _Other(self.path) if fcntl is None else _Flock(self.path, fcntl)
            self._held.say(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
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
        held, self._held = self._held, None
        if held is not None:
            held.release()

    def _holder(self) -> str:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {int(holder['pid'])} on {str(holder['host'])[:100]}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


class _Held(Protocol):
    """A lock that is held from when it was made; making it raises BlockingIOError where another process holds it."""

    def say(self, who: bytes) -> None:
        """Writes who holds it."""

    def release(self) -> None:
        """Gives it back."""


def _fcntl() -> ModuleType | None:
    """The module of `flock`; None on a system without."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


class _Flock:
    """An `flock` on the file itself."""

    def __init__(self, path: Path, fcntl: Any) -> None:
        self.path = path
        while True:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current():
                    return
            except OSError:
                os.close(self.descriptor)
                raise
            os.close(self.descriptor)

    def _is_current(self) -> bool:
        """Whether the locked file is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def say(self, who: bytes) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, who, 0)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)  # while still held; a waiting process notices that its file is gone
        os.close(self.descriptor)


class _Other:
    """The package filelock's lock, on a file beside: one that is locked cannot be read everywhere."""

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the system has no better lock
            from filelock import FileLock, Timeout
        self.path = path
        self.lock = FileLock(path.with_name(f"{path.name}.held"), timeout=0)
        try:
            self.lock.acquire()
        except Timeout as error:
            raise BlockingIOError(f"{path} is held") from error

    def say(self, who: bytes) -> None:
        self.path.write_bytes(who)

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        self.lock.release()
