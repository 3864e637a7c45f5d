"""The reverse diffusion sampler: the forward step's own discretisation, turned around."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from samplers.predictors import Predictor
from samplers.step import Step, affine
from sde_lib import SDE


@dataclass(frozen=True, kw_only=True)
class ReverseDiffusion(Predictor):
    r"""The forward step's own discretisation, turned around.

    The exact forward step s -> t is x_t = a x_s + sqrt(v) z, with a = alpha_t / alpha_s and v the variance of the
    transition ((4) in `sde_lib.base`). Reading it as x_t = x_s + f_i(x_s) + G_i z, f_i(x) = (a - 1) x, G_i^2 = v, the
    reverse is

        x_s = x_t - f_i(x_t) + v score(x_t, t) + sqrt(v) z = (2 - a) x_t + v score(x_t, t) + sqrt(v) z

    (Song et al. 2021, arXiv:2011.13456, equation (46) in appendix E; with the chains' own a and v it is there the reverse
    diffusion predictor of VE and VP). Weak order 1; any linear SDE. All factors stay bounded for a step of any length.
    It has no options.
    """

    def prepare(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`."""
        t, s = times[:-1], times[1:]
        a, std = sde.alpha(t) / sde.alpha(s), sde.transition_std(s, t)
        return affine(t, x=2 - a, score=std.square(), noise=std)
