"""Self-attention over the pixels of an image (Ho et al. 2020, appendix B).

Many tokens go through PyTorch's fused kernel, which keeps no N×N matrix. Few go through two plain products:
as fast there, and these can be differentiated twice, in forward mode and under `vmap`, which exact
divergences and energies need and the fused kernels do not offer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.initialization import conv1x1
from models.normalization import GroupNorm
from numerics import UserError

_FUSED_FROM = 256  # tokens: 16×16 pixels


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """`softmax(query key^T / sqrt(C)) value`; all `(B, heads, N, C)`. The softmax is in at least float32.

    `mask (B, M)` is true for the keys that may be attended to; all of them unless given.
    """
    allowed = None if mask is None else mask.unflatten(0, (-1, 1, 1))
    if query.shape[-2] >= _FUSED_FROM:
        return F.scaled_dot_product_attention(
            query.contiguous(), key.contiguous(), value.contiguous(), attn_mask=allowed
        )
    weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if allowed is not None:
        weights = weights.masked_fill(~allowed, -torch.inf)
    weights = weights.softmax(dim=-1, dtype=torch.promote_types(weights.dtype, torch.float32))
    return weights.to(value.dtype) @ value


class AttentionBlock(nn.Module):
    """`x (B, C, H, W)` -> `(x + attention(norm(x))) scale`; every pixel attends to every pixel in each of
    `heads` heads.

    One 1×1 convolution gives queries, keys and values, in this order.

    Args:
        channels: C, a multiple of `heads`.
        heads: of attention.
        groups, eps: of the group normalisation.
        skip_rescale: `scale = 1/sqrt(2)` instead of 1.
        init_scale: of the output's weights (0: the block starts as the identity).
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int = 1,
        groups: int | None = None,
        eps: float = 1e-6,
        skip_rescale: bool = False,
        init_scale: float = 0.0,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise UserError(
                f"got heads={heads} for attention over {channels} channels; expected a divisor of the channels"
            )
        self.heads = heads
        self.scale = 2**-0.5 if skip_rescale else 1.0
        self.norm = GroupNorm(channels, groups=groups, eps=eps)
        self.qkv = conv1x1(channels, 3 * channels)
        self.output = conv1x1(channels, channels, scale=init_scale)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = qkv.transpose(-1, -2).unbind(1)
        h = attend(query, key, value).transpose(-1, -2).reshape(x.shape)
        return (x + self.output(h)) * self.scale
