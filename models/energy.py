"""Energy-parametrised scores: the score is a gradient, `score = -grad_x E(x, t)`, and E can be read.

A network's output need not be the gradient of anything; here it is, exactly (Salimans and Ho 2021). With the
whitened input `w = x / s`, `s^2 = alpha^2 data_std^2 + sigma^2`, and the potential `phi(w, t) = <w, N(w, t)>`
of a plain network N,

    E(x, t) = |x|^2 / (2 s^2) - (alpha data_std / sigma) phi(w, t)

so that `eps = sigma grad E = (sigma / s^2) x - (alpha data_std / s) F` with `F = grad_w phi`:
`Preconditioned`'s formula, whose target has variance one at every time. So it is trained by the same losses
as everything else; a step needs the second derivative and costs two to three times a plain one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.conditioning import Conditioning
from models.parametrization import Preconditioned
from models.score_model import ScoreModel
from numerics import batch_time, expand_as
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
        with torch.enable_grad():
            if not w.requires_grad:
                w = w.detach().requires_grad_()
            phi = self.potential(w, label, class_label)
            with sdpa_kernel(SDPBackend.MATH):
                (gradient,) = torch.autograd.grad(phi.sum(), w, create_graph=wanted)
        return gradient


class EnergyModel(ScoreModel):
    """A `ScoreModel` whose score is minus the gradient of `energy(x, t)` (Salimans and Ho 2021):

        E(x, t) = |x|^2 / (2 s^2) - (alpha data_std / sigma) <w, N(w, t)>,   w = x / s,   s^2 = alpha^2 data_std^2 + sigma^2

    Args: net N, sde, conditioning, data_range and data_std as in `ScoreModel`; there is no parametrisation to choose, it is
    `Preconditioned(data_std=data_std)`.
    """

    net: Conservative

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        *,
        data_std: float = 0.5,
        conditioning: Conditioning | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__(
            Conservative(net),
            sde,
            Preconditioned(data_std=data_std),
            conditioning=conditioning,
            data_range=data_range,
        )

    def energy(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """`E(x, t)`, `(B,)` in nats: minus the log-density of x_t, up to a number that depends on t alone."""
        t = batch_time(t, x)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        weight = next(self.net.parameters(), x)
        w = self.parametrization.scale_input(x, alpha, sigma)
        phi = self.net.potential(w.to(weight.dtype), self.conditioning(self.sde, t).to(weight.dtype), class_label)
        factor = alpha * self.parametrization.data_std / sigma  # type: ignore[attr-defined]
        return w.flatten(1).square().sum(1) / 2 - expand_as(factor, w.flatten(1)).flatten() * phi.to(w.dtype)
