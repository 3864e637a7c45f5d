r"""A hierarchical VAE whose encoder is a fixed diffusion: the diffusion-based deep generative model.

    q(z_i | z_{i-1}) = N(sqrt(1 - beta_i) z_{i-1}, beta_i I),   z_0 = x,   i = 1 ... T
    p(z_T) = N(0, I),   p(z_{i-1} | z_i) = N(mu_i(z_i), diag v_i(z_i)),   i = T ... 2,   p(x | z_1)

(Sohl-Dickstein et al. 2015, arXiv:1503.03585; with T = 5 and a network for each step, Tomczak 2022, "Deep Generative Modeling",
chapter 4.) Its negative ELBO has two forms with one expectation over q(z_1 ... z_T | x), in nats:

    (1)  -log p(x | z_1) + sum over i = 1 ... T-1 of [log q(z_i | z_{i-1}) - log p(z_i | z_{i+1})]
                         + log q(z_T | z_{T-1}) - log p(z_T)
    (2)  -log p(x | z_1) + sum over i = 2 ... T of KL(q(z_{i-1} | z_i, x) || p(z_{i-1} | z_i)) + KL(q(z_T | x) || p(z_T))

(1) takes every term at the one chain that was drawn; (2) has the forward posterior in closed form,

    (3)  q(z_{i-1} | z_i, x) = N(c_x x + c_z z_i, beta~_i I),   c_x = sqrt(abar_{i-1}) beta_i / (1 - abar_i),
         c_z = sqrt(1 - beta_i) (1 - abar_{i-1}) / (1 - abar_i),   beta~_i = beta_i (1 - abar_{i-1}) / (1 - abar_i)

(Ho et al. 2020, arXiv:2006.11239, equations (5) to (7)), abar_i the product of 1 - beta_s over s <= i, and varies less. A
third that looks like both is neither: KL(q(z_i | z_{i-1}) || p(z_i | z_{i+1})) in closed form with z_{i+1} of the same chain
forgets that z_{i+1} was drawn from z_i.

With many steps one network serves all (`SharedSteps`), and (2) is estimated from one step at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.initialization import linear
from numerics import Generator, UserError, expand_as, normal, require_choice, require_count, require_positive
from sde_lib import TableVPSDE

Estimator = Literal["sampled", "closed_form"]
ESTIMATORS = ("sampled", "closed_form")
_LOG_2PI = math.log(2 * math.pi)


def normal_log_prob(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(x; mean, exp(log_var)) of each entry; all of shapes that broadcast."""
    return -0.5 * ((x - mean).square() * (-log_var).exp() + log_var + _LOG_2PI)


