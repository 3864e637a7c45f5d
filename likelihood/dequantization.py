r"""From grey levels to real numbers, and what it costs.

A grey value k stands for a bin of width w around its centre c_k in model units (`data.transforms`). A model with a
density p of real images gives the image the probability P(k) = integral of p over its bin; for any noise q(u) inside the
bin, Jensen's inequality bounds it from below:

    (1)  log P(k) >= E_q[log p(c_k + u) - log q(u)]

The two noises differ in which density is meant, as the flow gives the law of x_t only from t = t_min on:

    Uniform            u uniform in the bin, -log q = D log w, and p is p_tmin, as if the image were a state at t_min:
                       what Song et al. 2021 (arXiv:2011.13456, appendix D.2) and most papers quote. The law of such an
                       image, noised by sigma(t_min), is not quite that of the image itself; at t_min = 1e-5 this is small.
    TruncatedNormal    u normal of standard deviation s = sigma / alpha at t_min, cut off at the bin's edges: c_k + u is
                       then a state at t_min divided by alpha, whose density is alpha^D p_tmin(alpha (c_k + u)). Nothing is
                       left out, and no network is trained for it (Zheng et al. 2023, arXiv:2305.03935, section 4.2). It
                       wants a t_min at which s is a fraction of the bin's width, or a model trained on grid points.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from data.transforms import Transform
from numerics import Generator, uniform
from sde_lib import SDE


class Dequantizer(ABC):
    """A noise on the bin of a grey value."""

    @abstractmethod
    def __call__(
        self,
        images: Tensor,
        transform: Transform,
        sde: SDE,
        t_min: float,
        *,
        generator: Generator = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """The state x `(B, *)` at `t_min`, and what to add to log p_tmin(x) for the right side of (1), `(B,)` nats.

        Args:
            images: grey values `(B, *)`.
            transform: from level units to model units.
        """


@dataclass(frozen=True, kw_only=True)
class Uniform(Dequantizer):
    """u uniform in the bin."""

    def __call__(
        self,
        images: Tensor,
        transform: Transform,
        sde: SDE,
        t_min: float,
        *,
        generator: Generator = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        u = uniform(images.shape, generator, device=images.device, dtype=dtype)
        v = images.to(dtype) + u
        # k + u may round up to k + 1, which belongs to the next grey value
        v = torch.minimum(v, torch.nextafter(images.to(dtype) + 1, torch.zeros_like(v)))
        cost = torch.full((images.shape[0],), images[0].numel() * transform.log_det, dtype=torch.float64)
        return transform(v), cost.to(images.device)


@dataclass(frozen=True, kw_only=True)
class TruncatedNormal(Dequantizer):
    """u normal of the noise's own standard deviation at t_min, cut off at the bin's edges."""

    @staticmethod
    def t_min(sde: SDE, transform: Transform, fraction: float = 0.25) -> float:
        """The time at which sigma/alpha is `fraction` of a bin's width; `sde.t_min` where it is more even there."""
        log_snr = -2 * math.log(fraction * math.exp(transform.log_det))
        return float(sde.time_of_log_snr(min(float(sde.log_snr(sde.t_min)), log_snr)).clamp(min=sde.t_min))

    def __call__(
        self,
        images: Tensor,
        transform: Transform,
        sde: SDE,
        t_min: float,
        *,
        generator: Generator = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        alpha, sigma = float(sde.alpha(t_min)), float(sde.sigma(t_min))
        s, half = sigma / alpha, math.exp(transform.log_det) / 2
        edge = half / s
        # by inversion of the normal law between -edge and edge, in float64
        inside = math.erf(edge / math.sqrt(2))
        u = uniform(images.shape, generator, device=images.device, dtype=torch.float64)
        # a stream's uniform numbers are multiples of 2^-24: taken in the middle of their cells, none is the edge itself
        p = 0.5 + inside * ((u + 2**-25).clamp(max=1 - 2**-25) - 0.5)
        z = torch.special.ndtri(p).clamp(-edge, edge)
        log_q = -0.5 * z.square() - math.log(s * math.sqrt(2 * math.pi) * inside)
        D = images[0].numel()
        x = alpha * (transform(images.to(torch.float64) + 0.5) + s * z)
        return x.to(dtype), D * math.log(alpha) - log_q.flatten(1).sum(dim=1)
