"""Does the noise at T hide the data? What the prior cannot know, measured, and what to tell a user about it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sde_lib.base import SDE


def prior_mismatch(sde: SDE, x_0: Tensor) -> Tensor:
    """How far the prior is from what the noise at T leaves of the data `x_0` `(B, *)`: `(B,)` nats, float64.

        KL(N(alpha_T x_0, sigma_T^2 I) || N(0, prior_std^2 I))

    Its mean over the data is at least KL(law of x_T || prior), which is what a likelihood by the prior is off by on average
    where the score is right, and how far samples from the prior begin from the law that they should begin from.
    """
    x_0 = x_0.flatten(1).to(torch.float64)
    alpha, sigma, std = float(sde.alpha(sde.T)), float(sde.sigma(sde.T)), sde.prior_std
    ratio = (sigma / std) ** 2
    return 0.5 * ((alpha / std) ** 2 * x_0.square().sum(dim=1) + x_0.shape[1] * (ratio - 1 - math.log(ratio)))


VISIBLE = 0.01
"""Nats a dimension of `prior_mismatch` above which a number that is quoted would be another: 0.014 bits/dim."""


def mismatch_warning(sde: SDE, nats_per_dim: float, what: str = "data") -> str | None:
    """What to tell a user whose data show through the noise at T; None below `VISIBLE`.

    Args:
        nats_per_dim: of `prior_mismatch`, on average.
        what: of what it was measured.
    """
    if not nats_per_dim > VISIBLE:
        return None
    ratio = float(sde.alpha(sde.T) / sde.sigma(sde.T))
    return (
        f"got {what} that the noise at T does not hide: about {nats_per_dim / math.log(2):.2g} bits/dim of mismatch with the "
        f"prior under {type(sde).__name__}, alpha(T) / sigma(T) = {ratio:.2g}; expected below {VISIBLE / math.log(2):.2g}: "
        "scale the data to about unit size, or take a larger beta_max or sigma_max"
    )
