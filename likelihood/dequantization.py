r"""From grey levels to real numbers, and what it costs.

A grey value k stands for a bin of width w around its centre c_k in model units (`data.transforms`). A model with a
density p of real images gives the image the probability P(k) = integral of p over its bin; for any noise q(u) inside the
bin, Jensen's inequality bounds it from below:

    (1)  log P(k) >= E_q[log p(c_k + u) - log q(u)]

Two noises differ in which density is meant, as the flow gives the law of x_t only from t = t_min on: `UniformDequantizer` is
what most papers quote, `TruncatedNormal` leaves nothing out. Data that are real numbers need none: `NoDequantization`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from data.transforms import Transform
from numerics import Generator, UserError, require_positive, uniform
from sde_lib import SDE


class Dequantizer(ABC):
    """From stored data to states at t_min, and the cost of the step in nats.

    Attributes:
        noisy: whether noise is drawn, so that repeating changes the value.
    """

    noisy: ClassVar[bool] = True

    def check(self, images: Tensor, transform: Transform) -> None:
        """Refuses data that it cannot take, with a UserError: what are no grey values of the transform's levels."""
        check_grey_values(images, transform)

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
        """The state x `(B, *)` at `t_min`, and what to add to log p_tmin(x), `(B,)` nats, float64: -log q(u) in (1).

        Args:
            images: grey values `(B, *)`.
            transform: from level units to model units.
            t_min: the time of the state.
            generator: of the noise.
            dtype: of x.
        """


@dataclass(frozen=True, kw_only=True)
class UniformDequantizer(Dequantizer):
    """u uniform in the bin, -log q = D log w, and p is p_tmin, as if the image were a state at t_min.

        bits/dim = -(log p_tmin(x) + D log w') / (D log 2),      w' the bin's width in model units

    What Song et al. 2021 (arXiv:2011.13456, appendix D.2) and most papers quote. The law of such an image, noised by
    sigma(t_min), is not quite that of the image itself; at t_min = 1e-5 this is small. `Uniform` is its short name.
    """

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
    """u normal of standard deviation s = sigma / alpha at t_min, cut off at the bin's edges.

    c_k + u is then a state at t_min divided by alpha, whose density is alpha^D p_tmin(alpha (c_k + u)): nothing is left out,
    and no network is trained for it (Zheng et al. 2023, arXiv:2305.03935, section 4.2). It wants a t_min at which s is a
    fraction of the bin's width (`TruncatedNormal.t_min`), or a model trained on grid points.
    """

    @staticmethod
    def t_min(sde: SDE, transform: Transform, fraction: float = 0.25) -> float:
        """The time at which sigma/alpha is `fraction` of a bin's width; `sde.t_min` where it is more even there.

        Raises:
            UserError: for a fraction that is not positive.
        """
        require_positive(fraction, "fraction")
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


@dataclass(frozen=True, kw_only=True)
class NoDequantization(Dequantizer):
    """No noise, for data that are real numbers: x = transform(v), and log p(v) = log p(x) + D log|dx/dv|."""

    noisy: ClassVar[bool] = False

    def check(self, images: Tensor, transform: Transform) -> None:
        """Refuses grey values, a transform that has levels, and what is not a batch `(B, *)` of one or more."""
        if transform.levels is not None:
            raise UserError(
                f"got NoDequantization() with a transform of {transform.levels} levels; expected noise for grey values: "
                "give dequantizer=UniformDequantizer()"
            )
        _check_batch(images)
        if not images.is_floating_point():
            raise UserError(f"got data of type {images.dtype} for a transform without levels; expected real numbers")

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
        cost = torch.full((len(images),), images[0].numel() * transform.log_det, dtype=torch.float64)
        return transform(images.to(dtype)), cost.to(images.device)


@dataclass(frozen=True, kw_only=True)
class Checked(Dequantizer):
    """`inner`, for parts of a set that it has checked whole: a single dark image says nothing of the levels.

    Args:
        inner: makes the states.
    """

    inner: Dequantizer

    def __post_init__(self) -> None:
        object.__setattr__(self, "noisy", self.inner.noisy)

    def check(self, images: Tensor, transform: Transform) -> None:
        """Nothing: it is done."""

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
        return self.inner(images, transform, sde, t_min, generator=generator, dtype=dtype)


Uniform = UniformDequantizer
"""Its short name."""


def default_dequantizer(transform: Transform) -> Dequantizer:
    """Uniform noise for grey values, none for real numbers."""
    return NoDequantization() if transform.levels is None else UniformDequantizer()


def check_grey_values(images: Tensor, transform: Transform) -> None:
    """Refuses what is not a batch `(B, *)` of grey values 0 ... levels - 1, naming the bad images.

    Warns where no image comes near the highest level: with 256 levels for data of 17 every number would be off.

    Raises:
        UserError: for images of another type or range, or a transform without levels.
    """
    levels = transform.levels
    if levels is None:
        raise UserError(
            "got a transform without levels, of data that are real numbers; expected one that has grey levels: "
            "leave the dequantizer out, or give NoDequantization(), or a decoder of real values"
        )
    _check_batch(images)
    if images.is_floating_point() or images.dtype == torch.bool:
        raise UserError(
            f"got images of type {images.dtype}; expected integers 0 ... {levels - 1}: "
            "pass the grey values, to which the noise is added here"
        )
    flat = images.flatten(1).long()  # 256 is no uint8, and uint16 has no amin
    lowest, highest = flat.amin(dim=1), flat.amax(dim=1)
    bad = ((lowest < 0) | (highest >= levels)).nonzero().squeeze(1).tolist()
    if bad:
        raise UserError(
            f"got grey values from {int(lowest.min())} to {int(highest.max())}, outside the range in {len(bad)} images (the "
            f"first: {', '.join(map(str, bad[:5]))}); expected 0 ... {levels - 1}: remove them, or give the transform "
            "the data's number of levels"
        )
    if int(highest.max()) + 1 <= levels // 2:
        warnings.warn(
            f"got grey values of at most {int(highest.max())} for a transform of {levels} levels; if the data have fewer "
            "levels, give the transform their number: bits/dim depend on it",
            stacklevel=4,  # past check() and its caller, to the user's line
        )


def _check_batch(images: Tensor) -> None:
    if images.ndim < 2 or images.shape[0] < 1:
        raise UserError(f"got images of shape {tuple(images.shape)}; expected a batch (B, *) of one or more")
