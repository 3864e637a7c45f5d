r"""How much noise a measurement has, by the likelihood: for denoising at a level that nobody said.

Let y = x_0 + n z with the law p_n of density. By the heat equation the density of noisier data is a smoothed one,

    d p_n / d(n^2) = lap p_n / 2     so     d log p_n(y) / d log n = n^2 (div s_n(y) + |s_n(y)|^2),    s_n = grad log p_n

and a diffusion's score at the time at which sigma / alpha = n has s_n: s_n(y) = alpha s(alpha y, t). So the log-likelihood of a
level, up to a constant, is the integral of the right-hand side over log n: one evaluation of the score and its trace at each
level, and no flow to integrate. Its maximum is the estimate; the right-hand side is 0 there, which refines it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.divergence import Divergence, Hutchinson
from likelihood.integration import check_data, require_fine
from numerics import Generator, UserError, ordinary, ordinary_mode, require_count, require_float64, require_positive
from sde_lib import SDE, Score, require_eval_mode


@dataclass(frozen=True, kw_only=True)
class NoiseLevel:
    """What the likelihood says of the noise of measurements.

    Attributes:
        each: `(B,)`, the likeliest level of each measurement alone.
        joint: the likeliest one if all have the same.
        joint_stderr: its standard error, from the curvature of the log-likelihood there.
        levels: `(K,)`, at which the likelihood was taken.
        log_likelihood: `(B, K)`, of each measurement in nats, up to a constant of its own.
    """

    each: Tensor
    joint: float
    joint_stderr: float
    levels: Tensor
    log_likelihood: Tensor


def estimate_noise_level(
    sde: SDE,
    score: Score,
    y: Tensor,
    *,
    generator: Generator,
    low: float | None = None,
    high: float | None = None,
    points: int = 24,
    divergence: Divergence | None = None,
) -> NoiseLevel:
    """The standard deviation n of the noise in y = x_0 + n z, `(B, *)`.

    Args:
        sde, score: of x_0.
        generator: of the trace's probes, which are the same at every level.
        low, high: smallest and largest level; None for the SDE's at t_min, and for 2.
        points: levels between them, at equal ratios; at least 4.
        divergence: how the trace is got; None for `Hutchinson(probes=4)`.

    Raises:
        UserError: levels that the SDE does not have or that do not rise, too few of them, or a level of 0; a y that is not
            floating and finite, or of less than float32; a network in train mode with dropout at work; a score that is not
            finite at some y.

    >>> import torch
    >>> from sde_lib import VPSDE
    >>> from sde_lib.analytic import Gaussian
    >>> law, noise = Gaussian(torch.zeros(8), 0.1 * torch.eye(8)), torch.Generator().manual_seed(0)
    >>> y = law.sample(200, generator=noise) + 0.5 * torch.randn(200, 8, generator=noise)
    >>> found = estimate_noise_level(VPSDE(), law.score(VPSDE()), y, generator=noise)
    >>> abs(found.joint - 0.5) < 3 * found.joint_stderr < 0.05
    True
    """
    require_eval_mode(score)
    require_count(points, "points", 4)
    require_float64(y, "a likelihood's data")
    check_data(y)
    require_fine(y, score)
    least, most = (float((sde.sigma(t) / sde.alpha(t)).item()) for t in (_time(sde.t_min), _time(sde.T)))
    low, high = least if low is None else low, min(2.0, most) if high is None else high
    require_positive(low, "low")  # of an SDE whose t_min is 0, the smallest level is 0
    require_positive(high, "high")
    if not least * (1 - 1e-6) <= low < high <= most * (1 + 1e-6):
        raise UserError(
            f"got low={low}, high={high}; expected {least:.3g} <= low < high <= {most:.3g}, the SDE's levels"
        )
    divergence = Hutchinson(probes=4) if divergence is None else Divergence.of(divergence)
    levels = torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)
    times = sde.time_of_log_snr(-2 * levels.log())
    slope = _slopes(sde, score, ordinary(y.detach()), levels, times, divergence, generator)
    bad = (~slope.isfinite().all(dim=1)).nonzero().squeeze(1).tolist()
    if bad:
        raise UserError(
            f"got a score that is not finite for {len(bad)} of {len(y)} measurements (the first at {bad[0]}); expected "
            "numbers: look at them, or raise low"
        )
    step = float(levels[1].log() - levels[0].log())
    rise = torch.cumulative_trapezoid(slope, dx=step, dim=1)
    log_likelihood = torch.cat([torch.zeros(len(y), 1, dtype=torch.float64), rise], dim=1)
    each, _ = _peak(log_likelihood, slope, levels, step)
    joint, curvature = _peak(log_likelihood.sum(0, keepdim=True), slope.sum(0, keepdim=True), levels, step)
    if float(joint) in (float(levels[0]), float(levels[-1])):
        warnings.warn(
            f"the likeliest level, {float(joint):.3g}, is at the end of [{low:.3g}, {high:.3g}]", stacklevel=2
        )
    stderr = float(joint) / math.sqrt(float(curvature)) if float(curvature) > 0 else math.nan
    return NoiseLevel(each=each, joint=float(joint), joint_stderr=stderr, levels=levels, log_likelihood=log_likelihood)


def _slopes(
    sde: SDE, score: Score, y: Tensor, levels: Tensor, times: Tensor, divergence: Divergence, generator: Generator
) -> Tensor:
    """d log p_n(y) / d log n at each level, `(B, K)`, float64, on the CPU."""
    slopes = []
    with ordinary_mode(y.device), torch.no_grad():
        probes = divergence.draw(y, generator)
        for n, t in zip(levels.tolist(), times, strict=True):
            alpha = float(sde.alpha(t))
            time = t.to(y.device).expand(len(y))

            def field(v: Tensor, alpha: float = alpha, time: Tensor = time) -> Tensor:
                return alpha * score(alpha * v, time)

            value, trace = divergence.trace(field, y, probes)
            square = value.detach().double().square().flatten(1).sum(dim=1)
            slopes.append((n**2 * (trace.detach().double().mean(dim=1) + square)).cpu())
    return torch.stack(slopes, dim=1)


def _time(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def _peak(log_likelihood: Tensor, slope: Tensor, levels: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """The likeliest level of each row, and minus the second derivative in log n there; both `(B,)`."""
    k = log_likelihood.argmax(dim=1, keepdim=True)
    # the maximum is where the slope changes its sign, on one side of the best level
    left = torch.where(slope.gather(1, k) > 0, k, k - 1).clamp(0, len(levels) - 2)
    before, after = slope.gather(1, left)[:, 0], slope.gather(1, left + 1)[:, 0]
    falls = (before >= 0) & (after <= 0) & (before > after)
    share = torch.where(falls, before / (before - after).clamp(min=1e-300), 0.0)
    inside = (levels.log()[left[:, 0]] + step * share).exp()
    return torch.where(falls, inside, levels[k[:, 0]]), torch.where(falls, (before - after) / step, 0.0)
