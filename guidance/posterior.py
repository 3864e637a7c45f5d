"""The score of data given a measurement, from the score of the data."""

from __future__ import annotations

import torch
from torch import Tensor

from guidance.approximation import Approximation, Denoised
from guidance.moment_matching import MomentMatching
from numerics import UserError, batch_time, ordinary, ordinary_mode, take
from sde_lib import SDE, Measurement, Score, in_dtype

_MOMENT_MATCHING = MomentMatching()


class Posterior:
    """The score of `posterior`.

    A call is one evaluation of the score given, and the vector-Jacobian products of the method; `nfe` counts the first.

    Args:
        sde, score, measurement, method: as in `posterior`.
    """

    def __init__(self, sde: SDE, score: Score, measurement: Measurement, method: Approximation) -> None:
        self.sde, self.score, self.measurement, self.method = sde, score, measurement, method

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score at `x` `(B, *)` and `t` `()` or `(B,)`, `(B, *)`; differentiable where x asks for it.

        The same numbers in every autograd mode, and whatever the batch mates.

        Raises:
            UserError: for a batch that the measurement is not of, or a score that autograd cannot follow.
        """
        differentiable = torch.is_grad_enabled() and x.requires_grad
        with ordinary_mode(x.device), torch.enable_grad():
            at = self.at(x, t, differentiable=differentiable)
            total = at.score + at.pull(self.method.direction(at, self.measurement))
        return total if differentiable else total.detach()

    def at(self, x: Tensor, t: Tensor, *, differentiable: bool = False) -> Denoised:
        """What a method is told at `x` `(B, *)` and `t` `()` or `(B,)`, by one evaluation of the score: so
        `MomentMatching().solve(given.at(x, t), measurement)` says how its systems were solved.

        Args:
            differentiable: shall autograd follow what is made of it, from x?

        Raises:
            UserError: for a batch that the measurement is not of, or a score that autograd cannot follow.
        """
        self.measurement.check(x)
        with ordinary_mode(x.device), torch.enable_grad():
            followed = x if differentiable else ordinary(x.detach()).requires_grad_()
            t = batch_time(ordinary(t) if isinstance(t, Tensor) else t, followed)
            return Denoised(self.sde, followed, t, self.score(followed, t), differentiable)

    def in_dtype(self, dtype: torch.dtype) -> Posterior:
        """The same, whose score is given x in `dtype`; the measurement is compared in the state's own.

        Raises:
            UserError: less than float32 for a method that reads a covariance off the score's derivative.
        """
        if self.method.covaries and torch.finfo(dtype).bits < 32:
            raise UserError(
                f"got dtype={dtype} for {type(self.method).__name__}, which reads a covariance off its derivative; expected "
                "float32, or a method without one: PiGDM(), DPS()"
            )
        return Posterior(self.sde, in_dtype(self.score, dtype), self.measurement, self.method)

    def take(self, index: Tensor) -> Posterior:
        """The score of the samples at `index` `(b,)`."""
        return Posterior(self.sde, take(self.score, index), self.measurement.take(index), self.method)


def posterior(
    sde: SDE, score: Score, measurement: Measurement, *, method: Approximation = _MOMENT_MATCHING
) -> Posterior:
    """The score of p(x_t | y), for any sampler and any likelihood: exact for Gaussian data, an approximation for others.

    Args:
        sde: the SDE of the score.
        score: of the data, `score(x, t)`, which autograd can follow.
        measurement: y, one for each sample or one for all.
        method: `MomentMatching()`, `TMPD()`, `PiGDM()`, `DPS()` or `PublishedDPS(...)`; docs/guidance.md has their errors and
            cost.

    Raises:
        UserError: for a method that cannot take the measurement: an operator without an adjoint, or a noise of 0.

    >>> from sde_lib import Mask, VPSDE
    >>> from sde_lib.analytic import Gaussian
    >>> sde, law = VPSDE(), Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    >>> seen = Measurement(Mask(torch.tensor([True, False])), torch.tensor([[1.0, 0.0]]), 0.5)
    >>> score = posterior(sde, law.score(sde), seen)
    >>> [round(v, 3) for v in score(torch.zeros(1, 2), torch.tensor(0.01)).flatten().tolist()]
    [3.951, 0.017]
    """
    if not isinstance(method, Approximation):
        raise UserError(f"got method={method!r}; expected one such as MomentMatching(), PiGDM() or DPS()")
    if not isinstance(measurement, Measurement):
        raise UserError(f"got a {type(measurement).__name__} for a measurement; expected Measurement(operator, y, std)")
    method.check(measurement)
    return Posterior(sde, score, measurement, method)
