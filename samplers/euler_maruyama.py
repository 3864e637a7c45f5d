"""Euler-Maruyama on the reverse SDE, and on the whole family between it and the probability flow."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from numerics import require_range
from samplers.predictors import Predictor
from samplers.step import Step, affine
from sde_lib import SDE


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(Predictor):
    r"""Euler-Maruyama on the reverse SDE, or on the family between it and the probability flow.

    With h = t - s > 0 and stochasticity eta,

        x_s = x_t - h [f x_t - (1 + eta^2)/2 g^2 score(x_t, t)] + eta g sqrt(h) z

    eta = 1 is the reverse SDE (equation (5) of `sde_lib.base`; Song et al. 2021, arXiv:2011.13456, algorithm 1's general
    predictor), eta = 0 Euler's method on the probability flow; all have the same marginals as h -> 0 (Song et al. 2021,
    appendix D.1, for eta = 0; Huang, Lim, Courville 2021, arXiv:2106.02808, for the family). Weak order 1. Coefficients
    are frozen over a step, so few steps are far off: prefer the methods that solve the linear part exactly.

    Args:
        stochasticity: eta >= 0; 1 is the reverse SDE, 0 the probability flow.

    Raises:
        UserError: for a stochasticity below 0 or not finite.
    """

    stochasticity: float = 1.0

    def __post_init__(self) -> None:
        require_range(self.stochasticity, "stochasticity", 0)

    def prepare(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`."""
        t, h, eta = times[:-1], -times.diff(), self.stochasticity
        f, g = sde.f(t), sde.g(t)
        return affine(t, x=1 - h * f, score=h * g.square() * ((1 + eta**2) / 2), noise=eta * g * h.sqrt())
