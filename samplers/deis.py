"""DEIS: exponential Adams-Bashforth in the predicted noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from numerics import require_choice
from samplers.base import GridSampler
from samplers.exponential import Multistep, Values, exponential_weights, orders
from samplers.run import Nodes, numbers
from sde_lib import SDE
from sde_lib.time_grids import LogSNR, TimeGrid


@dataclass(frozen=True, kw_only=True, repr=False)
class DEIS(GridSampler):
    r"""DEIS: exponential Adams-Bashforth in the predicted noise.

        x_s = (alpha_s / alpha_t) x_t + alpha_s sum_j W_j eps(x_{t_j}, t_j),     W_j = integral of L_j dkappa from t to s

    (Zhang and Chen 2022, arXiv:2204.13902.) eps is extrapolated by the polynomial through its last `order` values, in t
    (`variable="t"`, the paper's tAB) or in log kappa (its rhoAB takes kappa itself); L_j are its Lagrange polynomials. With
    exact scores of mixtures and 10 to 20 steps, log kappa on equal steps of log-SNR has half the error of t or less, and is
    the default. One value is DDIM. Assumes that eps varies smoothly in that variable; any linear SDE. From three values on
    the first step is made again once eps at its end is known, as in `DPMSolver`, at no cost. For variance exploding t and
    log kappa are the same.

    Args:
        order: number of values to extrapolate from, 1 to 4 (the paper's tAB0 ... tAB3).
        variable: "log_kappa", or "t" as published.
        lower_order_final: in runs of fewer than 15 steps, end with lower orders.
        grid: the times; `LogSNR()` unless given.
        steps, denoise, corrections: as in every `GridSampler`.

    Raises:
        UserError: for another value of an option.
    """

    steps: int = 20
    order: int = 3
    variable: Literal["t", "log_kappa"] = "log_kappa"
    lower_order_final: bool = True

    default_grid: ClassVar[TimeGrid] = LogSNR()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.order, "order", (1, 2, 3, 4))
        require_choice(self.variable, "variable", ("t", "log_kappa"))

    def method(self, sde: SDE, times: Tensor) -> Multistep:
        """The step on the grid `times` `(N+1,)`."""
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        nodes, lambdas, kappa = Nodes(times, alpha, sigma), numbers(sde.log_snr(times) / 2), numbers(sigma / alpha)
        in_t = self.variable == "t"
        places = nodes.t if in_t else lambdas

        def time(l: Values) -> Values:
            t: Values = sde.time_of_log_snr(torch.from_numpy(2 * l)).numpy()
            return t

        predicting: list[list[float]] = []
        correcting: list[list[float] | None] = []
        for i, k in enumerate(orders(self.order, len(times) - 1, self.lower_order_final)):
            points = [places[i - j] for j in range(k)]
            # dkappa = -exp(-lambda) dlambda = kappa_s times the kernel of rate -1
            factor = nodes.alpha[i + 1] * kappa[i + 1]

            def weights(points: list[float], i: int = i, factor: float = factor) -> list[float]:
                w = exponential_weights(points, lambdas[i], lambdas[i + 1], -1.0, variable=time if in_t else None)
                return [factor * v for v in w]

            predicting.append(weights(points))
            correcting.append(weights([places[1], *points]) if i == 0 and self.order >= 3 else None)
        of_x = numbers(alpha[1:] / alpha[:-1])
        return Multistep(value=nodes.noise, of_x=of_x, predicting=predicting, correcting=correcting)
