"""Small valid files of every format that the readers take, made here so that the tests need no download, for the tests
of the readers and the fuzzing ones."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

CIFAR_TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx_folder(folder: Path, *, train: int = 12, test: int = 5, compress: bool = False) -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = random.randint(0, 256, (count, 6, 5)).astype(np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = random.randint(0, 10, count).astype(np.uint8)
    for name, array in arrays.items():
        raw = idx_bytes(array)
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return arrays


def cifar_batches(count: int = 2) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.RandomState(1)
    return {
        name: (random.randint(0, 256, (count, 3072)).astype(np.uint8), random.randint(0, 10, count))
        for name in [*CIFAR_TRAIN, "test_batch"]
    }


def cifar_binary(images: np.ndarray, labels: np.ndarray) -> bytes:
    return np.concatenate([labels.astype(np.uint8)[:, np.newaxis], images], axis=1).tobytes()


def cifar_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """As Python 3 writes at protocol 2. (Python 2, which wrote the published files, differs in its string
    opcodes only; see `python2_pickle`.)"""
    return pickle.dumps(
        {b"data": images, b"labels": labels.tolist(), b"batch_label": b"batch", b"filenames": [b"a.png"] * len(labels)},
        protocol=2,
    )


def python2_pickle(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The published files' form, written by hand: byte strings as (SHORT_)BINSTRING, numpy.core's names."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + len(value).to_bytes(4, "little") + value

    def integer(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + value.to_bytes(2, "little")

    dtype = (
        b"cnumpy\ndtype\nq\x05"
        + text(b"u1")
        + b"K\x00K\x01\x87Rq\x06(K\x03"
        + text(b"|")
        + b"NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85"
        + text(b"b")
        + b"\x87Rq\x04(K\x01"
        + integer(images.shape[0])
        + integer(images.shape[1])
        + b"\x86"
        + dtype
        + b"\x89"
        + text(images.tobytes())
        + b"tb"
    )
    numbers = b"]q\x07(" + b"".join(integer(int(label)) for label in labels) + b"e"
    return b"\x80\x02}q\x01(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def tarball(members: dict[str, bytes], folder: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def cifar_tar(*, binary: bool) -> bytes:
    encode, suffix = (cifar_binary, ".bin") if binary else (cifar_pickle, "")
    members = {name + suffix: encode(*batch) for name, batch in cifar_batches().items()}
    return tarball(members, "cifar-10-batches-bin" if binary else "cifar-10-batches-py")


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(shape: object, descr: str = "<f4") -> bytes:
    """The beginning of a .npy file that states any shape at all."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def npz_bytes(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return buffer.getvalue()


def picture(kind: str, size: tuple[int, int] = (9, 7), mode: str = "RGB", seed: int = 0) -> bytes:
    channels = len(Image.new(mode, (1, 1)).getbands())
    random = np.random.RandomState(seed)
    pixels = random.randint(0, 256, (size[1], size[0], channels)).astype(np.uint8)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_the_pickle_written_by_hand_is_one() -> None:
    images, labels = cifar_batches(300)["test_batch"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy.core has a new name
        batch = pickle.loads(python2_pickle(images, labels), encoding="bytes")
    assert np.array_equal(batch[b"data"], images)
    assert batch[b"labels"] == labels.tolist()
