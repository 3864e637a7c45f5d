"""A mixture of Gaussians of any covariances: an exact reference, and what a mixture's posteriors are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from numerics import Generator, UserError, batch_time, normal, ordinary, uniform
from sde_lib.analytic import Oracle

if TYPE_CHECKING:
    from sde_lib.base import SDE, Time


@dataclass(frozen=True)
class CorrelatedMixture(Oracle):
    """The law sum_k w_k N(m_k, C_k), whose marginals are sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I).

    Args:
        means: `(K, D)`, or `(K, *)` in the event's shape.
        covs: `(K, D, D)`, symmetric and positive semi-definite.
        weights: `(K,)`, >= 0, normalised here.

    Raises:
        UserError: for shapes that do not fit, a negative weight, or a matrix that is no covariance.
    """

    means: Tensor
    covs: Tensor
    weights: Tensor
    _values: Tensor = field(init=False, repr=False)
    _vectors: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        means, covs, weights = (torch.as_tensor(v).to(torch.float64) for v in (self.means, self.covs, self.weights))
        K, D = len(means), means[0].numel()
        if covs.shape != (K, D, D) or weights.shape != (K,):
            raise UserError(
                f"got means {tuple(means.shape)}, covs {tuple(covs.shape)}, weights {tuple(weights.shape)}; expected covs "
                f"({K}, {D}, {D}) and weights ({K},)"
            )
        if not bool((weights >= 0).all()) or not float(weights.sum()) > 0:
            raise UserError("got weights that are negative or all 0; expected weights >= 0")
        values, vectors = torch.linalg.eigh(covs)
        symmetric = torch.allclose(covs, covs.mT, rtol=1e-8, atol=1e-10)
        if not symmetric or bool((values < -1e-9 * values.amax(dim=1, keepdim=True).clamp(min=0)).any()):
            raise UserError("got covs that are not symmetric and positive semi-definite; expected covariances")
        for name, value in (("means", means), ("covs", covs), ("weights", weights / weights.sum())):
            object.__setattr__(self, name, ordinary(value))
        object.__setattr__(self, "_values", ordinary(values.clamp(min=0)))
        object.__setattr__(self, "_vectors", ordinary(vectors))

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    @property
    def mean(self) -> Tensor:
        """Of the whole law, `(D,)`."""
        return self.weights @ self.means.flatten(1)

    @property
    def cov(self) -> Tensor:
        """Of the whole law, `(D, D)`."""
        off = self.means.flatten(1) - self.mean
        return torch.einsum("k,kde->de", self.weights, self.covs + off.unsqueeze(2) * off.unsqueeze(1))

    def sample(self, n: int, *, generator: Generator = None) -> Tensor:
        u = uniform((n, 1), generator, dtype=torch.float64)
        k = (u > self.weights.cumsum(0)[:-1]).sum(dim=1)
        eps = normal((n, self._values.shape[1]), generator, dtype=torch.float64) * self._values[k].sqrt()
        x = self.means.flatten(1)[k] + (self._vectors[k] @ eps.unsqueeze(2)).squeeze(2)
        return x.reshape(n, *self.event_shape)

    def responsibilities(self, sde: SDE, x: Tensor, t: Time) -> Tensor:
        """The probability of each component given x_t = `x` `(B, *)`: `(B, K)`, float64, rows that sum to 1."""
        t = batch_time(t, x)
        return self._components(x.flatten(1).to(torch.float64), sde.alpha(t), sde.sigma(t))[2].softmax(dim=1)

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each component the coordinates of x along its axes and their variances `(B, K, D)`, and log w_k N `(B, K)`."""
        a, s = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        centred = x.unsqueeze(1) - a * self.means.flatten(1).to(x.device)
        z = torch.einsum("bkd,kde->bke", centred, self._vectors.to(x.device))
        variances = a.square() * self._values.to(x.device) + s.square()
        log_density = -0.5 * (z.square() / variances + (2 * math.pi * variances).log()).sum(dim=2)
        return z, variances, log_density + self.weights.to(x.device).log()

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._components(x, alpha, sigma)[2].logsumexp(dim=1)

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        z, variances, log_joint = self._components(x, alpha, sigma)
        return -torch.einsum("bk,bke,kde->bd", log_joint.softmax(dim=1), z / variances, self._vectors.to(x.device))
