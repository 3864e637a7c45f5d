r"""A classifier that is read as an energy (Grathwohl et al. 2020, arXiv:1912.03263).

    p(y | x) = softmax f(x)_y,        exp(-E(x, y)) = exp(f(x)_y),        E(x) = -log sum_y exp(f(x)_y)

Adding one number to all logits leaves p(y | x) as it is and moves E: what a classifier leaves free is given to the density of
x. With one output and no classes, E = -f.

The network has no batch normalisation, under which a state's energy would depend on its batch mates, and a smooth
nonlinearity, since samples follow its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.initialization import conv3x3, linear
from models.network import ListOf, check_sizes
from models.resampling import Halve
from numerics import UserError, labels_for
from sde_lib import SDE

_SIDE = 4  # images are halved down to this side


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), `(B, C, H, W)`, nothing normalised."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = conv3x3(channels, channels), conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class ClassifierEnergy(nn.Module):
    """`logits(x)` `(B, K)` of x `(B, *)`, and the energies that they are.

    Images `(C, H, W)` go through residual blocks and halvings down to 4 pixels a side, everything else through an MLP.

    Args:
        event_shape: of one sample.
        num_classes: K; None for an energy without classes, K = 1.
        width: channels of the first block, twice as many after a halving; of the MLP's layers.
        depth: residual blocks at each resolution; layers of the MLP, less one.
        sde: what training asks of every model; nothing here depends on it.

    Raises:
        UserError: sizes that are too small, or one class.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_classes: int | None,
        sde: SDE,
        *,
        width: int = 32,
        depth: int = 1,
    ) -> None:
        super().__init__()
        check_sizes(event_shape=tuple(event_shape), width=width, depth=depth)
        if num_classes is not None and num_classes < 2:
            raise UserError(
                f"got num_classes={num_classes}; expected at least 2, or None for an energy without classes"
            )
        self.event_shape, self.num_classes, self.sde = tuple(event_shape), num_classes, sde
        self.blocks: ListOf[nn.Module] = ListOf()
        if len(self.event_shape) == 3:
            channels = width
            sides: tuple[int, ...] = self.event_shape[1:]
            self.blocks.append(conv3x3(self.event_shape[0], channels))
            self.blocks.extend(Residual(channels) for _ in range(depth))
            while max(sides) > _SIDE:
                self.blocks.append(nn.Sequential(nn.SiLU(), conv3x3(channels, 2 * channels), Halve()))
                channels, sides = 2 * channels, tuple(-(-side // 2) for side in sides)
                self.blocks.extend(Residual(channels) for _ in range(depth))
            features = channels * math.prod(sides)
        else:
            self.blocks.extend((nn.Flatten(), linear(math.prod(self.event_shape), width)))
            for _ in range(depth):
                self.blocks.append(nn.Sequential(nn.SiLU(), linear(width, width)))
            features = width
        self.output = linear(features, 1 if num_classes is None else num_classes)

    @property
    def headline(self) -> str:
        """What it is, in a line."""
        return (
            "E(x) = -f(x)" if self.num_classes is None else f"E(x) = -log sum_y exp f(x)_y, {self.num_classes} classes"
        )

    def logits(self, x: Tensor) -> Tensor:
        """f(x), `(B, K)`."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise UserError(f"got x of shape {tuple(x.shape)}; expected (B, {', '.join(map(str, self.event_shape))})")
        h = x.to(self.output.weight.dtype)
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.output(F.silu(h).flatten(1))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)

    def energy(self, x: Tensor, labels: Tensor | Sequence[int] | int | None = None) -> Tensor:
        """E(x) = -log sum_y exp f(x)_y, or E(x, y) = -f(x)_y for `labels` `(B,)`; `(B,)`, nats, up to one number.

        Raises:
            UserError: labels that are not one class for all samples or one for each, or for an energy without classes.
        """
        if labels is not None:
            labels = labels_for(x, labels, self.num_classes)
        return energy_of(self.logits(x), labels)


def energy_of(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """E(x) `(B,)`, or E(x, y) for `labels` `(B,)`, of the logits `(B, K)`."""
    if labels is None:
        return -logits.logsumexp(dim=1)
    return -logits.gather(1, labels.unsqueeze(1)).squeeze(1)
