"""Methods ready to use: `fast` for data sets, `accurate` for single values.

log_likelihood(sde, score, x, method=fast(sde, score, training_samples))
bits_per_dim(sde, score, images, transform, method=accurate(tolerance=1e-6))
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from likelihood.integration import check_data
from likelihood.method import Method
from likelihood.pilot import pilot_grid
from likelihood.steps import LEAST_SAMPLES, MOST_STEPS, choose_steps, fast_on
from numerics import Dopri5, require_count, require_positive, take
from sde_lib import SDE, Score, WhitenedFlow


def fast(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    tolerance: float = 1e-3,
    steps: int | None = None,
    data_std: float | None = None,
    t_min: float | None = None,
    most: int = MOST_STEPS,
    seed: int = 0,
) -> Method:
    """One evaluation a step on a grid that a pilot run has placed, an exponential multistep method of five points.

    The trace gets a fresh probe at every node (`Hutchinson`), so its error falls with the steps as well.

    Args:
        x: samples `(B, *)` in model units for the pilot run, dequantised; sixteen for a tolerance, eight for fixed steps. Not
            those that are scored.
        tolerance: bits/dim, of the solver's mean |error|: pilot runs choose the fewest steps that are seen to keep it
            (`likelihood.choose_steps`), and samples whose own error is far above it are solved again with more.
        steps: fixes them, and no sample is solved again.
        data_std: the data's standard deviation in model units; that of `x` unless given.
        t_min: the time at which the density is taken, of the pilot run and of the method.
        most: the limit of steps for a tolerance; a sample that is solved again takes up to four times as many. Where none up to
            it is seen to reach the tolerance, a warning says so, and the method has the most steps that were tried.
        seed: of the pilot's probe.

    Raises:
        UserError: for a tolerance that is not positive, a limit below 16, an `x` that is no floating, finite batch, at which
            the score is not finite, or whose standard deviation is not positive.
    """
    require_positive(tolerance, "tolerance")
    require_count(most, "most", 16)  # as in choose_steps
    check_data(x)
    flow = WhitenedFlow(data_std=float(x.std()) if data_std is None else data_std)
    if steps is not None:
        first = x[:LEAST_SAMPLES]
        own = take(score, torch.arange(len(first), device=x.device))  # what a score knows of single samples goes along
        grid = pilot_grid(sde, own, first, flow=flow, t_min=t_min, seed=seed)
        return fast_on(grid, steps=steps, data_std=flow.data_std, t_min=t_min)
    choice = choose_steps(sde, score, x, tolerance=tolerance, data_std=flow.data_std, t_min=t_min, most=most, seed=seed)
    if not choice.reached:
        warnings.warn(choice.warning, stacklevel=2)
    return choice.method(data_std=flow.data_std, t_min=t_min)


def accurate(
    *, tolerance: float = 1e-7, data_std: float = 1.0, max_steps: int = 1000, t_min: float | None = None
) -> Method:
    """Adaptive, each sample with its own steps, one probe along the path (or the exact trace) and an embedded error.

    Args:
        tolerance: relative and absolute, of a step. A float32 network is rough below about 1e-6.
        data_std: the data's standard deviation in model units; it changes the cost, not the value.
        max_steps: attempts after which a sample is given up (`Status.MAX_STEPS`); a step is six evaluations.
        t_min: the time at which the density is taken; the SDE's unless given.

    Raises:
        UserError: for a tolerance below 1e-14, which float64 cannot meet.
    """
    solver = Dopri5(rtol=tolerance, atol=tolerance, max_steps=max_steps)
    return Method(solver, flow=WhitenedFlow(data_std=data_std), t_min=t_min)
