r"""A diffusion whose forward process is learned: between a VAE's encoder and a fixed diffusion.

    (1)  q(z_t | x) = N(m_t(x), diag s_t(x)^2),   m_t = alpha (x + sigma^2 A(x)),   s_t = sigma exp(alpha^2 sigma^2 B(x))

with alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma), and A, B networks with a mean and a scale for each pixel, which
vanish from (1) at both ends as sigma and alpha do. Given x, the path z = m_t + s_t eps has, in the clock gamma, the velocity
and, with noise g^2 = sigma^2, the reverse drift

    (2)  u(z, x) = dm/dgamma + (z - m) dlog s/dgamma,     f(z, x) = u(z, x) + g^2/2 (z - m) / s^2

The generative process runs back from N(0, I) with the drift f(z, x_hat(z, gamma)), a network's guess of x in its place,
and the same noise g. So its negative ELBO is

    (3)  E[-log p(x | z_0)] + KL(q(z_1 | x) || N(0, I))
         + integral from gamma_min to gamma_max of E |f(z, x) - f(z, x_hat)|^2 / (2 g^2) dgamma

by Girsanov's theorem (Bartosh, Vetrov, Naesseth 2024, "Neural Flow Diffusion Models", arXiv:2404.12940, section 3, for any such
forward process; Nielsen et al. 2023, "DiffEnc", arXiv:2310.19789, for the mean alone). For A = B = 0, f(z, x) - f(z, x_hat) =
-alpha (x - x_hat) and (3) is the bound of Kingma et al. 2021, arXiv:2107.00630.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.initialization import linear
from models.score_model import ScoreModel
from numerics import Generator, UserError, expand_as, normal


class PixelEncoder(nn.Module):
    """A(x) and B(x): a perceptron from x to a mean and a scale for each pixel, within +-`bound`; both begin at 0.

    Args:
        dim: numbers in one sample.
        width: of the hidden layers.
        bound: of both outputs.
    """

    def __init__(self, *, dim: int, width: int = 256, bound: float = 2.0) -> None:
        super().__init__()
        self.bound = bound
        self.net = nn.Sequential(
            linear(dim, width), nn.SiLU(), linear(width, width), nn.SiLU(), linear(width, 2 * dim, scale=0.0)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` `(B, *)` -> two of its shape."""
        both = self.bound * torch.tanh(self.net(x.flatten(1)) / self.bound)
        shift, scale = both.chunk(2, dim=1)
        return shift.reshape(x.shape), scale.reshape(x.shape)


class LearnedForward(nn.Module):
    """A denoiser, and the forward process (1) that it learns to turn around.

    Args:
        denoiser: a score model whose `denoised(x, t)` guesses x; its SDE gives gamma = -log_snr, alpha and sigma.
        encoder: x -> A(x), B(x).
        gamma_min, gamma_max: the ends of the integral in (3).

    Raises:
        UserError: ends that do not rise.
    """

    num_classes: int | None = None
    learned_variance = False

    def __init__(
        self,
        denoiser: ScoreModel,
        encoder: Callable[[Tensor], tuple[Tensor, Tensor]] | nn.Module,
        *,
        gamma_min: float,
        gamma_max: float,
    ) -> None:
        super().__init__()
        if not gamma_min < gamma_max:
            raise UserError(f"got gamma_min={gamma_min}, gamma_max={gamma_max}; expected gamma_min < gamma_max")
        self.denoiser, self.encoder = denoiser, encoder
        self.gamma_min, self.gamma_max = gamma_min, gamma_max
        self.sde = denoiser.sde
        self.data_std, self.data_range = denoiser.data_std, denoiser.data_range

    @property
    def network(self) -> nn.Module:
        """The denoiser's network."""
        return self.denoiser.net

    def noise(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The denoiser's."""
        return self.denoiser.noise(x, t, class_label)

    def noised(self, x: Tensor, gamma: Tensor, eps: Tensor) -> Tensor:
        """z of (1), `(B, *)`, at `gamma` `(B,)`."""
        mean, log_std = self.marginal(x, gamma)
        return mean + log_std.exp() * eps

    def marginal(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """m and log s of (1) at `gamma` `(B,)`, `(B, *)`."""
        alpha2, sigma2 = (expand_as((sign * gamma).sigmoid(), x) for sign in (-1, 1))
        A, B = self.encoder(x)
        log_sigma = expand_as(-torch.nn.functional.softplus(-gamma) / 2, x)
        return alpha2.sqrt() * (x + sigma2 * A), log_sigma + alpha2 * sigma2 * B

    def drift(self, z: Tensor, x: Tensor, gamma: Tensor) -> Tensor:
        """f(z, x) of (2) at `gamma` `(B,)`, `(B, *)`."""
        alpha2, sigma2 = (expand_as((sign * gamma).sigmoid(), x) for sign in (-1, 1))
        A, B = self.encoder(x)
        alpha, both = alpha2.sqrt(), alpha2 * sigma2
        mean = alpha * (x + sigma2 * A)
        # d alpha = -alpha sigma^2 / 2, d log sigma = alpha^2 / 2, d(alpha^2 sigma^2) = alpha^2 sigma^2 (alpha^2 - sigma^2)
        of_mean = -sigma2 * mean / 2 + alpha * both * A
        of_log_std = alpha2 / 2 + both * (alpha2 - sigma2) * B
        # g^2 / s^2 without the division of two small numbers
        ratio = torch.exp(-2 * both * B)
        return of_mean + (of_log_std + ratio / 2) * (z - mean)

    def diffusion(self, x: Tensor, gamma: Tensor, eps: Tensor) -> Tensor:
        """The integrand of (3) at `gamma` `(B,)`, `(B,)` nats."""
        z = self.noised(x, gamma, eps)
        x_hat = self.denoiser.denoised(z, self.sde.time_of_log_snr(-gamma))
        error = (self.drift(z, x, gamma) - self.drift(z, x_hat, gamma)) / expand_as(gamma.sigmoid().sqrt(), x)
        return error.flatten(1).square().sum(dim=1) / 2

    def prior(self, x: Tensor) -> Tensor:
        """KL(q(z_1 | x) || N(0, I)), `(B,)` nats."""
        mean, log_std = self.marginal(x, torch.full((len(x),), self.gamma_max, dtype=torch.float64, device=x.device))
        each = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std
        return each.flatten(1).sum(dim=1)

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        *,
        steps: int = 250,
        generator: Generator = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Euler-Maruyama on the generative process in equal steps of gamma, and the guess of x at the end, `(B, *)`."""
        z = normal(shape, generator, device=device, dtype=torch.float32)
        gammas = torch.linspace(self.gamma_max, self.gamma_min, steps + 1, dtype=torch.float64, device=z.device)
        for now, after in zip(gammas[:-1], gammas[1:], strict=True):
            gamma = now.expand(len(z))
            x_hat = self.denoiser.denoised(z, self.sde.time_of_log_snr(-gamma))
            h = float(now - after)
            noise = normal(shape, generator, device=device, dtype=torch.float32)
            z = z - h * self.drift(z, x_hat, gamma) + math.sqrt(h) * expand_as(gamma.sigmoid().sqrt(), z) * noise
        gamma = gammas[-1].expand(len(z))
        return self.denoiser.denoised(z, self.sde.time_of_log_snr(-gamma))
