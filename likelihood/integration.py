r"""One pass of the augmented flow (w, l), up for a likelihood or down for a sample with its log-density.

What is integrated stands in `likelihood.probability_flow`; here is the pass that both directions share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.divergence import Divergence
from likelihood.method import Method
from numerics import Generator, Status, UserError, batch_time, expand_as, ordinary, ordinary_mode, require_float64
from sde_lib import SDE, CountedScore, FlowField, Score, networks_of, prior_mismatch
from sde_lib.flow_map import check_batch

Prior = Callable[[Tensor], Tensor]
"""z `(B, *)` -> log-density `(B,)` in nats."""

_SAFETY = 20.0  # between what an adaptive solver estimates for the trace and what is stated
_SAFETY_FIXED = 2.0  # the same for one of fixed steps, whose state's error it covers too


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
        solver_error: `(B,)` nats, from the solver's own estimates: twenty times the trace's (`likelihood.probability_flow`
            says why) from an adaptive solver, twice from others; and what the state's error does to the prior's
            log-density. NaN from a solver that makes none, and where fresh probes would drown it: then
            `likelihood.companion_error` makes one.
            A method with a `Refinement` has one there too.
        state_error: `(B,)`, the solver's own estimate of its state's error, root mean square per entry; NaN without one.
        refined: `(B,)`, how often a sample's steps were doubled (`Refinement`).
        status: `(B,)`, see `numerics.Status`.
        failed_at: `(B,)`, the time at which a failed integration stopped; NaN where it did not fail.
        nfe: forward evaluations of the score, calls whatever the batch; nbe: vector-Jacobian products, likewise.
        evaluations: `(B,)`, evaluations that each sample took part in.
        prior_mismatch: `(B,)` nats, KL(N(alpha_T x, sigma_T^2 I) || prior), see `sde_lib.prior_mismatch`: on average, the most
            that the prior's standing for the law of x_T can cost; NaN where another prior was given.
    """

    log_prob: Tensor
    prior: Tensor
    change: Tensor
    latent: Tensor
    estimates: Tensor
    probe_stderr: Tensor
    solver_error: Tensor
    state_error: Tensor
    refined: Tensor
    status: Tensor
    failed_at: Tensor
    nfe: int
    nbe: int
    evaluations: Tensor
    prior_mismatch: Tensor

    @property
    def converged(self) -> Tensor:
        """`(B,)`: the integration arrived, and everything is finite."""
        return (self.status == int(Status.DONE)) & self.log_prob.isfinite()


