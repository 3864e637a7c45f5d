"""Grey values that come as floats or wide integers: converted exactly where the levels are stated, refused where nothing is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import data
from data import DataError, Rescale
from likelihood import bits_per_dim
from sde_lib import VPSDE

GENERATOR = torch.Generator().manual_seed(0)
K = torch.randint(0, 256, (40, 1, 8, 8), generator=GENERATOR)
K17 = torch.randint(0, 17, (40, 1, 8, 8), generator=GENERATOR)
K16BIT = torch.randint(0, 65536, (40, 1, 8, 8), generator=GENERATOR)


def standard_normal(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The score of N(0, I), which VP leaves as it is: its flow is the identity."""
    return -x


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (K / 255, r"all k/255.*levels=256"),
        ((K / 255).double(), r"all k/255.*levels=256"),
        ((K / 255).half(), r"all k/255.*levels=256"),
        (K / 256, r"all k/256.*integers k and give levels=256"),
        (K.float(), r"all whole numbers from 0 to 255.*levels=256"),
        (K, r"all whole numbers from 0 to 255.*levels=256"),  # int64
        (K.short(), r"all whole numbers.*levels=256"),
        (K / 255 * 2 - 1, r"all 2k/255 - 1.*levels=256"),
        (K17 / 16, r"all k/16.*levels=17"),
        (K17.float(), r"whole numbers from 0 to 16.*levels=17"),
        ((K17 > 8).float(), r"whole numbers from 0 to 1.*levels=2 "),
        (K16BIT / 65535, r"all k/65535.*levels=65536"),
        (K16BIT.float(), r"whole numbers from 0 to 65.*levels=65536"),
        (K[:, 0] / 255, r"all k/255.*levels=256"),  # (N, H, W)
        ((K / 255).flatten(1), r"all k/255.*reshape them to images"),  # (N, H W)
        (K.flatten(1).to(torch.uint8), r"whole numbers.*reshape them to images"),
        (K.to(torch.uint8).reshape(20, 2, 1, 8, 8), r"whole numbers.*reshape them to images"),  # films
        ((K.repeat(3, 1, 1, 1) / 255 - 0.4465) / 0.2010, r"values only.*as grey values do"),  # standardised
        ((K / 255 - 0.4465) / 0.2010, r"values only.*as grey values do"),  # few of them
        (((K / 255 - 0.4465) / 0.2010)[:, 0], r"values only.*as grey values do"),  # (N, H, W)
        (((K / 255 - 0.4465) / 0.2010).flatten(1), r"values only.*as grey values do"),  # (N, H W)
        ((K + K.flip(0)).float() / 510 * 0.9, r"values only.*as grey values do"),  # means of two, rescaled
        ((K - 128).to(torch.int8), r"values only.*as grey values do|integers from"),  # bytes read as signed ones
        (K - 128, r"values only.*as grey values do|integers from"),
    ],
)
def test_grey_values_that_are_not_stated_are_refused(x: torch.Tensor, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        data.from_tensor(x)
    assert "continuous=True" in str(caught.value) and "\n" not in str(caught.value)
    dataset = data.from_tensor(x, continuous=True)
    assert dataset.levels is None and dataset.split("train").x.is_floating_point()


@pytest.mark.parametrize(
    ("k", "levels"), [(K, 256), (K17, 17), (K16BIT, 65536), ((K17 > 8).long(), 2), (K16BIT % 4096, 4096)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "scaled", [lambda k, top: k, lambda k, top: k / top, lambda k, top: 2 * (k / top) - 1], ids=["k", "unit", "signed"]
)
def test_stated_levels_make_integers_exactly(k: torch.Tensor, levels: int, dtype: torch.dtype, scaled) -> None:
    x = scaled(k.to(torch.float32), levels - 1).to(dtype)
    made = data.from_tensor(x, levels=levels, validation=x[:3], test=x[:7])
    own = torch.uint8 if levels <= 256 else torch.int32
    assert torch.equal(made.split("train").x, k.to(own)) and torch.equal(made.split("test").x, k[:7].to(own))
    assert torch.equal(made.split("validation").x, k[:3].to(own))
    # the same data set as of integers
    assert made.fingerprint == data.from_tensor(k, levels=levels, validation=k[:3], test=k[:7]).fingerprint


def test_a_dark_test_set_is_read_as_the_training_data_are() -> None:
    dark = torch.zeros(5, 1, 8, 8)
    dark[0, 0, 0, 0] = 1.0  # level 1 of integers, level 255 of numbers in [0, 1]
    assert int(data.from_tensor(K.float(), test=dark, levels=256).split("test").x.max()) == 1
    assert int(data.from_tensor(K / 255, test=dark, levels=256).split("test").x.max()) == 255
    with pytest.raises(DataError, match="0 and 1 only for 256 grey levels.*expected levels=2, or integers"):
        data.from_tensor(dark, levels=256)


@pytest.mark.parametrize(
    ("x", "levels", "what"),
    [
        (K / 255 + 0.001 * (K == 7), 256, "which is none of the 256 grey values k/255"),
        (K / 256, 256, "none of the 256 grey values k/255"),
        (K + 0.5, 256, r"got floats from 0.5 to 255.5 for 256 grey levels; expected 0 to 255, or \[0, 1\]"),
        (K.float(), 17, "for 17 grey levels"),
        (-K.float(), 256, "for 256 grey levels"),
        (torch.full((40, 1, 8, 8), math.nan), 256, "from nan to nan"),
        ((K / 255).bfloat16(), 256, "bfloat16, which does not tell 256 levels apart"),
        (K / 255, 65537, "got levels=65537; expected an integer from 2 to 65,536"),
    ],
)
def test_what_lands_on_no_level_is_refused(x: torch.Tensor, levels: int, what: str) -> None:
    with pytest.raises(DataError, match=what):
        data.from_tensor(x, levels=levels)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(40, 1, 8, 8, generator=GENERATOR),
        torch.rand(40, 1, 8, 8, generator=GENERATOR),
        torch.rand(40, 1, 8, 8, generator=GENERATOR).half(),
        torch.randn(400, 1, 8, 8, generator=GENERATOR).relu(),  # half of it is 0
        torch.rand(40, 2, 16, generator=GENERATOR),
        torch.rand(400, 2, generator=GENERATOR),
        torch.eye(4).repeat(30, 1),  # one-hot
        torch.randint(0, 90, (400, 3), generator=GENERATOR).float(),  # ages and the like
        torch.randint(-900, 900, (40, 1, 64), generator=GENERATOR),  # a signal of whole numbers around 0
        torch.cat(
            [torch.zeros(40, 1, 8, 8), torch.rand(1, 1, 8, 8, generator=GENERATOR)]
        ),  # one sample is off the grid
    ],
)
def test_real_numbers_and_small_tables_are_taken(x: torch.Tensor) -> None:
    assert data.from_tensor(x).levels is None


