r"""Weightings of the denoising loss over time.

Every denoising loss of this family is, for some factor w(t) >= 0,

    (1)  L = E_{t ~ U[t_min, T]} w(t) E |eps - eps_hat(x_t, t)|^2 / D,       x_t = alpha x_0 + sigma eps,

in nats or without unit according to w. A weighting is the function w, relative to the error of the predicted noise;
errors of other predictions are this one rescaled. With kappa = sigma / alpha and snr = 1 / kappa^2:

    |x_0 - x_hat|^2             = kappa^2 |eps - eps_hat|^2
    |score - true score|^2      = |eps - eps_hat|^2 / sigma^2
    |v - v_hat|^2               = ((alpha^2 + sigma^2) / alpha)^2 |eps - eps_hat|^2      v = alpha eps - sigma x_0
    |velocity - true velocity|^2 = (g^2 / (2 sigma))^2 |eps - eps_hat|^2                 dx/dt = f x + g^2 / (2 sigma) eps

For every linear SDE g^2 / sigma^2 = -d log_snr / dt ((3) in `sde_lib.base`), so the likelihood weighting is the constant one
with respect to log_snr (Kingma et al. 2021, arXiv:2107.00630, equation (18)).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError, require_positive
from sde_lib import SDE


class Weighting(ABC):
    """The factor w(t) of the denoising loss E w(t) |eps - eps_hat|^2 / D.

    A weighting of your own is a frozen, keyword-only dataclass with `__call__`.
    """

    @abstractmethod
    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """w(t), the shape of `t`, float64."""


def require_weighting(value: object) -> None:
    """Refuses what is no weighting.

    Raises:
        UserError: with the value.
    """
    if not isinstance(value, Weighting):
        raise UserError(f"got weighting={value!r}; expected an object such as Simple() or LikelihoodWeighting()")


@dataclass(frozen=True, kw_only=True)
class Simple(Weighting):
    """w = 1: every time counts the same for the noise's error, sigma^2 for the score's.

    Ho et al. 2020 (arXiv:2006.11239), equation (14); Song et al. 2021 (arXiv:2011.13456), section 3.3.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class ScoreError(Weighting):
    """w = 1 / sigma^2: the error of the score itself, so that exact score matching has Hyvarinen's scale, |s|^2 + 2 tr grad s.

    Hyvarinen 2005, theorem 1, times 2 / D. For one noise level; over many, the smallest sigma would have all the weight.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.sigma(t).square().reciprocal()


@dataclass(frozen=True, kw_only=True)
class LikelihoodWeighting(Weighting):
    """w = g^2 / sigma^2: the loss bounds the negative log-likelihood, up to a constant and a factor.

    On the score's error that is g^2. Its variance is small only with times drawn for it: `ImportanceTime`. Song, Durkan,
    Murray, Ermon 2021 (arXiv:2101.09258), theorem 1.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (sde.g(t) / sde.sigma(t)).square()


@dataclass(frozen=True, kw_only=True)
class ELBO(Weighting):
    """w = (T - t_min) g^2 / (2 sigma^2): the loss is the diffusion term of the negative ELBO, in nats per dimension.

    The likelihood weighting in the bound's own scale: Song, Durkan, Murray, Ermon 2021 (arXiv:2101.09258), theorem 3.

    Args:
        t_min: the smallest time that times are drawn from; the SDE's unless given.
    """

    t_min: float | None = None

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        span = sde.T - (sde.t_min if self.t_min is None else self.t_min)
        return (sde.g(t) / sde.sigma(t)).square() * (span / 2)


@dataclass(frozen=True, kw_only=True)
class MinSNR(Weighting):
    """w = min(1, gamma / snr): times of little noise count less, because the tasks of all times conflict.

    Hang et al. 2023 (arXiv:2303.09556), section 3.4, where it is min(snr, gamma) on the error of x_0.

    Args:
        gamma: the snr above which w falls; the paper's is 5.

    Raises:
        UserError: a gamma that is not positive.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        require_positive(self.gamma, "gamma")

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (self.gamma * torch.exp(-sde.log_snr(t))).clamp(max=1)


@dataclass(frozen=True, kw_only=True)
class SoftMinSNR(Weighting):
    """w = gamma / (snr + gamma): `MinSNR` without the corner.

    Crowson et al. 2024 (arXiv:2401.11605), section 3.4.

    Args:
        gamma: the snr at which w = 1/2: 1 / sd^2 for data of standard deviation sd, so 4 in the paper.

    Raises:
        UserError: a gamma that is not positive.
    """

    gamma: float = 4.0

    def __post_init__(self) -> None:
        require_positive(self.gamma, "gamma")

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return self.gamma / (sde.log_snr(t).exp() + self.gamma)


@dataclass(frozen=True, kw_only=True)
class EDMWeighting(Weighting):
    """w = (kappa^2 + sd^2) / sd^2, kappa = sigma / alpha: the error of the preconditioned network's own output at every time.

    Karras et al. 2022 (arXiv:2206.00364), table 1, where it is (sigma^2 + sd^2) / (sigma sd)^2 on the error of x_0. It goes
    with `LogNormal` times.

    Args:
        data_std: sd, the standard deviation of the data in model units; the paper's is 0.5.

    Raises:
        UserError: a data_std that is not positive.
    """

    data_std: float = 0.5

    def __post_init__(self) -> None:
        require_positive(self.data_std, "data_std")

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return 1 + torch.exp(-sde.log_snr(t)) / self.data_std**2


@dataclass(frozen=True, kw_only=True)
class VelocityPrediction(Weighting):
    """w = ((alpha^2 + sigma^2) / alpha)^2: the error of v = alpha eps - sigma x_0.

    Salimans and Ho 2022 (arXiv:2202.00512), section 4.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        return ((alpha.square() + sigma.square()) / alpha).square()


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Weighting):
    """w = (g^2 / (2 sigma))^2: the error of the velocity alpha' x_0 + sigma' eps of the SDE's probability flow.

    Lipman et al. 2023 (arXiv:2210.02747), equation (9).
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (sde.g(t).square() / (2 * sde.sigma(t))).square()
