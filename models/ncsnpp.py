"""NCSN++ and DDPM++ (Song et al. 2021, section 4.3 and appendix H), and with other switches DDPM (Ho et al.
2020).

A U-Net: an encoder that halves the image level by level, a middle with attention, and a decoder that doubles
it back and receives, at every block, the encoder's activation of the same resolution (the skip connections).
The family differs by its switches: DDPM++ has BigGAN residual blocks, rescaled skips and a positional
embedding; NCSN++ adds FIR resampling, a progressively halved copy of the input at every level, and a Fourier
embedding of `log sigma`; DDPM has neither. See `models.presets` for the published settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionBlock
from models.conditioning import Conditioning, DiscreteIndex
from models.embeddings import NoiseLevelEmbedding, noise_features
from models.initialization import conv1x1, conv3x3
from models.input_features import FourierFeatures
from models.network import (
    ListOf,
    Network,
    check_dropout,
    check_fourier,
    check_images,
    check_index,
    check_sizes,
    require_label,
)
from models.normalization import GroupNorm
from models.resampling import ConvDouble, ConvHalve, Double, Halve, size_of
from models.residual import ResidualBlock
from numerics import UserError, expand_as, require_choice, require_positive


class EncoderLevel(nn.Module):
    """The blocks of one resolution, each followed by its attention; then `down`, and the progressive input's
    share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: ListOf[ResidualBlock] = ListOf()
        self.attentions: ListOf[nn.Module] = ListOf()
        self.down: nn.Module | None = None
        self.input_down: nn.Module | None = None
        self.input_conv: nn.Module | None = None


