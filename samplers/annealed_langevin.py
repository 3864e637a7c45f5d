r"""Annealed Langevin dynamics: the sampler of NCSN, and one level of it as a corrector.

The algorithm has its own stationary law, not the data's: at NCSN's published step the weights of a mixture's modes, 0.8
and 0.2, were measured as 0.78 and 0.22. It was made for VE. On a kernel whose alpha changes, x is not rescaled between
levels, and the chain has to carry the means along.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from numerics import UserError, require_count, require_range
from samplers.base import Sampler
from samplers.correctors import Corrector
from samplers.langevin import langevin_steps, require_contracting, signal_ratio
from samplers.result import SampleResult
from samplers.run import Run
from samplers.step import Step
from sde_lib import SDE
from sde_lib.time_grids import LogSNR, TimeGrid


def require_stable(step_size: float, sigma: float) -> None:
    """Refuses a step at which Langevin dynamics on the last level of N(0, sigma^2 I) diverges.

    Args:
        step_size: NCSN's e, of x <- x + (e / 2) score + sqrt(e) z at that level: x is multiplied by 1 - e / (2 sigma^2).
        sigma: of the last level.

    Raises:
        UserError: unless step_size < 4 sigma^2.
    """
    if step_size >= 4 * sigma**2:
        raise UserError(
            f"got step_size={step_size:g} on levels that end at sigma={sigma:.4g}; expected less than 4 sigma^2 = "
            f"{4 * sigma**2:.4g}, above which the chain diverges: take a smaller one, a grid that ends earlier, or snr"
        )


@dataclass(frozen=True, kw_only=True)
class AnnealedLangevinCorrector(Corrector):
    r"""One level of annealed Langevin dynamics: K Langevin steps at t_i whose size follows the level, never x.

        K times   x <- x + e_i score(x, t_i) + sqrt(2 e_i) z

    - `step_size=e`: e_i = (e / 2) (sigma_i / sigma_L)^2 with sigma_L that of the grid's last time, the step of algorithm 1
      of Song and Ermon 2019 (arXiv:1907.05600): alpha_i / 2 with alpha_i = e sigma_i^2 / sigma_L^2. What the published code
      of NCSN and NCSNv2 calls step_lr is e / 2.
    - `step_size=None`: e_i = 2 (alpha_t / alpha_s)^2 (snr sigma_i)^2, the corrector "ald" in the published code of Song et
      al. 2021 (arXiv:2011.13456), which is `Langevin` with no norms. On VE, snr = sqrt(e) / (2 sigma_L) is NCSN's step.

    Args:
        snr: the signal-to-noise ratio of a step, above 0 and below 1, from where on the chain diverges.
        steps: K, Langevin steps each time it is applied, of one evaluation each.
        step_size: NCSN's e, instead of `snr`.

    Raises:
        UserError: for a value out of range; when sampling, for a step_size above which the chain diverges.
    """

    snr: float = 0.16
    steps: int = 1
    step_size: float | None = None

    def __post_init__(self) -> None:
        require_range(self.snr, "snr", 1e-12)
        if self.step_size is None:
            require_contracting(self.snr)
        require_count(self.steps, "steps")
        if self.step_size is not None:
            require_range(self.step_size, "step_size", 1e-300)

    @property
    def evaluations(self) -> int:
        """Calls of the score each time it is applied."""
        return self.steps

    def prepare(self, sde: SDE, times: Tensor) -> Step:
        """The chain on the grid, or the levels, `times` `(N+1,)`."""
        sigma = sde.sigma(times)
        if self.step_size is None:
            return langevin_steps(times, 2 * (self.snr * signal_ratio(sde, times) * sigma).square(), self.steps)
        require_stable(self.step_size, float(sigma[-1]))
        return langevin_steps(times, self.step_size / 2 * (sigma / sigma[-1]).square(), self.steps)


@dataclass(frozen=True, kw_only=True, repr=False)
class AnnealedLangevin(Sampler):
    r"""The sampler of NCSN: Langevin steps at each of L noise levels, from the largest to the smallest.

        for each level sigma_1 > ... > sigma_L:   K times   x <- x + e_i score(x, t_i) + sqrt(2 e_i) z

    This is algorithm 1 of Song and Ermon 2019 (arXiv:1907.05600) with `step_size=e`, e_i = (e / 2) (sigma_i / sigma_L)^2;
    with `step_size=None` e_i = 2 (alpha_t / alpha_s)^2 (snr sigma_i)^2 (see `AnnealedLangevinCorrector`). NCSNv2 (Song and
    Ermon 2020, arXiv:2006.09011) is the same and ends with the denoising x + sigma_L^2 score(x, sigma_L).

    The result's `times` `(levels + 1,)` are T, where x_T is, and then the levels, after each of which the path has a
    state. As `PredictorCorrector(corrector=AnnealedLangevin(...))` it stands for its `.corrector`.

    Args:
        snr: the signal-to-noise ratio of a step.
        steps: K, Langevin steps at each level, of one evaluation each.
        step_size: NCSN's e, instead of `snr`.
        levels: L >= 2, from T to t_end; at equal ratios of sigma/alpha unless a grid is given.
        grid: N+1 times, which are the levels.
        denoise, corrections: as in every `Sampler`.

    Raises:
        UserError: for a value that is not above 0, or fewer than two levels; when sampling, for a step_size above which the
            chain diverges.
    """

    snr: float = 0.16
    steps: int = 1
    step_size: float | None = None
    levels: int = 1000

    default_grid: ClassVar[TimeGrid] = LogSNR()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle(levels=self._count("levels", least=2, beyond=1))
        _ = self.corrector  # which checks its options

    @classmethod
    def ncsn(cls) -> AnnealedLangevin:
        """NCSN's published settings: 10 levels of 100 steps at 2e-5, no denoising (for sigmas 1 ... 0.01; it starts from
        uniform noise on [0, 1], which you pass as x_T). The paper's algorithm; its code steps twice as far, e = 4e-5."""
        return cls(levels=10, steps=100, step_size=2e-5, denoise=False)

    @classmethod
    def ncsn_v2(cls) -> AnnealedLangevin:
        """NCSNv2's for CIFAR-10: 232 levels of 5 steps, x + step_lr (sigma / sigma_L)^2 score with step_lr = 6.2e-6 and so
        e = 1.24e-5, with denoising (for sigmas 50 ... 0.01)."""
        return cls(levels=232, steps=5, step_size=1.24e-5, denoise=True)

    @property
    def corrector(self) -> AnnealedLangevinCorrector:
        """What is done at one level."""
        return AnnealedLangevinCorrector(snr=self.snr, steps=self.steps, step_size=self.step_size)

    @property
    def evaluations(self) -> int:
        """Calls of the score that a run makes."""
        return self.levels * self.steps + int(self.denoise)

    def within(self, evaluations: int) -> AnnealedLangevin:
        """This sampler with as many levels as fit into a budget of `evaluations` calls of the score.

        Raises:
            UserError: where not two levels fit.
        """
        levels = (evaluations - int(self.denoise)) // self.steps
        if levels < 2:
            raise UserError(
                f"got a budget of {evaluations} evaluations for AnnealedLangevin; expected at least "
                f"{2 * self.steps + int(self.denoise)}, which is two levels: take fewer steps a level"
            )
        return replace(self, levels=levels)

    def _times(self, sde: SDE) -> Tensor:
        return self._nodes(sde, self.levels - 1)

    def _sample(self, run: Run, x: Tensor, times: Tensor) -> SampleResult:
        correct = self.corrector.prepare(run.sde, times)
        return self._walk(run, x, torch.cat([times[:1], times]), correct)
