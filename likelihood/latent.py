r"""The flow as an invertible map between data and latents, and samples that come with their density.

The probability flow takes a state x at t_min to a latent z at T and back (Song et al. 2021, arXiv:2011.13456, section
4.3). The prior makes latents comparable: their directions carry the content, so two are interpolated along a great circle,

    (1)  slerp(z_a, z_b, w) = (sin((1 - w) o) z_a + sin(w o) z_b) / sin o,     o the angle between them

(Shoemake 1985), and a temperature scales them, z = temperature * prior_std * noise. A sample drawn downwards has collected
the integral of the divergence on its way, so its log-density is known at no more than the trace's cost:

    (2)  log p_t(x) = log p_T(z) + D log(c_T / c_t) - integral over u from T down to t of  D a + b c tr(d eps / d x)

in the notation of `likelihood.probability_flow`, whose (1) this is, read from the other end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.divergence import Divergence
from likelihood.integration import Likelihood, check_state, integrate, place
from numerics import Dopri5, Generator, Solution, Solver, Status, UserError, batch_time, expand_as, take
from sde_lib import SDE, CountedScore, Flow, FlowTimes, Score, TimeGrid, WhitenedFlow


@dataclass(frozen=True, kw_only=True)
class Transported:
    """Where the flow has taken a batch.

    Attributes:
        x: the state at the other end, `(B, *)`: a latent from `encode`, data from `decode`. Only samples that `converged`
            are right.
        solver_error: `(B,)`, the solver's estimate of the error of `x`, root mean square per entry; NaN where it makes none.
        converged: `(B,)`: arrived, and finite.
        nfe: forward evaluations of the score, calls whatever the batch; evaluations: `(B,)`, each sample's own.
    """

    x: Tensor
    solver_error: Tensor
    converged: Tensor
    nfe: int
    evaluations: Tensor


@dataclass(frozen=True, kw_only=True)
class RoundTrip:
    """Data to latents and back.

    Attributes:
        latent, x: `(B, *)`, the latents, and the data that came back.
        error: `(B,)`, of x against the data that were given, root mean square per entry, in model units.
        converged: `(B,)`, both ways.
        nfe: forward evaluations, both ways.
    """

    latent: Tensor
    x: Tensor
    error: Tensor
    converged: Tensor
    nfe: int


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Ways between two batches.

    Attributes:
        x: `(K, B, *)`, the data at the K weights.
        latent: `(K, B, *)`, their latents.
        round_trip_error: `(B,)`, the larger of the two ends' errors after a round trip, root mean square per entry.
        converged: `(B,)`: all K points and both ends.
        nfe: forward evaluations in all.
    """

    x: Tensor
    latent: Tensor
    round_trip_error: Tensor
    converged: Tensor
    nfe: int


@dataclass(frozen=True, kw_only=True)
class SampledLikelihood:
    """Samples with their log-densities.

    Attributes:
        x: `(B, *)`, states at t_min.
        likelihood: the density of the model at `x`, with the prior of the SDE: what `log_likelihood` gives there.
        sampling_log_prob: `(B,)` nats, the density of the law that `x` was drawn from; another one than the model's where
            the temperature is not 1.
    """

    x: Tensor
    likelihood: Likelihood
    sampling_log_prob: Tensor

    @property
    def log_prob(self) -> Tensor:
        """`(B,)` nats, the model's log-density."""
        return self.likelihood.log_prob


