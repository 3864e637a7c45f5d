r"""The bound of a chain of Gaussian steps whose variances are fixed or learned, term by term.

For times t_0 < t_1 < ... < t_N = T of a linear SDE, with s = t_{i-1}, t = t_i and snr = (alpha / sigma)^2,

    (1)  q(x_s | x_t, x_0) = N(mu_q, beta~ I),
         v = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2,    beta~ = v sigma_s^2 / sigma_t^2
    (2)  p(x_s | x_t) = N(mu_q with x_0-hat for x_0, exp(w log v + (1 - w) log beta~))
    (3)  KL(q || p) = 1/2 sum over entries of  e + exp(-e) - 1 + exp(-e) (snr_s - snr_t) (x_0 - x_0-hat)^2,
         e = w log(v / beta~)

(Ho et al. 2020, arXiv:2006.11239, equations (5) to (8); Nichol and Dhariwal 2021, arXiv:2102.09672, equation (15), for w). The
place w is 0 ("posterior"), 1 ("transition"), or the network's own, for each entry ("learned"). Since (snr_s - snr_t) and
log(v / beta~) = 2 log(sigma_t / sigma_s) are known without a difference of near numbers, (3) keeps its digits at every step.

The times need not be all of those that were trained: a chain over some of them is another model, with its own v and beta~ and
the same w (section 4 of the second paper), and its bound is (3) over its own steps.

The decoder p(x_0 | x_{t_0}) is N(x_0-hat, r), r the variance kappa_0^2 of x_0-hat's noise, kappa = sigma / alpha; "learned"
puts r between kappa_0^2 and the first step's beta~ in the same way, where the true beta~ would be 0 (as the paper clips it).
For grey values it is the mass of that normal law in the value's bin, the outermost bins open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from data.transforms import Transform
from likelihood.bounds import Bound, log_mass_of_bins
from likelihood.dequantization import check_grey_values
from likelihood.integration import check_data
from likelihood.step_draws import StepDraws
from numerics import (
    Generator,
    UserError,
    expand_as,
    normal,
    ordinary,
    ordinary_mode,
    require_choice,
    require_count,
    require_float64,
    uniform,
)
from sde_lib import SDE, Score, prior_mismatch, require_eval_mode

VARIANCES = ("posterior", "transition", "learned")


@dataclass(frozen=True, kw_only=True)
class GaussianChain:
    """A chain of Gaussian reverse steps over times of an SDE; the module has its law.

    Args:
        sde: whose kernel the score knows.
        times: t_0 < ... < t_N, `(N+1,)`; the first is the decoder's, the last is T.
        variance: "posterior", "transition", or "learned", which needs a score with `score_and_variance(x, t)`.

    Raises:
        UserError: times that do not rise from above 0 to T, or another variance.
    """

    sde: SDE
    times: Tensor
    variance: Literal["posterior", "transition", "learned"] = "posterior"

    def __post_init__(self) -> None:
        require_choice(self.variance, "variance", VARIANCES)
        times = torch.as_tensor(self.times, dtype=torch.float64)
        rising = times.ndim == 1 and len(times) >= 2 and bool((times.diff() > 0).all())
        if not rising or not float(times[0]) > 0 or not math.isclose(float(times[-1]), self.sde.T, rel_tol=1e-9):
            raise UserError(
                f"got times of shape {tuple(times.shape)} for a chain; expected (N+1,), rising from above 0 to T = "
                f"{self.sde.T:g}"
            )
        object.__setattr__(self, "times", times)

    @property
    def steps(self) -> int:
        """N, without the decoder."""
        return len(self.times) - 1

    def divergence(self, score: Score, x_0: Tensor, i: Tensor, generator: Generator = None) -> Tensor:
        """One draw of the noise for (3) of step `i` `(B,)`, 1 to N: `(B,)` nats, float64.

        Args:
            x_0: clean data `(B, *)`, float32 or float64.
        """
        level = self.sde.log_snr(self.times.to(x_0.device))
        t, gap = self.times.to(x_0.device)[i], level[i - 1] - level[i]
        eps_hat, place, eps = self._predicted(score, x_0, t, generator)
        squares = (eps - eps_hat).to(torch.float64).square()
        squares = squares * expand_as(torch.expm1(gap), squares)
        at = self.sde.sigma(self.times.to(x_0.device)).log()
        excess = place * expand_as(2 * (at[i] - at[i - 1]), squares)
        entries = excess + torch.expm1(-excess) + torch.exp(-excess) * squares
        return 0.5 * entries.flatten(1).sum(dim=1)

    def reconstruction(
        self,
        score: Score,
        x_0: Tensor,
        *,
        data: Tensor | None = None,
        transform: Transform | None = None,
        generator: Generator = None,
    ) -> Tensor:
        """One draw of the noise for -log p(x_0 | x_{t_0}): `(B,)` nats, float64; a density, or with `data` a probability.

        Args:
            x_0: clean data `(B, *)`.
            data: their grey values `(B, *)`; transform: to model units.
        """
        t = self.times[:1].to(x_0.device).expand(x_0.shape[0])
        eps_hat, place, eps = self._predicted(score, x_0, t, generator)
        first, second = self.times[0], self.times[1]
        kappa = float(torch.exp(-self.sde.log_snr(first) / 2))
        ratio = float(self.sde.transition_std(first, second) * self.sde.sigma(first) / self.sde.sigma(second)) / kappa
        learned = self.variance == "learned"
        std = kappa * torch.exp((1 - place) * math.log(ratio)) if learned else torch.full_like(place, kappa)
        std = std.expand(x_0.shape)
        off = kappa * (eps_hat - eps).to(torch.float64)  # x_0 - x_0-hat
        if data is None:
            log_prob = -0.5 * (off / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        else:
            assert transform is not None
            mean = transform(data.to(torch.float64) + 0.5) - off
            log_prob = log_mass_of_bins(transform, data, mean, std)
        return -log_prob.flatten(1).sum(dim=1)

    def bound(
        self,
        score: Score,
        x_0: Tensor,
        *,
        data: Tensor | None = None,
        transform: Transform | None = None,
        draws: int = 64,
        reconstructions: int = 4,
        data_std: float = 1.0,
        generator: Generator = None,
    ) -> Bound:
        """The chain's bound on -log p(x_0); its steps are drawn by importance (`likelihood.step_draws`).

        Args:
            score: of the SDE.
            x_0: clean data in model units `(B, *)`; with `data` the middles of their bins.
            data: grey values `(B, *)` to be scored by their bins' mass; transform: to model units.
            draws: of step and noise, for each image; eight or more for an error bar.
            reconstructions: draws of the noise at t_0.
            data_std: the data's standard deviation, which chooses the steps that are looked at more often; any gives the same
                expectation.

        Raises:
            UserError: fewer than one draw, an x_0 that is not floating and finite, grey values out of range or without a
                transform, or "learned" for a score that has no variance.
        """
        require_eval_mode(score)
        require_float64(x_0, "a bound's data")
        require_count(draws, "draws")
        require_count(reconstructions, "reconstructions")
        check_data(x_0)
        if data is not None:
            if transform is None:
                raise UserError(
                    "got grey values without a transform; expected the data's: give transform=dataset.transform()"
                )
            check_grey_values(data, transform)
        x_0 = ordinary(x_0.to(torch.promote_types(x_0.dtype, torch.float32)))
        B, device = x_0.shape[0], x_0.device
        with ordinary_mode(device), torch.no_grad():
            first = torch.stack(
                [
                    self.reconstruction(score, x_0, data=data, transform=transform, generator=generator)
                    for _ in range(reconstructions)
                ],
                dim=1,
            )
            level = self.sde.log_snr(self.times.to(device))
            gaps = level[:-1] - level[1:]
            w = data_std**2 / (data_std**2 + torch.exp(-level[1:]))
            u = uniform((B, draws), generator, device=device, dtype=torch.float64)
            drawn = StepDraws.of(
                u, lengths=gaps, weights=torch.expm1(gaps) / 2, w=w.expand(B, -1), dimensions=x_0[0].numel()
            )
            terms = [self.divergence(score, x_0, drawn.cells[:, j] + 1, generator) for j in range(draws)]
            diffusion, stderr, degrees = drawn.total(torch.stack(terms, dim=1))
            prior = prior_mismatch(self.sde, x_0)
        few = torch.full_like(prior, math.nan)
        return Bound(
            reconstruction=first.mean(dim=1),
            prior=prior,
            diffusion=diffusion,
            reconstruction_stderr=first.std(dim=1) / math.sqrt(reconstructions) if reconstructions > 1 else few,
            diffusion_stderr=stderr,
            degrees_of_freedom=degrees,
            draws=draws,
            nfe=draws + reconstructions,
        )

    def _predicted(self, score: Score, x_0: Tensor, t: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """eps-hat `(B, *)`, the place w (float64, `(B, *)` or one number each), and the eps `(B, *)` that was drawn, at `t`."""
        eps = normal(x_0.shape, generator, device=x_0.device, dtype=x_0.dtype)
        x = self.sde.perturb(x_0, t, eps)
        if self.variance == "learned":
            value, place = self._pair(score)(x, t)
            place = place.to(torch.float64)
        else:
            value = score(x, t)
            place = torch.full(
                (len(x), *(1,) * (x.ndim - 1)),
                float(self.variance == "transition"),
                dtype=torch.float64,
                device=x.device,
            )
        return -expand_as(self.sde.sigma(t), x) * value, place, eps

    def _pair(self, score: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        asked: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = getattr(score, "score_and_variance", None)
        if asked is None:
            raise UserError(
                "got variance='learned' and a score without score_and_variance(x, t); expected a model trained with a learned "
                "variance: use variance='posterior' or 'transition'"
            )
        return asked
