"""Embeddings: how a number (the noise level) or a class becomes a vector.

Three embeddings of the noise level. `Positional` (Ho et al. 2020, after Vaswani et al. 2017) and `Fourier`
(Song et al. 2021, appendix C; the logarithm of its label is taken inside) are the published networks'. Their
top frequencies are 1 radian per unit of `999 t` and about 2 pi 50 per unit of `log sigma`: the network can,
and does, ripple in time at that frequency, and an ODE solver has to follow it. `Smooth` holds the label
itself and a few sines of it whose phase turns at most `top` radians per unit of the label; with a log-SNR
label of order one (`models.conditioning.LogSNR`) the network is a smooth function of the noise level, as the
true score is.

All are computed in at least float32, also under autocast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.float_tables import FloatTables
from models.initialization import linear
from numerics import UserError, require_choice


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class PositionalEmbedding(FloatTables):
    """`label (B,)` -> `(B, dim)`: sines, then cosines, at frequencies falling geometrically from 1 to
    `1/period`.

    `endpoint=False` stops one frequency short of `1/period` and `cosine_first` swaps the halves:
    guided-diffusion's (Dhariwal and Nichol 2021) form. An odd `dim` is refused.
    """

    frequencies: Tensor
    tables = ("frequencies",)

    def __init__(
        self, dim: int, *, period: float = 10_000.0, endpoint: bool = True, cosine_first: bool = False
    ) -> None:
        super().__init__()
        half = dim // 2
        if dim % 2 or half < 2:
            raise UserError(f"got {dim} features of a positional embedding; expected an even number >= 4")
        exponents = torch.arange(half, dtype=torch.float32) * (-math.log(period) / (half - endpoint))
        self.register_buffer("frequencies", exponents.exp(), persistent=False)
        self.dim, self.cosine_first = dim, cosine_first

    def forward(self, label: Tensor) -> Tensor:
        phase = label.to(_working_dtype(self.frequencies)).unsqueeze(-1) * self.frequencies
        halves = (phase.cos(), phase.sin()) if self.cosine_first else (phase.sin(), phase.cos())
        return torch.cat(halves, dim=-1)


class FourierEmbedding(FloatTables):
    """`label (B,) > 0` -> `(B, dim)`: sine and cosine of `2 pi w log(label)`, `w ~ N(0, scale^2)` fixed at
    construction.
    """

    weight: Tensor
    tables = ("weight",)

    def __init__(self, dim: int, *, scale: float = 16.0) -> None:
        super().__init__()
        if dim % 2:
            raise UserError(f"got {dim} features of a Fourier embedding; expected an even number")
        self.register_buffer("weight", torch.randn(dim // 2) * scale)
        self.dim = dim

    def forward(self, label: Tensor) -> Tensor:
        phase = label.to(_working_dtype(self.weight)).log().unsqueeze(-1) * self.weight * (2 * math.pi)
        return torch.cat((phase.sin(), phase.cos()), dim=-1)


class SmoothEmbedding(FloatTables):
    """`label (B,)`, of order one -> `(B, dim)`: 1, the label, and sines and cosines of frequencies up to
    `top`.

    The frequencies are `top k / K`, `k = 1 … K`, in radians per unit of the label: none higher, so the
    network's dependence on the label is as smooth as its first layers make it.
    """

    frequencies: Tensor
    tables = ("frequencies",)

    def __init__(self, dim: int = 16, *, top: float = math.pi) -> None:
        super().__init__()
        half = (dim - 2) // 2
        if dim % 2 or half < 1:
            raise UserError(f"got {dim} features of a smooth embedding; expected an even number >= 4")
        self.register_buffer("frequencies", torch.arange(1, half + 1) * (top / half), persistent=False)
        self.dim = dim

    def forward(self, label: Tensor) -> Tensor:
        value = label.to(_working_dtype(self.frequencies)).unsqueeze(-1)
        phase = value * self.frequencies
        return torch.cat((torch.ones_like(value), value, phase.sin(), phase.cos()), dim=-1)


Features = PositionalEmbedding | FourierEmbedding | SmoothEmbedding


class ClassEmbedding(nn.Module):
    """`class_label (B,)` integers -> `(B, dim)`. One more row stands for "no class" (`None`, or the index
    `num_classes`).

    A classifier-free-guided model (Ho and Salimans 2021) is trained by replacing some labels by
    `num_classes`.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise UserError(
                f"got num_classes={num_classes}; expected an integer >= 1, or None for a network without classes"
            )
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)

    def forward(self, class_label: Tensor | None, batch: int) -> Tensor:
        if class_label is None:
            return self.table.weight[self.num_classes].expand(batch, -1)
        if class_label.shape != (batch,) or class_label.is_floating_point():
            got = f"{tuple(class_label.shape)} of {class_label.dtype}"
            raise UserError(f"got class_label of shape {got}; expected integers of shape ({batch},)")
        return self.table(class_label)


def noise_features(kind: str, dim: int, *, scale: float = 16.0) -> Features:
    """The features of the label by name: `"positional"` with `dim` of them, `"fourier"` with `dim`
    frequencies, or `"smooth"`.
    """
    require_choice(kind, "embedding", ("positional", "fourier", "smooth"))
    if kind == "positional":
        return PositionalEmbedding(dim)
    if kind == "fourier":
        return FourierEmbedding(2 * dim, scale=scale)
    return SmoothEmbedding()


class NoiseLevelEmbedding(nn.Module):
    """The network's whole conditioning: features of the label, two layers, the class added, and the
    activation.

    `label (B,)`, `class_label (B,)` -> `(B, width)`. The last activation is applied here, once, and not again
    in every block.
    """

    def __init__(self, features: Features, width: int, *, num_classes: int | None = None) -> None:
        super().__init__()
        self.features = features
        self.hidden = linear(features.dim, width)
        self.output = linear(width, width)
        self.classes = None if num_classes is None else ClassEmbedding(num_classes, width)
        self.activation = nn.SiLU()

    def forward(self, label: Tensor, class_label: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """`added (B, width)` joins before the activation, as a class does."""
        with torch.autocast(label.device.type, enabled=False):
            features = self.features(label).to(self.hidden.weight.dtype)
            h = self.output(self.activation(self.hidden(features)))
            if added is not None:
                h = h + added.to(h.dtype)
            if self.classes is not None:
                h = h + self.classes(class_label, label.shape[0])
            elif class_label is not None:
                raise UserError(
                    "got class_label for a network without classes; expected None: make it with num_classes=…"
                )
            return self.activation(h)
