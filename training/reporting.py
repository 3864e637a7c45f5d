"""What one sees of a run: a progress bar, `metrics.jsonl`, TensorBoard.

The loop adds up losses on the device, overall and by noise level, and fetches all of it at once every `log_every` steps.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from numerics import real_dtype
from sde_lib import SDE
from training.checkpoint import write_atomically
from training.errors import DiskError

METRICS = "metrics.jsonl"
LEVELS = 5


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the GPU's memory, or of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class LossMeter:
    """Sums of losses on the device since the last look, overall and in `LEVELS` ranges of noise of equal width in log_snr.

    Args:
        sde: whose log_snr says how much noise a time has.
        device: of the losses.
    """

    def __init__(self, sde: SDE, device: torch.device) -> None:
        self.sde = sde
        ends = torch.tensor([max(sde.t_min, 1e-12 * sde.T), sde.T], dtype=torch.float64)
        self.first, self.last = (float(l) for l in sde.log_snr(ends))
        self.sums = torch.zeros(4 + 2 * LEVELS, dtype=real_dtype(device), device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, norm: Tensor, refused: Tensor, t: Tensor, losses: Tensor) -> None:
        """Adds an update: `loss`, `norm`, `refused` `()`; `t` and unweighted-by-importance `losses` `(B,)`."""
        loss, norm, refused, losses = (v.to(self.sums.dtype) for v in (loss, norm, refused, losses))
        good = 1 - refused
        level = ((self.first - self.sde.log_snr(t)) / (self.first - self.last) * LEVELS).long().clamp(0, LEVELS - 1)
        finite = losses.isfinite()
        none = self.sums.new_zeros(LEVELS)
        zero = torch.zeros_like(losses)
        self.sums += torch.cat(
            [
                torch.stack(
                    [
                        torch.where(good > 0, loss, 0.0),
                        torch.where(good * norm.isfinite() > 0, norm, 0.0),
                        good,
                        refused,
                    ]
                ),
                none.index_add(0, level, torch.where(finite, losses, zero)),
                none.index_add(0, level, finite.to(none.dtype)),
            ]
        )

    def fetch(self) -> dict[str, float]:
        """The means since the last call. Waits for the device."""
        loss, norm, good, _, *rest = self.sums.tolist()
        self.sums.zero_()
        means = {"loss": loss / good if good else math.nan, "gradient_norm": norm / good if good else math.nan}
        for i, (total, count) in enumerate(zip(rest[:LEVELS], rest[LEVELS:], strict=True)):
            if count:
                means[f"loss_at_noise/{i + 1}_of_{LEVELS}"] = total / count
        return means


class Reporter:
    """Writes to the progress bar, the run folder and TensorBoard; without a folder, to the bar alone.

    Args:
        folder: of the run, or None.
        step: the step from which the run continues; later lines of an earlier attempt are dropped.
        steps: in all.
        progress: True, False, or None for a terminal.
        batch_size: of the global batch, for the speed in images per second.
        tensorboard: whether to write events.
    """

    def __init__(
        self, folder: Path | None, *, step: int, steps: int, batch_size: int, progress: bool | None, tensorboard: bool
    ) -> None:
        self.metrics = None if folder is None else folder / METRICS
        self.writer: Any = None
        self.batch_size = batch_size
        if self.metrics is not None:
            keep_lines_up_to(self.metrics, step)
            if tensorboard:
                self.writer = _summary_writer(folder, step)
        self.bar: Any = None
        shown = sys.stderr.isatty() if progress is None else progress
        if shown:
            from tqdm import tqdm

            self.bar = tqdm(
                total=steps, initial=step, unit="step", dynamic_ncols=True, mininterval=0.5, file=sys.stderr
            )
        self._time, self._step = time.perf_counter(), step

    def advance(self) -> None:
        """One update was queued."""
        if self.bar is not None:
            self.bar.update(1)

    def log(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Writes `values` and the speed since the last call; returns both.

        Raises:
            DiskError: metrics.jsonl could not be written.
        """
        now = time.perf_counter()
        speed = {}
        if step > self._step:
            rate = (step - self._step) / max(now - self._time, 1e-9)
            speed = {"steps_per_second": rate, "images_per_second": rate * self.batch_size}
        self._time, self._step = now, step
        everything = {**values, **speed}
        if self.bar is not None:
            shown = {"loss": f"{values.get('loss', math.nan):.4g}"}
            if speed:
                shown["images/s"] = f"{speed['images_per_second']:.0f}"
            self.bar.set_postfix(shown)
        self.record(step, everything)
        if self.writer is not None:
            for name, value in everything.items():
                if math.isfinite(value):
                    self.writer.add_scalar(f"train/{name}" if "/" not in name else name, value, step)
        return everything

    def record(self, step: int, values: Mapping[str, object]) -> None:
        """Appends a line to metrics.jsonl; numbers that are not finite become null."""
        if self.metrics is None:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **plain}) + "\n")
        except OSError as error:
            raise DiskError(
                f"{self.metrics}: not written ({error.strerror}); make room or write access, then resume"
            ) from error

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            with contextlib.suppress(OSError):
                self.writer.close()


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drops lines of later steps, and torn ones, from metrics.jsonl."""
    if not path.is_file():
        return
    kept, dropped = [], False
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            fine = line.endswith("\n") and int(json.loads(line)["step"]) <= step
        except (ValueError, KeyError, TypeError):
            fine = False
        kept.append(line) if fine else None
        dropped |= not fine
    if dropped:
        write_atomically(path, "".join(kept).encode())


def _summary_writer(folder: Path | None, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            "TensorBoard is not installed, so no events are written; metrics.jsonl has the numbers", stacklevel=2
        )
        return None
    return SummaryWriter(os.fspath(folder), purge_step=step + 1 if step else None)  # type: ignore[arg-type]
