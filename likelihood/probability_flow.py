r"""Log-densities by the probability-flow ODE.

With the flow written in a clock u and a state w = x / c, dw/du = a w + b eps(x, t) (`sde_lib.probability_flow`), the
instantaneous change of variables (Chen et al. 2018, arXiv:1806.07366, theorem 1) gives

    (1)  log p_t(x_t) = log p_T(x_T) + D log(c_T / c_t) + integral over u from t to T of  D a + b c tr(d eps / d x)

and p_T is taken to be the prior (Song et al. 2021, arXiv:2011.13456, equation (39)). The linear part of the SDE appears
only in closed form; the network's value and trace come from one forward pass. The trace is accumulated per dimension,
D^-1 times (1), so that a tolerance means the same for every image size.

The error an adaptive solver estimates step by step holds for a field that is smooth at the scale of its steps, and a trained
network is not quite: on digits (float32, tolerances 1e-5 and 1e-4) the true error of an image's value was up to 4 and 12 times
the sum of the estimates, and splitting a batch, which moves the network's last digits and with them the steps, moved values by
up to 3 times that sum. So ten times the sum is what is stated. (What an error of the state costs by way of the score,
c s . dw, was tried as an addition: it is a twentieth of the trace's part there, and explains none of it.)

What the number is: the density of the *model* at time `t_min`, whose data are already noised by sigma(t_min); and with
the prior in place of the flow's own law at T. The latter costs little for VP and sub-VP; for VE the mean of x_T is that
of the data, not 0, which shifts the flow's mean by about 2 % of the data's at the usual sigma_max.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.divergence import Divergence, Hutchinson
from numerics import Dopri5, Generator, Solution, Solver, Status, batch_time, expand_as, take
from sde_lib import SDE, CountedScore, Flow, FlowTimes, Score, TimeGrid, WhitenedFlow

_SAFETY = 10.0  # between what an adaptive solver estimates and what is stated


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Log-densities, and how far they can be trusted.

    Attributes:
        log_prob: `(B,)` nats, float64: `prior + change`. NaN where the integration failed.
        prior: `(B,)` nats, the log-density of the latent.
        change: `(B,)` nats, the rest of (1).
        latent: `(B, *)`, x_T.
        estimates: `(B, K)` nats, log_prob by each independent estimate of the trace.
        probe_stderr: `(B,)` nats, the standard error of log_prob from the trace's probes: NaN below two independent
            estimates, 0 for `Exact`.
        solver_error: `(B,)` nats: ten times the solver's own estimate for the trace from an adaptive solver (see above),
            that estimate from others; NaN from a solver that makes none.
        status: `(B,)`, see `numerics.Status`.
        failed_at: `(B,)`, the time at which a failed integration stopped; NaN where it did not fail.
        nfe: forward evaluations of the score, calls whatever the batch; nbe: vector-Jacobian products, likewise.
        evaluations: `(B,)`, evaluations that each sample took part in.
    """

    log_prob: Tensor
    prior: Tensor
    change: Tensor
    latent: Tensor
    estimates: Tensor
    probe_stderr: Tensor
    solver_error: Tensor
    status: Tensor
    failed_at: Tensor
    nfe: int
    nbe: int
    evaluations: Tensor

    @property
    def converged(self) -> Tensor:
        """`(B,)`: the integration arrived, and everything is finite."""
        return (self.status == int(Status.DONE)) & self.log_prob.isfinite()


