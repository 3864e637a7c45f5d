r"""Weightings of the denoising loss over time.

Every denoising loss of this family is, for some factor w(t) >= 0,

    (1)  L = E_{t ~ U[t_min, T]} w(t) E |eps - eps_hat(x_t, t)|^2 / D,       x_t = alpha x_0 + sigma eps,

in nats or without unit according to w. A weighting is the function w, relative to the error of the predicted noise;
errors of other predictions are this one rescaled: |x_0 - x_hat|^2 = kappa^2 |eps - eps_hat|^2 with kappa = sigma / alpha,
and |score - true score|^2 = |eps - eps_hat|^2 / sigma^2. So

    Simple       w = 1                     lambda = sigma^2 on the score's error: Song et al. 2021, Ho et al. 2020
    Likelihood   w = g^2 / sigma^2         lambda = g^2: Song, Durkan, Murray, Ermon 2021 (arXiv:2101.09258), theorem 1
    ELBO         w = (T - t_min) g^2 / (2 sigma^2)   the same in the bound's own scale: nats per dimension
    MinSNR       w = min(1, gamma / snr)   Hang et al. 2023 (arXiv:2303.09556), section 3.4
    SoftMinSNR   w = gamma / (snr + gamma) Crowson et al. 2024 (arXiv:2401.11605), section 3.4
    EDM          w = (kappa^2 + sd^2) / sd^2         Karras et al. 2022 (arXiv:2206.00364), table 1
    VelocityPrediction   w = ((alpha^2 + sigma^2) / alpha)^2    the error of v = alpha eps - sigma x_0:
                                           Salimans and Ho 2022 (arXiv:2202.00512), section 4
    FlowMatching w = (g^2 / (2 sigma))^2   the error of the flow's velocity alpha' x_0 + sigma' eps:
                                           Lipman et al. 2023 (arXiv:2210.02747), equation (9)

For the last two, put the noise's error into v and into dx/dt = f x + g^2 / (2 sigma) eps_hat. Here snr = 1 / kappa^2. For every
linear SDE g^2 / sigma^2 = -d log_snr / dt ((3) in `sde_lib.base`), so the likelihood weighting is the constant one with
respect to log_snr (Kingma et al. 2021, arXiv:2107.00630, equation (18)).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib import SDE
from training.errors import UsageError


class Weighting(ABC):
    """A frozen, keyword-only dataclass."""

    @abstractmethod
    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """w(t) of (1), the shape of `t`, float64."""


@dataclass(frozen=True, kw_only=True)
class Simple(Weighting):
    """w = 1."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class LikelihoodWeighting(Weighting):
    """w = g^2 / sigma^2."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (sde.g(t) / sde.sigma(t)).square()


@dataclass(frozen=True, kw_only=True)
class ELBO(Weighting):
    """w = (T - t_min) g^2 / (2 sigma^2), so that (1) is the diffusion term of the negative ELBO in nats per dimension.

    `t_min`: the smallest time that the times are drawn from; the SDE's unless given.
    """

    t_min: float | None = None

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        span = sde.T - (sde.t_min if self.t_min is None else self.t_min)
        return (sde.g(t) / sde.sigma(t)).square() * (span / 2)


@dataclass(frozen=True, kw_only=True)
class MinSNR(Weighting):
    """w = min(1, gamma / snr)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (self.gamma * torch.exp(-sde.log_snr(t))).clamp(max=1)


@dataclass(frozen=True, kw_only=True)
class SoftMinSNR(Weighting):
    """w = gamma / (snr + gamma); gamma = 1 / sd^2 for data of standard deviation sd, 4 in the paper."""

    gamma: float = 4.0

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return self.gamma / (sde.log_snr(t).exp() + self.gamma)


@dataclass(frozen=True, kw_only=True)
class EDMWeighting(Weighting):
    """w = (kappa^2 + sd^2) / sd^2: the error of the preconditioned network's own output, whatever the time.

    `data_std`: the standard deviation of the data in model units.
    """

    data_std: float = 0.5

    def __post_init__(self) -> None:
        _positive("data_std", self.data_std)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return 1 + torch.exp(-sde.log_snr(t)) / self.data_std**2


@dataclass(frozen=True, kw_only=True)
class VelocityPrediction(Weighting):
    """w = ((alpha^2 + sigma^2) / alpha)^2."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        return ((alpha.square() + sigma.square()) / alpha).square()


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Weighting):
    """w = (g^2 / (2 sigma))^2: conditional flow matching along the probability flow of the SDE."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (sde.g(t).square() / (2 * sde.sigma(t))).square()


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise UsageError(f"got {name}={value}; expected a number > 0")
