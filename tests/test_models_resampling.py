"""Resampling against its definition, written out pixel by pixel."""

import pytest
import torch

from models.resampling import FIR, ConvDouble, ConvHalve, Double, Halve, make_even

KERNEL = (1.0, 3.0, 3.0, 1.0)
UNEVEN = (1.0, 5.0, 7.0, 1.0)


def upfirdn(x, taps, up, down, pad):
    """Insert up-1 zeros after each pixel, pad, convolve with the taps' outer product, keep every down-th."""
    taps = torch.tensor(taps, dtype=x.dtype)
    plane = torch.outer(taps, taps)
    plane = plane / plane.sum() * up**2
    b, c, h, w = x.shape
    wide = torch.zeros(b, c, h * up, w * up, dtype=x.dtype)
    wide[..., ::up, ::up] = x
    wide = torch.nn.functional.pad(wide, (pad[0], pad[1], pad[0], pad[1]))
    n = len(taps)
    rows, columns = wide.shape[-2] - n + 1, wide.shape[-1] - n + 1
    y = torch.zeros(b, c, rows, columns, dtype=x.dtype)
    for i in range(n):
        for j in range(n):
            y += plane[n - 1 - i, n - 1 - j] * wide[..., i : i + rows, j : j + columns]
    return y[..., ::down, ::down]


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("taps", [KERNEL, UNEVEN])
def test_filtered_resampling_is_the_published_operator(x, taps):
    fir = FIR(taps).double()
    torch.testing.assert_close(fir.down(x), upfirdn(x, taps, 1, 2, (1, 1)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fir.up(x), upfirdn(x, taps, 2, 1, (2, 1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taps", [KERNEL, UNEVEN])
def test_filtered_convolutions_are_a_filter_and_a_strided_convolution(x, taps):
    halve, double = ConvHalve(3, 4, fir_kernel=taps).double(), ConvDouble(3, 4, fir_kernel=taps).double()
    for layer in (halve, double):
        torch.nn.init.normal_(layer.conv.bias)
    blurred = upfirdn(x, taps, 1, 1, (2, 2))
    expected = torch.nn.functional.conv2d(blurred, halve.conv.weight, halve.conv.bias, stride=2)
    torch.testing.assert_close(halve(x), expected, rtol=1e-6, atol=1e-6)
    # zeros inserted, convolved at full overlap, filtered, then the bias
    wide = torch.zeros(2, 3, 16, 12, dtype=x.dtype)
    wide[..., ::2, ::2] = x
    wide = torch.nn.functional.pad(wide, (2, 1, 2, 1))
    h = upfirdn(torch.nn.functional.conv2d(wide, double.conv.weight), taps, 1, 1, (1, 1)) * 4
    torch.testing.assert_close(double(x), h + double.conv.bias.view(1, -1, 1, 1), rtol=1e-6, atol=1e-6)


def test_a_constant_stays_constant_inside():
    ones = torch.ones(1, 2, 8, 8)
    fir = FIR(KERNEL)
    torch.testing.assert_close(fir.up(ones)[..., 2:-2, 2:-2], torch.ones(1, 2, 12, 12))
    torch.testing.assert_close(fir.down(ones)[..., 1:-1, 1:-1], torch.ones(1, 2, 2, 2))


@pytest.mark.parametrize("kernel", [None, KERNEL])
def test_resampling_commutes_with_flips(x, kernel):
    for layer in (Halve(kernel).double(), Double(kernel).double()):
        torch.testing.assert_close(layer(x.flip(2, 3)), layer(x).flip(2, 3))


@pytest.mark.parametrize("kernel", [None, KERNEL])
@pytest.mark.parametrize("size", [(7, 9), (8, 5), (1, 1)])
def test_odd_sizes_are_halved_upwards_and_cropped_back(kernel, size):
    x = torch.randn(2, 4, *size)
    half = (size[0] + 1) // 2, (size[1] + 1) // 2
    for down in (Halve(kernel), ConvHalve(4, 4, fir_kernel=kernel)):
        assert down(x).shape == (2, 4, *half)
        torch.testing.assert_close(down(x), down(make_even(x)))
    for up in (Double(kernel), ConvDouble(4, 4, fir_kernel=kernel)):
        assert up(torch.randn(2, 4, *half), size).shape == (2, 4, *size)


def test_an_odd_image_is_extended_by_its_last_row_and_column():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    even = make_even(x)
    assert torch.equal(even[..., :3, :3], x)
    assert torch.equal(even[..., 3, :], even[..., 2, :])
    assert torch.equal(even[..., :, 3], even[..., :, 2])
    assert torch.equal(Halve()(x)[0, 0], torch.tensor([[2.0, 3.5], [6.5, 8.0]]))


def test_plain_resampling_is_a_mean_and_a_copy(x):
    torch.testing.assert_close(Halve()(x)[0, 0, 0, 0], x[0, 0, :2, :2].mean())
    torch.testing.assert_close(Halve()(Double()(x)), x)


def test_an_odd_kernel_is_refused():
    with pytest.raises(ValueError, match="even number of taps"):
        FIR((1, 2, 1))
