r"""Annealed Langevin dynamics: the sampler of NCSN, and one level of it as a corrector.

    for each level sigma_1 > ... > sigma_L:   K times   x <- x + e_i score(x, t_i) + sqrt(2 e_i) z

- `step_size=e`: e_i = (e / 2) (sigma_i / sigma_L)^2, exactly algorithm 1 of Song and Ermon 2019 (arXiv:1907.05600),
  whose step is alpha_i / 2 with alpha_i = e sigma_i^2 / sigma_L^2. NCSNv2 (Song and Ermon 2020, arXiv:2006.09011) is
  the same and ends with the denoising x + sigma_L^2 score(x, sigma_L); what its code calls step_lr is e / 2.
- `step_size=None`: e_i = 2 (alpha_t / alpha_s)^2 (snr sigma_i)^2, the corrector "ald" in the published code of Song et
  al. 2021 (arXiv:2011.13456), which is `Langevin` with no norms. On VE, snr = sqrt(e) / (2 sigma_L) is NCSN's step.

The algorithm has its own stationary law, not the data's: at NCSN's published step the weights of a mixture's modes, 0.8
and 0.2, were measured as 0.78 and 0.22. It was made for VE. On a kernel whose alpha changes, x is not rescaled between
levels, and the chain has to carry the means along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from numerics import Generator, UserError, require_count, require_range
from samplers.base import Callback, Run, Sampler, SampleResult, set_steps
from samplers.correctors import Corrector
from samplers.langevin import langevin_step, signal_ratio
from sde_lib import SDE, Score
from sde_lib.time_grids import LogSNR, TimeGrid


@dataclass(frozen=True, kw_only=True, repr=False)
class AnnealedLangevin(Sampler, Corrector):
    """See the module's text. As `PredictorCorrector(corrector=AnnealedLangevin(...))` only `snr`, `steps` and
    `step_size` count.

    Args:
        snr: the signal-to-noise ratio of a step.
        steps: Langevin steps at each level.
        step_size: NCSN's e in place of `snr`.
        levels: how many levels, from T to t_end; at equal ratios of sigma/alpha unless a grid is given.

    The result's `times` `(levels + 1,)` are T, where x_T is, and then the levels, after each of which the path has a
    state.
    """

    snr: float = 0.16
    steps: int = 1
    step_size: float | None = None
    levels: int = 1000

    default_grid: ClassVar[TimeGrid] = LogSNR()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.snr, "snr", 1e-12)
        require_count(self.steps, "steps")
        if self.step_size is not None:
            require_range(self.step_size, "step_size", 1e-300)
        set_steps(self, "levels", extra=1)
        require_count(self.levels, "levels", least=2)

    @classmethod
    def ncsn(cls) -> AnnealedLangevin:
        """NCSN's published settings: 10 levels of 100 steps at 2e-5, no denoising (for sigmas 1 ... 0.01; it starts from
        uniform noise on [0, 1], which is to be given as x_T)."""
        return cls(levels=10, steps=100, step_size=2e-5, denoise=False)

    @classmethod
    def ncsn_v2(cls) -> AnnealedLangevin:
        """NCSNv2's for CIFAR-10: 232 levels of 5 steps at 6.2e-6, with denoising (for sigmas 50 ... 0.01)."""
        return cls(levels=232, steps=5, step_size=6.2e-6, denoise=True)

    @property
    def evaluations(self) -> int:
        return self.levels * self.steps + int(self.denoise)

    def within(self, evaluations: int) -> AnnealedLangevin:
        levels = (evaluations - int(self.denoise)) // self.steps
        if levels < 2:
            raise UserError(
                f"got a budget of {evaluations} evaluations for AnnealedLangevin; expected at least "
                f"{2 * self.steps + int(self.denoise)}, which is two levels: take fewer steps a level"
            )
        return replace(self, levels=levels)

    def prepare(self, sde: SDE, times: Tensor) -> Callable[[int, Tensor, Run], Tensor]:
        sigma = sde.sigma(times)
        if self.step_size is None:
            e = 2 * (self.snr * signal_ratio(sde, times) * sigma).square()
        else:
            e = self.step_size / 2 * (sigma / sigma[-1]).square()
            if self.step_size >= 4 * float(sigma[-1]) ** 2:
                raise UserError(
                    f"got step_size={self.step_size} on levels that end at sigma={float(sigma[-1]):.4g}; expected less than "
                    "4 sigma^2, above which the chain diverges: take a smaller one, a grid that ends earlier, or snr"
                )
        now, size = times.tolist(), e.tolist()

        def correct(i: int, x: Tensor, run: Run) -> Tensor:
            for _ in range(self.steps):
                x = langevin_step(x, run.score(x, now[i]), run.noise(x), size[i])
            return x

        return correct

    @torch.no_grad()
    def __call__(
        self,
        sde: SDE,
        score: Score,
        shape: Sequence[int],
        *,
        x_T: Tensor | None = None,
        generator: Generator = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        keep_path: bool = False,
        callback: Callback | None = None,
    ) -> SampleResult:
        levels = self._nodes(sde, self.levels - 1)
        x = self._start(sde, float(levels[0]), shape, x_T, generator, device, dtype)
        nodes = torch.cat([levels[:1], levels])
        return self._walk(
            sde, score, x, nodes, self.prepare(sde, levels), generator, keep_path=keep_path, callback=callback
        )
