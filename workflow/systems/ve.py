r"""VE, the continuous limit of NCSN.

    dx = sigma(t) sqrt(2 log(sigma_max / sigma_min)) dw,      sigma(t) = sigma_min (sigma_max / sigma_min)^t

(Song et al. 2021, arXiv:2011.13456, equation (9)). Trained, sampled and scored as VP is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sde_lib import VESDE
from workflow.systems.score_sde import ScoreSDE


class VE(ScoreSDE):
    """The VE SDE, trained at continuous times."""

    name = "ve"
    about = "VE, the continuous limit of NCSN (Song et al. 2021, arXiv:2011.13456): train, sample and score in exact bits/dim."
    kind = VESDE
    # sigma_max: about the largest distance between two images (Song and Ermon 2020, technique 1), 9.0 for the digits
    changes: ClassVar[Mapping[str, Any]] = {"sigma_max": 10.0}


get_config = VE().get_config
