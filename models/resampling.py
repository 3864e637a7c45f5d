"""Halving and doubling images, plainly or through a FIR filter, at any size.

One rule for odd sizes: an odd image is first made even by repeating its last row or column, so halving rounds
up; doubling is followed by a crop to the size it must meet (the skip connection's). No information is lost
and even sizes are untouched.

The filtered forms are StyleGAN2's (Karras et al. 2020) with a separable binomial kernel: low-pass filtering
and keeping every second pixel; or inserting zeros and low-pass filtering. Each is one grouped (transposed)
convolution, exactly equal to the published custom operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.initialization import conv3x3
from numerics import UserError

Size = tuple[int, int]


def size_of(x: Tensor) -> Size:
    """`(H, W)` of `x (B, C, H, W)`."""
    return x.shape[-2], x.shape[-1]


def make_even(x: Tensor) -> Tensor:
    """`x (B, C, H, W)` with an odd height or width extended by repeating the last row or column."""
    odd_height, odd_width = x.shape[-2] % 2, x.shape[-1] % 2
    if odd_height or odd_width:
        x = F.pad(x, (0, odd_width, 0, odd_height), mode="replicate")
    return x


def crop(x: Tensor, size: Size | None) -> Tensor:
    """The top left `size` of `x (B, C, H, W)`."""
    if size is None or size_of(x) == size:
        return x
    return x[..., : size[0], : size[1]]


class FIR(nn.Module):
    """The two-dimensional low-pass filter made of the taps `kernel` (normalised to sum 1) along both axes."""

    kernel: Tensor

    def __init__(self, kernel: Sequence[float] = (1, 3, 3, 1)) -> None:
        super().__init__()
        taps = torch.as_tensor(kernel, dtype=torch.float32)
        if taps.ndim != 1 or len(taps) % 2 or len(taps) < 2 or sum(kernel) == 0:
            raise UserError(
                f"got fir_kernel={tuple(kernel)}; expected an even number of taps with a sum that is not 0, e.g. (1, 3, 3, 1)"
            )
        plane = torch.outer(taps, taps)
        self.register_buffer(
            "kernel", (plane / plane.sum()).flip(0, 1).view(1, 1, len(taps), len(taps)), persistent=False
        )
        self.taps = len(taps)

    def _convolve(self, convolve: Callable[..., Tensor], x: Tensor, kernel: Tensor, **options: int) -> Tensor:
        # In float32 under autocast too: a sum of 16 weighted pixels, and strided grouped convolutions in bf16 are
        # five times slower on a CPU.
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = kernel.to(dtype).expand(x.shape[1], -1, -1, -1)
        with torch.autocast(x.device.type, enabled=False):
            return convolve(x.to(dtype), weight, groups=x.shape[1], **options).to(x.dtype)

    def filter(self, x: Tensor, *, padding: int, gain: float = 1.0) -> Tensor:
        """The filtered image, `2 padding - taps + 1` pixels larger each way."""
        return self._convolve(F.conv2d, x, self.kernel * gain, padding=padding)

    def down(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C, H/2, W/2)`."""
        return self._convolve(F.conv2d, x, self.kernel, stride=2, padding=(self.taps - 1) // 2)

    def up(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> `(B, C, 2H, 2W)`; the gain of 4 makes up for the inserted zeros."""
        kernel = self.kernel.flip(2, 3) * 4
        return self._convolve(F.conv_transpose2d, x, kernel, stride=2, padding=(self.taps - 1) // 2)


class Halve(nn.Module):
    """`(B, C, H, W)` -> `(B, C, ceil(H/2), ceil(W/2))` without weights: the mean of 2×2 pixels, or filtered.

    Args:
        fir_kernel: taps of the filter, an even number of them, or None.

    >>> Halve()(torch.zeros(1, 3, 9, 14)).shape
    torch.Size([1, 3, 5, 7])
    """

    def __init__(self, fir_kernel: Sequence[float] | None = None) -> None:
        super().__init__()
        self.fir = None if fir_kernel is None else FIR(fir_kernel)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        x = make_even(x)
        return F.avg_pool2d(x, 2) if self.fir is None else self.fir.down(x)


class Double(nn.Module):
    """`(B, C, H, W)` -> `(B, C, *size)`, `size` at most `(2H, 2W)` (the default), without weights: repeated,
    or filtered.
    """

    def __init__(self, fir_kernel: Sequence[float] | None = None) -> None:
        super().__init__()
        self.fir = None if fir_kernel is None else FIR(fir_kernel)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.fir is None else self.fir.up(x)
        return crop(x, size)


class ConvHalve(nn.Module):
    """`(B, C, H, W)` -> `(B, C', ceil(H/2), ceil(W/2))` by a 3×3 convolution with stride 2 (after the filter,
    if any).
    """

    def __init__(self, in_channels: int, out_channels: int, *, fir_kernel: Sequence[float] | None = None) -> None:
        super().__init__()
        self.fir = None if fir_kernel is None else FIR(fir_kernel)
        self.conv = conv3x3(in_channels, out_channels, stride=2, padding=0)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        x = make_even(x)
        if self.fir is None:
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv(self.fir.filter(x, padding=self.fir.taps // 2))


class ConvDouble(nn.Module):
    """`(B, C, H, W)` -> `(B, C', *size)`: repeated and convolved; or, filtered, a transposed convolution and
    the filter.
    """

    def __init__(self, in_channels: int, out_channels: int, *, fir_kernel: Sequence[float] | None = None) -> None:
        super().__init__()
        self.fir = None if fir_kernel is None else FIR(fir_kernel)
        self.conv = conv3x3(in_channels, out_channels)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        if self.fir is None:
            return self.conv(crop(F.interpolate(x, scale_factor=2.0, mode="nearest"), size))
        # A convolution over the zero-inserted image; the bias comes last, where the filter's borders cannot dim it.
        h = F.conv_transpose2d(x, self.conv.weight.transpose(0, 1).flip(2, 3), stride=2)
        h = self.fir.filter(h, padding=self.fir.taps // 2 - 1, gain=4.0)
        bias = self.conv.bias
        return crop(h if bias is None else h + bias.view(1, -1, 1, 1), size)
