r"""NCSN as it was (Song and Ermon 2019, arXiv:1907.05600), and the same network as a VE score.

    x_i = x_0 + sigma_i eps,   sigma_1 > ... > sigma_L geometric
    L_SMLD = E_i 1/2 |eps - eps_hat(x_i, sigma_i)|^2                                        equations (5), (6)
    for each level, K times:   x <- x + a_i / 2 score + sqrt(a_i) z,   a_i = e sigma_i^2 / sigma_L^2      algorithm 1

The ladder is that of `workflow.sigma_ladder`: the network is a score at all times between the levels too, and the SDE view ends
at the smallest sigma, which stands at t = 0.

The digits' network is a U-Net that is told log sigma; `--preset=conditional` has the paper's, a RefineNet whose normalisations
have weights of their own for each level, and `--preset=cifar10` all that was published: ten levels from 1 to 0.01, where the
second paper's rules give 219 from 50 (`ncsnv2`).

The run draws by annealed Langevin dynamics over its levels, with one denoising at the end (Song and Ermon 2020,
arXiv:2006.09011, algorithm 1), and in 20 steps of an ODE solver through the SDE view. It scores by the exact likelihood of
the SDE's flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ml_collections import ConfigDict

import samplers
from numerics import Catalogue, UserError, require_count, require_positive
from samplers import AnnealedLangevin, Correction, Sampler
from sde_lib import TableVESDE, geometric_sigmas
from training import SMLD, DiscreteTime
from workflow import presets
from workflow.defaults import base_config
from workflow.sections import section
from workflow.sigma_ladder import LadderLangevin, SigmaLadder, cifar10
from workflow.system import Config, System


@dataclass(frozen=True, kw_only=True)
class Algorithm1(LadderLangevin):
    """Annealed Langevin dynamics over the ladder's levels.

    Args:
        steps: K, Langevin steps a level.
        step_size: e, the step at the smallest sigma.
        denoise: whether Tweedie's mean ends the chain, which the second paper added.
        corrections: of the score, see `samplers.corrections`.
    """

    steps: int = 100
    step_size: float = 2e-5
    denoise: bool = True
    corrections: tuple[Correction, ...] = ()

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")
        require_positive(self.step_size, "step_size")

    def on(self, ladder: SigmaLadder) -> AnnealedLangevin:
        return self.walk(ladder, self.step_size, denoise=self.denoise)


LADDERS: Catalogue[SigmaLadder] = Catalogue("ladder", {"ncsn": SigmaLadder})
OBJECTIVES: Catalogue[Any] = Catalogue("objective", {"smld": SMLD}, derived=("times", "t_min"))
SAMPLERS = samplers.SAMPLERS.extended({"ald": Algorithm1})


# the network of the paper's kind, with weights of its own for each of the digits' levels; its output is the score
_CONDITIONAL: presets.Changes = {
    "model.name": "ncsn",
    "model.channels": 24,
    "model.sigmas": geometric_sigmas(levels=23, largest=10.0, smallest=0.01),
    "model.centered": True,
    "model.parametrization": "score",
    "model.conditioning": "discrete_index",
    "model.conditioning.levels": 23,
    "model.conditioning.reverse": True,
    "training.steps": 1000,
    "training.batch_size": 64,
    "likelihood.limit": 100,
}
# the paper's, and where it is silent its code's (ermongroup/ncsn, configs/anneal.yml); the code steps twice as far, 4e-5
_CIFAR10: presets.Changes = {
    **cifar10(levels=10, sigma_max=1.0, network="ncsn_cifar10"),
    "model.conditioning": "discrete_index",
    "model.conditioning.reverse": True,
    "training.steps": 200_000,
    "training.learning_rate": 1e-3,
    "training.warmup": 0,
    "training.clip": None,
    "training.ema": (),
    "training.eval_every": 5000,
    "training.checkpoint_every": 5000,
    "sampling.sampler.steps": 100,
    "sampling.sampler.step_size": 2e-5,
    "sampling.sampler.denoise": False,
}


class NCSN(System):
    """The ladder, trained with L_SMLD."""

    name = "ncsn"
    about = (
        "NCSN (Song and Ermon 2019, arXiv:1907.05600): a ladder of sigmas trained with the SMLD loss; annealed Langevin "
        "dynamics; the exact likelihood of the SDE's flow."
    )

    def get_config(self) -> ConfigDict:
        """The digits' settings, on a ladder of 23 sigmas."""
        config = base_config("ncsn")
        # The first paper's ten levels from 1 to 0.01 leave gaps (and a prior of sigma 1 hides nothing of images in [-1, 1]), so
        # the ladder follows the second (Song and Ermon 2020, arXiv:2006.09011): sigma_max about the largest distance between
        # two images (9.04), technique 1; as many levels as give their technique 2's 0.5 (0.47 for 23 in 64 dimensions)
        config.sde = section(LADDERS, "ncsn", levels=23, sigma_max=10.0)
        config.training.objective = section(OBJECTIVES, "smld")
        # step_size: the first paper's, which on the second's technique 4 leaves the variance 5 % too large at each level (its
        # best for 40 steps, 1.2e-5, leaves 4 %)
        config.sampling.sampler = section(SAMPLERS, "ald", steps=40)
        return config

    @property
    def presets(self) -> Mapping[str, presets.Changes]:
        """Those of a score of images; the paper's kind of network on the digits; and CIFAR-10 as published, for GPUs."""
        return {**presets.of(self.name), "conditional": _CONDITIONAL, "cifar10": _CIFAR10}

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the ladder in place of an SDE."""
        own = {
            "sde": LADDERS,
            "training.objective": OBJECTIVES,
            "sampling.sampler": SAMPLERS,
            "sampling.second": SAMPLERS,
        }
        return {**super().catalogues, **own}

    def ladder(self, config: Config) -> SigmaLadder:
        """The ladder of the section `sde`."""
        made: SigmaLadder = LADDERS.make(config["sde"])
        return made

    def sde(self, config: Config) -> TableVESDE:
        """The SDE through the ladder."""
        return self.ladder(config).sde

    def objective(self, config: Config) -> SMLD:
        """L_SMLD, over the ladder's levels; every level counts alike."""
        made: SMLD = OBJECTIVES.make(config["training"]["objective"])
        return replace(made, times=DiscreteTime(levels=self.ladder(config).levels, zero=True))

    def check(self, config: Config) -> None:
        """A network that looks levels up has those of the ladder.

        Raises:
            UserError: another number of levels, in its weights or in what it is told.
        """
        levels, own = self.ladder(config).levels, config["model"].get("sigmas") or ()
        if config["model"].get("conditional", False) and len(own) != levels:
            raise UserError(
                f"got config.sde.levels={levels} for a network with weights for {len(own)}; expected as many: set "
                "config.model.sigmas and config.model.conditioning.levels too, or take --preset=conditional"
            )
        told = config["model"]["conditioning"]
        if config["model"].get("conditional", False) and told.get("levels") != levels:
            raise UserError(
                f"got config.model.conditioning={told['name']!r} of {told.get('levels', 'no')} levels for a network with "
                f"weights for {levels}; expected as many: set config.model.conditioning=discrete_index and "
                f"config.model.conditioning.levels={levels}"
            )

    def sampler(self, config: Config, section: Config) -> Sampler:
        """Annealed Langevin walks this ladder; other samplers take the SDE view."""
        made = self.catalogues["sampling.sampler"].make(section)
        return made.on(self.ladder(config)) if isinstance(made, LadderLangevin) else made


get_config = NCSN().get_config
