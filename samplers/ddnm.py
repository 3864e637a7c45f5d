"""DDNM: DDIM steps whose denoised mean is made to agree with the measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError, require_positive, require_range
from samplers.measured import MeasuredSampler
from samplers.run import Nodes, Run, numbers
from samplers.step import Step
from sde_lib import SDE


@dataclass(frozen=True, kw_only=True, repr=False)
class DDNM(MeasuredSampler):
    r"""The denoising diffusion null-space model, with the measurement's noise.

    The step of `DDIM` from t to s, with D corrected in the measured coordinates c = V^T D by y' = U^T y / s_i, whose noise is
    n / s_i:

        D' = D + V lambda (y' - c),     x_s = alpha_s D' + sqrt(sigma_s^2 - w^2) eps + V w' V^T z + w (I - V V^T) z
        lambda = min(1, w / (alpha_s n / s_i)),      w'^2 = w^2 - (lambda alpha_s n / s_i)^2

    (Wang, Yu, Zhang 2022, arXiv:2212.00490, section 3.3 and appendix I.) So the noise that y brings along takes the place of
    fresh noise and is never more than that, in *one* step. Without noise lambda = 1, and D' is A^+ y + (I - A^+ A) D. The
    correction costs no derivative: one evaluation a step.

    In all steps together the noise of y is the same, while fresh noises average out. With N steps lambda is of order N^(-1/2),
    what is forgotten between two of them of order 1 / N: so with more steps D ends at y', noise included, and the coordinate's
    variance at d^2 + (n / s_i)^2 for data of variance d^2, whatever the factor that lambda is given. A coordinate with
    n / s_i > d, of which the noise says more than the data, is therefore left to the score (lambda = 0): its law is the
    prior's. The others are taken for true, and have a variance of at most 2 d^2 between the pictures (at eta = 1; up to an
    eighth more at 0.7) and too little for one y.

    Args:
        measurement: of an operator with an SVD.
        eta: of `DDIM`, in [0, 1]; at least 0.7 with noise, to leave room for y's. The published step keeps the noise of D, not
            of D': with a small lambda, of order eta, what is missing of y' is added again and again, and the mean goes beyond
            y'. For data N(0, 1), n / s_i = 0.9 and 80 steps it is 1.00, 1.02, 1.06 and 1.15 y' at eta = 1, 0.85, 0.7, 0.5.
        data_std: d, the standard deviation of the data.
        steps, grid, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for an operator without an SVD, an eta outside [0, 1] or below 0.7 with noise, or a data_std that is not
            above 0; when sampling, for a batch that the measurement is not of.
    """

    steps: int = 100
    eta: float = 1.0
    data_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.eta, "eta", 0, 1)
        require_positive(self.data_std, "data_std")
        if self.eta < 0.7 and bool((self._svd.noise > 0).any()):
            raise UserError(
                f"got eta={self.eta:g} for DDNM with a noisy measurement, whose noise takes the place of the steps' own: "
                "at 0 y is ignored, and with little room samples go beyond it; expected at least 0.7, such as 1"
            )

    @property
    def _size(self) -> float:
        return self.data_std

    def method(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`."""
        svd = self._svd
        known, spread = svd.left(self.measurement.y) / svd.values, svd.noise / svd.values
        heard = spread <= self.data_std
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        nodes = Nodes(times, alpha, sigma)
        width = self.eta * sigma[1:] * (-torch.expm1(sde.log_snr(times[:-1]) - sde.log_snr(times[1:]))).sqrt()
        rest = (sigma[1:].square() - width.square()).clamp(min=0).sqrt()
        alphas, sigmas, w, of_eps = numbers(alpha), numbers(sigma), numbers(width), numbers(rest)

        def step(i: int, x: Tensor, run: Run) -> Tensor:
            D = nodes.denoised(i, x, run)
            z = run.noise(x)
            brought = alphas[i + 1] * spread
            share = torch.where(brought > w[i], w[i] / brought, 1.0) * heard
            fresh = (w[i] ** 2 - (share * brought).square()).clamp(min=0).sqrt()
            eps = (x - alphas[i] * D) / sigmas[i]
            measured = alphas[i + 1] * share * (known - svd.right(D)) + (fresh - w[i]) * svd.right(z)
            return alphas[i + 1] * D + of_eps[i] * eps + w[i] * z + svd.lift(measured).to(x.dtype)

        return step
