r"""How much noise a measurement has, by the likelihood: for denoising at a level that nobody said.

Let y = x_0 + n z with the law p_n of density. By the heat equation the density of noisier data is a smoothed one,

    d p_n / d(n^2) = lap p_n / 2     so     d log p_n(y) / d log n = n^2 (div s_n(y) + |s_n(y)|^2),    s_n = grad log p_n

and a diffusion's score at the time at which sigma / alpha = n has s_n: s_n(y) = alpha s(alpha y, t). So the log-likelihood of a
level, up to a constant, is the integral of the right-hand side over log n: one evaluation of the score and its trace at each
level, and no flow to integrate. A cubic spline through the right-hand side is integrated exactly; the integral's maximum is the
estimate, where the spline is 0.
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

_LEAST = 3e-3
"""The smallest level that is looked for unless told: less noise than half a grey level of 8-bit images."""
_FINER = 32
"""Into how many parts the spline cuts the way from one level to the next."""


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
        low, high: smallest and largest level; None for 0.003 or the SDE's at t_min, whichever is larger, and for 2.
        points: levels between them, at equal ratios; at least 4. Ratios above some 1.5 are too far apart for a peak.
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
    # sub-VP's least is 1e-6: down to there, 24 levels would be a factor of 1.9 apart
    low, high = max(least, _LEAST) if low is None else low, min(2.0, most) if high is None else high
    require_positive(low, "low")
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
    between, whole, first, second = _between(levels, slope)
    each, _ = _peak(between, whole, first, second)
    joint, curvature = _peak(between, *(part.sum(dim=0, keepdim=True) for part in (whole, first, second)))
    if float(joint) in (float(between[0]), float(between[-1])):
        warnings.warn(
            f"the likeliest level, {float(joint):.3g}, is at the end of [{low:.3g}, {high:.3g}]", stacklevel=2
        )
    stderr = float(joint) / math.sqrt(float(curvature)) if float(curvature) > 0 else math.nan
    return NoiseLevel(
        each=each, joint=float(joint), joint_stderr=stderr, levels=levels, log_likelihood=whole[:, ::_FINER]
    )


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


def _between(levels: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels `(M,)`, `_FINER` for each of `levels`; and there, `(B, M)`, the log-likelihood, its slope and the slope's own."""
    from scipy.interpolate import CubicSpline

    spline = CubicSpline(levels.log().numpy(), slope.numpy(), axis=1)
    ends = float(levels[0].log()), float(levels[-1].log())
    at = torch.linspace(*ends, _FINER * (len(levels) - 1) + 1, dtype=torch.float64)
    at[::_FINER] = levels.log()
    parts = (spline.antiderivative(), spline, spline.derivative())
    whole, first, second = (torch.from_numpy(part(at.numpy())) for part in parts)
    return at.exp(), whole, first, second


def _peak(levels: Tensor, log_likelihood: Tensor, slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest level of each row, and minus the second derivative in log n there; both `(B,)`."""
    k = log_likelihood.argmax(dim=1, keepdim=True)
    rise, bend = slope.gather(1, k)[:, 0], curvature.gather(1, k)[:, 0]
    inside = (k[:, 0] > 0) & (k[:, 0] < len(levels) - 1) & (bend < 0)
    # a step of Newton's from the best of many levels, never beyond the next
    step = float(levels[1].log() - levels[0].log())
    off = torch.where(inside, -rise / torch.where(inside, bend, -1.0), 0.0).clamp(-step, step)
    return levels[k[:, 0]] * off.exp(), torch.where(inside, -bend, 0.0)
