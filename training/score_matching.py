r"""Score matching without a target: exact (Hyvarinen), sliced, and by finite differences.

Integration by parts removes the unknown score of the data: for any score s of x ~ p

    (1)  1/2 E|s - grad log p|^2 = E[ tr grad s + 1/2 |s|^2 ] + 1/2 E|grad log p|^2
    (2)  tr grad s = E_v v' (grad s) v,        v random with covariance I

(1) is Hyvarinen 2005, "Estimation of non-normalized statistical models by score matching", theorem 1; (2) with the exact
|s|^2 is sliced score matching with variance reduction, Song, Garg, Shi, Ermon 2020 (arXiv:1905.07088), equation (8). Here
x is x_t, and with s = -eps_hat / sigma the loss is scaled as the denoising loss is,

    (3)  w(t) (|eps_hat|^2 - 2 sigma tr grad eps_hat) / D,

whose expectation is that of w |eps - eps_hat|^2 / D minus w (Vincent 2011; E|eps|^2 = D). The exact trace takes one
backward pass for each dimension, so it is for small networks and energies; second derivatives of the network are needed,
except where the product in (2) is a difference of two values of the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from numerics import expand_as, rademacher, require_count, require_positive
from sde_lib import SDE
from training.objectives import Draws, TimedObjective, predicted_noise
from training.streams import StepStreams
from training.trainable import NoisePredictor
from training.weighting import Simple, Weighting, require_weighting


@dataclass(frozen=True, kw_only=True)
class ExactScoreMatching(TimedObjective):
    """Score matching without a target: loss = w(t) (|eps_hat|^2 - 2 sigma tr grad eps_hat) / D, `(B,)`, with the exact trace.

    One backward pass for each dimension, and second derivatives of the network: for small networks and energies. Its
    expectation is that of `DSM` minus w. Hyvarinen 2005, theorem 1.

    Args:
        times: at which the loss is evaluated; uniform unless given.
        t_min: the smallest time; the SDE's unless given.
        weighting: w; 1 unless given.

    Raises:
        UserError: a weighting or times that are none, or a t_min that is negative or not used.
    """

    weighting: Weighting = Simple()

    differentiates: ClassVar[bool] = True
    """The loss takes derivatives of the network, which then cannot be compiled; see `training.compilation`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weighting(self.weighting)

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        t = draws["t"]
        with torch.enable_grad():
            x = model.sde.perturb(x_0, t, draws["eps"]).detach().requires_grad_()
            eps_hat = predicted_noise(model, x, t, labels)
            trace = self._trace(eps_hat, x, draws)
        D = x[0].numel()
        loss = (eps_hat.flatten(1).square().sum(dim=1) - 2 * expand_as(model.sde.sigma(t), trace) * trace) / D
        return loss * expand_as(self.weighting(model.sde, t), loss)

    def _trace(self, eps_hat: Tensor, x: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """tr grad eps_hat, `(B,)`."""
        flat = eps_hat.flatten(1)
        columns = [
            torch.autograd.grad(flat[:, i].sum(), x, create_graph=True)[0].flatten(1)[:, i]
            for i in range(flat.shape[1])
        ]
        return torch.stack(columns, dim=1).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class SlicedScoreMatching(ExactScoreMatching):
    """Sliced score matching: loss = w(t) (|eps_hat|^2 - 2 sigma mean_v v' (grad eps_hat) v) / D, `(B,)`, v random signs.

    One backward pass for each probe, and second derivatives of the network. The exact loss is its expectation. Song, Garg,
    Shi, Ermon 2020 (arXiv:1905.07088), equation (8), with the variance reduction there.

    Args:
        times: at which the loss is evaluated; uniform unless given.
        t_min: the smallest time; the SDE's unless given.
        weighting: w; 1 unless given.
        probes: how many v for each sample.

    Raises:
        UserError: a weighting or times that are none, a t_min that is negative or not used, or no probes.
    """

    probes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.probes, "probes")

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        draws = super().draw(sde, shape, streams, dtype=dtype)
        return {**draws, "v": _signs(shape, self.probes, streams, dtype)}

    def _trace(self, eps_hat: Tensor, x: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for v in draws["v"].unbind(dim=1):
            (product,) = torch.autograd.grad((eps_hat * v).sum(), x, create_graph=True)
            parts.append((product * v).flatten(1).sum(dim=1))
        return torch.stack(parts, dim=1).mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class FiniteDifferenceScoreMatching(TimedObjective):
    r"""Sliced score matching by finite differences: no second derivatives, and the network is asked at x +- h v alone.

        loss = w(t) mean_v (|m|^2 - sigma v . (e_+ - e_-) / h) / D,    e_+- = eps_hat(x +- h v),   m = (e_+ + e_-) / 2

    `(B,)`, v random signs, h = `step` sigma(t). Both terms are those of `SlicedScoreMatching` up to O(h^2), so the bias falls
    with the square of the step, and rounding grows with its inverse. The idea is that of Pang et al. 2020, "Efficient
    Learning of Generative Models via Finite-Difference Score Matching" (arXiv:2007.03317).

    Args:
        times: at which the loss is evaluated; uniform unless given.
        t_min: the smallest time; the SDE's unless given.
        weighting: w; 1 unless given.
        probes: how many v for each sample.
        step: h in units of sigma(t), the length below which the law of x_t is smooth.

    Raises:
        UserError: a weighting or times that are none, a t_min that is negative or not used, no probes, or no step.
    """

    weighting: Weighting = Simple()
    probes: int = 1
    step: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weighting(self.weighting)
        require_count(self.probes, "probes")
        require_positive(self.step, "step")

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        draws = super().draw(sde, shape, streams, dtype=dtype)
        return {**draws, "v": _signs(shape, self.probes, streams, dtype)}

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        t, v = draws["t"], draws["v"]
        n = v.shape[1]
        sigma = model.sde.sigma(t)
        x = model.sde.perturb(x_0, t, draws["eps"]).unsqueeze(1)
        shift = expand_as(self.step * sigma, v) * v
        both = torch.cat([x + shift, x - shift], dim=1).flatten(0, 1)
        classes = None if labels is None else labels.repeat_interleave(2 * n)
        eps_hat = predicted_noise(model, both, t.repeat_interleave(2 * n), classes)
        ahead, behind = eps_hat.reshape(len(v), 2 * n, -1).chunk(2, dim=1)
        square = ((ahead + behind) / 2).square().sum(dim=2)
        # 2 sigma times the quotient over 2 h, with h = step sigma
        slope = ((ahead - behind) * v.flatten(2)).sum(dim=2) / self.step
        loss = (square - slope).mean(dim=1) / x_0[0].numel()
        return loss * expand_as(self.weighting(model.sde, t), loss)


def _signs(shape: Sequence[int], probes: int, streams: StepStreams, dtype: torch.dtype) -> Tensor:
    """`probes` vectors of random signs for each sample of `shape` `(B, *)`: `(B, probes, *)`."""
    return rademacher((shape[0], probes, *shape[1:]), streams.generator("probes"), device=streams.device, dtype=dtype)
