r"""A classifier trained as an energy, and an energy trained without labels.

    CrossEntropy   -log p(y | x)
    JointEnergy    -w_c log p(y | x) + w [E(x) - E(x')] + c [E(x)^2 + E(x')^2],      x' from chains of exp(-E / T)

The bracket's gradient is that of -log p(x) = E(x) / T + log Z, times T: E_data[grad E] - E_model[grad E], with chains in place
of the model (contrastive divergence, Hinton 2002; with chains that go on, Tieleman 2008). With -log p(y | x) it is the
joint energy of Grathwohl et al. 2020 (arXiv:1912.03263); w_c = 0, or a model without classes, is an energy alone. The last
term keeps energies near 0, where nothing else does (Du and Mordatch 2019, arXiv:1903.08689).

Short chains are no samples of the model: what is minimised is not the likelihood, and it can diverge. The energies of data and
chains then part; `EnergyWatch` sees it and stops the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from numerics import TemperedLangevin, labels_for, normal, require_count, require_positive, require_range
from sde_lib import SDE
from training.callbacks import Callback
from training.errors import NonFiniteError, UsageError
from training.objectives import Draws, Objective
from training.replay_buffer import ReplayBuffer
from training.state import TrainState
from training.streams import StepStreams
from training.trainable import NoisePredictor


class EnergyClassifier(Protocol):
    """What these objectives ask of a model; `models.ClassifierEnergy` has it."""

    def logits(self, x: Tensor) -> Tensor: ...

    def energy(self, x: Tensor, labels: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """-log p(y | x), `(B,)` nats: a plain classifier."""

    needs: ClassVar[tuple[str, ...]] = ("logits",)

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        ones = torch.ones(int(shape[0]), dtype=torch.float64, device=streams.device)
        return {"t": sde.T * ones, "weight": ones}

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        classifier: EnergyClassifier = model  # type: ignore[assignment]
        if labels is None:
            raise UsageError("got cross-entropy for a model without classes; expected one with num_classes")
        logits = classifier.logits(x_0)
        return F.cross_entropy(logits, labels_for(x_0, labels, logits.shape[1]), reduction="none")


@dataclass(frozen=True, kw_only=True)
class JointEnergy(CrossEntropy):
    """-class_weight log p(y | x) + weight [E(x) - E(x')] + penalty [E(x)^2 + E(x')^2], `(B,)`; see `training.joint_energy`.

    Grathwohl et al. 2020 (arXiv:1912.03263); Du and Mordatch 2019 (arXiv:1903.08689). Step and noise are chosen apart, so the
    chains' law is exp(-E / T) with T = noise^2 / (2 step). In several processes each keeps its own buffer, and a checkpoint the
    first one's.

    Args:
        length: steps of each chain at each update.
        step: a, of x <- x - a grad E(x) + noise z.
        noise: standard deviation of what a step adds.
        restart: how often a chain begins anew instead of going on from the buffer.
        buffer: number of chains that are kept.
        penalty: factor of the squared energies, which stabilises; 0 for none.
        weight: factor of the energies' difference.
        class_weight: factor of -log p(y given x).
        limit: distance of the mean energies of data and chains beyond which the training has diverged.
        box: (low, high) that states are kept in, by reflection, and begin in; None for all of space, begun at N(0, I).

    Raises:
        UserError: a number out of its range.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits", "energy")
    differentiates: ClassVar[bool] = True
    """Chains take derivatives of the network, which then cannot be compiled; see `training.compilation`."""

    length: int = 15
    step: float = 0.1
    noise: float = 0.02
    restart: float = 0.05
    buffer: int = 1000
    penalty: float = 0.02
    weight: float = 1.0
    class_weight: float = 1.0
    limit: float = 100.0
    box: tuple[float, float] | None = None
    chains: ReplayBuffer = field(init=False, repr=False, compare=False)
    energies: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("length", "buffer"):
            require_count(getattr(self, name), name)
        for name in ("penalty", "weight", "class_weight"):
            require_range(getattr(self, name), name, 0)
        require_positive(self.limit, "limit")
        require_range(self.restart, "restart", 0, 1)
        _ = self.langevin
        self.forget()

    def forget(self) -> None:
        object.__setattr__(self, "chains", ReplayBuffer(self.buffer, self.restart, self.box))
        object.__setattr__(self, "energies", torch.zeros(2))

    @property
    def langevin(self) -> TemperedLangevin:
        """The steps of the chains."""
        return TemperedLangevin(step=self.step, noise=self.noise, box=self.box)

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        z = normal(
            (shape[0], self.length, *shape[1:]), streams.generator("chains"), device=streams.device, dtype=torch.float32
        )
        return {**super().draw(sde, shape, streams, dtype=dtype), **self.chains.draw(shape, streams), "z": z}

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        net: EnergyClassifier = model  # type: ignore[assignment]
        negative = self.langevin.run(net.energy, self.chains.starts(draws), draws["z"], checked=False).detach()
        self.chains.put(draws, negative)
        logits = net.logits(torch.cat([x_0, negative.to(x_0.dtype)]))
        of_data, of_chains = (-logits.logsumexp(dim=1)).chunk(2)
        object.__setattr__(self, "energies", torch.stack([of_data.detach().mean(), of_chains.detach().mean()]))
        loss = self.weight * (of_data - of_chains) + self.penalty * (of_data.square() + of_chains.square())
        if labels is not None and self.class_weight:
            labels = labels_for(x_0, labels, logits.shape[1])
            loss = loss + self.class_weight * F.cross_entropy(logits[: len(x_0)], labels, reduction="none")
        return loss

    def observe(self, sde: SDE, t: Tensor, loss: Tensor) -> None:
        """Keeps the chains' states: after an update, and not after a loss that was only looked at."""
        self.chains.commit()

    def state_dict(self) -> dict[str, Tensor]:
        """The states of the chains."""
        return {} if self.chains.states is None else {"buffer": self.chains.states.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the chains back; where `buffer` has changed, the next draw leaves some out, or begins more."""
        if "buffer" in state:
            self.chains.states = state["buffer"].clone()


class EnergyWatch(Callback):
    """Stops a run of `JointEnergy` whose data and chains have parted, and notes both energies at evaluations.

    Args:
        objective: of the run.
        every: steps between two looks, each of which waits for the device.
    """

    def __init__(self, objective: JointEnergy, every: int) -> None:
        self.objective, self.every = objective, every

    def on_step(self, state: TrainState) -> None:
        if state.step % self.every:
            return
        data, chains = self.objective.energies.tolist()
        if not abs(data - chains) <= self.objective.limit:
            raise NonFiniteError(
                f"step {state.step}: the energy diverges, with means {data:.4g} of data and {chains:.4g} of chains; expected "
                f"them within limit={self.objective.limit:g}: raise penalty, length or restart, or lower step or learning_rate",
                step=state.step,
                t=math.nan,
                loss=data - chains,
            )

    def on_eval(self, state: TrainState) -> Mapping[str, float] | None:
        data, chains = self.objective.energies.tolist()
        return {"energy_data": data, "energy_chains": chains}