class DecoderLevel(nn.Module):
    """The blocks of one resolution, one attention, the progressive output's share; then `up`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: ListOf[ResidualBlock] = ListOf()
        self.attention: nn.Module = nn.Identity()
        self.output_norm: nn.Module | None = None
        self.output_conv: nn.Module | None = None
        self.output_up: nn.Module | None = None
        self.up: nn.Module | None = None


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, block_1: nn.Module, attention: nn.Module, block_2: nn.Module) -> None:
        super().__init__()
        self.block_1, self.attention, self.block_2 = block_1, attention, block_2


class NCSNpp(Network):
    """NCSN++, DDPM++ and DDPM: one U-Net with switches (Song et al. 2021, arXiv:2011.13456, section 4.4 and appendix H; Ho et
    al. 2020, arXiv:2006.11239, appendix B).

    `x (B, in_channels, H, W)`, `label (B,)`, `class_label (B,)` -> `(B, out_channels, H, W)`, for any H and W.

    Args:
        in_channels, image_size: channels and size of the images. `image_size` only says which levels `attention_resolutions`
            names: the network itself runs at any size (odd sizes are halved upwards, and cropped on the way
            back).
        channels, multipliers, blocks: level i has `blocks` residual blocks of `channels * multipliers[i]`
            channels.
        attention_resolutions: resolutions (of the `image_size`, halved) whose blocks are followed by
            attention.
        out_channels: `in_channels` by default.
        residual_block: `"biggan"` resamples inside residual blocks, `"ddpm"` by separate layers.
        resample_with_conv: for `"ddpm"`, whether these layers have a convolution.
        fir_kernel: taps of the resampling filter, e.g. (1, 3, 3, 1), or None for plain resampling.
        skip_rescale: divide sums of two branches by sqrt(2).
        progressive_input: `"none"`, `"input_skip"` (the halved image joins each level by a 1×1 convolution),
            `"residual"`.
        progressive_output: `"none"`, `"output_skip"` (each level adds an image), `"residual"`.
        combine: how `"input_skip"` joins: `"sum"` or `"cat"`.
        embedding: `"positional"`, `"fourier"` (of `log label`), `"smooth"`, see `models.embeddings`.
        fourier_scale: scale of the Fourier embedding's random frequencies.
        conditional: False for a network that is not told the noise level.
        num_classes: number of classes, or None.
        learned_variance: twice the output channels, the second half for variances.
        centered: False maps images from [0, 1] to [-1, 1] first.
        scale_by_sigma: divide the output by sigma: by the label, or by `sigmas[label]` where the label is an
            index.
        sigmas: the discrete noise levels, in the order of the indices, or None.
        dropout: probability that an activation inside a residual block is zeroed in training.
        init_scale: initial scale of the last layer of every branch and of the network; 0 starts them at zero.
        groups: number of groups in a group normalisation; None for `min(channels // 4, 32)`.
        eps: epsilon of the group normalisation.
        scale_shift: the noise level scales and shifts inside blocks instead of being added.
        heads: number of attention heads.
        fourier_features: frequencies of sine features of the input, see `models.input_features`.
        checkpoint_activations: recompute activations in the backward pass: less memory, a third more time.

    Raises:
        UserError: unknown switches, sizes that are not integers >= 1, or attention at a resolution that no level has.
    """

    sigmas: Tensor | None
    tables = ("sigmas",)

    def __init__(
        self,
        *,
        in_channels: int = 3,
        image_size: int = 32,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        out_channels: int | None = None,
        residual_block: str = "biggan",
        resample_with_conv: bool = True,
        fir_kernel: Sequence[float] | None = None,
        skip_rescale: bool = True,
        progressive_input: str = "none",
        progressive_output: str = "none",
        combine: str = "sum",
        embedding: str = "positional",
        fourier_scale: float = 16.0,
        conditional: bool = True,
        num_classes: int | None = None,
        learned_variance: bool = False,
        centered: bool = True,
        scale_by_sigma: bool = False,
        sigmas: Sequence[float] | None = None,
        dropout: float = 0.0,
        init_scale: float = 0.0,
        groups: int | None = None,
        eps: float = 1e-6,
        scale_shift: bool = False,
        heads: int = 1,
        fourier_features: Sequence[float] = (),
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(locals())
        check_sizes(in_channels=in_channels, image_size=image_size, channels=channels, multipliers=tuple(multipliers))
        check_sizes(blocks=blocks, heads=heads, groups=groups, out_channels=out_channels)
        require_positive(eps, "eps")
        resolutions = level_resolutions(image_size, len(multipliers))
        check_levels(attention_resolutions, resolutions, image_size)
        if sigmas is not None and not (sigmas and all(isinstance(s, int | float) and s > 0 for s in sigmas)):
            raise UserError(f"got {len(sigmas)} sigmas; expected at least one, all of them numbers > 0")
        check_dropout(dropout)
        require_choice(residual_block, "residual_block", ("biggan", "ddpm"))
        require_choice(progressive_input, "progressive_input", ("none", "input_skip", "residual"))
        require_choice(progressive_output, "progressive_output", ("none", "output_skip", "residual"))
        require_choice(combine, "combine", ("sum", "cat"))
        if num_classes is not None and not conditional:
            raise UserError(f"got num_classes={num_classes} with conditional=False; expected None, or conditional=True")
        if scale_by_sigma and sigmas is None and embedding != "fourier":
            raise UserError(
                "got scale_by_sigma=True; expected a label that is sigma (embedding='fourier'), or sigmas=(…) to look it up in"
            )

        self.num_classes, self.in_channels = num_classes, in_channels
        self.learned_variance = learned_variance
        self.checkpoint_activations = checkpoint_activations
        self.conditional, self.centered, self.scale_by_sigma = conditional, centered, scale_by_sigma
        self.progressive_output, self.combine = progressive_output, combine
        self.scale = 2**-0.5 if skip_rescale else 1.0
        table = None if sigmas is None else torch.as_tensor(tuple(sigmas), dtype=torch.float64)
        self.register_buffer("sigmas", table, persistent=False)

        width = 4 * channels if conditional else None
        common: dict[str, Any] = {"groups": groups, "eps": eps, "skip_rescale": skip_rescale, "init_scale": init_scale}

        def block(n_in: int, n_out: int, resample: nn.Module | None = None) -> ResidualBlock:
            return ResidualBlock(
                n_in, n_out, width, dropout=dropout, scale_shift=scale_shift,
                resample=resample, convolve_shortcut=resample is not None, **common,
            )  # fmt: skip

        def attention(n: int, level: int | None) -> nn.Module:
            if level is not None and resolutions[level] not in attention_resolutions:
                return nn.Identity()
            return AttentionBlock(n, heads=heads, **common)

        def down(n: int) -> nn.Module:
            if residual_block == "biggan":
                return block(n, n, Halve(fir_kernel))
            return ConvHalve(n, n, fir_kernel=fir_kernel) if resample_with_conv else Halve(fir_kernel)

        def up(n: int) -> nn.Module:
            if residual_block == "biggan":
                return block(n, n, Double(fir_kernel))
            return ConvDouble(n, n, fir_kernel=fir_kernel) if resample_with_conv else Double(fir_kernel)

        self.embedding = None
        if width is not None:
            features = noise_features(embedding, channels, scale=fourier_scale)
            self.embedding = NoiseLevelEmbedding(features, width, num_classes=num_classes)
        self.features = FourierFeatures(fourier_features)
        self.fine_input = bool(fourier_features)
        self.stem = conv3x3(in_channels * self.features.multiple, channels)

        n, pyramid = channels, in_channels
        skips = [n]
        self.encoder: ListOf[EncoderLevel] = ListOf()
        for i, multiplier in enumerate(multipliers):
            level = EncoderLevel()
            for _ in range(blocks):
                level.blocks.append(block(n, channels * multiplier))
                n = channels * multiplier
                level.attentions.append(attention(n, i))
                skips.append(n)
            if i + 1 < len(multipliers):
                level.down = down(n)
                if progressive_input == "input_skip":
                    level.input_down, level.input_conv = Halve(fir_kernel), conv1x1(pyramid, n)
                    n = 2 * n if combine == "cat" else n
                elif progressive_input == "residual":
                    level.input_down = ConvHalve(pyramid, n, fir_kernel=fir_kernel)
                    pyramid = n
                skips.append(n)
            self.encoder.append(level)

        self.middle = Middle(block(n, n), attention(n, None), block(n, n))

        n_out = (in_channels if out_channels is None else out_channels) * (2 if learned_variance else 1)
        pyramid = 0
        self.decoder: ListOf[DecoderLevel] = ListOf()
        for i, multiplier in reversed(list(enumerate(multipliers))):
            stage = DecoderLevel()
            for _ in range(blocks + 1):
                stage.blocks.append(block(n + skips.pop(), channels * multiplier))
                n = channels * multiplier
            stage.attention = attention(n, i)
            if progressive_output == "output_skip":
                stage.output_norm = GroupNorm(n, groups=groups, eps=eps)
                stage.output_conv = conv3x3(n, n_out, scale=init_scale)
                stage.output_up = Double(fir_kernel) if pyramid else None
                pyramid = n_out
            elif progressive_output == "residual":
                if pyramid:
                    stage.output_up = ConvDouble(pyramid, n, fir_kernel=fir_kernel)
                else:
                    stage.output_norm, stage.output_conv = GroupNorm(n, groups=groups, eps=eps), conv3x3(n, n)
                pyramid = n
            if i > 0:
                stage.up = up(n)
            self.decoder.append(stage)

        self.output_norm: nn.Module | None = None
        self.output_conv: nn.Module | None = None
        if progressive_output != "output_skip":
            self.output_norm = GroupNorm(n, groups=groups, eps=eps)
            self.output_conv = conv3x3(n, n_out, scale=init_scale)

    @classmethod
    def needed_conditioning(cls, options: Mapping[str, Any]) -> Conditioning | None:
        """The index of the noise level, 0 the largest, where `sigmas` are looked up; sigma for the Fourier embedding."""
        sigmas = options.get("sigmas")
        if isinstance(sigmas, Sequence) and sigmas and options.get("scale_by_sigma"):
            return DiscreteIndex(levels=len(sigmas), reverse=True)
        return super().needed_conditioning(options)

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels that are not positive for the Fourier embedding, or no index where `sigmas` are looked up."""
        if not self.conditional:
            return
        if self.sigmas is not None and self.scale_by_sigma:
            check_index(labels, len(self.sigmas))
        else:
            check_fourier(self.options["embedding"], labels)

    def told(self, label: Tensor, class_label: Tensor | None) -> tuple[Tensor | None, object]:
        """What every block is told of noise level and class, and what `attended` is told besides: nothing here."""
        assert self.embedding is not None
        return self.embedding(label, class_label), None

    def attended(self, attention: nn.Module, h: Tensor, context: object) -> Tensor:
        """`h` after an attention layer."""
        found: Tensor = attention(h)
        return found

    def forward(self, x: Tensor, label: Tensor | None = None, class_label: Tensor | None = None) -> Tensor:
        """`x (B, C, H, W)`, `label (B,)`, `class_label (B,)` -> `(B, out_channels, H, W)`."""
        check_images(x, self.in_channels)
        embedding, context = (None, None) if self.embedding is None else self.told(require_label(label), class_label)
        if not self.centered:
            x = 2 * x - 1
        h = self.stem(self.features(x).to(self.stem.weight.dtype))
        pyramid = x.to(self.stem.weight.dtype)
        skips = [h]
        for level in self.encoder:
            for block, attention in zip(level.blocks, level.attentions, strict=True):
                h = self.attended(attention, self.run(block, h, embedding), context)
                skips.append(h)
            if level.down is not None:
                h = self.run(level.down, h, embedding) if isinstance(level.down, ResidualBlock) else level.down(h)
                h, pyramid = self._join_input(level, h, pyramid)
                skips.append(h)

        h = self.run(self.middle.block_1, h, embedding)
        h = self.run(self.middle.block_2, self.attended(self.middle.attention, h, context), embedding)

        image: Tensor | None = None
        for stage in self.decoder:
            for block in stage.blocks:
                h = self.run(block, torch.cat((h, skips.pop()), dim=1), embedding)
            h = self.attended(stage.attention, h, context)
            h, image = self._join_output(stage, h, image)
            if stage.up is not None:
                size = size_of(skips[-1])
                h = stage.up(h, embedding, size) if isinstance(stage.up, ResidualBlock) else stage.up(h, size)

        if self.output_norm is not None and self.output_conv is not None:
            h = self.output_conv(F.silu(self.output_norm(h)))
        elif image is not None:
            h = image
        return self._scale(h, label)

    def _join_input(self, level: EncoderLevel, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        """The halved input joins `h`; returns both."""
        if level.input_down is None:
            return h, pyramid
        pyramid = level.input_down(pyramid)
        if level.input_conv is None:
            pyramid = (pyramid + h) * self.scale
            return pyramid, pyramid
        joined = level.input_conv(pyramid)
        return (torch.cat((joined, h), dim=1) if self.combine == "cat" else joined + h), pyramid

    def _join_output(self, level: DecoderLevel, h: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """This level's contribution to the progressive output; returns `h` and the output so far."""
        if self.progressive_output == "none":
            return h, None
        if level.output_up is not None and image is not None:
            image = level.output_up(image, size_of(h))
        if self.progressive_output == "residual" and image is not None:
            h = (image + h) * self.scale
            return h, h
        if level.output_norm is not None and level.output_conv is not None:
            new = level.output_conv(F.silu(level.output_norm(h)))
            image = new if image is None else image + new
        return h, image

    def _scale(self, h: Tensor, label: Tensor | None) -> Tensor:
        if not self.scale_by_sigma or label is None:
            return h
        sigma = label if self.sigmas is None else self.sigmas[label.long()]
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        return h / expand_as(sigma, h)


def level_resolutions(image_size: int, levels: int) -> tuple[int, ...]:
    """The side of an image of side `image_size` at each of the `levels`, `(levels,)`: halved from one to the next, rounded up.

    >>> level_resolutions(28, 4)
    (28, 14, 7, 4)
    """
    sides = [image_size]
    for _ in range(levels - 1):
        sides.append(-(-sides[-1] // 2))
    return tuple(sides)


def check_levels(attention_resolutions: Sequence[int], levels: Sequence[int], image_size: int) -> None:
    """Raise a `UserError` that names the first resolution with attention that is no level's."""
    for resolution in attention_resolutions:
        if resolution not in levels:
            raise UserError(
                f"got attention_resolutions={tuple(attention_resolutions)}; expected some of {', '.join(map(str, levels))}, "
                f"the levels at image_size={image_size}: no level has resolution {resolution}"
            )