class _Field:
    """dw/du = a w + b eps: coefficients and state in float64, the score in the data's dtype."""

    def __init__(self, times: FlowTimes, score: Score, dtype: torch.dtype) -> None:
        self.times, self.score, self.dtype = times, score, dtype
        self.weight = times.flow.weight

    def take(self, index: Tensor) -> _Field:
        return _Field(self.times, take(self.score, index), self.dtype)  # type: ignore[arg-type]

    def __call__(self, u: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (w,) = y
        sde, flow = self.times.sde, self.times.flow
        t = self.times.time(u)
        a, b = flow.coefficients(sde, t)
        value = self.score((expand_as(flow.scale(sde, t), w) * w).to(self.dtype), t)
        return (expand_as(a, w) * w - expand_as(b * sde.sigma(t), w) * value.to(w.dtype),)


def encode(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    solver: Solver | None = None,
    flow: Flow | None = None,
    grid: TimeGrid | None = None,
    t_min: float | None = None,
) -> Transported:
    """The latents at T of data `x` `(B, *)`, taken as states at t_min. Options as in `log_likelihood`."""
    return _transport(sde, score, x, solver, flow, grid, sde.t_min if t_min is None else t_min, down=False)


def decode(
    sde: SDE,
    score: Score,
    latent: Tensor,
    *,
    temperature: float = 1.0,
    solver: Solver | None = None,
    flow: Flow | None = None,
    grid: TimeGrid | None = None,
    t_min: float | None = None,
) -> Transported:
    """The states at t_min of latents `(B, *)` at T, scaled by `temperature` first: the inverse of `encode`."""
    latent = _temperature(temperature) * latent
    return _transport(sde, score, latent, solver, flow, grid, sde.t_min if t_min is None else t_min, down=True)


def round_trip(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    solver: Solver | None = None,
    flow: Flow | None = None,
    grid: TimeGrid | None = None,
    t_min: float | None = None,
) -> RoundTrip:
    """Data `x` `(B, *)` to their latents and back, and how far off they come back."""
    there = encode(sde, score, x, solver=solver, flow=flow, grid=grid, t_min=t_min)
    back = decode(sde, score, _kept(there), solver=solver, flow=flow, grid=grid, t_min=t_min)
    converged = there.converged & back.converged
    return RoundTrip(
        latent=there.x,
        x=back.x,
        error=torch.where(converged, _rms(back.x.double() - x.double()), math.nan),
        converged=converged,
        nfe=there.nfe + back.nfe,
    )


def interpolate(
    sde: SDE,
    score: Score,
    x_a: Tensor,
    x_b: Tensor,
    weights: Sequence[float] | Tensor,
    *,
    solver: Solver | None = None,
    flow: Flow | None = None,
    grid: TimeGrid | None = None,
    t_min: float | None = None,
) -> Interpolation:
    """From `x_a` to `x_b`, both `(B, *)`, by (1) on their latents; weight 0 is `x_a`, 1 is `x_b`.

    Args:
        weights: K numbers; outside [0, 1] they go on beyond the ends.

    Raises:
        UserError: for two shapes.
    """
    if x_a.shape != x_b.shape:
        raise UserError(f"got x_a of shape {tuple(x_a.shape)} and x_b of {tuple(x_b.shape)}; expected the same shape")
    weights = torch.as_tensor(weights, dtype=torch.float64, device=x_a.device)
    if weights.ndim != 1 or len(weights) < 1:
        raise UserError(f"got weights of shape {tuple(weights.shape)}; expected (K,) with K >= 1")
    options = dict(solver=solver, flow=flow, grid=grid, t_min=t_min)
    ends = round_trip(sde, score, torch.cat([x_a, x_b]), **options)  # type: ignore[arg-type]
    z_a, z_b = ends.latent.chunk(2)
    latent = torch.stack([slerp(z_a, z_b, float(w)) for w in weights])
    finite = torch.nan_to_num(latent.flatten(0, 1))
    found = decode(sde, score, finite, **options)  # type: ignore[arg-type]
    both = ends.converged.reshape(2, -1).all(dim=0)
    return Interpolation(
        x=found.x.reshape(latent.shape),
        latent=latent,
        round_trip_error=ends.error.reshape(2, -1).amax(dim=0),
        converged=found.converged.reshape(len(weights), -1).all(dim=0) & both,
        nfe=ends.nfe + found.nfe,
    )


def slerp(z_a: Tensor, z_b: Tensor, weight: float) -> Tensor:
    """(1), sample by sample, `(B, *)`; along the straight line where two latents are nearly parallel or opposite."""
    a, b = z_a.flatten(1).to(torch.float64), z_b.flatten(1).to(torch.float64)
    cosine = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-300)
    angle = cosine.clamp(-1, 1).arccos()
    straight = angle.sin() < 1e-4
    sine = torch.where(straight, torch.ones_like(angle), angle.sin())
    first = torch.where(straight, torch.full_like(angle, 1 - weight), ((1 - weight) * angle).sin() / sine)
    second = torch.where(straight, torch.full_like(angle, weight), (weight * angle).sin() / sine)
    return (first.unsqueeze(1) * a + second.unsqueeze(1) * b).reshape(z_a.shape).to(z_a.dtype)


