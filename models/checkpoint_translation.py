"""Putting other people's weights into our networks: a configuration whose every key is known, and a table of names.

Each tensor of ours is made of one or several of theirs (`Entry`), and `fill` copies a whole state by such a table: all of it,
or nothing and an error that lists what is missing, unexpected or misshapen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint_reader import CheckpointError
from numerics import UserError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A section of a config whose every key must be known, and every key asked for present.

    Args:
        name: what an error calls it.
        values: key -> value.
    """

    name: str
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise UserError(
                f"got config.{self.name} without {key!r}; expected it, since the network is built from it: add it"
            )
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        return self.values.get(key, default)

    def only(self, known: frozenset[str]) -> None:
        if unknown := sorted(set(self.values) - known):
            raise UserError(
                f"got the unknown switch config.{self.name}.{unknown[0]}; expected only {', '.join(sorted(known))}"
            )

    def require(self, key: str, expected: str) -> None:
        got = self.get(key, expected)
        if str(got).lower() != expected.lower():
            raise UserError(
                f"got config.{self.name}.{key}={got!r}; expected {expected!r}, the only one that is supported"
            )


@dataclass(frozen=True)
class Entry:
    """Our tensor `ours`, and theirs that it is made of: one, or several joined along the first axis after
    `transpose`.
    """

    ours: str
    theirs: tuple[str, ...]
    matrix: bool = False  # (in, out), for a 1×1 convolution
    part: tuple[int, int] | None = None  # (i, n): the i-th of n equal parts of the last axis

    def make(self, state: Mapping[str, Tensor]) -> Tensor:
        pieces = [state[name] for name in self.theirs]
        if self.matrix:
            pieces = [piece.t().unflatten(1, (-1, 1, 1)) for piece in pieces]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self.part is not None:
            tensor = tensor.chunk(self.part[1], dim=-1)[self.part[0]]
        return tensor


def fill(net: nn.Module, state: Mapping[str, Tensor], table: list[Entry], source: str) -> None:
    """Copy `state` into `net` by the table, all of it or nothing.

    Args:
        net: ours.
        state: theirs, name -> tensor.
        table: an entry for each tensor of `net`.
        source: what an error calls the file.

    Raises:
        CheckpointError: tensors that are missing, unexpected or of another shape, all of them listed.
    """
    own = net.state_dict()
    wanted = {name for entry in table for name in entry.theirs}
    missing = tuple(sorted(wanted - set(state)))
    unexpected = tuple(sorted(set(state) - wanted))
    misshapen, translated = [], {}
    for entry in table:
        if not set(entry.theirs) <= set(state):
            continue
        ranks = {state[name].ndim for name in entry.theirs}
        if entry.matrix and ranks != {2}:
            misshapen.append(f"{entry.theirs[0]}: {tuple(state[entry.theirs[0]].shape)}, expected a matrix")
            continue
        try:
            tensor = entry.make(state)
        except RuntimeError:
            misshapen.append(f"{entry.theirs}: shapes that cannot be joined")
            continue
        if tensor.shape != own[entry.ours].shape:
            misshapen.append(f"{entry.theirs[0]}: {tuple(tensor.shape)}, expected {tuple(own[entry.ours].shape)}")
        translated[entry.ours] = tensor
    if missing or unexpected or misshapen:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:6])}{', …' if len(names) > 6 else ''})"
            for what, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("misshapen", tuple(misshapen)),
            )
            if names
        ]
        raise CheckpointError(
            f"{source} does not hold the network that the config describes: {'; '.join(parts)}",
            missing=missing,
            unexpected=unexpected,
            misshapen=tuple(misshapen),
        )
    if forgotten := set(own) - set(translated):
        raise RuntimeError(f"the translation leaves out our own tensors {sorted(forgotten)[:3]}")
    net.load_state_dict(translated, strict=True)


def both(ours: str, theirs: str) -> Iterator[Entry]:
    """The entries of a layer's weight and bias."""
    yield Entry(f"{ours}.weight", (f"{theirs}.weight",))
    yield Entry(f"{ours}.bias", (f"{theirs}.bias",))
