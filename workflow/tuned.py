"""Samplers of few evaluations that were tuned to a run's own model, kept in its folder.

    RUN/tuned.json     by model and number of evaluations: the tuned sampler, the plain one, and how far each ends from the flow

A run's weights may be trained on, and a class is another model: a tuned sampler serves the very model that it was fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import samplers
from numerics import UserError
from samplers import Sampler
from samplers.tuned import Tuned
from samplers.tuning import Tuning
from workflow.run_folder import read_json
from workflow.trained_run import TrainedRun

FILE, NAME = "tuned.json", "tuned"
"""The file, and the name of what it holds on a command line."""


def keep(run: TrainedRun, found: Tuning) -> None:
    """Puts what was found into the run's folder, in the place of what was there for the same model and evaluations."""

    def stated(errors: Any) -> dict[str, float]:
        return {"mean": float(errors.mean()), "stderr": float(errors.std()) / len(errors) ** 0.5}

    gain, stderr = found.gain
    entry = {
        "model": run.fingerprint,
        "evaluations": found.evaluations,
        "kept": found.kept,
        "tuned": found.tuned.asdict(),
        "plain": found.plain,
        "from_the_flow": {
            "tuned": stated(found.tuned_errors),
            "plain": stated(found.plain_errors),
            "gain": {"mean": gain, "stderr": stderr},
        },
        "samples": len(found.plain_errors),
        "seconds": found.seconds,
        "text": str(found),
    }
    others = [e for e in _entries(run) if (e["model"], e["evaluations"]) != (run.fingerprint, found.evaluations)]
    run.folder.write_json(FILE, {"samplers": [*others, entry]})


@dataclass(frozen=True)
class TunedSamplers:
    """The samplers that a run's folder has for its model, each for its own number of evaluations.

    Raises:
        UserError: where there is none.
    """

    run: TrainedRun

    def __post_init__(self) -> None:
        if not any(e["model"] == self.run.fingerprint for e in _entries(self.run)):
            tuned_sampler(self.run, None)  # says why

    @property
    def evaluations(self) -> int:
        """The fewest."""
        return min(int(e["evaluations"]) for e in _entries(self.run) if e["model"] == self.run.fingerprint)

    def within(self, evaluations: int) -> Sampler:
        """The one for so many, as `tuned_sampler`."""
        return tuned_sampler(self.run, evaluations)


def tuned_sampler(run: TrainedRun, evaluations: int | None) -> Sampler:
    """What a run's folder has for its model: the tuned sampler, or the plain one where that was not worse.

    Args:
        evaluations: of the network; None where there is one choice only.

    Raises:
        UserError: nothing was tuned, for another model, or to other numbers of evaluations; a file that cannot be read.
    """
    entries = _entries(run)
    again = _again(run, evaluations)
    if not entries:
        raise UserError(f"got {run.folder}, in which no sampler was tuned; expected {FILE}: {again}")
    own = [e for e in entries if e["model"] == run.fingerprint]
    if not own:
        raise UserError(
            f"got samplers tuned to other weights, or another class, than those of {run.folder} now; expected its own: {again}"
        )
    fitting = [e for e in own if evaluations in (None, e["evaluations"])]
    if len(fitting) != 1:
        known = ", ".join(str(n) for n in sorted(e["evaluations"] for e in own))
        raise UserError(f"got --steps {evaluations} for a tuned sampler; expected one of {known}, or {again}")
    entry = fitting[0]
    return Tuned.from_dict(entry["tuned"]) if entry["kept"] else samplers.create(**entry["plain"])


def _again(run: TrainedRun, evaluations: int | None) -> str:
    """What would tune a sampler to the run as it is asked."""
    if run.label is not None and not run.of_a_class_alone:
        return "none is tuned to --guidance or to a --caption: take another sampler, such as dpm_solver"
    of = "" if run.label is None else f" --label {run.label}"
    return f"run tune.py --run {run.folder}{of} --nfe {6 if evaluations is None else evaluations}"


def _entries(run: TrainedRun) -> list[dict[str, Any]]:
    file = run.folder.path / FILE
    if not file.exists():
        return []
    found = read_json(file).get("samplers")
    needed = {"model", "evaluations", "kept", "tuned", "plain"}
    if not isinstance(found, list) or not all(isinstance(e, dict) and needed <= e.keys() for e in found):
        raise UserError(
            f"got {file}, which holds no tuned samplers; expected what tune.py writes: delete it, and tune again"
        )
    return found
