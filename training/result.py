"""What a run came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from training.errors import UsageError
from training.sharding import shard_like, unshard


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run came to. The model that was trained has its last weights; `load_averages` gives it the averaged ones.

    Attributes:
        steps: updates done, over all sessions of the run.
        seconds: of training, over all sessions.
        cpu_seconds: of processor time of this process's threads, over all sessions.
        losses: `(step, mean loss since the previous one)`.
        finished: False where `max_seconds` or `cpu_seconds` stopped the run before its last step.
        steps_per_second: in this session.
        peak_memory: bytes of the GPU's memory, or of this process's.
        checkpoint: the last checkpoint, or None where none is kept.
        averages: decay -> parameter's name -> its moving average (EMA), float32; {} for a run with `ema=()`.
    """

    steps: int
    seconds: float
    cpu_seconds: float
    losses: tuple[tuple[int, float], ...]
    finished: bool
    steps_per_second: float
    peak_memory: int = 0
    checkpoint: Path | None = None
    averages: Mapping[float, Mapping[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @torch.no_grad()
    def load_averages(self, model: nn.Module, decay: float | None = None) -> None:
        """Copies averaged weights into `model`, the one that was trained or another like it.

        Args:
            model: has parameters of these names.
            decay: of the average; the first of `TrainingOptions.ema` unless given.

        Raises:
            UsageError: no average of that decay, or a model of other parameters.
        """
        if not self.averages:
            raise UsageError(
                "got a run without averages; expected some: train with ema=(0.999,), or use the last weights"
            )
        decay = next(iter(self.averages)) if decay is None else decay
        if decay not in self.averages:
            raise UsageError(f"got decay={decay}; expected one of {', '.join(map(str, self.averages))}")
        own, averages = dict(model.named_parameters()), self.averages[decay]
        odd = sorted(name for name in own.keys() | averages.keys() if not _same_shape(own, averages, name))
        if odd:
            raise UsageError(
                f"got a model that differs from the one trained in {len(odd)} parameters, such as {odd[0]!r}; expected the "
                "same network"
            )
        for name, value in averages.items():
            own[name].copy_(shard_like(unshard(value), own[name]))


def _same_shape(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str) -> bool:
    return name in a and name in b and a[name].shape == b[name].shape
