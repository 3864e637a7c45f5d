"""torch.compile for the time of a training run.

Only the call of the network is compiled, in place, and it is the plain one again when the run has ended, while callbacks look
at the model, and in every file: what is compiled has one derivative and knows no vmap, which traces, exact divergences and
energies need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from training.errors import UsageError


def refuse_what_cannot_be_compiled(network: nn.Module, objective: object) -> None:
    """Refuses a network or an objective that takes derivatives of the network, of which a compiled one has a single one.

    Raises:
        UsageError: what it is.
    """
    for part, what in ((network, "the network"), (objective, "the objective")):
        if getattr(part, "differentiates", False):
            raise UsageError(
                f"got compile=True for {what} {type(part).__name__}, which takes derivatives of a network; expected one that "
                "does not, since a compiled network has no second derivative: leave compile out"
            )


class CompiledCalls:
    """The compiled call of a network, which can be taken away and given back.

    Args:
        network: left as it is until `use`.
        wanted: False: nothing is ever compiled.
    """

    def __init__(self, network: nn.Module, *, wanted: bool) -> None:
        self.network = network
        self._call = torch.compile(network.forward) if wanted else None

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the network's call is the compiled one."""
        if self._call is None:
            yield
            return
        self.network.forward = self._call  # of this object alone, over the class's own
        try:
            yield
        finally:
            self._take_away()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, it is the plain one."""
        if self._call is None or "forward" not in vars(self.network):
            yield
            return
        self._take_away()
        try:
            yield
        finally:
            self.network.forward = self._call

    def _take_away(self) -> None:
        vars(self.network).pop("forward", None)
