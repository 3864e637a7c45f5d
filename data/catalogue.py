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

__all__ = ["available", "create"]

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


def create(name: str, root: str | Path | None = None, **options: Any) -> Dataset:
    """The data set of that name.

    Args:
        name: one of `available()`.
        root: where the files are, for data sets that read files (the others have nothing to look for and
            ignore it).
        options: of the data set's own function.

    Raises:
        DataError: an unknown name or option, or files that are missing or wrong.
    """
    if name not in _DATASETS:
        raise DataError(f"data set {name!r} is unknown, expected one of {', '.join(_DATASETS)}")
    function = _DATASETS[name]
    known = inspect.signature(function).parameters
    for option in options:
        if option not in known or option == "root":
            names = ", ".join(parameter for parameter in known if parameter != "root") or "none"
            raise DataError(f"data set {name!r} has no option {option!r}, expected some of: {names}")
    for parameter in known.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise DataError(f"data set {name!r} needs the option {parameter.name!r}, expected a value for it")
    if "root" in known:
        options["root"] = root or None
    return function(**options)
