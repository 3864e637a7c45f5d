"""How a network is told the time: an object from `(sde, t)` to a label.

The label is computed in float64 and cast once. Published continuous networks are told `999 t` (variance
preserving) or `sigma(t)` (variance exploding); discrete ones an index. What matters to a score is the
noise-to-signal ratio, not the time, so our own networks are told a log-SNR of order one (Kingma et al. 2021),
with a smooth embedding (`models.embeddings`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import Catalogue, UserError
from sde_lib import SDE


class Conditioning(ABC):
    """What a network is told of the time: `label = conditioning(sde, t)`."""

    @abstractmethod
    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """The label, of t's shape, for `t ()` or `(B,)` in [0, T], float64."""


@dataclass(frozen=True, kw_only=True)
class ContinuousTime(Conditioning):
    """`scale * t / T`: 999 t in Song et al. 2021's variance-preserving networks. For the positional embedding.

    Args:
        scale: the label at T.

    >>> from sde_lib import VPSDE
    >>> ContinuousTime()(VPSDE(), torch.tensor(0.5))
    tensor(499.5000)
    """

    scale: float = 999.0

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return t * (self.scale / sde.T)


@dataclass(frozen=True, kw_only=True)
class Sigma(Conditioning):
    """`sigma(t)`, for networks that take its logarithm inside (Song et al. 2021's variance-exploding networks): for the Fourier
    embedding.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.sigma(t)


@dataclass(frozen=True, kw_only=True)
class LogSigma(Conditioning):
    """`scale * log(sigma(t) / alpha(t))`; 1/4 in Karras et al. 2022, table 1.

    Args:
        scale: factor of the logarithm.
    """

    scale: float = 0.25

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.log_snr(t) * (-0.5 * self.scale)


@dataclass(frozen=True, kw_only=True)
class LogSNR(Conditioning):
    """`(log_snr(t) - center) / scale`, our own networks' label: of order one and smooth in t, whatever the
    SDE.

    The defaults map the usual ranges, -10 (VP at T) to 14 (VP at t_min; 28 for sub-VP), into [-1, 1.4] (2.8). For the smooth
    embedding.

    Args:
        center: the log-SNR at which the label is 0.
        scale: the log-SNR, from there, at which it is 1.

    Raises:
        UserError: a scale that is not positive.
    """

    center: float = 0.0
    scale: float = 10.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise UserError(f"got scale={self.scale!r}; expected a number > 0")

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return (sde.log_snr(t) - self.center) / self.scale


@dataclass(frozen=True, kw_only=True)
class DiscreteIndex(Conditioning):
    """The index, 0 to `levels - 1`, of the discrete noise level nearest in t; exact at the levels' own times.

    `reverse=False`: index n is at `t = (n + 1) T / levels` (DDPM; `sde_lib.TableVPSDE`). `reverse=True`:
    index 0 is the largest noise, index n at `t = (1 - n / (levels - 1)) T` (NCSN; `sde_lib.TableVESDE`, and
    `VESDE` for geometric levels).

    Args:
        levels: number of noise levels.
        reverse: whether index 0 is the largest noise.

    Raises:
        UserError: no level.
    """

    levels: int = 1000
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.levels < 1:
            raise UserError(f"got levels={self.levels!r}; expected an integer >= 1")

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        fraction = t / sde.T
        if self.reverse:
            index = (1 - fraction) * (self.levels - 1)
        else:
            index = fraction * self.levels - 1
        return torch.round(index).clamp(0, self.levels - 1)


CONDITIONINGS: Catalogue[Conditioning] = Catalogue(
    "conditioning",
    {
        "continuous_time": ContinuousTime,
        "time": ContinuousTime,
        "sigma": Sigma,
        "log_sigma": LogSigma,
        "log_snr": LogSNR,
        "discrete_index": DiscreteIndex,
    },
)
"""How a network is told the time, by name; "time" is short for "continuous_time"."""
