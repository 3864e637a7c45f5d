r"""sub-VP, whose variance is bounded by VP's at every time.

    dx = -beta(t)/2 x dt + sqrt(beta(t) (1 - exp(-2 B(t)))) dw,      B(t) = integral of beta from 0 to t

(Song et al. 2021, arXiv:2011.13456, section 3.4, equation (12)). Trained, sampled and scored as VP is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from numerics import Catalogue
from sde_lib import SDE, SubVPSDE
from workflow.defaults import base_config
from workflow.sections import section
from workflow.system import System

SDES: Catalogue[SDE] = Catalogue("SDE", {"sub_vp": SubVPSDE})


def get_config() -> ConfigDict:
    """The digits' settings, on `sde_lib.SubVPSDE`."""
    config = base_config("sub_vp")
    config.sde = section(SDES, "sub_vp")
    return config


class SubVP(System):
    """The sub-VP SDE, trained at continuous times."""

    name = "sub_vp"
    about = "sub-VP (Song et al. 2021, arXiv:2011.13456, section 3.4): train, sample and score in exact bits/dim."

    def get_config(self) -> ConfigDict:
        """See the module's function."""
        return get_config()

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With this SDE alone."""
        return {**super().catalogues, "sde": SDES}
