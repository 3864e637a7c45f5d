"""The affine maps: exact values, inverses, and the log-determinant against autodiff."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import data
from data import DataError, Rescale, Standardize
from experiments import vp
from likelihood import bits_per_dim
from samplers import PredictorCorrector
from sde_lib import VPSDE


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
        lambda: Rescale(levels=65537),
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


# -- Dataset.transform ---------------------------------------------------------------------------------------

# one mean and one standard deviation of each set's training points, written down before other scalings existed
JOINT = {
    "swiss_roll": (0.2323619438065056, 1.3818887752536362),
    "moons": (0.37481312241644044, 0.7276649459494627),
    "gaussians": (0.0063682214319941526, 1.4204262008670896),
    "checkerboard": (0.0018767530708886624, 2.3074219645394383),
    "rings": (-0.0035339566848808317, 1.534339696733538),
    "spirals": (0.005837839515561427, 1.2408792538891553),
    "pinwheel": (-0.0002274614269597805, 0.7403519820853247),
}


@pytest.mark.parametrize("scaling", ["joint", "auto"])
@pytest.mark.parametrize("name", JOINT)
def test_points_of_like_columns_are_scaled_jointly_as_ever(name: str, scaling: str) -> None:
    dataset = data.create(name)
    found = dataset.transform(scaling=scaling)
    x = dataset.split("train").x
    mean = x.mean(dtype=torch.float64)
    square = sum((chunk.double() - mean).square().sum() for chunk in x.split(4096))
    assert found == Standardize(shift=float(mean), scale=math.sqrt(float(square) / x.numel()))  # bit for bit
    assert (found.shift, found.scale) == pytest.approx(JOINT[name], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("scaling", ["joint", "columns", "auto"])
def test_grey_levels_are_rescaled_whatever_the_scaling(scaling: str) -> None:
    assert data.create("digits").transform(scaling=scaling) == Rescale(levels=17, low=-1.0, high=1.0)


def unlike(n: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([5000.0, 3.0]) + torch.tensor([1000.0, 1.0]) * torch.randn(n, 2, generator=generator)


def test_auto_scales_unlike_columns_each_by_its_own() -> None:
    dataset = data.from_tensor(unlike())
    transform = dataset.transform()
    assert transform == dataset.transform(scaling="columns") != dataset.transform(scaling="joint")
    x = transform(dataset.split("train").x.double())
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(2).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(x.var(dim=0, correction=0), torch.ones(2).double(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("means", "stds", "by_columns"),
    [
        ((0.0, 0.0), (9.9, 1.0), False),
        ((0.0, 0.0), (10.1, 1.0), True),  # more than tenfold
        ((9.9, 0.0), (1.0, 1.0), False),
        ((-10.1, 0.0), (1.0, 1.0), True),  # more than ten of the smallest
        ((60.0, 0.0), (8.0, 7.0), False),
        ((500.0, 500.0), (1.0, 2.0), False),  # far from 0, but together
        ((0.0, 5.0), (2.0, 0.0), False),  # a constant column has no scale of its own
    ],
)
def test_auto_looks_at_means_and_standard_deviations(means: tuple, stds: tuple, by_columns: bool) -> None:
    signs = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).repeat(5, 1)  # mean 0, std 1, exactly
    points = torch.tensor(means) + torch.tensor(stds) * signs
    dataset = data.from_tensor(points, test=points, validation=0)
    assert isinstance(dataset.transform().shift, tuple) is by_columns


@pytest.mark.parametrize("shape", [(2,), (3, 5), (2, 4, 3)])
def test_the_density_of_points_scaled_by_columns_follows_the_change_of_variables(shape: tuple[int, ...]) -> None:
    """Of a Gaussian with a mean and a standard deviation per column: log p(v) = log p(x) + D log_det."""
    generator = torch.Generator().manual_seed(1)
    columns = (-1, *(1 for _ in shape[1:]))
    mean = torch.linspace(-300.0, 40.0, shape[0], dtype=torch.float64).reshape(columns)
    std = torch.logspace(-2, 3, shape[0], dtype=torch.float64).reshape(columns)
    v = mean + std * torch.randn(200, *shape, generator=generator, dtype=torch.float64)
    dataset = data.from_tensor(v)
    transform = dataset.transform(scaling="columns")
    shift, scale = (torch.tensor(u, dtype=torch.float64).reshape(columns) for u in (transform.shift, transform.scale))
    in_data = torch.distributions.Normal(mean.expand(shape), std.expand(shape)).log_prob(v).flatten(1).sum(1)
    in_model = torch.distributions.Normal(((mean - shift) / scale).expand(shape), (std / scale).expand(shape))
    log_prob = in_model.log_prob(transform(v)).flatten(1).sum(1)
    torch.testing.assert_close(in_data, log_prob + dataset.dim * transform.log_det, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(transform.inverse(transform(v)), v, rtol=1e-12, atol=1e-9)


def test_a_constant_column_is_named_and_another_scaling_refused() -> None:
    points = unlike(50).double()
    points[:, 1] = 0.1  # whose mean over many rows is not 0.1 to the last bit
    dataset = data.from_tensor(points, name="mine")
    assert isinstance(dataset.transform().scale, float)
    with pytest.raises(DataError, match="mine: .*constant in column 1.*scaling='joint'"):
        dataset.transform(scaling="columns")
    assert isinstance(dataset.transform(scaling="joint").scale, float)
    with pytest.raises(DataError, match="got scaling='rows'; expected auto, joint or columns"):
        dataset.transform(scaling="rows")


def standard_normal(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The score of N(0, I), which VP leaves as it is: its flow is the identity."""
    return -x


