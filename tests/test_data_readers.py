"""Readers: values come back exactly, and what is wrong with a file is said in one line, with nothing
executed."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import test_data_files as made
import torch
from PIL import Image

import data
import models
from data import DataError
from data.cifar import SHA256
from models import ScoreModel
from numerics import UserError
from sde_lib import VPSDE


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    """A tensor over read-only memory is only a warning in torch, and undefined behaviour after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("compress", [False, True])
def test_mnist_files(tmp_path: Path, compress: bool) -> None:
    arrays = made.write_idx_folder(tmp_path, compress=compress)
    dataset = data.create("mnist", root=tmp_path, validation=3)
    train, test = dataset.split("train"), dataset.split("test")
    assert np.array_equal(train.x[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(test.labels.numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert (dataset.event_shape, dataset.levels, len(dataset.split("fit"))) == ((1, 6, 5), 256, 9)


@pytest.mark.parametrize(
    ("code", "dtype"), [(0x08, "u1"), (0x09, "i1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")]
)
def test_idx_of_every_type(tmp_path: Path, code: int, dtype: str) -> None:
    array = np.arange(-6, 6).astype(dtype).reshape(3, 4)
    path = tmp_path / "a.idx"
    path.write_bytes(made.idx_bytes(array, code))
    assert np.array_equal(data.read_idx(path), array)


IDX = made.idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "begins with nothing"),
        (b"\x1f\x8b\x08\x00", "idx magic"),
        (b"\0\0\x07\x03" + IDX[4:], "idx magic"),
        (b"\0\0\x08\x00" + IDX[4:], "0 dimensions"),
        (b"\0\0\x08\x09" + IDX[4:], "9 dimensions"),
        (IDX[:10], "inside its header"),
        (IDX[:-1], "39 of the 40 bytes"),
        (IDX + b"x", "more than the 40 bytes"),
        (IDX[:4] + b"\xff\xff\xff\xff" * 3 + IDX[16:], "promises"),
        (IDX[:4] + b"\0\0\0\0" + b"\xff\xff\xff\xff" * 2, "promises 0 bytes"),
    ],
)
def test_bad_idx(tmp_path: Path, raw: bytes, match: str) -> None:
    path = tmp_path / "bad.idx"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=match):
        data.read_idx(path)


def test_gzip_bomb_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    header = b"\0\0\x08\x01" + (10).to_bytes(4, "big")
    path.write_bytes(gzip.compress(header + bytes(50 * 2**20)))
    with pytest.raises(DataError, match="more than the 18 bytes"):
        data.read_idx(path)
    # The length promised ends exactly where a chunk of the reader does.
    header = b"\0\0\x08\x01" + (2**20 - 8).to_bytes(4, "big")
    path.write_bytes(gzip.compress(header + bytes(2**20 - 7), 1))
    with pytest.raises(DataError, match="more than the 1,048,576 bytes"):
        data.read_idx(path)
    whole = gzip.compress(IDX)
    path.write_bytes(whole[:-6])
    with pytest.raises(DataError, match="whole gzip file"):
        data.read_idx(path)
    with pytest.raises(DataError, match="does not exist"):
        data.read_idx(tmp_path / "none.gz")


