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

import numpy as np
from torch import Tensor

from samplers.base import Run, Step

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def exponential_weights(
    points: Sequence[float],
    start: float,
    end: float,
    rate: float,
    *,
    variable: Callable[[np.ndarray], np.ndarray] | None = None,
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


def multistep(
    value: Callable[[int, Tensor, Run], Tensor],
    of_x: list[float],
    predicting: list[list[float]],
    correcting: list[list[float] | None],
    of_noise: list[float] | None = None,
) -> Step:
    """The step of a linear multistep method for (1).

    Args:
        value: F at step i, from one evaluation of the score at x.
        of_x: the factor of x in each step.
        predicting: the weights of each step, for the values of F from the newest back.
        correcting: the weights with which a step is made again once F at its end is known, that value first; None
            where it is not. The value itself is not evaluated again, so a correction costs none.
        of_noise: the noise's standard deviation in each step, if any.
    """
    known: list[Tensor] = []  # values of F, the newest first
    before: list[Tensor] = []  # the state that the step before began from
    longest = max(len(w) for w in (*predicting, *(w for w in correcting if w is not None)))

    def combine(x: Tensor, factor: float, weights: list[float]) -> Tensor:
        x = x * factor
        for w, F in zip(weights, known, strict=False):
            x.add_(F, alpha=w)
        return x

    def step(i: int, x: Tensor, run: Run) -> Tensor:
        known.insert(0, value(i, x, run))
        del known[longest:]
        again = correcting[i - 1] if i > 0 else None
        if again is not None:
            x = combine(before[0], of_x[i - 1], again)
        before[:] = [x]
        x = combine(x, of_x[i], predicting[i])
        return x if of_noise is None else x.add_(run.noise(x), alpha=of_noise[i])

    return step
