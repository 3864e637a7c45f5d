r"""The flow as an invertible map between data and latents, and samples that come with their density.

The probability flow takes a state x at t_min to a latent z at T and back (Song et al. 2021, arXiv:2011.13456, section
4.3). The prior makes latents comparable: their directions carry the content, so two are interpolated along a great circle
(`slerp`), and a temperature scales them, z = temperature * prior_std * noise. A sample drawn downwards has collected the
integral of the divergence, so its log-density is known at no more than the trace's cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.divergence import Divergence
from likelihood.integration import Likelihood, check_data, integrate
from likelihood.method import Method
from numerics import Generator, UserError, expand_as, require_positive, require_range, take
from sde_lib import SDE, Score, Transported, transport
from sde_lib.flow_map import check_batch


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


def encode(sde: SDE, score: Score, x: Tensor, *, method: Method | None = None) -> Transported:
    """The latents at T of data `x` `(B, *)`, taken as states at t_min, by the probability flow.

    `samplers.ProbabilityFlow.encode` takes them as states at t_end, where samplers stop.

    Args:
        method: as in `log_likelihood`.

    Raises:
        UserError: for an x that is not a floating, finite batch.
    """
    return _transport(sde, score, x, method, down=False)


def decode(
    sde: SDE, score: Score, latent: Tensor, *, temperature: float = 1.0, method: Method | None = None
) -> Transported:
    """The states at t_min of latents `(B, *)` at T, scaled by `temperature` first: the inverse of `encode`.

    Args:
        temperature: the factor on the latents, > 0.
        method: as in `log_likelihood`.

    Raises:
        UserError: for a latent that is not a floating, finite batch.
    """
    check_batch(latent)
    require_positive(temperature, "temperature")
    return _transport(sde, score, temperature * latent, method, down=True)


def round_trip(sde: SDE, score: Score, x: Tensor, *, method: Method | None = None) -> RoundTrip:
    """Data `x` `(B, *)` to their latents and back, and how far off they come back; `method` as in `log_likelihood`."""
    there = encode(sde, score, x, method=method)
    back = decode(sde, score, _kept(there), method=method)
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
    method: Method | None = None,
) -> Interpolation:
    """From `x_a` to `x_b`, both `(B, *)`, along the great circle between their latents (`slerp`).

    Args:
        weights: K numbers, 0 for `x_a` and 1 for `x_b`; weights outside [0, 1] extrapolate.
        method: as in `log_likelihood`.

    Raises:
        UserError: for two shapes, or weights that are no finite numbers.
    """
    if x_a.shape != x_b.shape:
        raise UserError(f"got x_a of shape {tuple(x_a.shape)} and x_b of {tuple(x_b.shape)}; expected the same shape")
    weights = torch.as_tensor(weights, dtype=torch.float64, device=x_a.device)
    if weights.ndim != 1 or len(weights) < 1 or not bool(weights.isfinite().all()):
        raise UserError(f"got weights {weights.tolist()}; expected K >= 1 finite numbers, such as (0, 0.5, 1)")
    own = torch.arange(len(x_a), device=x_a.device)
    ends = round_trip(sde, take(score, own.repeat(2)), torch.cat([x_a, x_b]), method=method)
    z_a, z_b = ends.latent.chunk(2)
    latent = torch.stack([slerp(z_a, z_b, float(w)) for w in weights])
    finite = torch.nan_to_num(latent.flatten(0, 1))
    found = decode(sde, take(score, own.repeat(len(weights))), finite, method=method)
    both = ends.converged.reshape(2, -1).all(dim=0)
    return Interpolation(
        x=found.x.reshape(latent.shape),
        latent=latent,
        round_trip_error=ends.error.reshape(2, -1).amax(dim=0),
        converged=found.converged.reshape(len(weights), -1).all(dim=0) & both,
        nfe=ends.nfe + found.nfe,
    )


def slerp(z_a: Tensor, z_b: Tensor, weight: float) -> Tensor:
    """Between two latents along a great circle, sample by sample, `(B, *)`:

        (sin((1 - w) o) z_a + sin(w o) z_b) / sin o,     o the angle between them, w the weight

    (Shoemake 1985, "Animating rotation with quaternion curves"); along the straight line where they are nearly parallel or
    opposite.

    Raises:
        UserError: latents of two shapes, or a weight that is no finite number.
    """
    if z_a.shape != z_b.shape:
        raise UserError(f"got latents of shapes {tuple(z_a.shape)} and {tuple(z_b.shape)}; expected one shape (B, *)")
    require_range(weight, "weight", -math.inf)
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
    method: Method | None = None,
    divergence: Divergence | None = None,
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SampledLikelihood:
    """Samples of `shape` `(B, *)` by the flow, with their log-densities from the same pass.

        log p(x) = log p_T(z) + D log(c_T / c_t) - integral over u from T down to t_min of  D a + b c tr(d eps / d x)

    which is (1) of `likelihood.probability_flow`, read from the other end.

    Args:
        x_T: latents to start from, in place of draws from the prior; scaled by `temperature` like them.
        temperature: the factor on the latents; below 1, samples of higher density and less variety.
        method, divergence: as in `log_likelihood`.
        generator: for latents and probes.
        device, dtype: of the samples; those of `x_T`, else the CPU and torch's default dtype.

    Raises:
        UserError: for a shape that is not `(B, *)`, an x_T of another shape, or a dtype that is not floating.
    """
    sizes = _sizes(shape)
    require_positive(temperature, "temperature")
    if dtype is not None and not dtype.is_floating_point:
        raise UserError(f"got dtype={dtype}; expected a floating-point one such as torch.float32")
    if x_T is None:
        drawn = sde.prior_sample(sizes, generator=generator, device=device, dtype=dtype)
    else:
        check_batch(x_T)
        drawn = x_T.to(device=device, dtype=dtype)
    if drawn.shape != sizes:
        raise UserError(f"got x_T of shape {tuple(drawn.shape)} for shape={sizes}; expected the same")
    x, likelihood = integrate(
        sde,
        score,
        temperature * drawn,
        method=Method.of(method),
        down=True,
        divergence=divergence,
        generator=generator,
    )
    D = drawn[0].numel()
    tempered = sde.prior_log_prob(drawn).to(torch.float64) - D * math.log(temperature)
    return SampledLikelihood(x=x, likelihood=likelihood, sampling_log_prob=likelihood.change + tempered)


def _transport(sde: SDE, score: Score, x: Tensor, method: Method | None, *, down: bool) -> Transported:
    method = Method.of(method)
    check_data(x)
    times, nodes = method.clock(sde, down=down)
    return transport(times, score, x, method.solver, nodes=nodes)


def _kept(found: Transported) -> Tensor:
    """The states, with zeros for samples that did not arrive, so that the others can continue."""
    return torch.where(expand_as(found.converged, found.x), found.x, torch.zeros_like(found.x))


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).square().mean(dim=1).sqrt()


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    whole = isinstance(shape, Sequence) and all(isinstance(n, int) for n in shape)
    sizes = tuple(int(n) for n in shape) if whole else ()
    if len(sizes) < 2 or any(n < 1 for n in sizes):
        hint = f": for {sizes[0]} samples of one dimension give ({sizes[0]}, 1)" if len(sizes) == 1 else ""
        raise UserError(f"got shape={shape!r}; expected (B, *) of integers >= 1, the batch first{hint}")
    return sizes
