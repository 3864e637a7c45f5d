"""Exponential moving averages of the weights.

Their warm-up is that of TensorFlow's `ExponentialMovingAverage`, which Song et al. 2021's PyTorch code uses too: early
averages forget the initial weights quickly. Shadows are float32 whatever the weights are: in bfloat16 a decay of 0.9999
moves nothing, because 1e-4 of a difference is below half a unit in the last place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from training.errors import CheckpointError, UsageError
from training.sharding import shard_like


class EMA:
    """Exponential moving averages of named parameters, float32, several decays at once:

        shadow <- d_n shadow + (1 - d_n) weights,      d_n = min(decay, (1 + n) / (10 + n)) in update n = 1, 2, ...

    Args:
        parameters: `(name, tensor)` pairs, such as `model.named_parameters()`.
        decays: different ones, each in [0, 1).
        warmup: whether d_n is that minimum; else it is `decay` from the start.

    Raises:
        UsageError: decays out of range, or one of them twice.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]], decays: Sequence[float] = (0.9999,), *, warmup: bool = True
    ) -> None:
        for decay in decays:
            if not 0 <= decay < 1:
                raise UsageError(f"got the EMA decay {decay}; expected a number in [0, 1)")
        if len(set(decays)) != len(decays):
            raise UsageError(f"got the EMA decays {tuple(decays)}; expected different ones")
        named = dict(parameters)
        self.names = tuple(named)
        self.sources = list(named.values())
        self.decays = tuple(float(decay) for decay in decays)
        self.warmup = warmup
        self.updates = 0
        self.shadows = {decay: self._copy() for decay in self.decays}

    def _copy(self) -> list[Tensor]:
        return [p.detach().to(torch.float32, copy=True) for p in self.sources]

    def rate(self, decay: float, n: int) -> float:
        """d_n of update `n` >= 1."""
        return min(decay, (1 + n) / (10 + n)) if self.warmup else decay

    @torch.no_grad()
    def update(self) -> None:
        """One update towards the present weights."""
        self.updates += 1
        sources = [p.detach().to(torch.float32) for p in self.sources]
        for decay, shadow in self.shadows.items():
            torch._foreach_lerp_(shadow, sources, 1 - self.rate(decay, self.updates))

    def weights(self, decay: float | None = None) -> dict[str, Tensor]:
        """The average by parameter name, float32; of the first decay unless one is named."""
        decay = self.decays[0] if decay is None else decay
        if decay not in self.shadows:
            raise UsageError(f"got the EMA decay {decay}; expected one of {self.decays}")
        return dict(zip(self.names, self.shadows[decay], strict=True))

    def state_dict(self) -> dict[str, object]:
        """Plain types: the number of updates, and a dict of names to tensors for each decay."""
        return {"updates": self.updates, "weights": {str(decay): self.weights(decay) for decay in self.decays}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            CheckpointError: for other decays, names or shapes.
        """
        stored: Mapping[str, Mapping[str, Tensor]] = state["weights"]  # type: ignore[assignment]
        if set(stored) != {str(decay) for decay in self.decays}:
            raise CheckpointError(
                f"got EMA decays {', '.join(stored) or 'none'} in the checkpoint; expected "
                f"{', '.join(map(str, self.decays)) or 'none'}: set the same decays"
            )
        for decay, shadow in self.shadows.items():
            for name, tensor in zip(self.names, shadow, strict=True):
                value = stored[str(decay)].get(name)
                if value is None or value.shape != tensor.shape:
                    got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                    raise CheckpointError(f"got {got} for the average of {name}; expected shape {tuple(tensor.shape)}")
                tensor.copy_(shard_like(value, tensor))
        self.updates = int(state["updates"])  # type: ignore[call-overload]
