r"""DDPM and NCSN as their papers wrote them: a table, a loss over its rows, an algorithm that walks them.

    DDPM  x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps,  i = 1 ... N;  L_simple;  ancestral sampling
                                                          (Ho et al. 2020, arXiv:2006.11239, equations (2), (14), algorithm 2)
    NCSN  x_i = x_0 + sigma_i eps,  sigma_1 > ... > sigma_L geometric;  L_SMLD;  annealed Langevin dynamics
                                                          (Song and Ermon 2019, arXiv:1907.05600, equation (6), algorithm 1)

Each is a table on which an SDE passes: DDPM's step i stands at t = i/N, NCSN's level i at t = (L - i)/(L - 1), and there the
kernel of `TableVPSDE` or `TableVESDE` is the chain's. So the very same network is a score at all times between them, and
every sampler and likelihood that knows `(sde, score)` takes it. Before its first row a table says nothing: DDPM's SDE view
ends at t = 1/N, where sigma/alpha is 0.01; NCSN's ends at its smallest sigma, which stands at t = 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from ml_collections import ConfigDict

from numerics import UserError
from samplers import Ancestral, AnnealedLangevin, DDPMIndices, PredictorCorrector, Sampler, Uniform
from sde_lib import SDE, TableVESDE, TableVPSDE, geometric_sigmas, linear_betas
from training import SMLD, DDPMSimple, DiscreteTime, Objective


class Chain(ABC):
    """A frozen, keyword-only dataclass whose fields are those of `config.sde`, but for the name.

    Attributes:
        algorithm: the name of its own sampling algorithm, as in `samplers.available()`.
    """

    algorithm: str

    @property
    @abstractmethod
    def sde(self) -> SDE:
        """The SDE through the table."""

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """The paper's loss, at the table's rows only."""

    @abstractmethod
    def sampler(self, options: ConfigDict, steps: int) -> Sampler:
        """The paper's algorithm, from `config.sampling`, in `steps`."""


@dataclass(frozen=True, kw_only=True)
class DDPM(Chain):
    """Betas rising linearly from `beta_first` to `beta_last` in N = `steps` steps."""

    steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 0.02

    algorithm = "ancestral"

    @property
    def sde(self) -> TableVPSDE:
        first = 1 / self.steps if self.steps > 0 else 1.0
        betas = linear_betas(steps=self.steps, first=self.beta_first, last=self.beta_last)
        return TableVPSDE(betas=betas, t_min=first, t_end=first)

    @property
    def objective(self) -> DDPMSimple:
        return DDPMSimple(times=DiscreteTime(levels=self.steps))

    def sampler(self, options: ConfigDict, steps: int) -> PredictorCorrector:
        """Algorithm 2: `steps` transitions between rows of the table, all N - 1 for 0, and the mean of the last,
        p(x_0 | x_1), which is Tweedie's."""
        steps = steps or self.steps - 1
        if not 1 <= steps < self.steps:
            raise UserError(
                f"got {steps} steps of {self.algorithm} for a chain of config.sde.steps={self.steps}; expected 1 to "
                f"{self.steps - 1} transitions between its rows, or 0 for all"
            )
        return PredictorCorrector(
            predictor=Ancestral(variance=options.variance),
            corrector=None,
            steps=steps,
            grid=DDPMIndices(train_steps=self.steps),
        )


@dataclass(frozen=True, kw_only=True)
class NCSN(Chain):
    """Sigmas falling geometrically from `sigma_max` to `sigma_min` in L = `levels`."""

    levels: int = 10
    sigma_max: float = 1.0
    sigma_min: float = 0.01

    algorithm = "ald"

    @property
    def sde(self) -> TableVESDE:
        sigmas = geometric_sigmas(largest=self.sigma_max, smallest=self.sigma_min, levels=self.levels)
        return TableVESDE(sigmas=sigmas, t_end=0.0)

    @property
    def objective(self) -> SMLD:
        return SMLD(times=DiscreteTime(levels=self.levels, zero=True))

    def sampler(self, options: ConfigDict, steps: int) -> AnnealedLangevin:
        """Algorithm 1 with `steps` Langevin steps a level, and one denoising at the end (Song and Ermon 2020,
        arXiv:2006.09011, algorithm 1)."""
        return AnnealedLangevin(
            levels=self.levels, steps=steps, step_size=options.step_size, grid=Uniform(), denoise=True
        )


_NAMES: dict[str, type[DDPM] | type[NCSN]] = {"ddpm": DDPM, "ncsn": NCSN}


def of(config: ConfigDict) -> DDPM | NCSN | None:
    """The chain that `config.sde` names; None where it names an SDE."""
    options = config.sde.to_dict()
    kind = _NAMES.get(options.pop("name"))
    return None if kind is None else kind(**options)
