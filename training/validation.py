"""A held-out likelihood in the course of training: cheap, and comparable between steps.

The variational bound of `likelihood.elbo`, and the training loss, on a fixed part of a split, with the averaged weights and
with the same dequantisation, times and noise every time, so that two evaluations differ by the weights alone. The bound is in
bits/dim for grey values, in nats per dimension for points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from data import Split
from data.transforms import Transform
from likelihood.bounds import Bins, elbo
from numerics import SampleStreams, uniform
from training.callbacks import Callback
from training.objectives import Objective
from training.state import TrainState
from training.streams import StepStreams, mix
from training.trainable import as_trainable

_LOSS_DRAWS = 4


class Validation(Callback):
    """Judges checkpoints by the bound ("metric", lower is better).

    Args:
        split: held-out data.
        transform: as in training.
        objective: as in training; its loss is then reported too, from four evaluations of the network for each sample.
        n: how many samples of it, the first ones.
        draws: evaluations of the network for each, besides four for the last step of the bound.
        batch_size: of these evaluations.
        seed: of dequantisation, times and noise.
        dequantize: whether bound and loss are those of dequantised grey values, as in training; if not, the bound is of the
            grey values themselves, each by its own `likelihood.bounds.Bins`.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform | None,
        *,
        objective: Objective | None = None,
        n: int = 256,
        draws: int = 16,
        batch_size: int = 256,
        seed: int = 0,
        dequantize: bool = True,
    ) -> None:
        self.split, self.transform, self.objective = split.take(slice(0, n)), transform, objective
        self.draws, self.batch_size, self.seed, self.dequantize = draws, batch_size, seed, dequantize

    def on_eval(self, state: TrainState) -> Mapping[str, float] | None:
        nats, losses = [], []
        with state.averaged() as model:
            device = next(model.parameters()).device
            asked = as_trainable(model)
            for first in range(0, len(self.split), self.batch_size):
                if state.interruption.requested is not None:
                    return None
                part = self.split.take(slice(first, first + self.batch_size))
                streams = SampleStreams(self.seed, part.ids)
                stored = part.x.to(device)
                x, grey = self._clean(stored, streams)
                bound = elbo(
                    asked.sde,
                    asked.condition(None if asked.num_classes is None else part.labels),
                    x,
                    decoder=None if grey is None else Bins(transform=grey),
                    data=None if grey is None else stored,
                    draws=self.draws,
                    data_std=asked.data_std,  # the same value with less noise
                    generator=streams,
                )
                nats.append(bound.nats.cpu())
                if self.objective is not None:
                    labels = None if asked.num_classes is None or part.labels is None else part.labels.to(device)
                    losses += [self._loss(model, x, labels, first, i) for i in range(_LOSS_DRAWS)]
        per_dim = torch.cat(nats) / self.split.x[0].numel()
        name = "nats_per_dim_bound"
        if self.transform is not None and self.transform.levels is not None:
            log_det = self.transform.log_det if self.dequantize else 0.0  # of a density; a grey value has a probability
            per_dim, name = (per_dim - log_det) / math.log(2), "bits_per_dim_bound"
        value = float(per_dim.mean())
        stderr = float(per_dim.std()) / len(per_dim) ** 0.5 if len(per_dim) > 1 else float("nan")
        loss = {"loss": float(torch.cat(losses).mean())} if losses else {}
        return {"metric": value, name: value, f"{name}_stderr": stderr, **loss}

    def _clean(self, stored: Tensor, streams: SampleStreams) -> tuple[Tensor, Transform | None]:
        """x_0 in model units, dequantised as in training; and the transform of grey values where these stay as they are."""
        x, transform = stored.to(torch.float32), self.transform
        if transform is None or transform.levels is None:
            return (x if transform is None else transform(x)), None
        if not self.dequantize:
            return transform.centres(stored).to(x.dtype), transform
        return transform(x + uniform(x.shape, streams, device=x.device, dtype=x.dtype)), None

    def _loss(self, model: torch.nn.Module, x_0: Tensor, labels: Tensor | None, first: int, i: int) -> Tensor:
        """The weighted losses `(B,)` of a part that begins at `first`, with the `i`-th draws."""
        assert self.objective is not None
        streams = StepStreams(mix(self.seed, "validation", first), i, x_0.device)
        draws = self.objective.draw(as_trainable(model, self.objective.needs).sde, x_0.shape, streams)
        loss = self.objective.loss(model, x_0, draws, labels)  # type: ignore[arg-type]
        return (loss * draws["weight"].to(loss.dtype)).detach().cpu()
