"""Ancestral sampling: the Gaussian reverse step of DDPM, for any linear SDE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from numerics import UserError, require_choice
from samplers.predictors import Predictor
from samplers.run import Run, numbers
from samplers.step import Step, affine
from sde_lib import SDE, Score


@dataclass(frozen=True, kw_only=True)
class Ancestral(Predictor):
    r"""The Gaussian reverse step of DDPM, for any linear SDE.

    With a = alpha_t / alpha_s, v the variance of the transition s -> t and D the denoised mean, the posterior of the
    forward process is

        x_s | x_t, x_0 = D:   mean = (a sigma_s^2 / sigma_t^2) x_t + (alpha_s v / sigma_t^2) D = (x_t + v score) / a
                              variance = v sigma_s^2 / sigma_t^2                      "posterior"
                              or         v                                            "transition"
                              or         exp(w log v + (1 - w) log(v sigma_s^2 / sigma_t^2))  "learned", w(x_t, t) in [0, 1]

    (Ho et al. 2020, arXiv:2006.11239, equations (6), (7), (11) and section 3.2 for the two fixed variances, which are right
    for data at one point and for N(0, I) data; Nichol and Dhariwal 2021, arXiv:2102.09672, equation (15) for the learned
    one; Song et al. 2021, arXiv:2011.13456, equation (47) for VE). Weak order 1: where data have the variance 0.1,
    1,000 equal steps leave it 2.3 % (VP), 1.5 % (sub-VP) and 0.8 % (VE) small, and twice as many half of that; steps equal
    in log_snr leave 1.0, 1.4 and 0.8 %. "posterior" is DDIM with eta = 1.

    A learned variance comes from a score object that has

        score.score_and_variance(x, t) -> (score, w),    both `(B, *)`, from one evaluation of the network.

    Args:
        variance: "posterior", "transition" (the larger) or "learned".

    Raises:
        UserError: for another variance; when sampling, for "learned" with a score that has none.
    """

    variance: Literal["posterior", "transition", "learned"] = "posterior"

    def __post_init__(self) -> None:
        require_choice(self.variance, "variance", ("posterior", "transition", "learned"))

    def check(self, score: Score) -> None:
        """Refuses a score without the learned variance, where that is asked for."""
        if self.variance == "learned" and not callable(getattr(score, "score_and_variance", None)):
            raise UserError(
                'got variance="learned" and a score without score_and_variance(x, t); expected a model trained with a '
                'learned variance: use variance="posterior" or "transition"'
            )

    def prepare(self, sde: SDE, times: Tensor) -> Step:
        """The step on the grid `times` `(N+1,)`."""
        t, s = times[:-1], times[1:]
        a, std = sde.alpha(t) / sde.alpha(s), sde.transition_std(s, t)
        ratio = sde.sigma(s) / sde.sigma(t)
        if self.variance == "learned":
            return _learned(t, 1 / a, std.square() / a, std, ratio)
        return affine(t, x=1 / a, score=std.square() / a, noise=std * ratio if self.variance == "posterior" else std)


def _learned(t: Tensor, x: Tensor, score: Tensor, std: Tensor, ratio: Tensor) -> Step:
    """The affine step whose noise has the standard deviation std ratio^(1 - w) in each entry."""
    now, of_x, of_score, large, log_ratio = (numbers(v) for v in (t, x, score, std, ratio.log()))

    def step(i: int, x: Tensor, run: Run) -> Tensor:
        score, w = run.score_and_variance(x, now[i])
        mean = (x * of_x[i]).add_(score, alpha=of_score[i])
        return mean.addcmul_(((1 - w) * log_ratio[i]).exp_() * large[i], run.noise(x))

    return step
