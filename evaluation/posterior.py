r"""The referee of posterior sampling: laws whose posterior is known, and how far samples are from it.

For data of the law sum_k w_k N(m_k, C_k) and y = A x + n z the posterior is a mixture again,

    (1)  w_k' proportional to w_k N(y; A m_k, S_k),      S_k = A C_k A^T + n^2
         m_k' = m_k + G_k (y - A m_k),      C_k' = C_k - G_k A C_k,      G_k = C_k A^T S_k^-1

and with K = 1 the conditional Gaussian (Rasmussen and Williams 2006, "Gaussian processes for machine learning", (A.6)).
Samples of x at the time t have then the law of `CorrelatedMixture`'s marginal, whose moments they are compared with; no step
bias, prior or denoising is mixed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from evaluation.estimate import Estimate, jackknife
from numerics import UserError, take
from sde_lib import SDE, CorrelatedMixture, Measurement
from sde_lib.analytic import Gaussian, GaussianMixture


def as_mixture(law: Gaussian | GaussianMixture | CorrelatedMixture) -> CorrelatedMixture:
    """A law of Gaussians as a mixture of any covariances."""
    if isinstance(law, Gaussian):
        cov = law.cov if law.cov.ndim == 2 else law.cov.diag()
        return CorrelatedMixture(law.mean.unsqueeze(0), cov.unsqueeze(0), torch.ones(1))
    if isinstance(law, GaussianMixture):
        return CorrelatedMixture(law.means, torch.diag_embed(law.stds.square()), law.weights)
    return law


def matrix_of(measurement: Measurement) -> Tensor:
    """The operator of one measurement as a matrix `(m, D)`, float64, of one call with D unit vectors in the dtype of y.

    Raises:
        UserError: for several measurements, or an operator without an adjoint.
    """
    if len(measurement.y) != 1:
        raise UserError(f"got {len(measurement.y)} measurements; expected one: measurement.take(torch.tensor([i]))")
    if measurement.event_shape is None:
        raise UserError("got an operator without an adjoint; expected a linear one, which has a matrix")
    D, y = math.prod(measurement.event_shape), measurement.y
    operator = take(measurement.operator, torch.zeros(D, dtype=torch.int64, device=y.device))
    units = torch.eye(D, dtype=y.dtype, device=y.device).reshape(D, *measurement.event_shape)
    return operator(units).flatten(1).T.to("cpu", torch.float64)


def exact_posterior(law: Gaussian | GaussianMixture | CorrelatedMixture, measurement: Measurement) -> CorrelatedMixture:
    """The law of data of `law` given one measurement, (1).

    Args:
        law: of the data.
        measurement: y `(1, ...)`; entries of no noise and no signal, as a mask's holes, say nothing.

    Raises:
        UserError: for several measurements, one of data of another size, or one that the law rules out.
    """
    prior = as_mixture(law)
    A, y = matrix_of(measurement), measurement.y.flatten().to("cpu", torch.float64)
    std = torch.as_tensor(measurement.std, dtype=torch.float64).to("cpu")
    noise = std.expand(measurement.y.shape[1:]).flatten()
    seen = A.abs().sum(dim=1) > 0
    A, y, noise = A[seen], y[seen], noise[seen]
    m, C = prior.means.flatten(1), prior.covs
    if A.shape[1] != m.shape[1]:
        raise UserError(
            f"got a law of {m.shape[1]} numbers and a measurement of {A.shape[1]}; expected both of the same data"
        )
    exact, log_w = noise == 0, prior.weights.log()
    if bool(exact.any()):
        m, C, log_w = _without_noise(m, C, log_w, A[exact], y[exact], torch.finfo(measurement.y.dtype).eps)
    if not bool(exact.all()):
        m, C, log_w = _with_noise(m, C, log_w, A[~exact], y[~exact], noise[~exact])
    return CorrelatedMixture(m.reshape(prior.means.shape), C, log_w.softmax(dim=0))


def _without_noise(
    m: Tensor, C: Tensor, log_w: Tensor, A: Tensor, y: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(1) where n = 0: means, covariances and logarithms of weights given y = A x, in which `eps` is y's rounding.

    Raises:
        UserError: where no component can have such data.
    """
    size = A.norm(dim=1)
    A, y = A / size.unsqueeze(1), y / size  # rows of one length, so that a small one is not taken for rounding
    AC, off = A @ C, y - m @ A.T
    # S^-1 where S has variance; in the other directions y is what the component says, or the component is ruled out
    variances, axes = torch.linalg.eigh(AC @ A.T)
    free = variances > 10 * len(y) * torch.finfo(torch.float64).eps * variances[:, -1:]
    seen_off = (axes.mT @ off.unsqueeze(2)).squeeze(2)
    rounding = 1e3 * eps * (y.norm() + (m @ A.T).norm(dim=1))
    possible = torch.where(free, 0.0, seen_off).norm(dim=1) <= rounding
    if not bool(possible.any()):
        raise UserError(
            "got a measurement that the law rules out: without noise y is none that the data can have; expected std > 0, or "
            "y of the law's data"
        )
    inverse = torch.where(free, 1 / variances, 0.0)
    gain = (axes * inverse.unsqueeze(1) @ axes.mT @ AC).mT
    # a density over fewer directions is infinite beside one over more
    rank = free.sum(dim=1)
    possible &= rank == rank[possible].min()
    log_p = -0.5 * (inverse * seen_off.square() + torch.where(free, variances, 1.0).log()).sum(dim=1)
    covs = C - gain @ AC
    means = m + (gain @ off.unsqueeze(2)).squeeze(2)
    return means, (covs + covs.mT) / 2, torch.where(possible, log_w + log_p, -math.inf)


