r"""VP, the continuous limit of DDPM.

    dx = -beta(t)/2 x dt + sqrt(beta(t)) dw,      beta rising linearly from beta_min to beta_max

(Song et al. 2021, arXiv:2011.13456, equation (11)). Trains a score model by denoising score matching, draws by
predictor-corrector sampling and in 20 steps of DPM-Solver++, and scores in exact bits/dim by the probability flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from numerics import Catalogue
from sde_lib import SDE, VPSDE
from workflow.defaults import base_config
from workflow.sections import section
from workflow.system import System

SDES: Catalogue[SDE] = Catalogue("SDE", {"vp": VPSDE})


def get_config() -> ConfigDict:
    """The digits' settings, on `sde_lib.VPSDE`."""
    config = base_config("vp")
    config.sde = section(SDES, "vp")
    return config


class VP(System):
    """The VP SDE, trained at continuous times."""

    name = "vp"
    about = "VP, the continuous limit of DDPM (Song et al. 2021, arXiv:2011.13456): train, sample and score in exact bits/dim."

    def get_config(self) -> ConfigDict:
        """See the module's function."""
        return get_config()

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With this SDE alone."""
        return {**super().catalogues, "sde": SDES}
