r"""VE, the continuous limit of NCSN.

    dx = sigma(t) sqrt(2 log(sigma_max / sigma_min)) dw,      sigma(t) = sigma_min (sigma_max / sigma_min)^t

(Song et al. 2021, arXiv:2011.13456, equation (9)). Trained, sampled and scored as VP is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from numerics import Catalogue
from sde_lib import SDE, VESDE
from workflow.defaults import base_config
from workflow.sections import section
from workflow.system import System

SDES: Catalogue[SDE] = Catalogue("SDE", {"ve": VESDE})


def get_config() -> ConfigDict:
    """The digits' settings, on `sde_lib.VESDE`."""
    config = base_config("ve")
    # sigma_max: about the largest distance between two images (Song and Ermon 2020, technique 1), 9.0 for the digits
    config.sde = section(SDES, "ve", sigma_max=10.0)
    return config


class VE(System):
    """The VE SDE, trained at continuous times."""

    name = "ve"
    about = "VE, the continuous limit of NCSN (Song et al. 2021, arXiv:2011.13456): train, sample and score in exact bits/dim."

    def get_config(self) -> ConfigDict:
        """See the module's function."""
        return get_config()

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With this SDE alone."""
        return {**super().catalogues, "sde": SDES}
