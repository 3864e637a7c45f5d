"""A U-Net over sequences: the project's own U-Net with convolutions along one axis.

Signals (N, C, L), such as electrocardiograms, audio or trajectories, have neighbours along L only. An encoder halves the length
level by level, the middle attends from every place of the shortest level to every other, and a decoder doubles the length back
and receives the encoder's activations of the same length. An odd length is made even by repeating its last value, and cropped
on the way back, so any length is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import attend
from models.embeddings import NoiseLevelEmbedding, noise_features
from models.initialization import initialized, linear
from models.input_features import FourierFeatures
from models.ncsnpp import level_resolutions
from models.network import ListOf, Network, check_dropout, check_fourier, check_sizes, require_label
from models.normalization import GroupNorm
from numerics import UserError

_SCALE = 2**-0.5  # sums of two branches keep their variance
_ATTENDED = 1024
"""Places: with more in the shortest level, attention would cost more than everything else."""


def _conv(n_in: int, n_out: int, kernel: int, *, scale: float = 1.0) -> nn.Conv1d:
    return initialized(nn.Conv1d(n_in, n_out, kernel, padding=kernel // 2), scale)


class Block1d(nn.Module):
    """`x (B, C, L)`, `embedding (B, E)` -> `(B, C', L)`: two normalised convolutions; the embedding scales and shifts between
    them, as in `models.residual`.
    """

    def __init__(self, n_in: int, n_out: int, width: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = GroupNorm(n_in), _conv(n_in, n_out, kernel)
        self.project = linear(width, 2 * n_out)
        self.norm_2, self.conv_2 = GroupNorm(n_out), _conv(n_out, n_out, kernel, scale=0.0)
        self.dropout = nn.Dropout(dropout)
        self.shortcut: nn.Module = nn.Identity() if n_in == n_out else _conv(n_in, n_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        gain, shift = self.project(embedding).unsqueeze(-1).chunk(2, dim=1)
        h = self.norm_2(h) * (1 + gain) + shift
        h = self.conv_2(self.dropout(F.silu(h)))
        return (self.shortcut(x) + h) * _SCALE


class Attention1d(nn.Module):
    """`x (B, C, L)` -> `(x + attention(norm(x))) / sqrt(2)` over the places, in `heads` heads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise UserError(
                f"got heads={heads} for attention over {channels} channels; expected a divisor of the channels"
            )
        self.heads = heads
        self.norm, self.qkv = GroupNorm(channels), _conv(channels, 3 * channels, 1)
        self.output = _conv(channels, channels, 1, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1))
        query, key, value = qkv.transpose(-1, -2).unbind(1)
        h = attend(query, key, value).transpose(-1, -2).flatten(1, 2)
        return (x + self.output(h)) * _SCALE


def _halve(x: Tensor) -> Tensor:
    """`(B, C, L)` -> `(B, C, ceil(L / 2))`."""
    return F.avg_pool1d(F.pad(x, (0, 1), mode="replicate") if x.shape[-1] % 2 else x, 2)


class UNet1d(Network):
    """The project's own U-Net over sequences.

    `x (B, in_channels, L)`, `label (B,)` of order one such as `LogSNR()` gives, `class_label (B,)` -> `x`'s shape, for any L.

    Args:
        in_channels: C.
        length: L of the data: it decides whether the shortest level has attention (at most 1,024 places), and nothing else.
        channels, multipliers, blocks: level i has `blocks` residual blocks of `channels * multipliers[i]` channels; each
            level has half the length of the one before, so long sequences want more of them.
        kernel: taps of the convolutions, an odd number.
        heads: number of attention heads.
        dropout: probability that an activation inside a residual block is zeroed in training.
        embedding: embedding of the noise level: `"smooth"`, `"positional"` or `"fourier"`, see `models.embeddings`.
        num_classes: number of classes, or None.
        fourier_features: frequencies of sine features of the input, see `models.input_features`.
        checkpoint_activations: recompute activations in the backward pass: less memory, a third more time.

    Raises:
        UserError: sizes that are not integers >= 1, or an even kernel.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        length: int = 64,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 1),
        blocks: int = 1,
        kernel: int = 5,
        heads: int = 1,
        dropout: float = 0.0,
        embedding: str = "smooth",
        num_classes: int | None = None,
        fourier_features: Sequence[float] | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(locals())
        check_sizes(in_channels=in_channels, length=length, channels=channels, multipliers=multipliers, blocks=blocks)
        check_sizes(kernel=kernel, heads=heads)
        check_dropout(dropout)
        if kernel % 2 == 0:
            raise UserError(f"got kernel={kernel}; expected an odd number of taps")
        self.in_channels, self.num_classes = in_channels, num_classes
        self.checkpoint_activations = checkpoint_activations
        width = 4 * channels
        self.embedding = NoiseLevelEmbedding(noise_features(embedding, channels), width, num_classes=num_classes)
        self.features = FourierFeatures(tuple(fourier_features or ()))
        self.stem = _conv(in_channels * self.features.multiple, channels, kernel)

        def block(n_in: int, n_out: int) -> Block1d:
            return Block1d(n_in, n_out, width, kernel, dropout)

        n, skips = channels, [channels]
        self.encoder: ListOf[ListOf[Block1d]] = ListOf()
        for i, multiplier in enumerate(multipliers):
            level: ListOf[Block1d] = ListOf()
            for _ in range(blocks):
                level.append(block(n, channels * multiplier))
                n = channels * multiplier
                skips.append(n)
            self.encoder.append(level)
            if i + 1 < len(multipliers):
                skips.append(n)  # the halved activation

        attended = level_resolutions(length, len(multipliers))[-1] <= _ATTENDED
        self.middle_1, self.middle_2 = block(n, n), block(n, n)
        self.attention: nn.Module = Attention1d(n, heads) if attended else nn.Identity()

        self.decoder: ListOf[ListOf[Block1d]] = ListOf()
        for multiplier in reversed(multipliers):
            level = ListOf()
            for _ in range(blocks + 1):
                level.append(block(n + skips.pop(), channels * multiplier))
                n = channels * multiplier
            self.decoder.append(level)
        self.output_norm, self.output_conv = GroupNorm(n), _conv(n, in_channels, kernel, scale=0.0)

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels that are not positive for the Fourier embedding."""
        check_fourier(self.options["embedding"], labels)

    def forward(self, x: Tensor, label: Tensor | None = None, class_label: Tensor | None = None) -> Tensor:
        """`x (B, C, L)`, `label (B,)`, `class_label (B,)` -> `(B, C, L)`."""
        if x.ndim != 3 or x.shape[1] != self.in_channels:
            raise UserError(f"got x of shape {tuple(x.shape)}; expected sequences (B, {self.in_channels}, L)")
        embedding = self.embedding(require_label(label), class_label)
        h = self.stem(self.features(x))
        skips = [h]
        for i, level in enumerate(self.encoder):
            if i > 0:
                h = _halve(h)
                skips.append(h)
            for block in level:
                h = self.run(block, h, embedding)
                skips.append(h)
        h = self.run(self.middle_1, h, embedding)
        h = self.run(self.middle_2, self.attention(h), embedding)
        for level in self.decoder:
            skip = skips[-1]
            if h.shape[-1] < skip.shape[-1]:
                h = h.repeat_interleave(2, dim=-1)[..., : skip.shape[-1]]
            for block in level:
                h = self.run(block, torch.cat((h, skips.pop()), dim=1), embedding)
        return self.output_conv(F.silu(self.output_norm(h)))
