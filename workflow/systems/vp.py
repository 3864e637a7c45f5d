r"""VP, the continuous limit of DDPM.

    dx = -beta(t)/2 x dt + sqrt(beta(t)) dw,      beta rising linearly from beta_min to beta_max

(Song et al. 2021, arXiv:2011.13456, equation (11)). Trains a score model by denoising score matching, draws by
predictor-corrector sampling and in 20 steps of DPM-Solver++, and scores in exact bits/dim by the probability flow.

The settings, such as the digits' learning rate, are those of `workflow/defaults.py`.
"""

from __future__ import annotations

from sde_lib import VPSDE
from workflow.systems.score_sde import ScoreSDE


class VP(ScoreSDE):
    """The VP SDE, trained at continuous times."""

    name = "vp"
    about = "VP, the continuous limit of DDPM (Song et al. 2021, arXiv:2011.13456): train, sample and score in exact bits/dim."
    kind = VPSDE


get_config = VP().get_config
