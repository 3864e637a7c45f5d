"""The rows of the table of all systems, and the configuration of a cell: one system, trained once.

Every cell has the same data, the same processor time of training (`training.cpu_seconds`, by which the learning rate is
annealed), the same images for its bits/dim and the same number of samples for its distance. All else is the system's own:
network, objective, sampler. For the second table the networks are made equal in parameters too, by one option of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numerics import UserError, require_choice, require_count, require_positive
from workflow.configuration import config_for
from workflow.setup import Setup, resolve
from workflow.system import Config

_STEPS = 10_000_000  # never reached: the processor time ends a training
_FINE: Mapping[str, Any] = {"likelihood.steps": 256}
"""Of rows whose networks, taught at the steps of a chain alone, are rough between them: for 64 steps the solver states errors
of 0.26 and 0.77 bits/dim."""
CLOSE = 0.05
"""Numbers of parameters that differ by less count as equal."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """A row of the table.

    Attributes:
        system: its name.
        trained_as: the system whose weights and bits/dim it takes; it has a training of its own where this is empty.
        changes: values by dotted path that differ from its defaults on the digits.
        size: the option that sets how many parameters it has.
        note: what its numbers have of their own.
    """

    system: str
    trained_as: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    size: str = "model.channels"
    note: str = ""


ROWS = (
    Row(
        system="ddgm",
        changes={"decoder": "grey"},
        size="model.width",
        note="T = 5 with the decoder of grey values",
    ),
    Row(system="ddpm", changes=_FINE),
    Row(system="iddpm", changes=_FINE),
    Row(system="ddim", trained_as="ddpm", changes=_FINE, note="weights and bits/dim are those of ddpm"),
    Row(system="vdm"),
    Row(system="latent", size="model.width", note="evaluations of an MLP on 16 numbers"),
    Row(system="edm"),
    Row(system="flow_matching"),
    Row(system="ncsn"),
    Row(system="ncsnv2"),
    Row(system="jem", size="model.width", note="chains without restarts from uniform noise"),
    Row(system="vp"),
    Row(system="ve"),
    Row(system="sub_vp"),
    Row(system="classes", note="bits/dim of each image given its class, samples of no class"),
)
"""In the order of the index. The systems `energy`, `score_matching` and `cnf` are of points in the plane, and `inverse` is of
another's score."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all cells of a table have in common.

    Args:
        cpu_seconds: processor seconds of training.
        images: of the test split, for bits/dim.
        samples: for the Fréchet distance and the nearest training data.
        parameters: that every network has, nearly; None for the systems' own.
    """

    cpu_seconds: float = 100.0
    images: int = 100
    samples: int = 297
    parameters: int | None = None

    def __post_init__(self) -> None:
        require_positive(self.cpu_seconds, "seconds")
        require_count(self.images, "images", 2)
        require_count(self.samples, "samples", 10)
        if self.parameters is not None:
            require_count(self.parameters, "parameters", 1000)

    @property
    def stamp(self) -> dict[str, float]:
        """What the cells' numbers depend on beside their rows."""
        return {"cpu_seconds": self.cpu_seconds, "images": self.images, "samples": self.samples}

    def fits(self, parameters: int) -> bool:
        """Whether a network of so many parameters may stand in the table."""
        return self.parameters is None or abs(parameters / self.parameters - 1) < CLOSE


def chosen(names: str) -> tuple[Row, ...]:
    """The rows of these names, separated by commas; "all".

    Raises:
        UserError: a system that has no row.
    """
    if names == "all":
        return ROWS
    known = {row.system: row for row in ROWS}
    for name in names.split(","):
        require_choice(name, "systems", (*known, "all"))
    return tuple(known[name] for name in names.split(","))


def configuration(row: Row, seed: int, terms: Terms) -> Config:
    """The configuration of a cell; with the row's own size, see `sized`."""
    common = {
        "seed": seed,
        "threads": 1,
        "baselines": False,
        "training.steps": _STEPS,
        "training.cpu_seconds": terms.cpu_seconds,
        "training.split": "train",
        "training.validation": 0,
        "training.eval_every": 0,
        "training.checkpoint_every": 200,
        "training.keep": 1,
        "training.tensorboard": False,
        "likelihood.limit": terms.images,
        # one draw of the noise, and steps that need no search: the error of a hundred images is larger than theirs
        "likelihood.draws": 1,
        "likelihood.steps": 128,
    }
    return config_for(row.system, changes={**common, **row.changes})


def sized(row: Row, seed: int, terms: Terms) -> tuple[Setup, bool]:
    """The set-up of a cell, and whether it has the row's own size; where the terms say a number of parameters, and the row's is
    not close to it, the size that comes nearest is taken.

    Raises:
        UserError: no size of the network comes close.
    """
    config = configuration(row, seed, terms)
    own = resolve(config)
    target = terms.parameters
    if target is None or terms.fits(parameters(own)):
        return own, True
    group, _, option = row.size.partition(".")

    def of(size: int) -> Setup | None:
        try:
            return resolve({**config, group: {**config[group], option: size}})
        except UserError:
            return None  # a width that the network's groups do not divide

    found = [own]
    least, most = 1, 4 * int(config[group][option])
    while least <= most:
        middle = (least + most) // 2
        made = next((m for size in range(middle, most + 1) if (m := of(size)) is not None), None)
        if made is None:
            most = middle - 1
            continue
        found.append(made)
        if parameters(made) < target:
            least = int(made.config[group][option]) + 1
        else:
            most = middle - 1
    best = min(found, key=lambda made: abs(parameters(made) - target))
    if not terms.fits(parameters(best)):
        raise UserError(
            f"got parameters={target:,} for {row.system}, whose {row.size} comes to {parameters(best):,} at the nearest; "
            "expected a number that the network reaches"
        )
    return best, False


def parameters(setup: Setup) -> int:
    """Of a network."""
    return sum(p.numel() for p in setup.model.parameters())
