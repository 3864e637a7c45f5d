"""Samples of a run measured beside held-out data, as an entry of its results.json: what evaluate.py and the table write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data import Dataset
from evaluation import EvaluationReport, Features, Memorisation, evaluate_samples, memorisation
from workflow.trained_run import TrainedRun

SEARCHED = 1000
"""Samples, and held-out data, at most, whose nearest training data are looked for among all of them."""


def measure(
    run: TrainedRun,
    made: Tensor,
    *,
    features: Features,
    sampler: str,
    nfe: int,
    split: str = "test",
    label: int | None = None,
    measures: Sequence[str] | None = None,
) -> tuple[str, EvaluationReport, Memorisation]:
    """Measures samples `(n, *)`, stored as the data are, and writes that under `evaluation` in results.json; the other entries
    there stay. Returns the entry's name, and what was found.

    Args:
        sampler: the code that makes what drew them.
        nfe: evaluations of the network for a batch.
        split: held-out data.
        label: the class that they were drawn of.
        measures: of `evaluation.evaluate_samples`; all unless given.
    """
    asked = None if measures is None else tuple(measures)
    report = evaluate_samples(made, run.dataset, features=features, split=split, measures=asked)
    held_out, training = (run.dataset.split(name).x.flatten(1) for name in (split, "train"))
    copies = memorisation(made[:SEARCHED].flatten(1), held_out[:SEARCHED], training)
    of = f"class {label} by " if label is not None else ""
    name = f"{of}{sampler} in {features.name}"
    own: dict[str, Any] = {**report.to_dict(), "sampler": sampler, "label": label, "nfe": nfe}
    own["nearest"] = {"space": space(run.dataset), **copies.to_dict()}
    before = run.folder.results().get("evaluation", {})
    entries = before.items() if isinstance(before, dict) else ()
    kept = {key: e for key, e in entries if isinstance(e, dict) and "measures" in e}
    run.folder.update_results({"evaluation": {**kept, name: own}})
    return name, report, copies


def space(dataset: Dataset) -> str:
    """In what distances to the nearest training data are measured."""
    return "coordinates" if dataset.levels is None else "grey values"
