r"""VP, the continuous limit of DDPM.

    dx = -beta(t)/2 x dt + sqrt(beta(t)) dw,      beta rising linearly from beta_min to beta_max

(Song et al. 2021, arXiv:2011.13456, equation (11)). Trains a score model by denoising score matching, draws by
predictor-corrector sampling and in 20 steps of DPM-Solver++, and scores in exact bits/dim by the probability flow.
"""

from __future__ import annotations

from ml_collections import ConfigDict

import sde_lib
from workflow.defaults import base_config
from workflow.sections import section
from workflow.system import System


def get_config() -> ConfigDict:
    """The digits' settings, on `sde_lib.VPSDE`."""
    config = base_config("vp")
    config.sde = section(sde_lib.SDES, "vp")
    return config


class VP(System):
    """The VP SDE, trained at continuous times."""

    name = "vp"
    about = "VP, the continuous limit of DDPM (Song et al. 2021, arXiv:2011.13456): train, sample and score in exact bits/dim."

    def get_config(self) -> ConfigDict:
        """See the module's function."""
        return get_config()
