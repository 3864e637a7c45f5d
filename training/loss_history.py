r"""Steps of a chain drawn where the bound's loss is large.

    L_vlb = E_{i ~ p} L_i / p_i,    p_i proportional to sqrt(E L_i^2),   sum of p = 1

(Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.3). The second moment is that of a step's last ten losses; until every
step has ten, steps are drawn alike. The weights 1 / (N p_i) undo the draw, so the loss's expectation is that of even steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from numerics import real_dtype, require_count, require_range
from sde_lib import SDE
from training.discrete import DiscreteTime
from training.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LossHistory(DiscreteTime):
    """Steps i = 1 ... N at t = i T / N, drawn in proportion to the root of the mean square of their last losses.

    Nichol and Dhariwal 2021 (arXiv:2102.09672), section 3.3.

    Args:
        levels, zero, stratified: as in `DiscreteTime`.
        history: losses that are remembered of a step; the paper's ten.
        floor: the part of the draws that is even over the steps, in [0, 1); the published code's 0.001 keeps weights bounded.

    Attributes:
        losses: `(levels + 1, history)`, the last of each step; counts: `(levels + 1,)`, how many it has had. Checkpoints keep
            both; the last row is none of them.

    Raises:
        UserError: an option out of range.
    """

    history: int = 10
    floor: float = 0.001
    losses: Tensor = field(init=False, repr=False, compare=False)
    counts: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.history, "history")
        require_range(self.floor, "floor", 0, 0.999)
        self.forget()

    def forget(self) -> None:
        # the last row takes what is not kept, so that nothing waits for the device
        object.__setattr__(self, "losses", torch.zeros(self.levels + 1, self.history, dtype=torch.float64))
        object.__setattr__(self, "counts", torch.zeros(self.levels + 1, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """p `(levels,)`."""
        losses, counts = self.losses[:-1], self.counts[:-1]
        even = torch.full_like(losses[:, 0], 1 / self.levels)
        root = losses.square().mean(dim=1).sqrt()
        share = root / root.sum().clamp(min=1e-30)
        learned = (1 - self.floor) * share + self.floor * even
        known = (counts >= self.history).all() & (root.sum() > 0)
        return torch.where(known, learned, even)

    def quantile(self, sde: SDE, u: Tensor, t_min: float) -> Tensor:
        self._move(u.device)
        cdf = self.probabilities().cumsum(0).to(u.dtype)
        i = torch.searchsorted(cdf / cdf[-1], u, right=True).clamp(max=self.levels - 1).to(u.dtype)
        return i * (sde.T / (self.levels - 1)) if self.zero else (i + 1) * (sde.T / self.levels)

    def _index(self, sde: SDE, t: Tensor) -> Tensor:
        i = t * ((self.levels - 1) / sde.T) if self.zero else t * (self.levels / sde.T) - 1
        return i.round().long().clamp(0, self.levels - 1)

    def weight(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        return 1 / (self.levels * self.probabilities()[self._index(sde, t)]).to(t.dtype)

    def observe(self, sde: SDE, t: Tensor, loss: Tensor, t_min: float) -> None:
        """Keeps the finite ones of `loss` `(n,)`, in their order; of one step at most `history` from one batch."""
        self._move(t.device)
        spare = self.levels
        index, order = torch.where(loss.isfinite(), self._index(sde, t), spare).sort(stable=True)
        value = torch.nan_to_num(loss.detach().to(self.losses.dtype))[order]
        rank = torch.arange(len(index), device=index.device) - torch.searchsorted(index, index)
        place = (self.counts[index] + rank) % self.history
        index = torch.where(rank < self.history, index, spare)
        self.losses[index, place] = value
        self.counts.index_add_(0, index, torch.ones_like(index))

    def _move(self, device: torch.device) -> None:
        if self.losses.device != device:
            object.__setattr__(self, "losses", self.losses.to(device, real_dtype(device)))
            object.__setattr__(self, "counts", self.counts.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != {"losses", "counts"} or state["losses"].shape != self.losses.shape:
            raise UsageError(f"got a state of {sorted(state)}; expected losses and counts of {self.levels} steps")
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])
