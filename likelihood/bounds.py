r"""Variational bounds: what a score model guarantees without an ODE.

The reverse SDE from the prior down to t_min, followed by a decoder p(x_0 | x_tmin), is a latent-variable model of x_0.
With l = log_snr, eps-hat = -sigma score, and l falling from l_max at t_min to l_min at T,

    (1)  -log p(x_0) <=  E[-log p(x_0 | x_tmin)]  +  KL(q(x_T | x_0) || prior)
                         + 1/2 integral from l_min to l_max of E |eps - eps-hat(alpha x_0 + sigma eps, t)|^2 dl

(Kingma et al. 2021, "Variational Diffusion Models", arXiv:2107.00630, equations (11) to (15); Song et al. 2021,
arXiv:2101.09258, theorem 3, in the weighting's own units). With steps t_N = T > ... > t_0 = t_min instead of a limit, the
integral becomes a sum of exact Kullback-Leibler divergences between Gaussians of equal variance,

    (2)  sum over i of 1/2 (snr(t_{i-1}) - snr(t_i)) E |x_0 - x_0-hat(x_{t_i}, t_i)|^2

which is DDPM's L_1 + ... + L_{T-1} (Ho et al. 2020, arXiv:2006.11239, equation (5)) for the posterior variance, on any
linear SDE. (2) is at least (1) for the same model and decreases to it as the steps are refined.

The bounds hold for *their* model, the reverse SDE; the flow's density is another model's unless the score is exact. With a
wrong score either may be larger.

The decoder is `GaussianDecoder` for real-valued x_0, `Bins` or `DiscretizedGaussian` for grey levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data.transforms import Transform
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
    require_count,
    require_float64,
    require_positive,
    uniform,
)
from sde_lib import SDE, Score, in_dtype, prior_mismatch, require_eval_mode

_TABLE = 2**22  # pixels times levels, of `Bins`

CELLS = 256
"""Of the log-SNR, within each of which the continuous bound's density of draws is constant."""


class Decoder(ABC):
    """p(x_0 | x_tmin), the last step of the model.

    Attributes:
        needs_score: does it need the denoised image, one evaluation?
        length_weight: how much of |eps - eps-hat|^2 at t_min is in -log_prob.
    """

    needs_score: ClassVar[bool] = True
    length_weight: ClassVar[float] = 0.0

    def check(self, data: Tensor, x_0: Tensor) -> None:
        """Refuses data that cannot be scored, with a UserError."""
        if data.shape != x_0.shape:
            raise UserError(
                f"got data of shape {tuple(data.shape)} for x_0 {tuple(x_0.shape)}; expected the same shape"
            )

    @abstractmethod
    def log_prob(self, data: Tensor, x: Tensor, denoised: Tensor | None, alpha: float, sigma: float) -> Tensor:
        """log p(data | x) `(B,)` nats, float64.

        Args:
            data: what is scored: real-valued `x_0`, or grey values, `(B, *)`.
            x: the state at t_min `(B, *)`.
            denoised: Tweedie's mean there, `(B, *)`, where `needs_score`.
        """


@dataclass(frozen=True, kw_only=True)
class GaussianDecoder(Decoder):
    """p(x_0 | x) = N(x_0-hat, (sigma/alpha)^2 I) around the denoised image x_0-hat, for real-valued data.

    Without it the bound would lack about 0.9 bits/dim at t_min = 1e-5.
    """

    length_weight: ClassVar[float] = 0.5

    def log_prob(self, data: Tensor, x: Tensor, denoised: Tensor | None, alpha: float, sigma: float) -> Tensor:
        s = sigma / alpha
        assert denoised is not None
        z = ((data - denoised) / s).flatten(1).to(torch.float64)
        return -0.5 * z.square().sum(dim=1) - z.shape[1] * math.log(s * math.sqrt(2 * math.pi))


