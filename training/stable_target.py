r"""Denoising score matching whose target is averaged over a batch: the stable target field.

The target eps of a noised point x_t = alpha x_0 + sigma eps says from which point of the data it came, which x_t itself does
not. Given the batch x^1 … x^n, from any of which x_t may have come, its mean is known:

    (1)  eps_bar(x_t) = sum_i w_i (x_t - alpha x^i) / sigma,      w_i proportional to exp(-|x_t - alpha x^i|^2 / (2 sigma^2))

(Xu, Tong, Jaakkola 2023, arXiv:2302.00670). It is -sigma times the score of the batch's own law, noised.

**It is not biased.** The paper writes of a bias that vanishes as n grows; there is none where, as here, the point from which
x_t came is itself one of the n. A batch comes in no order, so each of its points is as likely as another to be that one: given
the batch, x_t has the density q_batch(x_t) = mean_i N(x_t; alpha x^i, sigma^2), and

    (2)  E[score_batch | x_t] = E[q_batch score_batch] / E[q_batch] = E[grad q_batch](x_t) / q(x_t) = grad log q(x_t)

over batches of independent points; over batches drawn without repeats from a finite set, the score of that set's law. It is
eps's mean given (x_t, batch), so its variance is the smaller one by Rao and Blackwell: what is left of it is how far a batch's
law is from the data's. It falls as the number of points within sigma of x_t grows, so it helps in few dimensions, and at noise
levels that join the data's modes; for images at small noise w is 1 for one point, and (1) is eps again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from numerics import expand_as, require_count
from sde_lib import SDE
from training.errors import UsageError
from training.objectives import Draws, TimedObjective, predicted_noise
from training.streams import StepStreams
from training.trainable import NoisePredictor
from training.weighting import Simple, Weighting, require_weighting


class PosteriorNoise(NamedTuple):
    """Posterior means over a batch, of what is known of the noise in a point.

    Attributes:
        mean: of eps, `(B, *)`, (1) of the module.
        square: of |eps|^2, `(B,)`.
    """

    mean: Tensor
    square: Tensor


@torch.no_grad()
def posterior_noise(
    sde: SDE, x_t: Tensor, t: Tensor, reference: Tensor, *, same: Tensor | None = None
) -> PosteriorNoise:
    """The means of eps and of |eps|^2 given x_t and the reference points, at the cost of B n distances.

    Args:
        x_t: noised points `(B, *)`.
        t: their times `(B,)`.
        reference: clean points `(n, *)`.
        same: `(B, n)`, which of them x_t may have come from; any unless given.
    """
    exact = torch.promote_types(x_t.dtype, torch.float32)
    alpha, sigma = (c.to(exact).unsqueeze(1) for c in (sde.alpha(t), sde.sigma(t)))
    x, points = x_t.flatten(1).to(exact), reference.flatten(1).to(exact)
    with torch.autocast(x.device.type, enabled=False):
        # differences, not products, which cancel where sigma is small
        distance = torch.cdist(x / alpha, points, compute_mode="donot_use_mm_for_euclid_dist")
        log_w = distance.square_().mul_(
            -((alpha / sigma).square()) / 2
        )  # in place: B n numbers are the largest array here
        w = (log_w if same is None else log_w.masked_fill(~same, -torch.inf)).softmax(dim=1)
        eps_bar = (x - alpha * (w @ points)) / sigma
        square = -2 * torch.linalg.vecdot(w, log_w)
    return PosteriorNoise(eps_bar.reshape(x_t.shape).to(x_t.dtype), square.to(x_t.dtype))


def stable_noise(sde: SDE, x_t: Tensor, t: Tensor, reference: Tensor, *, same: Tensor | None = None) -> Tensor:
    """The mean (1) of eps given x_t and the reference points, `(B, *)`: that of `posterior_noise`."""
    return posterior_noise(sde, x_t, t, reference, same=same).mean


@dataclass(frozen=True, kw_only=True)
class StableTarget(TimedObjective):
    """Denoising with a batch's mean as its target: w(t) |eps_bar(x_t) - eps_hat(x_t, t)|^2 / D, eps_bar (1) of the module.

    Its gradient's expectation is that of `DSM`, its variance is smaller. The network is asked at one of `every` points of a
    batch, all of which are the reference: a large batch is then cheap. The losses `(B,)` of the others are 0, those of the
    asked ones `every` times as large. Points of a class are compared with those of that class. Where a batch is divided
    (`accumulate`, several processes), the reference is the part.

    Xu, Tong, Jaakkola 2023, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models" (arXiv:2302.00670).

    Args:
        times: law of the times at which the loss is evaluated; uniform unless given.
        t_min: the smallest time; the SDE's unless given.
        weighting: the weighting w; 1 unless given.
        every: of how many points of the batch the network is asked at one.

    Raises:
        UserError: a weighting or times of another class, times that learn from losses together with `every` above 1, a t_min
            that is negative or not used, or an `every` below 1.
    """

    weighting: Weighting = Simple()
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weighting(self.weighting)
        require_count(self.every, "every")
        if self.every > 1 and self.times.state_dict():
            raise UsageError(
                f"got every={self.every} with {self.times}, which learns from the losses of all points; expected every=1"
            )

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        draws = super().draw(sde, (-(-int(shape[0]) // self.every), *shape[1:]), streams, dtype=dtype)
        # the loop divides what is drawn as it divides the batch
        return {name: value.repeat_interleave(self.every, dim=0)[: int(shape[0])] for name, value in draws.items()}

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        rows = slice(None, None, self.every)
        t, sde = draws["t"][rows], model.sde
        x_t = sde.perturb(x_0[rows], t, draws["eps"][rows])
        asked = None if labels is None else labels[rows]
        same = None if labels is None or asked is None else asked.unsqueeze(1) == labels
        loss = self._error(model, x_t, t, asked, posterior_noise(sde, x_t, t, x_0, same=same))
        loss = loss * expand_as(self.weighting(sde, t), loss)
        if self.every == 1:
            return loss
        spread = loss.new_zeros(len(x_0))
        spread[rows] = loss * (len(x_0) / len(loss))
        return spread

    def _error(
        self, model: NoisePredictor, x_t: Tensor, t: Tensor, labels: Tensor | None, target: PosteriorNoise
    ) -> Tensor:
        """What is made small for each of the points that the network is asked at, `(b,)`."""
        return (target.mean - predicted_noise(model, x_t, t, labels)).flatten(1).square().mean(dim=1)
