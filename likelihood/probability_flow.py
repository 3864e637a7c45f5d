r"""Log-densities by the probability-flow ODE.

With the flow written in a clock u and a state w = x / c, dw/du = a w + b eps(x, t) (`sde_lib.probability_flow`), the
instantaneous change of variables (Chen et al. 2018, arXiv:1806.07366, theorem 1) gives

    (1)  log p_t(x_t) = log p_T(x_T) + D log(c_T / c_t) + integral over u from t to T of  D a + b c tr(d eps / d x)

and p_T is taken to be the prior (Song et al. 2021, arXiv:2011.13456, equation (39)). The linear part of the SDE appears
only in closed form; the network's value and trace come from one forward pass. The trace is accumulated per dimension,
D^-1 times (1), so that a tolerance means the same for every image size.

The error an adaptive solver estimates step by step holds for a field that is smooth at the scale of its steps, and a trained
network is not quite: on digits (float32) the true error of an image's value was up to 4 times the sum of the estimates at
tolerance 1e-5 and 15 times at 1e-4, and splitting a batch, which moves the network's last digits and with them the steps, moved
values by up to 3 times that sum. So twenty times the sum is what is stated. The state's own error counts where the prior is
steep, and is added as |grad log p_T| |dx_T|: nothing for typical samples, and everything for a far outlier.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from likelihood.divergence import Divergence
from likelihood.draw_places import AGAIN
from likelihood.integration import Likelihood, Prior, integrate
from likelihood.method import Method
from likelihood.refinement import Refinement
from numerics import Generator, SampleStreams, take
from sde_lib import SDE, Score


def log_likelihood(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    method: Method | None = None,
    divergence: Divergence | None = None,
    prior: Prior | None = None,
    generator: Generator = None,
    create_graph: bool = False,
) -> Likelihood:
    """The log-density of the model at `x` `(B, *)`, taken as states at t_min, each sample on its own.

        log p(x) = log p_T(x_T) + D log(c_T / c_t) + integral over u from t_min to T of  D a + b c tr(d eps / d x)

    with x_T where the flow takes x, and a, b, c of the flow: (1) of `likelihood.probability_flow`.

    A sample's value does not depend on its batch mates: steps, errors and status are per sample, and with
    `generator=SampleStreams(seed, ids)` so are the probes. (With a network in float32 the values still move in the
    last digits with the batch's size, as its own arithmetic does; with solvers of `numerics.external` they are
    coupled.)

    A method with a `Refinement` solves samples whose own error is too large again, with twice the steps: with new probes where
    every evaluation has its own, and with the very same where there is one along the whole path.

    Args:
        method: the solver, its grid, the variables and t_min; `Method()`, adaptive at tolerance 1e-5, unless given.
        divergence: how to get the trace; `Hutchinson()`, one probe of random signs, unless given.
        prior: z `(B, *)` -> log-density `(B,)` to use at T in place of `sde.prior_log_prob`.
        generator: for the probes.
        create_graph: make `log_prob` differentiable, in `x` and in the network's parameters, by backpropagation through
            the solver.

    Raises:
        UserError: for an `x` that is not floating or not finite, a t_min outside (0, T), a grid that does not start at T,
            a divergence that is none, fresh probes with an adaptive solver, or a prior that gives no `(B,)`.
    """
    method, divergence = Method.of(method), Divergence.of(divergence)
    begun = generator.draw if isinstance(generator, SampleStreams) else 0
    _, found = integrate(
        sde,
        score,
        x,
        method=method,
        down=False,
        divergence=divergence,
        prior=prior,
        generator=generator,
        create_graph=create_graph,
    )
    if method.refinement is None:
        return found
    again = method
    for doubling in range(1, method.refinement.times + 1):
        found = _stated(found, method.refinement, x[0].numel())
        too_large = method.refinement.too_large(found.state_error)
        coarse = (found.converged & too_large).nonzero().squeeze(1)
        if len(coarse) == 0:
            break
        again = again.with_steps(2 * again.solver.steps)
        _, finer = integrate(
            sde,
            take(score, coarse),
            x[coarse],
            method=again,
            down=False,
            divergence=divergence,
            prior=prior,
            generator=_apart(generator, coarse, doubling, method.refinement.times)
            if divergence.redraw is not False
            else _replayed(generator, coarse, begun),
            create_graph=create_graph,
        )
        found = _replaced(found, coarse, finer)
    return _stated(found, method.refinement, x[0].numel())


def _apart(generator: Generator, index: Tensor, doubling: int, doublings: int) -> Generator:
    """Streams for the samples at `index` whose draws nothing else uses.

    Where an image is scored for several draws of its noise, the streams stand at another draw each time, by as many as a
    solution of the plain steps takes; one of 2^k times the steps takes at most 2^k times as many, and so much room there is.
    """
    if not isinstance(generator, SampleStreams):
        return generator
    streams = generator.take(index)
    place, own = divmod(streams.draw, AGAIN)
    streams.draw = (place + doubling) * AGAIN + (own << doublings)
    return streams


def _replayed(generator: Generator, index: Tensor, begun: int) -> Generator:
    """Streams for the samples at `index` that draw what the first solution has drawn.

    One probe along a whole path is a sample's own: with another its value would move by the probes' noise, and not to the
    solution of more steps.
    """
    if not isinstance(generator, SampleStreams):
        return generator
    streams = generator.take(index)
    streams.draw = begun
    return streams


def _stated(found: Likelihood, refinement: Refinement, dimensions: int) -> Likelihood:
    """With the error that the refinement takes from the state's, where there is no other."""
    by_state = dimensions * refinement.ratio * found.state_error
    return replace(found, solver_error=torch.where(found.solver_error.isnan(), by_state, found.solver_error))


def _replaced(found: Likelihood, index: Tensor, finer: Likelihood) -> Likelihood:
    """`found` with the samples at `index` `(b,)` from a solution of more steps, where that converged."""
    kept = finer.converged
    at = index[kept]
    values: dict[str, Any] = {}
    for name, new in vars(finer).items():
        old = getattr(found, name)
        values[name] = old.index_put((at,), new[kept]) if isinstance(old, Tensor) else old + new
    values["refined"] = found.refined.index_put((at,), found.refined[at] + 1)
    values["evaluations"] = found.evaluations.index_add(0, index, finer.evaluations)
    return Likelihood(**values)
