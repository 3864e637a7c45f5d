"""Data sets of points in the plane, drawn from `data.densities`.

Train and test are independent draws from one seeded stream, so a data set is its arguments. The test points
are not a held-out part of a finite collection: the law is known, and `Dataset.log_prob` is its exact
log-density.
"""

from __future__ import annotations

import torch

from data.dataset import Dataset, Split, check_count
from data.densities import Checkerboard, Density, Gaussians, Moons, Pinwheel, Rings, Spirals, SwissRoll

__all__ = ["checkerboard", "from_density", "gaussians", "moons", "pinwheel", "rings", "spirals", "swiss_roll"]


def from_density(
    density: Density,
    name: str,
    *,
    train: int = 10_000,
    test: int = 10_000,
    validation: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """A data set of independent points (float32) of a density.

    Args:
        density: the law.
        name: name of the data set.
        train: number of training points.
        test: number of test points.
        validation: number of training points set aside.
        seed: seed of the points.

    Raises:
        DataError: a size is not positive, or validation leaves nothing to fit.
    """
    for what, size in (("train", train), ("test", test)):
        check_count(what, size, 1, 2**31 - 1)
    check_count("seed", seed, 0, 2**32 - 1)
    generator = torch.Generator().manual_seed(seed)
    splits, first = {}, 0
    for what, size in (("train", train), ("test", test)):
        points, component = density.sample(size, generator)
        splits[what] = Split(points.float(), component, torch.arange(first, first + size))
        first += size
    return Dataset(name=name, splits=splits, validation=validation, seed=seed, log_prob=density.log_prob)


def swiss_roll(
    *,
    noise: float = 0.1,
    train: int = 10_000,
    test: int = 10_000,
    validation: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """A spiral of one and a half turns: independent points of `SwissRoll`, with their exact log-density.

    Args:
        noise: as in `SwissRoll`.
        train, test, validation, seed: as in `from_density`.

    Raises:
        DataError: as these.
    """
    return from_density(SwissRoll(noise=noise), "swiss_roll", train=train, test=test, validation=validation, seed=seed)


def moons(
    *,
    noise: float = 0.08,
    train: int = 10_000,
    test: int = 10_000,
    validation: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """Two interleaved half circles: independent points of `Moons`, with their exact log-density.

    Args:
        noise: as in `Moons`.
        train, test, validation, seed: as in `from_density`.

    Raises:
        DataError: as these.
    """
    return from_density(Moons(noise=noise), "moons", train=train, test=test, validation=validation, seed=seed)


def gaussians(
    *,
    layout: str = "ring",
    components: int = 8,
    radius: float = 2.0,
    std: float = 0.15,
    train: int = 10_000,
    test: int = 10_000,
    validation: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """Equal Gaussians on a ring or a grid: independent points of `Gaussians`, with their exact log-density.

    Args:
        layout, components, radius, std: as in `Gaussians`.
        train, test, validation, seed: as in `from_density`.

    Raises:
        DataError: as these.
    """
    return from_density(
        Gaussians(layout=layout, components=components, radius=radius, std=std),
        "gaussians",
        train=train,
        test=test,
        validation=validation,
        seed=seed,
    )


def checkerboard(
    *,
    squares: int = 4,
    side: float = 8.0,
    train: int = 10_000,
    test: int = 10_000,
    validation: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """The dark squares of a board: independent points of `Checkerboard`, with their exact log-density.

    Args:
        squares, side: as in `Checkerboard`.
        train, test, validation, seed: as in `from_density`.

    Raises:
        DataError: as these.
    """
    return from_density(
        Checkerboard(squares=squares, side=side),
        "checkerboard",
        train=train,
        test=test,
        validation=validation,
        seed=seed,
    )


def rings(
    *,
    rings: int = 3,
    noise: float = 0.08,
    train: int = 10_000,
    test: int = 10_000,
    validation: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """Concentric circles: independent points of `Rings`, with their exact log-density.

    Args:
        rings, noise: as in `Rings`.
        train, test, validation, seed: as in `from_density`.

    Raises:
        DataError: as these.
    """
    return from_density(
        Rings(rings=rings, noise=noise), "rings", train=train, test=test, validation=validation, seed=seed
    )


def spirals(
    *,
    noise: float = 0.08,
    train: int = 10_000,
    test: int = 10_000,
    validation: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """Two spiral arms: independent points of `Spirals`, with their exact log-density.

    Args:
        noise: as in `Spirals`.
        train, test, validation, seed: as in `from_density`.

    Raises:
        DataError: as these.
    """
    return from_density(Spirals(noise=noise), "spirals", train=train, test=test, validation=validation, seed=seed)


def pinwheel(
    *,
    blades: int = 5,
    radial: float = 0.3,
    tangential: float = 0.05,
    rate: float = 0.25,
    train: int = 10_000,
    test: int = 10_000,
    validation: int = 1_000,
    seed: int = 0,
) -> Dataset:
    """Sheared Gaussian blades: independent points of `Pinwheel`, with their exact log-density.

    Args:
        blades, radial, tangential, rate: as in `Pinwheel`.
        train, test, validation, seed: as in `from_density`.

    Raises:
        DataError: as these.
    """
    return from_density(
        Pinwheel(blades=blades, radial=radial, tangential=tangential, rate=rate),
        "pinwheel",
        train=train,
        test=test,
        validation=validation,
        seed=seed,
    )
