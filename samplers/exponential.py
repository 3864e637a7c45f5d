r"""Weights of exponential multistep methods.

In the clock lambda = log(alpha / sigma), with y = x / alpha, every process that the fast methods solve is linear but
for one slowly varying function F (the denoised mean D or the noise eps):

    (1)  y(end) = exp(-c (end - start)) y(start) + integral from start to end of c exp(-c (end - l)) F(l) dl   [+ noise]

- D, c = 1: the probability flow, dy/dlambda = -(y - D) (Lu et al. 2022, arXiv:2211.01095)
- D, c = 1 + eta^2: with noise of rate eta^2; eta = 1 is the reverse SDE
- eps, c = -1, and no factor before y: dy = eps dkappa, kappa = exp(-lambda) (Zhang and Chen 2022, arXiv:2204.13902)

A method of order p replaces F by the polynomial through its values at p known points and integrates (1) exactly: a sum
of the values with weights w_j = integral of c exp(-c (end - l)) L_j(l) dl, L_j the Lagrange polynomials of the points.
They are computed here by Gauss-Legendre quadrature of 64 nodes, which is exact to rounding for the steps that samplers
take and, unlike the closed forms, does not cancel for short ones. Divided differences are another way of writing the
same polynomial, so the methods are of the full order of their papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from samplers.run import Run
from samplers.step import StatefulStep, Step

Values = npt.NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def exponential_weights(
    points: Sequence[float],
    start: float,
    end: float,
    rate: float,
    *,
    variable: Callable[[Values], Values] | None = None,
) -> list[float]:
    """The weights w_j of (1), one for each of the points.

    Args:
        points: where F is known, all different: values of lambda, or of `variable`.
        start, end: the step, in lambda.
        rate: c.
        variable: what F is a polynomial in, as a function of lambda; lambda itself unless given.
    """
    l = start + (end - start) * (_NODES + 1) / 2
    kernel = rate * np.exp(-rate * (end - l)) * _WEIGHTS * (end - start) / 2
    v = l if variable is None else variable(l)
    weights = []
    for j, own in enumerate(points):
        basis = np.ones_like(v)
        for k, other in enumerate(points):
            if k != j:
                basis = basis * (v - other) / (own - other)
        weights.append(float((kernel * basis).sum()))
    return weights


def orders(order: int, steps: int, lower_at_end: bool) -> list[int]:
    """How many points each step may use: as many as there are, and few at the end of a short run.

    An extrapolation over the last, longest steps of a run of under 15 steps is less stable than it is accurate (the
    published code of Lu et al. 2022, arXiv:2211.01095, which has the bound of 15).
    """
    lower = lower_at_end and steps < 15
    return [min(order, i + 1, steps - i if lower else order) for i in range(steps)]


class History(NamedTuple):
    """What a multistep method remembers: the values of F, the newest first, and the state the last step began from."""

    values: tuple[Tensor, ...] = ()
    before: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Multistep(StatefulStep[History]):
    """The step of a linear multistep method for (1):  x_s = a_i x_t + sum_j w_ij F_{i-j} + c_i z.

    Args:
        value: F at step i, from one evaluation of the score at x.
        of_x: a_i, the factor of x in each step.
        predicting: w_i, the weights of each step, for the values of F from the newest back.
        correcting: the weights with which a step is made again once F at its end is known, that value first; None
            where it is not. The value itself is not evaluated again, so a correction costs none.
        of_noise: c_i, the noise's standard deviation in each step, if any.
    """

    value: Step
    of_x: list[float]
    predicting: list[list[float]]
    correcting: list[list[float] | None]
    of_noise: list[float] | None = None

    @cached_property
    def longest(self) -> int:
        """How many values are remembered."""
        return max(len(w) for w in (*self.predicting, *self.correcting) if w is not None)

    def init(self, x: Tensor, run: Run) -> History:
        """Nothing is known yet."""
        return History()

    def __call__(self, i: int, x: Tensor, run: Run, state: History) -> tuple[Tensor, History]:
        """The step from t_i, with the step before it made again where there are weights for that."""
        values = (self.value(i, x, run), *state.values)[: self.longest]
        again = self.correcting[i - 1] if i > 0 else None
        if again is not None and state.before is not None:
            x = _combine(state.before, self.of_x[i - 1], again, values)
        end = _combine(x, self.of_x[i], self.predicting[i], values)
        if self.of_noise is not None:
            end.add_(run.noise(x), alpha=self.of_noise[i])
        return end, History(values, x)


def _combine(x: Tensor, factor: float, weights: list[float], values: tuple[Tensor, ...]) -> Tensor:
    x = x * factor
    for w, F in zip(weights, values, strict=False):
        x.add_(F, alpha=w)
    return x
