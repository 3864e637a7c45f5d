"""Group normalisation in at least float32.

Under bf16 autocast the activations arrive in bf16; means and variances taken there lose the small differences
that the next layer lives on, so the statistics and the affine map are computed in float32 and the result is
cast back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from numerics import UserError


def groups_of(channels: int) -> int:
    """The published networks' number of groups: `min(channels // 4, 32)`, lowered until it divides
    `channels`.
    """
    groups = max(min(channels // 4, 32), 1)
    while channels % groups:
        groups -= 1
    return groups


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` computed in at least float32; `x (B, C, *)` -> `(B, C, *)` of x's dtype.

    Args:
        channels: C.
        groups: a divisor of C; `groups_of(C)` unless given.
        eps: added to variances.

    Raises:
        UserError: groups that do not divide the channels.
    """

    def __init__(self, channels: int, *, groups: int | None = None, eps: float = 1e-6) -> None:
        groups = groups_of(channels) if groups is None else groups
        if channels % groups:
            raise UserError(f"got groups={groups} for {channels} channels; expected a divisor of them, or None")
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.group_norm(x.to(dtype), self.num_groups, weight, bias, self.eps).to(x.dtype)
