"""DiT: a transformer over patches (Peebles and Xie 2023), "adaLN-Zero".

The image is cut into patches, one token each, with fixed sines and cosines of its place. Every block
normalises, scales and shifts its input as the noise level and the class say, and gates its output; all gates
start at zero, so a fresh network is the identity. An image whose sides the patch does not divide is extended
by repeating its last row and column, and cropped at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import attend
from models.embeddings import NoiseLevelEmbedding, PositionalEmbedding, SmoothEmbedding
from models.initialization import initialized, linear
from models.network import Network, check_images, check_sizes, require_label
from models.resampling import Size, crop, size_of
from numerics import UserError, require_choice


class PlainLayerNorm(nn.Module):
    """Normalisation over the last axis without weights, in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.layer_norm(h, h.shape[-1:], eps=1e-6).to(x.dtype)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """`x (B, N, W)`, `embedding (B, W)` -> `(B, N, W)`: with a shift, a scale and a gate of each branch from the embedding,

        x <- x + gate_1 attention(norm(x) (1 + scale_1) + shift_1);   x <- x + gate_2 mlp(norm(x) (1 + scale_2) + shift_2)

    Args:
        width: W, a multiple of `heads`.
        heads: of attention.
        mlp_ratio: width of the MLP's hidden layer, in units of W.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads = heads
        self.norm = PlainLayerNorm()
        self.modulation = linear(width, 6 * width, scale=0.0)
        self.qkv = linear(width, 3 * width)
        self.project = linear(width, width)
        self.mlp_1 = linear(width, hidden)
        self.mlp_2 = linear(hidden, width)

    def attention(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.project(attend(query, key, value).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(embedding).chunk(6, dim=-1)
        x = x + gate_1.unsqueeze(1) * self.attention(_modulate(self.norm(x), shift_1, scale_1))
        h = F.gelu(self.mlp_1(_modulate(self.norm(x), shift_2, scale_2)), approximate="tanh")
        return x + gate_2.unsqueeze(1) * self.mlp_2(h)


class DiT(Network):
    """A diffusion transformer over patches (Peebles and Xie 2023, arXiv:2212.09748, section 3.2).

    `x (B, in_channels, H, W)`, `label (B,)`, `class_label (B,)` -> `(B, in_channels or twice, H, W)`.

    Args:
        in_channels, image_size: channels and size of the images. Other sizes work too: positions are computed for the size
            at hand.
        patch: side of a patch, in pixels.
        width: width of the transformer.
        depth: number of transformer blocks.
        heads: number of attention heads.
        embedding: `"positional"` (256 features, for `999 t` or an index) or `"smooth"` (for a log-SNR).
        num_classes: number of classes, or None.
        learned_variance: twice the output channels, the second half for variances.
        checkpoint_activations: recompute activations in the backward pass.

    Raises:
        UserError: sizes that are not integers >= 1, or a width that the heads or 4 do not divide.
    """

    places: Tensor

    def __init__(
        self,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        patch: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        embedding: str = "positional",
        num_classes: int | None = None,
        learned_variance: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(locals())
        require_choice(embedding, "embedding", ("positional", "smooth"))
        check_sizes(in_channels=in_channels, image_size=image_size, patch=patch, width=width, depth=depth, heads=heads)
        if width % heads or width % 4:
            raise UserError(f"got width={width}, heads={heads}; expected a width that both the heads and 4 divide")
        self.num_classes, self.learned_variance, self.in_channels = num_classes, learned_variance, in_channels
        self.checkpoint_activations = checkpoint_activations
        self.patch, self.width = patch, width
        self.out_channels = in_channels * (2 if learned_variance else 1)
        features: PositionalEmbedding | SmoothEmbedding
        features = (
            SmoothEmbedding() if embedding == "smooth" else PositionalEmbedding(256, endpoint=False, cosine_first=True)
        )
        self.embedding = NoiseLevelEmbedding(features, width, num_classes=num_classes)
        self.stem = initialized(nn.Conv2d(in_channels, width, patch, stride=patch))
        side = -(-image_size // patch)
        self.register_buffer("places", places((side, side), width), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))
        self.norm = PlainLayerNorm()
        self.modulation = linear(width, 2 * width, scale=0.0)
        self.output = linear(width, patch * patch * self.out_channels, scale=0.0)

    def forward(self, x: Tensor, label: Tensor | None = None, class_label: Tensor | None = None) -> Tensor:
        """`x (B, C, H, W)`, `label (B,)`, `class_label (B,)` -> `(B, C or 2 C, H, W)`."""
        check_images(x, self.in_channels)
        embedding = self.embedding(require_label(label), class_label)
        size = size_of(x)
        rows, columns = -(-size[0] // self.patch), -(-size[1] // self.patch)
        extra = rows * self.patch - size[0], columns * self.patch - size[1]
        if extra != (0, 0):
            x = F.pad(x, (0, extra[1], 0, extra[0]), mode="replicate")
        h = self.stem(x).flatten(2).transpose(1, 2)
        known = rows == columns and rows * columns == self.places.shape[0]
        h = h + (self.places if known else places((rows, columns), self.width).to(h)).to(h.dtype)
        for block in self.blocks:
            h = self.run(block, h, embedding)
        shift, scale = self.modulation(embedding).chunk(2, dim=-1)
        h = self.output(_modulate(self.norm(h), shift, scale))
        h = h.unflatten(1, (rows, columns)).unflatten(-1, (self.patch, self.patch, self.out_channels))
        h = h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return crop(h, size)


def places(grid: Size, width: int) -> Tensor:
    """The places of the patches of a grid of `(rows, columns)`: `(rows * columns, width)`, sines and cosines of the column,
    then of the row, at frequencies from 1 to 1e-4.
    """
    quarter = width // 4
    frequencies = torch.exp(torch.arange(quarter, dtype=torch.float64) * (-math.log(10_000.0) / quarter))
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij"
    )
    parts = []
    for place in (columns, rows):
        phase = place.reshape(-1, 1) * frequencies
        parts += [phase.sin(), phase.cos()]
    return torch.cat(parts, dim=1).to(torch.float32)
