"""Exact references for tests: SDEs, laws of data with closed forms, and statistics with stated error probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from numerics import SampleStreams
from sde_lib import SDE, VESDE, VPSDE, SubVPSDE
from sde_lib.analytic import Gaussian, GaussianMixture, Oracle

SDES: dict[str, SDE] = {"vp": VPSDE(), "ve": VESDE(), "sub_vp": SubVPSDE()}

FAMILY_WISE = 1e-3
"""The probability that any one of a family of statistical tests fails although all is right."""


def gaussian() -> Gaussian:
    """A correlated Gaussian in two dimensions, off the origin."""
    return Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]]))


def mixture() -> GaussianMixture:
    """Two modes of weights 0.8 and 0.2 in two dimensions."""
    return GaussianMixture(torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), torch.tensor([0.4, 0.4]), torch.tensor([0.8, 0.2]))


def moments(oracle: Oracle, sde: SDE, t: float) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and covariance `(D, D)` of x_t, exact."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    if isinstance(oracle, Gaussian):
        mean = oracle.mean.flatten()
        cov = oracle.cov if oracle.cov.ndim == 2 else oracle.cov.diag()
    else:
        w, m, s = oracle.weights, oracle.means.flatten(1), oracle.stds
        mean = w @ m
        cov = torch.einsum("k,kd,ke->de", w, m - mean, m - mean) + (w @ s.square()).diag()
    return alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(len(mean), dtype=torch.float64)


def whitened_moments_p(oracle: Oracle, sde: SDE, t: float, x: Tensor) -> float:
    """The p-value of one chi-square test that samples `x` `(n, D)` have the law of x_t.

    The features are the whitened samples, the products of two of them, and for a mixture the probabilities of its modes
    given x, whose expectations are 0, the identity and the weights. Their means are asymptotically normal, and
    Hotelling's statistic with the samples' own covariance of the features is a chi-square of as many degrees as there
    are features.
    """
    from scipy.stats import chi2

    x = x.flatten(1).double()
    mean, cov = moments(oracle, sde, t)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (x - mean).T, upper=False).T
    i, j = torch.triu_indices(len(mean), len(mean))
    features = [z, z[:, i] * z[:, j] - (i == j).double()]
    if isinstance(oracle, GaussianMixture):
        features.append((oracle.responsibilities(sde, x, t) - oracle.weights)[:, :-1])
    phi = torch.cat(features, dim=1)
    centre = phi.mean(dim=0)
    statistic = len(x) * centre @ torch.linalg.solve(phi.T.cov(), centre)
    return float(chi2.sf(float(statistic), phi.shape[1]))


class UnitNoise(SampleStreams):
    """Noise for measuring the response of a sampler: sample `first + d D + j` gets 1 in entry j of draw d, and else 0."""

    def __init__(self, first: int, draws: int) -> None:
        super().__init__(0)
        self.first, self.draws = first, draws

    def normal(self, shape, *, device=None) -> Tensor:
        D = math.prod(shape[1:])
        if self.draw >= self.draws:
            raise AssertionError(f"more than {self.draws} draws")
        z = torch.zeros(shape[0], D, dtype=torch.float64)
        at = self.first + self.draw * D
        z[at : at + D] = torch.eye(D, dtype=torch.float64)
        self.draw += 1
        return z.reshape(shape)


def exact_law(sampler, sde: SDE, oracle: Gaussian, draws: int) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and covariance `(D, D)` of what `sampler` returns on Gaussian data, started from the marginal at T.

    With the score of a Gaussian each step is affine in x and linear in its noise, so the law follows from the sampler's
    own responses to unit inputs, with no Monte Carlo error.
    """
    D = oracle.mean.numel()
    mean, cov = moments(oracle, sde, sde.T)
    batch = 1 + D + draws * D
    x_T = mean.repeat(batch, 1)
    x_T[1 : 1 + D] += torch.eye(D, dtype=torch.float64)
    x = sampler(sde, oracle.score(sde), (batch, D), x_T=x_T, generator=UnitNoise(1 + D, draws)).x
    response = x[1:] - x[0]
    A, B = response[:D].T, response[D:]
    return x[0], A @ cov @ A.T + B.T @ B


def law_error(law: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """How far a mean and a covariance are off, in units of the true law: the largest of the whitened entries."""
    L = torch.linalg.cholesky(truth[1])
    mean = torch.linalg.solve_triangular(L, (law[0] - truth[0]).unsqueeze(1), upper=False)
    half = torch.linalg.solve_triangular(L, law[1], upper=False)
    cov = torch.linalg.solve_triangular(L, half.T, upper=False)
    return float(torch.cat([mean.flatten(), (cov - torch.eye(len(cov))).flatten()]).abs().max())


def fast_mixture_score(sde: SDE):
    """The score of `mixture()` in the dtype of x, for large batches that share one time.

    Two spherical modes of one width have the posterior weight sigmoid(a + b.x), so a batch costs one product.
    """
    law = mixture()
    (m_1, m_2), s, (w_1, w_2) = law.means, float(law.stds[0, 0]), law.weights.tolist()

    def score(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(sde.alpha(t[0])), float(sde.sigma(t[0]))
        v = (alpha * s) ** 2 + sigma**2
        b = (alpha / v * (m_2 - m_1)).to(x.dtype)
        a = math.log(w_2 / w_1) - alpha**2 / (2 * v) * float(m_2 @ m_2 - m_1 @ m_1)
        weight = torch.sigmoid(x @ b + a).unsqueeze(1)
        mean = alpha * (m_1.to(x.dtype) + weight * (m_2 - m_1).to(x.dtype))
        return (mean - x) / v

    return score
