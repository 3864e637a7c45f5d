"""The error of a solver of fixed steps, from a second solution."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from likelihood.divergence import Hutchinson
from likelihood.integration import Prior
from likelihood.method import Method
from likelihood.probability_flow import log_likelihood
from numerics import SampleStreams, UserError
from sde_lib import SDE, Score


def companion_error(sde: SDE, score: Score, x: Tensor, *, method: Method, prior: Prior | None = None) -> Tensor:
    """The error of a method of fixed steps at `x` `(B, *)`, `(B,)` nats: what a companion of half as many steps again says, or
    the solver's own estimate where that is larger.

        2 max(|log p with N steps - log p with 3 N / 2 steps|, embedded estimate with N steps)

    Both with one and the same probe along the whole path, so that nothing but the steps differs, and doubled: for a method
    of second order the difference is (1 - 1.5^-2) = 0.56 of the error, and no more than that order is to be believed of
    grids that are coarse for a rough network. (Coarser companions say how bad *they* are: at a quarter of the steps a
    trained network's flow is far from where errors fall regularly, and the error was overstated 10 to 25 times.)

    Where a network is rough for both, the two may agree and both be far off; the embedded estimate sees that. It adds the steps'
    own errors as if their signs were independent (`numerics.Adams`).
    `docs/likelihood.md` has how often twice this covers the true error, and how much larger it is.

    Args:
        method: whose error is asked for.
        prior: as in `log_likelihood`.

    Raises:
        UserError: for an adaptive method, or a grid that has its own number of steps.
    """
    method = replace(Method.of(method), refinement=None)  # whose own error is asked for
    finer = method.finer()
    if finer is None:
        raise UserError(
            f"got a method whose steps cannot be refined, {type(method.solver).__name__} on {type(method.grid).__name__}; "
            "expected a solver of fixed steps, without a grid or on one that is a rule, such as Karras(): an adaptive solver "
            "states its own solver_error"
        )
    one, other = (
        log_likelihood(
            sde,
            score,
            x,
            divergence=Hutchinson(fresh=False),
            method=each,
            prior=prior,
            generator=SampleStreams(0),
        )
        for each in (method, finer)
    )
    return torch.fmax(2 * (one.log_prob - other.log_prob).abs(), one.solver_error)