def normal_kl(mean: Tensor, log_var: Tensor, other_mean: Tensor, other_log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(other_mean, exp(other_log_var))) of each entry."""
    excess = other_log_var - log_var
    return 0.5 * (excess + (-excess).exp() + (mean - other_mean).square() * (-other_log_var).exp() - 1)


class Decoder(ABC):
    """p(x | mean, log_std) of each entry: a density, or the mass of a grey value's bin.

    Attributes:
        mean_range: what the mean is kept within, by a tanh: from the smallest to the largest value that data have.
    """

    unit_variance: bool = False
    mean_range: tuple[float, float] = (-1.0, 1.0)

    def within(self, raw: Tensor) -> Tensor:
        """The mean in `mean_range` of a network's output."""
        low, high = self.mean_range
        return (low + high) / 2 + (high - low) / 2 * raw.tanh()

    @abstractmethod
    def log_prob(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """log p of the entries of `x`, nats."""


class UnitGaussian(Decoder):
    """N(mean, 1), a density, whatever the log_std: even where the mean is x it costs log(2 pi) / 2 = 0.919 nats an entry.

    Args:
        low, high: the smallest and the largest value that data have, in model units.
    """

    unit_variance = True

    def __init__(self, *, low: float = -1.0, high: float = 1.0) -> None:
        self.mean_range = (low, high)

    def log_prob(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        return normal_log_prob(x, mean, torch.zeros_like(mean))


class GreyGaussian(Decoder):
    """The mass of N(mean, std^2) in the bin of a grey value whose centre is x, the outermost bins open.

    Ho et al. 2020 (arXiv:2006.11239), equation (13).

    Args:
        bin_width, low, high: of the bins, and where the first begins and the last ends, in model units. The mean goes from the
            first bin's centre to the last one's.
    """

    def __init__(self, *, bin_width: float, low: float, high: float) -> None:
        require_positive(bin_width, "bin_width")
        self.bin_width, self.low, self.high = bin_width, low, high
        self.mean_range = (low + bin_width / 2, high - bin_width / 2)

    def log_prob(self, x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        half, scale = self.bin_width / 2, (-log_std).exp()
        above = torch.where(x + half >= self.high - 0.1 * half, math.inf, (x - mean + half) * scale)
        below = torch.where(x - half <= self.low + 0.1 * half, -math.inf, (x - mean - half) * scale)
        flip = below > 0  # the difference of two distribution functions keeps its digits in the lower tail
        lower, upper = torch.where(flip, -above, below), torch.where(flip, -below, above)
        mass = torch.special.ndtr(upper.double()) - torch.special.ndtr(lower.double())
        return mass.clamp(min=1e-12).log().to(x.dtype)


class Steps(nn.Module, ABC):
    """The networks of p(z_{i-1} | z_i), i = 2 ... T, and of the decoder's mean and log-scale."""

    @abstractmethod
    def reverse(self, i: int | Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z_{i-1} given `z` = z_i `(B, *)`, both `(B, *)`; i from 2 to T."""

    @abstractmethod
    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's mean and its log_std, given z_1 `(B, *)`."""


def _body(dim: int, width: int, out: int) -> nn.Sequential:
    """Three hidden layers; nothing comes out at first."""
    return nn.Sequential(
        linear(dim, width),
        nn.SiLU(),
        linear(width, width),
        nn.SiLU(),
        linear(width, width),
        nn.SiLU(),
        linear(width, out, scale=0.0),
    )


class OwnSteps(Steps):
    """A network for each step, a perceptron from z_i to the mean and the log-variance; the decoder's mean is a tanh of its own.

    Args:
        dim: numbers in one sample.
        steps: T, at least 2.
        width: of the hidden layers.
        decoder: whose mean is kept in its range; in (-1, 1) unless given.
    """

    def __init__(self, *, dim: int, steps: int, width: int = 256, decoder: Decoder | None = None) -> None:
        super().__init__()
        require_count(width, "width")
        self.within = (UnitGaussian() if decoder is None else decoder).within
        self.bodies = nn.ModuleList(_body(dim, width, 2 * dim) for _ in range(steps - 1))
        self.decoder = _body(dim, width, 2 * dim)

    def reverse(self, i: int | Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(i, Tensor):
            raise UserError("got a step for each sample; expected one for all: networks of their own cannot be mixed")
        return _halves(self.bodies[i - 2], z)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = _halves(self.decoder, z)
        return self.within(mean), log_std - 1


def _halves(net: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    mean, other = net(z.flatten(1)).chunk(2, dim=1)
    return mean.reshape(z.shape), other.reshape(z.shape)


class SharedSteps(Steps):
    """One network for all steps, told log(1/abar_i - 1): it says x and where the variance stands between beta~_i and beta_i.

    x is sqrt(abar) z - sqrt(1 - abar) v of its output v (Salimans and Ho 2022, arXiv:2202.00512, section 4), so that where
    there is little noise x is nearly z. The mean is (3)'s with that x, so that even a thousand small steps begin right (Nichol
    and Dhariwal 2021, arXiv:2102.09672, equation (15), for the variance).

    Args:
        dim: numbers in one sample.
        betas: of the chain.
        width: of the hidden layers.
    """

    def __init__(self, *, dim: int, betas: Sequence[float], width: int = 256) -> None:
        super().__init__()
        require_count(width, "width")
        self.embedding = nn.Sequential(linear(17, width), nn.SiLU(), linear(width, width))
        self.first = linear(dim, width)
        self.layers = nn.ModuleList(linear(width, width) for _ in range(2))
        self.last = linear(width, 2 * dim, scale=0.0)
        for name, value in zip(("c_x", "c_z", "log_small", "log_large", "label"), _posterior(betas), strict=True):
            self.register_buffer(name, value)

    def _say(self, index: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        label = self.get_buffer("label")[index].to(z.dtype).unsqueeze(1)
        waves = label * (2.0 ** torch.arange(-3, 5, device=z.device, dtype=z.dtype)) * 0.25
        e = self.embedding(torch.cat([label / 8, waves.sin(), waves.cos()], dim=1))
        h = self.first(z.flatten(1))
        for layer in self.layers:
            h = h + layer(F.silu(h + e))
        v, place = self.last(F.silu(h)).chunk(2, dim=1)
        alpha, sigma = ((sign * label).sigmoid().sqrt() for sign in (-1, 1))
        return (alpha * z.flatten(1) - sigma * v).reshape(z.shape), place.reshape(z.shape)

    def reverse(self, i: int | Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        index = (i if isinstance(i, Tensor) else torch.full((len(z),), i, device=z.device)) - 1
        x, place = self._say(index, z)
        c_x, c_z, small, large = (
            expand_as(self.get_buffer(name)[index], z) for name in ("c_x", "c_z", "log_small", "log_large")
        )
        return c_x * x + c_z * z, small + place.sigmoid() * (large - small)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, place = self._say(torch.zeros(len(z), dtype=torch.long, device=z.device), z)
        # about the noise of z_1, which is all that is lost
        kappa = self.get_buffer("label")[0].to(z.dtype) / 2
        return x, kappa + place - 1


def _posterior(betas: Sequence[float]) -> tuple[Tensor, ...]:
    """c_x, c_z, log beta~, log beta of (3) and 2 log(sigma/alpha), at i = 1 ... T `(T,)`; at i = 1 beta~ is that of i = 2."""
    beta = torch.tensor(betas, dtype=torch.float64)
    abar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    lost = 1 - abar
    c_x, c_z = before.sqrt() * beta / lost, (1 - beta).sqrt() * (1 - before) / lost
    small = beta * (1 - before) / lost
    small[0] = small[1]
    return c_x, c_z, small.log(), beta.log(), (lost / abar).log()


class DDGM(nn.Module):
    """The model: the chain, the networks of its reverse, and the decoder.

    Args:
        reverse: the networks.
        betas: beta_1 ... beta_T, T >= 2, all in (0, 1).
        decoder: p(x | z_1).
        data_range: smallest and largest value of the data that it is trained on.

    Attributes:
        sde: the chain as an SDE, whose kernel at t = i/T is q(z_i | x).

    Raises:
        UserError: fewer than two betas, or betas outside (0, 1).
    """

    num_classes: int | None = None
    learned_variance = False

    def __init__(
        self,
        reverse: Steps,
        betas: Sequence[float],
        decoder: Decoder,
        *,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        if len(betas) < 2 or not all(0 < b < 1 for b in betas):
            raise UserError(
                f"got {len(betas)} betas; expected two or more, all in (0, 1): with T = 1 there is no step to learn but the "
                "decoder, which is a VAE: use the system latent"
            )
        self.net, self.decoder, self.data_range = reverse, decoder, data_range
        steps = len(betas)
        self.sde = TableVPSDE(betas=tuple(betas), t_min=1 / steps / 2, t_end=1 / steps / 2)
        self.data_std: float | None = None
        beta = torch.tensor(tuple(betas), dtype=torch.float64)
        self.register_buffer("beta", beta)
        self.register_buffer("abar", (1 - beta).cumprod(0))
        for name, value in zip(("c_x", "c_z", "log_small"), _posterior(betas), strict=False):
            self.register_buffer(name, value)

    @property
    def network(self) -> nn.Module:
        """The networks of the reverse."""
        return self.net

    @property
    def steps(self) -> int:
        """T."""
        return len(self.get_buffer("beta"))

    # -- the forward chain ----------------------------------------------------------------------------------------------

    def chain(self, x: Tensor, eps: Tensor) -> list[Tensor]:
        """[z_0, z_1, ..., z_T] from `x` = z_0 `(B, *)` and `eps` `(B, T, *)`: z_i is drawn from z_{i-1}."""
        zs = [x]
        for i, beta in enumerate(self.get_buffer("beta").to(x.dtype)):
            zs.append((1 - beta).sqrt() * zs[-1] + beta.sqrt() * eps[:, i])
        return zs

    # -- the bound --------------------------------------------------------------------------------------------------------

    def terms(self, x: Tensor, eps: Tensor, *, estimator: Estimator = "closed_form") -> Tensor:
        """The negative ELBO's terms from one chain, `(B, T + 1)` nats: of the decoder, of z_1 ... z_{T-1}, of z_T.

        Args:
            x: `(B, *)` in model units, bin centres where the decoder is of grey values.
            eps: standard normals `(B, T, *)`.
            estimator: "sampled" is (1), "closed_form" is (2).
        """
        require_choice(estimator, "estimator", ESTIMATORS)
        zs, T = self.chain(x, eps), self.steps
        total = [-self.decoder.log_prob(x, *self.net.decode(zs[1]))]
        beta, abar = self.get_buffer("beta").to(x.dtype), self.get_buffer("abar").to(x.dtype)
        for i in range(2, T + 1):
            mean, log_var = self.net.reverse(i, zs[i])
            if estimator == "sampled":
                # q of z_{i-1} given the state before it
                log_q = normal_log_prob(zs[i - 1], (1 - beta[i - 2]).sqrt() * zs[i - 2], beta[i - 2].log())
                total.append(log_q - normal_log_prob(zs[i - 1], mean, log_var))
            else:
                total.append(normal_kl(*self.posterior(i, zs[i], x), mean, log_var))
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        if estimator == "sampled":
            log_q = normal_log_prob(zs[T], (1 - beta[-1]).sqrt() * zs[T - 1], beta[-1].log())
            total.append(log_q - normal_log_prob(zs[T], zero, zero))
        else:
            total.append(normal_kl(abar[-1].sqrt() * x, (1 - abar[-1]).log(), zero, zero))
        return torch.stack([term.flatten(1).sum(dim=1) for term in total], dim=1)

    def posterior(self, i: int | Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(B, *)` and log-variance of q(z_{i-1} | z_i, x), (3); i from 2 to T, one for all or `(B,)`."""
        index = torch.as_tensor(i, device=z.device).expand(len(z)) - 1
        c_x, c_z, log_var = (expand_as(self.get_buffer(name)[index], z) for name in ("c_x", "c_z", "log_small"))
        return c_x * x + c_z * z, log_var

    def one_step(self, x: Tensor, i: Tensor, eps: Tensor) -> Tensor:
        """(2) from one step, `(B,)` nats: T times the term of z_{i-1} given z_i (of x given z_1 for i = 1), and the prior's.

        Args:
            i: 1 to T, `(B,)`; over i uniform the mean is (2).
            eps: standard normals `(B, *)`.
        """
        abar = self.get_buffer("abar")
        a = expand_as(abar[i - 1], x)
        z = a.sqrt() * x + (1 - a).sqrt() * eps
        first = i == 1
        mean, log_var = self.net.reverse(i.clamp(min=2), z)
        kl = normal_kl(*self.posterior(i.clamp(min=2), z, x), mean, log_var)
        reconstruction = -self.decoder.log_prob(x, *self.net.decode(z))
        term = torch.where(expand_as(first, x).bool(), reconstruction, kl).flatten(1).sum(dim=1)
        last = abar[-1].to(x.dtype)
        zero = torch.zeros((), dtype=x.dtype, device=x.device)
        prior = normal_kl(last.sqrt() * x, (1 - last).log(), zero, zero).flatten(1).sum(dim=1)
        return self.steps * term + prior

    # -- sampling ---------------------------------------------------------------------------------------------------------

    def sample(
        self, shape: Sequence[int], *, generator: Generator = None, device: torch.device | str | None = None
    ) -> Tensor:
        """The decoder's means `(B, *)` of chains drawn from p(z_T) down: the same networks as in the bound, T evaluations."""
        z = normal(shape, generator, device=device, dtype=torch.float32)
        for i in range(self.steps, 1, -1):
            mean, log_var = self.net.reverse(i, z)
            z = mean + (log_var / 2).exp() * normal(shape, generator, device=device, dtype=torch.float32)
        return self.net.decode(z)[0]
