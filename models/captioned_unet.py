"""A U-Net that is told captions: the names of the classes, read word by word (`models.captions`).

A class that was never trained on has a caption all the same, so the network can be asked for new combinations of known words.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import AttentionBlock
from models.captions import CaptionEncoder, Context, CrossAttention
from models.initialization import linear
from models.ncsnpp import NCSNpp, level_resolutions
from models.network import ListOf
from numerics import UserError


class _WithWords(nn.Module):
    """What is learned of each place is added; then attention among the pixels, and to the words.

    In noise all places look alike, so words alone could not say what is to be where.
    """

    def __init__(self, pixels: AttentionBlock, words: CrossAttention, side: int) -> None:
        super().__init__()
        self.pixels, self.words = pixels, words
        channels = pixels.norm.num_channels
        self.places = nn.Parameter(channels**-0.5 * torch.randn(1, channels, side, side))

    def forward(self, h: Tensor, context: Context) -> Tensor:
        places: Tensor = self.places
        if h.shape[2:] != places.shape[2:]:  # images that are not square
            places = F.interpolate(places, size=h.shape[2:], mode="bilinear")
        return self.words(self.pixels(h + places), context)


class CaptionedUNet(NCSNpp):
    """`x (B, in_channels, H, W)`, `label (B,)` of order one, `class_label (B,)` -> `x`'s shape: the project's U-Net

    Args:
        class_names: the captions of the classes that it is trained on, words between spaces; their words are all that it knows.
        reads: the captions that stand for the classes instead, where there are others, as `reading` sets them.
        text_width, text_depth, text_heads: of the transformer over words.
        in_channels, image_size, channels, multipliers, blocks, attention_resolutions, heads, dropout: as in `UNet`; where there
            is attention among pixels there is attention to words.

    Raises:
        UserError: no captions, captions that it cannot read, or as `UNet`.
    """

    def __init__(
        self,
        *,
        class_names: Sequence[str],
        in_channels: int = 1,
        image_size: int = 16,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention_resolutions: Sequence[int] | None = None,
        heads: int = 1,
        dropout: float = 0.0,
        text_width: int = 64,
        text_depth: int = 2,
        text_heads: int = 4,
        reads: Sequence[str] | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        own: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        lowest = level_resolutions(image_size, len(multipliers))[-1]
        super().__init__(
            in_channels=in_channels,
            image_size=image_size,
            channels=channels,
            multipliers=tuple(multipliers),
            blocks=blocks,
            attention_resolutions=(lowest,) if attention_resolutions is None else tuple(attention_resolutions),
            embedding="smooth",
            scale_shift=True,
            heads=heads,
            dropout=dropout,
            checkpoint_activations=checkpoint_activations,
        )
        if not class_names:
            raise UserError(
                "got a captioned network without class_names; expected captions: use unet for data without them"
            )
        self.captions = CaptionEncoder(class_names, width=text_width, depth=text_depth, heads=text_heads)
        self.options = {**own, "class_names": tuple(class_names)}
        self.num_classes = len(class_names)
        if reads is not None:
            self._read(reads)
        self.pooled = linear(text_width, 4 * channels)

        def with_words(attention: nn.Module, side: int) -> nn.Module:
            if not isinstance(attention, AttentionBlock):
                return attention
            words = CrossAttention(attention.norm.num_channels, text_width, heads=heads, scale=attention.scale)
            return _WithWords(attention, words, side)

        sides = level_resolutions(image_size, len(multipliers))
        for level, side in zip(self.encoder, sides, strict=True):
            level.attentions = ListOf(with_words(a, side) for a in level.attentions)
        self.middle.attention = with_words(self.middle.attention, sides[-1])
        for stage, side in zip(self.decoder, reversed(sides), strict=True):
            stage.attention = with_words(stage.attention, side)

    def reading(self, captions: Sequence[str]) -> CaptionedUNet:
        """This network with the same weights, in which class k is caption k of these instead.

        Raises:
            UserError: no captions, words that are not in `captions.vocabulary`, or more of them than in any of `class_names`.
        """
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        made = copy.deepcopy(self, shared)
        made._read(captions)
        return made

    def _read(self, captions: Sequence[str]) -> None:
        """Class k is caption k of these from now on, also of a copy that is saved."""
        self.captions.read(captions)
        self.options = {**self.options, "reads": tuple(captions)}
        self.num_classes = len(captions)

    def check_labels(self, labels: Tensor) -> None:
        """The smooth embedding takes any label."""

    def told(self, label: Tensor, class_label: Tensor | None) -> tuple[Tensor | None, Context]:
        """The embedding of noise level and caption for every block, and the words for attention."""
        context = self.captions(class_label, label.shape[0])
        assert self.embedding is not None
        return self.embedding(label, added=self.pooled(context.pooled)), context

    def attended(self, attention: nn.Module, h: Tensor, context: object) -> Tensor:
        """Attention among pixels, and to the words where there is any."""
        found: Tensor = attention(h, context) if isinstance(attention, _WithWords) else attention(h)
        return found
