r"""DDPM as it was (Ho et al. 2020, arXiv:2006.11239), and the same network as a VP score.

    x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) eps,   i = 1 ... N              equation (2)
    L_simple = E_i |eps - eps_hat(x_i, i)|^2                                      equation (14)
    x_{i-1} = (x_i - beta_i / sqrt(1 - abar_i) eps_hat) / sqrt(1 - beta_i) + sigma_i z      algorithm 2

Step i stands at t = i/N of `TableVPSDE`, whose kernel there is the chain's. So the network is a score at all times between
the steps too, and every sampler and likelihood that knows `(sde, score)` takes it. Before its first row a table says nothing:
the SDE view ends at t = 1/N, where sigma/alpha is 0.01.

The run draws by algorithm 2 and in 20 steps of an ODE solver through the SDE view. It scores by the chain's variational bound
(`workflow.chain_bound`), `vlb` in results.json, term by term over the levels for either variance (`bound_levels.png`), and by
the exact likelihood of the SDE's flow, `bits_per_dim`. On points in the plane it also draws the process both ways with some
particles' paths (`process.gif`), and the means of reverse steps beside those of the data's own law (`reverse_means.png`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ml_collections import ConfigDict, FieldReference

import models
import samplers
from numerics import Catalogue, UserError, require_choice, require_count
from samplers import Ancestral, Correction, DDPMIndices, PredictorCorrector, Sampler
from sde_lib import TableVPSDE
from training import DSM, WEIGHTINGS, DDPMSimple, DiscreteTime, Objective, linear_betas, with_terminal_snr
from workflow import chain_bound, presets
from workflow.defaults import base_config
from workflow.sections import section
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun


class BetaTable(Protocol):
    """What a chain is: N steps, and the SDE through their table."""

    @property
    def steps(self) -> int: ...

    @property
    def sde(self) -> TableVPSDE: ...


@dataclass(frozen=True, kw_only=True)
class BetaChain:
    """Betas rising linearly from `beta_first` to `beta_last` in N = `steps` steps.

    Args:
        steps: N, at least 2.
        beta_first, beta_last: of the table.
        terminal_snr: where given, the table is rescaled so that (alpha / sigma)^2 at T is this, and the first row stays (Lin
            et al. 2023, arXiv:2305.08891, algorithm 1, which takes 0; a score needs alpha > 0).
    """

    steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 0.02
    terminal_snr: float | None = None

    def __post_init__(self) -> None:
        require_count(self.steps, "steps", 2)

    @property
    def sde(self) -> TableVPSDE:
        """The SDE through the table, from its first row on."""
        betas = linear_betas(steps=self.steps, first=self.beta_first, last=self.beta_last)
        if self.terminal_snr is not None:
            betas = with_terminal_snr(betas, self.terminal_snr)
        return TableVPSDE(betas=betas, t_min=1 / self.steps, t_end=1 / self.steps)


@dataclass(frozen=True, kw_only=True)
class Algorithm2:
    """Ancestral sampling over the chain's own rows, in `steps` transitions.

    Args:
        steps: transitions between rows, 1 to N - 1, which is all of them; the mean of p(x_0 | x_1) ends the run.
        variance: "posterior" (beta~) or "transition" (beta), section 3.2; "learned" where the system learns it.
        spacing: of the rows where there are fewer steps, "leading", "trailing" or "linspace" (`DDPMIndices`).
        corrections: of the score, see `samplers.corrections`.
    """

    steps: int = 999
    variance: Literal["posterior", "transition", "learned"] = "posterior"
    spacing: str = "leading"
    corrections: tuple[Correction, ...] = ()

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")
        require_choice(self.variance, "variance", ("posterior", "transition", "learned"))
        require_choice(self.spacing, "spacing", DDPMIndices.spacings)

    def on(self, chain: BetaTable) -> PredictorCorrector:
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
            grid=DDPMIndices(train_steps=chain.steps, spacing=self.spacing),
            corrections=self.corrections,
        )


CHAINS: Catalogue[BetaChain] = Catalogue("chain", {"ddpm": BetaChain})
OBJECTIVES: Catalogue[Any] = Catalogue(
    "objective",
    {"ddpm_simple": DDPMSimple, "dsm": DSM},
    parts={"weighting": WEIGHTINGS},
    derived=("times", "t_min"),
)
SAMPLERS = samplers.SAMPLERS.extended({"ancestral": Algorithm2})


class DDPM(System):
    """The chain, trained with L_simple."""

    name = "ddpm"
    counts_evaluations = True
    about = (
        "DDPM (Ho et al. 2020, arXiv:2006.11239): a chain of betas trained with L_simple; ancestral sampling; the chain's "
        "bound beside the exact likelihood of the SDE's flow."
    )
    help: ClassVar[Mapping[str, str]] = {
        "training.steps": "number of updates in all; None for 1,500 of images or 5,000 of points",
        "bound.level_draws": "draws of noise for each image and level of the bound's picture; 0 for no picture",
        "bound.level_images": "images of that picture",
    }

    def get_config(self) -> ConfigDict:
        """The digits' settings, on a chain of 1,000 betas."""
        config = self.chain_config(section(CHAINS, "ddpm"))
        config.training.objective = section(OBJECTIVES, "ddpm_simple")
        # points need more: of uniform steps few are at the small noise that shapes a curve (the swiss roll, 500 test points:
        # 1.799 ± 0.021 bits/dim after 1,500 updates, 1.441 ± 0.026 after 5,000)
        config.training.steps = FieldReference(None, field_type=object)
        config.sampling.sampler = section(SAMPLERS, "ancestral")
        # draws of step and noise for each image's bound; of image and noise for each level's term (0: no such picture), of so
        # many images
        config.bound = ConfigDict({"draws": 64, "level_draws": 16, "level_images": 64})
        return config

    def chain_config(self, chain: ConfigDict) -> ConfigDict:
        """What every system on a chain shares."""
        config = base_config(self.name)
        config.sde = chain
        # the network predicts the noise from x itself. Its label stays the log-SNR, not the index: the flow asks between rows
        config.model.parametrization = section(models.PARAMETRIZATIONS, "noise")
        # The learning rate and the averages stay those of a run of minutes: the paper's 2e-4 and 0.9999 are for 800,000
        # steps. The paper trained on grey values as they are. With 17 levels, 12 sigma_1 apart, a network that has done so
        # knows nothing between them, where the flow's likelihood asks. dequantize=False trains as in the paper, for the
        # bound alone
        config.training.dequantize = True
        return config

    @property
    def presets(self) -> Mapping[str, presets.Changes]:
        """Those of a score of images."""
        return presets.of(self.name)

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the chain in place of an SDE."""
        own = {
            "sde": CHAINS,
            "training.objective": OBJECTIVES,
            "sampling.sampler": SAMPLERS,
            "sampling.second": SAMPLERS,
        }
        return {**super().catalogues, **own}

    def chain(self, config: Config) -> BetaTable:
        """The chain of the section `sde`."""
        made: BetaTable = self.catalogues["sde"].make(config["sde"])
        return made

    def sde(self, config: Config) -> TableVPSDE:
        """The SDE through the chain's table."""
        return self.chain(config).sde

    def objective(self, config: Config) -> Objective:
        """L_simple, or another weighting of the same loss, over the chain's steps."""
        made: DDPMSimple | DSM = self.catalogues["training.objective"].make(config["training"]["objective"])
        return replace(made, times=DiscreteTime(levels=self.chain(config).steps))

    def sampler(self, config: Config, section: Config) -> Sampler:
        """Algorithm 2 walks this chain; other samplers take the SDE view."""
        made = self.catalogues["sampling.sampler"].make(section)
        return made.on(self.chain(config)) if isinstance(made, Algorithm2) else made

    def check(self, config: Config) -> None:
        """The bound's draws."""
        require_count(config["bound"]["draws"], "config.bound.draws", 2)
        if config["bound"]["level_draws"] != 0:
            require_count(config["bound"]["level_draws"], "config.bound.level_draws", 4)
        require_count(config["bound"]["level_images"], "config.bound.level_images", 1)

    def rehearsal(self, setup: Setup) -> Setup:
        """With four draws for the bound, and of each level's term."""
        bound = setup.config["bound"]
        few = {
            "draws": min(4, bound["draws"]),
            "level_draws": min(4, bound["level_draws"]),
            "level_images": min(8, bound["level_images"]),
        }
        return replace(setup, config={**setup.config, "bound": few})

    def effort(self, setup: Setup, images: int) -> float:
        """Draws of the bound, and of its levels' terms for two variances."""
        bound = setup.config["bound"]
        return float(2 * images * bound["draws"] + 2 * self.chain(setup.config).steps * bound["level_draws"])

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The chain's variational bound, beside the flow's likelihood; pictures of both ways of the process."""
        from workflow import chain_levels, process_pictures

        chain, bound = self.chain(run.setup.config), run.setup.config["bound"]
        chain_bound.report_bound(run, folder, steps=chain.steps - 1, draws=bound["draws"])
        if bound["level_draws"]:
            chain_levels.report_levels(
                run,
                folder,
                {name: name for name in ("posterior", "transition")},
                rows=chain.steps,
                draws=bound["level_draws"],
                images=bound["level_images"],
            )
        if run.dataset.event_shape == (2,):
            process_pictures.report_process(run, folder, steps=chain.steps)


get_config = DDPM().get_config
