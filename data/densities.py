"""Densities in the plane, each with exact samples and an exact log-density.

Two kinds:

* mixtures of Gaussians, sheared Gaussians and uniform laws on squares, whose density is a closed form;
* a curve c(u), u uniform in [0, 1], blurred by isotropic Gaussian noise of standard deviation `noise`:

      p(x) = int_0^1 N(x; c(u), noise^2 I) du                                                              (1)

  an integral of an analytic function, which composite Gauss-Legendre quadrature with a few nodes per standard
  deviation takes to machine precision (the tests double the nodes), so it counts as exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError

__all__ = ["Checkerboard", "Density", "Gaussians", "Moons", "Pinwheel", "Rings", "Spirals", "SwissRoll"]


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise DataError(f"got {name}={value!r}; expected a positive number")


def _count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"got {name}={value!r}; expected an integer of at least {least}")


def _normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn((n, 2), generator=generator, dtype=torch.float64)


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand((n,), generator=generator, dtype=torch.float64)


def _choice(n: int, options: int, generator: torch.Generator) -> Tensor:
    return torch.randint(options, (n,), generator=generator)


def _points(x: Tensor) -> Tensor:
    if x.ndim != 2 or x.shape[1] != 2:
        raise DataError(f"got points of shape {tuple(x.shape)}; expected (B, 2)")
    return x.double()


class Density(ABC):
    """A law of points in the plane."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n independent points (n, 2) in float64 and the component (n,) int64 that each came from."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density (B,) in nats, float64, of points x (B, 2); -inf outside the support."""


@dataclass(frozen=True, kw_only=True)
class Gaussians(Density):
    """Equal Gaussians on a ring or on a square grid; the label says which.

        p(x) = 1/K sum_k N(x; m_k, std^2 I)

    Args:
        layout: "ring" (of the given radius) or "grid" (the square [-radius, radius]^2; a square number of
            components).
        components: number of Gaussians.
        radius: radius of the ring, or half the side of the grid.
        std: standard deviation of each Gaussian.

    Raises:
        DataError: another layout, or numbers that are not positive or no square.
    """

    layout: str = "ring"
    components: int = 8
    radius: float = 2.0
    std: float = 0.15

    def __post_init__(self) -> None:
        _count("components", self.components, 1)
        _positive("radius", self.radius)
        _positive("std", self.std)
        if self.layout not in ("ring", "grid"):
            raise DataError(f"got layout={self.layout!r}; expected 'ring' or 'grid'")
        if self.layout == "grid" and math.isqrt(self.components) ** 2 != self.components:
            raise DataError(f"got components={self.components}; expected a square number for a grid")

    @cached_property
    def means(self) -> Tensor:
        """Centres (components, 2), float64."""
        if self.layout == "ring":
            angle = torch.arange(self.components, dtype=torch.float64) * (2 * math.pi / self.components)
            return self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        axis = torch.linspace(-self.radius, self.radius, math.isqrt(self.components), dtype=torch.float64)
        return torch.cartesian_prod(axis, axis).reshape(-1, 2)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        component = _choice(n, self.components, generator)
        return self.means[component] + self.std * _normal(n, generator), component

    def log_prob(self, x: Tensor) -> Tensor:
        square = torch.cdist(_points(x), self.means.to(x.device), compute_mode="donot_use_mm_for_euclid_dist").square()
        constant = math.log(2 * math.pi * self.std**2) + math.log(self.components)
        return torch.logsumexp(-square / (2 * self.std**2), dim=1) - constant


@dataclass(frozen=True, kw_only=True)
class Checkerboard(Density):
    """The uniform law on the dark squares of a board, p(x) = 2 / side^2 there; the label is the row.

    Args:
        squares: even number of squares along one side.
        side: length of one side; the board is centred at 0.

    Raises:
        DataError: an odd number of squares, or a side that is not positive.
    """

    squares: int = 4
    side: float = 8.0

    def __post_init__(self) -> None:
        _count("squares", self.squares, 2)
        _positive("side", self.side)
        if self.squares % 2:
            raise DataError(f"got squares={self.squares}; expected an even number, so that every row is half dark")

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        row = _choice(n, self.squares, generator)
        column = 2 * _choice(n, self.squares // 2, generator) + row % 2
        corner = torch.stack([column, row], dim=1).double()
        within = torch.rand((n, 2), generator=generator, dtype=torch.float64)
        return (corner + within) * (self.side / self.squares) - self.side / 2, row

    def log_prob(self, x: Tensor) -> Tensor:
        cell = ((_points(x) + self.side / 2) * (self.squares / self.side)).floor()
        inside = ((cell >= 0) & (cell < self.squares)).all(dim=1) & (cell.sum(dim=1) % 2 == 0)
        value = math.log(2 / self.side**2)
        return torch.where(inside, value, -math.inf).double()


class Curve(Density):
    """A point on one of several curves, plus Gaussian noise:

        p(x) = mean over curves k of int_0^1 N(x; c_k(u), noise^2 I) du

    A subclass is a frozen dataclass with a field `noise` and the curves; everything else is derived here.
    """

    noise: float

    @property
    @abstractmethod
    def curves(self) -> int:
        """Number of curves, equally likely."""

    @abstractmethod
    def at(self, u: Tensor, curve: Tensor) -> Tensor:
        """Points (n, 2) at u (n,) in [0, 1] of curves (n,)."""

    @property
    @abstractmethod
    def speed(self) -> float:
        """An upper bound of the speed |dc/du|, from which the number of quadrature nodes follows."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        curve = _choice(n, self.curves, generator)
        return self.at(_uniform(n, generator), curve) + self.noise * _normal(n, generator), curve

    def log_prob(self, x: Tensor, refine: int = 1) -> Tensor:
        # Panels of 16 nodes, at least four nodes per standard deviation of the noise.
        panels = refine * max(8, math.ceil(self.speed / self.noise / 4))
        node, weight = np.polynomial.legendre.leggauss(16)
        start = np.arange(panels)
        u = torch.from_numpy((start.repeat(16) + 0.5 * (np.tile(node, panels) + 1)) / panels).to(x.device)
        log_weight = torch.from_numpy(np.log(np.tile(weight, panels) / (2 * panels * self.curves))).to(x.device)
        centres = torch.cat([self.at(u, torch.full_like(u, c, dtype=torch.int64)) for c in range(self.curves)])
        log_weight = log_weight.repeat(self.curves)
        constant = math.log(2 * math.pi * self.noise**2)
        rows = max(1, 2**22 // len(centres))  # at most 32 MB of distances at once
        return torch.cat(
            [
                torch.logsumexp(
                    log_weight
                    - torch.cdist(chunk, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
                    / (2 * self.noise**2),
                    dim=1,
                )
                - constant
                for chunk in _points(x).split(rows)
            ]
        )


@dataclass(frozen=True, kw_only=True)
class SwissRoll(Curve):
    """The plane section of the Swiss roll, a spiral of one and a half turns, blurred.

        c(u) = r (cos r, sin r) / 5,   r = 1.5 pi (1 + 2 u),   u uniform in [0, 1]

    Args:
        noise: standard deviation of the blur, positive.

    Raises:
        DataError: a noise that is not positive.
    """

    noise: float = 0.1

    def __post_init__(self) -> None:
        _positive("noise", self.noise)

    @property
    def curves(self) -> int:
        return 1

    @property
    def speed(self) -> float:
        outer = 4.5 * math.pi
        return 3 * math.pi * math.hypot(1.0, outer) / 5

    def at(self, u: Tensor, curve: Tensor) -> Tensor:
        r = 1.5 * math.pi * (1 + 2 * u)
        return torch.stack([r * r.cos(), r * r.sin()], dim=1) / 5


@dataclass(frozen=True, kw_only=True)
class Moons(Curve):
    """Two interleaved half circles of radius 1, as in scikit-learn's make_moons, blurred; the label says which.

        c_0(u) = (cos pi u, sin pi u),   c_1(u) = (1 - cos pi u, 1/2 - sin pi u),   u uniform in [0, 1]

    Args:
        noise: standard deviation of the blur, positive.

    Raises:
        DataError: a noise that is not positive.
    """

    noise: float = 0.08

    def __post_init__(self) -> None:
        _positive("noise", self.noise)

    @property
    def curves(self) -> int:
        return 2

    @property
    def speed(self) -> float:
        return math.pi

    def at(self, u: Tensor, curve: Tensor) -> Tensor:
        angle = math.pi * u
        upper = torch.stack([angle.cos(), angle.sin()], dim=1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
        return torch.where((curve == 0).unsqueeze(1), upper, lower)


@dataclass(frozen=True, kw_only=True)
class Rings(Curve):
    """Concentric circles of radius 1, 2, ..., equally likely and blurred; the label says which.

        c_k(u) = (k + 1) (cos 2 pi u, sin 2 pi u),   u uniform in [0, 1]

    Args:
        rings: number of circles.
        noise: standard deviation of the blur, positive.

    Raises:
        DataError: no ring, or a noise that is not positive.
    """

    rings: int = 3
    noise: float = 0.08

    def __post_init__(self) -> None:
        _count("rings", self.rings, 1)
        _positive("noise", self.noise)

    @property
    def curves(self) -> int:
        return self.rings

    @property
    def speed(self) -> float:
        return 2 * math.pi * self.rings

    def at(self, u: Tensor, curve: Tensor) -> Tensor:
        angle, radius = 2 * math.pi * u, curve + 1.0
        return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


@dataclass(frozen=True, kw_only=True)
class Spirals(Curve):
    """Two arms of one and a half turns, one opposite the other, blurred; the label k says which.

        c_k(u) = 3 u (cos a, sin a),   a = 3 pi u + pi k,   u uniform in [0, 1]

    Args:
        noise: standard deviation of the blur, positive.

    Raises:
        DataError: a noise that is not positive.
    """

    noise: float = 0.08

    def __post_init__(self) -> None:
        _positive("noise", self.noise)

    @property
    def curves(self) -> int:
        return 2

    @property
    def speed(self) -> float:
        return 3.0 * math.hypot(1.0, 3 * math.pi)

    def at(self, u: Tensor, curve: Tensor) -> Tensor:
        angle = 3 * math.pi * u + math.pi * curve
        return 3 * torch.stack([u * angle.cos(), u * angle.sin()], dim=1)


@dataclass(frozen=True, kw_only=True)
class Pinwheel(Density):
    """Gaussian blades, sheared along the radius into a wheel (Johnson et al. 2016, arXiv:1603.06277); the label says which.

    A straight blade is N((1, 0), diag(radial^2, tangential^2)); blade k is turned by 2 pi k / blades + rate |x|. The turn keeps
    areas, so the density is that of the straight blades at the point turned back.

    Args:
        blades: number of blades.
        radial: standard deviation along a blade (its centre is at radius 1).
        tangential: standard deviation across.
        rate: turn, in radians, of a blade between radius 0 and radius 1.

    Raises:
        DataError: no blade, or another number that is not positive.
    """

    blades: int = 5
    radial: float = 0.3
    tangential: float = 0.05
    rate: float = 0.25

    def __post_init__(self) -> None:
        _count("blades", self.blades, 1)
        _positive("radial", self.radial)
        _positive("tangential", self.tangential)
        _positive("rate", self.rate)

    def _turned(self, x: Tensor, angle: Tensor) -> Tensor:
        c, s = angle.cos(), angle.sin()
        return torch.stack([c * x[:, 0] - s * x[:, 1], s * x[:, 0] + c * x[:, 1]], dim=1)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        blade = _choice(n, self.blades, generator)
        noise = _normal(n, generator)
        straight = torch.stack([1 + self.radial * noise[:, 0], self.tangential * noise[:, 1]], dim=1)
        angle = 2 * math.pi * blade / self.blades + self.rate * straight.norm(dim=1)
        return self._turned(straight, angle), blade

    def log_prob(self, x: Tensor) -> Tensor:
        # A rotation by an angle that depends on the radius alone has determinant one.
        points = _points(x)
        radius = points.norm(dim=1)
        terms = []
        for blade in range(self.blades):
            straight = self._turned(points, -(2 * math.pi * blade / self.blades + self.rate * radius))
            terms.append(-0.5 * (((straight[:, 0] - 1) / self.radial) ** 2 + (straight[:, 1] / self.tangential) ** 2))
        constant = math.log(2 * math.pi * self.radial * self.tangential * self.blades)
        return torch.logsumexp(torch.stack(terms), dim=0) - constant
