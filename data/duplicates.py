"""Samples of one split that are in another one too, number for number.

Every sample gets a 64-bit sum of its words, weighted and mixed, in one pass over arrays; those that agree in it are compared by
their SHA-256, which also names them. So a test set that leaks into training is found in the time that it takes to read both
(about a second a gigabyte).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Duplicates", "duplicates"]

_CHUNK_BYTES = 2**24
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Duplicates:
    """Samples of a split that are also among those of another.

    Args:
        of, among: names of the two splits.
        total: number of samples of the first.
        rows: int64 (K,), places in the first split.
        firsts: int64 (K,), for each of them the first place in the other.
        others: int64 (M,), all places in the other split that hold one of them, rising.
        ids, first_ids: int64 (K,), the ids at `rows` and at `firsts`.
        fingerprints: of each of the K samples, the first 16 digits of its SHA-256.
        names: what samples are called, by their ids, or ().
    """

    of: str
    among: str
    total: int
    rows: Tensor
    firsts: Tensor
    others: Tensor
    ids: Tensor
    first_ids: Tensor
    fingerprints: tuple[str, ...]
    names: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not len(self):
            return f"no sample of {self.of} is also in {self.among}"
        pairs = zip(self.ids.tolist(), self.first_ids.tolist(), self.fingerprints, strict=True)
        shown = [
            f"{self._called(self.of, a)} = {self._called(self.among, b)} [{fingerprint}]"
            for _, (a, b, fingerprint) in zip(range(_SHOWN), pairs, strict=False)
        ]
        more = ", ..." if len(self) > _SHOWN else ""
        return (
            f"{len(self):,} of {self.total:,} samples of {self.of} are also in {self.among} ({', '.join(shown)}{more})"
        )

    def _called(self, split: str, i: int) -> str:
        return str(self.names[i]) if i < len(self.names) else f"{split} {i}"


def _sums(x: Tensor) -> np.ndarray:
    """A number for each sample of x (N, *), uint64 (N,): equal for equal samples, and hardly ever for others."""
    width = x[0].numel() * x.element_size()
    words = -(-width // 8)
    weights = np.frombuffer(np.random.RandomState(0).bytes(8 * words), np.uint64) | np.uint64(1)
    sums = np.empty(len(x), np.uint64)
    step = max(1, _CHUNK_BYTES // max(1, width))
    for first in range(0, len(x), step):
        padded = np.zeros((len(x[first : first + step]), 8 * words), np.uint8)
        padded[:, :width] = _bytes(x[first : first + step])
        values = padded.view(np.uint64)
        # high bits into low ones: a sum of products would hardly see the highest
        sums[first : first + step] = ((values ^ (values >> np.uint64(29))) * weights).sum(axis=1, dtype=np.uint64)
    return sums


def _bytes(x: Tensor) -> np.ndarray:
    """uint8 (N, bytes of a sample)."""
    return x.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()


def _digests(x: Tensor, rows: np.ndarray) -> list[str]:
    return [hashlib.sha256(_bytes(x[i : i + 1]).tobytes()).hexdigest()[:32] for i in rows.tolist()]


def duplicates(
    of: tuple[str, Tensor, Tensor], among: tuple[str, Tensor, Tensor], names: Sequence[str] = ()
) -> Duplicates:
    """The samples of one split that are in another.

    Args:
        of, among: name, samples (N, *) and ids (N,) of each, the samples of one type and shape.
        names: of samples, by their ids.
    """
    sums, others = _sums(of[1]), _sums(among[1])
    rows = np.flatnonzero(np.isin(sums, others))
    places = np.flatnonzero(np.isin(others, sums[rows]))
    found, found_among = _digests(of[1], rows), _digests(among[1], places)
    first: dict[str, int] = {}
    for digest, place in zip(found_among, places.tolist(), strict=True):
        first.setdefault(digest, place)
    kept = [i for i, digest in enumerate(found) if digest in first]
    known = {found[i] for i in kept}
    rows_kept = torch.from_numpy(rows[kept].astype(np.int64))
    firsts = torch.tensor([first[found[i]] for i in kept], dtype=torch.int64)
    held = [place for digest, place in zip(found_among, places.tolist(), strict=True) if digest in known]
    return Duplicates(
        of=of[0],
        among=among[0],
        total=len(of[1]),
        rows=rows_kept,
        firsts=firsts,
        others=torch.tensor(held, dtype=torch.int64),
        ids=of[2][rows_kept],
        first_ids=among[2][firsts],
        fingerprints=tuple(found[i][:16] for i in kept),
        names=names,
    )
