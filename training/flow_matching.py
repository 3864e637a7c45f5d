r"""Flow matching on straight paths, and reflow.

    (1)  L = E_t |(eps - x_0) - v(x_t, t)|^2 / D,     x_t = (1 - t) x_0 + t eps,   t uniform

(Liu, Gong, Liu 2023, arXiv:2209.03003; Lipman et al. 2023, arXiv:2210.02747, equation (23)). On `StraightSDE`
with the parametrisation `Difference` this is denoising score matching with the weighting `FlowMatching`, 1 / alpha^2 there, and
needs no objective of its own: with independent x_0 and eps the velocity v and the score say the same.

*Reflow* minimises (1) over pairs (x_0, eps) that a flow has joined, x_0 its sample from the noise eps. The new flow has the
same marginals where the first is exact, and paths that are no less straight (there, theorems 3.3 and 3.7). Its v is no
score any more: eps given x_t is not what an independent noise would be. So ODE samplers and the flow's likelihood hold for it,
and samplers that add noise, and variational bounds, do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_lib import SDE
from training.errors import UsageError
from training.objectives import Draws, TimedObjective, dsm_loss
from training.streams import StepStreams
from training.trainable import NoisePredictor
from training.weighting import FlowMatching


def joined(x_0: Tensor, eps: Tensor) -> Tensor:
    """Pairs `(B, 2 C, *)` for `Reflow`, of samples and of the noise that they came from, both `(B, C, *)`.

    Raises:
        UserError: shapes that differ.
    """
    if x_0.shape != eps.shape:
        raise UsageError(f"got samples {tuple(x_0.shape)} and noise {tuple(eps.shape)}; expected one shape")
    return torch.cat([x_0, eps], dim=1)


@dataclass(frozen=True, kw_only=True)
class Reflow(TimedObjective):
    """|(alpha' x_0 + sigma' eps) - v(x_t, t)|^2 / D, `(B,)`, for pairs that are given: data `(B, 2 C, *)` from `joined`.

    Liu, Gong, Liu 2023 (arXiv:2209.03003), their reflow.

    Args:
        times, t_min: as in `TimedObjective`.

    Raises:
        UserError: as `TimedObjective`. In a step: data that are no pairs.
    """

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        t, weight = self.times(sde, int(shape[0]), streams.generator("time"), self._t_min(sde))
        return {"t": t, "weight": weight}

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        if x_0.shape[1] % 2:
            raise UsageError(
                f"got data of shape {tuple(x_0.shape)} for Reflow; expected pairs (B, 2 C, *): use training.joined(x_0, eps)"
            )
        data, eps = x_0.chunk(2, dim=1)
        return dsm_loss(model, data, draws["t"], eps, weighting=FlowMatching(), labels=labels)
