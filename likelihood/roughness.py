r"""What an image's bits/dim can be told from without a network: how rough it is.

A lossless coder predicts a pixel from its neighbours and pays about log2(1 + |error|) bits for what it misses (so JPEG-LS,
whose median predictor is one of those below: Weinberger, Seroussi and Sapiro 2000, IEEE Trans. Image Processing 9, 1309). A
flow's density pays in the same coin: where the neighbours tell less, its narrow directions are wider. So the logarithms of
differences say most of what an image costs, and more than the length that zlib finds, which sees repeated bytes only.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_AT_ONCE = 1 << 20  # numbers


def roughness(images: Tensor) -> Tensor:
    """Six statistics of grey values `(N, C, H, W)`, `(N, 6)`, float64; of other shapes, and below 3x3 pixels, the fifth alone.

    With v the grey levels, means over all pixels of all channels, each channel a picture of its own:

    1. log2(1/2 + |m|), m what the median predictor misses: the median of left, upper, and left + upper - upper left;
    2. log2(1 + |4 v - the four neighbours|);
    3. log2(1 + |v - 2 v' + v''|), three pixels in a row, and three one below the other;
    4. the share of the pixels that have the picture's commonest value;
    5. bits a pixel of m compressed by zlib; of other shapes, of the values themselves;
    6. v.
    """
    size = max(1, _AT_ONCE // max(1, images[0].numel()))
    return torch.cat([_roughness(images[k : k + size]) for k in range(0, len(images), size)])


def _roughness(images: Tensor) -> Tensor:
    images = images.cpu()
    if images.ndim != 4 or min(images.shape[2:]) < 3:
        return _compressed(images)
    v = images.to(torch.float64)
    beside = v[..., 1:-1, :-2] + v[..., 1:-1, 2:] + v[..., :-2, 1:-1] + v[..., 2:, 1:-1]
    padded = pad(v, (1, 0, 1, 0))
    left, upper, corner = padded[..., 1:, :-1], padded[..., :-1, 1:], padded[..., :-1, :-1]
    low, high = torch.minimum(left, upper), torch.maximum(left, upper)
    missed = v - (left + upper - corner).clamp(low, high)
    pixels = v.flatten(2)
    means = (
        _log(missed, above=0.5),  # a pixel that is met tells more than one that is missed by a level
        _log(4 * v[..., 1:-1, 1:-1] - beside),
        _log(v.diff(n=2, dim=-1)) + _log(v.diff(n=2, dim=-2)),
        (pixels == pixels.mode(dim=2, keepdim=True).values).to(torch.float64).flatten(1).mean(dim=1),
        _compressed(missed.to(torch.int64)).squeeze(1),
        v.flatten(1).mean(dim=1),
    )
    return torch.stack(means, dim=1)


def _log(size: Tensor, above: float = 1.0) -> Tensor:
    return torch.log2(above + size.abs()).flatten(1).mean(dim=1)


def _compressed(values: Tensor) -> Tensor:
    """Bits a number of integers `(N, *)` compressed by zlib, `(N, 1)`, float64."""
    lengths = [8 * len(zlib.compress(_bytes(row), 9)) / row.size for row in values.numpy()]
    return torch.tensor(lengths, dtype=torch.float64).unsqueeze(1)


def _bytes(row: np.ndarray) -> bytes:
    """Of one sample, by its own numbers alone: below 256 a difference modulo 256 is as good as the difference."""
    return row.astype(np.uint8 if int(abs(row).max()) < 256 else np.uint16).tobytes()
