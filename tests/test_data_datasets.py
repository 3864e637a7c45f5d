"""Data sets and splits: what is in them, that splits do not leak, and the densities against integrals and
samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import data
from data import DataError, Dataset, Split
from numerics import UserError

TOYS = ["swiss_roll", "moons", "gaussians", "checkerboard", "rings", "spirals", "pinwheel"]


def test_digits_are_the_known_images() -> None:
    digits = data.create("digits")
    train, test = digits.split("train"), digits.split("test")
    assert (len(train), len(test), digits.event_shape, digits.levels) == (1500, 297, (1, 8, 8), 17)
    assert (len(digits.split("fit")), len(digits.split("validation"))) == (1300, 200)
    assert int(train.x.max()) == 16
    assert train.x.dtype == torch.uint8
    assert digits.num_classes == 10
    # The split is fixed for ever: results at different times must be comparable.
    assert digits.fingerprint.startswith("013f030c")
    assert data.create("digits", seed=1).fingerprint != digits.fingerprint


def test_splits_do_not_overlap_and_cover_everything() -> None:
    digits = data.create("digits")
    ids = {name: set(digits.split(name).ids.tolist()) for name in ("train", "test", "fit", "validation")}
    assert ids["train"] | ids["test"] == set(range(1797))
    assert not ids["train"] & ids["test"]
    assert not ids["fit"] & ids["validation"]
    assert ids["fit"] | ids["validation"] == ids["train"]
    # An id is the same sample through any split.
    row = digits.split("validation").ids[3]
    position = (digits.split("train").ids == row).nonzero().item()
    assert torch.equal(digits.split("train").x[position], digits.split("validation").x[3])
    assert digits.split("train").labels[position] == digits.split("validation").labels[3]


@pytest.mark.parametrize("name", TOYS)
def test_toy_density_integrates_to_one_and_matches_its_samples(name: str) -> None:
    """The entropy estimated from samples equals the integral of -p log p within 4 standard errors, which
    fails when sampler and density disagree."""
    dataset = data.create(name, train=100, test=4000, validation=10, seed=3)
    axis = torch.linspace(-6, 6, 151, dtype=torch.float64) + 1e-4
    cell = float(axis[1] - axis[0]) ** 2
    grid = torch.cartesian_prod(axis, axis)
    log_prob = dataset.log_prob(grid)
    p = log_prob.exp()
    assert float(p.sum()) * cell == pytest.approx(1.0, abs=2e-3)
    entropy = -float(torch.xlogy(p, p).sum()) * cell
    values = -dataset.log_prob(dataset.split("test").x)
    assert torch.isfinite(values).all()
    assert abs(float(values.mean()) - entropy) < 4 * float(values.std()) / math.sqrt(4000) + 2e-3


@pytest.mark.parametrize("density", [data.SwissRoll(), data.Moons(noise=0.02), data.Rings(), data.Spirals(noise=0.5)])
def test_quadrature_of_curves_is_exact(density) -> None:
    x, _ = density.sample(50, torch.Generator().manual_seed(0))
    torch.testing.assert_close(density.log_prob(x), density.log_prob(x, refine=3), rtol=1e-11, atol=1e-11)


def test_rings_equal_the_bessel_closed_form() -> None:
    """A circle of radius r blurred by N(0, s^2): p(x) = exp(-(|x|^2 + r^2) / 2 s^2) I_0(|x| r / s^2) / (2 pi
    s^2)."""
    density = data.Rings(rings=1, noise=0.3)
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-0.4, 0.9], [1.7, 0.2]], dtype=torch.float64)
    radius = x.norm(dim=1)
    scaled = torch.special.i0e(radius / 0.09).log() - (radius - 1).square() / (2 * 0.09)
    torch.testing.assert_close(density.log_prob(x), scaled - math.log(2 * math.pi * 0.09), rtol=1e-12, atol=1e-12)


def test_gaussians_equal_the_mixture_formula() -> None:
    for layout, components in (("ring", 8), ("grid", 9)):
        density = data.Gaussians(layout=layout, components=components, std=0.4)
        assert density.means.shape == (components, 2)
        x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = torch.stack(
            [
                torch.distributions.MultivariateNormal(mean, 0.16 * torch.eye(2, dtype=torch.float64)).log_prob(x)
                for mean in density.means
            ]
        ).logsumexp(dim=0) - math.log(components)
        torch.testing.assert_close(density.log_prob(x), expected, rtol=1e-12, atol=1e-12)


def test_train_and_test_points_are_different_draws_and_the_seed_decides_them() -> None:
    a, b = data.create("moons", seed=0), data.create("moons", seed=0)
    assert a.fingerprint == b.fingerprint != data.create("moons", seed=1).fingerprint
    assert not torch.isin(a.split("train").x[:, 0], a.split("test").x[:, 0]).float().mean() > 0.01


def test_standardised_training_data_have_mean_zero_and_variance_one() -> None:
    dataset = data.create("pinwheel")
    x = dataset.transform()(dataset.split("train").x.double())
    assert abs(float(x.mean())) < 1e-12
    assert float(x.square().mean()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("shape", [(50, 3), (50, 2, 7), (50, 1, 4, 5)])
def test_a_users_own_array_in_one_line(shape: tuple[int, ...]) -> None:
    array = np.random.RandomState(0).randn(*shape)
    dataset = data.from_tensor(array)
    assert dataset.event_shape == shape[1:]
    assert (len(dataset.split("train")), len(dataset.split("test")), len(dataset.split("validation"))) == (
        45,
        5,
        4,
    )
    rows = torch.cat([dataset.split("train").ids, dataset.split("test").ids])
    assert torch.equal(rows.sort().values, torch.arange(50))
    test = dataset.split("test")
    assert np.array_equal(test.x.numpy(), array[test.ids.numpy()])


def test_a_users_own_images() -> None:
    images = np.random.RandomState(0).randint(0, 256, (20, 3, 4, 4)).astype(np.uint8)
    dataset = data.from_tensor(images, labels=np.arange(20) % 4, validation=0)
    assert (dataset.levels, dataset.num_classes) == (256, 4)
    assert dataset.split("fit").x.shape == (18, 3, 4, 4)
    assert dataset.transform(low=0.0).low == 0.0
    given = data.from_tensor(images, test=images[:3], levels=256)
    assert torch.equal(given.split("test").x, torch.from_numpy(images[:3]))
    assert given.split("test").ids.tolist() == [20, 21, 22]


def test_grey_images_and_lists_need_no_reshaping() -> None:
    images = np.random.RandomState(0).randint(0, 256, (20, 5, 4)).astype(np.uint8)
    dataset = data.from_tensor(images, validation=images[:2], test=images[:3], labels=[0, 1] * 10)
    assert (dataset.levels, dataset.event_shape, dataset.num_classes) == (256, (1, 5, 4), 2)
    assert torch.equal(dataset.split("validation").x[:, 0], torch.from_numpy(images[:2]))
    assert len(dataset.split("fit")) == 20
    points = data.from_tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    assert points.event_shape == (2,)


X = torch.zeros(10, 2)
IMAGES = torch.zeros(10, 1, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: data.from_tensor(torch.full((10, 2), math.nan)), "NaN"),
        (lambda: data.from_tensor(torch.zeros(10)), "expected \\(N, D\\)"),
        (lambda: data.from_tensor(torch.zeros(0, 3)), "empty"),
        (lambda: data.from_tensor(torch.zeros(10, 3, dtype=torch.complex64)), "real"),
        (lambda: data.from_tensor(np.array([["a", "b"]] * 10)), "numbers"),
        (lambda: data.from_tensor(np.array([[object()]] * 10)), "numbers"),
        (lambda: data.from_tensor(IMAGES + 200, levels=17), "from 200 to 200"),
        (
            lambda: data.from_tensor(IMAGES.float() + 0.3, levels=17),
            "got 0.3, which is none of the 17 grey values k/16",
        ),
        (lambda: data.from_tensor(IMAGES[:, 0, 0], levels=17), r"\(N, C, H, W\)"),
        (lambda: data.from_tensor(X, labels=torch.zeros(9, dtype=torch.int64)), "one per sample"),
        (lambda: data.from_tensor(X, labels=torch.zeros(10)), "integers"),
        (lambda: data.from_tensor(X, labels=torch.full((10,), -1)), "label -1"),
        (lambda: data.from_tensor(X, labels=torch.arange(10), classes=("a", "b")), "2 classes"),
        (lambda: data.from_tensor(X, labels=torch.full((10,), 10**12)), "label 1000000000000.*below 65,536"),
        (
            lambda: data.from_tensor(X, torch.zeros(10, dtype=int), test=X, test_labels=torch.arange(10)),
            "label 9.*1 classes",
        ),
        (lambda: data.from_tensor(X, test_labels=torch.arange(10)), "without test"),
        (lambda: data.from_tensor(X, validation_labels=torch.arange(10)), "without validation"),
        (lambda: data.from_tensor(X, validation="a"), "got validation='a'"),
        (lambda: data.from_tensor([[1.0, 2.0], [3.0]]), "rows of equal length"),
        (lambda: data.from_tensor(None), "expected numbers"),
        (lambda: data.from_tensor(X.to_sparse()), "to_dense"),
        (lambda: data.from_tensor(X.to("meta")), "not a dense tensor"),
        (lambda: data.from_tensor(torch.zeros(100, 8, 8, 3, dtype=torch.uint8)), r"reads as \(N, H, W, C\)"),
        (lambda: data.from_tensor(X, seed="a"), "got seed='a'"),
        (lambda: data.from_tensor(X, test=X, seed=-1), "got seed=-1"),
        (lambda: data.create("digits", seed=2**40), "got seed=1099511627776"),
        (lambda: data.from_tensor(X, test_size=10), "test_size"),
        (lambda: data.from_tensor(X, test=X, test_size=2), "one of them"),
        (lambda: data.from_tensor(X, test=torch.zeros(4, 3)), "as in train"),
        (lambda: data.from_tensor(X, validation=9), "got validation=9"),
        (lambda: data.from_tensor(X).transform(), "not constant"),
        (lambda: data.from_tensor(X).split("dev"), "without a split 'dev'"),
        (lambda: Dataset(name="d", splits={"train": Split(X, None, torch.arange(10))}), "train and test"),
        (lambda: Split(X, None, torch.arange(9)), "ids"),
        (lambda: data.create("digits", validation=1500), "got validation=1500"),
        (lambda: data.create("moons", noise=0.0), "got noise=0.0"),
        (lambda: data.Moons(noise="1"), "got noise='1'"),
        (lambda: data.create("moons", train=0), "got train=0"),
        (lambda: data.create("gaussians", layout="line"), "'ring' or 'grid'"),
        (lambda: data.create("gaussians", layout="grid"), "square number"),
        (lambda: data.create("checkerboard", squares=3), "even"),
        (lambda: data.Moons().log_prob(torch.zeros(3, 3)), r"expected \(B, 2\)"),
    ],
)
def test_bad_input_is_refused_in_one_line(build, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("digit", {}, r"the data set 'digit', did you mean 'digits'\?; expected one of digits, "),
        ("digits", {"size": 3}, "the option 'size' for the data set 'digits'.*; expected some of validation, seed"),
        ("moons", {"nosie": 0.1}, r"'nosie' for the data set 'moons', did you mean 'noise'\?"),
        ("moons", {"seed": "a"}, "got seed='a'; expected a value of type int"),
        ("image_folder", {"root": "x"}, "without size"),
    ],
)
def test_names_and_options_are_those_of_the_functions(name: str, options: dict, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        data.create(name, **options)
    assert "\n" not in str(caught.value)


def test_options_by_name_are_the_functions_arguments() -> None:
    options = data.options("image_folder")
    assert options["size"].default is options["size"].REQUIRED
    assert (options["channels"].default, options["filter"].default) == (3, "lanczos")
    assert set(data.options("moons")) == {"noise", "train", "test", "validation", "seed"}
