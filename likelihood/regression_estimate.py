r"""A set's mean from few exact values and many predictions.

Of N images a random sample of n has exact values y; all have predictors x (a one among them). With b the least squares
coefficients of the sample and X the mean of x over all N, the regression estimator of survey sampling

    m = X^T b

errs by what predictions miss, not by how different images are (Cochran 1977, "Sampling Techniques", chapter 7; Sarndal,
Swensson and Wretman 1992, "Model Assisted Survey Sampling", chapter 6). With h_i the leverages and
g_i = n X^T (sum x x^T)^-1 x_i, leaving one image out changes m by -g_i e_i / (n (1 - h_i)), e_i the residuals, so that the
jackknife's variance is

    V = (n - 1) / n^3 sum of (g_i e_i / (1 - h_i))^2

The textbook's e_i alone states too little: the fit is closest to the values that it has seen, and far images weigh more.

Values are noisy: "the set's mean" is that of their expectations over dequantisation noise and probes, of which a value has one
draw with variance tau^2. A sample that is a large part f = n / N of the set leaves little that is unknown of the images, but as
much as ever of the noise:

    stderr^2 = (1 - f) V + f tau^2 / n

Images that are to be scored in any case (`certain`) are a stratum of their own, of which only the noise is unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError


@dataclass(frozen=True, kw_only=True)
class RegressionEstimate:
    """A set's mean with two errors, which answer two questions.

    Attributes:
        mean: of the set.
        sampling_stderr: of the mean of *this* set, what another sample of it would change.
        noise_stderr: of the same, what scoring all of it, again and again, would change; NaN where the noise is unknown.
        degrees: of freedom, of the variance that `sampling_stderr` is the root of.
        skewed: by what factor `sampling_stderr` has to be larger for two of it to cover 95 %, where few values are far off.
        images_stderr: what other images of the same kind would change; NaN where the noise is unknown.
        total: both errors, of the mean over all images that there might have been.
        r2: of predictions for images that the fit has left out, 0 where they say nothing; NaN where the sample is the set.
        predictions: `(N,)`.
        residual: the standard deviation of a value around its prediction, the fit having left it out.
    """

    mean: float
    sampling_stderr: float
    noise_stderr: float
    degrees: int
    skewed: float
    images_stderr: float
    total: float
    r2: float
    predictions: Tensor
    residual: float

    @property
    def stderr(self) -> float:
        """Of the mean of this set, from its variance as it is estimated."""
        return math.hypot(self.sampling_stderr, self.noise_stderr)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Least squares with an intercept.

    Attributes:
        predictions: `(N,)`, for all.
        residuals: `(n,)`, e.
        leverages: `(n,)`, h.
        weights: `(n,)`, g.
    """

    predictions: Tensor
    residuals: Tensor
    leverages: Tensor
    weights: Tensor

    @classmethod
    def of(cls, x: Tensor, index: Tensor, y: Tensor) -> Fit:
        """Of values `y` `(n,)` at the rows `index` `(n,)` of predictors `x` `(N, P)`, which may have no columns."""
        chosen = x[index]
        centre = chosen.mean(dim=0)
        spread = (chosen - centre).square().mean(dim=0).sqrt()
        scaled = (x - centre) / torch.where(spread > 0, spread, 1.0)
        full = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), scaled], dim=1)
        rows = full[index]
        inverse = torch.linalg.pinv(rows.T @ rows, hermitian=True)
        fitted = full @ (inverse @ (rows.T @ y))
        return cls(
            predictions=fitted,
            residuals=y - fitted[index],
            leverages=((rows @ inverse) * rows).sum(dim=1),
            weights=len(y) * (rows @ (inverse @ full.mean(dim=0))),
        )

    @property
    def left_out(self) -> Tensor:
        """`(n,)`: how far each value is from the prediction of the others."""
        return self.residuals / (1 - self.leverages).clamp(min=1e-9)


