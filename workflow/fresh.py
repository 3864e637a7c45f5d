"""The model of a run before it was trained, for comparisons that train the same network again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from workflow.trained_run import TrainedRun


def fresh(run: TrainedRun) -> nn.Module:
    """A model like the run's, with the weights that the configuration's seed gives, where the run's is."""
    from workflow.setup import resolve  # it imports the systems

    return resolve(run.setup.config, device=str(run.device)).model