@dataclass(frozen=True, kw_only=True)
class Bins(Decoder):
    """Each pixel on its own: p(k | x) proportional to N(x; alpha c_k, sigma^2) over the levels' centres c_k.

    (Kingma et al. 2021, arXiv:2107.00630, equation (8).)

    Args:
        transform: from level units to model units.
    """

    transform: Transform
    needs_score: ClassVar[bool] = False

    def check(self, data: Tensor, x_0: Tensor) -> None:
        super().check(data, x_0)
        check_grey_values(data, self.transform)

    def log_prob(self, data: Tensor, x: Tensor, denoised: Tensor | None, alpha: float, sigma: float) -> Tensor:
        levels = torch.arange(self.transform.levels or 0, dtype=torch.float64, device=x.device)
        centres = alpha * self.transform(levels + 0.5)
        pixels = max(1, _TABLE // len(centres))  # at once: 65,536 levels of a whole batch would fill the memory
        at, k = x.to(torch.float64).flatten(), data.long().flatten()
        chosen = []
        for first in range(0, len(at), pixels):
            part = slice(first, first + pixels)
            log_prob = (-0.5 * ((at[part].unsqueeze(1) - centres) / sigma).square()).log_softmax(dim=1)
            chosen.append(log_prob.gather(1, k[part].unsqueeze(1)).squeeze(1))
        return torch.cat(chosen).view(len(x), -1).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class DiscretizedGaussian(Decoder):
    """The mass that N(x_0-hat, s^2) puts into the grey value's bin, the outermost bins open; s = sigma/alpha at t_min.

    DDPM's L_0 (Ho et al. 2020, arXiv:2006.11239, equation (13)).

    Args:
        transform: from level units to model units.
    """

    transform: Transform

    def check(self, data: Tensor, x_0: Tensor) -> None:
        super().check(data, x_0)
        check_grey_values(data, self.transform)

    def log_prob(self, data: Tensor, x: Tensor, denoised: Tensor | None, alpha: float, sigma: float) -> Tensor:
        assert denoised is not None
        return log_mass_of_bins(self.transform, data, denoised, sigma / alpha).flatten(1).sum(dim=1)


def log_mass_of_bins(transform: Transform, data: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """Log of the mass that N(mean, std^2) puts into the bin of each grey value, the outermost bins open: `(B, *)`, float64.

    Ho et al. 2020 (arXiv:2006.11239), equation (13).

    Args:
        data: grey values `(B, *)`. mean: in model units `(B, *)`. std: one number, or `(B, *)`.
    """
    half = math.exp(transform.log_det) / 2
    # in float64, or neighbouring bins would leave gaps of float32's size
    centred = transform(data.to(torch.float64) + 0.5) - mean.to(torch.float64)
    above, below = (centred + half) / std, (centred - half) / std
    above = torch.where(data == (transform.levels or 0) - 1, math.inf, above)
    below = torch.where(data == 0, -math.inf, below)
    # on the side of the smaller tails, where the difference of two cdfs keeps its digits
    flip = below > 0
    low, high = torch.where(flip, -above, below), torch.where(flip, -below, above)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    mass: Tensor = log_high + torch.log1p(-torch.exp(log_low - log_high).clamp(max=1 - 1e-16))
    return mass


@dataclass(frozen=True, kw_only=True)
class Bound:
    """An upper bound on -log p(x_0), `(B,)` nats, as the sum reconstruction + prior + diffusion.

    Attributes:
        reconstruction: `(B,)` nats, E[-log p(x_0 | x_tmin)].
        prior: `(B,)` nats, KL(q(x_T | x_0) || prior).
        diffusion: `(B,)` nats, 1/2 integral of E |eps - eps-hat|^2 over log-SNR, or the sum of a chain's steps.
        reconstruction_stderr: `(B,)` nats, of the Monte Carlo estimate over noise; NaN below two draws.
        diffusion_stderr: `(B,)` nats, of that over times and noise; NaN below eight draws, of which no bar can be made.
        degrees_of_freedom: `(B,)`, how many independent squares `diffusion_stderr` amounts to (`StepDraws`); NaN as it is.
        draws: of time and noise.
        nfe: evaluations of the score.
    """

    reconstruction: Tensor
    prior: Tensor
    diffusion: Tensor
    reconstruction_stderr: Tensor
    diffusion_stderr: Tensor
    degrees_of_freedom: Tensor
    draws: int
    nfe: int

    @property
    def heavy_tailed(self) -> Tensor:
        """`(B,)`: does the bar rest on a few of the draws, fewer than a sixth of what equal draws would give?

        Then it may be several times too small: take more draws, and look at the score at the times that they fall on.
        """
        return self.degrees_of_freedom < self.draws / 12

    @property
    def stderr(self) -> Tensor:
        """`(B,)` nats, of the bound; NaN where a part's is."""
        return torch.hypot(self.reconstruction_stderr, self.diffusion_stderr)

    @property
    def nats(self) -> Tensor:
        """`(B,)`, the bound."""
        return self.reconstruction + self.prior + self.diffusion

    def bits_per_dim(self, dimensions: int, log_det: float = 0.0) -> Tensor:
        """`(B,)` bits/dim; `log_det` of the transform in nats per dimension where real-valued data were scored."""
        return (self.nats / dimensions - log_det) / math.log(2)


def elbo(
    sde: SDE,
    score: Score,
    x_0: Tensor,
    *,
    decoder: Decoder | None = None,
    data: Tensor | None = None,
    draws: int = 64,
    reconstructions: int = 4,
    steps: int | None = None,
    t_min: float | None = None,
    data_std: float | None = None,
    generator: Generator = None,
) -> Bound:
    """A variational bound on -log p(x_0), of the continuous reverse SDE or, with `steps`, of a chain of that many steps.

        E[-log p(x_0 | x_tmin)] + KL(q(x_T | x_0) || prior) + 1/2 integral over log-SNR of E |eps - eps-hat|^2,

    for a chain with  sum over i of 1/2 (snr(t_{i-1}) - snr(t_i)) E |x_0 - x_0-hat(x_{t_i}, t_i)|^2  in place of the integral

    (Kingma et al. 2021, arXiv:2107.00630, equations (11) to (15); Ho et al. 2020, arXiv:2006.11239, equation (5).)

    Times (or steps) are drawn where the bound is expected to be, two in each of `draws` / 2 strata, each with its own noise
    (`likelihood.step_draws`).

    With `data_std` the noise's own length is taken out: for data N(m, s^2 I) and the exact score eps - eps-hat is w eps
    plus a term that is independent of eps, w = alpha^2 s^2 / (alpha^2 s^2 + sigma^2), so w^2 (|eps|^2 - D), whose mean is 0,
    is subtracted from |eps - eps-hat|^2. The expectation is the same for any score and any s; on the digits the standard
    error was measured to fall (see `docs/likelihood.md`).

    Args:
        x_0: clean data in model units, `(B, *)`.
        decoder: `GaussianDecoder()` unless given.
        data: what the decoder scores, where that is not `x_0` (grey values for `Bins` and `DiscretizedGaussian`).
        draws: evaluations for the integral, or for a chain's sum; eight or more for an error bar.
        reconstructions: draws of the noise at t_min for the first term; with two or more its error is known.
        steps: of the chain, at times equally spaced from t_min to T; None for the continuous bound.
        t_min: the time of the decoder; `sde.t_min` unless given.
        data_std: s, the data's standard deviation in model units, for less variance; None for none of it.

    Raises:
        UserError: for fewer than one draw or step, a data_std that is not positive, an x_0 that is not floating and finite,
            a t_min outside (0, T), or grey values outside their range.
    """
    require_eval_mode(score)
    require_float64(x_0, "a bound's data")
    require_count(draws, "draws")
    require_count(reconstructions, "reconstructions")
    if steps is not None:
        require_count(steps, "steps")
    if data_std is not None:
        require_positive(data_std, "data_std")
    decoder = GaussianDecoder() if decoder is None else decoder
    t_min = sde.t_min if t_min is None else t_min
    check_data(x_0)
    if not 0 < t_min < sde.T:
        raise UserError(f"got t_min={t_min}; expected a time in (0, {sde.T})")
    decoder.check(x_0 if data is None else data, x_0)
    B, device = x_0.shape[0], x_0.device
    if x_0.dtype != torch.promote_types(x_0.dtype, torch.float32):
        score, x_0 = in_dtype(score, x_0.dtype), x_0.to(torch.float32)
    x_0 = ordinary(x_0)

    def eps_hat(x: Tensor, t: Tensor) -> Tensor:
        return -expand_as(sde.sigma(t), x) * score(x, t)

    def noise() -> Tensor:
        return normal(x_0.shape, generator, device=device, dtype=x_0.dtype)

    def surplus(eps: Tensor, t: Tensor) -> Tensor:
        """w^2 (|eps|^2 - D), `(B,)`: what the length of eps adds to the error of a score of N(0, s^2 I)."""
        if data_std is None:
            return torch.zeros(B, dtype=torch.float64, device=device)
        signal = (sde.alpha(t) * data_std).square()
        weight = signal / (signal + sde.sigma(t).square())
        return weight.square() * (eps.flatten(1).to(torch.float64).square() - 1).sum(dim=1)

    def squared_error(t: Tensor) -> Tensor:
        """|eps - eps-hat|^2 with a new noise at `t` `(B,)`: `(B,)`."""
        eps = noise()
        error = (eps - eps_hat(sde.perturb(x_0, t, eps), t)).flatten(1).to(torch.float64)
        return error.square().sum(dim=1) - surplus(eps, t)

    with ordinary_mode(device), torch.no_grad():
        nfe = draws
        t = torch.full((B,), t_min, dtype=torch.float64, device=device)
        alpha, sigma = float(sde.alpha(t_min)), float(sde.sigma(t_min))
        costs = []
        for _ in range(reconstructions):
            eps = noise()
            x, denoised = sde.perturb(x_0, t, eps), None
            if decoder.needs_score:
                denoised = (x - sigma * eps_hat(x, t)) / alpha
                nfe += 1
            cost = -decoder.log_prob(x_0 if data is None else data, x, denoised, alpha, sigma)
            costs.append(cost - decoder.length_weight * surplus(eps, t))
        prior = prior_mismatch(sde, x_0)

        # the variance of the data: their own mean square where it is not known, with one more value of size 1
        square = x_0.flatten(1).to(torch.float64).square().sum(dim=1, keepdim=True)
        variance = (square + 1) / (x_0[0].numel() + 1) if data_std is None else torch.full_like(square, data_std**2)
        high, low = float(sde.log_snr(t_min)), float(sde.log_snr(sde.T))
        if steps is None:
            edges = torch.linspace(high, low, CELLS + 1, dtype=torch.float64, device=device)
            levels = (edges[1:] + edges[:-1]) / 2
            weights = (edges[:-1] - edges[1:]) / 2
        else:
            times = torch.linspace(t_min, sde.T, steps + 1, dtype=torch.float64, device=device)
            edges = sde.log_snr(times)
            levels = edges[1:]
            # |x_0 - x_0-hat|^2 = |eps - eps-hat|^2 / snr
            weights = torch.expm1(edges[:-1] - edges[1:]) / 2
        u = uniform((B, draws), generator, device=device, dtype=torch.float64)
        drawn = StepDraws.of(
            u,
            lengths=edges[:-1] - edges[1:],
            weights=weights,
            w=variance / (variance + torch.exp(-levels)),
            dimensions=x_0[0].numel(),
            without_length=data_std is not None,
        )
        terms = []
        for j in range(draws):
            i = drawn.cells[:, j]
            if steps is None:
                level = torch.lerp(edges[i], edges[i + 1], drawn.place[:, j])
                t = sde.time_of_log_snr(level).clamp(t_min, sde.T)
            else:
                t = times[i + 1]
            terms.append(weights[i] * squared_error(t))
        first = torch.stack(costs, dim=1)
        diffusion, diffusion_stderr, degrees = drawn.total(torch.stack(terms, dim=1))
    return Bound(
        reconstruction=first.mean(dim=1),
        prior=prior,
        diffusion=diffusion,
        reconstruction_stderr=first.std(dim=1) / math.sqrt(reconstructions)
        if reconstructions > 1
        else torch.full_like(prior, math.nan),
        diffusion_stderr=diffusion_stderr,
        degrees_of_freedom=degrees,
        draws=draws,
        nfe=nfe,
    )