def regression_estimate(
    x: Tensor, index: Tensor, y: Tensor, *, certain: Tensor | None = None, noise_variance: float = 0.0
) -> RegressionEstimate:
    """The estimate from values `y` `(n,)` at `index` `(n,)`, of which those that are not `certain` are a random sample.

    Args:
        x: predictors `(N, P)`, float64, without the one; P may be 0, and then the mean is the plain one.
        index: whose values these are; images whose value failed are left out, and stand in with their prediction.
        certain: `(N,)`, the images that were to be scored in any case; none unless given.
        noise_variance: tau^2 of a value; NaN where it is not known, and then all images have to have values.

    Raises:
        UserError: for fewer values than a fit of P predictors needs, P + 3.
    """
    N = len(x)
    certain = torch.zeros(N, dtype=torch.bool) if certain is None else certain
    rest = (~certain).nonzero().squeeze(1)
    place = torch.full((N,), -1, dtype=torch.int64)
    place[rest] = torch.arange(len(rest))
    random = ~certain[index]
    values, n, M = y[random], int(random.sum()), len(rest)
    if n < x.shape[1] + 3 and n < M:
        raise UserError(
            f"got {n} values for {x.shape[1]} predictors; expected {x.shape[1] + 3} or more: score more images"
        )
    predictions = torch.full((N,), math.nan, dtype=torch.float64)
    known = y[~random]
    c = len(known)  # a certain image without a value is left out of the set
    mean_known = float(known.mean()) if c else 0.0
    tau = noise_variance
    skewed = 1.0
    if n == M:  # everything is known but the noise
        mean_rest, sampling, r2, residual = float(values.mean()) if M else 0.0, 0.0, math.nan, 0.0
        predictions[index[random]] = values
        spread_rest = float(values.var(correction=0)) if M else 0.0
    else:
        fit = Fit.of(x[rest], place[index[random]], values)
        predictions[rest] = fit.predictions
        mean_rest = float(fit.predictions.mean())
        off = fit.left_out
        jackknife = float((fit.weights * off).square().sum()) * (n - 1) / n**3
        sampling = math.sqrt((1 - n / M) * jackknife)
        skewed = skew_widening(fit.weights * off)
        residual = float(off.square().mean().sqrt())
        r2 = r_squared(values, off)
        spread_rest = float(fit.predictions.var(correction=0)) + float(fit.residuals.square().sum()) / max(
            1, n - x.shape[1] - 1
        )
    predictions[index[~random]] = known
    N = M + c
    mean = (M * mean_rest + c * mean_known) / N
    spread = (
        M * (spread_rest + (mean_rest - mean) ** 2) + float((known - mean).square().sum())
    ) / N  # of a value over the set
    sampling *= M / N
    noise = math.sqrt(tau / N)  # of M and of c values, each a part of N
    alone = spread / (N - 1) if N > 1 else math.nan  # of the mean of N values, their noise included
    images_stderr = math.nan if tau != tau or N == 1 else math.sqrt(max(alone - tau / N, 0.0))
    return RegressionEstimate(
        mean=mean,
        sampling_stderr=sampling,
        noise_stderr=noise,
        degrees=max(1, n - x.shape[1] - 1),
        skewed=skewed,
        images_stderr=images_stderr,
        total=math.sqrt(alone) if tau != tau else math.hypot(sampling, noise, images_stderr),
        r2=r2,
        predictions=predictions,
        residual=residual,
    )


def skew_widening(u: Tensor) -> float:
    """By what factor two errors of the mean of `u` `(n,)` have to be wider to cover what two cover of a normal law.

    With gamma the skewness and kappa the excess kurtosis of u, the studentised mean is within z errors with probability

        2 Phi(z) - 1 + (2 z phi(z) / n) (kappa (z^2 - 3) / 12 - gamma^2 (z^4 + 2 z^2 - 3) / 18 - (z^2 + 3) / 4)

    (Hall 1992, "The Bootstrap and Edgeworth Expansion", section 2.6). The last term is Student's; for the first two, at z = 2,

        1 + (21 gamma^2 / 18 - kappa / 12) / n,     at least 1.
    """
    n, off = len(u), u - u.mean()
    spread = float(off.square().mean().sqrt())
    if n < 4 or spread == 0:
        return 1.0
    gamma = float(off.pow(3).mean()) / spread**3
    kappa = float(off.pow(4).mean()) / spread**4 - 3
    return 1 + max(0.0, 21 * gamma**2 / 18 - kappa / 12) / n


def r_squared(y: Tensor, left_out: Tensor) -> float:
    """1 minus the mean square of the left out values' errors over that of the mean of the others; at least 0."""
    n = len(y)
    alone = (y - y.mean()) * (n / (n - 1))
    total = float(alone.square().sum())
    return max(0.0, 1 - float(left_out.square().sum()) / total) if total > 0 else 0.0
