"""Checkpoints that survive crashes, full disks, flipped bits and strangers.

A checkpoint is two files in `<run>/checkpoints`:

    step_00012000.pt     torch.save of tensors, numbers, strings, None, lists, tuples and dicts; nothing else
    step_00012000.json   the manifest: format, step, size and SHA-256 of the other, the metric it was judged by

*Writing.* A temporary file in the same folder, flushed and fsynced; renamed; then the manifest, likewise; then the folder
is fsynced and old checkpoints are removed. The manifest comes last, so it says that the checkpoint is whole. A process
that dies at any point leaves the previous checkpoint as it was.

*Reading.* The newest manifest first: size, hash, then `torch.load(weights_only=True)` with an empty allow-list, then the
step inside. Where something is wrong the next older is tried: a warning names the file and the reason, or, if none is left,
an error names them all. A run never starts from scratch where there are checkpoints.

*Strangers.* Nothing in a file is executed. Compressed archives (a zip bomb unfolds to a thousand times its size), archives
whose members overlap, and tensors larger than the bytes they stand on are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from training.errors import CheckpointError, DiskError

FORMAT = 1
CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, in its own."""
_NAME = re.compile(r"step_(\d{8,})\.(pt|json)")
_TEMPORARY = ".partial-"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the `.json` file beside a checkpoint says."""

    step: int
    bytes: int
    sha256: str
    metric: float | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        content: what was saved, in plain types and tensors.
        step: number of updates done.
        path: the file.
    """

    content: dict[str, Any]
    step: int
    path: Path


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: made when something is saved.
        keep: how many of the newest stay.
        keep_every: checkpoints at multiples of this many steps stay too; 0 for none.
        stage: called with the name of each stage of a save as it is reached, for crash tests and traces.

    The checkpoint with the lowest metric always stays.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every: int = 0,
        stage: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.folder = Path(folder)
        self.keep, self.keep_every, self.stage = max(1, keep), keep_every, stage

    # -- looking ------------------------------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """The file of the checkpoint of `step`, whether or not it exists."""
        return self.folder / f"step_{step:08d}.pt"

    def _files(self, suffix: str) -> list[int]:
        if not self.folder.is_dir():
            return []
        try:
            found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
            return sorted((int(m[1]) for m in found if m and m[2] == suffix), reverse=True)
        except OSError as error:
            raise DiskError(f"{self.folder}: cannot be listed ({error.strerror}); check its permissions") from error

    def steps(self) -> list[int]:
        """The steps that have a manifest, newest first."""
        return self._files("json")

    def exists(self) -> bool:
        """Whether there is anything of a checkpoint here."""
        return bool(self._files("json") or self._files("pt"))

    def best_step(self) -> int | None:
        """The step of the lowest metric, or None where none was given."""
        judged = []
        for step in self.steps():
            try:
                metric = self._manifest(step).metric
            except CheckpointError:
                continue
            if metric is not None and math.isfinite(metric):
                judged.append((metric, -step))
        return -min(judged)[1] if judged else None

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, step: int | None = None) -> Checkpoint | None:
        """The newest checkpoint that is whole, or that of `step`; None where there has never been one.

        Raises:
            CheckpointError: where there are checkpoints and none can be read, or not the one asked for.
        """
        steps = self.steps() if step is None else [step]
        problems: list[str] = []
        for candidate in steps:
            try:
                checkpoint = self._read(candidate)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"{problem}; the checkpoint of step {candidate} is used", stacklevel=2)
            return checkpoint
        if step is None:
            for candidate in self._files("pt"):  # a save that died between the file and its manifest
                if candidate not in steps:
                    try:
                        checkpoint = self._read_unsealed(candidate)
                    except CheckpointError as error:
                        problems.append(str(error))
                        continue
                    warnings.warn(
                        f"{checkpoint.path}: has no manifest, but its own checksums agree; used", stacklevel=2
                    )
                    return checkpoint
        if problems:
            raise CheckpointError(
                f"{self.folder}: no usable checkpoint: {'; '.join(problems)}; "
                "restore one from a copy, or use another run folder to start anew"
            )
        return None

    def _manifest(self, step: int) -> Manifest:
        path = self.path(step).with_suffix(".json")
        try:
            text = path.read_text(encoding="utf-8")
            if len(text) > 65536:
                raise CheckpointError(f"{path}: {len(text)} characters long, no manifest is")
            values = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a readable manifest ({type(error).__name__})") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            got = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise CheckpointError(f"{path}: manifest of format {got!r}, expected {FORMAT}")
        size, digest, metric = values.get("bytes"), values.get("sha256"), values.get("metric")
        if values.get("step") != step or type(size) is not int or not isinstance(digest, str):
            raise CheckpointError(f"{path}: manifest without the step, bytes and sha256 of step {step}")
        return Manifest(
            step=step, bytes=size, sha256=digest, metric=float(metric) if isinstance(metric, int | float) else None
        )

    def _read(self, step: int) -> Checkpoint:
        manifest, path = self._manifest(step), self.path(step)
        try:
            size = path.stat().st_size
            if not path.is_file() or size != manifest.bytes:
                raise CheckpointError(f"{path}: {size} bytes, its manifest says {manifest.bytes} (cut short?)")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        if digest != manifest.sha256:
            raise CheckpointError(f"{path}: SHA-256 differs from its manifest's (damaged)")
        return self._checked(step, load_plain(path))

    def _read_unsealed(self, step: int) -> Checkpoint:
        path = self.path(step)
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()  # torch.save writes a CRC-32 for every member
        except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{path}: no manifest, and not a whole archive ({error})") from error
        if bad is not None:
            raise CheckpointError(f"{path}: no manifest, and {bad} in it is damaged")
        return self._checked(step, load_plain(path))

    def _checked(self, step: int, content: Any) -> Checkpoint:
        path = self.path(step)
        if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("step") != step:
            raise CheckpointError(f"{path}: does not hold the checkpoint of step {step} in format {FORMAT}")
        return Checkpoint(content=content, step=step, path=path)

    # -- writing ------------------------------------------------------------------------------------------------------

    def save(self, content: Mapping[str, Any], step: int, *, metric: float | None = None) -> Path:
        """Writes `content` (see `to_plain`) as the checkpoint of `step` and returns its file.

        Args:
            metric: what to judge it by, lower is better; None if it was not judged.

        Raises:
            DiskError: it could not be written; nothing of it stays, and older checkpoints are as they were.
        """
        plain = to_plain({**content, "format": FORMAT, "step": step})
        path = self.path(step)
        needed = sum(t.numel() * t.element_size() for t in tensors(plain)) + 65536
        self.stage("before")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            writer = self._write(path, lambda file: torch.save(plain, file))
            self.stage("file in place")
            manifest = {
                "format": FORMAT,
                "step": step,
                "bytes": writer.written,
                "sha256": writer.digest.hexdigest(),
                "metric": None if metric is None or not math.isfinite(metric) else float(metric),
                "torch": torch.__version__,
            }
            text = json.dumps(manifest, indent=1).encode()
            self._write(path.with_suffix(".json"), lambda file: file.write(text), prefix="manifest ")
            self.stage("manifest in place")
            _fsync_folder(self.folder)
        except (OSError, RuntimeError) as error:
            raise self._disk_error(path, needed, error) from error
        self.stage("folder synced")
        self.prune()
        self.stage("after")
        return path

    def _write(self, path: Path, write: Callable[[Any], object], prefix: str = "") -> _HashingWriter:
        temporary = path.with_name(f"{_TEMPORARY}{path.name}.{os.getpid()}")
        try:
            with temporary.open("xb") as file:
                writer = _HashingWriter(file, lambda: self.stage(prefix + "writing"))
                write(writer)
                file.flush()
                self.stage(prefix + "written")
                os.fsync(file.fileno())
            self.stage(prefix + "synced")
            os.replace(temporary, path)
        except FileExistsError:
            temporary.unlink()  # left by a dead process that had this number
            return self._write(path, write, prefix)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return writer

    def _disk_error(self, path: Path, needed: int, error: BaseException) -> DiskError:
        if path.exists() and not path.with_suffix(".json").exists():
            path.unlink()
        cause = error
        while not isinstance(cause, OSError) and (cause.__cause__ or cause.__context__):
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]
        try:
            free = shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent).free
        except OSError:
            free = None
        available = "unknown" if free is None else f"{free:,}"
        return DiskError(
            f"{path}: not saved ({reason}); about {needed:,} bytes needed, {available} free; older checkpoints are "
            "intact: make room or write access, then resume",
            needed=needed,
            free=free,
        )

    def prune(self) -> None:
        """Removes what need not stay: old checkpoints, unfinished ones, temporary files."""
        steps = self.steps()
        best = self.best_step()
        kept = set(steps[: self.keep]) | ({best} if best is not None else set())
        kept |= {step for step in steps if self.keep_every and step % self.keep_every == 0}
        newest = steps[0] if steps else -1
        try:
            for step in steps:
                if step not in kept:
                    self.path(step).with_suffix(".json").unlink(
                        missing_ok=True
                    )  # first, so that no manifest is left alone
                    self.stage("pruning")
                    self.path(step).unlink(missing_ok=True)
            for step in self._files("pt"):
                if step < newest and step not in steps:
                    self.path(step).unlink(missing_ok=True)
            for entry in self.folder.glob(f"{_TEMPORARY}*"):
                entry.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(f"{self.folder}: old checkpoints could not be removed ({error})", stacklevel=2)


