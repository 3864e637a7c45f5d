"""The reverse SDE by torchsde."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from numerics import SampleStreams, require_choice
from samplers.base import GridSampler
from samplers.run import Run
from samplers.step import StatefulStep
from sde_lib import SDE


@dataclass(frozen=True, kw_only=True, repr=False)
class TorchSDE(GridSampler):
    r"""The reverse SDE by torchsde: Euler, Milstein, and a stochastic Runge-Kutta method of strong order 1.5.

    torchsde (Li et al. 2020, arXiv:2001.01328; Kidger et al. 2021, arXiv:2105.13493) integrates forwards in time, so its
    clock is T - t and the drift changes sign. Its Brownian path is a function of the seed alone, on a dyadic tree: the
    same seed with more steps is the *same path* solved better, so refinement converges pathwise. (The results for two
    numbers of steps still differ by their errors.) The noise of these SDEs is additive, so Milstein's method equals
    Euler's.

    The path's entropy comes from `generator`: one tree for the batch from a `torch.Generator`, and one for each sample from
    `SampleStreams`, so that a sample does not depend on its batch mates (and the trees then cost time for each sample).
    The package is imported when the sampler is called.

    Args:
        solver: "euler", "milstein" (one evaluation a step) or "srk" (four).
        steps, grid, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for another solver.
    """

    steps: int = 500
    solver: Literal["euler", "milstein", "srk"] = "euler"

    costs: ClassVar[dict[str, int]] = {"euler": 1, "milstein": 1, "srk": 4}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.solver, "solver", tuple(self.costs))

    @property
    def evaluations_per_step(self) -> int:  # type: ignore[override]
        """Calls of the score a step."""
        return self.costs[self.solver]

    def method(self, sde: SDE, times: Tensor) -> StatefulStep[Any]:
        """The step on the grid `times` `(N+1,)`."""
        return _OneStep(times, self.solver)


class _OneStep(StatefulStep[Any]):
    """A step of torchsde, which remembers the Brownian path of a run."""

    def __init__(self, times: Tensor, solver: str) -> None:
        self.T, self.solver = float(times[0]), solver
        self.clock = (self.T - times).clone()

    def init(self, x: Tensor, run: Run) -> Any:
        return _brownian(run.generator, x.flatten(1), float(self.clock[-1]))

    def __call__(self, i: int, x: Tensor, run: Run, state: Any) -> tuple[Tensor, Any]:
        from torchsde import sdeint

        ends = self.clock[i : i + 2]
        # longer than the interval, which torchsde then cuts to one step that ends exactly there
        dt = 2 * float(ends[1] - ends[0])
        problem = _Reverse(run, x.shape, self.T)
        with torch.no_grad():
            end = sdeint(problem, x.flatten(1), ends.to(x.device), bm=state, method=self.solver, dt=dt)[-1]
        return end.reshape(x.shape), state


class _Reverse:
    """The reverse SDE as torchsde asks for it: `f` and `g` of the clock T - t and a flat state `(B, D)`."""

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(self, run: Run, shape: torch.Size, T: float) -> None:
        self.sde, self.run, self.shape, self.T = run.sde, run, shape, T
        self._known: list[tuple[float, Tensor, Tensor]] = []  # the clock, the state and the drift of one step's stages

    def f(self, u: Tensor, y: Tensor) -> Tensor:
        # torchsde evaluates once more before it begins, to see the shape, and its Runge-Kutta method evaluates a stage
        # again for each later one, of the same tensor
        for clock, state, drift in self._known:
            if state is y and clock == float(u):
                return drift
        t = self.T - float(u)
        x = y.reshape(self.shape)
        drift = (float(self.sde.g(t)) ** 2 * self.run.score(x, t) - float(self.sde.f(t)) * x).flatten(1)
        self._known.append((float(u), y, drift))
        return drift

    def g(self, u: Tensor, y: Tensor) -> Tensor:
        # the term of y is 0: Milstein's method differentiates this by y
        return y * 0 + float(self.sde.g(self.T - float(u)))


def _brownian(generator: Any, like: Tensor, length: float) -> Any:
    from torchsde import BrownianInterval

    def path(entropy: int, size: tuple[int, ...]) -> Any:
        return BrownianInterval(
            t0=0.0,
            t1=length,
            size=size,
            dtype=like.dtype,
            device=like.device,
            entropy=entropy,
            # so that the path depends on the entropy alone and not on where it is asked for
            halfway_tree=True,
            tol=1e-6 * length,
            levy_area_approximation="space-time",
        )

    if not isinstance(generator, SampleStreams):
        source = None if generator is None else generator.device
        entropy = int(torch.randint(2**31 - 1, (1,), generator=generator, device=source))
        return path(entropy, tuple(like.shape))
    seeds = generator.words((like.shape[0], 1), device="cpu").flatten().tolist()
    return _PathPerSample([path(int(seed), (1, like.shape[1])) for seed in seeds], like)


class _PathPerSample:
    """Brownian paths of single samples, as one of the batch."""

    def __init__(self, paths: list[Any], like: Tensor) -> None:
        self.paths = paths
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self.levy_area_approximation = "space-time"

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        parts = [path(ta, tb, return_U=return_U, return_A=return_A) for path in self.paths]
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(group) for group in zip(*parts, strict=True))
        return torch.cat(parts)
