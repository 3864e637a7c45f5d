"""Energy-parametrised scores: the score is a gradient, `score = -grad_x E(x, t)`, and E can be read.

A network's output need not be the gradient of anything; here it is, exactly (Salimans and Ho 2021). With the
whitened input `w = x / s`, `s^2 = alpha^2 data_std^2 + sigma^2`, and the potential `phi(w, t) = <w, N(w, t)>`
of a plain network N,

    E(x, t) = |x|^2 / (2 s^2) - (alpha data_std / sigma) phi(w, t)

so that `eps = sigma grad E = (sigma / s^2) x - (alpha data_std / s) F` with `F = grad_w phi`:
`Preconditioned`'s formula, whose target has variance one at every time. So it is trained by the same losses
as everything else; a step needs the second derivative and costs two to three times a plain one.

A score leaves a number free at every noise level, and of separated modes it hardly sees the weights. What the density does
from one level to the next tells both. In the clock `l = log(sigma / alpha)` of the point `y = x / alpha`,

    U_y(y, l) = E(x, t) + (D / 2) log(2 pi s^2) + c(l) - D log alpha,       dU_y/dl = E[ D - |eps|^2 | x_t ]

where U_y is minus the log-density of y. The kernel N(y; x_0, kappa^2 I) has -log N = |y - x_0|^2 / (2 kappa^2) + D log kappa,
whose derivative in l = log kappa is D - |eps|^2; and the derivative of the log of a mean is the posterior mean of the kernels'
own (Guth, Kadkhodaie, Simoncelli 2025, arXiv:2506.05310, in another clock). A `normalised` energy has c, a small network, and
`noise_and_slope` gives eps and dU_y/dl from one pass, which `training.DualScoreMatching` fits. At T c is 0 and the law all but
the Gaussian N(0, s^2 I), so that U is normalised there, and from there down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.conditioning import Conditioning
from models.embeddings import SmoothEmbedding
from models.initialization import linear
from models.parametrization import Preconditioned
from models.score_model import ScoreModel
from numerics import UserError, batch_time, expand_as, labels_for, ordinary
from sde_lib import SDE


class Conservative(nn.Module):
    """`net`, made a gradient: `forward(w, label)` is `grad_w phi(w, label)`, `phi = <w, net(w, label)>`."""

    differentiates = True
    """The call takes derivatives of `net`, so it cannot be compiled; see `training.compilation`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.num_classes = getattr(net, "num_classes", None)

    def potential(self, w: Tensor, label: Tensor, class_label: Tensor | None = None) -> Tensor:
        """`phi`, `(B,)`."""
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            output = self.net(w, label) if class_label is None else self.net(w, label, class_label)
        return (w * output).flatten(1).sum(1)

    def forward(self, w: Tensor, label: Tensor, class_label: Tensor | None = None) -> Tensor:
        wanted = torch.is_grad_enabled()
        # not `ordinary_mode`, which would leave the autocast of a training
        with torch.inference_mode(False), torch.enable_grad():
            w, label = ordinary(w), ordinary(label)
            class_label = None if class_label is None else ordinary(class_label)
            if not w.requires_grad:
                w = w.detach().requires_grad_()
            phi = self.potential(w, label, class_label)
            with sdpa_kernel(SDPBackend.MATH):
                (gradient,) = torch.autograd.grad(phi.sum(), w, create_graph=wanted)
        return gradient


