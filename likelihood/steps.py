r"""How many steps a tolerance takes.

A user has a tolerance in bits/dim, and not a number of steps. So a pilot run climbs a ladder of steps N on a few training
images, all with one and the same trace (exact in a few dimensions, else one probe along the whole path), so that nothing but
the steps differs. It stops at the first N_k with

    gap(N_{k-1}, N_k) <= tolerance / 4,     gap(N_{k-2}, N_k) <= tolerance / 2,
    gap(N, M) = mean |bits_N - bits_M| + its standard error

which stands for the truth, and takes the fewest steps from which on all gaps to it are at most `SHARE` of the tolerance. Two
neighbours that agree by chance do not end the climb: three rungs have to. A rough network is climbed higher and no differently.

Not every image is as hard as the mean: one in ten or so passes close to a place where its flow parts. The pilot sees how large
the error is for a unit of the solver's own estimate of the state's error, and the method that it makes solves images again
whose estimate is far above the others' (`Refinement`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from likelihood.divergence import Divergence, Exact, Hutchinson
from likelihood.draw_places import PILOT
from likelihood.integration import check_data
from likelihood.method import Method
from likelihood.pilot import pilot_grid
from likelihood.probability_flow import log_likelihood
from likelihood.refinement import Refinement
from numerics import Adams, SampleStreams, UserError, require_count, require_positive, take
from sde_lib import SDE, CountedScore, Score, TimeGrid, WhitenedFlow
from sde_lib.time_grids import StepDensity

MOST_STEPS = 512
"""The limit, unless told otherwise."""

SHARE = 0.6
FEW_DIMENSIONS = 16
LEAST_SAMPLES = 8
_LONG = 128  # above so many steps the pilot goes on with fewer samples
_FAR = 4.0  # how many tolerances an image may be off before it is solved again


def fast_on(
    grid: TimeGrid | None,
    *,
    steps: int = 48,
    data_std: float = 1.0,
    t_min: float | None = None,
    refinement: Refinement | None = None,
) -> Method:
    """The method of `fast` on a grid that is known, such as one that an earlier pilot run has placed.

    Args:
        grid: where the steps are; equal steps in the flow's clock for None.
        steps, data_std, t_min: as in `fast`.
        refinement: which samples are solved again with more steps; none for None.
    """
    solver = Adams(steps=steps, points=5, start="rising")
    return Method(solver, flow=WhitenedFlow(data_std=data_std), grid=grid, t_min=t_min, refinement=refinement)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What pilot runs have chosen.

    Attributes:
        grid: where the steps are.
        steps: how many.
        tolerance: bits/dim, mean |error|, as it was asked for.
        error: bits/dim, the mean |error| of these steps on the pilot's samples and its standard error, added.
        reached: was the tolerance seen to be reached?
        refinement: which samples are solved again.
        passes: what the pilot took, in network passes of one sample: forward 1, vector-Jacobian product 2.
    """

    grid: StepDensity
    steps: int
    tolerance: float
    error: float
    reached: bool
    refinement: Refinement | None
    passes: int

    def method(self, *, data_std: float, t_min: float | None = None) -> Method:
        """The method of `fast` with these steps."""
        return fast_on(self.grid, steps=self.steps, data_std=data_std, t_min=t_min, refinement=self.refinement)

    @property
    def warning(self) -> str:
        """What there is to say where the tolerance was not reached; nothing where it was."""
        if self.reached:
            return ""
        return (
            f"no number of steps up to {self.steps} was seen to reach {self.tolerance:g} bits/dim: these erred by "
            f"{self.error:.2g} on the pilot's samples. Take a larger tolerance, or more steps if the network is worth them"
        )

    def asdict(self) -> dict[str, object]:
        """Plain values, from which `choice_of` makes it again."""
        again = self.refinement
        return {
            "knots": self.grid.knots,
            "density": self.grid.density,
            "steps": self.steps,
            "tolerance": self.tolerance,
            "error": self.error,
            "reached": self.reached,
            "refinement": None if again is None else {"ratio": again.ratio, "above": again.above, "times": again.times},
            "passes": self.passes,
        }


def ladder(most: int) -> Iterator[int]:
    """12, 16, 24, 32, 48 ... steps up to `most`, and one rung above it, against which the last of them is seen."""
    for k in itertools.count():
        steps = (12, 16)[k % 2] << k // 2
        yield steps
        if steps > most:
            return


