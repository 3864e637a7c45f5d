"""Mutated files: every reader returns data or raises DataError, quickly and without a blow-up of memory."""

from __future__ import annotations

import gzip
import json
import pickle
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
    decoder = data.PictureDecoder(size=4)
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


_NUMBERS = (0, 1, 2, 3, 4, 5, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_ODD = (
    *_NUMBERS,
    -1,
    True,
    False,
    2**40,
    2**63 - 1,
    2**63,
    10**22,
    10**400,
    1.5,
    float("nan"),
    None,
    "a",
    "",
    (),
    [],
    {},
)


def _odd_idx(rng: random.Random) -> bytes:
    sizes = b"".join(rng.choice(_NUMBERS).to_bytes(4, "big") for _ in range(rng.randint(0, 4)))
    code = rng.choice((0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E))
    return (
        bytes([0, 0, code, rng.choice((len(sizes) // 4, rng.randrange(256)))]) + sizes + bytes(rng.choice((0, 60, 500)))
    )


def _odd_npy(rng: random.Random) -> bytes:
    shape = tuple(rng.choice(_ODD) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 9, 33, 65, 70))))
    descr = rng.choice(("<f4", "<f4", "|u1", ">i8", "<f2", "<c8", "|b1", "<U3", "|O", "<M8[s]", "|V4", "", "3f4"))
    return made.npy_header(rng.choice((shape, shape, rng.choice(_ODD))), descr) + bytes(rng.choice((0, 4, 12, 48, 150)))


def _odd_npz(rng: random.Random) -> bytes:
    raw = bytearray(made.npz_bytes({"x.npy": _IMAGES, "y.npy": _odd_npy(rng)}))
    directory = raw.index(b"PK\x01\x02")
    # Sum, packed size, unpacked size: of the member's own header and of the directory's.
    for at in rng.sample((14, 18, 22, directory + 16, directory + 20, directory + 24), rng.randint(0, 3)):
        raw[at : at + 4] = rng.choice(_NUMBERS).to_bytes(4, "little")
    return bytes(raw)


def _odd_tar(rng: random.Random) -> bytes:
    """Headers with odd fields and the right sum."""
    raw = bytearray(made.cifar_tar(binary=True))
    for _ in range(rng.randint(1, 2)):
        start = 512 * rng.choice([i for i in range(len(raw) // 512) if raw[512 * i + 257 : 512 * i + 262] == b"ustar"])
        kind = rng.randrange(3)
        if kind == 0:
            raw[start + 124 : start + 136] = rng.choice(
                (b"%011o\0" % rng.choice(_NUMBERS), b"-1".ljust(12), b"\x80" + b"\xff" * 11)
            )
        elif kind == 1:
            raw[start + 156] = rng.choice(b"\0" + b"0123456789xgLKSVDM")
        else:
            raw[start : start + 100] = rng.choice((b"", b"/", b"../x", b"data_batch_1.bin", b"\xff" * 100)).ljust(
                100, b"\0"
            )
        raw[start + 148 : start + 156] = b" " * 8
        raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
    return bytes(raw)


def _odd_manifest(rng: random.Random) -> bytes:
    manifest = json.loads(_mapped_file("manifest.json"))
    inner = rng.choice((manifest, manifest["files"], manifest["files"]["train.x.npy"]))
    inner[rng.choice(list(inner))] = rng.choice(_ODD)
    if rng.random() < 0.3:
        manifest["splits"] = rng.choice(
            (["train"], ["train", "train"], ["train", "../m/train"], [5], [], ["fit", "train", "test"])
        )
    return json.dumps(manifest).encode()


def _odd_pickle(rng: random.Random) -> bytes:
    """A batch with odd values, and tuples of tuples for keys."""
    value: object = rng.choice(_ODD)
    for _ in range(rng.randint(0, 60)):
        value = (value,) * rng.randint(1, 2)
    batch: dict[object, object] = {b"data": rng.choice(_ODD), b"labels": [rng.choice(_ODD), 1]}
    batch[rng.choice((b"data", b"labels", b"x"))] = value
    raw = pickle.dumps(batch, protocol=rng.randint(0, 5))
    return raw.replace(b"C\x04data", rng.choice((b"C\x04data", b"K\x01", b")", b"]", b"})h\x01\x86")))


HEADERS: dict[str, tuple[Callable[[random.Random], bytes], str]] = {
    "idx": (_odd_idx, "idx"),
    "npy": (_odd_npy, "npy"),
    "npz": (_odd_npz, "npz"),
    "tar": (_odd_tar, "cifar binary, tar"),
    "manifest": (_odd_manifest, "manifest"),
    "pickle": (_odd_pickle, "cifar pickle"),
}


def _fuzz(folder: Path, name: str, count: int) -> tuple[int, int]:
    """How many of `count` mutated files were read, and how many refused."""
    make, read = FORMATS[name]
    whole = make()
    read(folder, whole)  # the unmutated file is read
    return _read_or_refuse(folder, name, read, lambda rng: mutate(whole, rng), count)


def _read_or_refuse(
    folder: Path, name: str, read: Callable[[Path, bytes], object], make: Callable[[random.Random], bytes], count: int
) -> tuple[int, int]:
    rng = random.Random(f"fuzz {name}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = 0
    for i in range(count):
        raw = make(rng)
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


@pytest.mark.parametrize("name", HEADERS)
def test_sound_files_that_say_odd_things_are_read_or_refused(tmp_path: Path, name: str) -> None:
    """Mutated bytes seldom make a header that parses; these always do."""
    make, kind = HEADERS[name]
    _, refused = _read_or_refuse(tmp_path, name, FORMATS[kind][1], make, 150)
    assert refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADERS)
def test_many_sound_files_that_say_odd_things_are_read_or_refused(tmp_path: Path, name: str) -> None:
    make, kind = HEADERS[name]
    _, refused = _read_or_refuse(tmp_path, f"{name}, many", FORMATS[kind][1], make, 2000)
    assert refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutated_files_are_read_or_refused(tmp_path: Path, name: str) -> None:
    _, refused = _fuzz(tmp_path, name, 10_000 // len(FORMATS) + 1)
    assert refused > 0
