"""The data sets that a command line or a run folder calls by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.cache import mapped
from data.cifar import cifar10
from data.dataset import Dataset
from data.errors import DataError
from data.idx import fashion_mnist, mnist
from data.numpy_files import arrays
from data.picture_folder import image_folder
from data.sklearn_digits import digits
from data.third_party import hugging_face, torchvision_dataset
from data.two_dimensional import checkerboard, gaussians, moons, pinwheel, rings, spirals, swiss_roll

__all__ = ["available", "create", "options"]

_DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "arrays": arrays,
    "image_folder": image_folder,
    "mapped": mapped,
    "hugging_face": hugging_face,
    "torchvision": torchvision_dataset,
    "swiss_roll": swiss_roll,
    "moons": moons,
    "gaussians": gaussians,
    "checkerboard": checkerboard,
    "rings": rings,
    "spirals": spirals,
    "pinwheel": pinwheel,
}


def available() -> tuple[str, ...]:
    """Names that `create` takes."""
    return tuple(_DATASETS)


def options(name: str) -> dict[str, bool]:
    """The options that `create(name, ...)` takes beside root, and whether they must be given.

    Raises:
        DataError: an unknown name.
    """
    if name not in _DATASETS:
        raise DataError(f"data set {name!r} is unknown, expected one of {', '.join(_DATASETS)}")
    parameters = inspect.signature(_DATASETS[name]).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.name != "root"}


def create(name: str, root: str | Path | None = None, **given: Any) -> Dataset:
    """The data set of that name.

    Args:
        name: one of `available()`.
        root: where the files are, for data sets that read files (the others have nothing to look for and
            ignore it).
        given: options of the data set's own function.

    Raises:
        DataError: an unknown name or option, or files that are missing or wrong.
    """
    known = options(name)
    for option in given:
        if option not in known:
            raise DataError(
                f"data set {name!r} has no option {option!r}, expected some of: {', '.join(known) or 'none'}"
            )
    for option, required in known.items():
        if required and option not in given:
            raise DataError(f"data set {name!r} needs the option {option!r}, expected a value for it")
    function = _DATASETS[name]
    if "root" in inspect.signature(function).parameters:
        given["root"] = root or None
    return function(**given)