class AugmentedField:
    """d(w, l)/du for the state w `(B, *)` of a `FlowField` and the accumulated trace l `(B, K)`, in nats per dimension:

        dw/du = a w + b eps(c w, t),      dl/du = a + (b c / D) tr(d eps / d x),      eps = -sigma score

    The network's value and trace come from one forward pass.

    Args:
        flow: the flow's field, which has the score.
        divergence: how to get the trace.
        probes: the random vectors of the whole path, or None where none are needed or `draw` makes them.
        draw: makes new ones for an `x` `(B, *)` at every evaluation.
        counts: where vector-Jacobian products are counted, in its first entry.
        create_graph: keep everything differentiable.
    """

    def __init__(
        self,
        flow: FlowField,
        divergence: Divergence,
        *,
        probes: Tensor | None,
        draw: Callable[[Tensor], Tensor | None] | None,
        counts: list[int],
        create_graph: bool,
    ) -> None:
        self.flow, self.divergence = flow, divergence
        self.probes, self.draw, self.counts = probes, draw, counts
        self.create_graph = create_graph
        self.weight = flow.weight

    def take(self, index: Tensor) -> AugmentedField:
        """The field for the samples at `index` `(b,)`."""
        return AugmentedField(
            self.flow.take(index),
            self.divergence,
            probes=None if self.probes is None else self.probes[index],
            draw=self.draw,
            counts=self.counts,
            create_graph=self.create_graph,
        )

    def __call__(self, u: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The slopes of the state `(w, l)` at `u` `(B,)`."""
        w, l = y
        point = self.flow.at(u)
        x = self.flow.data(point, w)
        probes = self.probes if self.draw is None else self.draw(x)
        value, trace = self.divergence.trace(
            lambda v: self.flow.score(v, point.t), x, probes, create_graph=self.create_graph
        )
        self.counts[0] += self.divergence.products(x)
        of_trace = point.of_score * point.scale / w[0].numel()
        rate = expand_as(point.of_state, l) + expand_as(of_trace, l) * trace.to(l.dtype)
        return self.flow.slope(point, w, value), rate


def integrate(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    method: Method,
    down: bool,
    divergence: Divergence | None,
    prior: Prior | None = None,
    generator: Generator = None,
    create_graph: bool = False,
) -> tuple[Tensor, Likelihood]:
    """From data `x` up to T, or from latents `x` down to t_min: the state at the end, and the log-density of the data's end.

    Args and errors as in `log_likelihood`.
    """
    require_float64(x, "a likelihood's state")
    check_data(x)
    require_fine(x, score)
    if create_graph and torch.is_inference_mode_enabled():
        raise UserError(
            "got create_graph=True under torch.inference_mode(), which records nothing; expected a mode with gradients: "
            "leave inference_mode"
        )
    with ordinary_mode(x.device):
        return _integrate(
            sde,
            score,
            ordinary(x),
            method=method,
            down=down,
            divergence=Divergence.of(divergence),
            prior=prior,
            generator=generator,
            create_graph=create_graph,
        )


def _integrate(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    method: Method,
    down: bool,
    divergence: Divergence,
    prior: Prior | None,
    generator: Generator,
    create_graph: bool,
) -> tuple[Tensor, Likelihood]:
    """`integrate`, in a mode in which things can be differentiated."""
    solver, flow = method.solver, method.flow
    times, nodes = method.clock(sde, down=down)
    counted, counts = CountedScore(score), [0]
    fresh = (not solver.adaptive) if divergence.redraw is None else divergence.redraw
    if fresh and solver.adaptive:
        raise UserError(
            "got fresh probes with an adaptive solver, whose error control would follow their noise; "
            "expected a solver of fixed steps, or fresh=False"
        )
    field = AugmentedField(
        FlowField(times, counted, x.dtype),
        divergence,
        probes=None if fresh else divergence.draw(x, generator),
        draw=(lambda v: divergence.draw(v, generator)) if fresh else None,
        counts=counts,
        create_graph=create_graph,
    )
    t_min = times.end if down else times.start
    c_0, c_T = (flow.scale(sde, batch_time(t, x)) for t in (t_min, sde.T))
    first, last = (c_T, c_0) if down else (c_0, c_T)
    w = x.to(torch.float64)
    w = w / expand_as(first, w)
    start = torch.zeros(x.shape[0], divergence.estimates, dtype=torch.float64, device=x.device)
    with torch.set_grad_enabled(create_graph):
        found = solver(field, (w, start), times.u_0, times.u_1, nodes=None if nodes is None else nodes.to(x.device))
        end = expand_as(last, found.y[0]) * found.y[0]
        z = x if down else end
        change = -found.y[1] if down else found.y[1]
        D = x[0].numel()
        log_prior = _prior(sde.prior_log_prob if prior is None else prior, z)
        done = found.status == int(Status.DONE)
        estimates = (log_prior + D * (c_T.log() - c_0.log())).unsqueeze(1) + D * change
        estimates = torch.where(done.unsqueeze(1), estimates, math.nan)
        log_prob = estimates.mean(dim=1)
    state_error = found.error[0].to(torch.float64)
    error = (_SAFETY if solver.adaptive else _SAFETY_FIXED) * D * found.error[1]
    if fresh and not divergence.exact:
        error = torch.full_like(error, math.nan)  # the difference of two quadratures of the probes' noise
    elif not down:  # down, it is the sample that is off, and its log-density is its own
        steepness = _steepness(sde.prior_log_prob if prior is None else prior, z)
        error = error + (1.0 if solver.adaptive else _SAFETY_FIXED) * c_T * math.sqrt(D) * found.error[0] * steepness
    K = estimates.shape[1]
    if divergence.exact:
        stderr = torch.zeros_like(log_prob).detach()
    else:
        stderr = estimates.detach().std(dim=1) / math.sqrt(K) if K > 1 else torch.full_like(log_prob, math.nan).detach()
    return end.to(x.dtype), Likelihood(
        log_prob=log_prob,
        prior=log_prior,
        change=log_prob - log_prior,
        latent=z.to(x.dtype),
        estimates=estimates,
        probe_stderr=stderr,
        solver_error=error,
        state_error=state_error,
        refined=torch.zeros_like(found.status),
        status=found.status,
        failed_at=torch.where(done, math.nan, times.time(found.u)),
        nfe=counted.nfe,
        nbe=counts[0],
        evaluations=found.evaluations,
        prior_mismatch=torch.full_like(log_prior.detach(), math.nan)
        if prior is not None
        else prior_mismatch(sde, (end if down else x).detach()),
    )


def require_fine(x: Tensor, score: Score) -> None:
    """Refuses data, and networks, of less than float32: no error bar covers what their rounding does to a density.

    (Measured on a Fashion-MNIST network in bfloat16: 0.05 bits/dim on average, 0.15 at worst.)
    """
    weights = (w for network in networks_of(score) for w in network.parameters())
    coarse = next((w.dtype for w in weights if w.is_floating_point() and torch.finfo(w.dtype).bits < 32), None)
    if torch.finfo(x.dtype).bits < 32:
        raise UserError(f"got x of {x.dtype} for a log-density; expected float32 or float64: x.to(torch.float32)")
    if coarse is not None:
        raise UserError(
            f"got a network whose weights are {coarse} for a log-density; expected float32 or float64: score it as "
            "model.to(torch.float32), and sample as it is"
        )


def _prior(prior: Prior, z: Tensor) -> Tensor:
    """The log-density of the prior at `z`, `(B,)` nats, float64."""
    found = prior(z)
    if not isinstance(found, Tensor) or found.shape != z.shape[:1]:
        raise UserError(
            f"got from prior {tuple(found.shape) if isinstance(found, Tensor) else found!r} for z of shape "
            f"{tuple(z.shape)}; expected a log-density for each sample, ({z.shape[0]},)"
        )
    return found.to(torch.float64)


def _steepness(prior: Prior, z: Tensor) -> Tensor:
    """The norm of the prior's gradient at `z`, `(B,)`: nats for a unit error of the state."""
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        value = prior(z).sum()
        if not value.requires_grad:  # a constant
            return z.new_zeros(z.shape[0])
        (slope,) = torch.autograd.grad(value, z)
    norms: Tensor = slope.flatten(1).norm(dim=1)
    return norms


def check_data(x: Tensor) -> None:
    """Refuses a batch that is not `(B, *)`, floating and finite, with a UserError that names the first bad sample."""
    check_batch(x)
    finite = x.detach().flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().squeeze(1).tolist()
        raise UserError(
            f"got {len(bad)} samples with values that are not finite (the first at {bad[0]}); expected finite ones: "
            "remove them"
        )
