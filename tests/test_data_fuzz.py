"""Mutated files: every reader returns data or raises DataError, quickly and without a blow-up of memory."""

from __future__ import annotations

import gzip
import random
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import test_data_files as made

import data
from data import DataError

_FLOATS = made.npy_bytes(np.arange(24, dtype=np.float32).reshape(6, 4))
_IMAGES = made.npy_bytes(np.arange(150, dtype=np.uint8).reshape(6, 5, 5))


def _file(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    def run(folder: Path, raw: bytes) -> object:
        (folder / name).write_bytes(raw)
        return read(folder / name)

    return run


def _cifar(name: str, *, inner: bool) -> Callable[[Path, bytes], object]:
    def run(folder: Path, raw: bytes) -> object:
        (folder / name).write_bytes(gzip.compress(raw, 0) if inner else raw)
        return data.create("cifar10", root=folder, verify=False, validation=0)

    return run


def _cifar_batch(folder: Path, raw: bytes) -> object:
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(exist_ok=True)
    for name in [*made.CIFAR_TRAIN, "test_batch"]:
        (inside / name).write_bytes(raw)
    return data.create("cifar10", root=folder, validation=0)


def _mapped(part: str) -> Callable[[Path, bytes], object]:
    def run(folder: Path, raw: bytes) -> object:
        place = folder / "m"
        if not place.exists():
            data.save(data.create("moons", train=20, test=5, validation=2), place)
        kept = (place / part).read_bytes()
        (place / part).write_bytes(raw)
        try:
            return data.create("mapped", root=place)
        finally:
            (place / part).write_bytes(kept)

    return run


def _mapped_file(part: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        data.save(data.create("moons", train=20, test=5, validation=2), Path(folder) / "m")
        return (Path(folder) / "m" / part).read_bytes()


def _picture(ending: str) -> Callable[[Path, bytes], object]:
    decoder = data.Decoder(size=4)
    return _file(f"a.{ending}", lambda path: decoder.open(path, str(path)))


_IDX = made.idx_bytes(np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
_PICKLE = made.cifar_pickle(*made.cifar_batches()["test_batch"])
_PYTHON2 = made.python2_pickle(*made.cifar_batches()["test_batch"])

FORMATS: dict[str, tuple[Callable[[], bytes], Callable[[Path, bytes], object]]] = {
    "idx": (lambda: _IDX, _file("a.idx", data.read_idx)),
    "idx.gz": (lambda: gzip.compress(_IDX), _file("a.gz", data.read_idx)),
    "npy": (lambda: _FLOATS, _file("a.npy", lambda path: data.create("arrays", root=path))),
    "npz": (
        lambda: made.npz_bytes({"x.npy": _IMAGES, "y.npy": made.npy_bytes(np.arange(6))}),
        _file("a.npz", lambda path: data.create("arrays", root=path)),
    ),
    "npz, inside": (
        lambda: _IMAGES,
        lambda folder, raw: _file("a.npz", lambda path: data.create("arrays", root=path))(
            folder, made.npz_bytes({"x.npy": raw})
        ),
    ),
    "cifar binary": (
        lambda: gzip.compress(made.cifar_tar(binary=True), 1),
        _cifar("cifar-10-binary.tar.gz", inner=False),
    ),
    "cifar binary, tar": (lambda: made.cifar_tar(binary=True), _cifar("cifar-10-binary.tar.gz", inner=True)),
    "cifar python, tar": (lambda: made.cifar_tar(binary=False), _cifar("cifar-10-python.tar.gz", inner=True)),
    "cifar pickle": (lambda: _PICKLE, _cifar_batch),
    "cifar pickle of Python 2": (lambda: _PYTHON2, _cifar_batch),
    "png": (lambda: made.picture("PNG"), _picture("png")),
    "jpeg": (lambda: made.picture("JPEG"), _picture("jpg")),
    "bmp": (lambda: made.picture("BMP"), _picture("bmp")),
    "gif": (lambda: made.picture("GIF", mode="L"), _picture("gif")),
    "webp": (lambda: made.picture("WEBP"), _picture("webp")),
    "ppm": (lambda: made.picture("PPM"), _picture("ppm")),
    "tiff": (lambda: made.picture("TIFF"), _picture("tiff")),
    "manifest": (lambda: _mapped_file("manifest.json"), _mapped("manifest.json")),
    "mapped": (lambda: _mapped_file("train.x.npy"), _mapped("train.x.npy")),
}


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes; half of them near the beginning, where the headers are."""
    out = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        reach = len(out) if rng.random() < 0.5 else min(len(out), 160)
        at = rng.randrange(reach)
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + rng.randint(1, 16)]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 5:
            width = rng.choice((2, 4, 8))
            out[at : at + width] = rng.choice((b"\xff", b"\x7f", b"\x00")) * width
        else:
            begin = rng.randrange(len(out))
            out[at:at] = out[begin : begin + rng.randint(1, 64)]
    return bytes(out)


def _fuzz(folder: Path, name: str, count: int) -> tuple[int, int]:
    """How many of `count` mutated files were read, and how many refused."""
    make, read = FORMATS[name]
    whole = make()
    read(folder, whole)  # the unmutated file is read
    rng = random.Random(f"fuzz {name}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = 0
    for i in range(count):
        raw = mutate(whole, rng)
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of odd metadata
                read(folder, raw)
            accepted += 1
        except DataError as error:
            assert "\n" not in str(error), f"{name} #{i}: {error}"
        except BaseException as error:
            pytest.fail(f"{name} #{i} raised {type(error).__name__}: {error}")
        assert time.process_time() - start < 2.0, f"{name} #{i} took too long"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024, f"{name}: memory grew by {grown // 1024} MB"
    return accepted, count - accepted


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    _, refused = _fuzz(tmp_path, name, 80)
    assert refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    _, refused = _fuzz(tmp_path, name, 10_000 // len(FORMATS) + 1)
    assert refused > 0