class _HashingWriter:
    """A file that hashes and counts what is written to it."""

    def __init__(self, file: BinaryIO, on_write: Callable[[], None]) -> None:
        self.file, self.on_write = file, on_write
        self.digest, self.written = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.file.write(data)
        self.digest.update(data)
        self.written += len(memoryview(data).cast("B"))
        self.on_write()
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _fsync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a small file so that readers see the old content or the new one, never a part.

    Raises:
        DiskError: it could not be written; the old file is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{_TEMPORARY}{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DiskError(f"{path}: not written ({error.strerror}); make room or write access") from error


def to_plain(value: Any) -> Any:
    """`value` in the types that `weights_only` loading takes with an empty allow-list.

    Mappings become dicts, paths and other path-likes strings, NumPy numbers Python's; tensors come detached, on the CPU, and
    no larger in the file than they are.

    Raises:
        TypeError: for anything else, by name.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        tensor = tensor.cpu().contiguous()
        return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping) or hasattr(value, "to_dict"):
        items = value.to_dict() if hasattr(value, "to_dict") else value
        return {to_plain(k): to_plain(v) for k, v in items.items()}
    if type(value) in (list, tuple):
        return type(value)(to_plain(v) for v in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return value.item()
    for kind in (str, int, float):  # subclasses, such as enumerations
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(
        f"got a {type(value).__module__}.{type(value).__name__} for a checkpoint; expected tensors, numbers, strings, "
        "None, lists, tuples and mappings"
    )


def load_plain(path: Path) -> Any:
    """What `torch.save` wrote to `path`, on the CPU, nothing in it executed and nothing in it larger than it looks.

    Raises:
        CheckpointError: for what is not such a file.
    """
    try:
        _check_archive(path)
        with _empty_allow_list(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; what cannot be read is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {first[1]}" if first else "it holds more than tensors and plain values"
        raise CheckpointError(f"{path}: refused, {reason}") from error
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{path}: not a whole archive ({error})") from error
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be loaded ({first_line})") from error
    for tensor in tensors(content):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: refused, a tensor of shape {tuple(tensor.shape)} is larger than its data")
    return content


@contextmanager
def _empty_allow_list() -> Iterator[None]:
    """Nobody's classes are allowed, torch's own additions for sharded tensors included."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(allowed)


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    end = 0
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(f"{path}: refused, {member.filename} is compressed, which torch.save never does")
        if member.header_offset < end:
            raise CheckpointError(f"{path}: refused, {member.filename} overlaps another member")
        end = member.header_offset + member.file_size
    if end > path.stat().st_size:
        raise CheckpointError(f"{path}: refused, its members are larger than the file")


def tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in nested containers, however deep."""
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            stack.extend(value)
