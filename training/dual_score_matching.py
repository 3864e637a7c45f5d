r"""Dual score matching: an energy's gradient in x and its slope in the noise level, fitted together.

A score says how the density changes from point to point; where modes are apart, points between them are rare and say little,
so that an energy fitted by score matching has the modes' shapes and hardly their weights. The density's change from one noise
level to the next is known at every point. With l = log(sigma / alpha), y = x_t / alpha and U_y = -log p(y at level l),

    (1)  -grad log p_t(x)  =  E[ eps | x_t ] / sigma
    (2)  dU_y/dl           =  E[ D - |eps|^2 | x_t ]

for every Gaussian kernel x_t = alpha x_0 + sigma eps alike: p(y) is the mean over x_0 of N(y; x_0, kappa^2 I), and minus the
log of that kernel has the derivative D - |y - x_0|^2 / kappa^2 in log kappa. (Guth, Kadkhodaie, Simoncelli 2025,
arXiv:2506.05310, have (2) in another clock, with its kernel's own derivative as the target.) At large noise the modes are one,
with the right weights; (2) carries these down to small noise. And where the energy is that of a known Gaussian at T, (2) makes
it *normalised* at every level.

The target of (2) is averaged over the batch as that of (1) is (`training.stable_target`, whose proof that this is unbiased is
one for any function of the noise). For data and posterior that are Gaussian, eps given x_t has the variance h = 1 - q in each
dimension, q = sigma^2 / (alpha^2 data_std^2 + sigma^2), and |eps|^2 has on average 2 D h (1 + q): so

    (3)  loss = |eps_bar - eps_hat|^2 / D  +  dual (D - square_bar - slope)^2 / (2 D (1 + q))

has at `dual` = 1 as much noise in the second target as in the first, at every level. A smaller weight trains faster: until the
network knows how its energy fades with the noise, the slope's error holds back what the gradient's would have it learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from numerics import require_range
from sde_lib import SDE
from training.stable_target import PosteriorNoise, StableTarget
from training.trainable import NoisePredictor


class LevelledEnergy(Protocol):
    """What dual score matching asks of a model; `models.EnergyModel(…, normalised=True)` has it."""

    sde: SDE
    data_std: float | None

    def noise_and_slope(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """eps_hat `(B, *)`, and the energy's derivative (2) `(B,)`."""


@dataclass(frozen=True, kw_only=True)
class DualScoreMatching(StableTarget):
    """The loss (3) of the module for energies that are to be log-densities: w(t) times the errors of noise and slope.

    Its minimiser is U = -log p_t, up to one number for all levels, which the law at T tells. Classes, parts of a batch and the
    losses `(B,)` are as in `StableTarget`.

    Guth, Kadkhodaie, Simoncelli 2025, "Learning normalized image densities via dual score matching" (arXiv:2506.05310).

    Args:
        times: law of the times at which the loss is evaluated; uniform unless given.
        t_min: the smallest time; the SDE's unless given.
        weighting: the weighting w; 1 unless given.
        every: of how many points of the batch the network is asked at one.
        dual: weight of the slope's error; 1 gives both targets the same noise, 0 leaves the slope out.

    Raises:
        UserError: what `StableTarget` refuses, or a `dual` below 0.
    """

    needs: ClassVar[tuple[str, ...]] = ("noise", "noise_and_slope")
    differentiates: ClassVar[bool] = True
    """The slope is a derivative of the network, which then cannot be compiled; see `training.compilation`."""

    dual: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.dual, "dual", 0)

    def _error(
        self, model: NoisePredictor, x_t: Tensor, t: Tensor, labels: Tensor | None, target: PosteriorNoise
    ) -> Tensor:
        energy = cast(LevelledEnergy, model)
        noise, slope = energy.noise_and_slope(x_t, t) if labels is None else energy.noise_and_slope(x_t, t, labels)
        D = x_t[0].numel()
        q = 1 / (1 + (energy.data_std or 1.0) ** 2 * torch.exp(energy.sde.log_snr(t)))
        off = D - target.square - slope
        error = (target.mean - noise).flatten(1).square().mean(dim=1)
        return error + self.dual * off.square() / (2 * D * (1 + q)).to(off.dtype)
