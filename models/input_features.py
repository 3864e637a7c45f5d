"""Sine features of the input (Kingma et al. 2021, "Variational Diffusion Models", appendix C).

Data on a grid of grey levels have fine structure at the spacing of the levels; a network that sees only `x`
must make it out of differences far below the data's range. `sin(2 pi f x)` and `cos(2 pi f x)` at `f` around
one over the spacing hand it over: e.g. 17 levels in [-1, 1] are 1/8 apart, so `f = 8` turns once per level
(and `f = 4` once per two).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from numerics import UserError


class FourierFeatures(nn.Module):
    """`x (B, C, *)` -> `(B, C (1 + 2 K), *)`: x, then the sine and the cosine of `2 pi f x` for each of K
    frequencies.
    """

    def __init__(self, frequencies: Sequence[float] = ()) -> None:
        super().__init__()
        if not all(isinstance(f, int | float) and math.isfinite(f) for f in frequencies):
            raise UserError(f"got fourier_features={tuple(frequencies)!r}; expected finite numbers")
        self.frequencies = tuple(float(f) for f in frequencies)

    @property
    def multiple(self) -> int:
        """How many times as many channels come out as go in."""
        return 1 + 2 * len(self.frequencies)

    def forward(self, x: Tensor) -> Tensor:
        if not self.frequencies:
            return x
        channels = [x]
        for f in self.frequencies:
            phase = x * (2 * math.pi * f)
            channels += [phase.sin(), phase.cos()]
        return torch.cat(channels, dim=1)
