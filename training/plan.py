"""Before a long run: what will it cost? A few steps are really done, on a copy, and the rest is arithmetic."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace

from torch import nn

from data import Split
from data.transforms import Transform
from training.loop import train
from training.objectives import Objective
from training.options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a run.

    Attributes:
        parameters: trained numbers.
        steps_per_second: measured.
        seconds: of training, for all steps.
        memory: bytes at the peak: of the device, or on the CPU of this process so far.
        checkpoint: bytes of one.
        disk: bytes of all that may exist at once.
    """

    parameters: int
    steps_per_second: float
    seconds: float
    memory: int
    checkpoint: int
    disk: int

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters; {self.steps_per_second:.3g} steps/s, {self.seconds / 60:.1f} minutes in all; "
            f"{self.memory / 2**30:.2f} GiB of memory; {self.checkpoint / 2**20:.1f} MiB a checkpoint, "
            f"{self.disk / 2**20:.1f} MiB of disk"
        )


def plan(
    model: nn.Module,
    split: Split,
    transform: Transform | None,
    options: TrainingOptions,
    *,
    objective: Objective | None = None,
    steps: int = 3,
) -> Plan:
    """Measures `steps` steps on a copy of `model` (after one to warm up) and multiplies."""
    trial = copy.deepcopy(model)
    trials = copy.deepcopy(objective)
    few = replace(options, steps=1, progress=False, tensorboard=False, max_seconds=None, eval_every=0, power_ema=())
    train(trial, split, transform, few, objective=trials)
    begun = time.perf_counter()
    result = train(trial, split, transform, replace(few, steps=steps), objective=trials)
    rate = steps / max(time.perf_counter() - begun, 1e-9)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    # weights, two moments, and the averages, which are float32
    checkpoint = everything + 8 * trained + 4 * trained * (len(options.ema) + len(options.power_ema))
    marks = options.steps // options.keep_every if options.keep_every else 0
    # those kept, the best, and the one being written
    kept = (
        min(options.keep, options.steps // options.checkpoint_every + 1 if options.checkpoint_every else 1) + 2 + marks
    )
    return Plan(
        parameters=trained,
        steps_per_second=rate,
        seconds=options.steps / rate,
        memory=result.peak_memory,
        checkpoint=checkpoint,
        disk=checkpoint * kept,
    )