class _AugmentedField:
    """d(w, l)/du for the state w and the accumulated trace l `(B, K)`, in nats per dimension."""

    def __init__(
        self,
        times: FlowTimes,
        score: Score,
        divergence: Divergence,
        probes: Tensor | None,
        draw: Callable[[Tensor], Tensor | None] | None,
        counts: list[int],
        dtype: torch.dtype,
        create_graph: bool,
    ) -> None:
        self.times, self.score, self.divergence = times, score, divergence
        self.probes, self.draw, self.counts = probes, draw, counts
        self.dtype, self.create_graph = dtype, create_graph

    def take(self, index: Tensor) -> _AugmentedField:
        return _AugmentedField(
            self.times,
            take(self.score, index),  # type: ignore[arg-type]
            self.divergence,
            None if self.probes is None else self.probes[index],
            self.draw,
            self.counts,
            self.dtype,
            self.create_graph,
        )

    def __call__(self, u: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        w = y[0]
        sde, flow = self.times.sde, self.times.flow
        t = self.times.time(u)
        c, sigma = flow.scale(sde, t), sde.sigma(t)
        a, b = flow.coefficients(sde, t)
        x = (expand_as(c, w) * w).to(self.dtype)
        probes = self.probes if self.draw is None else self.draw(x)
        value, trace = self.divergence.trace(lambda v: self.score(v, t), x, probes, create_graph=self.create_graph)
        self.counts[0] += self.divergence.products(x)
        factor = -b * sigma  # eps = -sigma score
        slope = expand_as(a, w) * w + expand_as(factor, w) * value.to(w.dtype)
        D = w[0].numel()
        rate = expand_as(a, y[1]) + expand_as(factor * c / D, y[1]) * trace.to(y[1].dtype)
        return slope, rate


def log_likelihood(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    divergence: Divergence | None = None,
    solver: Solver | None = None,
    flow: Flow | None = None,
    grid: TimeGrid | None = None,
    t_min: float | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    generator: Generator = None,
    create_graph: bool = False,
) -> Likelihood:
    """The log-density of the model at `x` `(B, *)`, by (1), each sample on its own.

    A sample's value does not depend on its batch mates: steps, errors and status are per sample, and with
    `generator=SampleStreams(seed, ids)` so are the probes. (With a network in float32 the values still move in the
    last digits with the batch's size, as its own arithmetic does; with solvers of `numerics.external` they are
    coupled.)

    Args:
        divergence: how to get the trace; one fixed probe of random signs unless given.
        solver: any of `numerics`; the adaptive per-sample one at tolerance 1e-5 unless given.
        flow: the variables of the integration; `WhitenedFlow()` unless given. For data whose standard deviation is far
            from 1, `WhitenedFlow(data_std=...)` saves evaluations; the value is the same.
        grid: where a solver of fixed steps puts them; equal steps in the flow's clock unless given. See
            `likelihood.pilot.pilot_grid`.
        t_min: the time at which the density is taken; `sde.t_min` unless given.
        prior: z `(B, *)` -> log-density `(B,)` to use at T in place of `sde.prior_log_prob`.
        generator: for the probes.
        create_graph: make `log_prob` differentiable, in `x` and in the network's parameters, by backpropagation through
            the solver.

    Raises:
        ValueError: for an `x` that is not floating or not finite, or a `t_min` outside (0, T).
    """
    divergence = Hutchinson() if divergence is None else divergence
    solver = Dopri5() if solver is None else solver
    flow = WhitenedFlow() if flow is None else flow
    t_min = sde.t_min if t_min is None else t_min
    _check(sde, x, t_min)
    times = FlowTimes(flow, sde, t_min, sde.T)
    counted = CountedScore(score)
    counts = [0]
    fresh = (not solver.adaptive) if divergence.redraw is None else divergence.redraw
    if fresh and solver.adaptive:
        raise ValueError(
            "got fresh probes with an adaptive solver, whose error control would follow their noise; "
            "expected a solver of fixed steps, or fresh=False"
        )
    probes = None if fresh else divergence.draw(x, generator)
    field = _AugmentedField(
        times,
        counted,
        divergence,
        probes,
        (lambda v: divergence.draw(v, generator)) if fresh else None,
        counts,
        x.dtype,
        create_graph,
    )
    ends = batch_time(t_min, x), batch_time(sde.T, x)
    c_0, c_T = (flow.scale(sde, t) for t in ends)
    w = x.to(torch.float64)
    w = w / expand_as(c_0, w)
    start = torch.zeros(x.shape[0], divergence.estimates, dtype=torch.float64, device=x.device)
    with torch.set_grad_enabled(create_graph):
        nodes = None if grid is None else _nodes(times, grid, solver).to(x.device)
        found = solver(field, (w, start), times.u_0, times.u_1, nodes=nodes)
        z = expand_as(c_T, found.y[0]) * found.y[0]
        D = x[0].numel()
        log_prior = (sde.prior_log_prob if prior is None else prior)(z).to(torch.float64)
        linear = D * (c_T.log() - c_0.log())
    safety = _SAFETY if solver.adaptive else 1.0
    return _result(times, found, z.to(x.dtype), log_prior, linear, D, counted.nfe, counts[0], divergence, safety)


def _nodes(times: FlowTimes, grid: TimeGrid, solver: Solver) -> Tensor:
    """The flow's clock at the grid's times, from t_min up to T, `(N+1,)`."""
    if solver.adaptive:
        raise ValueError(
            f"got a grid with {type(solver).__name__}, which chooses its own steps; expected a solver of fixed steps"
        )
    sde = times.sde
    t = grid.place(sde, sde.T, times.t_low, solver.steps).flip(0)  # type: ignore[attr-defined]
    nodes = times.flow.clock(sde, t)
    nodes[0], nodes[-1] = times.u_0, times.u_1
    return nodes


def _result(
    times: FlowTimes,
    found: Solution,
    latent: Tensor,
    log_prior: Tensor,
    linear: Tensor,
    D: int,
    nfe: int,
    nbe: int,
    divergence: Divergence,
    safety: float,
) -> Likelihood:
    done = found.status == int(Status.DONE)
    estimates = (log_prior + linear).unsqueeze(1) + D * found.y[1]
    estimates = torch.where(done.unsqueeze(1), estimates, math.nan)
    log_prob = estimates.mean(dim=1)
    K = estimates.shape[1]
    if divergence.exact:
        stderr = torch.zeros_like(log_prob).detach()
    else:
        stderr = estimates.detach().std(dim=1) / math.sqrt(K) if K > 1 else torch.full_like(log_prob, math.nan).detach()
    return Likelihood(
        log_prob=log_prob,
        prior=log_prior,
        change=log_prob - log_prior,
        latent=latent,
        estimates=estimates,
        probe_stderr=stderr,
        solver_error=safety * D * found.error[1],
        status=found.status,
        failed_at=torch.where(done, math.nan, times.time(found.u)),
        nfe=nfe,
        nbe=nbe,
        evaluations=found.evaluations,
    )


def _check(sde: SDE, x: Tensor, t_min: float) -> None:
    if not x.is_floating_point() or x.ndim < 2 or x.shape[0] < 1:
        raise ValueError(
            f"got x of shape {tuple(x.shape)} and {x.dtype}; expected a floating batch (B, *): "
            "map images to model units first, or call bits_per_dim"
        )
    if not 0 < t_min < sde.T:
        raise ValueError(f"got t_min={t_min}; expected a time in (0, {sde.T})")
    finite = x.detach().flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().squeeze(1).tolist()
        raise ValueError(f"got {len(bad)} samples with values that are not finite (the first at {bad[0]}): remove them")
