"""An adaptive solver of the reverse SDE, with a step size per sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import SampleStreams, UserError, expand_as, normal, require_count, require_range, take
from samplers.base import Sampler
from samplers.result import SampleResult, SamplingError, StepInfo
from samplers.run import Run
from sde_lib import SDE, Score


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaptiveSDE(Sampler):
    r"""An adaptive solver of the reverse SDE, with a step size per sample.

    From t with step h and the same increment W ~ N(0, h) of the Brownian path:

        x'  = x - h (f x - g^2 score)(x, t) + g(t) W                         Euler-Maruyama
        x~  = x - h (f x - g^2 score)(x', t - h) + g(t - h) W
        x'' = (x' + x~) / 2                                                  the stochastic improved Euler method
        E   = rms[(x' - x'') / max(atol, rtol max(|x'|, |x'_before|))]
        E <= 1: x <- x'', t <- t - h;        always h <- min(t - t_end, safety h E^-exponent)

    (Jolicoeur-Martineau et al. 2021, arXiv:2105.14080, with the choices of its published code: extrapolation, safety = 0.9,
    exponent = 0.9, and a norm per sample.) Two evaluations an attempt. A sample that has arrived leaves the batch, and its
    result does not depend on its batch mates.

    One thing differs. That code draws W anew after a rejection, which favours increments that make small errors; here an
    increment once drawn is kept, and a shorter step takes its part of it by the Brownian bridge (Rackauckas and Nie 2017,
    "Adaptive methods for stochastic differential equations via natural embeddings and rejection sampling with memory"; of
    several rejections in a row only the longest interval is remembered).

    Args:
        rtol, atol: relative and absolute tolerance; 0.0078 is one of 256 grey levels of data in [-1, 1].
        first_step: length of the first step, in units of T.
        safety: safety factor of the step control.
        exponent: exponent of the step control.
        max_steps: attempts after which the run is given up.
        grid: only its two ends are used.
        denoise, corrections: as in every `Sampler`.

    Raises:
        UserError: for an option out of its range; when sampling, for keep_path.
        SamplingError: after max_steps attempts.
    """

    rtol: float = 0.02
    atol: float = 0.0078
    first_step: float = 0.01
    safety: float = 0.9
    exponent: float = 0.9
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.rtol, "rtol", 0)
        require_range(self.atol, "atol", 0)
        if self.rtol + self.atol == 0:
            raise UserError("got rtol=0 and atol=0; expected one of them > 0")
        require_range(self.first_step, "first_step", 1e-9, 1)
        require_range(self.safety, "safety", 1e-3, 1)
        require_range(self.exponent, "exponent", 0.1, 1)
        require_count(self.max_steps, "max_steps")

    @property
    def evaluations(self) -> None:
        """None: the number of steps follows from the tolerances."""
        return None

    def _check(self, score: Score, keep_path: bool) -> None:
        if keep_path:
            raise UserError(
                "got keep_path=True with AdaptiveSDE, whose samples step at different times; "
                "expected a method on a grid: use PredictorCorrector or a callback"
            )

    def _times(self, sde: SDE) -> Tensor:
        return self._nodes(sde, getattr(self.grid, "steps", 1))

    def _sample(self, run: Run, x: Tensor, times: Tensor) -> SampleResult:
        sde, generator, callback = run.sde, run.generator, run.callback
        t_start, t_end = float(times[0]), float(times[-1])
        batch, everyone = x.shape[0], x.clone()
        reached = run.times(t_start)
        ids = torch.arange(batch, device=x.device)
        attempts = torch.zeros(batch, dtype=torch.int64, device=x.device)
        field = _Field(sde, run.batched)
        streams, begun = generator, generator.draw if isinstance(generator, SampleStreams) else 0
        t, h = reached.clone(), torch.full_like(reached, min(self.first_step * sde.T, t_start - t_end))
        before = x
        # what is known of the path ahead of t: its increment W over a length, both 0 at first
        ahead, W_ahead = torch.zeros_like(t), torch.zeros_like(x)

        for attempt in range(self.max_steps):
            z = normal(x.shape, streams, device=x.device, dtype=x.dtype)
            W = _increment(h, ahead, W_ahead, z)
            s = torch.where(h >= t - t_end, t_end, t - h)
            step = expand_as(h, x)
            x_1 = x - step * field.drift(x, t) + expand_as(sde.g(t), x) * W
            x_2 = x - step * field.drift(x_1, s) + expand_as(sde.g(s), x) * W
            better = (x_1 + x_2) / 2
            scale = (self.rtol * torch.maximum(x_1.abs(), before.abs())).clamp(min=self.atol)
            error = ((x_1 - better) / scale).flatten(1).to(reached.dtype).square().mean(dim=1).sqrt()
            attempts[ids] += 1
            accept = error <= 1
            if not bool((error.isfinite() | (h > 1e-9 * sde.T)).all()):
                bad = ~error.isfinite()
                raise SamplingError(
                    f"got values that are not finite in {int(bad.sum())} of {batch} samples at attempt {attempt + 1} "
                    f"(t = {float(t[bad][0]):.6g}), however small the step; expected finite ones: look at the score"
                )
            longer = h >= ahead
            left = (ahead - h).clamp(min=0)
            W_left = torch.where(expand_as(longer, x), 0.0, W_ahead - W)
            W_kept = torch.where(expand_as(longer, x), W, W_ahead)
            ahead, W_ahead = (
                torch.where(accept, left, torch.maximum(h, ahead)),
                torch.where(expand_as(accept, x), W_left, W_kept),
            )
            x = torch.where(expand_as(accept, x), better, x)
            before = torch.where(expand_as(accept, x), x_1, before)
            t = torch.where(accept, s, t)
            # a step that gave nan or inf is tried again at a fifth
            factor = self.safety * error.nan_to_num(nan=1e9, posinf=1e9).clamp(min=1e-6) ** -self.exponent
            h = h * torch.where(accept, factor.clamp(0.2, 5.0), factor.clamp(0.2, 0.9))
            h = torch.minimum(h, (t - t_end).clamp(min=0))
            everyone[ids], reached[ids] = x, t
            if callback is not None:
                callback(StepInfo(step=attempt + 1, steps=None, t=reached.clone(), x=everyone.clone(), nfe=run.nfe))
            stay = (t > t_end).nonzero().squeeze(1)
            if len(stay) < len(t):
                if len(stay) == 0:
                    break
                ids, t, h, x, before = ids[stay], t[stay], h[stay], x[stay], before[stay]
                ahead, W_ahead, field = ahead[stay], W_ahead[stay], field.take(stay)
                if isinstance(streams, SampleStreams):
                    streams = streams.take(stay)
        else:
            raise SamplingError(
                f"got {len(t)} of {batch} samples unfinished after max_steps={self.max_steps} attempts, the first at "
                f"t = {float(t[0]):.6g}; expected them to arrive: loosen rtol and atol or raise max_steps"
            )
        if isinstance(generator, SampleStreams):
            # not where the slowest sample left it, or what is drawn next would depend on the batch mates
            generator.draw = begun + self.max_steps
        evaluations = 2 * attempts
        if self.denoise:
            everyone = run.denoised(everyone, t_end)
            evaluations = evaluations + 1
        finite = everyone.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            raise SamplingError(
                f"got values that are not finite in {int((~finite).sum())} of {batch} samples at the end (t = {t_end:.6g}); "
                "expected finite ones: look at the score at that time"
            )
        return SampleResult(x=everyone, nfe=run.nfe, nfe_per_sample=evaluations)


class _Field:
    """The reverse SDE's drift f x - g^2 score at a time per sample."""

    def __init__(self, sde: SDE, score: Score) -> None:
        self.sde, self.score = sde, score

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.sde.reverse_drift(self.score, x, t)

    def take(self, index: Tensor) -> _Field:
        return _Field(self.sde, take(self.score, index))


def _increment(h: Tensor, ahead: Tensor, W_ahead: Tensor, z: Tensor) -> Tensor:
    """The path's increment over `h` `(b,)`, given that over `ahead` `(b,)` it is `W_ahead` `(b, *)`.

    Within what is known by the Brownian bridge, beyond it by fresh noise.
    """
    inside = h < ahead
    share = torch.where(inside, h / ahead.clamp(min=torch.finfo(ahead.dtype).tiny), 1.0)
    variance = torch.where(inside, h * (1 - share), h - ahead).clamp(min=0)
    return expand_as(share, z) * W_ahead + expand_as(variance.sqrt(), z) * z
