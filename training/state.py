"""What a run is at one step, and what of it a checkpoint holds.

The content of a checkpoint, by key:

    model       parameters and buffers by name                  seed     of the run
    ema         {"updates", "weights": {decay: {name: ...}}}    seconds  of training so far
    optimizer   {name: {"step", "exp_avg", "exp_avg_sq"}}       config   the caller's, plain
    scaler      of fp16, or {}                                  data     the data's fingerprint, or None
    objective   of objectives that learn, or {}                 losses   [(step, loss), ...] as logged
    cpu_seconds of processor time so far
    power_ema   of `training.posthoc_ema`, or {}                 learning_rate   of the last update, or None

There is no random state: everything that is drawn follows from the seed and the step. Names, not positions, so a
checkpoint of several processes is that of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.ema import EMA
from training.errors import CheckpointError
from training.objectives import Objective
from training.posthoc_ema import PowerEMA
from training.precision import Precision
from training.sharding import shard_like, unshard
from training.signals import Interruption
from training.trainable import recall_classes
from training.training_options import TrainingOptions


@dataclass(kw_only=True, eq=False)
class TrainState:
    """A run in progress; see the module for what is saved.

    Attributes:
        model: the score model, without wrappers.
        step: updates done.
        seconds: of training, over all sessions of the run.
        cpu_seconds: of processor time of this process's threads, likewise.
        losses: `(step, loss)` as logged.
        metric: of the latest evaluation, or None.
        interruption: long evaluations should return as soon as its `requested` is not None; the loop then saves.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    power_ema: PowerEMA
    precision: Precision
    objective: Objective
    options: TrainingOptions
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    metric: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    data_fingerprint: str | None = None
    writer: Any = None
    interruption: Interruption = field(default_factory=Interruption)

    # -- for callbacks ------------------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self, decay: float | None = None) -> Iterator[nn.Module]:
        """The model with its averaged weights (of the first decay unless named), in evaluation mode, without gradients."""
        parameters = dict(self.model.named_parameters())
        was_training = self.model.training
        average = self.ema.weights(decay) if self.ema.decays else {}
        saved = {name: parameters[name].detach().clone() for name in average}
        self.model.eval()
        try:
            with torch.no_grad():
                for name, value in average.items():
                    parameters[name].copy_(value)
            with torch.no_grad():
                yield self.model
        finally:
            with torch.no_grad():
                for name, value in saved.items():
                    parameters[name].copy_(value)
            self.model.train(was_training)

    def scalar(self, name: str, value: float) -> None:
        """Writes a number at this step to TensorBoard, where there is one."""
        if self.writer is not None:
            self.writer.add_scalar(name, value, self.step)

    def image(self, name: str, image: Tensor) -> None:
        """Writes an image `(C, H, W)` with values in [0, 1] at this step to TensorBoard, where there is one."""
        if self.writer is not None:
            self.writer.add_image(name, image, self.step)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds. Collective where the weights are sharded."""
        return {
            "seed": self.options.seed,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "losses": list(self.losses),
            "learning_rate": self.options.rate(self.step - 1, self.cpu_seconds) if self.step else None,
            "model": {name: unshard(value) for name, value in self.model.state_dict().items()},
            "ema": unshard(self.ema.state_dict()),
            "power_ema": unshard(self.power_ema.state_dict()),
            "optimizer": {
                name: {key: unshard(value) for key, value in self.optimizer.state.get(p, {}).items()}
                for name, p in self._trained()
            },
            "scaler": self.precision.state_dict(),
            "objective": self.objective.state_dict(),
            "config": self.config,
            "data": self.data_fingerprint,
            "learned_without_class": getattr(self.model, "learned_without_class", None),
        }

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @torch.no_grad()
    def load(self, content: Mapping[str, Any], step: int) -> None:
        """Takes the run back to a checkpoint's `content` at `step`.

        Raises:
            CheckpointError: it is of another seed, model, set of averages or data.
        """
        if content.get("seed") != self.options.seed:
            raise CheckpointError(
                f"got seed={self.options.seed} for a run of seed {content.get('seed')}; expected the same: batches and noise "
                "follow from it"
            )
        stored = content.get("data")
        if stored is not None and self.data_fingerprint is not None and stored != self.data_fingerprint:
            raise CheckpointError(
                f"got data of fingerprint {self.data_fingerprint[:12]} for a run on {str(stored)[:12]}; "
                "expected the same data, or another run folder"
            )
        try:
            load_named(self.model, content["model"], "this model")
            recall_classes(self.model, content.get("learned_without_class"))
            self.ema.load_state_dict(content["ema"])
            self.power_ema.load_state_dict(content["power_ema"])
            for name, p in self._trained():
                moments = content["optimizer"][name]
                if moments and moments["exp_avg"].shape != p.shape:
                    raise CheckpointError(
                        f"got optimiser moments of {tuple(moments['exp_avg'].shape)} for {name}; expected {tuple(p.shape)}"
                    )
                self.optimizer.state[p] = {key: _placed(key, value, p) for key, value in moments.items()}
            self.precision.load_state_dict(content["scaler"])
            self.objective.load_state_dict(content["objective"])
            self.seconds = float(content["seconds"])
            self.cpu_seconds = float(content.get("cpu_seconds", 0.0))  # earlier checkpoints have none
            self.losses = [(int(s), float(v)) for s, v in content["losses"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the checkpoint of step {step} does not fit this run ({type(error).__name__}: {error})"
            ) from error
        self.step = step


@torch.no_grad()
def load_named(model: nn.Module, stored: Mapping[str, Tensor], whose: str) -> None:
    """Copies `stored` into the parameters and buffers of `model`, all of them, sharded or not.

    Raises:
        CheckpointError: names or shapes that differ.
    """
    own = model.state_dict()
    if set(own) != set(stored):
        odd = sorted(set(own) ^ set(stored))
        raise CheckpointError(
            f"got weights that differ from those of {whose} in {len(odd)} names, such as {odd[0]!r}; expected the same network"
        )
    for name, value in own.items():
        if value.shape != stored[name].shape:
            raise CheckpointError(
                f"got {name} of shape {tuple(stored[name].shape)}; expected {tuple(value.shape)} of {whose}"
            )
        value.copy_(shard_like(stored[name], value))


def _placed(key: str, value: Any, parameter: Tensor) -> Any:
    """An entry of the optimiser's state, where `parameter` is; its count of steps stays a plain tensor."""
    if not isinstance(value, Tensor):
        return value
    return (
        value.to(parameter.device).clone() if key == "step" or value.ndim == 0 else shard_like(value, parameter).clone()
    )
