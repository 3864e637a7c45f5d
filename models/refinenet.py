"""NCSN and NCSNv2: RefineNets that estimate the score of blurred images (Song and Ermon 2019; 2020, appendix
A and B).

A chain of residual stages (the later ones dilated instead of halved) and, coming back, one refinement block
for each stage, which fuses it with what comes from below (Lin et al. 2017, RefineNet): residual convolution
units (RCU), multi-resolution fusion (MRF, here "MSF"), chained residual pooling (CRP). The normalisation is
"instance norm ++": instance normalisation discards the channels' means, so they are put back, themselves
normalised over the channels and scaled.

NCSN's normalisations are conditioned on the index of the noise level. NCSNv2's are not: the network sees no
noise level at all and its output is divided by sigma.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.conditioning import Conditioning, DiscreteIndex
from models.network import ListOf, Network, check_images, check_index, check_sizes, require_label
from models.resampling import Halve
from numerics import UserError, expand_as, require_choice
from sde_lib import geometric_sigmas

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
    "swish": F.silu,
}


class InstanceNormPlus(nn.Module):
    """`gamma (norm(x) + alpha m) + beta`, `m` the channels' means normalised over channels; with `levels`,
    one set per index.

    `x (B, C, H, W)`, `index (B,)` or None -> `(B, C, H, W)`; computed in at least float32.

    Args:
        channels: C.
        levels: number of noise levels, each with weights of its own, or None.
        eps: added to variances.
    """

    def __init__(self, channels: int, *, levels: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        shape = (channels,) if levels is None else (levels, channels)
        self.alpha = nn.Parameter(torch.randn(shape) * 0.02 + 1)
        self.gamma = nn.Parameter(torch.randn(shape) * 0.02 + 1)
        self.beta = nn.Parameter(torch.zeros(shape))
        self.conditional, self.eps = levels is not None, eps

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        means = h.mean(dim=(2, 3))
        spread = (means.var(dim=1, keepdim=True) + self.eps).sqrt()
        means = (means - means.mean(dim=1, keepdim=True)) / spread
        alpha: Tensor = self.alpha
        gamma: Tensor = self.gamma
        beta: Tensor = self.beta
        if self.conditional:
            alpha, gamma, beta = alpha[index], gamma[index], beta[index]
        # gamma (norm + alpha m) + beta, as one scale and one shift per channel
        shift = gamma * alpha * means + beta
        h = F.instance_norm(h, eps=self.eps)
        return (h * _per_channel(gamma) + _per_channel(shift)).to(x.dtype)


def _per_channel(c: Tensor) -> Tensor:
    """`(C,)` or `(B, C)` -> `(…, C, 1, 1)`."""
    return c.unflatten(-1, (-1, 1, 1))


class StageBlock(nn.Module):
    """A pre-activation residual block, `(B, n_in, H, W)` -> `(B, n_out, H', W')`.

    `entry`: the first block of a stage, whose shortcut is a convolution too: 1×1 where `halve` averages 2×2
    pixels after the last convolution, 3×3 and dilated where the stage is dilated instead.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        act: Callable[[Tensor], Tensor],
        *,
        levels: int | None,
        entry: bool,
        halve: bool,
        dilation: int,
    ) -> None:
        super().__init__()
        self.act = act
        self.norm_1 = InstanceNormPlus(n_in, levels=levels)
        self.conv_1 = nn.Conv2d(n_in, n_in, 3, padding=dilation, dilation=dilation)
        self.norm_2 = InstanceNormPlus(n_in, levels=levels)
        self.conv_2 = nn.Conv2d(n_in, n_out, 3, padding=dilation, dilation=dilation)
        self.shortcut: nn.Module = nn.Identity()
        if entry and halve:
            self.shortcut = nn.Conv2d(n_in, n_out, 1)
        elif entry:
            self.shortcut = nn.Conv2d(n_in, n_out, 3, padding=dilation, dilation=dilation)
        self.halve = Halve() if entry and halve else nn.Identity()

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        h = self.conv_1(self.act(self.norm_1(x, index)))
        h = self.conv_2(self.act(self.norm_2(h, index)))
        return self.halve(self.shortcut(x) + h)