ENTROPY = math.log(2 * math.pi * math.e) + math.log(1000)  # of N(5000, 1000^2) N(3, 1), in nats


def test_unlike_columns_score_their_own_density() -> None:
    """-9.75 nats in expectation, by whatever score is exact in model units; one scale for both columns gave -11.63."""
    dataset = data.from_tensor(unlike())
    test, transform = dataset.split("test").x, dataset.transform()
    found = bits_per_dim(VPSDE(), standard_normal, test, transform).mean * 2 * math.log(2)
    laws = torch.distributions.Normal(torch.tensor([5000.0, 3.0]), torch.tensor([1000.0, 1.0]))
    nats = -laws.log_prob(test).sum(dim=1)
    assert found == pytest.approx(float(nats.mean()), abs=0.01)  # the columns' moments are those of 3,600 rows
    assert found == pytest.approx(ENTROPY, abs=3 / math.sqrt(len(test)))
    drawn = PredictorCorrector(steps=20)(
        VPSDE(), standard_normal, (2000, 2), generator=torch.Generator().manual_seed(0)
    ).x
    back = transform.to_data(drawn)
    torch.testing.assert_close(back.mean(dim=0), torch.tensor([5000.0, 3.0]), rtol=0.04, atol=0)
    torch.testing.assert_close(back.std(dim=0), torch.tensor([1000.0, 1.0]), rtol=0.1, atol=0)


@pytest.mark.slow
def test_unlike_columns_score_their_own_density_from_the_command_line(tmp_path) -> None:
    np.save(tmp_path / "table.npy", unlike().numpy())
    flags = {
        "data.name": "arrays", "data.root": tmp_path / "table.npy", "training.steps": 300, "training.log_every": 100,
        "training.eval_every": 300, "training.validation": 8, "sampling.steps": 5, "sampling.second_steps": 5,
        "sampling.n": 20, "likelihood.limit": 200, "model.width": 32, "model.depth": 2,
    }  # fmt: skip
    vp.main([*(f"--config.{name}={value}" for name, value in flags.items()), f"--workdir={tmp_path / 'run'}"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["bits_per_dim"]["mean"] * 2 * math.log(2) == pytest.approx(ENTROPY, abs=0.35)
