"""Work on many samples in fixed chunks: resumable, and shared out over processes with the same result.

The unit of work is a chunk of stated membership, and noise is keyed by (seed, sample id), so a value depends neither on
how many processes there are nor on where a run was interrupted. A chunk's result is a file, renamed into place when
complete. Process r of w (as `torchrun` sets RANK and WORLD_SIZE) works on chunks r, r + w, ...; no process waits for another,
and whoever finds all parts there puts them together. A signal is obeyed between two evaluations of the network: the
chunk that was under way is done again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from numerics import UserError, take
from sde_lib import Score
from training import Interruption
from training.checkpoint import write_atomically
from workflow import progress


class Chunks:
    """The parts of one piece of work, in a folder below `folder` that is named after what was asked for.

    Args:
        folder: where the parts' folder goes.
        name: its first part; the second is a hash of `stated`.
        stated: everything that the numbers depend on, plain; kept as index.json.
        n: samples in all; size: of a chunk.
    """

    def __init__(self, folder: Path, name: str, stated: dict[str, Any], n: int, size: int) -> None:
        text = json.dumps(stated, sort_keys=True, indent=1)
        self.folder = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        self.n, self.size = n, size
        self.interruption = Interruption()
        self.spans = [(first, min(first + size, n)) for first in range(0, n, size)]
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / "index.json"
        if not index.exists():
            for other in _otherwise_written(folder, name, stated):
                progress.say(
                    f"{other} has parts of the same protocol whose SDE is written otherwise, as earlier versions did: they are "
                    "left as they are, and made anew here"
                )
            write_atomically(index, text.encode())

    def file(self, k: int) -> Path:
        return self.folder / f"part_{k:05d}.npz"

    @property
    def complete(self) -> bool:
        return all(self.file(k).exists() for k in range(len(self.spans)))

    @property
    def done(self) -> int:
        """The number of samples whose parts are written."""
        return sum(last - first for k, (first, last) in enumerate(self.spans) if self.file(k).exists())

    def todo(self, alone: bool = False) -> Iterator[tuple[int, int, int]]:
        """(k, first, last) of this process's chunks that are still to be done; of all chunks, where it is `alone`.

        Who is alone begins with the last, so that it meets a process that is at work on them, and does not follow it.

        Raises:
            Interrupted: after a chunk during which SIGINT or SIGTERM came; what is done stays.
        """
        rank, world = (0, 1) if alone else (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        mine = range(rank, len(self.spans), world)
        with self.interruption:
            for k in reversed(mine) if alone else mine:
                if not self.file(k).exists():
                    yield (k, *self.spans[k])
                    self.poll()

    def poll(self) -> None:
        """Raises `Interrupted` where a signal has come."""
        self.interruption.poll(f"{self.done} of {self.n} done in {self.folder}; the same command continues")

    def watched(self, score: Score) -> Score:
        """`score`, polling at every evaluation: a chunk of a large network can take minutes."""
        return _Watched(score, self)

    def save(self, k: int, **arrays: Any) -> None:
        buffer = io.BytesIO()
        arguments: Any = {name: np.asarray(value) for name, value in arrays.items()}
        np.savez(buffer, **arguments)
        write_atomically(self.file(k), buffer.getvalue())

    def load(self, *rows: str, also: Sequence[str] = (), ids: Tensor | None = None) -> list[dict[str, np.ndarray]]:
        """All parts, in order.

        Args:
            rows: names of arrays that each part has to have, with a row for each of its samples.
            also: names of others that it has to have.
            ids: `(n,)`, the samples' ids, which those of a part have to be where it has any.

        Raises:
            UserError: a part that cannot be read, or that is of something else.
        """
        parts = []
        for k, (first, last) in enumerate(self.spans):
            try:
                with np.load(self.file(k), allow_pickle=False) as file:
                    part = {name: file[name] for name in file.files}
            except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
                raise self._refused(k, f"which cannot be read ({error})") from error
            missing = [name for name in (*rows, *also) if name not in part]
            if missing:
                raise self._refused(k, f"which has no {', '.join(missing)}, but {', '.join(sorted(part)) or 'nothing'}")
            if any(part[name].shape[:1] != (last - first,) for name in rows) or (
                ids is not None and "ids" in part and not np.array_equal(part["ids"], ids[first:last].numpy())
            ):
                raise self._refused(k, f"which is not of the {last - first} samples that belong there")
            parts.append(part)
        return parts

    def _refused(self, k: int, why: str) -> UserError:
        return UserError(
            f"got the part {self.file(k)}, {why}; expected a file of this command: delete it, and run the command again"
        )


def _otherwise_written(folder: Path, name: str, stated: dict[str, Any]) -> Iterator[Path]:
    """Folders of parts whose protocol differs in nothing but how its SDE is written."""
    for index in sorted(folder.glob(f"{name}-*/index.json")):
        try:
            old = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # damaged: not one of these
            continue
        here = json.loads(json.dumps(stated))
        written_otherwise = isinstance(old, dict) and "sde" in here and old.get("sde") != here["sde"]
        if written_otherwise and {**old, "sde": ""} == {**here, "sde": ""}:
            yield index.parent


class _Watched:
    """A score that obeys signals between its evaluations."""

    def __init__(self, score: Score, chunks: Chunks) -> None:
        self.score, self.chunks = score, chunks

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.chunks.poll()
        return self.score(x, t)

    def take(self, index: Tensor) -> _Watched:
        return _Watched(take(self.score, index), self.chunks)
