"""The data sets that a command line or a run folder calls by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.cache import mapped
from data.cifar import cifar10
from data.dataset import Dataset
from data.glyphs import glyphs
from data.idx import fashion_mnist, mnist
from data.numpy_files import arrays
from data.picture_folder import image_folder
from data.sklearn_digits import digits
from data.third_party import hugging_face, torchvision_dataset
from data.two_dimensional import checkerboard, gaussians, moons, pinwheel, rings, spirals, swiss_roll
from numerics.catalogue import Catalogue, Option

__all__ = ["DATASETS", "available", "create", "options"]

DATASETS: Catalogue[Dataset] = Catalogue(
    "data set",
    {
        "digits": digits,
        "glyphs": glyphs,
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
    },
    derived=("name",),  # a section's own name is the data set's
)
"""The data sets by name; an option is an argument of the data set's function."""


def available() -> tuple[str, ...]:
    """Names that `create` takes."""
    return DATASETS.available()


def options(name: str) -> dict[str, Option]:
    """The options of the data set of that name.

    Raises:
        UserError: an unknown name.
    """
    return DATASETS.options(name)


def create(name: str, root: str | Path | None = None, **given: Any) -> Dataset:
    """The data set of that name.

    Args:
        name: one of `available()`.
        root: where the files are, for data sets that read files; the others ignore it.
        given: options of the data set's own function.

    Raises:
        UserError: an unknown name or option, or one that is missing.
        DataError: files that are missing or wrong.
    """
    if "root" in DATASETS.options(name) and root:
        given["root"] = str(root)
    return DATASETS.create(name, **given)
