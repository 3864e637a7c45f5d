"""The error of a solver of fixed steps, from solutions of more steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from likelihood.divergence import Exact, Hutchinson
from likelihood.draw_places import COMPANIONS
from likelihood.integration import Likelihood, Prior
from likelihood.method import Method
from likelihood.probability_flow import log_likelihood
from numerics import Generator, SampleStreams, UserError
from sde_lib import SDE, Score


def companion_error(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    method: Method,
    prior: Prior | None = None,
    generator: Generator = None,
) -> Tensor:
    """The error of a method of fixed steps at `x` `(B, *)`, `(B,)` nats, from two companions of more steps:

        2 max(|log p with N steps - log p with 3 N / 2|, |log p with N steps - log p with 3 N|)

    All with one and the same probe along the whole path, so that nothing but the steps differs. Doubled: for a method of second
    order the first difference is (1 - 1.5^-2) = 0.56 of the error, and no more than that order is to be believed of grids that
    are coarse for a rough network. Two of them: a rough network's solutions are off at random, so that one companion comes near
    by chance for one image in ten, both for hardly any. (The solver's own embedded estimate sees such images as well, but
    overstates the error of smooth networks 10 to 100 times. Coarser companions say how bad *they* are, 10 to 25 times too
    much.)

    `docs/likelihood.md` has how often twice this covers the true error, and how much larger it is. It takes 5.5 solutions.

    Args:
        method: whose error is asked for.
        prior: as in `log_likelihood`.
        generator: of the probes: with `SampleStreams(seed, ids)` each sample has one of its own, from draws that nothing else
            uses. Otherwise one probe of seed 0 serves all samples, so that here, too, no error depends on the batch.

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
    others = (finer, method.with_steps(3 * method.solver.steps))
    streams = None
    if isinstance(generator, SampleStreams):
        streams = generator.take(torch.arange(len(x), device=x.device))
        streams.draw += COMPANIONS
    of_each = with_one_probe(sde, score, x, methods=(method, *others), streams=streams, prior=prior)
    one, *more = (found.log_prob for found in of_each)
    return 2 * torch.stack([(one - each).abs() for each in more]).amax(dim=0)


def with_one_probe(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    methods: Sequence[Method],
    exact: bool = False,
    streams: SampleStreams | None = None,
    prior: Prior | None = None,
) -> list[Likelihood]:
    """log p at `x` by each of the methods, all with one and the same probe along the whole path.

    So nothing but the methods differs, where fresh probes would drown their differences.

    Args:
        exact: take the trace itself in the place of a probe.
        streams: of the probes, one for each sample; one of seed 0 for all of them unless given.
    """
    streams = SampleStreams(0, torch.zeros(len(x), dtype=torch.int64), draw=COMPANIONS) if streams is None else streams
    return [
        log_likelihood(
            sde,
            score,
            x,
            divergence=Exact() if exact else Hutchinson(fresh=False),
            method=each,
            prior=prior,
            generator=SampleStreams(streams.seed, streams.ids, draw=streams.draw),
        )
        for each in methods
    ]
