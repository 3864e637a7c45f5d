"""Pictures and folders as people have them: 16 bits, transparency, large photos, other programs' files, val without test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin

import data
from data import DataError
from evaluation.pictures import save_pictures
from experiments import vp

RANDOM = np.random.RandomState(0)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def grey(value: int) -> np.ndarray:
    return np.full((4, 4), value, np.uint8)


# -- 16 bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bit_pictures_keep_every_bit(tmp_path: Path, ending: str) -> None:
    pixels = RANDOM.randint(0, 65536, (12, 6, 4)).astype(np.uint16)
    for i, x in enumerate(pixels):
        save(tmp_path / "in" / f"{i:02}.{ending}", x)
    options = {"root": tmp_path / "in", "size": (6, 4), "channels": 1, "levels": 65536}
    dataset = data.create("image_folder", **options)
    assert dataset.levels == 65536 and dataset.event_shape == (1, 6, 4)
    for part in ("train", "test"):
        split = dataset.split(part)
        assert np.array_equal(split.x[:, 0].numpy(), pixels[split.ids.numpy()])
    cached = data.create("image_folder", cache=tmp_path / "cache", **options).split("train")
    assert np.array_equal(cached.x[:, 0].numpy(), pixels[cached.ids.numpy()])


def test_16_bit_pictures_are_resized_in_their_own_depth(tmp_path: Path) -> None:
    pixels = np.array([[1000, 1001], [1003, 1004]], np.uint16).repeat(4, 0).repeat(4, 1)
    save(tmp_path / "a.png", pixels)
    found = data.PictureDecoder(size=2, channels=1, levels=65536, filter="box").open(tmp_path / "a.png", "a")
    assert found.tolist() == [[[1000, 1001], [1003, 1004]]]


def test_depths_are_not_mixed_in_silence(tmp_path: Path) -> None:
    save(tmp_path / "deep.png", np.full((4, 4), 5000, np.uint16))
    save(tmp_path / "flat.png", grey(5))
    with pytest.raises(DataError, match=r"deeper than 8 bits.*--config.data.levels=65536"):
        data.PictureDecoder(size=4).open(tmp_path / "deep.png", "deep")
    with pytest.raises(DataError, match="8 bits a channel; expected 16 for levels=65536"):
        data.PictureDecoder(size=4, channels=1, levels=65536).open(tmp_path / "flat.png", "flat")
    with pytest.raises(DataError, match="from 5000 to 5000; expected 0..4095"):
        data.PictureDecoder(size=4, channels=1, levels=4096).open(tmp_path / "deep.png", "deep")
    with pytest.raises(DataError, match="expected channels=1"):
        data.PictureDecoder(size=4, levels=65536)


@pytest.mark.parametrize(
    ("channels", "levels"), [(1, 65536), (1, 4096), (1, 256), (2, 256), (3, 256), (4, 256), (1, 2), (3, 17)]
)
def test_samples_are_written_in_their_own_depth_and_read_back(tmp_path: Path, channels: int, levels: int) -> None:
    transform = data.Rescale(levels=levels)
    k = torch.from_numpy(RANDOM.randint(0, levels, (12, channels, 6, 4)))
    drawn = transform.to_data(transform.centres(k))
    written = save_pictures(tmp_path, drawn, levels)
    assert [path.name for path in written[:2]] == ["000000.png", "000001.png"]
    depth = {"levels": levels} if levels > 256 else {}
    found = data.create("image_folder", root=tmp_path, size=(6, 4), channels=channels, **depth).split("test")
    expected = k[found.ids] if levels >= 256 else (k[found.ids] * (255 / (levels - 1))).round().long()
    assert torch.equal(found.x.long(), expected)


def test_deep_colour_is_not_cut_to_8_bits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 channels of 65536 levels; expected 1"):
        save_pictures(tmp_path, torch.zeros(2, 3, 4, 4, dtype=torch.int32), 65536)


# -- transparency --------------------------------------------------------------------------------------------


def test_transparency_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    pixels = RANDOM.randint(0, 256, (12, 4, 4, 4)).astype(np.uint8)
    for i, x in enumerate(pixels):
        save(tmp_path / f"{i:02}.png", x)
    dataset = data.create("image_folder", root=tmp_path, size=4, channels=4)
    test = dataset.split("test")
    assert np.array_equal(test.x.numpy(), pixels[test.ids.numpy()].transpose(0, 3, 1, 2))
    assert data.create("image_folder", root=tmp_path, size=4).event_shape == (3, 4, 4)
    opaque = data.PictureDecoder(size=4, channels=2)
    save(tmp_path / "grey.png", grey(7))
    assert opaque.open(tmp_path / "grey.png", "grey")[:, 0, 0].tolist() == [7, 255]


# -- folders -------------------------------------------------------------------------------------------------


def test_hidden_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in ("a", "b"):
            for i in range(3):
                save(tmp_path / part / label / f"{i}.png", grey(i))
                save(tmp_path / part / label / ".ipynb_checkpoints" / f"{i}-checkpoint.png", grey(99))
            (tmp_path / part / label / "._0.png").write_bytes(b"resource fork")
            (tmp_path / part / label / "Thumbs.db").write_bytes(b"thumbs")
        save(tmp_path / part / ".cache" / "c.png", grey(99))
    save(tmp_path / "__MACOSX" / "train" / "a" / "._0.png", grey(99))
    dataset = data.create("image_folder", root=tmp_path, size=4, channels=1, validation=0)
    assert dataset.classes == ("a", "b")
    assert (len(dataset.split("train")), len(dataset.split("test")), int(dataset.split("train").x.max())) == (6, 6, 2)
    assert len(dataset.notes) == 1 and dataset.notes[0].startswith("23 hidden files are passed over (")
    assert dataset.names[0] == str(Path("train") / "a" / "0.png")


def test_hidden_files_beside_loose_pictures_and_arrays(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", grey(i))
    (tmp_path / "._0.png").write_bytes(b"resource fork")
    assert len(data.create("image_folder", root=tmp_path, size=4, test_size=1, validation=0).names) == 3
    np.save(tmp_path / "x.npy", RANDOM.randn(20, 2))
    (tmp_path / "._x.npy").write_bytes(b"resource fork")
    assert data.create("arrays", root=tmp_path).event_shape == (2,)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "Val"])
def test_train_and_val_without_test(tmp_path: Path, val: str) -> None:
    for i in range(10):
        save(tmp_path / "train" / f"{i}.png", grey(i))
        save(tmp_path / val / f"{i}.png", grey(100 + i))
    options = {"root": tmp_path, "size": 4, "channels": 1}
    dataset = data.create("image_folder", **options)
    assert dataset.split("validation").x[:, 0, 0, 0].tolist() == list(range(100, 110))
    drawn = torch.cat([dataset.split("train").x, dataset.split("test").x])[:, 0, 0, 0]
    assert drawn.sort().values.tolist() == list(range(10)) and len(dataset.split("test")) == 1
    reported = data.create("image_folder", test=val, **options)
    assert reported.split("test").x[:, 0, 0, 0].tolist() == list(range(100, 110))
    assert len(reported.split("train")) == 10
    with pytest.raises(DataError, match="got test='held_out'"):
        data.create("image_folder", test="held_out", **options)


def test_a_class_that_is_called_train_is_not_taken_for_a_split(tmp_path: Path) -> None:
    for label in ("car", "train"):
        save(tmp_path / label / "0.png", grey(0))
    with pytest.raises(DataError, match=r"with train; expected train and test or val \(or neither\)"):
        data.create("image_folder", root=tmp_path, size=4)


# -- large photos --------------------------------------------------------------------------------------------


def test_a_photo_of_24_megapixels_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By JPEG's own reduction, to what is close to decoding all of it."""
    photo = Image.radial_gradient("L").resize((6000, 4000))
    photo.save(tmp_path / "photo.jpg", quality=95)
    drafts = []
    draft = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile,
        "draft",
        lambda image, *a: drafts.append(draft(image, *a)) or drafts[-1],
    )
    found = data.PictureDecoder(size=(32, 48), channels=1, crop="none").open(tmp_path / "photo.jpg", "photo")
    assert len(drafts) == 1 and drafts[0] is not None
    expected = np.asarray(photo.resize((48, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(found[0].astype(int) - expected).max() <= 3
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match=r"6000x4000 pixels; expected 1 to 20,000,000; .*--config.data.max_pixels"):
        data.PictureDecoder(size=32, max_pixels=20_000_000).open(tmp_path / "photo.jpg", "photo")
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_default_limit_is_100_megapixels(tmp_path: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
    Image.new("1", (10_001, 10_000)).save(tmp_path / "b.png")
    assert data.PictureDecoder(size=8, channels=1).open(tmp_path / "a.png", "a").shape == (1, 8, 8)
    with pytest.raises(DataError, match="10001x10000 pixels; expected 1 to 100,000,000"):
        data.PictureDecoder(size=8, channels=1).open(tmp_path / "b.png", "b")
    assert data.options("image_folder")["max_pixels"].default == 10**8


# -- Hugging Face, by a stand-in for the package --------------------------------------------------------------


class Image_:  # noqa: N801 - stands for datasets.Image, whose name is looked at
    pass


Image_.__name__ = "Image"


class Table(list):
    """Rows as the library's tables hold them."""

    def __init__(self, rows: list[dict], features: dict) -> None:
        super().__init__(rows)
        self.features, self.column_names = features, list(features)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """Makes the package `datasets` hold these splits."""

    def install(**splits: Table) -> None:
        def load_dataset(path: str, name: str | None = None, *, split: str, revision: str | None = None) -> Table:
            if split not in splits:
                raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
            return splits[split]

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    return install


def pictures(n: int, column: str = "image", label: str | None = None, first: int = 0) -> Table:
    rows = [{column: Image.fromarray(grey(first + i)), **({label: i % 2} if label else {})} for i in range(n)]
    return Table(rows, {column: Image_(), **({label: object()} if label else {})})


def test_hugging_face_without_labels_and_without_a_test_split(hub) -> None:
    hub(train=pictures(20))
    dataset = data.create("hugging_face", root="someone/pictures", size=4, channels=1)
    assert (len(dataset.split("train")), len(dataset.split("test")), dataset.num_classes) == (18, 2, 0)
    values = torch.cat([dataset.split(part).x[:, 0, 0, 0] for part in ("train", "test")])
    assert values.sort().values.tolist() == list(range(20))
    assert len(data.create("hugging_face", root="a/b", size=4, test_size=5).split("test")) == 5


def test_hugging_face_labels_that_are_names(hub) -> None:
    def named(table: Table, names: list[str]) -> Table:
        rows = [{**row, "label": name} for row, name in zip(table, names, strict=True)]
        return Table(rows, {**table.features, "label": object()})

    hub(train=named(pictures(4), ["dog", "cat", "dog", "emu"]), test=named(pictures(2), ["emu", "cat"]))
    dataset = data.create("hugging_face", root="a/b", size=4, channels=1)
    assert dataset.classes == ("cat", "dog", "emu")
    assert dataset.split("train").labels.tolist() == [1, 0, 1, 2] and dataset.split("test").labels.tolist() == [2, 0]
    numbers = Table([{"x": [0.5, 1.5 * i], "y": "ab"[i % 2]} for i in range(10)], {"x": object(), "y": object()})
    hub(train=numbers)
    assert data.create("hugging_face", root="a/b", image="x", test_size=2).classes == ("a", "b")


def test_hugging_face_splits_and_columns_by_option(hub) -> None:
    hub(
        train=pictures(6, "scan", "kind"),
        valid=pictures(4, "scan", "kind", 100),
        extra=pictures(3, "scan", "kind", 200),
    )
    dataset = data.create(
        "hugging_face", root="a/b", size=4, channels=1, label="kind", test="valid", validation_split="extra"
    )
    assert dataset.split("test").x[:, 0, 0, 0].tolist() == [100, 101, 102, 103]
    assert dataset.split("validation").x[:, 0, 0, 0].tolist() == [200, 201, 202]
    assert dataset.split("train").labels.tolist() == [0, 1] * 3
    with pytest.raises(DataError, match="without a column 'label'; expected one of scan, kind: say label="):
        data.create("hugging_face", root="a/b", size=4, label="label")
    with pytest.raises(DataError, match="no split 'held_out'"):
        data.create("hugging_face", root="a/b", size=4, test="held_out")
    assert data.create("hugging_face", root="a/b", size=4, label=None).num_classes == 0
    with pytest.raises(DataError, match="without size"):
        data.create("hugging_face", root="a/b")


def test_hugging_face_arrays_are_read_by_the_rules_of_arrays(hub) -> None:
    k = RANDOM.randint(0, 256, (20, 1, 4, 4))
    hub(train=Table([{"x": (row / 255).tolist()} for row in k], {"x": object()}))
    with pytest.raises(DataError, match="all k/255.*levels=256"):
        data.create("hugging_face", root="a/b")
    dataset = data.create("hugging_face", root="a/b", levels=256)
    assert np.array_equal(dataset.split("test").x.numpy(), k[dataset.split("test").ids.numpy()])
    assert data.create("hugging_face", root="a/b", continuous=True).levels is None


# -- from the command line ------------------------------------------------------------------------------------

QUICK = [
    *(
        "training.steps=2",
        "training.warmup=1",
        "training.batch_size=2",
        "training.log_every=1",
        "training.eval_every=2",
    ),
    *("training.validation=2", "sampling.steps=1", "sampling.second_steps=1", "sampling.n=2", "likelihood.steps=2"),
    *("likelihood.limit=1", "likelihood.probes=1", "likelihood.draws=1", "likelihood.batch_size=1", "model.channels=8"),
    "baselines=False",
]


@pytest.mark.parametrize(
    ("make", "flags", "shape"),
    [
        (
            lambda: RANDOM.randint(0, 65536, (8, 8)).astype(np.uint16),
            ["size=8", "channels=1", "levels=65536"],
            (1, 8, 8),
        ),
        (lambda: RANDOM.randint(0, 256, (9, 9, 4)).astype(np.uint8), ["size=8", "channels=4"], (4, 8, 8)),
        (lambda: RANDOM.randint(0, 256, (40, 50, 3)).astype(np.uint8), ["size=(16,32)"], (3, 16, 32)),
    ],
    ids=["16 bits", "RGBA", "oblong"],
)
@pytest.mark.slow
def test_pictures_train_and_are_scored_from_the_command_line(make, flags: list[str], shape, tmp_path: Path) -> None:
    for i in range(24):
        save(tmp_path / "in" / f"{i}.png", make())
    arguments = [
        "--config.data.name=image_folder",
        f"--config.data.root={tmp_path / 'in'}",
        f"--workdir={tmp_path / 'run'}",
    ]
    vp.main([*arguments, *(f"--config.data.{flag}" for flag in flags), *(f"--config.{flag}" for flag in QUICK)])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert np.isfinite(results["bits_per_dim"]["mean"])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["name"] == "image_folder"