def test_what_lies_behind_a_gzip_member(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    whole = gzip.compress(IDX)
    path.write_bytes(whole + bytes(40 * 2**20))  # padding is allowed, and passed over at once
    start = time.process_time()
    assert data.read_idx(path).shape == (2, 3, 4)
    assert time.process_time() - start < 1
    path.write_bytes(gzip.compress(IDX[:20]) + gzip.compress(IDX[20:]))
    assert data.read_idx(path).tolist() == np.arange(24).reshape(2, 3, 4).tolist()
    path.write_bytes(whole + b"more")
    with pytest.raises(DataError, match="whole gzip file"):
        data.read_idx(path)
    path.write_bytes(whole + gzip.compress(b"") * 70_000)
    with pytest.raises(DataError, match="65,536 members"):
        data.read_idx(path)


@contextlib.contextmanager
def _memory_at_most(megabytes: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 2**20, f"{peak / 2**20:.0f} MB"


def test_archives_that_lie_about_their_size_take_no_memory(tmp_path: Path) -> None:
    """A .npz whose member is said to have 100 bytes and has 100 MB; a tarball whose extended header has 100 MB."""
    raw = bytearray(made.npz_bytes({"x.npy": made.npy_header((25,)) + bytes(100 * 2**20)}))
    real = int.from_bytes(raw[22:26], "little")
    assert raw.count(real.to_bytes(4, "little")) == 2  # at the beginning, and in the directory
    path = tmp_path / "a.npz"
    path.write_bytes(raw.replace(real.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with _memory_at_most(8), pytest.raises(DataError):
        data.read_npz(path, limit=1000)
    path = tmp_path / "cifar-10-binary.tar.gz"
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, 100 * 2**20
    path.write_bytes(gzip.compress(extended.tobuf(tarfile.USTAR_FORMAT) + bytes(100 * 2**20), 1))
    with _memory_at_most(8), pytest.raises(DataError, match="without data_batch_1.bin"):
        data.create("cifar10", root=tmp_path, verify=False)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "arrays", "image_folder", "mapped"])
@pytest.mark.parametrize("root", [5, b"x", "x" * 5000, "a\0b", "\ud800", "~nobody_of_that_name/x", "a\nb"])
def test_odd_roots_are_refused_in_one_line(name: str, root: object) -> None:
    with pytest.raises(DataError) as caught:
        data.create(name, root=root, **({"size": 4} if name == "image_folder" else {}))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 1010


def test_a_line_break_in_a_files_name_does_not_break_the_message(tmp_path: Path) -> None:
    (tmp_path / "a\n\x1b[1mb.png").write_bytes(b"no picture")
    (tmp_path / "c.png").write_bytes(made.picture("PNG"))
    with pytest.raises(DataError, match=r"a\\n\\x1b\[1mb.png is not a readable picture"):
        data.create("image_folder", root=tmp_path, size=4)


def test_mnist_parts_must_fit_together(tmp_path: Path) -> None:
    made.write_idx_folder(tmp_path)
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(made.idx_bytes(np.zeros(11, np.uint8)))
    with pytest.raises(DataError, match="one per image"):
        data.create("mnist", root=tmp_path, validation=0)
    labels.write_bytes(made.idx_bytes(np.full(12, 10, np.uint8)))
    with pytest.raises(DataError, match="label 10"):
        data.create("mnist", root=tmp_path, validation=0)
    labels.unlink()
    with pytest.raises(DataError, match="no train-labels-idx1-ubyte"):
        data.create("mnist", root=tmp_path)
    with pytest.raises(DataError, match="expected root="):
        data.create("mnist")


def test_fashion_mnist_names_the_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="dataset-fashion-mnist"):
        data.create("fashion_mnist", root=tmp_path)
    made.write_idx_folder(tmp_path, compress=True)
    monkeypatch.setattr("data.idx._DEBIAN", tmp_path)
    assert len(data.create("fashion_mnist", validation=0).split("train")) == 12
    assert data.create("fashion_mnist", root="", validation=0).classes[9] == "ankle boot"


def _write_cifar(folder: Path, *, binary: bool) -> Path:
    path = folder / ("cifar-10-binary.tar.gz" if binary else "cifar-10-python.tar.gz")
    path.write_bytes(gzip.compress(made.cifar_tar(binary=binary), 1))
    return path


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("unpacked", [True, False])
def test_cifar(tmp_path: Path, binary: bool, unpacked: bool) -> None:
    path = _write_cifar(tmp_path, binary=binary)
    if unpacked:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path, filter="data")
        path.unlink()
    dataset = data.create("cifar10", root=tmp_path, verify=False, validation=0)
    batches = made.cifar_batches()
    images = np.concatenate([batches[name][0] for name in made.CIFAR_TRAIN]).reshape(-1, 3, 32, 32)
    assert np.array_equal(dataset.split("train").x.numpy(), images)
    assert np.array_equal(dataset.split("test").labels.numpy(), batches["test_batch"][1])
    assert dataset.classes[6] == "frog"


def test_cifar_prefers_the_binary_file_and_checks_its_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write_cifar(tmp_path, binary=True)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"never read")
    with pytest.raises(DataError, match="cifar-10-binary.tar.gz with SHA-256"):
        data.create("cifar10", root=tmp_path)
    monkeypatch.setitem(SHA256, path.name, data.files.sha256(path))
    assert len(data.create("cifar10", root=tmp_path, validation=0).split("train")) == 10


def test_the_published_pickles_form_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batches = made.cifar_batches(300)
    for name, batch in batches.items():
        raw = made.python2_pickle(*batch)
        (folder / name).write_bytes(raw)
    dataset = data.create("cifar10", root=tmp_path, validation=0)
    assert np.array_equal(dataset.split("test").x.numpy().reshape(-1, 3072), batches["test_batch"][0])
    assert dataset.split("test").labels.tolist() == batches["test_batch"][1].tolist()


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def _nested(depth: int) -> bytes:
    """A dictionary whose key is a pair of the same pair of the same pair ...: its hash takes 2^depth steps, or the stack."""
    return b"\x80\x02})q\x01" + b"h\x01\x86q\x01" * depth + b"K\x00s."


