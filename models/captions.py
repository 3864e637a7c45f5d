r"""Captions for image networks: a small transformer over words, and attention of pixels to them.

The words of a caption become tokens h_1 ... h_L; a U-Net is told of them in two ways (Nichol et al. 2022, arXiv:2112.10741,
section 2.3 and 3): their mean joins the noise level's embedding in every block, and at its attention layers every pixel
attends to every token. Captions shorter than the longest are padded, and padding is masked: neither attention nor the mean sees
it. The empty caption is the first token alone, which stands for "begin".

The vocabulary is the words of the captions that an encoder was made with. It reads any other caption of these words, in any
order, up to the longest's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import attend
from models.initialization import conv1x1, linear
from models.network import ListOf, check_sizes
from models.normalization import GroupNorm
from numerics import UserError, nearest

_PADDING, _BEGIN = 0, 1
_LISTED = 100
"""Words of a vocabulary that a refusal lists, at most."""


class Context(NamedTuple):
    """A batch of captions: `tokens (B, L, W)`, `mask (B, L)`, true where there is a word, and their mean `pooled (B, W)`."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class TokenBlock(nn.Module):
    """`h (B, L, W)`, `mask (B, L)` -> `(B, L, W)`: self-attention and an MLP, each after a normalisation and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = linear(width, 3 * width), linear(width, width)
        self.mlp_1, self.mlp_2 = linear(width, 2 * width), linear(2 * width, width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_1(h)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        h = h + self.project(attend(query, key, value, mask).transpose(1, 2).flatten(2))
        return h + self.mlp_2(F.gelu(self.mlp_1(self.norm_2(h)), approximate="tanh"))


class CaptionEncoder(nn.Module):
    """Class `(B,)` -> the `Context` of its caption; class K, and None, are the empty caption.

    Args:
        captions: of the K classes, words between spaces.
        width: W, a multiple of `heads`.
        depth: blocks of the transformer.
        heads: of attention.

    Raises:
        UserError: no captions, or what is no sequence of texts, or a width that `heads` does not divide.
    """

    table: Tensor

    def __init__(self, captions: Sequence[str], *, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        check_sizes(width=width, depth=depth, heads=heads)
        _check_texts(captions)
        if width % heads:
            raise UserError(f"got width={width}, heads={heads}; expected a width that is a multiple of the heads")
        self.vocabulary = tuple(sorted({word for caption in captions for word in caption.split()}))
        self.longest = max(len(caption.split()) for caption in captions)
        self.num_classes = len(captions)
        self.register_buffer("table", self._rows(captions), persistent=False)
        self.words = nn.Embedding(len(self.vocabulary) + 2, width)
        self.places = nn.Parameter(0.02 * torch.randn(self.longest + 1, width))
        self.blocks: ListOf[TokenBlock] = ListOf(TokenBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def _rows(self, captions: Sequence[str]) -> Tensor:
        """The tokens of these captions and, last, of the empty one, `(K + 1, longest + 1)`, padded.

        Raises:
            UserError: unknown words, with the vocabulary; more words than the longest caption has.
        """
        number = {word: i for i, word in enumerate(self.vocabulary, start=_BEGIN + 1)}
        table = torch.full((len(captions) + 1, self.longest + 1), _PADDING)
        for row, caption in zip(table, (*captions, ""), strict=True):
            words = caption.split()
            if unknown := [word for word in words if word not in number]:
                known = ", ".join(self.vocabulary[:_LISTED]) + ", ..." * (len(self.vocabulary) > _LISTED)
                hint = nearest(unknown[0], list(self.vocabulary))
                raise UserError(f"got the unknown word {unknown[0]!r} in {caption!r}{hint}; expected words of: {known}")
            if len(words) > self.longest:
                raise UserError(
                    f"got a caption of {len(words)} words, {caption!r}; expected at most {self.longest}, as in training"
                )
            row[: len(words) + 1] = torch.tensor([_BEGIN, *(number[word] for word in words)])
        return table

    def read(self, captions: Sequence[str]) -> None:
        """From now on class k is caption k of these, in words of the vocabulary; "" is the empty caption.

        Raises:
            UserError: no captions, unknown words, or too many of them.
        """
        _check_texts(captions)
        self.table, self.num_classes = self._rows(captions).to(self.table.device), len(captions)

    def forward(self, class_label: Tensor | None, batch: int) -> Context:
        """The captions of a batch."""
        if class_label is None:
            class_label = torch.full((batch,), self.num_classes, device=self.table.device)
        if class_label.shape != (batch,) or class_label.is_floating_point():
            got = f"{tuple(class_label.shape)} of {class_label.dtype}"
            raise UserError(f"got class_label of shape {got}; expected integers of shape ({batch},)")
        # an index below 0 would count from the end; a GPU is not made to wait for the look
        looked_at = class_label.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_at and bool(((class_label < 0) | (class_label > self.num_classes)).any()):
            raise UserError(
                f"got class_label from {int(class_label.min())} to {int(class_label.max())}; expected classes 0 to "
                f"{self.num_classes - 1}, or {self.num_classes} for the empty caption"
            )
        tokens = self.table[class_label]
        mask = tokens != _PADDING
        h = self.words(tokens) + self.places
        for block in self.blocks:
            h = block(h, mask)
        h = self.norm(h)
        weight = mask.to(h.dtype).unsqueeze(-1)
        return Context(h, mask, (h * weight).sum(dim=1) / weight.sum(dim=1))


def _check_texts(captions: Sequence[str]) -> None:
    """Refuses what is no sequence of at least one text; one text is a sequence of letters, and none of captions.

    Raises:
        UserError: where it is none.
    """
    if isinstance(captions, str) or not captions or not all(isinstance(caption, str) for caption in captions):
        got = f"captions={captions!r}" if captions else "no captions"
        raise UserError(f'got {got}; expected a sequence of texts, such as ("",) for the empty one')


class CrossAttention(nn.Module):
    """`x (B, C, H, W)` and a `Context` -> `(x + attention(norm(x), tokens)) scale`: every pixel attends to the words.

    Args:
        channels: C, a multiple of `heads`.
        context_width: of the tokens.
        heads: of attention.
        scale: of the sum.
    """

    def __init__(self, channels: int, context_width: int, *, heads: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        if channels % heads:
            raise UserError(
                f"got heads={heads} for attention over {channels} channels; expected a divisor of the channels"
            )
        self.heads, self.scale = heads, scale
        self.norm = GroupNorm(channels)
        self.query = conv1x1(channels, channels)
        self.key_value = linear(context_width, 2 * channels)
        self.output = conv1x1(channels, channels, scale=0.0)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        batch, channels, height, width = x.shape
        query = self.query(self.norm(x)).reshape(batch, self.heads, channels // self.heads, height * width).mT
        pairs = self.key_value(context.tokens).unflatten(-1, (2, self.heads, -1))
        key, value = pairs.permute(2, 0, 3, 1, 4).unbind(0)
        h = attend(query, key, value, context.mask).mT.reshape(x.shape)
        return (x + self.output(h)) * self.scale
