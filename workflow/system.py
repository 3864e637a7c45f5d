"""What a system is: DDPM, NCSN, a score SDE … as one object.

A configuration names a system and holds its values. A `System` says what follows from them: which SDE the model is a score
of, what is minimised, which samplers are its own, and what it measures and draws beyond the samples and the bits/dim that
every run gets. Nothing outside a system asks which one it has: config.json names it, and `workflow.systems` finds it.

A system is one file of `workflow/systems/`, with its `get_config()` and its object, and one line in the catalogue there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ml_collections import ConfigDict
from torch import nn

import data
import models
import samplers
import sde_lib
import training
from data import Dataset
from data.transforms import Transform
from numerics import Catalogue
from samplers import Sampler
from sde_lib import SDE
from training import Callback, Objective
from workflow.score_model import score_model

if TYPE_CHECKING:
    from workflow.draw import Drawn, Samples
    from workflow.run_folder import RunFolder
    from workflow.score import Scored
    from workflow.setup import Setup
    from workflow.survey import Surveyed
    from workflow.trained_run import TrainedRun

Config = Mapping[str, Any]
"""A resolved configuration in plain types: what config.json holds."""


class System(ABC):
    """One system of the field. A subclass overrides what is its own.

    Attributes:
        name: what a command line and config.json call it.
        about: the text of its `--help`.
        switches: flags of its own without a value, and the paths of the values that they set to True.
        no_score: of a system whose model is no score: what to use where one is asked for, as in "its samples come from its own
            chain". Such a system brings `model` and `draw`, and its configuration has no samplers.
        no_likelihood: of a system that says nothing of a density: why, for results.json and report.md.
        counts_evaluations: whether `effort` counts evaluations of the network for one sample, one of training as three: a dry
            run prices them by the speed of training.
        help: what the values that only this system has say in `--help`, by dotted path.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    switches: ClassVar[Mapping[str, str]] = {}
    no_score: ClassVar[str] = ""
    no_likelihood: ClassVar[str] = ""
    counts_evaluations: ClassVar[bool] = False
    help: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def get_config(self) -> ConfigDict:
        """Its configuration with the defaults; see `workflow.defaults.base_config`."""

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """The dotted path of every section, and what makes it; parts of these need not be named."""
        return {
            "data": data.DATASETS,
            "sde": sde_lib.SDES,
            "model": models.NETWORKS,
            "model.parametrization": models.PARAMETRIZATIONS,
            "model.conditioning": models.CONDITIONINGS,
            "training.objective": training.OBJECTIVES,
            "sampling.sampler": samplers.SAMPLERS,
            "sampling.second": samplers.SAMPLERS,
        }

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """Whole settings by name, each as changes of `get_config()` by dotted path; `digits` is what holds without a choice.
        Scores of images share those of `workflow.presets`."""
        return {"digits": {}}

    def sde(self, config: Config) -> SDE:
        """The SDE that the model is a score of, from the section `sde`."""
        made: SDE = self.catalogues["sde"].make(config["sde"])
        return made

    def model(self, config: Config, sde: SDE, dataset: Dataset, transform: Transform, data_std: float) -> nn.Module:
        """The model, with weights from the configuration's seed: a score, unless the system has another.

        Args:
            sde: of `sde`.
            dataset, transform: the data, and the map to model units.
            data_std: the standard deviation of the training data in model units.
        """
        return score_model(config, sde, dataset, transform, data_std)

    def objective(self, config: Config) -> Objective:
        """What is minimised, from the section `training.objective`."""
        made: Objective = self.catalogues["training.objective"].make(config["training"]["objective"])
        return made

    def sampler(self, config: Config, section: Config) -> Sampler:
        """The sampler of a section of `sampling`."""
        made: Sampler = self.catalogues["sampling.sampler"].make(section)
        return made

    def check(self, config: Config) -> None:  # noqa: B027 (most have nothing more to check)
        """Refuses values of its own, before anything is written.

        Raises:
            UserError: a value that does not fit.
        """

    def settled(self, setup: Setup) -> Setup:
        """The set-up, with what follows from its data."""
        return setup

    def callbacks(self, setup: Setup, folder: RunFolder) -> Sequence[Callback]:
        """What looks at the training beside the bound and the samples of a score, such as a validation curve of its own."""
        return ()

    def draw(self, run: TrainedRun) -> Mapping[str, Drawn]:
        """Samples, by the name of what drew them: as pictures, and under `sampling` in results.json."""
        from workflow.draw import draw  # it imports the systems

        return draw(run)

    def samples(self, run: TrainedRun, n: int, *, first: int = 0, seed: int | None = None) -> Samples:
        """Samples number `first` to `first + n` of its own (first) sampler, for whoever measures them; `draw` makes the run's
        pictures. Sample i is the same for any `n` and `first`.

        Args:
            seed: of their noise; the run's unless given.
        """
        from workflow.draw import samples  # it imports the systems

        return samples(run, n, first=first, seed=seed)

    def score(self, run: TrainedRun) -> Scored | Surveyed | None:
        """The bits/dim, also in results.json; None where they come from no flow, and are in results.json alone."""
        from workflow.score import say_none  # it imports the systems
        from workflow.survey import score_run

        if not self.no_likelihood:
            return score_run(run)
        say_none(run, self.no_likelihood)
        return None

    def rehearsal(self, setup: Setup) -> Setup:
        """The set-up of a dry run, from one whose training, sampling and scoring are already short."""
        return setup

    def effort(self, setup: Setup, images: int) -> float:
        """How much work `finish` is on that many images, in units of its own, or in evaluations (`counts_evaluations`); a dry
        run's seconds are scaled by it."""
        return 0.0

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:  # noqa: B027
        """Measures and draws what is its own, after samples and bits/dim: into results.json, report.md and the terminal."""
