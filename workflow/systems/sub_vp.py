r"""sub-VP, whose variance is bounded by VP's at every time.

    dx = -beta(t)/2 x dt + sqrt(beta(t) (1 - exp(-2 B(t)))) dw,      B(t) = integral of beta from 0 to t

(Song et al. 2021, arXiv:2011.13456, section 3.4, equation (12)). Trained, sampled and scored as VP is.
"""

from __future__ import annotations

from sde_lib import SubVPSDE
from workflow.systems.score_sde import ScoreSDE


class SubVP(ScoreSDE):
    """The sub-VP SDE, trained at continuous times."""

    name = "sub_vp"
    about = "sub-VP (Song et al. 2021, arXiv:2011.13456, section 3.4): train, sample and score in exact bits/dim."
    kind = SubVPSDE


get_config = SubVP().get_config
