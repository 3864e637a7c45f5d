r"""Pseudoinverse guidance: p(x_0 | x_t) as a Gaussian of one width for all data.

    C' = r^2 I,     r^2 = d^2 kappa^2 / (d^2 + kappa^2),     kappa = sigma / alpha

which is the posterior's covariance for N(0, d^2 I) data (Song, Vahdat, Mardani, Kautz 2023, "Pseudoinverse-guided diffusion
models for inverse problems", ICLR, equations (7) and (8); r_t^2 = sigma^2 / (1 + sigma^2) there is d = 1). The noise n is
part of (2), where the limit n = 0 gives the pseudoinverse that the method is named after; public code leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from guidance.approximation import Approximation, Denoised
from numerics import conjugate_gradients, expand_as, require_count, require_positive
from sde_lib import Measurement


@dataclass(frozen=True, kw_only=True)
class PiGDM(Approximation):
    """Pseudoinverse guidance, with the measurement's noise.

    Exact for data N(m, d^2 I). Cost: an evaluation and one product, whatever the operator: n^2 + r^2 A A^T is inverted in the
    coordinates of the operator's SVD, or by conjugate gradients where it has none.

    Args:
        data_std: d, the standard deviation of the data.
        iterations: of conjugate gradients, which call the operator and not the score.

    Raises:
        UserError: for a data_std that is not above 0.
    """

    data_std: float = 1.0
    iterations: int = 30

    def __post_init__(self) -> None:
        require_positive(self.data_std, "data_std")
        require_count(self.iterations, "iterations")

    def direction(self, at: Denoised, measurement: Measurement) -> Tensor:
        d2, kappa2 = self.data_std**2, (-at.sde.log_snr(at.t)).exp()
        r2 = d2 * kappa2 / (d2 + kappa2)
        svd = measurement.svd
        if svd is None:
            r = measurement.residual(at.x_0)
            scale, r2 = measurement.scale(r2, r), expand_as(r2, at.x)

            def apply(v: Tensor) -> Tensor:
                w = v / scale
                return (measurement.variance(w) * w + measurement.operator(r2 * measurement.adjoint(w))) / scale

            return measurement.adjoint(conjugate_gradients(apply, r / scale, self.iterations).x / scale)
        s, n = svd.values, svd.noise
        off = svd.left(measurement.y) - s * svd.right(at.x_0)
        return svd.lift(s * off / (r2.unsqueeze(1) * s.square() + n.square())).to(at.x.dtype)
