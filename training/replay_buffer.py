"""The states of chains that go on from one update to the next.

Chains that begin anew at every update would need to be long. So their last states are kept, and the next update goes on from
some of them; a few begin anew, so that what the energy has forgotten is found again (Tieleman 2008, "Training restricted
Boltzmann machines using approximations to the likelihood gradient"; with restarts, Du and Mordatch 2019, arXiv:1903.08689).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from numerics import expand_as, normal, uniform
from training.errors import UsageError
from training.streams import StepStreams


class ReplayBuffer:
    """`size` states, each of a chain.

    Args:
        size: of the buffer.
        restart: how often a chain begins anew.
        box: (low, high) that new states are uniform in; None for standard normals.

    Attributes:
        states: `(size, *)`; none before the first draw, and of a larger or smaller buffer's if put back from one, until it.
    """

    def __init__(self, size: int, restart: float, box: tuple[float, float] | None) -> None:
        self.size, self.restart, self.box = size, restart, box
        self.states: Tensor | None = None
        self._new: list[tuple[Tensor, Tensor]] = []

    def fresh(self, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
        """New states of `shape`, float32."""
        if self.box is None:
            return normal(shape, generator, device=device, dtype=torch.float32)
        low, high = self.box
        return low + (high - low) * uniform(shape, generator, device=device, dtype=torch.float32)

    def draw(self, shape: Sequence[int], streams: StepStreams) -> dict[str, Tensor]:
        """For a batch of `shape` `(B, *)`: which chains go on, "place" `(B,)`, no one twice; whether they begin anew, "restart"
        `(B,)`; and where, "fresh" `(B, *)`.

        Raises:
            UsageError: a batch larger than the buffer.
        """
        B, device = int(shape[0]), streams.device
        if self.size < B:
            raise UsageError(f"got buffer={self.size} for batches of {B}; expected as many chains or more")
        if self.states is None or len(self.states) != self.size:
            # of no step, so that a resumed run's is the same
            first = StepStreams(streams.seed, 0, device).generator("replay buffer")
            states = self.fresh((self.size, *shape[1:]), first, device)
            if self.states is not None:
                kept = self.states[: self.size]
                states[: len(kept)] = kept.to(device)
            self.states = states
        self.states = self.states.to(device)
        self._new.clear()
        generator = streams.generator("replay")
        return {
            "place": torch.randperm(self.size, generator=generator, device=device)[:B],
            "restart": uniform((B,), generator, device=device) < self.restart,
            "fresh": self.fresh(shape, generator, device),
        }

    def starts(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Where the chains of `draws` begin, `(B, *)`."""
        assert self.states is not None  # `draw` has made them
        fresh = draws["fresh"]
        return torch.where(expand_as(draws["restart"], fresh).bool(), fresh, self.states[draws["place"]])

    def put(self, draws: Mapping[str, Tensor], x: Tensor) -> None:
        """Notes where the chains have come to, `(B, *)`; one that is not finite begins anew."""
        finite = x.flatten(1).isfinite().all(dim=1)
        self._new.append((draws["place"], torch.where(expand_as(finite, x).bool(), x, draws["fresh"])))

    def commit(self) -> None:
        """Keeps what was noted since the last draw: called for an update, and not for a loss that was only looked at."""
        assert self.states is not None
        for place, x in self._new:
            self.states[place] = x
        self._new.clear()