def _pickles() -> list[tuple[bytes, str]]:
    images, labels = made.cifar_batches()["test_batch"]
    good = {b"data": images, b"labels": labels.tolist()}

    def dump(**changes) -> bytes:
        return pickle.dumps({**good, **{key.encode(): value for key, value in changes.items()}}, protocol=2)

    return [
        (pickle.dumps(_Evil(), protocol=2), "it names posix.mkdir|it names nt.mkdir"),
        (dump(data=_Evil()), "it names"),
        (pickle.dumps(_Evil(), protocol=0), r"protocol=2\)"),
        (pickle.dumps([1], protocol=5), r"protocol from 2 to 4"),
        (_nested(40), "a key of a dictionary is a tuple"),
        (_nested(300_000), "a key of a dictionary is a tuple"),
        (b"\x80\x02r\xff\xff\xff\x7f}q\x00.", "not a plain"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "holds a list"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.", "BINBYTES8|not a plain"),
        (b"", "not a plain"),
        (pickle.dumps([1], protocol=2), "holds a list"),
        (dump(data=images.astype(np.float32)), "not uint8"),
        (dump(data=images[:, :100]), "shape"),
        (dump(data=np.asfortranarray(images)), "C order"),
        (dump(data=[1, 2]), "not a uint8 array in C order"),
        (dump(labels=[1]), "one per image"),
        (dump(labels=[1, 11]), "from 1 to 11"),
        (dump(labels=[1.0, 2.0]), "integers"),
    ]


@pytest.mark.parametrize(("raw", "match"), _pickles())
def test_bad_pickles_execute_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, match: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*made.CIFAR_TRAIN, "test_batch"]:
        (folder / name).write_bytes(raw)
    with pytest.raises(DataError, match=match):
        data.create("cifar10", root=tmp_path)
    assert not (tmp_path / "executed").exists()