def _with_noise(m: Tensor, C: Tensor, log_w: Tensor, A: Tensor, y: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1) where n > 0, from W = A L / n = U diag(s) V^T with C = L L^T:

        C' = L V diag(1 / (1 + s^2)) V^T L^T,    m' = m + L V diag(s / (1 + s^2)) U^T e,    e = (y - A m) / n

    S itself, with n^2 beside A C A^T, has not the digits for an n much smaller or larger than the others.
    """
    # the largest rows first, which keeps the digits of small singular values beside large ones
    order = (A.norm(dim=1) / n).argsort(descending=True)
    A, y, n = A[order], y[order], n[order]
    values, axes = torch.linalg.eigh(C)
    L = axes * values.clamp(min=0).sqrt().unsqueeze(1)
    W, e = (A @ L) / n.unsqueeze(1), ((y - m @ A.T) / n).unsqueeze(2)
    D = A.shape[1]
    U, s, Vh = torch.linalg.svd(W, full_matrices=len(y) < D)
    LV = L @ Vh.mT
    coordinates, narrowed = (U.mT @ e).squeeze(2), 1 + s.square()
    means = m + (LV[:, :, : s.shape[1]] @ (s / narrowed * coordinates).unsqueeze(2)).squeeze(2)
    root = LV * torch.nn.functional.pad(narrowed.rsqrt(), (0, D - s.shape[1]), value=1.0).unsqueeze(1)
    rest = (e.squeeze(2) - (U @ coordinates.unsqueeze(2)).squeeze(2)).square().sum(dim=1)
    log_p = -0.5 * (rest + (coordinates.square() / narrowed + narrowed.log()).sum(dim=1))
    return means, root @ root.mT, log_w + log_p


@dataclass(frozen=True, kw_only=True)
class PosteriorErrors:
    """How far samples are from an exact posterior.

    Attributes:
        mean: the largest error of an entry's mean, in that entry's posterior standard deviations.
        covariance: |C' - C| / |C|, Frobenius norms.
        weights: the modes' weights among the samples, one a mode.
        true_weights: what they should be.
        floor: (mean, covariance) that as many draws of a Gaussian of these moments show, entries independent for the mean.
    """

    mean: Estimate
    covariance: Estimate
    weights: tuple[Estimate, ...]
    true_weights: tuple[float, ...]
    floor: tuple[float, float]

    @property
    def weight(self) -> Estimate:
        """The largest error of a weight, with that weight's standard error."""
        errors = [
            Estimate(value=abs(e.value - true), stderr=e.stderr)
            for e, true in zip(self.weights, self.true_weights, strict=True)
        ]
        return max(errors, key=lambda e: e.value)


def posterior_errors(exact: CorrelatedMixture, sde: SDE, x: Tensor, t: float) -> PosteriorErrors:
    """The errors of samples of x_t.

    Args:
        exact: the posterior of the clean data.
        sde: the SDE.
        x: samples at the time t, `(n, *)`, without denoising.
        t: their time, a sampler's t_end.

    Raises:
        UserError: for fewer than 20 samples, or samples of another shape.
    """
    if len(x) < 20 or tuple(x.shape[1:]) != exact.event_shape:
        raise UserError(f"got samples of shape {tuple(x.shape)}; expected at least 20 of {exact.event_shape}")
    flat = x.flatten(1).to("cpu", torch.float64)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    n, D = flat.shape
    mean, cov = alpha * exact.mean, alpha**2 * exact.cov + sigma**2 * torch.eye(D, dtype=torch.float64)
    sd, norm = cov.diagonal().sqrt(), float(cov.norm())

    def of_mean(index: Tensor) -> float:
        return float(((flat[index].mean(dim=0) - mean) / sd).abs().max())

    def of_cov(index: Tensor) -> float:
        return float((flat[index].T.cov() - cov).norm()) / norm

    everyone = torch.arange(n)
    parts = exact.responsibilities(sde, flat.reshape(n, *exact.event_shape), t)
    # E |C' - C|^2 of n draws of a Gaussian is (|C|^2 + tr(C)^2) / n
    floor = math.sqrt((norm**2 + float(cov.trace()) ** 2) / n) / norm
    return PosteriorErrors(
        mean=Estimate(value=of_mean(everyone), stderr=jackknife(n, of_mean)),
        covariance=Estimate(value=of_cov(everyone), stderr=jackknife(n, of_cov)),
        weights=tuple(
            Estimate(value=float(part.mean()), stderr=float(part.std()) / math.sqrt(n)) for part in parts.unbind(dim=1)
        ),
        true_weights=tuple(exact.weights.tolist()),
        floor=(_median_of_largest(D) / math.sqrt(n), floor),
    )


def _median_of_largest(D: int) -> float:
    """The median of the largest of D absolute standard normals."""
    return float(torch.special.ndtri(torch.tensor((1 + 0.5 ** (1 / D)) / 2, dtype=torch.float64)))
