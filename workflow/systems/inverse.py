r"""Inverse problems: an unconditional VP score, asked for images given measurements of them.

    y = A x + n z,      grad log p(x_t | y) = score + grad log p(y | x_t)

The run trains a score of images as `vp` does, and restores test images by every method of `guidance.posterior` and of the
samplers Replacement, RePaint, DDNM and TwistedSMC: inpainting, super-resolution, deblurring, compressed sensing, denoising, and
colourisation where there are colours (`workflow.inverse_problems`). With `inverse.sr3_steps` a network that is trained for
super-resolution alone stands beside them (`workflow.shown_measurement`). It is what `controllable_generation` is in the code of
Song et al. 2021 (arXiv:2011.13456, section 5 and appendix I), for any linear measurement with noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from ml_collections import ConfigDict

import sde_lib
from numerics import require_count, require_positive
from workflow import inverse_problems, presets
from workflow.defaults import base_config
from workflow.sections import section
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun


class Inverse(System):
    """A score of images, and inverse problems solved with it."""

    name = "inverse"
    about = (
        "Inverse problems: an unconditional VP score restores test images from measurements, by every posterior method; PSNR, "
        "coverage and contact sheets."
    )
    help: ClassVar[Mapping[str, str]] = {
        "inverse.images": "test images that are restored",
        "inverse.samples": "posterior samples of each",
        "inverse.steps": "steps of the samplers",
        "inverse.std": "standard deviation of the measurement's noise, in model units",
        "inverse.methods": "names of the methods",
        "inverse.sr3_steps": "updates of a network that is trained for super-resolution and shown the measurement; 0 for none",
        "inverse.problems": "names of the problems; those that the images do not have are left out",
    }

    def get_config(self) -> ConfigDict:
        """The digits' settings of `vp`, and what is restored."""
        config = base_config(self.name)
        config.sde = section(sde_lib.SDES, "vp")
        # noise std in model units, where images are in [-1, 1]; methods: names of workflow.inverse_problems
        config.inverse = ConfigDict(
            {
                "images": 8,
                "samples": 4,
                "steps": 50,
                "std": 0.1,
                "methods": tuple(inverse_problems.METHODS),
                "problems": tuple(inverse_problems.PROBLEMS),
                "sr3_steps": 0,
            }
        )
        return config

    @property
    def presets(self) -> Mapping[str, presets.Changes]:
        """Those of VP; of larger images what is restored in minutes."""
        few = inverse_problems.FEW
        return {
            name: {
                **changes,
                **({f"inverse.{key}": value for key, value in few.items()} if name == "fashion_mnist" else {}),
            }
            for name, changes in presets.of("vp").items()
        }

    def check(self, config: Config) -> None:
        """What is restored, and how."""
        asked = config["inverse"]
        for name, least in (("images", 2), ("samples", 2), ("steps", 1), ("sr3_steps", 0)):
            require_count(asked[name], f"config.inverse.{name}", least)
        require_positive(asked["std"], "config.inverse.std")
        inverse_problems.check_names(asked["methods"], asked["problems"], "config.inverse.")

    def settled(self, setup: Setup) -> Setup:
        """As it is, where the data are images that have one of the problems.

        Raises:
            UserError: where they have none, before anything is trained.
        """
        asked = setup.config["inverse"]
        inverse_problems.chosen_problems(
            asked["problems"], tuple(setup.dataset.event_shape), "config.inverse.", sr3_steps=asked["sr3_steps"]
        )
        return setup

    def rehearsal(self, setup: Setup) -> Setup:
        """Two images, two samples, four steps, and a network that has learned nothing."""
        asked = setup.config["inverse"]
        few = {"images": 2, "samples": 2, "steps": 4, "sr3_steps": min(2, asked["sr3_steps"])}
        return replace(setup, config={**setup.config, "inverse": {**asked, **few}})

    def effort(self, setup: Setup, images: int) -> float:
        """Images times samples times steps; an image in an update of a network of its own costs a hundredth as much as one in
        such a step, which all methods take for all problems."""
        asked = setup.config["inverse"]
        restored = asked["images"] * asked["samples"] * asked["steps"]
        return float(restored + asked["sr3_steps"] * setup.options.batch_size / 100)

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """Restores test images and the model's own."""
        asked = run.setup.config["inverse"]
        inverse_problems.report_inverse(
            run,
            folder,
            images=asked["images"],
            samples=asked["samples"],
            steps=asked["steps"],
            std=asked["std"],
            methods=asked["methods"],
            problems=asked["problems"],
            sr3_steps=asked["sr3_steps"],
        )
