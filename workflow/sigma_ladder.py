"""A ladder of sigmas and annealed Langevin dynamics over it: what NCSN and NCSNv2 have in common.

    x_i = x_0 + sigma_i eps,   sigma_1 > ... > sigma_L geometric

Level i stands at t = (L - i) / (L - 1) of `TableVESDE`, so that the ladder's network is a score at all times between the levels
too. The systems differ in where sigmas and step come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numerics import UserError, require_count, require_positive
from samplers import AnnealedLangevin, Correction, Uniform
from samplers.annealed_langevin import require_stable
from sde_lib import TableVESDE, geometric_sigmas


@dataclass(frozen=True, kw_only=True)
class SigmaLadder:
    """Sigmas falling geometrically from `sigma_max` to `sigma_min` in L = `levels`.

    Args:
        levels: number of sigmas, at least 2.
        sigma_max: the first and largest sigma.
        sigma_min: the last and smallest sigma.

    Raises:
        UserError: fewer levels, or sigmas that are not 0 < sigma_min < sigma_max.
    """

    levels: int = 10
    sigma_max: float = 1.0
    sigma_min: float = 0.01

    def __post_init__(self) -> None:
        require_count(self.levels, "levels", 2)
        for name in ("sigma_min", "sigma_max"):
            require_positive(getattr(self, name), name)
        if not self.sigma_min < self.sigma_max:
            raise UserError(
                f"got sigma_max={self.sigma_max:g} and sigma_min={self.sigma_min:g}; expected sigma_min < sigma_max"
            )

    @property
    def ratio(self) -> float:
        """gamma, of neighbouring sigmas."""
        return float((self.sigma_max / self.sigma_min) ** (1 / (self.levels - 1)))

    @property
    def sde(self) -> TableVESDE:
        """The SDE through the ladder, down to its smallest sigma."""
        sigmas = geometric_sigmas(levels=self.levels, largest=self.sigma_max, smallest=self.sigma_min)
        return TableVESDE(sigmas=sigmas, t_end=0.0)


class LadderLangevin(ABC):
    """Annealed Langevin dynamics that is told its ladder later: a frozen dataclass with `steps` a level and `corrections`."""

    steps: int
    corrections: tuple[Correction, ...]

    @abstractmethod
    def on(self, ladder: SigmaLadder) -> AnnealedLangevin:
        """The sampler of that ladder; a step with which it diverges is refused here, before the training.

        Raises:
            UserError: such a step.
        """

    def walk(self, ladder: SigmaLadder, step_size: float, *, denoise: bool = True) -> AnnealedLangevin:
        """That sampler, its step at the smallest sigma being `step_size`."""
        require_stable(step_size, ladder.sigma_min)
        return AnnealedLangevin(
            levels=ladder.levels,
            steps=self.steps,
            step_size=step_size,
            grid=Uniform(),
            denoise=denoise,
            corrections=self.corrections,
        )


def cifar10(*, levels: int, sigma_max: float, network: str) -> Mapping[str, Any]:
    """What the CIFAR-10 runs of both papers share: data, network, batches; Adam at one rate all the time."""
    return {
        "threads": 0,
        "data.name": "cifar10",
        "data.low": 0.0,
        "data.high": 1.0,
        "sde.levels": levels,
        "sde.sigma_max": sigma_max,
        "model.name": network,
        "model.channels": 128,
        "model.sigmas": geometric_sigmas(levels=levels, largest=sigma_max, smallest=0.01),
        "model.centered": False,
        "model.parametrization": "score",
        "model.conditioning.levels": levels,
        "training.batch_size": 128,
        "training.schedule": "constant",
        "training.betas": (0.9, 0.999),
        "training.flip": True,
        "training.log_every": 100,
        "baselines": False,
    }
