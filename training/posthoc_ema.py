r"""Post-hoc EMA: averages of any length, chosen after training.

A power-function average weights the past by theta^gamma,

    (1)  shadow_n = beta_n shadow_{n-1} + (1 - beta_n) weights_n,      beta_n = (1 - 1/n)^(gamma + 1)

and is named by its relative width, the standard deviation of its weights as a part of the training so far,

    (2)  sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))).

Two such averages stored now and then in training span a space in which the average of any other width, ending at any step,
is a least-squares problem in a few dozen unknowns: minimise the L2 distance of the profiles, whose inner products are

    (3)  <p_{gamma_a, t_a}, p_{gamma_b, t_b}> = (gamma_a + 1)(gamma_b + 1) (t_m / t_M)^{gamma_M} / ((gamma_a + gamma_b + 1) t_M)

where m is the profile that ends first, at t_m, and M the other. Karras et al. 2024, "Analyzing and Improving the
Training Dynamics of Diffusion Models" (arXiv:2312.02696), section 3, appendix C and algorithms 2 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training.ema import EMA
from training.errors import UsageError


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the average of relative width `sigma_rel`, in (0, 1/sqrt(12)); the inverse of (2)."""
    if not 0 < sigma_rel < 12**-0.5:
        raise UsageError(f"got sigma_rel={sigma_rel}; expected a number in (0, {12**-0.5:.4f})")
    low, high = 0.0, 1e6  # (2) falls in gamma
    for _ in range(200):
        middle = (low + high) / 2
        if sigma_rel_of(middle) > sigma_rel:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def sigma_rel_of(gamma: float) -> float:
    """The relative width (2)."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


class PowerEMA(EMA):
    """Power-function averages of named parameters, float32, of several relative widths at once:

        shadow <- beta_n shadow + (1 - beta_n) weights,      beta_n = (1 - 1/n)^(gamma + 1) in update n = 1, 2, ...

    with the gamma of a width by (2) of the module. Karras et al. 2024 (arXiv:2312.02696), equations (2) and (3).

    Args:
        parameters: `(name, tensor)` pairs, such as `model.named_parameters()`.
        widths: sigma_rel, each in (0, 0.2887); they are what `decays` holds.

    Raises:
        UsageError: a width out of range, or one of them twice.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], widths: Sequence[float] = (0.05, 0.10)) -> None:
        self.gammas = {float(width): gamma_of(width) for width in widths}
        super().__init__(parameters, widths, warmup=False)

    def rate(self, decay: float, n: int) -> float:
        return (1 - 1 / n) ** (self.gammas[decay] + 1)


def inner_product(gamma_a: float, t_a: float, gamma_b: float, t_b: float) -> float:
    """The inner product (3) of two profiles."""
    if t_a > t_b:
        gamma_a, t_a, gamma_b, t_b = gamma_b, t_b, gamma_a, t_a
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** gamma_b / ((gamma_a + gamma_b + 1) * t_b)


def combination(stored: Sequence[tuple[float, int]], sigma_rel: float, step: int) -> Tensor:
    """The weights `(K,)`, float64, with which `stored` averages make up the one of width `sigma_rel` that ends at `step`.

    Args:
        stored: pairs of (relative width, step at which it was stored).
    """
    if not stored:
        raise UsageError("got no stored averages; expected some: train with power_ema=(0.05, 0.1)")
    gammas = [gamma_of(width) for width, _ in stored]
    times = [float(t) for _, t in stored]
    A = torch.tensor(
        [
            [inner_product(g, t, h, u) for h, u in zip(gammas, times, strict=True)]
            for g, t in zip(gammas, times, strict=True)
        ],
        dtype=torch.float64,
    )
    target = gamma_of(sigma_rel)
    b = torch.tensor(
        [inner_product(g, t, target, float(step)) for g, t in zip(gammas, times, strict=True)], dtype=torch.float64
    )
    return torch.linalg.lstsq(A, b.unsqueeze(1), driver="gelsd").solution.squeeze(1)


def reconstruct(contents: Sequence[Mapping[str, Any]], sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The average of width `sigma_rel` that ends at `step` (the last stored one unless given), by parameter name, float32.

    Args:
        contents: of checkpoints of one run, each with its "step" and "power_ema".
    """
    snapshots = [
        (float(width), int(content["step"]), weights)
        for content in contents
        for width, weights in content["power_ema"]["weights"].items()
    ]
    step = max((s for _, s, _ in snapshots), default=0) if step is None else step
    usable = [snapshot for snapshot in snapshots if snapshot[1] <= step]
    c = combination([(width, s) for width, s, _ in usable], sigma_rel, step)
    names = usable[0][2].keys()
    return {
        name: sum(float(k) * weights[name].double() for k, (_, _, weights) in zip(c, usable, strict=True)).float()
        for name in names
    }
