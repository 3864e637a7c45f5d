"""A second system beside a run: the same data, network and training, in a folder below the run's.

What a page of a paper compares is trained by the same means; this is the one place that does it. The folder is a run folder
like any other, so a tool takes it up, and what has been trained is not trained again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from training import Group, TrainingOptions

if TYPE_CHECKING:
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

_OWN = ("learned_variance", "parametrization", "conditioning")
"""Parts of the section `model` that are a system's own, not the network's size."""


def sub_run(
    run: TrainedRun,
    name: str,
    system: str,
    changes: Mapping[str, Any] | None = None,
    *,
    options: TrainingOptions | None = None,
) -> TrainedRun:
    """Trains `system` beside `run`, in RUN/`name`, or takes up what is there; what changed in the run itself may change there.

    Args:
        changes: of its configuration, by dotted path, beside what it shares with the run.
        options: of its training; the run's unless given.
    """
    # these modules know all systems, and a system's own module asks for this one
    from workflow.configuration import config_for
    from workflow.fit import fit
    from workflow.run_folder import RunFolder
    from workflow.setup import resolve
    from workflow.trained_run import load_run

    common = shared(run.setup)
    setup = resolve(config_for(system, changes={**common, **(changes or {})}), device=str(run.device))
    given = run.setup.options if options is None else options
    setup = replace(setup, options=given, validation=0, protocol=run.setup.protocol)
    folder = RunFolder(run.folder.path / name)
    # what the run shares it has been asked for already
    fit(setup, folder, Group(), resume=True, quiet=True, allow_change=tuple(common))
    return load_run(folder.path, setup=setup)


def shared(setup: Setup) -> dict[str, Any]:
    """What another system has in common with a run, by dotted path: data, network, training, seed."""
    from workflow.sections import leaves

    config = setup.config
    found = {f"data.{path}": value for path, value in leaves(config["data"])}
    found |= {f"model.{path}": v for path, v in leaves(config["model"]) if path.split(".")[0] not in _OWN}
    training = {path: v for path, v in leaves(config["training"]) if path.split(".")[0] != "objective"}
    found |= {f"training.{path}": v for path, v in training.items()}
    return {**found, **{name: config[name] for name in ("seed", "threads", "device")}}
