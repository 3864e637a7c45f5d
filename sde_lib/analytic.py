r"""Exact scores and densities: data laws whose noised marginals are known in closed form.

With x_t = alpha x_0 + sigma eps ((2) in `sde_lib.base`):

    Gaussian         N(m, C)               ->  N(alpha m, alpha^2 C + sigma^2 I)
    mixture          sum w_k N(m_k, S_k)   ->  sum w_k N(alpha m_k, alpha^2 S_k + sigma^2 I),   S_k diagonal
    finite data set  points                ->  the mixture with S_k = 0 and equal weights

Samplers, likelihoods and losses are tested against these, with no network. Under VE the marginal at t = 0 is the data
blurred by sigma_min, by the convention of that SDE.

Everything is computed in float64; a score comes back in the dtype of its `x`. Data may have any event shape: means are
given in it, or flat.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from numerics import Generator, UserError, as_time, batch_time, normal, ordinary, uniform
from sde_lib.score import Score

if TYPE_CHECKING:
    from sde_lib.base import SDE, Time


class Oracle(ABC):
    """A law of data whose noised marginals x_t = alpha x_0 + sigma eps have a density and a score in closed form."""

    @property
    @abstractmethod
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""

    @abstractmethod
    def sample(self, n: int, *, generator: Generator = None) -> Tensor:
        """`n` clean samples, `(n, *)`, float64."""

    @abstractmethod
    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Log-density `(B,)` of flat `x` `(B, D)`; coefficients `(B,)`; all float64."""

    @abstractmethod
    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Its gradient, `(B, D)`."""

    def log_prob(self, sde: SDE, x: Tensor, t: Time) -> Tensor:
        """The log-density of x_t at `x` `(B, *)`, `(B,)` in nats, float64."""
        t = batch_time(t, x)
        return self._log_prob(x.flatten(1).to(torch.float64), sde.alpha(t), sde.sigma(t))

    def score(self, sde: SDE) -> Score:
        """The exact score of x_t."""

        def score(x: Tensor, t: Tensor) -> Tensor:
            """The gradient of log p_t at `x` `(B, *)`, in its dtype."""
            t = batch_time(t, x)
            value = self._score(x.flatten(1).to(torch.float64), sde.alpha(t), sde.sigma(t))
            return value.reshape(x.shape).to(x.dtype)

        return score

    def marginal_sample(self, sde: SDE, n: int, t: Time, *, generator: Generator = None) -> Tensor:
        """`n` samples of x_t, `(n, *)`, float64."""
        x_0 = self.sample(n, generator=generator)
        return sde.perturb(x_0, t, normal(x_0.shape, generator, dtype=torch.float64))


@dataclass(frozen=True)
class Gaussian(Oracle):
    """The law N(m, C), whose marginals are x_t ~ N(alpha m, alpha^2 C + sigma^2 I).

    Args:
        mean: m, `(D,)`, or in the event's shape.
        cov: C, `(D, D)`, or `(D,)` for a diagonal one.

    Raises:
        UserError: for shapes that do not fit, or a cov with an eigenvalue below 0.
    """

    mean: Tensor
    cov: Tensor
    _values: Tensor = field(init=False, repr=False)  # eigenvalues of cov
    _vectors: Tensor | None = field(init=False, repr=False)  # its eigenvectors, or None where it is diagonal

    def __post_init__(self) -> None:
        mean, cov = _float64(self.mean), _float64(self.cov)
        D = mean.numel()
        if cov.shape not in ((D,), (D, D)):
            raise UserError(f"got cov of shape {tuple(cov.shape)}; expected ({D},) or ({D}, {D}) for {D} dimensions")
        if cov.ndim == 1:
            values, vectors = cov, None
        else:
            values, vectors = torch.linalg.eigh(cov)
        if not bool((values > -1e-12).all()):
            raise UserError(f"got cov with the eigenvalue {float(values.min()):.3g}; expected none below 0")
        for name, value in (("mean", mean), ("cov", cov), ("_values", values.clamp(min=0)), ("_vectors", vectors)):
            object.__setattr__(self, name, value if value is None else ordinary(value))

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    def _rotate(self, x: Tensor, back: bool = False) -> Tensor:
        if self._vectors is None:
            return x
        U = self._vectors.to(x.device)
        return x @ (U.T if back else U)

    def sample(self, n: int, *, generator: Generator = None) -> Tensor:
        eps = normal((n, self.mean.numel()), generator, dtype=torch.float64)
        x = self.mean.flatten() + self._rotate(eps * self._values.sqrt(), back=True)
        return x.reshape(n, *self.event_shape)

    def whiten(self, sde: SDE, x: Tensor, t: Time) -> Tensor:
        """`x` `(B, *)` at `t` as `(B, D)` standard normal numbers, float64: centred, along the axes of C, at unit scale.

        The probability flow leaves them as they are.
        """
        t = batch_time(t, x)
        z, variances = self._whitened(x.flatten(1).to(torch.float64), sde.alpha(t), sde.sigma(t))
        return z / variances.sqrt()

    def _whitened(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - alpha.unsqueeze(1) * self.mean.flatten().to(x.device)
        variances = alpha.square().unsqueeze(1) * self._values.to(x.device) + sigma.square().unsqueeze(1)
        return self._rotate(centred), variances

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        z, variances = self._whitened(x, alpha, sigma)
        return -0.5 * (z.square() / variances + (2 * math.pi * variances).log()).sum(dim=1)

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        z, variances = self._whitened(x, alpha, sigma)
        return -self._rotate(z / variances, back=True)


@dataclass(frozen=True)
class GaussianMixture(Oracle):
    """The law sum_k w_k N(m_k, S_k), whose marginals are sum_k w_k N(alpha m_k, alpha^2 S_k + sigma^2 I), S_k diagonal.

    Args:
        means: `(K, D)`, or `(K, *)` in the event's shape.
        stds: `(K,)` for spherical components, or `(K, D)`.
        weights: `(K,)`, positive; normalised here.

    Raises:
        UserError: for shapes that do not fit, a weight <= 0 or a standard deviation < 0.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        means, stds, weights = _float64(self.means), _float64(self.stds), _float64(self.weights)
        K, D = means.shape[0], means[0].numel()
        if stds.shape not in ((K,), (K, D)) or weights.shape != (K,):
            raise UserError(
                f"got means {tuple(means.shape)}, stds {tuple(stds.shape)}, weights {tuple(weights.shape)}; "
                f"expected stds ({K},) or ({K}, {D}) and weights ({K},)"
            )
        if not bool((weights > 0).all() & (stds >= 0).all()):
            raise UserError("got a weight <= 0 or a standard deviation < 0; expected positive weights, stds >= 0")
        if stds.ndim == 1:
            stds = stds.unsqueeze(1).expand(K, D)
        for name, value in (("means", means), ("stds", stds), ("weights", weights / weights.sum())):
            object.__setattr__(self, name, ordinary(value))

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    def sample(self, n: int, *, generator: Generator = None) -> Tensor:
        u = uniform((n, 1), generator, dtype=torch.float64)
        k = (u > self.weights.cumsum(0)[:-1]).sum(dim=1)
        means = self.means.flatten(1)
        x = means[k] + self.stds[k] * normal((n, means.shape[1]), generator, dtype=torch.float64)
        return x.reshape(n, *self.event_shape)

    def responsibilities(self, sde: SDE, x: Tensor, t: Time) -> Tensor:
        """The probability of each component given x_t = `x` `(B, *)`: `(B, K)`, float64, rows that sum to 1."""
        t = batch_time(t, x)
        return self._components(x.flatten(1).to(torch.float64), sde.alpha(t), sde.sigma(t))[2].softmax(dim=1)

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centred x and variances `(B, K, D)`, and the log of weight times density `(B, K)`."""
        a, s = alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)
        centred = x.unsqueeze(1) - a * self.means.flatten(1).to(x.device)
        variances = a.square() * self.stds.to(x.device).square() + s.square()
        log_density = -0.5 * (centred.square() / variances + (2 * math.pi * variances).log()).sum(dim=2)
        return centred, variances, log_density + self.weights.to(x.device).log()

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._components(x, alpha, sigma)[2].logsumexp(dim=1)

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        centred, variances, log_joint = self._components(x, alpha, sigma)
        return -(log_joint.softmax(dim=1).unsqueeze(2) * centred / variances).sum(dim=1)


@dataclass(frozen=True)
class EmpiricalDistribution(Oracle):
    """Equal weights on finitely many points: the score that a perfect fit to a training set would learn.

    Its marginals are the mixture of N(alpha p_k, sigma^2 I) over the points p_k.

    Args:
        points: `(K, *)`, K >= 1.
    """

    points: Tensor

    def __post_init__(self) -> None:
        points = _float64(self.points)
        if points.ndim < 2 or len(points) < 1:
            raise UserError(f"got points of shape {tuple(points.shape)}; expected (K, *) with K >= 1")
        object.__setattr__(self, "points", ordinary(points))

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.points.shape[1:])

    def sample(self, n: int, *, generator: Generator = None) -> Tensor:
        u = uniform((n, 1), generator, dtype=torch.float64).squeeze(1)
        return self.points[(u * len(self.points)).long().clamp(max=len(self.points) - 1)]

    def _log_kernels(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        # |x - alpha p|^2 = alpha^2 |x / alpha - p|^2 keeps memory at (B, K); no expanded square, which would cancel
        distance = torch.cdist(
            x / alpha.unsqueeze(1),
            self.points.flatten(1).to(x.device),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        return -(distance * (alpha / sigma).unsqueeze(1)).square() / 2

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        log_sum = self._log_kernels(x, alpha, sigma).logsumexp(dim=1) - math.log(len(self.points))
        return log_sum - x.shape[1] * (sigma.log() + 0.5 * math.log(2 * math.pi))

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        mean = self._log_kernels(x, alpha, sigma).softmax(dim=1) @ self.points.flatten(1).to(x.device)
        return (alpha.unsqueeze(1) * mean - x) / sigma.square().unsqueeze(1)


def _float64(x: Tensor) -> Tensor:
    return ordinary(as_time(torch.as_tensor(x)))
