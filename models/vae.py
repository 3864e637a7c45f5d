r"""A variational autoencoder whose prior may be a score model of its latents.

    q(z | x) = N(mu(x), diag v(x)),     p(x | z),     p(z)
    (1)  -log p(x) <= E_q[-log p(x | z)] - H(q(z | x)) + CE(q(z | x), p),     H = sum 1/2 log(2 pi e v),   CE = E_q[-log p(z)]

(Kingma and Welling 2014, arXiv:1312.6114, the divergence written as cross-entropy minus entropy.) The priors:

    `StandardPrior`    N(0, I): CE = sum 1/2 (mu^2 + v + log 2 pi)
    `MixturePrior`     K Gaussians with learned weights, means and scales: -log p at the draw of z
    `ScorePrior`       the reverse SDE of a score model on z, whose bound on -log p(z) is that of `likelihood.elbo`:

    (2)  -log p(z) <= E |eps - eps_hat|^2 / 2 at t_min + d log(kappa_min sqrt(2 pi)) + KL(q(z_T | z) || N(0, I))
                      + 1/2 integral over log_snr of E |eps - eps_hat(z_t, t)|^2

which is LSGM (Vahdat, Kreis, Kautz 2021, arXiv:2106.05931) with the likelihood weighting for the score and the
encoder alike. With any other weighting the score may learn well, but (1) is then no bound for the encoder, which would put its
latents where the weighting does not look.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from models.ddgm import Decoder
from models.initialization import linear
from models.score_model import ScoreModel
from numerics import UserError, require_count
from sde_lib import SDE, VPSDE, prior_mismatch

_LOG_2PI = math.log(2 * math.pi)


class Prior(nn.Module, ABC):
    """p(z) on latents `(B, d)`."""

    @abstractmethod
    def cross_entropy(self, z: Tensor, mean: Tensor, log_var: Tensor, u: Tensor, eps: Tensor) -> Tensor:
        """An estimate of CE(q, p) or of a bound on it, `(B,)` nats, from a draw `z` of q = N(mean, exp(log_var)).

        Args:
            z, mean, log_var: `(B, d)`.
            u: uniform numbers `(B,)` and `eps`: standard normals `(B, 2, d)`, for priors that draw.
        """


class StandardPrior(Prior):
    """N(0, I)."""

    def cross_entropy(self, z: Tensor, mean: Tensor, log_var: Tensor, u: Tensor, eps: Tensor) -> Tensor:
        return 0.5 * (mean.square() + log_var.exp() + _LOG_2PI).sum(dim=1)

    def sample(self, eps: Tensor) -> Tensor:
        """Latents from standard normals `(B, d)`."""
        return eps


class MixturePrior(Prior):
    """sum over k of w_k N(m_k, diag exp(2 l_k)), all learned.

    Args:
        dim: d. components: K.
    """

    def __init__(self, *, dim: int, components: int = 20) -> None:
        super().__init__()
        require_count(components, "components")
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.randn(components, dim))
        self.log_stds = nn.Parameter(torch.zeros(components, dim))

    def log_prob(self, z: Tensor) -> Tensor:
        """`(B,)` nats."""
        scaled = (z.unsqueeze(1) - self.means) * (-self.log_stds).exp()
        each = -0.5 * (scaled.square() + _LOG_2PI).sum(dim=2) - self.log_stds.sum(dim=1)
        return (each + self.logits.log_softmax(dim=0)).logsumexp(dim=1)

    def cross_entropy(self, z: Tensor, mean: Tensor, log_var: Tensor, u: Tensor, eps: Tensor) -> Tensor:
        return -self.log_prob(z)

    def sample(self, eps: Tensor, component: Tensor) -> Tensor:
        """Latents from standard normals `(B, d)` and uniform numbers `(B,)` that choose the components."""
        ends = self.logits.softmax(dim=0).cumsum(dim=0)
        k = torch.searchsorted(ends, component.to(ends.dtype)).clamp(max=len(ends) - 1)
        return self.means[k] + self.log_stds[k].exp() * eps


class ScorePrior(Prior):
    """The reverse SDE of a score model, by its bound (2).

    Args:
        model: the score of the latents, under an SDE whose prior is N(0, I) at T.
    """

    def __init__(self, model: ScoreModel) -> None:
        super().__init__()
        self.model = model

    def cross_entropy(self, z: Tensor, mean: Tensor, log_var: Tensor, u: Tensor, eps: Tensor) -> Tensor:
        sde = self.model.sde
        high, low = float(sde.log_snr(sde.t_min)), float(sde.log_snr(sde.T))
        t = sde.time_of_log_snr(low + (high - low) * u.double()).clamp(sde.t_min, sde.T)
        diffusion = (high - low) / 2 * self._squared_error(z, t, eps[:, 0])
        first = torch.full_like(t, sde.t_min)
        kappa = math.exp(-high / 2)
        end = self._squared_error(z, first, eps[:, 1]) / 2 + z.shape[1] * (math.log(kappa) + _LOG_2PI / 2)
        return diffusion + end + _mismatch(sde, z)

    def _squared_error(self, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return (eps - self.model.noise(self.model.sde.perturb(z, t, eps), t)).square().sum(dim=1)


def _mismatch(sde: SDE, z: Tensor) -> Tensor:
    """KL(q(z_T | z) || prior), as `sde_lib.prior_mismatch`, with its gradient."""
    return prior_mismatch(sde, z).to(z.dtype)


def latent_sde() -> VPSDE:
    """VP, down to a noise of a few hundredths: latents have none below the encoder's own."""
    return VPSDE(t_min=1e-3, t_end=1e-3)


