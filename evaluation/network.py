"""The network of the default features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from evaluation.features import convolution

__all__ = ["ConvolutionalClassifier"]

_WIDTH = 16
_HIDDEN = 32
_WEIGHTS = (0.7, 0.5, 1.0)
"""Of the three kinds of features."""


class ConvolutionalClassifier(nn.Module):
    """Three convolutions and two linear layers, with three kinds of features:

    * the means over the picture of the 32 maps of the second convolution, which see noise and blur (the last layers learn to
      ignore these);
    * the 32 units before the class scores, which see what a class looks like inside;
    * the class probabilities, which see a class that is missing: it takes away nearly all of one number's variance.

    Each feature is divided by its standard deviation over the training data, so a Fréchet distance is in units of the data's
    own spread, and then weighted. The weights are those of a small grid at which noise of standard deviation 0.05 and each
    of the ten classes missing are all seen on digits, at 297 samples, with more than three standard errors.

    Args:
        event_shape: (C, H, W).
        classes: number of classes.
        generator: of the initial weights.
    """

    def __init__(self, event_shape: tuple[int, ...], classes: int, generator: torch.Generator) -> None:
        super().__init__()
        channels, height, width = event_shape
        self.first = convolution(channels, _WIDTH, 1, generator)
        self.second = convolution(_WIDTH, 2 * _WIDTH, 2, generator)
        self.third = convolution(2 * _WIDTH, 2 * _WIDTH, 2, generator)
        # Two halvings, rounded up; then at most 4x4.
        pooled = (min(4, -(-height // 4)), min(4, -(-width // 4)))
        self.pool = nn.AdaptiveAvgPool2d(pooled)
        self.hidden = self._linear(2 * _WIDTH * pooled[0] * pooled[1], _HIDDEN, generator)
        self.output = self._linear(_HIDDEN, classes, generator)
        self._parts = [2 * _WIDTH, _HIDDEN, classes]
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(sum(self._parts)))
        self.register_buffer("scale", torch.ones(sum(self._parts)))

    @staticmethod
    def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
        return layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64 + K) and log p(y | x) (B, K) of images (B, C, H, W) in [0, 1]."""
        maps = functional.relu(self.second(functional.relu(self.first(2 * x - 1))))
        hidden = functional.relu(self.hidden(self.pool(functional.relu(self.third(maps))).flatten(1)))
        log_probs = functional.log_softmax(self.output(hidden), dim=1)
        features = torch.cat([maps.mean(dim=(2, 3)), hidden, log_probs.exp()], dim=1)
        return (features - self.mean) * self.scale, log_probs

    def standardise(self, features: Tensor) -> None:
        """Set the shift and scale of every feature from features (N, 64 + K) of the training data, taken before this call."""
        self.mean.copy_(features.mean(dim=0))
        parts, scales = features.std(dim=0).split(self._parts), self.scale.split(self._parts)
        for part, weight, scale in zip(parts, _WEIGHTS, scales, strict=True):
            # A unit that is (nearly) dead on the training data must not blow up on others.
            scale.copy_(weight / part.clamp(min=max(1e-3, 0.1 * float(part.median()))))
