r"""DDPM as it was (Ho et al. 2020, arXiv:2006.11239), and the same network as a VP score.

    x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps,   i = 1 ... N              equation (2)
    L_simple = E_i |eps - eps_hat(x_i, i)|^2                                      equation (14)
    x_{i-1} = (x_i - beta_i / sqrt(1 - abar_i) eps_hat) / sqrt(1 - beta_i) + sigma_i z      algorithm 2

Step i stands at t = i/N of `TableVPSDE`, whose kernel there is the chain's. So the network is a score at all times between
the steps too, and every sampler and likelihood that knows `(sde, score)` takes it. Before its first row a table says nothing:
the SDE view ends at t = 1/N, where sigma/alpha is 0.01.

The run draws by algorithm 2 and in 20 steps of an ODE solver through the SDE view. It scores by the chain's variational bound
(`workflow.chain_bound`), `vlb` in results.json, and by the exact likelihood of the SDE's flow, `bits_per_dim`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ml_collections import ConfigDict

import models
import samplers
from numerics import Catalogue, UserError, require_choice, require_count
from samplers import Ancestral, Correction, DDPMIndices, PredictorCorrector, Sampler
from sde_lib import TableVPSDE
from training import DDPMSimple, DiscreteTime, linear_betas
from workflow import chain_bound, presets
from workflow.defaults import base_config
from workflow.sections import section
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun


@dataclass(frozen=True, kw_only=True)
class BetaChain:
    """Betas rising linearly from `beta_first` to `beta_last` in N = `steps` steps."""

    steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 0.02

    def __post_init__(self) -> None:
        require_count(self.steps, "steps", 2)

    @property
    def sde(self) -> TableVPSDE:
        """The SDE through the table, from its first row on."""
        betas = linear_betas(steps=self.steps, first=self.beta_first, last=self.beta_last)
        return TableVPSDE(betas=betas, t_min=1 / self.steps, t_end=1 / self.steps)


@dataclass(frozen=True, kw_only=True)
class Algorithm2:
    """Ancestral sampling over the chain's own rows, in `steps` transitions.

    Args:
        steps: transitions between rows, 1 to N - 1, which is all of them; the mean of p(x_0 | x_1) ends the run.
        variance: "posterior" (beta~) or "transition" (beta), section 3.2.
        corrections: of the score, see `samplers.corrections`.
    """

    steps: int = 999
    variance: Literal["posterior", "transition"] = "posterior"
    corrections: tuple[Correction, ...] = ()

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")
        require_choice(self.variance, "variance", ("posterior", "transition"))

    def on(self, chain: BetaChain) -> PredictorCorrector:
        """The sampler of that chain."""
        if self.steps >= chain.steps:
            raise UserError(
                f"got {self.steps} steps of ancestral sampling for a chain of config.sde.steps={chain.steps}; expected 1 to "
                f"{chain.steps - 1} transitions between its rows"
            )
        return PredictorCorrector(
            predictor=Ancestral(variance=self.variance),
            corrector=None,
            steps=self.steps,
            grid=DDPMIndices(train_steps=chain.steps),
            corrections=self.corrections,
        )


CHAINS: Catalogue[BetaChain] = Catalogue("chain", {"ddpm": BetaChain})
OBJECTIVES: Catalogue[Any] = Catalogue("objective", {"ddpm_simple": DDPMSimple}, derived=("times", "t_min"))
SAMPLERS = samplers.SAMPLERS.extended({"ancestral": Algorithm2})


class DDPM(System):
    """The chain, trained with L_simple."""

    name = "ddpm"
    about = (
        "DDPM (Ho et al. 2020, arXiv:2006.11239): a chain of betas trained with L_simple; ancestral sampling; the chain's "
        "bound beside the exact likelihood of the SDE's flow."
    )

    def get_config(self) -> ConfigDict:
        """The digits' settings, on a chain of 1,000 betas."""
        config = base_config("ddpm")
        config.sde = section(CHAINS, "ddpm")
        # the network predicts the noise from x itself. Its label stays the log-SNR, not the index: the flow asks between rows
        config.model.parametrization = section(models.PARAMETRIZATIONS, "noise")
        # The learning rate and the averages stay those of a run of minutes: the paper's 2e-4 and 0.9999 are for 800,000
        # steps. The paper trained on grey values as they are. With 17 levels, 12 sigma_1 apart, a network that has done so
        # knows nothing between them, where the flow's likelihood asks. dequantize=False trains as in the paper, for the
        # bound alone
        config.training.dequantize = True
        config.training.objective = section(OBJECTIVES, "ddpm_simple")
        config.sampling.sampler = section(SAMPLERS, "ancestral")
        # draws of step and noise for each image's bound
        config.bound = ConfigDict({"draws": 64})
        return config

    @property
    def presets(self) -> Mapping[str, presets.Changes]:
        """Those of a score of images."""
        return presets.of(self.name)

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the chain in place of an SDE."""
        own = {"sde": CHAINS, "training.objective": OBJECTIVES, "sampling.sampler": SAMPLERS}
        return {**super().catalogues, **own}

    def chain(self, config: Config) -> BetaChain:
        """The chain of the section `sde`."""
        made: BetaChain = CHAINS.make(config["sde"])
        return made

    def sde(self, config: Config) -> TableVPSDE:
        """The SDE through the chain's table."""
        return self.chain(config).sde

    def objective(self, config: Config) -> DDPMSimple:
        """L_simple, over the chain's steps."""
        made: DDPMSimple = OBJECTIVES.make(config["training"]["objective"])
        return replace(made, times=DiscreteTime(levels=self.chain(config).steps))

    def sampler(self, config: Config, section: Config) -> Sampler:
        """Algorithm 2 walks this chain; other samplers take the SDE view."""
        made = SAMPLERS.make(section)
        return made.on(self.chain(config)) if isinstance(made, Algorithm2) else made

    def check(self, config: Config) -> None:
        """The bound's draws."""
        require_count(config["bound"]["draws"], "config.bound.draws", 2)

    def rehearsal(self, setup: Setup) -> Setup:
        """With four draws for the bound."""
        return replace(setup, config={**setup.config, "bound": {"draws": min(4, setup.config["bound"]["draws"])}})

    def effort(self, setup: Setup, images: int) -> float:
        """Draws of the bound."""
        return float(images * setup.config["bound"]["draws"])

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The chain's variational bound, beside the flow's likelihood."""
        steps = self.chain(run.setup.config).steps - 1
        chain_bound.report_bound(run, folder, steps=steps, draws=run.setup.config["bound"]["draws"])


get_config = DDPM().get_config
