r"""NCSNv2: NCSN with noise levels, step and network by rule (Song and Ermon 2020, arXiv:2006.09011).

    technique 1   sigma_1 = the largest distance between two of the data
    technique 2   sigma_{i-1} / sigma_i = gamma with C(gamma) = 0.5, see `sde_lib.noise_levels`
    technique 3   score = s(x) / sigma: the network is told no noise level
    technique 4   the step that leaves a level's variance nearest to the level's own, for a score that is linear
    technique 5   averaged weights; and a denoising at the end of the chain (algorithm 1)

Values that are None follow the rules from the data; given ones stand, as in the preset cifar10, whose 232 levels are the
paper's where the rule at exactly 0.5 has 219 (C = 0.567). By technique 3 the score is known at every sigma, so that the SDE
view has no steps in it: the run also draws by predictor and corrector, and scores by the flow.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

import models
import samplers
from numerics import Catalogue, UserError, require_count, require_positive, require_range
from samplers import AnnealedLangevin, Correction
from sde_lib import noise_levels
from workflow.low_density import low_density
from workflow.sections import section, set_value
from workflow.sigma_ladder import LadderLangevin, SigmaLadder, cifar10
from workflow.system import Config
from workflow.systems.ncsn import NCSN

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.trained_run import TrainedRun


@dataclass(frozen=True, kw_only=True)
class RuledLadder:
    """Sigmas by techniques 1 and 2.

    Args:
        sigma_max: the largest; None for the largest distance between two of the first 10,000 data.
        sigma_min: the smallest.
        levels: L; None for as many as have ratios nearest to technique 2's.
        mass: C of technique 2, where `levels` is None.
    """

    sigma_max: float | None = None
    sigma_min: float = 0.01
    levels: int | None = None
    mass: float = 0.5

    def __post_init__(self) -> None:
        require_positive(self.sigma_min, "sigma_min")
        require_range(self.mass, "mass", 1e-3, 0.99)
        if self.sigma_max is not None:
            require_positive(self.sigma_max, "sigma_max")
        if self.levels is not None:
            require_count(self.levels, "levels", 2)

    def on(self, distance: float, D: int) -> SigmaLadder:
        """The ladder for data of D numbers whose largest distance is `distance`."""
        largest = distance if self.sigma_max is None else self.sigma_max
        levels = self.levels
        if levels is None:
            levels = noise_levels.number_of_levels(largest, self.sigma_min, D, mass=self.mass)
        return SigmaLadder(levels=levels, sigma_max=largest, sigma_min=self.sigma_min)


@dataclass(frozen=True, kw_only=True)
class RuledLangevin(LadderLangevin):
    """Annealed Langevin dynamics with technique 4's step, and a denoising at the end.

    Args:
        steps: T, Langevin steps a level.
        step_size: e of `samplers.AnnealedLangevin`, twice the paper's; None for technique 4's.
        stretch: how many times technique 4's step, where `step_size` is None.
        corrections: of the score, see `samplers.corrections`.
    """

    steps: int = 5
    step_size: float | None = None
    stretch: float = 1.0
    corrections: tuple[Correction, ...] = ()

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")
        require_positive(self.stretch, "stretch")
        if self.step_size is not None:
            require_positive(self.step_size, "step_size")

    def on(self, ladder: SigmaLadder) -> AnnealedLangevin:
        ruled = self.stretch * 2 * noise_levels.langevin_step(ladder.ratio, ladder.sigma_min, self.steps)
        return self.walk(ladder, ruled if self.step_size is None else self.step_size)


_CIFAR10: Mapping[str, Any] = {
    **cifar10(levels=232, sigma_max=50.0, network="ncsnv2_cifar10"),
    "training.steps": 300_000,
    "training.learning_rate": 1e-4,
    "training.warmup": 1,
    "training.ema": (0.999,),
    "training.eval_every": 10_000,
    "training.checkpoint_every": 10_000,
    "sampling.sampler.step_size": 1.24e-5,  # twice the paper's 6.2e-6
    "sampling.sampler.stretch": 1.0,
}

LADDERS: Catalogue[RuledLadder] = Catalogue("ladder", {"ncsnv2": RuledLadder})
SAMPLERS = samplers.SAMPLERS.extended({"ald": RuledLangevin})


class NCSNv2(NCSN):
    """The ladder, the step and the network by rule."""

    name = "ncsnv2"
    about = (
        "NCSNv2 (Song and Ermon 2020, arXiv:2006.09011): noise levels and Langevin step by rule, a network that is told no "
        "noise level; annealed Langevin dynamics, predictor-corrector and the exact likelihood of the SDE's flow."
    )

    def get_config(self) -> ConfigDict:
        """The digits' settings: a small RefineNet of the paper's kind."""
        config = super().get_config()
        config.system = self.name
        config.threads = 2  # a third less time on two free cores
        config.sde = section(LADDERS, "ncsnv2")
        set_value(config.model, "name", "ncsnv2", models.NETWORKS)
        config.model.channels = 16
        # one level of 1: the network's output is eps whatever the noise, which is technique 3 up to the sign
        config.model.sigmas = (1.0,)
        config.model.centered = True
        config.model.parametrization = section(models.PARAMETRIZATIONS, "noise")
        config.model.conditioning = section(models.CONDITIONINGS, "discrete_index", levels=1, reverse=True)
        # of 24 channels an update takes nearly twice as long, and a network that is told no noise needs many of them
        config.training.steps, config.training.batch_size = 1500, 64
        # technique 4 reckons with a pull that grows with the distance, as a Gaussian's does; a network whose layers normalise
        # pulls no harder from afar, and in 5 such steps falls behind the levels (an FD of 9.8, of longer ones 5.1)
        config.sampling.sampler = section(SAMPLERS, "ald", stretch=3.7)
        config.sampling.second = section(SAMPLERS, "pc", steps=100)
        # the network is rougher in x than one that is told the noise
        config.likelihood.limit = 100
        return config

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """The digits, and CIFAR-10 as published: the paper's 232 levels, its step and its network, for GPUs."""
        return {"digits": {}, "cifar10": _CIFAR10}

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the ruled ladder and Langevin."""
        own = {"sde": LADDERS, "sampling.sampler": SAMPLERS, "sampling.second": SAMPLERS}
        return {**super().catalogues, **own}

    def ladder(self, config: Config) -> SigmaLadder:
        """The ladder of the section `sde`, by the data where values are left open."""
        made: RuledLadder = LADDERS.make(config["sde"])
        distance, D = _of_data(json.dumps(dict(config["data"]), sort_keys=True, default=str), made.sigma_max is None)
        if made.sigma_max is None and not distance > made.sigma_min:
            raise UserError(
                f"got sigma_min={made.sigma_min} for data whose largest distance is {distance:.3g}; expected less"
            )
        return made.on(distance, D)

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The rules' numbers, and the picture of why there are noise levels."""
        ladder = self.ladder(run.setup.config)
        D = run.dataset.dim
        gamma = ladder.ratio
        walks = (s for s in run.setup.samplers.values() if isinstance(s, AnnealedLangevin))
        sampler = next(walks, None) or RuledLangevin().on(ladder)  # what the rule would have taken, where others draw
        step = (sampler.step_size or 0.0) / 2
        found = low_density()
        entry = {
            "levels": ladder.levels,
            "sigma_max": ladder.sigma_max,
            "sigma_min": ladder.sigma_min,
            "gamma": gamma,
            "mass": noise_levels.overlap(gamma, D),
            "step": step,
            "variance_left": noise_levels.variance_left(step / ladder.sigma_min**2, gamma, sampler.steps),
        }
        folder.update_results({"noise_levels": entry, "low_density": found.asdict()})
        found.save(folder.path / "low_density.png")
        shares = found.asdict()
        lines = [
            f"{ladder.levels} levels from {ladder.sigma_max:.3g} to {ladder.sigma_min:g}: neighbours' ratio {gamma:.4f}, "
            f"C = {entry['mass']:.3f} in {D} dimensions. The step {step:.3g}, {sampler.steps} times a level, leaves a level's "
            f"variance at {entry['variance_left']:.3f} of it.",
            "",
            "Why there are levels, on an exact score: the share of the heavier of two modes, which is 0.8, is "
            f"{shares['langevin']:.3f} by Langevin from a uniform start and {shares['annealed']:.3f} by annealed Langevin of "
            f"as many steps (± {shares['stderr']:.3f}).",
        ]
        folder.add_section("Noise levels", [*lines, "", "![low density](low_density.png)"])
        print("\n" + "\n".join(lines))


@functools.cache
def _of_data(section: str, wanted: bool) -> tuple[float, int]:
    """The largest distance between two of the training data (0 where it is not wanted), and their dimension."""
    from workflow.setup import load_data  # it imports the systems

    dataset, transform = load_data(json.loads(section))
    x = dataset.split("train").x
    return noise_levels.largest_distance(transform.centres(x[:10_000])) if wanted else 0.0, dataset.dim


get_config = NCSNv2().get_config
