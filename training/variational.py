r"""The variational bound of the discrete chain, and the hybrid that learns the variances.

For times t_0 = 0 < t_1 < ... < t_N = T, evenly spaced, the forward posterior and the model are

    (1)  q(x_s | x_t, x_0) = N(mu_q, beta~),   beta~ = sigma_{t|s}^2 sigma_s^2 / sigma_t^2,
         sigma_{t|s}^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2
    (2)  p(x_s | x_t) = N(mu_q with x_0-hat for x_0, v),
    (3)  L_vlb = L_T + sum over i >= 2 of KL(q(x_{i-1} | x_i, x_0) || p(x_{i-1} | x_i)) - log p(x_0 | x_1)

(Ho et al. 2020, arXiv:2006.11239, equations (5) to (8), written for any kernel with sigma(0) = 0; for DDPM's chain
sigma_{t|s}^2 is beta). The variance v is beta~ ("posterior"), sigma_{t|s}^2 ("transition"), or learned:

    (4)  log v = w log sigma_{t|s}^2 + (1 - w) log beta~,     w = (network's second output + 1) / 2

(Nichol and Dhariwal 2021, arXiv:2102.09672, equation (15)). beta~ is 0 for i = 1 and is replaced by that of i = 2, as there.
For exact scores and many steps the bound is tight with "transition", whose variance is the right one where the noise is
far below the data's scale. With v = beta~ it stays above by a constant, and each KL is
1/2 (snr_s / snr_t - 1) |eps - eps_hat|^2.

The decoder p(x_0 | x_1) is a Gaussian density for real data; with `bin_width`, the mass of the bin around each x_0, the
outermost bins open (Ho et al. 2020, equation (13)); then x_0 must be bin centres: `TrainingOptions(dequantize=False)`.

A loss is (3) estimated from one i, in nats per dimension: the term times N, plus L_T. `Hybrid` is
L_simple + 0.001 L_vlb, in which L_vlb teaches only the variances (section 3.1 there).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from numerics import expand_as, require_choice, require_count
from sde_lib import SDE
from training.discrete import DiscreteTime
from training.errors import UsageError
from training.objectives import TimedObjective, predicted_noise
from training.time_sampling import TimeSampler
from training.trainable import NoisePredictor, as_trainable

VARIANCES = ("posterior", "transition", "learned")


@dataclass(frozen=True, kw_only=True)
class VLB(TimedObjective):
    """The bound of a discrete chain on the negative log-likelihood, estimated from one step i, in nats per dimension, `(B,)`:

        L_vlb = L_T + sum over i >= 2 of KL(q(x_{i-1} | x_i, x_0) || p(x_{i-1} | x_i)) - log p(x_0 | x_1)

    Ho et al. 2020 (arXiv:2006.11239), equation (5); the module has the parts.

    Args:
        times: `DiscreteTime()`, whose levels become `steps`.
        t_min: not used: a table has its own times.
        steps: number of steps of the chain, at least 2.
        variance: variance of p: "posterior", "transition", or "learned", which needs a network with `learned_variance`.
        bin_width: width of a grey value's bin in model units; None for real-valued data.
        low, high: ends of the data's range, where the bins are open.

    Raises:
        UserError: an option out of range. In a step: an SDE whose data are noisy at t = 0, or a network without variances.
    """

    times: TimeSampler = DiscreteTime()
    steps: int = 1000
    variance: str = "posterior"
    bin_width: float | None = None
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.variance, "variance", VARIANCES)
        require_count(self.steps, "steps", 2)
        if not isinstance(self.times, DiscreteTime) or self.times.zero:
            raise UsageError(
                f"got times={self.times} for the bound of a discrete chain; expected DiscreteTime(): leave times out"
            )
        object.__setattr__(self, "times", replace(self.times, levels=self.steps))

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        x_t = model.sde.perturb(x_0, draws["t"], draws["eps"])
        eps_hat, fraction = predicted_noise_and_variance(model, x_t, draws["t"], labels, self.variance)
        return self.bound(model.sde, x_0, x_t, draws["t"], eps_hat, fraction)

    def bound(self, sde: SDE, x_0: Tensor, x_t: Tensor, t: Tensor, eps_hat: Tensor, fraction: Tensor | None) -> Tensor:
        """(3) estimated at `t`, `(B,)`; `fraction` is w of (4), `(B, *)`, or None."""
        if float(sde.sigma(0.0)) > 0:
            raise UsageError(
                f"got {sde}, whose data at t = 0 are already noisy; expected sigma(0) = 0: use likelihood.elbo"
            )
        s = (t - sde.T / self.steps).clamp(min=0)
        first = t < 1.5 * sde.T / self.steps
        small, large = self._log_variances(sde, s, t, first)
        if self.variance == "learned":
            assert fraction is not None
            small_x, large_x = expand_as(small, x_t), expand_as(large, x_t)
            log_v = small_x + fraction.to(x_t.dtype) * (large_x - small_x)
        else:
            log_v = expand_as(small if self.variance == "posterior" else large, x_t)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        x_0_hat = (x_t - expand_as(sigma, x_t) * eps_hat) / expand_as(alpha, x_t)
        # mu_q - mu_p = (alpha_s sigma_{t|s}^2 / sigma_t^2) (x_0 - x_0-hat); at s = 0 that factor is 1
        factor = sde.alpha(s) * sde.transition_std(s, t).square() / sigma.square()
        factor = torch.where(first, 1.0, factor)
        distance = expand_as(factor, x_t) * (x_0 - x_0_hat)
        excess = log_v - expand_as(small, x_t)
        kl = 0.5 * (excess + (-excess).exp() + distance.square() * (-log_v).exp() - 1)
        nll = -self._log_decoder(x_0, distance, log_v.expand_as(x_t))
        term = torch.where(expand_as(first, x_t).bool(), nll, kl).flatten(1).mean(dim=1)
        return self.steps * term + _prior_kl(sde, x_0).to(term.dtype)

    def _log_variances(self, sde: SDE, s: Tensor, t: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """log beta~ and log sigma_{t|s}^2, `(B,)`."""
        dt = sde.T / self.steps
        s_safe, t_safe = torch.where(first, dt, s), torch.where(first, 2 * dt, t)
        small = 2 * (sde.transition_std(s_safe, t_safe) * sde.sigma(s_safe) / sde.sigma(t_safe)).log()
        large = 2 * torch.where(first, sde.sigma(t), sde.transition_std(s_safe, t)).log()
        return small, large

    def _log_decoder(self, x_0: Tensor, distance: Tensor, log_v: Tensor) -> Tensor:
        """log p(x_0 | x_1) per dimension, `(B, *)`, with `distance` = x_0 - mean."""
        z_scale = (-log_v / 2).exp()
        if self.bin_width is None:
            return -0.5 * (distance * z_scale).square() - 0.5 * (log_v + math.log(2 * math.pi))
        half = self.bin_width / 2
        above = torch.where(x_0 + half >= self.high - 0.1 * half, math.inf, (distance + half) * z_scale)
        below = torch.where(x_0 - half <= self.low + 0.1 * half, -math.inf, (distance - half) * z_scale)
        flip = below > 0  # the difference of two distribution functions keeps its digits in the lower tail
        lower, upper = torch.where(flip, -above, below), torch.where(flip, -below, above)
        mass = torch.special.ndtr(upper.double()) - torch.special.ndtr(lower.double())
        return mass.clamp(min=1e-12).log().to(x_0.dtype)


@dataclass(frozen=True, kw_only=True)
class Hybrid(VLB):
    """L_simple + vlb_weight L_vlb, `(B,)`: the noise is learned by L_simple, the variances by L_vlb, its mean held fixed.

    Nichol and Dhariwal 2021 (arXiv:2102.09672), section 3.1.

    Args:
        times, t_min, steps, bin_width, low, high: as in `VLB`.
        variance: as in `VLB`; "learned" is the default here.
        vlb_weight: factor of L_vlb; the paper's is 0.001.

    Raises:
        UserError: as in `VLB`.
    """

    variance: str = "learned"
    vlb_weight: float = 0.001

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        x_t = model.sde.perturb(x_0, draws["t"], draws["eps"])
        eps_hat, fraction = predicted_noise_and_variance(model, x_t, draws["t"], labels, self.variance)
        simple = (draws["eps"] - eps_hat).flatten(1).square().mean(dim=1)
        bound = self.bound(model.sde, x_0, x_t, draws["t"], eps_hat.detach(), fraction)
        return simple + self.vlb_weight * bound


def predicted_noise_and_variance(
    model: NoisePredictor, x: Tensor, t: Tensor, labels: Tensor | None, variance: str
) -> tuple[Tensor, Tensor | None]:
    """eps_hat `(B, *)`, and w of (4) where variances are learned.

    Raises:
        UsageError: a network without a second output.
    """
    if variance != "learned":
        return predicted_noise(model, x, t, labels), None
    asked = as_trainable(model)  # type: ignore[arg-type]
    if not asked.learned_variance:
        raise UsageError(
            "got variance='learned' for a network without a second output; expected one with learned_variance=True"
        )
    return asked.noise_and_variance(x, t, labels)


def _prior_kl(sde: SDE, x_0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || prior) in nats per dimension, `(B,)`, float64."""
    ratio = (float(sde.sigma(sde.T)) / sde.prior_std) ** 2
    alpha2 = (float(sde.alpha(sde.T)) / sde.prior_std) ** 2
    return 0.5 * (alpha2 * x_0.flatten(1).double().square().mean(dim=1) + ratio - 1 - math.log(ratio))
