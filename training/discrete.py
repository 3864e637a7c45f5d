r"""The losses of DDPM and NCSN, as denoising score matching at the times of their tables.

On `TableVPSDE(betas=...)` step i = 1 ... N stands at t = i T / N, on `TableVESDE(sigmas=...)` level i = 0 ... L - 1 at
t = i T / (L - 1), and there the SDE's kernel is the chain's. So

    (1)  L_simple = E_i |eps - eps_hat(x_i, i)|^2                        Ho et al. 2020, equation (14)
    (2)  L_SMLD = E_i sigma_i^2 / 2 |s(x_i, sigma_i) + (x_i - x_0) / sigma_i^2|^2     Song and Ermon 2019, equations (5), (6)
                = E_i 1/2 |eps - eps_hat(x_i, i)|^2

are the simple weighting at discrete times, up to the scale: the papers sum over dimensions, a `DSM` averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import require_count
from sde_lib import SDE
from training.errors import UsageError
from training.objectives import TimedObjective, dsm_loss
from training.time_sampling import TimeSampler
from training.trainable import NoisePredictor
from training.weighting import Simple


@dataclass(frozen=True, kw_only=True)
class DiscreteTime(TimeSampler):
    """Each of N evenly spaced times equally often, weight 1: t = i T / N, i = 1 ... N, or from 0 on t = i T / (N - 1).

    Args:
        levels: number of times, N.
        zero: whether t = 0 is one of the times: True for a ladder of sigmas, False for a chain of betas.
        stratified: whether a batch has every time equally often; else its times are independent.

    Raises:
        UserError: too few levels.
    """

    levels: int = 1000
    zero: bool = False
    stratified: bool = True
    discrete = True

    def __post_init__(self) -> None:
        require_count(self.levels, "levels", 2 if self.zero else 1)

    def quantile(self, sde: SDE, u: Tensor, t_min: float) -> Tensor:
        i = (u * self.levels).floor().clamp(0, self.levels - 1)
        return i * (sde.T / (self.levels - 1)) if self.zero else (i + 1) * (sde.T / self.levels)

    def density(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        raise UsageError("got a request for the density of discrete times; expected a continuous sampler")

    def weight(self, sde: SDE, t: Tensor, t_min: float) -> Tensor:
        return torch.ones_like(t)

    def __call__(
        self, sde: SDE, n: int, generator: torch.Generator | None = None, t_min: float | None = None
    ) -> tuple[Tensor, Tensor]:
        return super().__call__(sde, n, generator, 0.0)  # a table's times are its own, also below the SDE's t_min


@dataclass(frozen=True, kw_only=True)
class DDPMSimple(TimedObjective):
    """DDPM's L_simple = E_i |eps - eps_hat(x_i, i)|^2 / D, `(B,)`, at the steps i = 1 ... N of a table of betas.

    Ho et al. 2020 (arXiv:2006.11239), equation (14).

    Args:
        times: `DiscreteTime(levels=N)`; N = 1000 unless given.
        t_min: not used: a table has its own times.
        per_dimension: whether the loss is the mean over the D dimensions, as in `DSM`; False for the paper's sum.

    Raises:
        UserError: times of another class.
    """

    times: TimeSampler = DiscreteTime()
    per_dimension: bool = True

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        loss = dsm_loss(model, x_0, draws["t"], draws["eps"], weighting=Simple(), labels=labels)
        return loss if self.per_dimension else loss * x_0[0].numel()


@dataclass(frozen=True, kw_only=True)
class SMLD(TimedObjective):
    """NCSN's L_SMLD = E_i 1/2 |eps - eps_hat(x_i, sigma_i)|^2 / D, `(B,)`, at the levels of a ladder of sigmas.

    That is sigma_i^2 / 2 |score + (x_i - x_0) / sigma_i^2|^2: Song and Ermon 2019 (arXiv:1907.05600), equations (5), (6).

    Args:
        times: `DiscreteTime(levels=L, zero=True)`; L = 10 unless given.
        t_min: not used: a table has its own times.
        per_dimension: whether the loss is the mean over the D dimensions; False for the paper's sum.

    Raises:
        UserError: times of another class.
    """

    times: TimeSampler = DiscreteTime(levels=10, zero=True)
    per_dimension: bool = True

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        loss = dsm_loss(model, x_0, draws["t"], draws["eps"], weighting=Simple(), labels=labels) / 2
        return loss if self.per_dimension else loss * x_0[0].numel()
