r"""DEIS: exponential Adams-Bashforth in the predicted noise.

    x_s = (alpha_s / alpha_t) x_t + alpha_s sum_j W_j eps(x_{t_j}, t_j),     W_j = integral of L_j dkappa from t to s

(Zhang and Chen 2022, arXiv:2204.13902.) eps is extrapolated by the polynomial through its last `order` values, in t
(`variable="t"`, the paper's tAB) or in log kappa (its rhoAB takes kappa itself); L_j are its Lagrange polynomials. With
exact scores of mixtures and 10 to 20 steps, log kappa on equal steps of log-SNR has half the error of t or less, and is
the default. One value is DDIM. Assumes that eps
varies smoothly in that variable; any linear SDE. From three values on the first step is made again once eps at its end
is known, as in `samplers.dpm_solver`, at no cost. For variance exploding t and log kappa are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from numerics import require_choice
from samplers.base import GridSampler, Run, Step
from samplers.exponential import exponential_weights, multistep, orders
from sde_lib import SDE
from sde_lib.time_grids import LogSNR, TimeGrid


@dataclass(frozen=True, kw_only=True, repr=False)
class DEIS(GridSampler):
    """See the module's text.

    Args:
        order: how many values are extrapolated from, 1 to 4 (the paper's tAB0 ... tAB3).
        variable: "log_kappa", or "t" as published.
        lower_order_final: in runs of fewer than 15 steps, end with lower orders.
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

    def method(self, sde: SDE, times: Tensor) -> Step:
        now = times.tolist()
        alpha, sigma = sde.alpha(times), sde.sigma(times)
        lambdas = (sde.log_snr(times) / 2).tolist()
        signal, kappa = alpha.tolist(), (sigma / alpha).tolist()
        in_t = self.variable == "t"
        places = now if in_t else lambdas

        def time(l: np.ndarray) -> np.ndarray:
            return sde.time_of_log_snr(torch.from_numpy(2 * l)).numpy()

        predicting: list[list[float]] = []
        correcting: list[list[float] | None] = []
        for i, k in enumerate(orders(self.order, len(now) - 1, self.lower_order_final)):
            points = [places[i - j] for j in range(k)]
            # dkappa = -exp(-lambda) dlambda = kappa_s times the kernel of rate -1
            factor = signal[i + 1] * kappa[i + 1]

            def weights(nodes: list[float], i: int = i, factor: float = factor) -> list[float]:
                w = exponential_weights(nodes, lambdas[i], lambdas[i + 1], -1.0, variable=time if in_t else None)
                return [factor * v for v in w]

            predicting.append(weights(points))
            correcting.append(weights([places[1], *points]) if i == 0 and self.order >= 3 else None)
        of_x, of_score = (alpha[1:] / alpha[:-1]).tolist(), (-sigma).tolist()

        def noise(i: int, x: Tensor, run: Run) -> Tensor:
            return run.score(x, now[i]) * of_score[i]

        return multistep(noise, of_x, predicting, correcting)
