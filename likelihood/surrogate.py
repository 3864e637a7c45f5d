r"""What predicts an image's bits/dim, without its exact value.

A denoising error at one noise level is one forward pass, and a term of the variational bound,

    d_j = (|eps - eps-hat(alpha_j x + sigma_j eps)|^2 - w_j^2 (|eps|^2 - D)) / D,
    w_j = alpha_j^2 s^2 / (alpha_j^2 s^2 + sigma_j^2)

with what the noise's own length adds taken out (`likelihood.bounds`); s is the data's standard deviation. The candidates'
levels are the middles of equal shares of the bound's integral for data N(0, s^2 I). How rough an image is takes no pass at all
(`likelihood.roughness`). None of these is the likelihood; a regression on them says how much of it they know.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from likelihood.draw_places import PREDICTORS
from numerics import SampleStreams, batch_time, expand_as
from sde_lib import SDE, Score

CANDIDATES = 10


def noise_levels(sde: SDE, *, data_std: float, t_min: float, n: int = CANDIDATES) -> Tensor:
    """The candidates' times `(n,)`, falling from noisy to clean."""
    edges = torch.linspace(float(sde.log_snr(sde.T)), float(sde.log_snr(t_min)), 2001, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    signal = max(data_std, 1e-6) ** 2  # of constant images the levels are those of the smallest noise
    share = signal / (signal + torch.exp(-middle))
    mass = share.cumsum(0) / share.sum()
    at = torch.searchsorted(mass, (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return sde.time_of_log_snr(middle[at])


def denoising_errors(
    sde: SDE, score: Score, x: Tensor, times: Tensor, which: list[int], *, data_std: float, streams: SampleStreams
) -> Tensor:
    """d_j `(B, len(which))`, float64, for the levels `which` of `times`; one forward pass each.

    Args:
        x: images in model units `(B, *)`.
        streams: of the noise; a level's noise is its own, whichever others are asked for.
    """
    found = []
    with torch.no_grad():
        for j in which:
            own = SampleStreams(streams.seed, streams.ids, draw=PREDICTORS + j)
            eps = own.normal(x.shape, device=x.device).to(x.dtype)
            t = batch_time(float(times[j]), x)
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            noisy = sde.perturb(x, t, eps)
            error = (eps + expand_as(sigma, x) * score(noisy, t)).flatten(1).to(torch.float64).square().mean(dim=1)
            signal = (alpha * data_std).square()
            share = (signal / (signal + sigma.square())).to(torch.float64)
            surplus = share.square() * (eps.flatten(1).to(torch.float64).square() - 1).mean(dim=1)
            found.append(error - surplus)
    return torch.stack(found, dim=1) if found else torch.empty(len(x), 0, dtype=torch.float64)


def least_images(predictors: int) -> int:
    """How many exact values a regression on so many predictors wants at least."""
    return max(48, math.ceil(12 * (predictors + 1)))
