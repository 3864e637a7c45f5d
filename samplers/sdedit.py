r"""SDEdit: a picture, noised part of the way and drawn again.

    x_t = alpha_t x + sigma_t eps,     then the sampler from t down to the data

(Meng et al. 2022, arXiv:2108.01073, algorithm 1, written for any linear SDE.) What is coarser than the noise at t stays, what
is finer is drawn anew: near t_end little changes, and at T nothing of x is left. By the reverse SDE and an exact score the law
of the result given x is that of x_0 given x_t, with x_t drawn as above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from numerics import Generator, UserError, normal, require_positive
from samplers.base import Sampler
from samplers.result import SampleResult, StepInfo
from sde_lib import SDE, Score
from sde_lib.time_grids import Custom


@dataclass(frozen=True, kw_only=True)
class Edited:
    """Pictures after `sdedit`.

    Attributes:
        result: the sampler's own; `result.x` `(B, *)`.
        distance: `(B,)`, root mean square per entry between the result and what was given: what the way there and back changed.
    """

    result: SampleResult
    distance: Tensor

    @property
    def x(self) -> Tensor:
        """`(B, *)`."""
        return self.result.x


def sdedit(
    sampler: Sampler,
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    t_start: float | Tensor,
    generator: Generator = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Edited:
    """Noises `x` `(B, *)` up to `t_start` and draws from there.

    Args:
        sampler: any whose grid is a rule; all of its steps are spent below `t_start`.
        x: in model units; strokes, another class (with a score of the new one), a sample to be varied.
        t_start: in (t_end, T], a number or a tensor of one; `sde.time_of_log_snr(torch.tensor(l))` for a log-SNR l.
        generator: of the noise, that of the sampler included.
        callback: as in every sampler.

    Raises:
        UserError: a sampler with given times, a `t_start` outside its grid's range, or an x that is not a floating batch of
            finite numbers.
    """
    if not x.is_floating_point() or x.ndim < 2:
        raise UserError(f"got x of shape {tuple(x.shape)} and {x.dtype}; expected a floating batch (B, *)")
    if not bool(x.isfinite().all()):
        raise UserError(
            "got x with values that are not finite; expected numbers: leave those samples out, or mend them"
        )
    if isinstance(t_start, Tensor) and t_start.numel() == 1 and not t_start.is_complex():
        t_start = float(t_start)
    require_positive(t_start, "t_start")
    grid = sampler.default_grid if sampler.grid is None else sampler.grid
    if isinstance(grid, Custom) or not hasattr(grid, "t_start"):
        raise UserError(
            f"got {sampler!r} with times of its own; expected a grid that is a rule, such as Uniform() or Karras()"
        )
    begun = replace(sampler, grid=replace(grid, t_start=t_start))  # type: ignore[type-var]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = normal(x.shape, generator, device=x.device, dtype=x.dtype)
    result = begun(sde, score, tuple(x.shape), x_T=sde.perturb(x, t_start, eps), generator=generator, callback=callback)
    off = (result.x - x).flatten(1).to(torch.float32)
    return Edited(result=result, distance=off.square().mean(dim=1).sqrt())
