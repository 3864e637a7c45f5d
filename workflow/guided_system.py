"""A system whose model is told labels, classes or captions, and is asked what they are good for.

Its study has scales of guidance; its labels are hidden now and then in training, without which there is no guidance; what it
finds is one entry of results.json and one section of report.md.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ml_collections import ConfigDict

import sde_lib
from numerics import Catalogue, UserError, argument_help
from samplers import SAMPLERS
from workflow.defaults import base_config
from workflow.guidance_scales import GuidanceStudy
from workflow.sections import fields_section, section
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

S = TypeVar("S", bound=GuidanceStudy)


class GuidedSystem(System, Generic[S]):
    """A score with labels, and a study of them, whose options are the configuration's section of the system's name.

    Attributes:
        kind: of the study.
        unlabelled: what hidden labels stand for.
        hidden: how often labels may be hidden, as an example.
        heading: of the section in report.md.
    """

    kind: ClassVar[type[GuidanceStudy]]
    unlabelled: ClassVar[str]
    hidden: ClassVar[float]
    heading: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.help = {f"{cls.name}.{option}": text for option, text in argument_help(cls.kind).items()}

    def guided_config(self) -> ConfigDict:
        """What such systems begin with: a VP score, its labels told and some of them hidden."""
        config = base_config(self.name)
        config.sde = section(sde_lib.SDES, "vp")
        config.model.class_conditional = True
        config.training.label_dropout = self.hidden
        # guidance is drawn without noise of its own, so that a scale's effect is seen on one noise
        config.sampling.sampler = section(SAMPLERS, "ddim", steps=20)
        # bits/dim of each image given its label
        config.likelihood.label = "own"
        config[self.name] = fields_section(self.kind)
        return config

    def study(self, config: Config) -> S:
        """What is measured."""
        made: S = Catalogue("study", {self.name: self.kind}).create(self.name, **config[self.name])  # type: ignore[assignment]
        return made

    def check(self, config: Config) -> None:
        """A study, and a model that can be guided."""
        self.study(config)
        dropout = config["training"]["label_dropout"]
        if not 0 < dropout < 1:
            raise UserError(
                f"got config.training.label_dropout={dropout:g} for the system {self.name}; expected a number between 0 and 1, "
                f"such as {self.hidden:g}: guidance needs both the score given a label and that {self.unlabelled}"
            )

    @abstractmethod
    def few(self, study: S, setup: Setup) -> Mapping[str, Any]:
        """The options of a study that takes seconds."""

    def rehearsal(self, setup: Setup) -> Setup:
        """A study that takes seconds, with little learned."""
        few = self.few(self.study(setup.config), setup)
        return replace(setup, config={**setup.config, self.name: {**setup.config[self.name], **few}})

    @abstractmethod
    def measure(self, run: TrainedRun, folder: RunFolder, study: S) -> tuple[dict[str, Any], list[str]]:
        """The study: its entry in results.json, and the lines of its section in report.md."""

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """Runs the study and reports it."""
        begun = time.perf_counter()
        results, lines = self.measure(run, folder, self.study(run.setup.config))
        folder.update_results({self.name: {**results, "seconds": time.perf_counter() - begun}})
        folder.add_section(self.heading, lines)
        print("\n" + "\n".join(line for line in lines if not line.startswith("![")))


def shown(pictures: Iterable[tuple[str, str]]) -> list[str]:
    """The lines of report.md that show pictures, each a caption and a file."""
    return [line for caption, file in pictures for line in (f"{caption}:", "", f"![{caption}]({file})", "")]
