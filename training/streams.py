"""Everything random in training is a function of (seed, step).

A run draws batch indices, times, noise, dequantisation, flips and dropout masks. Each kind has its own stream, and the
generator of a stream at a step is seeded by a hash of (seed, stream, step). So there is no generator state to save:
resuming takes one integer, the step. Draws are made for the whole (global) batch and then divided, so that the batch
does not depend on the number of processes or on gradient accumulation.

Batches follow seeded permutations: sample number p = step * batch_size + i of the run is entry p mod N of the
permutation of epoch p // N, so every sample is seen once per epoch even where batches straddle two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from numerics import mix
from training.errors import UsageError


class StepStreams:
    """The generators of one step.

    Args:
        seed: of the run.
        step: the number of updates done before this one.
        device: where the numbers are drawn.
    """

    def __init__(self, seed: int, step: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.step, self.device = seed, step, torch.device(device)

    def generator(self, stream: str) -> torch.Generator:
        """A fresh generator for `stream`; asking twice gives the same numbers twice."""
        return torch.Generator(self.device).manual_seed(mix(self.seed, stream, self.step))


class BatchOrder:
    """Which samples make up the batch of a step.

    Args:
        n: number of samples in the data.
        batch_size: of the global batch, at most `n`.
        seed: of the run.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= n:
            raise UsageError(f"got batch_size={batch_size} for {n} training samples; expected 1 to {n}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
            self._epochs[epoch] = torch.randperm(self.n, generator=generator)
            for old in [e for e in self._epochs if e < epoch - 1]:
                self._epochs.pop(old, None)
        return self._epochs[epoch]

    def __call__(self, step: int) -> Tensor:
        """Indices `(batch_size,)` of the batch of `step`, int64, on the CPU."""
        first = step * self.batch_size
        epoch, start = divmod(first, self.n)
        head = self._permutation(epoch)[start : start + self.batch_size]
        missing = self.batch_size - len(head)
        return head if not missing else torch.cat([head, self._permutation(epoch + 1)[:missing]])


@contextmanager
def preserved_global_rng() -> Iterator[None]:
    """Gives torch's global generators back as they were.

    Dropout layers draw from the global generators, which the loop therefore seeds at every step; nobody outside the
    loop should notice.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def seed_dropout(seed: int, step: int, part: int) -> None:
    """Seeds the global generators for part `part` of the batch of `step`."""
    number = mix(seed, "dropout", step, part)
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # the same, without the stack trace that torch.manual_seed writes for a GPU which is not there
        torch.default_generator.manual_seed(number)
