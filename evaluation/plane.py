r"""Laws in the plane on a grid: normalised, blurred and compared by quadrature instead of by samples.

On an n x n grid of spacing h the trapezoid rule takes the integral of a smooth density, with nothing left at the edges, to
an error that falls faster than any power of h; that of a Gaussian of standard deviation s is off by about
2 exp(-2 pi^2 s^2 / h^2). So with s >= h everything here is exact to seven digits:

    log Z = log sum_ij exp(-E_ij) h^2                                           an energy becomes a density
    q(x) = sum_j p_j N(x; x_j, sigma^2 I) h^2, and its gradient                  the law of p with noise added
    F(s) = sum_ij p_ij |s(x_ij) - grad log p(x_ij)|^2 h^2                        the Fisher divergence of a score
    KL(p, q) = sum_ij p_ij (log p_ij - log q_ij) h^2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from numerics import UserError, require_count, require_positive

__all__ = ["GridLaw", "Plane"]

_NEGLIGIBLE = 1e-9
"""Nodes of less density than this part of the largest are left out where a network is asked at the nodes."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A square grid of n x n points over [-half, half]^2.

    Args:
        half: half the side.
        n: points a side, at least 16.

    Raises:
        UserError: a side that is not positive, or too few points.
    """

    half: float = 4.0
    n: int = 400

    def __post_init__(self) -> None:
        require_positive(self.half, "half")
        require_count(self.n, "n", 16)

    @property
    def spacing(self) -> float:
        """h, the distance of two points."""
        return 2 * self.half / (self.n - 1)

    @property
    def axis(self) -> Tensor:
        """The coordinates `(n,)` of one side, float64."""
        return torch.linspace(-self.half, self.half, self.n, dtype=torch.float64)

    @property
    def points(self) -> Tensor:
        """All points `(n * n, 2)`, float64, the first coordinate changing slowest."""
        return torch.cartesian_prod(self.axis, self.axis)

    def law(self, log_density: Callable[[Tensor], Tensor], *, chunk: int = 20_000) -> GridLaw:
        """The normalised law of an unnormalised log-density: points `(B, 2)` -> `(B,)` nats.

        Raises:
            UserError: values that are NaN or +inf, or a law that does not vanish at the edges.
        """
        with torch.no_grad():
            values = torch.cat([log_density(part).to(torch.float64) for part in self.points.split(chunk)])
        return GridLaw.of(self, values.reshape(self.n, self.n))


@dataclass(frozen=True, kw_only=True, eq=False)
class GridLaw:
    """A normalised law on a `Plane`.

    Attributes:
        plane: where.
        log_p: `(n, n)` nats, its log-density.
        log_z: log Z, what was taken off the log-density that it was made from.
    """

    plane: Plane
    log_p: Tensor = field(repr=False)
    log_z: float

    @classmethod
    def of(cls, plane: Plane, values: Tensor) -> GridLaw:
        """The law proportional to exp `values` `(n, n)`.

        Raises:
            UserError: as `Plane.law`.
        """
        if bool((values.isnan() | (values == math.inf)).any()):
            raise UserError(
                "got a log-density with NaN or +inf on the grid, so the energy is not bounded there; expected finite values: "
                "train longer, or with a smaller learning rate"
            )
        edges = torch.cat([values[0], values[-1], values[:, 0], values[:, -1]])
        if float(edges.max() - values.max()) > math.log(1e-5):
            raise UserError(
                f"got a law with {float((edges.max() - values.max()).exp()):.1g} of its largest density at the edges of "
                f"[-{plane.half:g}, {plane.half:g}]^2; expected next to nothing, or it cannot be normalised: train longer, or "
                "take a larger half"
            )
        log_z = float(values.flatten().logsumexp(0)) + 2 * math.log(plane.spacing)
        return cls(plane=plane, log_p=values - log_z, log_z=log_z)

    @property
    def mass(self) -> Tensor:
        """Probabilities `(n, n)` of the cells."""
        return (self.log_p + 2 * math.log(self.plane.spacing)).exp()

    def blurred(self, sigma: float) -> tuple[GridLaw, Tensor]:
        """The law of x + sigma eps, and its score at the points, `(n, n, 2)`.

        Raises:
            UserError: a sigma below the spacing, which the grid does not resolve.
        """
        if sigma < self.plane.spacing:
            raise UserError(
                f"got sigma={sigma:.3g} on a grid of spacing {self.plane.spacing:.3g}; expected no less: take a larger n"
            )
        distance = self.plane.axis.unsqueeze(1) - self.plane.axis
        kernel = (-distance.square() / (2 * sigma**2)).exp() / math.sqrt(2 * math.pi * sigma**2)
        slope = -distance / sigma**2 * kernel
        q = kernel @ self.mass @ kernel.T
        tiny = torch.finfo(torch.float64).tiny
        score = torch.stack([slope @ self.mass @ kernel.T, kernel @ self.mass @ slope.T], dim=2) / (q + tiny).unsqueeze(
            2
        )
        return GridLaw(plane=self.plane, log_p=(q + tiny).log(), log_z=0.0), score

    def kl(self, other: GridLaw) -> float:
        """KL(this, other) in nats."""
        seen = self.mass > 0
        return float((self.mass * (self.log_p - other.log_p))[seen].sum())

    def fisher(self, score: Tensor, other: Tensor) -> float:
        """E |score - other|^2 under this law, of two fields `(n, n, 2)`."""
        seen = self._seen
        return float(self.mass[seen] @ (score - other)[seen].square().sum(dim=1))

    def field(self, score: Callable[[Tensor], Tensor], *, chunk: int = 20_000) -> Tensor:
        """`score`, points `(B, 2)` -> `(B, 2)`, at the points where the law has mass; 0 elsewhere: `(n, n, 2)`, float64."""
        seen = self._seen
        points = self.plane.points.reshape(self.plane.n, self.plane.n, 2)[seen]
        found = torch.zeros(self.plane.n, self.plane.n, 2, dtype=torch.float64)
        found[seen] = torch.cat([score(part).detach().to(torch.float64) for part in points.split(chunk)])
        return found

    @property
    def _seen(self) -> Tensor:
        return self.log_p > self.log_p.max() + math.log(_NEGLIGIBLE)
