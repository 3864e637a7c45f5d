"""UniPC: a multistep predictor and a corrector that costs no further evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from numerics import require_choice
from samplers.base import GridSampler
from samplers.exponential import Multistep, exponential_weights, orders
from samplers.run import Nodes, numbers
from sde_lib import SDE
from sde_lib.time_grids import Logistic, TimeGrid


@dataclass(frozen=True, kw_only=True, repr=False)
class UniPC(GridSampler):
    r"""UniPC: a multistep predictor and a corrector that costs no further evaluation.

        predict   x~_s = (sigma_s/sigma_t) x_t + alpha_s sum_j w_j D_j            the last p values of D
        evaluate  D_s = D(x~_s, s)
        correct   x_s  = (sigma_s/sigma_t) x_t + alpha_s (w'_s D_s + sum_j w'_j D_j)       the new value too

    (Zhao et al. 2023, arXiv:2302.04867, multistep, data prediction.) D_s, taken at the prediction, also serves the
    next step, so a step costs one evaluation. The weights, of `samplers.exponential`, integrate the interpolating
    polynomial exactly; the paper's linear systems have the same solution, in which its function B(h) drops out (it matters
    only where the published code puts 1/2 for the solution of a system of one unknown). With the corrector the order is
    p + 1. The last step, to t_end, is not corrected.

    Args:
        order: p, the number of values the predictor uses: 1, 2 or 3.
        lower_order_final: in runs of fewer than 15 steps, end with orders 2 and 1.
        grid: the times; `Logistic()` unless given.
        steps, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for another value of an option.
    """

    steps: int = 20
    order: int = 2
    lower_order_final: bool = True

    default_grid: ClassVar[TimeGrid] = Logistic()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.order, "order", (1, 2, 3))

    def method(self, sde: SDE, times: Tensor) -> Multistep:
        """The step on the grid `times` `(N+1,)`."""
        alpha, sigma, l = sde.alpha(times), sde.sigma(times), sde.log_snr(times) / 2
        of_x = numbers(alpha[1:] / alpha[:-1] * torch.exp(-l.diff()))
        nodes, lambdas = Nodes(times, alpha, sigma), numbers(l)
        predicting: list[list[float]] = []
        correcting: list[list[float] | None] = []
        for i, k in enumerate(orders(self.order, len(times) - 1, self.lower_order_final)):
            points = [lambdas[i - j] for j in range(k)]
            for table, known in ((predicting, points), (correcting, [lambdas[i + 1], *points])):
                weights = exponential_weights(known, lambdas[i], lambdas[i + 1], 1.0)
                table.append([nodes.alpha[i + 1] * w for w in weights])

        return Multistep(value=nodes.denoised, of_x=of_x, predicting=predicting, correcting=correcting)