def test_bad_tarballs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cifar-10-binary.tar.gz"

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        data.create("cifar10", root=tmp_path, verify=False)

    whole = gzip.compress(made.cifar_tar(binary=True), 1)
    for raw, match in (
        (b"", "ends early"),
        (b"not a tarball", "not a whole gzip file"),
        (whole[: len(whole) // 2], "not a whole gzip file"),
        (gzip.compress(made.cifar_tar(binary=True)[:4000], 1), "data_batch_1.bin ends early"),
        (gzip.compress(made.cifar_tar(binary=True)[1:], 1), "a header's sum is wrong|size is"),
        (gzip.compress(made.tarball({"data_batch_1.bin": bytes(3073)}, "x"), 1), "without data_batch_2.bin"),
        (gzip.compress(made.tarball({"data_batch_1.bin": b""}, "x"), 1), "not a plain file"),
        (gzip.compress(made.tarball({f"{i}": b"" for i in range(70)}, "x"), 1), "more than 64 members"),
    ):
        with pytest.raises(DataError, match=match):
            read(raw)
    monkeypatch.setattr("data.cifar._MAX_UNPACKED", 10_000)
    with pytest.raises(DataError, match="unpacks to more than"):
        read(gzip.compress(made.tarball({"readme": bytes(20_000)}, "x"), 1))
    folder = tmp_path / "other" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in made.CIFAR_TRAIN:
        (folder / f"{name}.bin").write_bytes(bytes(3072))
    (folder / "test_batch.bin").write_bytes(bytes(3073))
    with pytest.raises(DataError, match="multiple of 3073"):
        data.create("cifar10", root=tmp_path / "other")


def test_npz_of_keras_and_medmnist_names(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    train, test = (random.randint(0, 256, (n, 5, 4)).astype(np.uint8) for n in (8, 3))
    np.savez_compressed(tmp_path / "a.npz", x_train=train, y_train=np.arange(8), x_test=test, y_test=np.arange(3))
    dataset = data.create("arrays", root=tmp_path / "a.npz", validation=0)
    assert np.array_equal(dataset.split("test").x[:, 0].numpy(), test)
    assert (dataset.name, dataset.num_classes, dataset.levels) == ("a", 8, 256)
    colour = np.moveaxis(np.stack([train, train, train]), 0, 3)
    np.savez(tmp_path / "b.npz", train_images=colour, train_labels=np.arange(8)[:, np.newaxis])
    dataset = data.create("arrays", root=tmp_path / "b.npz", test_size=2)
    assert dataset.event_shape == (3, 5, 4)
    assert len(dataset.split("test")) == 2


def test_npz_with_validation_data_of_its_own(tmp_path: Path) -> None:
    images = np.arange(15, dtype=np.uint8)[:, np.newaxis, np.newaxis].repeat(4, 1).repeat(4, 2)
    parts = {"train": slice(9), "val": slice(9, 12), "test": slice(12, 15)}
    named = {f"{part}_images": images[rows] for part, rows in parts.items()}
    np.savez(tmp_path / "m.npz", **named, **{f"{part}_labels": np.arange(15)[rows] % 3 for part, rows in parts.items()})
    dataset = data.create("arrays", root=tmp_path / "m.npz")
    assert dataset.split("validation").x[:, 0, 0, 0].tolist() == [9, 10, 11]
    assert dataset.split("validation").labels.tolist() == [0, 1, 2]
    assert len(dataset.split("fit")) == len(dataset.split("train")) == 9
    assert (
        len(
            torch.cat(
                [dataset.split(name).ids for name in parts if name != "val"] + [dataset.split("validation").ids]
            ).unique()
        )
        == 15
    )
    with pytest.raises(DataError, match="with validation data"):
        data.create("arrays", root=tmp_path / "m.npz", validation=2)


def test_arrays_that_would_be_misread_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((9, 8, 8, 4), np.uint8))
    with pytest.raises(DataError, match=r"reads as \(N, H, W, C\).*x\[..., :3\]"):
        data.create("arrays", root=path)
    np.savez(path, x=np.zeros((9, 8, 8), np.uint8), y=np.int64(3))
    with pytest.raises(DataError, match=r"labels of int64 \(\)"):
        data.create("arrays", root=path)


def test_npy_is_mapped_and_writes_do_not_reach_the_file(tmp_path: Path) -> None:
    array = np.random.RandomState(0).randn(40, 3).astype(np.float32)
    np.save(tmp_path / "x.npy", array)
    mapped = data.read_npy(tmp_path / "x.npy")
    assert isinstance(mapped, np.memmap)
    mapped[:] = 0
    dataset = data.create("arrays", root=tmp_path / "x.npy")
    order = torch.cat([dataset.split("train").ids, dataset.split("test").ids])
    values = torch.cat([dataset.split("train").x, dataset.split("test").x])
    assert np.array_equal(values[order.argsort()].numpy(), array)
    np.save(tmp_path / "f.npy", np.asfortranarray(array.astype(">f8")))
    assert np.array_equal(data.read_npy(tmp_path / "f.npy"), array.astype(np.float64))


def test_folder_of_npy_files_with_own_names(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((6, 2, 7)))
    np.save(tmp_path / "b.npy", np.zeros((4, 2, 7)))
    dataset = data.create("arrays", root=tmp_path, x="a", test="b", validation=1)
    assert (len(dataset.split("fit")), len(dataset.split("test")), dataset.event_shape) == (5, 4, (2, 7))


NPY = made.npy_bytes(np.arange(12, dtype=np.float32).reshape(6, 2))


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "without a sound npy header"),
        (NPY[:20], "without a sound npy header"),
        (b"\x93NUMPY\x09\x00" + NPY[8:], "version"),
        (NPY[:-1], "expected 48"),
        (NPY + b"x", "49 bytes of values"),
        (NPY.replace(b"(6, 2)", b"(6,-2)"), "none of them empty"),
        (NPY.replace(b"'<f4'", b"'|O8'"), "never read"),
        (NPY.replace(b"'<f4'", b"'<M8'"), "expected numbers|no sound"),
        (NPY.replace(b"(6, 2), ", b"(10**9,)"), "without a sound"),
        (made.npy_bytes(np.array(["a" * 257])), "at most 256 characters"),
        (made.npy_header((0, 10**22)), "none of them empty"),
        (made.npy_header((True, 3)) + bytes(12), "none of them empty"),
        (made.npy_header((1,) * 70) + bytes(4), "at most 8 dimensions"),
        (made.npy_header((2**40, 2**40)) + bytes(4), "expected 4,835"),
    ],
)
def test_bad_npy(tmp_path: Path, raw: bytes, match: str) -> None:
    (tmp_path / "bad.npy").write_bytes(raw)
    with pytest.raises(DataError, match=match):
        data.read_npy(tmp_path / "bad.npy")
    (tmp_path / "bad.npz").write_bytes(made.npz_bytes({"x.npy": raw}))
    with pytest.raises(DataError, match=match):
        data.read_npz(tmp_path / "bad.npz")


