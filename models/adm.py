"""ADM, guided-diffusion's U-Net (Dhariwal and Nichol 2021, section 3): DDPM's, with several attention heads
at several resolutions, BigGAN resampling, the noise level as scale and shift, class labels, and learned
variances.

With `learned_variance` the output has twice the channels: the noise, then the interpolation `v` between the
two variances of the reverse step (Nichol and Dhariwal 2021, equation (15)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionBlock
from models.embeddings import NoiseLevelEmbedding, PositionalEmbedding
from models.initialization import conv3x3
from models.ncsnpp import check_levels, level_resolutions
from models.network import ListOf, Network, check_dropout, check_images, check_sizes, require_label
from models.normalization import GroupNorm
from models.resampling import Double, Halve, size_of
from models.residual import ResidualBlock
from numerics import UserError


class ADMBlock(nn.Module):
    """A residual block and, at some resolutions, attention."""

    def __init__(self, residual: ResidualBlock, attention: nn.Module) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.attention(self.residual(x, embedding))


class ADM(Network):
    """ADM, the U-Net of guided diffusion (Dhariwal and Nichol 2021, arXiv:2105.05233, section 3).

    `x (B, in_channels, H, W)`, `label (B,)`, the index of the step, `class_label (B,)` -> `(B, in_channels or twice, H, W)`.

    Args:
        in_channels, image_size: channels and size of the images. Any size works; odd ones are halved upwards.
        channels, multipliers, blocks: level i has `blocks` residual blocks of `channels * multipliers[i]` channels.
        attention_resolutions: resolutions (of the `image_size`, halved) whose blocks are followed by attention.
        dropout: probability that an activation inside a residual block is zeroed in training.
        heads: number of attention heads at every resolution, where `head_channels` is None.
        head_channels: channels of one attention head; None for `heads` heads.
        num_classes: number of classes, or None.
        learned_variance: twice the output channels, the second half for variances.
        groups: number of groups in a group normalisation.
        checkpoint_activations: recompute activations in the backward pass.

    Raises:
        UserError: sizes that are not integers >= 1, attention at a resolution that no level has, or heads and groups that do
            not divide the channels.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        image_size: int = 64,
        channels: int = 192,
        multipliers: Sequence[int | float] = (1, 2, 3, 4),
        blocks: int = 3,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        heads: int = 4,
        head_channels: int | None = 64,
        num_classes: int | None = None,
        learned_variance: bool = True,
        dropout: float = 0.0,
        groups: int = 32,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(locals())
        check_sizes(in_channels=in_channels, image_size=image_size, channels=channels, blocks=blocks, heads=heads)
        check_dropout(dropout)
        check_sizes(groups=groups, head_channels=head_channels)
        widths = [m * channels for m in multipliers if isinstance(m, int | float)]
        if len(widths) < max(len(multipliers), 1) or any(n < 1 or n != int(n) for n in widths):
            raise UserError(
                f"got multipliers={tuple(multipliers)!r} of channels={channels}; expected numbers that give whole channels"
            )
        resolutions = level_resolutions(image_size, len(multipliers))
        check_levels(attention_resolutions, resolutions, image_size)
        self.num_classes, self.learned_variance, self.in_channels = num_classes, learned_variance, in_channels
        self.checkpoint_activations = checkpoint_activations
        width = 4 * channels
        norm: dict[str, Any] = {"groups": groups, "eps": 1e-5}

        def residual(n_in: int, n_out: int, resample: nn.Module | None = None) -> ResidualBlock:
            return ResidualBlock(n_in, n_out, width, scale_shift=True, dropout=dropout, resample=resample, **norm)

        def attention(n: int, resolution: int | None) -> nn.Module:
            if resolution is not None and resolution not in attention_resolutions:
                return nn.Identity()
            if head_channels is not None and n % head_channels:
                raise UserError(
                    f"got head_channels={head_channels} for {n} channels; expected a divisor of every level's channels that "
                    "has attention, or None for heads"
                )
            return AttentionBlock(n, heads=heads if head_channels is None else n // head_channels, **norm)

        features = PositionalEmbedding(channels, endpoint=False, cosine_first=True)
        self.embedding = NoiseLevelEmbedding(features, width, num_classes=num_classes)
        n = int(channels * multipliers[0])
        self.stem = conv3x3(in_channels, n)
        skips = [n]
        self.encoder: ListOf[ListOf[ADMBlock]] = ListOf()
        self.down: ListOf[ResidualBlock] = ListOf()
        for i, multiplier in enumerate(multipliers):
            level: ListOf[ADMBlock] = ListOf()
            for _ in range(blocks):
                m = int(channels * multiplier)
                level.append(ADMBlock(residual(n, m), attention(m, resolutions[i])))
                n = m
                skips.append(n)
            self.encoder.append(level)
            if i + 1 < len(multipliers):
                self.down.append(residual(n, n, Halve()))
                skips.append(n)
        self.middle_1 = ADMBlock(residual(n, n), attention(n, None))
        self.middle_2 = residual(n, n)
        self.decoder: ListOf[ListOf[ADMBlock]] = ListOf()
        self.up: ListOf[ResidualBlock] = ListOf()
        for i, multiplier in reversed(list(enumerate(multipliers))):
            level = ListOf()
            for _ in range(blocks + 1):
                m = int(channels * multiplier)
                level.append(ADMBlock(residual(n + skips.pop(), m), attention(m, resolutions[i])))
                n = m
            self.decoder.append(level)
            if i > 0:
                self.up.append(residual(n, n, Double()))
        self.output_norm = GroupNorm(n, **norm)
        self.output_conv = conv3x3(n, in_channels * (2 if learned_variance else 1), scale=0.0)

    def forward(self, x: Tensor, label: Tensor | None = None, class_label: Tensor | None = None) -> Tensor:
        """`x (B, C, H, W)`, `label (B,)`, `class_label (B,)` -> `(B, C or 2 C, H, W)`."""
        check_images(x, self.in_channels)
        embedding = self.embedding(require_label(label), class_label)
        h = self.stem(x)
        skips = [h]
        for i, level in enumerate(self.encoder):
            for block in level:
                h = self.run(block, h, embedding)
                skips.append(h)
            if i < len(self.down):
                h = self.run(self.down[i], h, embedding)
                skips.append(h)
        h = self.run(self.middle_2, self.run(self.middle_1, h, embedding), embedding)
        for i, level in enumerate(self.decoder):
            for block in level:
                h = self.run(block, torch.cat((h, skips.pop()), dim=1), embedding)
            if i < len(self.up):
                h = self.up[i](h, embedding, size_of(skips[-1]))
        return self.output_conv(F.silu(self.output_norm(h)))
