"""What a network's output means: one hub, the noise.

A noisy sample is `x = alpha x_0 + sigma eps`. A network may be taught any fixed combination of `x_0` and
`eps`; given `x` and `(alpha, sigma)` each of them determines the others. So a parametrisation says what its
output means, `noise` and `target`, and everything else follows from `eps`:

    score = -eps / sigma,    x_0 = (x - sigma eps) / alpha,    v = alpha eps - sigma x_0.

`data` says `x_0` once more, in the form that loses no digits where alpha is small. Nothing assumes `alpha^2 +
sigma^2 = 1`: all hold for variance-exploding and sub-VP kernels as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from numerics import Catalogue, UserError, expand_as


class Parametrization(ABC):
    """What a network's output means, given `x = alpha x_0 + sigma eps`.

    In all methods `output`, `x`, `x_0`, `eps` are `(B, *)`, and `alpha`, `sigma` are `()` or `(B,)`, float64 if they can be.
    """

    @abstractmethod
    def noise(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of `eps` that `output` stands for, in the dtype of `x`."""

    @abstractmethod
    def data(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of `x_0` that `output` stands for, in the dtype of `x`."""

    @abstractmethod
    def target(self, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should output at `x = alpha x_0 + sigma eps`."""

    def scale_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network is shown of `x`."""
        return x


@dataclass(frozen=True, kw_only=True)
class Noise(Parametrization):
    """The output is the noise (Ho et al. 2020, equation (11)): `eps = output`, `x_0 = (x - sigma output) / alpha`."""

    def noise(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output.to(x.dtype)

    def data(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - expand_as(sigma, x) * output) / expand_as(alpha, x)

    def target(self, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps


@dataclass(frozen=True, kw_only=True)
class Data(Parametrization):
    """The output is the denoised sample: `x_0 = output`, `eps = (x - alpha output) / sigma`."""

    def noise(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - expand_as(alpha, x) * output) / expand_as(sigma, x)

    def data(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return output.to(x.dtype)

    def target(self, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_0


@dataclass(frozen=True, kw_only=True)
class Velocity(Parametrization):
    """The output is `v = alpha eps - sigma x_0` (Salimans and Ho 2022, section 4), so

    eps = (alpha v + sigma x) / (alpha^2 + sigma^2),   x_0 = (alpha x - sigma v) / (alpha^2 + sigma^2).
    """

    def noise(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        total = alpha.square() + sigma.square()
        return expand_as(alpha / total, x) * output + expand_as(sigma / total, x) * x

    def data(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        total = alpha.square() + sigma.square()
        return expand_as(alpha / total, x) * x - expand_as(sigma / total, x) * output

    def target(self, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return expand_as(alpha, eps) * eps - expand_as(sigma, x_0) * x_0


@dataclass(frozen=True, kw_only=True)
class ScoreOutput(Parametrization):
    """The output is the score (Song et al. 2021, the variance-exploding networks): `eps = -sigma output`, `x_0 = (x + sigma^2
    output) / alpha`.
    """

    def noise(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return expand_as(-sigma, x) * output

    def data(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x + expand_as(sigma.square(), x) * output) / expand_as(alpha, x)

    def target(self, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps / expand_as(-sigma, eps)


@dataclass(frozen=True, kw_only=True)
class Preconditioned(Parametrization):
    """EDM's preconditioning (Karras et al. 2022, section 5 and table 1) under any linear SDE.

    With `s = sqrt(alpha^2 data_std^2 + sigma^2)`, the standard deviation of `x` for data of standard
    deviation `data_std`, the network sees `x / s` and outputs `F = (sigma x_0 / data_std - alpha data_std
    eps) / s`: both of variance one at every time. Then

        eps = (sigma / s^2) x - (alpha data_std / s) F,    x_0 = (alpha data_std^2 / s^2) x + (sigma data_std / s) F.

    `F` is what is left to learn once the data's variance is known: `F = 0` gives the exact score of a
    Gaussian `N(0, data_std^2)`. The probability flow of the whitened state `x / s` has `-(alpha sigma
    data_std / s^2) F` as its whole slope in the clock `log(sigma / alpha)`.

    Args:
        data_std: standard deviation of the data in model units, one number.

    Raises:
        UserError: a data_std that is not positive.

    >>> import torch
    >>> one = torch.ones(())
    >>> Preconditioned(data_std=0.5).scale_input(torch.tensor([[1.0, 2.0]]), one, one)  # x / sqrt(0.25 + 1)
    tensor([[0.8944, 1.7889]])
    """

    data_std: float = 0.5

    def __post_init__(self) -> None:
        if not self.data_std > 0:
            raise UserError(f"got data_std={self.data_std!r}; expected the data's standard deviation, a number > 0")

    def spread(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """`s`, the standard deviation of x, time-like."""
        return (alpha.square() * self.data_std**2 + sigma.square()).sqrt()

    def noise(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        s = self.spread(alpha, sigma)
        return expand_as(sigma / s.square(), x) * x - expand_as(alpha * self.data_std / s, x) * output

    def data(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        s = self.spread(alpha, sigma)
        kept = alpha * self.data_std**2 / s.square()
        return expand_as(kept, x) * x + expand_as(sigma * self.data_std / s, x) * output

    def target(self, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        s = self.spread(alpha, sigma)
        return expand_as(sigma / (self.data_std * s), x_0) * x_0 - expand_as(alpha * self.data_std / s, eps) * eps

    def scale_input(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x / expand_as(self.spread(alpha, sigma), x)


@dataclass(frozen=True, kw_only=True)
class Difference(Parametrization):
    """The output is `eps - x_0`, so

        eps = (x + alpha output) / (alpha + sigma),   x_0 = (x - sigma output) / (alpha + sigma).

    On the straight path `alpha = 1 - t, sigma = t` that is the velocity of rectified flow (Liu, Gong, Liu 2023,
    arXiv:2209.03003, whose time runs the other way), and both divisions are by one.
    """

    def noise(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x + expand_as(alpha, x) * output) / expand_as(alpha + sigma, x)

    def data(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (x - expand_as(sigma, x) * output) / expand_as(alpha + sigma, x)

    def target(self, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps - x_0


NOISE = Noise()
DATA = Data()
VELOCITY = Velocity()
SCORE = ScoreOutput()
DIFFERENCE = Difference()

PARAMETRIZATIONS: Catalogue[Parametrization] = Catalogue(
    "parametrization",
    {
        "noise": Noise,
        "data": Data,
        "velocity": Velocity,
        "score": ScoreOutput,
        "difference": Difference,
        "preconditioned": Preconditioned,
    },
)
"""What a network's output means, by name."""