class VAE(nn.Module):
    """Encoder, decoder and prior.

    Args:
        dim: D, numbers in one sample.
        latent: d, at most D.
        decoder: p(x | mean, log_std) of each entry.
        prior: p(z).
        width: of the hidden layers.
        deterministic: an autoencoder without noise in z, entropy or prior, which bounds nothing.
        data_range: smallest and largest value of the data.

    Raises:
        UserError: a latent that is larger than the data.
    """

    num_classes: int | None = None
    learned_variance = False

    def __init__(
        self,
        *,
        dim: int,
        latent: int,
        decoder: Decoder,
        prior: Prior,
        width: int = 256,
        deterministic: bool = False,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        require_count(latent, "latent")
        if latent > dim:
            raise UserError(
                f"got latent={latent} for data of {dim} numbers; expected 1 to {dim}: a code larger than the data hides nothing"
            )
        self.dim, self.latent, self.deterministic = dim, latent, deterministic
        self.decoder, self.prior, self.data_range = decoder, prior, data_range
        self.encoder_net = _perceptron(dim, width, 2 * latent)
        self.decoder_net = _perceptron(latent, width, 2 * dim)
        self.sde: SDE = prior.model.sde if isinstance(prior, ScorePrior) else latent_sde()
        self.data_std: float | None = None

    @property
    def network(self) -> nn.Module:
        """The decoder's."""
        return self.decoder_net

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x), `(B, d)`."""
        mean, log_var = self.encoder_net(x.flatten(1)).chunk(2, dim=1)
        return mean, log_var - 2

    def decode(self, z: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The decoder's mean, within its range, and log_std, `(B, *)`."""
        mean, log_std = self.decoder_net(z).chunk(2, dim=1)
        return self.decoder.within(mean).reshape(len(z), *shape), (log_std - 1).reshape(len(z), *shape)

    def parts(self, x: Tensor, eps: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-log p(x | z), minus the entropy, and the cross-entropy of (1), each `(B,)` nats, from a draw.

        Args:
            x: `(B, *)`, bin centres in model units.
            eps: standard normals `(B, 3, d)`, the first for z.
            u: uniform numbers `(B,)`.
        """
        mean, log_var = self.encode(x)
        z = mean if self.deterministic else mean + (log_var / 2).exp() * eps[:, 0]
        reconstruction = -self.decoder.log_prob(x, *self.decode(z, tuple(x.shape[1:]))).flatten(1).sum(dim=1)
        if self.deterministic:
            return reconstruction, torch.zeros_like(reconstruction), torch.zeros_like(reconstruction)
        entropy = 0.5 * (log_var + 1 + _LOG_2PI).sum(dim=1)
        return reconstruction, -entropy, self.prior.cross_entropy(z, mean, log_var, u, eps[:, 1:])


def _perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        linear(inputs, width),
        nn.SiLU(),
        linear(width, width),
        nn.SiLU(),
        linear(width, width),
        nn.SiLU(),
        linear(width, outputs, scale=0.1),
    )
