"""A held-out likelihood in the course of training: cheap, and comparable between steps.

The variational bound of `likelihood.elbo` on a fixed part of a split, with the averaged weights and with the same
dequantisation, times and noise every time, so that two evaluations differ by the weights alone. In bits/dim for grey
values, in nats per dimension for points.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from data import Split
from data.transforms import Transform
from likelihood.bounds import elbo
from numerics import SampleStreams, uniform
from training.callbacks import Callback
from training.state import TrainState


class Validation(Callback):
    """Judges checkpoints by the bound ("metric", lower is better).

    Args:
        split: held-out data.
        transform: as in training.
        n: how many samples of it, the first ones.
        draws: evaluations of the network for each.
        batch_size: of these evaluations.
        seed: of dequantisation, times and noise.
    """

    def __init__(
        self,
        split: Split,
        transform: Transform | None,
        *,
        n: int = 256,
        draws: int = 16,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        self.split, self.transform = split.take(slice(0, n)), transform
        self.draws, self.batch_size, self.seed = draws, batch_size, seed

    def on_eval(self, state: TrainState) -> Mapping[str, float] | None:
        nats = []
        with state.averaged() as model:
            device = next(model.parameters()).device
            classes = getattr(getattr(model, "net", None), "num_classes", None)
            for first in range(0, len(self.split), self.batch_size):
                if state.interruption.requested is not None:
                    return None
                part = self.split.take(slice(first, first + self.batch_size))
                streams = SampleStreams(self.seed, part.ids)
                x = part.x.to(device, torch.float32)
                if self.transform is not None:
                    if self.transform.levels is not None:
                        x = x + uniform(x.shape, streams, device=device, dtype=torch.float32)
                    x = self.transform(x)
                score = model if classes is None else model.condition(part.labels)  # type: ignore[operator]
                bound = elbo(model.sde, score, x, draws=self.draws, generator=streams)  # type: ignore[arg-type]
                nats.append(bound.nats.cpu())
        per_dim = torch.cat(nats) / self.split.x[0].numel()
        name = "nats_per_dim_bound"
        if self.transform is not None and self.transform.levels is not None:
            per_dim, name = (per_dim - self.transform.log_det) / torch.log(torch.tensor(2.0)), "bits_per_dim_bound"
        value = float(per_dim.mean())
        stderr = float(per_dim.std()) / len(per_dim) ** 0.5 if len(per_dim) > 1 else float("nan")
        return {"metric": value, name: value, f"{name}_stderr": stderr}