def test_one_hot_rows_have_a_way_through() -> None:
    x = torch.eye(20).repeat(5, 1)
    with pytest.raises(DataError, match="whole numbers from 0 to 1"):
        data.from_tensor(x)
    assert data.from_tensor(x, continuous=True).levels is None


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_arrays_of_floats(tmp_path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    (np.save if ending == "npy" else lambda p, x: np.savez(p, x=x))(path, (K / 255).numpy())
    with pytest.raises(DataError, match=r"--config.data.levels=256.*--config.data.continuous=True"):
        data.create("arrays", root=path)
    dataset = data.create("arrays", root=path, levels=256)
    assert torch.equal(dataset.split("test").x.long(), K[dataset.split("test").ids])
    assert data.create("arrays", root=path, continuous=True).levels is None


def test_mapped_floats(tmp_path) -> None:
    x = (K / 255).numpy()
    data.save(data.from_tensor(x, continuous=True), tmp_path / "said")
    assert data.mapped(tmp_path / "said").levels is None  # what was said is kept
    manifest = tmp_path / "said" / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"continuous": true', '"classes_": []')
    )  # as earlier versions wrote
    with pytest.raises(DataError, match="all k/255"):
        data.mapped(tmp_path / "said")
    assert data.mapped(tmp_path / "said", continuous=True).levels is None
    grey = data.mapped(tmp_path / "said", levels=256).split("train")
    assert torch.equal(grey.x.long(), K[grey.ids])


def test_bits_per_dim_takes_exact_floats() -> None:
    sde, transform = VPSDE(), Rescale(levels=17)
    grey = K17[:3].to(torch.uint8)
    expected = bits_per_dim(sde, standard_normal, grey, transform, generator=torch.Generator().manual_seed(1)).per_image
    for images in (grey / 16, grey.double(), grey / 16 * 2 - 1):
        found = bits_per_dim(
            sde, standard_normal, images, transform, generator=torch.Generator().manual_seed(1)
        ).per_image
        assert torch.equal(found, expected)
    with pytest.raises(DataError, match="none of the 17 grey values"):
        bits_per_dim(sde, standard_normal, grey / 16 + 0.02, transform)


# -- 16 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [4096, 65536])
def test_a_uniform_density_of_many_levels_scores_their_logarithm(levels: int) -> None:
    """Under a flow that is the identity, with the uniform density on [-1, 1] in place of the prior."""
    transform = Rescale(levels=levels)
    dataset = data.from_tensor(K16BIT % levels, levels=levels)
    found = bits_per_dim(
        VPSDE(),
        standard_normal,
        dataset.split("test").x,
        transform,
        prior=lambda z: torch.full((len(z),), -64 * math.log(2), dtype=torch.float64),
        generator=torch.Generator().manual_seed(0),
    )
    assert found.mean == pytest.approx(math.log2(levels), abs=1e-5)


def test_every_one_of_65536_grey_values_comes_back() -> None:
    transform = Rescale(levels=65536)
    k = torch.arange(65536, dtype=torch.int32).reshape(1, 1, 256, 256)
    assert torch.equal(transform.to_images(transform.centres(k)), k)
    assert transform.to_images(transform.centres(k)).dtype == torch.int32
    assert transform.log_det == math.log(2 / 65536)


def test_uint16_arrays_are_images_of_65536_levels(tmp_path) -> None:
    x = K16BIT.numpy().astype(np.uint16)
    np.save(tmp_path / "a.npy", x)
    dataset = data.create("arrays", root=tmp_path / "a.npy")
    assert dataset.levels == 65536 and dataset.split("train").x.dtype == torch.int32
    assert torch.equal(dataset.split("test").x.long(), K16BIT[dataset.split("test").ids])
    assert data.from_tensor(torch.from_numpy(x)).fingerprint == data.from_tensor(x[:, 0]).fingerprint
    kept = data.save(dataset, tmp_path / "kept")
    assert kept.levels == 65536 and int(kept.split("train").x.max()) > 60000
    with pytest.raises(DataError, match="expected 0..4095; check the number of levels"):
        data.create("arrays", root=tmp_path / "a.npy", levels=4096)


def test_bytes_stay_bytes() -> None:
    """What the data sets of earlier versions hold, and their fingerprints, are as they were."""
    digits = data.create("digits")
    assert digits.fingerprint.startswith("013f030c") and digits.split("train").x.dtype == torch.uint8
    assert data.from_tensor(K.to(torch.uint8)).split("train").x.dtype == torch.uint8
