"""The affine maps: exact values, inverses, and the log-determinant against autodiff."""

from __future__ import annotations

import math

import pytest
import torch

from data import DataError, Rescale, Standardize


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-0.3, 2.7)])
def test_rescale_maps_the_ends_and_inverts(levels: int, low: float, high: float) -> None:
    transform = Rescale(levels=levels, low=low, high=high)
    v = torch.linspace(0, levels, 101, dtype=torch.float64).reshape(1, 101)
    x = transform(v)
    assert x[0, 0].item() == pytest.approx(low, abs=1e-14)
    assert x[0, -1].item() == pytest.approx(high, abs=1e-14)
    torch.testing.assert_close(transform.inverse(x), v, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (Rescale(levels=17), (3,)),
        (Rescale(levels=256, low=0.0), (1, 2, 2)),
        (Standardize(shift=2.0, scale=0.3), (4,)),
        (Standardize(shift=(1.0, -1.0), scale=(0.5, 3.0)), (2,)),
        (Standardize(shift=(1.0, -1.0), scale=(0.5, 3.0)), (2, 2, 3)),
        (Standardize(shift=0.0, scale=(0.5, 3.0)), (2, 5)),
    ],
)
def test_log_det_is_the_jacobian(transform: Rescale | Standardize, shape: tuple[int, ...]) -> None:
    v = torch.rand((1, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(transform, v).reshape(v.numel(), v.numel())
    expected = torch.linalg.slogdet(jacobian).logabsdet.item() / v.numel()
    assert transform.log_det == pytest.approx(expected, abs=1e-13)
    torch.testing.assert_close(transform.inverse(transform(v)), v, rtol=1e-12, atol=1e-12)


def test_every_grey_value_survives_the_round_trip_with_any_dequantisation_noise() -> None:
    for levels in (2, 17, 256):
        transform = Rescale(levels=levels)
        k = torch.arange(levels, dtype=torch.uint8).reshape(1, 1, 1, levels)
        assert torch.equal(transform.to_images(transform.centres(k)), k)
        for u in (1e-3, 0.999):
            assert torch.equal(transform.to_images(transform(k.float() + u)), k)


def test_to_images_clamps_the_edges_and_refuses_nan() -> None:
    transform = Rescale(levels=17)
    x = torch.tensor([[-5.0, -1.0, 1.0, 5.0, math.inf, -math.inf]])
    assert transform.to_images(x).tolist() == [[0, 0, 16, 16, 16, 0]]
    assert transform.to_unit(x).tolist() == [[0, 0, 1, 1, 1, 0]]
    with pytest.raises(DataError, match="NaN"):
        transform.to_images(torch.tensor([[math.nan]]))


def test_uniform_data_cost_exactly_log2_levels_bits() -> None:
    for levels in (17, 256):
        transform = Rescale(levels=levels, low=-0.5, high=3.0)
        log_prob_x = -math.log(3.5)  # uniform on [low, high], per dimension
        bits = -(log_prob_x + transform.log_det) / math.log(2)
        assert bits == pytest.approx(math.log2(levels), abs=1e-14)


def test_centres_refuses_values_outside_the_levels() -> None:
    transform = Rescale(levels=17)
    with pytest.raises(DataError, match="from 0 to 17"):
        transform.centres(torch.tensor([[0, 17]], dtype=torch.uint8))
    with pytest.raises(DataError, match="float32"):
        transform.centres(torch.zeros(1, 3))


def test_standardize_is_per_feature_along_dimension_one() -> None:
    transform = Standardize(shift=(1.0, 2.0), scale=(2.0, 4.0))
    images = torch.tensor([[[[3.0]], [[10.0]]]])
    assert transform(images).flatten().tolist() == [1.0, 2.0]
    assert transform.centres(images).flatten().tolist() == [1.0, 2.0]
    with pytest.raises(DataError, match="expected 2 features"):
        transform(torch.zeros(5, 3))
    with pytest.raises(DataError, match="grey levels"):
        transform.to_images(images)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Rescale(levels=1),
        lambda: Rescale(levels=257),
        lambda: Rescale(levels=2.0),
        lambda: Rescale(levels=True),
        lambda: Rescale(low=1.0, high=1.0),
        lambda: Rescale(low=math.nan),
        lambda: Standardize(scale=0.0),
        lambda: Standardize(scale=(1.0, -1.0)),
        lambda: Standardize(scale=()),
        lambda: Standardize(shift="a"),
        lambda: Standardize(shift=(0.0, 0.0, 0.0), scale=(1.0, 1.0)),
    ],
)
def test_construction_refuses(build) -> None:
    with pytest.raises(DataError, match="expected"):
        build()


def test_transforms_are_hashable_values() -> None:
    assert Rescale(levels=17) == Rescale(levels=17)
    assert len({Standardize(shift=[1.0], scale=[2.0]), Standardize(shift=(1.0,), scale=(2.0,))}) == 1
