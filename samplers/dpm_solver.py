"""DPM-Solver++, multistep, of orders 1 to 3, as an ODE and as an SDE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from numerics import require_choice, require_range
from samplers.base import GridSampler
from samplers.exponential import Multistep, exponential_weights, orders
from samplers.run import Nodes, numbers
from sde_lib import SDE
from sde_lib.time_grids import Logistic, TimeGrid


@dataclass(frozen=True, kw_only=True, repr=False)
class DPMSolver(GridSampler):
    r"""DPM-Solver++, multistep, of orders 1 to 3, as an ODE and as an SDE.

    With lambda = log(alpha / sigma), h = lambda_s - lambda_t, eta the stochasticity, c = 1 + eta^2, D the denoised mean:

        x_s = (alpha_s / alpha_t) exp(-c h) x_t + alpha_s sum_j w_j D(x_{t_j}, t_j) + sigma_s sqrt(1 - exp(-2 eta^2 h)) z

    with the weights of (1) in `samplers.exponential` for the polynomial through the last `order` values of D (Lu et al.
    2022, arXiv:2211.01095, for the ODE, eta = 0, and the SDE, eta = 1; Xue et al. 2023, arXiv:2309.05019, for the family
    between them). The paper's 2M and 3M use Taylor forms with truncated coefficients; here the polynomial is integrated
    exactly. That is of order 3 for three values, where the published multistep code of the third order, whose second
    difference lacks a factor 2, is of order 2. For order 3 the first step, which has one value only, is made again with the
    value at its end once that is known; this costs no evaluation, and without it the start would limit the order to 2.

    Order 1 is DDIM with eta = 0, and ancestral sampling with the posterior variance when stochastic. Assumes that D varies
    smoothly in lambda; any linear SDE.

    Args:
        order: 1, 2 or 3; the first steps use as many values as there are.
        stochastic: False for the ODE, True for the SDE, or eta >= 0 between and beyond.
        lower_order_final: in runs of fewer than 15 steps, end with orders 2 and 1.
        grid: the times; `Logistic()` unless given.
        steps, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for another value of an option.
    """

    steps: int = 20
    order: int = 2
    stochastic: bool | float = False
    lower_order_final: bool = True

    default_grid: ClassVar[TimeGrid] = Logistic()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.order, "order", (1, 2, 3))
        if not isinstance(self.stochastic, bool):
            require_range(self.stochastic, "stochastic", 0)

    def method(self, sde: SDE, times: Tensor) -> Multistep:
        """The step on the grid `times` `(N+1,)`."""
        eta = float(self.stochastic)
        c = 1 + eta**2
        alpha, sigma, l = sde.alpha(times), sde.sigma(times), sde.log_snr(times) / 2
        h = l.diff()
        of_x = numbers(alpha[1:] / alpha[:-1] * torch.exp(-c * h))
        of_noise = numbers(sigma[1:] * (-torch.expm1(-2 * eta**2 * h)).sqrt())
        nodes, lambdas = Nodes(times, alpha, sigma), numbers(l)
        predicting: list[list[float]] = []
        correcting: list[list[float] | None] = []
        for i, k in enumerate(orders(self.order, len(times) - 1, self.lower_order_final)):
            points = [lambdas[i - j] for j in range(k)]
            w = exponential_weights(points, lambdas[i], lambdas[i + 1], c)
            predicting.append([nodes.alpha[i + 1] * v for v in w])
            again = None
            if i == 0 and self.order == 3 and eta == 0:
                w = exponential_weights([lambdas[1], *points], lambdas[0], lambdas[1], c)
                again = [nodes.alpha[1] * v for v in w]
            correcting.append(again)

        return Multistep(
            value=nodes.denoised,
            of_x=of_x,
            predicting=predicting,
            correcting=correcting,
            of_noise=of_noise if eta > 0 else None,
        )
