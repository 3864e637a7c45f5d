r"""A classifier of noisy samples: p(y | x_t), for guidance.

What a class looks like depends on how much noise there is, so the classifier is told: its input is scaled to unit variance,
x / sqrt(alpha^2 data_std^2 + sigma^2), and the log-SNR enters every block (Dhariwal and Nichol 2021, arXiv:2105.05233,
section 4.1, take the encoder of their U-Net). `training.train_noise_classifier` trains it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.conditioning import Conditioning, LogSNR
from models.embeddings import NoiseLevelEmbedding, noise_features
from models.initialization import conv3x3, linear
from models.mlp import MLPBlock
from models.network import ListOf, check_sizes
from models.normalization import GroupNorm
from models.resampling import Halve
from models.residual import ResidualBlock
from numerics import UserError, batch_time, expand_as, require_positive
from sde_lib import SDE

_SIDE = 4  # images are halved down to this side, and then read pixel by pixel


class NoiseClassifier(nn.Module):
    """`classifier(x, t)`: the logits `(B, K)` of the class of x_t = x `(B, *)` at t `()` or `(B,)`.

    Images `(C, H, W)` go through residual blocks that halve them down to 4 pixels a side, everything else through those of an
    MLP on its numbers.

    Args:
        event_shape: of one sample.
        num_classes: K.
        sde: whose samples at t the classifier judges.
        data_std: standard deviation of the clean data.
        width: channels of the first blocks, twice as many after a halving; of the MLP's layers.
        depth: of the MLP.

    Raises:
        UserError: sizes that are too small; from a call, samples of another shape.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        num_classes: int,
        sde: SDE,
        *,
        data_std: float = 1.0,
        width: int = 32,
        depth: int = 3,
        conditioning: Conditioning | None = None,
    ) -> None:
        super().__init__()
        check_sizes(event_shape=tuple(event_shape), width=width, depth=depth)
        require_positive(data_std, "data_std")
        if num_classes < 2:
            raise UserError(f"got num_classes={num_classes}; expected at least 2")
        self.event_shape, self.num_classes = tuple(event_shape), num_classes
        self.sde, self.data_std = sde, float(data_std)
        self.conditioning = LogSNR() if conditioning is None else conditioning
        inner = 4 * width
        self.embedding = NoiseLevelEmbedding(noise_features("smooth", 16), inner)
        self.blocks: ListOf[nn.Module] = ListOf()
        self.norm: nn.Module = nn.Identity()
        if len(self.event_shape) == 3:
            self.stem: nn.Module = conv3x3(self.event_shape[0], width)
            self.blocks.append(ResidualBlock(width, width, inner, init_scale=1.0, skip_rescale=True))
            channels, sides = width, (self.event_shape[1], self.event_shape[2])
            while max(sides) > _SIDE:
                wider = 2 * width
                block = ResidualBlock(
                    channels, wider, inner, resample=Halve(), convolve_shortcut=True, init_scale=1.0, skip_rescale=True
                )
                self.blocks.append(block)
                channels, sides = wider, (-(-sides[0] // 2), -(-sides[1] // 2))
            self.norm = GroupNorm(channels)
            features = channels * sides[0] * sides[1]
        else:
            numbers = 1
            for size in self.event_shape:
                numbers *= size
            self.stem = nn.Sequential(nn.Flatten(), linear(numbers, width))
            self.blocks.extend(MLPBlock(width, inner) for _ in range(depth))
            features = width
        self.output = linear(features, num_classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The logits, `(B, K)`."""
        if tuple(x.shape[1:]) != self.event_shape:
            raise UserError(f"got x of shape {tuple(x.shape)}; expected (B, {', '.join(map(str, self.event_shape))})")
        t = batch_time(t, x)
        scale = ((self.sde.alpha(t) * self.data_std).square() + self.sde.sigma(t).square()).rsqrt()
        weight = self.output.weight
        h = self.stem((x * expand_as(scale, x)).to(weight.dtype))
        label = self.conditioning(self.sde, t).to(torch.promote_types(weight.dtype, torch.float32))
        embedding = self.embedding(label)
        for block in self.blocks:
            h = block(h, embedding)
        logits: Tensor = self.output(F.silu(self.norm(h)).flatten(1))
        return logits