@dataclass(frozen=True, kw_only=True)
class SmoothPotential(Preconditioned):
    """The output is F = grad_w phi of the energy |w|^2 / 2 - h phi, with h = (alpha data_std / s)^2 the data's part of s^2:

        eps = (sigma / s) (w - h F),    x_0 = (alpha data_std^2 / s^2) (x + (sigma^2 / s) F)

    `Preconditioned` has alpha data_std / sigma in the place of h, and an output of variance one: right where data are few
    points or a surface, about which the score grows as 1 / sigma. The log-density of data with a smooth density does not grow,
    and here phi is a part of it at every noise level, and not a part times sigma.

    Args:
        data_std: standard deviation of the data in model units, one number.

    Raises:
        UserError: a data_std that is not positive.
    """

    def _share(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * self.data_std / self.spread(alpha, sigma)).square()

    def noise(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        s = self.spread(alpha, sigma)
        return expand_as(sigma / s, x) * (x / expand_as(s, x) - expand_as(self._share(alpha, sigma), x) * output)

    def data(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        s = self.spread(alpha, sigma)
        return expand_as(alpha * self.data_std**2 / s.square(), x) * (x + expand_as(sigma.square() / s, x) * output)

    def target(self, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        s = self.spread(alpha, sigma)
        x = expand_as(alpha, x_0) * x_0 + expand_as(sigma, eps) * eps
        return (x / expand_as(s, x) - expand_as(s / sigma, x) * eps) / expand_as(self._share(alpha, sigma), x)


class NoiseAndSlope(NamedTuple):
    """What an energy says of a noised point.

    Attributes:
        noise: eps_hat, `(B, *)`, the score times -sigma.
        slope: `(B,)` nats, the energy's derivative in log(sigma / alpha) where x / alpha stays.
    """

    noise: Tensor
    slope: Tensor


class EnergyModel(ScoreModel):
    """A `ScoreModel` whose score is minus the gradient of `energy(x, t)` (Salimans and Ho 2021):

        E(x, t) = |x|^2 / (2 s^2) - r <w, N(w, t)>,    w = x / s,    s^2 = alpha^2 data_std^2 + sigma^2,
        r = alpha data_std / sigma

    Args:
        net: N, as in `ScoreModel`; so are sde, conditioning, data_range and data_std. There is no parametrisation to choose, it
            is `Preconditioned(data_std=data_std)`, or `SmoothPotential`.
        smooth: for data with a smooth density: r = (alpha data_std / s)^2, bounded at small noise as their energy is.
        normalised: whether the energy has (D / 2) log(2 pi s^2) and a number c(t) of its own as well, with which it is minus a
            log-density once `training.DualScoreMatching` has fitted it.
    """

    net: Conservative
    level: Level | None

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        *,
        data_std: float = 0.5,
        conditioning: Conditioning | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
        smooth: bool = False,
        normalised: bool = False,
    ) -> None:
        super().__init__(
            Conservative(net),
            sde,
            SmoothPotential(data_std=data_std) if smooth else Preconditioned(data_std=data_std),
            conditioning=conditioning,
            data_range=data_range,
        )
        self.smooth = smooth
        self.level = Level() if normalised else None

    def energy(self, x: Tensor, t: Tensor, class_label: Tensor | Sequence[int] | int | None = None) -> Tensor:
        """`E(x, t)`, `(B,)` in nats, in float32 or finer: minus the log-density of x_t, up to a number that depends on t alone;
        without that if `normalised`.

        Raises:
            UserError: labels that are not one class for all samples or one for each, or for a network without classes.
        """
        t = batch_time(t, x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if class_label is not None:
            class_label = labels_for(x, class_label, self.num_classes)
        at = self._at(t)
        weight = next(self.net.parameters(), x)
        w = self.parametrization.scale_input(x, at.alpha, at.sigma)
        label = self.conditioning(self.sde, t)
        phi = self.net.potential(w.to(weight.dtype), label.to(weight.dtype), class_label).to(w.dtype)
        value = w.flatten(1).square().sum(1) / 2 - expand_as(at.r, phi) * phi
        if self.level is None:
            return value
        s = at.alpha.square() * self._std**2 + at.sigma.square()
        number = math.prod(x.shape[1:]) / 2 * (2 * math.pi * s).log() + at.share * self.level(label)
        return value + number.to(w.dtype)

    def noise_and_slope(
        self, x: Tensor, t: Tensor, class_label: Tensor | Sequence[int] | int | None = None
    ) -> NoiseAndSlope:
        """eps_hat, and the derivative of U_y in l = log(sigma / alpha) where y = x / alpha stays, both from one pass:

            q (D - |w|^2) - (dr/dl) phi + r q w . F - r dphi/dl + dc/dl,       q = (sigma / s)^2

        F the gradient of phi in w, which moves as dw/dl = -q w; dphi/dl by way of the label.

        Raises:
            UserError: an energy that is not `normalised`, whose slope would lack dc/dl; or labels as of `energy`.
        """
        if self.level is None:
            raise UserError(
                "got an energy without a number for each level, which has no slope to fit; expected EnergyModel(…, "
                "normalised=True)"
            )
        wanted = torch.is_grad_enabled()
        t = batch_time(t, x)
        at = self._at(t)
        weight = next(self.net.parameters(), x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if class_label is not None:
            class_label = labels_for(x, class_label, self.num_classes)
        with torch.inference_mode(False), torch.enable_grad():
            clock = ordinary(t.detach()).requires_grad_()
            label = self.conditioning(self.sde, clock)
            (turn,) = torch.autograd.grad(label.sum(), clock)
            turn = turn * 2 * (at.sigma / self.sde.g(t)).square()  # dl/dt = g^2 / (2 sigma^2)
            label = label.detach().requires_grad_()
            w = self.parametrization.scale_input(x, at.alpha, at.sigma).to(weight.dtype)
            w = ordinary(w.detach()).requires_grad_()
            phi = self.net.potential(w, label.to(weight.dtype), class_label)
            F, of_label = torch.autograd.grad(phi.sum(), (w, label), create_graph=wanted)
            c = self.level(label)
            (c_of_label,) = torch.autograd.grad(c.sum(), label, create_graph=wanted)
        flat = w.detach().flatten(1).to(at.q.dtype)
        slope = at.q * (math.prod(x.shape[1:]) - flat.square().sum(1)) - at.r_turn * phi
        slope = slope + at.r * (at.q * (flat * F.flatten(1)).sum(1) - of_label * turn)
        slope = slope - 2 * at.q * (1 - at.q) * c + at.share * c_of_label * turn
        return NoiseAndSlope(self.parametrization.noise(F.to(x.dtype), x, at.alpha, at.sigma), slope.to(x.dtype))

    @property
    def _std(self) -> float:
        return float(self.parametrization.data_std)  # type: ignore[attr-defined]

    def _at(self, t: Tensor) -> _Coefficients:
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        q = self._noise_share(t)
        r = 1 - q if self.smooth else alpha * self._std / sigma
        last = 1 - self._noise_share(torch.full_like(t, self.sde.T))
        return _Coefficients(
            alpha=alpha, sigma=sigma, q=q, r=r, r_turn=-2 * q * r if self.smooth else -r, share=1 - q - last
        )

    def _noise_share(self, t: Tensor) -> Tensor:
        return 1 / (1 + self._std**2 * torch.exp(self.sde.log_snr(t)))


class _Coefficients(NamedTuple):
    """Of an energy at times `(B,)`: q = (sigma / s)^2; r, of phi, and dr/dl; and c's factor, 1 - q less that at T."""

    alpha: Tensor
    sigma: Tensor
    q: Tensor
    r: Tensor
    r_turn: Tensor
    share: Tensor


class Level(nn.Module):
    """A smooth number for each noise level: label `(B,)` of order one -> `(B,)`, 0 before it is trained."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = linear(8, width)
        self.net = nn.Sequential(nn.SiLU(), linear(width, width), nn.SiLU(), linear(width, 1, scale=0.0))
        self.embedding = SmoothEmbedding(8)

    def forward(self, label: Tensor) -> Tensor:
        features = self.embedding(label.to(self.first.weight.dtype))
        value: Tensor = self.net(self.first(features.to(self.first.weight.dtype)))
        return value.squeeze(-1).to(label.dtype)
