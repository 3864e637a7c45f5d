"""Tables that a cast of the weights must not round."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class FloatTables(nn.Module):
    """A module that keeps some of its buffers in float32 at least, wherever its weights are cast to.

    Frequencies and noise levels say which time a label stands for: bfloat16 has 514 for 512, and frequencies that are off by
    0.4 % turn a label of 999 by several radians.

    Attributes:
        tables: the names of these buffers.
    """

    tables: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before: dict[str, Tensor | None] = {name: getattr(self, name) for name in self.tables}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and torch.finfo(new.dtype).bits < 32:
                setattr(self, name, old.to(new.device, torch.promote_types(old.dtype, torch.float32)))
        return self
