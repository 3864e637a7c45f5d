r"""How straight the paths of a probability flow are.

    S = E integral over t of |dx/dt - (x_T - x_0) / T|^2 / D          along solutions of the flow from the prior

(Liu, Gong, Liu 2023, arXiv:2209.03003, where T = 1 and the sum over D stands). It is 0 where each particle moves
on a line at constant speed, and then one step of Euler's method is exact.
"""

from __future__ import annotations

import math

import torch

from evaluation.estimate import Estimate
from numerics import RK4, Generator, batch_time, require_count
from samplers import ProbabilityFlow
from sde_lib import SDE, PlainFlow, Score
from sde_lib.time_grids import Custom

__all__ = ["straightness"]


@torch.no_grad()
def straightness(
    sde: SDE,
    score: Score,
    shape: tuple[int, ...],
    *,
    steps: int = 32,
    generator: Generator = None,
    device: torch.device | str | None = None,
) -> Estimate:
    """S of the flow of `score`, with the standard error over samples.

    Paths are solved by the classical Runge-Kutta method on times equally spaced from T to t_end (four evaluations a step), and
    the integral is taken by the trapezoidal rule over the velocities at these times.

    Args:
        shape: `(B, *)`, the particles; two or more for an error.
        steps: of the solution and of the integral.
        generator: of the noise that the paths begin from.
        device: of the particles.
    """
    require_count(steps, "steps")
    times = torch.linspace(sde.T, sde.resolved(sde.t_end), steps + 1, dtype=torch.float64)
    solver = ProbabilityFlow(solver=RK4(steps=steps), flow=PlainFlow(), grid=Custom(times=times))
    path = solver(sde, score, shape, generator=generator, device=device, keep_path=True).path
    assert path is not None
    span = float(times[0] - times[-1])
    mean = (path[0] - path[-1]) / span
    squares = []
    for t, x in zip(times, path, strict=True):
        error = (sde.flow(score, x, batch_time(t, x)) - mean).flatten(1).to(torch.float64)
        squares.append(error.square().mean(dim=1))
    each = torch.trapezoid(torch.stack(squares), -times.to(path.device), dim=0) / span
    stderr = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return Estimate(value=float(each.mean()), stderr=stderr)
