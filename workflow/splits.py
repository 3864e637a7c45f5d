"""The splits of a data set that a run trains on, looks at and scores."""

from __future__ import annotations

from data import Dataset, Split
from numerics import UserError, require_choice, require_count
from workflow.system import Config


def training_splits(training: Config, dataset: Dataset) -> tuple[Split, Split, bool]:
    """What is trained on, what is validated on, and whether the second is part of the first.

    Args:
        training: has `split`, "train" or "fit" (without the validation samples), and `validation`, how many of these to score.

    Raises:
        UserError: another split, or "fit" for data that set nothing aside.
    """
    name, n = training["split"], training["validation"]
    require_choice(name, "split", ("train", "fit"))
    require_count(n, "validation", 0)
    chosen = dataset.split(name)
    if "validation" in dataset.split_names:
        return chosen, dataset.split("validation"), name == "train" and "validation" not in dataset.splits
    if name == "fit":
        raise UserError(f"got split='fit' for {dataset.name}, which sets nothing aside; expected 'train'")
    return chosen, chosen.take(slice(max(0, len(chosen) - n) if n else None, None)), True


def checked_split(dataset: Dataset, name: str) -> Split:
    """The split of that name; a name that does not exist is refused."""
    if name not in dataset.split_names:
        raise UserError(f"got the split {name!r} of {dataset.name}; expected one of {', '.join(dataset.split_names)}")
    return dataset.split(name)
