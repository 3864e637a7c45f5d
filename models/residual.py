"""The residual block of the U-Nets: two normalised convolutions, the noise level entering between them.

    h = conv_1(resample(act(norm_1(x))));  h = conv_2(dropout(act(norm_2(h + W e))));  (shortcut(resample(x))
    + h) scale

Ho et al. 2020 do not resample inside a block; Brock et al. 2019 (BigGAN) do, on both branches. With
`scale_shift` the noise level scales and shifts instead, `norm_2(h) (1 + a) + b` (Dhariwal and Nichol 2021,
"adaptive group normalization").
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from models.initialization import conv1x1, conv3x3, linear
from models.normalization import GroupNorm
from models.resampling import Size


class ResidualBlock(nn.Module):
    """`x (B, C, H, W)`, `embedding (B, E)` or None -> `(B, C', H', W')`:

        h = conv_1(resample(act(norm_1(x))));  h = conv_2(dropout(act(norm_2(h + W e))));  (shortcut(resample(x)) + h) scale

    Args:
        in_channels, out_channels: C, C'.
        embedding_width: E, or None for a block that is told nothing.
        resample: a module that both branches go through first (`models.resampling.Halve`, `Double`).
        convolve_shortcut: a 1×1 convolution on the shortcut also where the number of channels stays.
        scale_shift: `norm_2(h) (1 + a) + b` with (a, b) = W e, instead of `norm_2(h + W e)`.
        skip_rescale: `scale = 1/sqrt(2)` instead of 1.
        dropout: probability.
        groups, eps: of the group normalisations.
        init_scale: of the last convolution's weights (0: the block starts as its shortcut).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_width: int | None,
        *,
        resample: nn.Module | None = None,
        convolve_shortcut: bool = False,
        scale_shift: bool = False,
        skip_rescale: bool = False,
        dropout: float = 0.0,
        groups: int | None = None,
        eps: float = 1e-6,
        init_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_1 = GroupNorm(in_channels, groups=groups, eps=eps)
        self.conv_1 = conv3x3(in_channels, out_channels)
        self.project: nn.Linear | None = None
        if embedding_width is not None:
            self.project = linear(embedding_width, out_channels * (2 if scale_shift else 1))
        self.norm_2 = GroupNorm(out_channels, groups=groups, eps=eps)
        self.conv_2 = conv3x3(out_channels, out_channels, scale=init_scale)
        convolve = convolve_shortcut or in_channels != out_channels
        self.shortcut = conv1x1(in_channels, out_channels) if convolve else nn.Identity()
        self.resample = resample
        self.scale_shift = scale_shift
        self.dropout = nn.Dropout(dropout)
        self.scale = 2**-0.5 if skip_rescale else 1.0

    def forward(self, x: Tensor, embedding: Tensor | None = None, size: Size | None = None) -> Tensor:
        h = F.silu(self.norm_1(x))
        if self.resample is not None:
            h, x = self.resample(h, size), self.resample(x, size)
        h = self.conv_1(h)
        if self.project is None:
            h = self.norm_2(h)
        else:
            level = self.project(embedding).unflatten(1, (-1, 1, 1))
            if self.scale_shift:
                gain, shift = level.chunk(2, dim=1)
                h = self.norm_2(h) * (1 + gain) + shift
            else:
                h = self.norm_2(h + level)
        h = self.conv_2(self.dropout(F.silu(h)))
        return (self.shortcut(x) + h) * self.scale
