"""Before a long run: what will it cost?

`estimate` is arithmetic, and one forward of two samples whose saved activations are counted; `plan` does a few steps, on a
copy, and multiplies.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data import Split
from data.transforms import Transform
from training.batches import Batches
from training.loop import train
from training.objectives import DSM, Objective
from training.precision import PRECISIONS
from training.reporting import peak_memory
from training.streams import StepStreams, preserved_global_rng
from training.trainable import as_trainable
from training.training_options import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes, before it.

    Attributes:
        parameters: trained numbers.
        memory: bytes of a process at the peak, about: weights, gradients, moments, averages, what a forward saves for the
            backward pass, and on a CPU what this process has used so far. Kernels' workspace is not in it.
        checkpoint: bytes of one.
        disk: bytes of all checkpoints that may exist at once.
    """

    parameters: int
    memory: int
    checkpoint: int
    disk: int

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters; about {_memory(self)}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cost of a run, measured.

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
            f"{_memory(self)}"
        )


def _memory(cost: Estimate | Plan) -> str:
    return (
        f"{cost.memory / 2**30:.2f} GiB of memory; {cost.checkpoint / 2**20:.1f} MiB a checkpoint, "
        f"{cost.disk / 2**20:.1f} MiB of disk"
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
    few = replace(few, cpu_seconds=None)
    train(trial, split, transform, few, objective=trials)
    result = train(trial, split, transform, replace(few, steps=steps), objective=trials)
    checkpoint, disk = _on_disk(model, options)
    return Plan(
        parameters=_trained(model),
        steps_per_second=result.steps_per_second,
        seconds=options.steps / result.steps_per_second,
        memory=result.peak_memory,
        checkpoint=checkpoint,
        disk=disk,
    )


def estimate(
    model: nn.Module,
    split: Split,
    transform: Transform | None,
    options: TrainingOptions,
    *,
    objective: Objective | None = None,
    processes: int = 1,
) -> Estimate:
    """What training takes, without a step of it: linear in the batch, from two samples.

    Args:
        processes: that share the batch.
    """
    device = next(model.parameters()).device
    everything, trained = _bytes(model), _trained(model)
    rows = max(1, options.batch_size // (processes * options.accumulate))
    probe = min(2, len(split))
    saved = _saved(model, split, transform, options, DSM() if objective is None else objective, probe)
    averages = len(options.ema) + len(options.power_ema)
    # a gradient and two moments each, and the averages, which are float32
    memory = everything + 12 * trained + 4 * trained * averages + saved * rows // probe
    checkpoint, disk = _on_disk(model, options)
    # a GPU's peak so far is what the probe has used; a CPU process has its libraries and data in memory
    here = peak_memory(device) if device.type == "cpu" else 0
    return Estimate(parameters=trained, memory=memory + here, checkpoint=checkpoint, disk=disk)


def _saved(
    model: nn.Module,
    split: Split,
    transform: Transform | None,
    options: TrainingOptions,
    objective: Objective,
    rows: int,
) -> int:
    """Bytes that the loss of `rows` samples keeps for the backward pass, the weights left out."""
    device = next(model.parameters()).device
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # kept alive by the graph, so no storage's address is used twice

    trainable = as_trainable(model, objective.needs)
    batches = Batches(
        split.take(slice(0, rows)),
        transform,
        batch_size=rows,
        seed=options.seed,
        device=device,
        num_classes=trainable.num_classes,
    )
    was_training = model.training
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_global_rng())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        stack.enter_context(PRECISIONS[options.precision](device).forward())
        try:
            model.train()
            batch = batches(0)
            draws = objective.draw(trainable.sde, batch.x_0.shape, StepStreams(options.seed, 0, device))
            loss = objective.loss(model, batch.x_0, draws, batch.labels)  # type: ignore[arg-type]
        finally:
            model.train(was_training)
        del loss
    return sum(storages.values())


def _bytes(model: nn.Module) -> int:
    return sum(v.numel() * v.element_size() for v in model.state_dict().values())


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _on_disk(model: nn.Module, options: TrainingOptions) -> tuple[int, int]:
    """Bytes of a checkpoint, and of all that may exist at once."""
    trained = _trained(model)
    # weights, two moments, and the averages, which are float32
    checkpoint = _bytes(model) + 8 * trained + 4 * trained * (len(options.ema) + len(options.power_ema))
    marks = options.steps // options.keep_every if options.keep_every else 0
    # those kept, the best, and the one being written
    kept = (
        min(options.keep, options.steps // options.checkpoint_every + 1 if options.checkpoint_every else 1) + 2 + marks
    )
    return checkpoint, checkpoint * kept
