r"""The reverse diffusion sampler: the forward step's own discretisation, turned around.

The exact forward step s -> t is x_t = a x_s + sqrt(v) z, with a = alpha_t / alpha_s and v the variance of the
transition ((4) in `sde_lib.base`). Reading it as x_t = x_s + f_i(x_s) + G_i z, f_i(x) = (a - 1) x, G_i^2 = v, the
reverse is

    x_s = x_t - f_i(x_t) + v score(x_t, t) + sqrt(v) z = (2 - a) x_t + v score(x_t, t) + sqrt(v) z

(Song et al. 2021, arXiv:2011.13456, equation (46) in appendix E; with the chains' own a and v it is there the reverse
diffusion predictor of VE and VP). Weak order 1; any linear SDE. All factors stay bounded for a step of any length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from samplers.base import Run
from samplers.predictors import Predictor
from sde_lib import SDE


@dataclass(frozen=True, kw_only=True)
class ReverseDiffusion(Predictor):
    """See the module's text."""

    def prepare(self, sde: SDE, times: Tensor) -> Callable[[int, Tensor, Run], Tensor]:
        t, s = times[:-1], times[1:]
        std = sde.transition_std(s, t)
        of_x = (2 - sde.alpha(t) / sde.alpha(s)).tolist()
        of_score, of_noise = std.square().tolist(), std.tolist()
        now = t.tolist()

        def predict(i: int, x: Tensor, run: Run) -> Tensor:
            mean = (x * of_x[i]).add_(run.score(x, now[i]), alpha=of_score[i])
            return mean.add_(run.noise(x), alpha=of_noise[i])

        return predict