def sample_with_log_prob(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    x_T: Tensor | None = None,
    temperature: float = 1.0,
    divergence: Divergence | None = None,
    solver: Solver | None = None,
    flow: Flow | None = None,
    grid: TimeGrid | None = None,
    t_min: float | None = None,
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SampledLikelihood:
    """Samples of `shape` `(B, *)` by the flow, with their log-densities (2) from the same pass.

    Args:
        x_T: latents to start from, in place of draws from the prior; scaled by `temperature` like them.
        temperature: the factor on the latents; below 1, samples of higher density and less variety.
        divergence, solver, flow, grid, t_min: as in `log_likelihood`.
        generator: for latents and probes.
    """
    shape, temperature = tuple(shape), _temperature(temperature)
    drawn = sde.prior_sample(shape, generator=generator, device=device, dtype=dtype) if x_T is None else x_T
    if drawn.shape != shape:
        raise UserError(f"got x_T of shape {tuple(drawn.shape)} for shape={shape}; expected the same")
    x, likelihood = integrate(
        sde,
        score,
        temperature * drawn,
        down=True,
        divergence=divergence,
        solver=solver,
        flow=flow,
        grid=grid,
        t_min=t_min,
        generator=generator,
    )
    D = drawn[0].numel()
    tempered = sde.prior_log_prob(drawn).to(torch.float64) - D * math.log(temperature)
    return SampledLikelihood(x=x, likelihood=likelihood, sampling_log_prob=likelihood.change + tempered)


def _transport(
    sde: SDE,
    score: Score,
    x: Tensor,
    solver: Solver | None,
    flow: Flow | None,
    grid: TimeGrid | None,
    t_min: float,
    *,
    down: bool,
) -> Transported:
    solver = Dopri5() if solver is None else solver
    flow = WhitenedFlow() if flow is None else flow
    check_state(sde, x, t_min)
    times = FlowTimes(flow, sde, t_min, sde.T)
    ends = [t_min, sde.T]
    clock = [times.u_0, times.u_1]
    nodes = None if grid is None else place(times, grid, solver, down=down).to(x.device)
    if down:
        ends.reverse()
        clock.reverse()
    counted = CountedScore(score)
    w = x.detach().to(torch.float64)
    w = w / expand_as(flow.scale(sde, batch_time(ends[0], w)), w)
    with torch.no_grad():
        found: Solution = solver(_Field(times, counted, x.dtype), (w,), *clock, nodes=nodes)
    scale = flow.scale(sde, batch_time(ends[1], w))
    end = (expand_as(scale, w) * found.y[0]).to(x.dtype)
    return Transported(
        x=end,
        solver_error=found.error[0] * scale,
        converged=(found.status == int(Status.DONE)) & end.flatten(1).isfinite().all(dim=1),
        nfe=counted.nfe,
        evaluations=found.evaluations,
    )


def _kept(found: Transported) -> Tensor:
    """The states, with zeros for samples that did not arrive, so that the others can go on."""
    return torch.where(expand_as(found.converged, found.x), found.x, torch.zeros_like(found.x))


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(dim=1).sqrt()


def _temperature(value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"got temperature={value}; expected a finite number > 0")
    return float(value)
