r"""The negative ELBO of a VAE with any prior (`models.vae`) as an objective, in nats per dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from numerics import normal, require_count
from sde_lib import SDE
from training.objectives import Draws, Objective
from training.streams import StepStreams
from training.trainable import NoisePredictor


@dataclass(frozen=True, kw_only=True)
class LatentELBO(Objective):
    """-log p(x | z) - H(q) + CE(q, p), over D, `(B,)`, from one draw of z, and of a level and noise for a score.

    Kingma and Welling 2014 (arXiv:1312.6114); Vahdat, Kreis, Kautz 2021 (arXiv:2106.05931).

    Args:
        latent: d of the model.

    Raises:
        UserError: no latent.
    """

    needs: ClassVar[tuple[str, ...]] = ("parts",)
    latent: int = 16

    def __post_init__(self) -> None:
        require_count(self.latent, "latent")

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        B, device = int(shape[0]), streams.device
        u = torch.rand(1, generator=streams.generator("time"), device=device, dtype=dtype)
        u = (torch.arange(B, device=device, dtype=dtype) + u) / B
        ones = torch.ones(B, dtype=torch.float64, device=device)
        eps = normal((B, 3, self.latent), streams.generator("noise"), device=device, dtype=dtype)
        return {"t": sde.T * ones, "weight": ones, "eps": eps, "u": u}

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        vae: Any = model
        reconstruction, entropy, cross = vae.parts(x_0, draws["eps"], draws["u"])
        loss: Tensor = (reconstruction + entropy + cross) / x_0[0].numel()
        return loss