def test_pickled_arrays_execute_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "evil.npy", np.array([_Evil()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "evil.npz", x=np.array([_Evil()], dtype=object))
    for name in ("evil.npy", "evil.npz"):
        with pytest.raises(DataError, match="never read"):
            data.create("arrays", root=tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_labels_that_are_names(tmp_path: Path) -> None:
    """Classes are those of the training data in alphabetical order, whatever the order of the samples."""
    x, names = np.arange(12.0).reshape(6, 2), np.array(["dog", "cat", "emu", "cat", "dog", "emu"])
    for labels in (names, names.reshape(6, 1), names.astype("S")):
        np.savez(tmp_path / "named.npz", x_train=x, y_train=labels, x_test=x[:2], y_test=labels[[2, 0]])
        dataset = data.create("arrays", root=tmp_path / "named.npz", validation=0)
        assert dataset.classes == ("cat", "dog", "emu")
        assert dataset.split("train").labels.tolist() == [1, 0, 2, 0, 1, 2]
        assert dataset.split("test").labels.tolist() == [2, 1]
    same = data.from_tensor(x, names.tolist(), test=x[:2], test_labels=["emu", "dog"], validation=0)
    assert same.classes == dataset.classes and torch.equal(same.split("test").labels, dataset.split("test").labels)
    folder = tmp_path / "folder"
    folder.mkdir()
    np.save(folder / "train.npy", x)
    np.save(folder / "train_labels.npy", names)
    assert data.create("arrays", root=folder, validation=0, test_size=1).classes == ("cat", "dog", "emu")
    for more, match in (
        (
            {"test": x[:1], "test_labels": ["gnu"]},
            "got the label 'gnu' in test; expected one of the 3 classes cat, dog, emu",
        ),
        ({"test": x[:1], "test_labels": np.array([1])}, "labels of test that are no names"),
        ({"classes": ("cat", "dog")}, "got the label 'emu' in train"),
    ):
        with pytest.raises(DataError, match=match):
            data.from_tensor(x, names, **more)
    with pytest.raises(DataError, match="expected one name a sample"):
        data.from_tensor(x, names.reshape(3, 2).repeat(2, axis=0))
    with pytest.raises(DataError, match="expected text"):
        data.from_tensor(x, np.array([b"\xff\xfe"] * 6))
    wrong = made.npy_bytes(np.array(["a"] * 6)).replace("a".encode("utf-32-le"), b"\xff\xff\xff\x7f")
    (tmp_path / "wrong.npz").write_bytes(made.npz_bytes({"x.npy": made.npy_bytes(x), "y.npy": wrong}))
    with pytest.raises(DataError, match="labels of train that are no text"):
        data.create("arrays", root=tmp_path / "wrong.npz")
    np.savez(tmp_path / "text.npz", x_train=names)
    with pytest.raises(DataError, match="expected numbers"):
        data.create("arrays", root=tmp_path / "text.npz")


def test_bad_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def read(**options):
        return data.create("arrays", root=path, **options)

    path.write_bytes(made.npz_bytes({"x.npy": NPY}, zipfile.ZIP_LZMA))
    with pytest.raises(DataError, match="expected deflate"):
        read()
    path.write_bytes(made.npz_bytes({"readme.txt": b"x"}))
    with pytest.raises(DataError, match="without arrays"):
        read()
    path.write_bytes(made.npz_bytes({"q.npy": NPY}))
    with pytest.raises(DataError, match="name it with x="):
        read()
    with pytest.raises(DataError, match="without an array 'z'; expected one of q"):
        read(x="z")
    with pytest.raises(DataError, match="got layout="):
        read(layout="CHW")
    path.write_bytes(made.npz_bytes({"x.npy": made.npy_bytes(np.zeros(30 * 2**20, np.uint8))}))
    with pytest.raises(DataError, match="unpacks to"):
        data.read_npz(path, limit=2**20)
    np.savez(path, x=np.zeros((4, 3, 5, 1), np.uint8))
    with pytest.raises(DataError, match="can be read both ways"):
        read()
    assert read(layout="NHWC").event_shape == (1, 3, 5)
    np.savez(path, x=np.zeros((4, 2)), y=np.zeros(4))
    with pytest.raises(DataError, match="labels of float64"):
        read()


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_image_folder_reads_bytes_exactly_when_nothing_is_resized(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    pixels = {}
    for label in ("cat", "dog"):
        for i in range(5):
            pixels[label, i] = random.randint(0, 256, (6, 4, 3)).astype(np.uint8)
            _save(tmp_path / label / f"{i}.png", pixels[label, i])
    dataset = data.create("image_folder", root=tmp_path, size=(6, 4), test_size=3, validation=2)
    assert dataset.classes == ("cat", "dog")
    assert dataset.event_shape == (3, 6, 4)
    for split in ("train", "test"):
        part = dataset.split(split)
        for x, label, row in zip(part.x, part.labels, part.ids, strict=True):
            expected = pixels[dataset.classes[label], int(row) % 5]
            assert np.array_equal(x.numpy(), expected.transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(16, 32), [16, 32]])
def test_oblong_pictures_reach_a_network_and_come_back(tmp_path: Path, size: object) -> None:
    random = np.random.RandomState(0)
    for i, shape in enumerate([(16, 32), (48, 40), (20, 90), (16, 32), (33, 64), (64, 128)]):
        _save(tmp_path / "in" / f"{i}.png", random.randint(0, 256, (*shape, 3)).astype(np.uint8))
    options = {"root": tmp_path / "in", "size": size, "test_size": 2, "validation": 1}
    dataset = data.create("image_folder", **options)
    mapped = data.create("image_folder", cache=tmp_path / "cache", **options)
    assert dataset.event_shape == mapped.event_shape == (3, 16, 32)
    for name in ("train", "test"):
        order = mapped.split(name).ids.argsort()
        assert torch.equal(dataset.split(name).x, mapped.split(name).x[order])
    transform, train = dataset.transform(), dataset.split("train")
    x = transform.centres(train.x)
    model = ScoreModel(models.for_data("auto", dataset.event_shape, channels=8), VPSDE())
    t = torch.full((len(x),), 0.5)
    loss = (model.denoised(x, t) - x).square().mean()
    loss.backward()
    assert model.net.stem.weight.grad is not None and bool(loss.isfinite())
    assert torch.equal(transform.to_images(x), train.x)
    assert model(x, t).shape == (len(train), 3, 16, 32)


def test_crop_keeps_the_centre_and_resize_averages(tmp_path: Path) -> None:
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200
    _save(tmp_path / "w.png", wide)
    image = data.PictureDecoder(size=2, filter="box").open(tmp_path / "w.png", "w")
    assert image.tolist() == [[[200, 200], [200, 200]]] * 3
    tall = np.arange(12, dtype=np.uint8).reshape(6, 2) * 10
    _save(tmp_path / "t.png", tall)
    image = data.PictureDecoder(size=2, channels=1, filter="nearest").open(tmp_path / "t.png", "t")
    assert image[0].tolist() == tall[2:4].tolist()
    with pytest.raises(DataError, match="aspect ratio"):
        data.PictureDecoder(size=2, crop="none").open(tmp_path / "t.png", "t")
    assert data.PictureDecoder(size=(3, 1), crop="none").open(tmp_path / "t.png", "t").shape == (3, 3, 1)


def test_transparency_rotation_and_depth(tmp_path: Path) -> None:
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    _save(tmp_path / "a.png", clear)
    image = data.PictureDecoder(size=2).open(tmp_path / "a.png", "a")
    assert image[:, 0, 0].tolist() == [10, 20, 30]
    assert image[:, 1, 1].tolist() == [255, 255, 255]
    turned = Image.fromarray(np.array([[0, 255]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "b.png", exif=exif)
    assert data.PictureDecoder(size=(2, 1), channels=1).open(tmp_path / "b.png", "b").tolist() == [[[0], [255]]]
    Image.fromarray(np.full((2, 2), 40_000, np.uint16)).save(tmp_path / "c.png")
    with pytest.raises(DataError, match="8 bits a channel"):
        data.PictureDecoder(size=2).open(tmp_path / "c.png", "c")


def test_image_folder_cache_is_the_same_data_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test", "val"):
        for i in range(6):
            _save(tmp_path / "in" / split / f"{i}.png", np.full((4, 4), 10 * i, np.uint8))
    options = {"root": tmp_path / "in", "size": 4, "channels": 1}
    plain = data.create("image_folder", **options)
    assert plain.classes == ()
    cached = data.create("image_folder", cache=tmp_path / "cache", **options)
    for name in ("train", "test", "validation"):
        a, b = plain.split(name), cached.split(name)
        order = b.ids.argsort()
        assert torch.equal(a.ids, b.ids[order])
        assert torch.equal(a.x, b.x[order])
    # The second time, nothing is decoded.
    monkeypatch.setattr(data.PictureDecoder, "open", lambda *_: pytest.fail("decoded again"))
    again = data.create("image_folder", cache=tmp_path / "cache", **options)
    assert again.fingerprint == cached.fingerprint
    monkeypatch.undo()
    _save(tmp_path / "in" / "train" / "0.png", np.full((4, 4), 99, np.uint8))
    assert int(data.create("image_folder", cache=tmp_path / "cache", **options).split("train").x.max()) == 99


def test_bad_image_folders(tmp_path: Path) -> None:
    def read(**options):
        return data.create("image_folder", **{"root": tmp_path, "size": 4, **options})

    with pytest.raises(DataError, match="without pictures"):
        read()
    _save(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="got test_size=1 for too few samples; expected more data"):
        read()
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="b.png is not a readable picture"):
        read()
    with pytest.raises(DataError, match="b.png is not a readable picture"):
        read(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half written is left
    (tmp_path / "b.png").write_bytes(made.picture("EPS"))
    with pytest.raises(DataError, match="not a readable picture"):
        read()
    _save(tmp_path / "c" / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="both in itself and in subfolders"):
        read()
    with pytest.raises(UserError, match="the data set 'image_folder' without size; expected a value"):
        data.create("image_folder", root=tmp_path)
    for options, match in (
        ({"size": 0}, "got size=0"),
        ({"size": (1, 2, 3)}, "got size="),
        ({"channels": 5}, "channels"),
        ({"filter": "cubic"}, "filter"),
        ({"crop": "left"}, "crop"),
    ):
        with pytest.raises(DataError, match=match):
            read(**options)


def test_folders_that_would_be_left_out_are_named(tmp_path: Path) -> None:
    for part in ("train", "test", "val", "validation"):
        _save(tmp_path / "two" / part / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="val and a folder validation"):
        data.create("image_folder", root=tmp_path / "two", size=4)
    _save(tmp_path / "one" / "cat" / "a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "one" / "dog").mkdir()
    with pytest.raises(DataError, match="dog without pictures"):
        data.create("image_folder", root=tmp_path / "one", size=4)


def test_picture_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (5_000, 5_000)).save(path)
    with pytest.raises(DataError, match=r"5000x5000 pixels; expected 1 to 16,777,216.*--config.data.max_pixels"):
        data.PictureDecoder(size=8, max_pixels=2**24).open(path, "bomb")
    with pytest.raises(DataError, match="more than 20,000,000 pixels; expected 1 to 10,000,000"):
        data.PictureDecoder(size=8, max_pixels=10**7).open(path, "bomb")
    assert data.PictureDecoder(size=8).open(path, "large").shape == (3, 8, 8)


def test_any_sequence_of_pictures(tmp_path: Path) -> None:
    """What the adapters of datasets and torchvision share, on a plain list."""
    pictures = [(Image.fromarray(np.full((5, 5), 7 * i, np.uint8)), i % 3) for i in range(6)]
    decoder = data.PictureDecoder(size=5, channels=1)
    dataset = data.from_pictures({"train": pictures[:4], "test": pictures[4:]}, decoder, name="list")
    assert dataset.split("test").x[:, 0, 0, 0].tolist() == [28, 35]
    assert dataset.split("test").labels.tolist() == [1, 2]
    assert dataset.split("test").ids.tolist() == [4, 5]
    with pytest.raises(DataError, match="expected all or none"):
        data.from_pictures({"train": [*pictures, (pictures[0][0], None)], "test": pictures}, decoder, name="list")
    with pytest.raises(DataError, match="of class str; expected a picture"):
        data.from_pictures({"train": [("a", 1)], "test": pictures}, decoder, name="list")


def test_hugging_face_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    for split in ("train", "test"):
        for label in ("a", "b"):
            _save(tmp_path / split / label / "0.png", np.full((4, 4, 3), 100, np.uint8))
    dataset = data.create("hugging_face", root=tmp_path, size=4)
    assert dataset.classes == ("a", "b")
    assert dataset.event_shape == (3, 4, 4)


def test_torchvision(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", exc_type=ImportError, reason="torchvision is not installed")
    with pytest.raises(DataError, match="cannot be read"):
        data.create("torchvision", root=tmp_path, dataset="CIFAR100", size=32)


def test_saved_data_set_is_the_same_in_another_order(tmp_path: Path) -> None:
    digits = data.create("digits")
    mapped = data.save(digits, tmp_path / "d")
    assert (mapped.name, mapped.levels, mapped.classes) == ("digits", 17, digits.classes)
    for name in ("train", "test"):
        a, b = digits.split(name), mapped.split(name)
        order = b.ids.argsort()
        assert not torch.equal(a.ids, b.ids)
        assert torch.equal(a.x, b.x[order])
        assert torch.equal(a.labels, b.labels[order])
    fit, validation, train = mapped.split("fit"), mapped.split("validation"), mapped.split("train")
    assert fit.x.data_ptr() == train.x.data_ptr()  # a view: nothing is read
    assert torch.equal(torch.cat([fit.ids, validation.ids]), train.ids)
    # A fair sample: every class is in it, though the source might have been sorted.
    assert len(validation.labels.unique()) == 10
    assert data.create("mapped", root=tmp_path / "d").fingerprint == mapped.fingerprint


def test_continuous_data_are_mapped_too(tmp_path: Path) -> None:
    moons = data.create("moons", train=200, test=50, validation=20)
    mapped = data.save(moons, tmp_path / "m")
    assert torch.equal(mapped.split("test").x[mapped.split("test").ids.argsort()], moons.split("test").x)
    assert mapped.transform().shift == pytest.approx(moons.transform().shift, abs=1e-6)


def test_what_a_killed_writer_leaves_is_removed(tmp_path: Path) -> None:
    moons = data.create("moons", train=20, test=5, validation=2)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = tmp_path / f".m.{socket.gethostname()}.{dead.stdout.strip()}.abc"
    alive = tmp_path / f".m.{socket.gethostname()}.{os.getppid()}.abc"
    other = tmp_path / f".mm.{socket.gethostname()}.{dead.stdout.strip()}.abc"
    for folder in (left, alive, other):
        folder.mkdir()
        (folder / "train.x.npy").write_bytes(b"half")
    data.save(moons, tmp_path / "m")
    assert not left.exists()
    assert alive.exists() and other.exists()


def test_a_cache_without_its_manifest(tmp_path: Path) -> None:
    """An empty folder is filled; one with other things in it is named, not overwritten."""
    for i in range(4):
        _save(tmp_path / "in" / f"{i}.png", np.full((4, 4), 10 * i, np.uint8))
    options = {"root": tmp_path / "in", "size": 4, "cache": tmp_path / "cache"}
    first = data.create("image_folder", **options)
    (place,) = (tmp_path / "cache").iterdir()
    (place / "manifest.json").unlink()
    with pytest.raises(DataError, match="holds no manifest.json.*delete it"):
        data.create("image_folder", **options)
    for file in place.iterdir():
        file.unlink()
    assert data.create("image_folder", **options).fingerprint == first.fingerprint


def test_changed_bytes_of_a_cache_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.save(data.create("moons", train=20, test=5, validation=2), tmp_path / "m")
    file = tmp_path / "m" / "train.x.npy"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match="SHA-256 differs"):
        data.mapped(tmp_path / "m")
    monkeypatch.setattr("data.cache._SUMMED_BYTES", 10)  # as if it were large
    data.mapped(tmp_path / "m")
    with pytest.raises(DataError, match="SHA-256 differs"):
        data.mapped(tmp_path / "m", verify=True)


def test_bad_caches(tmp_path: Path) -> None:
    moons = data.create("moons", train=20, test=5, validation=2)
    folder = tmp_path / "m"
    data.save(moons, folder)
    with pytest.raises(DataError, match="exists already"):
        data.save(moons, folder)
    manifest = (folder / "manifest.json").read_text()

    def read(text: str | None = None):
        (folder / "manifest.json").write_text(manifest if text is None else text)
        return data.create("mapped", root=folder)

    for text, match in (
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ("{}", "lacks or mistypes"),
        (manifest.replace('"format": 2', '"format": 1'), "format"),
        (manifest.replace('"validation": 2', '"validation": 99'), "validation=99"),
        (json.dumps({**json.loads(manifest), "splits": ["../m/train"]}), "without ../m/train"),
        (json.dumps({**json.loads(manifest), "levels": 300}), "float32|uint8"),
    ):
        with pytest.raises(DataError, match=match):
            read(text)
    whole = (folder / "train.x.npy").read_bytes()
    (folder / "train.x.npy").write_bytes(whole[:-4])
    with pytest.raises(DataError, match="write it again"):
        read()
    (folder / "train.x.npy").unlink()
    with pytest.raises(DataError, match="does not exist"):
        read()
    with pytest.raises(DataError, match="manifest.json, which does not exist"):
        data.create("mapped", root=tmp_path)
