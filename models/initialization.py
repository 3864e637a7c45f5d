"""Initial weights: uniform with variance `scale / fan_avg` (Glorot and Bengio 2010), zero biases.

The papers' networks start the last layer of every residual branch, and the output layer, at `scale = 0`, so
that a fresh network is close to the identity on its skip path (Ho et al. 2020, appendix B).
"""

from __future__ import annotations

import math
from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


def initialized(layer: Layer, scale: float = 1.0) -> Layer:
    """`layer` itself, its weights uniform with variance `scale / fan_avg` and its bias zero."""
    if scale > 0:
        nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    else:
        nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, padding: int = 1, scale: float = 1.0) -> nn.Conv2d:
    """A 3×3 convolution `(B, in_channels, H, W)` -> `(B, out_channels, H, W)`, initialised with `scale`."""
    return initialized(nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=padding), scale)


def conv1x1(in_channels: int, out_channels: int, *, scale: float = 1.0) -> nn.Conv2d:
    """A 1×1 convolution `(B, in_channels, H, W)` -> `(B, out_channels, H, W)`, initialised with `scale`."""
    return initialized(nn.Conv2d(in_channels, out_channels, 1), scale)


def linear(in_features: int, out_features: int, *, scale: float = 1.0) -> nn.Linear:
    """A linear layer `(B, in_features)` -> `(B, out_features)`, initialised with `scale`."""
    return initialized(nn.Linear(in_features, out_features), scale)
