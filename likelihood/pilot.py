r"""Placing a grid by a pilot run.

An adaptive solver finds out where a network's flow is hard. Run it on a few samples, note its step sizes h over the clock,
and let the density of a fixed grid's steps be proportional to the mean of 1/h, to the power 3/4: a grid of any number of
steps that fits this network and this SDE, with nothing to tune. (The power makes up for what the pilot does not know, that a
multistep method integrates the slopes' falling off exactly and dislikes a jump in its steps; of 1/2, 3/4 and 1 it was the
best on training images of Fashion-MNIST.) The samples of the pilot should not be those that are scored, or the grid has
seen them.

A rough network makes an adaptive solver creep: thousands of attempts for one sample. So attempts are counted; where too many
samples run out of them, a looser pilot follows, and where that one fails as well, a grid that fits no network in particular.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from likelihood.divergence import Hutchinson
from likelihood.draw_places import PILOT
from likelihood.method import Method
from likelihood.probability_flow import log_likelihood
from numerics import Dopri5, SampleStreams, Solution, Solver, Status, UserError
from numerics.ode import Callback, Field, State
from sde_lib import SDE, Flow, Score, WhitenedFlow
from sde_lib.time_grids import StepDensity


@dataclass(frozen=True)
class _Recorder(Solver):
    """A solver that notes where its steps end."""

    solver: Solver
    seen: list[Tensor] = field(default_factory=list)
    order: ClassVar[int] = 5
    adaptive: ClassVar[bool] = True

    def __call__(
        self,
        field: Field,
        y: State,
        u_0: float,
        u_1: float,
        *,
        nodes: Tensor | None = None,
        keep_path: bool = False,
        callback: Callback | None = None,
    ) -> Solution:
        self.seen.append(torch.full((y[0].shape[0],), u_0, dtype=torch.float64))
        return self.solver(field, y, u_0, u_1, callback=lambda u, _: self.seen.append(u.detach().cpu().clone()))


ATTEMPTS = ((1.0, 200), (10.0, 60), (100.0, 40))
"""Of the pilots, one after the other: how much looser than the tolerance, and the steps attempted, of six evaluations each. (A
rough network told 999 t takes 135 attempts at the tolerance, a smooth one 35.)"""


def pilot_grid(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    flow: Flow | None = None,
    tolerance: float = 1e-4,
    t_min: float | None = None,
    cells: int = 200,
    seed: int = 0,
    attempts: Sequence[tuple[float, int]] = ATTEMPTS,
) -> StepDensity:
    """The grid from an adaptive run on `x` `(B, *)`; eight samples are enough.

    It takes at most 1,806 evaluations, by `attempts`. Where fewer than half of the samples arrive in 200 attempts of a step, a
    second run at 10 times the tolerance gets 60, and a third one at 100 times gets 40; where that fails too, the grid is
    `fallback_grid`.

    Args:
        flow, t_min: of the `Method` that the grid is for.
        tolerance: of the pilot run.
        cells: of the table of densities.
        seed: of the pilot's probe.
        attempts: of each run, how much looser than `tolerance`, and the attempts of a step.

    Raises:
        UserError: where the score was not finite for any sample.
    """
    flow = WhitenedFlow() if flow is None else flow
    for factor, most in attempts:
        recorder = _Recorder(Dopri5(rtol=factor * tolerance, atol=factor * tolerance, max_steps=most))
        method = Method(recorder, flow=flow, t_min=t_min)
        found = log_likelihood(
            sde,
            score,
            x,
            divergence=Hutchinson(fresh=False),
            method=method,
            generator=SampleStreams(seed, draw=PILOT),
        )
        if bool((found.status == int(Status.NONFINITE)).all()):
            raise UserError(
                "got a pilot run in which no sample converged, the score not being finite; expected one that is: look at it"
            )
        if 2 * int(found.converged.sum()) >= len(x):
            return _grid_of(sde, flow, torch.stack(recorder.seen)[:, found.converged.cpu()], cells)
    return fallback_grid(sde, method.time(sde), cells)


def _grid_of(sde: SDE, flow: Flow, paths: Tensor, cells: int) -> StepDensity:
    """The density of the steps that adaptive runs took, `(attempts, B)` in the flow's clock."""
    # in log-SNR, rising from T to t_min, so that the grid can be used with any flow
    levels = sde.log_snr(flow.time(sde, paths))
    edges = torch.linspace(float(levels.min()), float(levels.max()), cells + 1, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    density = torch.zeros(cells, dtype=torch.float64)
    for path in levels.T:
        ends = path.unique()  # rejected attempts end where they began
        i = torch.searchsorted(ends, middle).clamp(1, len(ends) - 1)
        density += 1 / (ends[i] - ends[i - 1])
    return StepDensity(knots=tuple(edges.tolist()), density=tuple((density / levels.shape[1]).pow(0.75).tolist()))


def fallback_grid(sde: SDE, t_min: float, cells: int = 200) -> StepDensity:
    """A grid that no pilot run has placed: the steps' density is a bell around log-SNR 6, four units wide, and a tenth more.

    (A logistic law with these values was the best of those tried on a Fashion-MNIST network, before pilots placed the grids.)
    """
    first, last = (float(sde.log_snr(t)) for t in (sde.T, t_min))
    edges = torch.linspace(first, last, cells + 1, dtype=torch.float64)
    z = ((edges[1:] + edges[:-1]) / 2 - 6) / 4
    density = 4 * z.sigmoid() * (-z).sigmoid() + 0.1
    return StepDensity(knots=tuple(edges.tolist()), density=tuple(density.tolist()))