def choose_steps(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    tolerance: float = 1e-3,
    data_std: float | None = None,
    t_min: float | None = None,
    most: int = MOST_STEPS,
    seed: int = 0,
) -> Choice:
    """The fewest steps whose mean |error| is seen to be within a tolerance, and the grid for them.

    Args:
        x: samples `(B, *)` in model units, dequantised; sixteen are better than eight, fewer say little. Not those that are
            scored. The grid is placed by the first eight, and above 128 steps these alone climb on.
        tolerance: bits/dim, of the mean |error| against the solution of many steps with the same trace.
        data_std, t_min, seed: as in `fast`.
        most: the limit of steps, 16 or more.

    Raises:
        UserError: for a tolerance that is not positive, a limit below 16, an x that is not a floating, finite batch, or a score
            that is not finite.
    """
    require_positive(tolerance, "tolerance")
    require_count(most, "most", 16)
    check_data(x)
    flow = WhitenedFlow(data_std=float(x.std()) if data_std is None else data_std)
    counted, passes = CountedScore(score), 0

    def run(some: Tensor) -> Score:
        return take(counted, torch.arange(len(some), device=some.device))

    first = x[:LEAST_SAMPLES]
    grid = pilot_grid(sde, run(first), first, flow=flow, t_min=t_min, seed=seed)
    passes += 3 * counted.evaluated
    D = x[0].numel()
    trace: Divergence = Exact() if D <= FEW_DIMENSIONS else Hutchinson(fresh=False)
    values: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}

    def climb(steps: int) -> None:
        nonlocal passes
        some = x if steps <= _LONG else first
        method = fast_on(grid, steps=steps, data_std=flow.data_std, t_min=t_min)
        probe = SampleStreams(seed, draw=PILOT + 1)
        found = log_likelihood(sde, run(some), some, divergence=trace, method=method, generator=probe)
        passes += len(some) * (found.nfe + 2 * found.nbe)
        values[steps] = found.log_prob / (D * math.log(2))
        errors[steps] = found.state_error

    def gap(steps: int, truth: int) -> float:
        n = min(len(values[steps]), len(values[truth]))
        off = (values[steps][:n] - values[truth][:n]).abs()
        off = torch.where(off.isfinite(), off, math.inf)  # a failure is no small error
        spread = float(off.std()) / math.sqrt(n) if n > 1 else 0.0
        return float(off.mean()) + (spread if spread == spread else 0.0)

    rungs: list[int] = []
    for steps in ladder(most):
        climb(steps)
        rungs.append(steps)
        if len(rungs) >= 3:
            truth, near, far = rungs[-1], rungs[-2], rungs[-3]
            if gap(near, truth) <= tolerance / 4 and gap(far, truth) <= tolerance / 2:
                break
    truth = rungs[-1]
    within = [gap(rung, truth) <= SHARE * tolerance for rung in rungs[:-1]]
    chosen = rungs[-2]
    for rung, good in zip(reversed(rungs[:-1]), reversed(within), strict=True):
        if not good:
            break
        chosen = rung
    reached = within[-1]
    at = rungs.index(chosen)
    if reached and at > 0:
        between = (rungs[at - 1] + chosen) // 2
        climb(between)
        chosen = between if gap(between, truth) <= SHARE * tolerance else chosen
    error = gap(chosen, truth)
    return Choice(
        grid=grid,
        steps=chosen,
        tolerance=tolerance,
        error=error,
        reached=reached,
        # where the tolerance is not reached, images that err alike are all of them: they would all be solved beyond the limit
        refinement=_refinement(values[chosen], values[truth], errors[chosen], max(tolerance, error)),
        passes=passes,
    )


def _refinement(values: Tensor, truth: Tensor, errors: Tensor, tolerance: float) -> Refinement | None:
    """Nine in ten of the pilot's samples err by less than ratio times their state's error."""
    n = min(len(values), len(truth))
    off = (values[:n] - truth[:n]).abs() * math.log(2)
    known = off.isfinite() & (errors[:n] > 0)
    if not bool(known.any()):
        return None
    ratio = float((off[known] / errors[:n][known]).quantile(0.9))
    return Refinement(ratio=ratio, above=_FAR * tolerance * math.log(2)) if ratio > 0 else None


def choice_of(table: Mapping[str, Any]) -> Choice:
    """The choice that `Choice.asdict` wrote down.

    Raises:
        UserError: where something is missing, or is not what it should be.
    """
    try:
        again = table["refinement"]
        made = Choice(
            grid=StepDensity(knots=tuple(table["knots"]), density=tuple(table["density"])),
            refinement=None if again is None else Refinement(**again),
            **{name: table[name] for name in ("steps", "tolerance", "error", "reached", "passes")},
        )
        require_count(made.steps, "steps")
        require_positive(made.tolerance, "tolerance")
        require_count(made.passes, "passes", 0)
        # NaN where the pilot's samples did not tell
        if not isinstance(made.error, (int, float)) or not isinstance(made.reached, bool):
            raise TypeError("its error is no number, or reached neither true nor false")
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"got a choice of steps that cannot be read ({error}); expected what a pilot wrote") from error
    return made