class Unit(nn.Module):
    """[norm,] act, 3×3 convolution without bias. Only conditional networks normalise here."""

    def __init__(self, channels: int, act: Callable[[Tensor], Tensor], levels: int | None) -> None:
        super().__init__()
        self.act = act
        self.norm = None if levels is None else InstanceNormPlus(channels, levels=levels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        return self.conv(self.act(x if self.norm is None else self.norm(x, index)))


class RCU(nn.Module):
    """Residual convolution units: `blocks` times `x <- x + unit(unit(x))`; `(B, channels, H, W)` to the same shape."""

    def __init__(self, channels: int, blocks: int, act: Callable[[Tensor], Tensor], levels: int | None) -> None:
        super().__init__()
        self.units: ListOf[ListOf[Unit]] = ListOf(
            ListOf(Unit(channels, act, levels) for _ in range(2)) for _ in range(blocks)
        )

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        for pair in self.units:
            h = x
            for unit in pair:
                h = unit(h, index)
            x = x + h
        return x


class MSF(nn.Module):
    """Multi-resolution fusion: `inputs` images `(B, channels, *)`, each convolved, resized bilinearly to `size`, and summed to
    `(B, features, *size)`.
    """

    def __init__(self, channels: int, features: int, inputs: int, levels: int | None) -> None:
        super().__init__()
        self.norms = nn.ModuleList(
            InstanceNormPlus(channels, levels=levels) for _ in range(0 if levels is None else inputs)
        )
        self.convs = nn.ModuleList(nn.Conv2d(channels, features, 3, padding=1) for _ in range(inputs))

    def forward(self, xs: list[Tensor], size: torch.Size, index: Tensor | None = None) -> Tensor:
        if self.norms:
            xs = [norm(x, index) for norm, x in zip(self.norms, xs, strict=True)]
        hs = [conv(x) for conv, x in zip(self.convs, xs, strict=True)]
        hs = [
            h if h.shape[2:] == size else F.interpolate(h, size=size, mode="bilinear", align_corners=True) for h in hs
        ]
        return torch.stack(hs).sum(0)


class CRP(nn.Module):
    """Chained residual pooling: 5×5 pooling and a convolution, twice, every result added. Mean pooling where
    conditional, else max.
    """

    def __init__(self, channels: int, act: Callable[[Tensor], Tensor], levels: int | None) -> None:
        super().__init__()
        self.act = act
        self.pool = nn.MaxPool2d(5, 1, 2) if levels is None else nn.AvgPool2d(5, 1, 2)
        self.norms = nn.ModuleList(InstanceNormPlus(channels, levels=levels) for _ in range(0 if levels is None else 2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        x = self.act(x)
        path = x
        for i, conv in enumerate(self.convs):
            if self.norms:
                path = self.norms[i](path, index)
            path = conv(self.pool(path))
            x = x + path
        return x


class RefineBlock(nn.Module):
    """RCUs on each input, fusion (where there is more than one), pooling, RCUs: `[(B, C, *), …]` -> `(B,
    features, *size)`.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        inputs: int,
        act: Callable[[Tensor], Tensor],
        *,
        last: bool,
        levels: int | None,
    ) -> None:
        super().__init__()
        self.adapt: ListOf[RCU] = ListOf(RCU(channels, 2, act, levels) for _ in range(inputs))
        self.fuse = MSF(channels, features, inputs, levels) if inputs > 1 else None
        self.pool = CRP(features, act, levels)
        self.output = RCU(features, 3 if last else 1, act, levels)

    def forward(self, xs: list[Tensor], size: torch.Size, index: Tensor | None = None) -> Tensor:
        hs = [adapt(x, index) for adapt, x in zip(self.adapt, xs, strict=True)]
        h = hs[0] if self.fuse is None else self.fuse(hs, size, index)
        return self.output(self.pool(h, index), index)


# (multiplier of the channels, halve?, dilation) of each stage, for images below 96, up to 128 and up to 256 pixels.
_STAGES = {
    "64": ((1, False, 1), (2, True, 1), (2, False, 2), (2, False, 4)),
    "128": ((1, False, 1), (2, True, 1), (2, True, 1), (4, False, 2), (4, False, 4)),
    "256": ((1, False, 1), (2, True, 1), (2, True, 1), (2, True, 1), (4, False, 2), (4, False, 4)),
}


class RefineNet(Network):
    """The RefineNet of NCSN and NCSNv2 (Song and Ermon 2019, arXiv:1907.05600, appendix A; 2020, arXiv:2006.09011).

    `x (B, in_channels, H, W)`, `label (B,)`, the index of the noise level (0 is the largest) -> `(B, in_channels, H, W)`.

    Args:
        sigmas: the noise levels, largest first.
        channels: channels of the first stage (`ngf` in the authors' code).
        size: the published network for images `"64"` (below 96 pixels), `"128"` or `"256"`: 4, 5 or 6 stages.
        conditional: normalisations have one set of weights per noise level (NCSN); else the output is divided
            by sigma (NCSNv2).
        activation: `"elu"`, `"relu"`, `"lrelu"` or `"swish"`.
        centered: False maps images from [0, 1] to [-1, 1] first.
        checkpoint_activations: recompute activations in the backward pass.

    Raises:
        UserError: another size or activation, or sigmas that are not positive and strictly falling.
    """

    sigmas: Tensor
    tables = ("sigmas",)

    def __init__(
        self,
        *,
        sigmas: Sequence[float],
        in_channels: int = 3,
        channels: int = 128,
        size: str = "64",
        conditional: bool = False,
        activation: str = "elu",
        centered: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__(locals())
        check_sizes(in_channels=in_channels, channels=channels)
        require_choice(size, "size", tuple(_STAGES))
        require_choice(activation, "activation", tuple(_ACTIVATIONS))
        values = tuple(float(sigma) for sigma in sigmas)
        if not values or not values[-1] > 0 or not all(a > b for a, b in pairwise(values)):
            raise UserError(f"got {len(values)} sigmas; expected at least one, positive, and strictly falling")
        self.options["sigmas"] = values
        table = torch.tensor(values, dtype=torch.float64)
        self.checkpoint_activations = checkpoint_activations
        self.conditional, self.centered, self.in_channels = conditional, centered, in_channels
        self.register_buffer("sigmas", table, persistent=False)
        act = _ACTIVATIONS[activation]
        levels = len(table) if conditional else None

        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.stages: ListOf[ListOf[StageBlock]] = ListOf()
        widths = []
        n = channels
        for i, (multiplier, halve, dilation) in enumerate(_STAGES[size]):
            m = channels * multiplier
            common: dict[str, Any] = {"levels": levels, "halve": halve, "dilation": dilation}
            first = StageBlock(n, m, act, entry=i > 0, **common)
            self.stages.append(ListOf((first, StageBlock(m, m, act, entry=False, **common))))
            widths.append(m)
            n = m
        self.refine: ListOf[RefineBlock] = ListOf(
            RefineBlock(
                widths[i],
                widths[max(i - 1, 0)],
                1 if i + 1 == len(widths) else 2,
                act,
                last=i == 0,
                levels=levels,
            )
            for i in reversed(range(len(widths)))
        )
        self.output_norm = InstanceNormPlus(channels, levels=levels)
        self.output_conv = nn.Conv2d(channels, in_channels, 3, padding=1)
        self.act = act

    @classmethod
    def needed_conditioning(cls, options: Mapping[str, Any]) -> Conditioning | None:
        """The index of the noise level, 0 the largest."""
        sigmas = options.get("sigmas")
        return DiscreteIndex(levels=len(sigmas), reverse=True) if isinstance(sigmas, Sequence) and sigmas else None

    def check_labels(self, labels: Tensor) -> None:
        """Refuse what is no index of a noise level."""
        check_index(labels, len(self.sigmas))

    def forward(self, x: Tensor, label: Tensor | None = None, class_label: Tensor | None = None) -> Tensor:
        """`x (B, C, H, W)`, `label (B,)` -> `(B, C, H, W)`."""
        check_images(x, self.in_channels)
        index = require_label(label).long()
        h = self.stem(x if self.centered else 2 * x - 1)
        activations = []
        for stage in self.stages:
            for block in stage:
                h = self.run(block, h, index)
            activations.append(h)
        below: list[Tensor] = []
        for refine in self.refine:
            h = activations.pop()
            below = [refine([h, *below], h.shape[2:], index)]
        h = self.output_conv(self.act(self.output_norm(below[0], index)))
        if self.conditional:
            return h
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        return h / expand_as(self.sigmas[index], h)


NCSN = functools.partial(RefineNet, sigmas=geometric_sigmas(levels=10, largest=1.0, smallest=0.01), conditional=True)
"""Song and Ermon 2019 (arXiv:1907.05600): a `RefineNet` with conditional normalisation; by default 10 levels, 1 to 0.01."""

NCSNv2 = functools.partial(
    RefineNet, sigmas=geometric_sigmas(levels=232, largest=50.0, smallest=0.01), conditional=False
)
"""Song and Ermon 2020 (arXiv:2006.09011): a `RefineNet` whose output is divided by sigma; by default CIFAR-10's 232 levels
from 50 to 0.01.
"""
