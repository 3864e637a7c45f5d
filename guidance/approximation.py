r"""What a posterior score needs to know of p(x_0 | x_t), and what it makes of it.

Given a measurement y = A x_0 + n z of the clean data, the posterior's score at x_t is the prior's and one more term,

    (1)  grad log p(x_t | y) = score(x_t, t) + grad log p(y | x_t),      p(y | x_t) = integral of p(y | x_0) p(x_0 | x_t) dx_0

A score says of p(x_0 | x_t) its mean D = (x_t + sigma^2 score) / alpha (Tweedie) and, through the derivative J = dD/dx_t, its
covariance C = (sigma^2 / alpha) J. Every method replaces p(x_0 | x_t) by a Gaussian around D, with a covariance C',

    (2)  grad log p(y | x_t) = J^T u,     u = A^T w,     (n^2 + A C' A^T) w = y - A D

when the dependence of C' on x_t is left out. A method is a C', and u is what it says; J^T u is one vector-Jacobian product of
the score's network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from numerics import UserError, expand_as
from sde_lib import SDE, Measurement, check_score

_NOT_FOLLOWED = (
    "got a score that autograd cannot follow to x; expected one that depends on x by operations of torch, without detach(): "
    "without one use the samplers Replacement, RePaint or DDNM, which need no derivative"
)


class Denoised:
    """D and its derivative at one x_t.

    Args:
        sde: the SDE of the score.
        x: `(B, *)`, which autograd follows.
        t: `(B,)`.
        value: the score at x and t, followed.
        differentiable: shall autograd follow what is made of it too?

    Attributes:
        x_0: D, `(B, *)`.
        score: `value`.

    Raises:
        UserError: for a score that autograd cannot follow; from `pull`, for one that it follows to parameters only.
    """

    def __init__(self, sde: SDE, x: Tensor, t: Tensor, value: Tensor, differentiable: bool) -> None:
        if not check_score(value, x).requires_grad:
            raise UserError(_NOT_FOLLOWED)
        self.sde, self.x, self.t, self.score, self.differentiable = sde, x, t, value, differentiable
        alpha, variance = expand_as(sde.alpha(t), x), expand_as(sde.sigma(t).square(), x)
        followed = (x + variance * value) / alpha
        self.x_0 = followed if differentiable else followed.detach()
        self._alpha, self._spread = alpha, variance / alpha

    def pull(self, u: Tensor) -> Tensor:
        """J^T u, `(B, *)`: one vector-Jacobian product, of the score alone; that of x itself hides whether there is one."""
        (product,) = torch.autograd.grad(
            self.score,
            self.x,
            self._spread * u,
            retain_graph=True,
            create_graph=self.differentiable,
            allow_unused=True,
        )
        if product is None:  # the score's parameters are followed, and not x
            raise UserError(_NOT_FOLLOWED)
        return u / self._alpha + product

    def covary(self, u: Tensor) -> Tensor:
        """C u = (sigma^2 / alpha) J u, `(B, *)`; J is symmetric where the score is a gradient."""
        return self._spread * self.pull(u)


class Approximation(ABC):
    """A way of approximating p(y | x_t): a frozen dataclass of options.

    Attributes:
        linear: does it need the operator's adjoint?
        divides: does it divide by the noise?
        covaries: does it use the covariance that the score's derivative says?
    """

    linear: ClassVar[bool] = True
    divides: ClassVar[bool] = False
    covaries: ClassVar[bool] = False

    def check(self, measurement: Measurement) -> None:
        """Refuses a measurement that the method cannot take.

        Raises:
            UserError: for an operator without an adjoint, or a noise of 0, where that is needed.
        """
        name = type(self).__name__
        if self.linear and not measurement.linear:
            raise UserError(
                f"got an operator without an adjoint for {name}; expected a linear one such as "
                "LinearMap(forward, transpose): for other operators use DPS() or the sampler TwistedSMC"
            )
        if self.divides and measurement.noiseless:
            raise UserError(
                f"got a noise of std=0 for {name}, which divides by it; expected std > 0: without noise use MomentMatching(), "
                "PiGDM() or the sampler DDNM"
            )

    @abstractmethod
    def direction(self, at: Denoised, measurement: Measurement) -> Tensor:
        """u of (2), `(B, *)`."""
