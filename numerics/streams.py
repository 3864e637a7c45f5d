"""Random numbers keyed by (seed, sample id, draw).

A `torch.Generator` hands out numbers in the order in which they are asked for, so a sample depends on the batch that
it is drawn with; `torch.randn` is not even prefix-stable. `SampleStreams` gives every sample a stream of its own,
addressed by counters: number `j` of draw `d` of sample `i` is a function of `(seed, i, d, j)` and of nothing else. So
sample `i` is the same for any batch size, any order, any number of processes, and also in the middle of a run.

The function is Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3",
section 3.3), written in 64-bit integer tensor operations, so that it runs wherever torch runs. Its 128-bit counter is
(block, draw, id low, id high) and its 64-bit key is the seed. Normals come from the Box-Muller transform, in float64.

Everything that draws noise calls `normal`, `uniform` or `rademacher` below, which take a `torch.Generator`, a
`SampleStreams`, or None (torch's global generator) alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from numerics.errors import UserError

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and Weyl increments of Philox4x32
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def mix(*key: int | str) -> int:
    """A number in [0, 2^63) that depends on all of `key`, the same on every machine: a seed of one purpose.

    Two generators with one seed draw the same numbers, and data are made from small seeds. So what is drawn beside them, about
    them, is seeded by `mix("its name", seed)`.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


class SampleStreams:
    """One stream of random numbers for each sample of a batch.

    Args:
        seed: any integer; its low 64 bits are the key.
        ids: the samples' numbers, `(B,)`, a sequence or a tensor of integers >= 0. None means 0, 1, 2, ... for
            whatever batch is asked.

    A draw advances every stream by one. `take(index)` gives the streams of some of the samples, at the same draw.
    """

    def __init__(self, seed: int, ids: Sequence[int] | Tensor | None = None, *, draw: int = 0) -> None:
        self.seed = int(seed)
        try:
            given = None if ids is None else torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"got ids={_short(repr(ids))}; expected integers >= 0, one a sample") from error
        if given is not None and given.dtype not in _INTEGERS:
            raise UserError(f"got ids of type {given.dtype}; expected integers >= 0, one a sample")
        if given is not None and bool((given < 0).any()):
            bad = given[given < 0]
            first = ", ".join(str(int(i)) for i in bad[:5])
            raise UserError(
                f"got {len(bad)} ids below 0 ({first}{', ...' if len(bad) > 5 else ''}); expected integers >= 0, one a sample"
            )
        self.ids = None if given is None else given.to(torch.int64)
        if self.ids is not None and self.ids.ndim != 1:
            raise UserError(f"got ids of shape {tuple(self.ids.shape)}; expected (B,): one number per sample")
        self.draw = draw

    def __repr__(self) -> str:
        ids = None if self.ids is None else self.ids.tolist()
        return f"SampleStreams({self.seed}, ids={ids}, draw={self.draw})"

    def take(self, index: Tensor) -> SampleStreams:
        """The streams of the samples at `index` `(b,)` of this batch, from the present draw on."""
        index = torch.as_tensor(index)
        if index.dtype == torch.bool:
            index = index.nonzero().squeeze(1)
        ids = index if self.ids is None else self.ids.to(index.device)[index]
        return SampleStreams(self.seed, ids, draw=self.draw)

    def words(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        """The next draw as integers in [0, 2^32), of `shape` `(B, *)`, int64."""
        n_samples, n = int(shape[0]), math.prod(int(s) for s in shape[1:])
        ids = torch.arange(n_samples, device=device) if self.ids is None else self.ids.to(device or "cpu")
        if ids.shape[0] != n_samples:
            raise UserError(
                f"got a draw for a batch of {n_samples} from streams of {ids.shape[0]} samples; "
                f"expected equal numbers: give one id per sample, or take() those that remain"
            )
        blocks = torch.arange((n + 3) // 4, device=ids.device)
        counter = (
            blocks.expand(n_samples, -1),
            torch.full_like(blocks, self.draw & _MASK).expand(n_samples, -1),
            (ids & _MASK).unsqueeze(1).expand(-1, len(blocks)),
            ((ids >> 32) & _MASK).unsqueeze(1).expand(-1, len(blocks)),
        )
        self.draw += 1
        words = torch.stack(philox(counter, (self.seed & _MASK, (self.seed >> 32) & _MASK)), dim=-1)
        return words.reshape(n_samples, -1)[:, :n].reshape(tuple(shape))

    def normal(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        """The next draw as standard normals, `shape`, float64."""
        n_samples, n = int(shape[0]), math.prod(int(s) for s in shape[1:])
        u = self._open_unit(self.words((n_samples, 2 * ((n + 1) // 2)), device=device))
        radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
        z = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
        return z.reshape(n_samples, -1)[:, :n].reshape(tuple(shape))

    def uniform(self, shape: Sequence[int], *, device: torch.device | str | None = None) -> Tensor:
        """The next draw as uniforms in [0, 1), `shape`, float64, of 24 bits so that no rounding to float32 gives 1."""
        return self._real(self.words(shape, device=device) >> 8) / 2**24

    def _open_unit(self, words: Tensor) -> Tensor:
        # the half keeps 0 out, so that the logarithm is finite
        return (self._real(words) + 0.5) / 2**32

    @staticmethod
    def _real(words: Tensor) -> Tensor:
        return words.to(torch.float32 if words.device.type == "mps" else torch.float64)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four 32-bit words (int64 tensors of one shape) from four, under a key of two words.

    A product of two 32-bit words fills 64 bits and so wraps in int64, but its bits are right; the mask after the
    arithmetic shift keeps just the high word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


Generator = torch.Generator | SampleStreams | None
"""What every function that draws accepts as `generator`."""


def normal(
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normals of `shape` `(B, *)`, from per-sample streams or from one generator.

    A generator of another device than `device` draws on its own, and the numbers move: so a CPU generator gives the
    same noise to every device.
    """
    if isinstance(generator, SampleStreams):
        return generator.normal(shape, device=device).to(dtype or torch.get_default_dtype())
    source = generator.device if generator is not None else device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device or source or "cpu")


def uniform(
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Uniforms in [0, 1) of `shape` `(B, *)`; see `normal`."""
    if isinstance(generator, SampleStreams):
        return generator.uniform(shape, device=device).to(dtype or torch.get_default_dtype())
    source = generator.device if generator is not None else device
    return torch.rand(tuple(shape), generator=generator, device=source, dtype=dtype).to(device or source or "cpu")


def rademacher(
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Random signs of `shape` `(B, *)`; see `normal`."""
    if isinstance(generator, SampleStreams):
        signs = (generator.words(shape, device=device) >> 31) * 2 - 1
    else:
        source = generator.device if generator is not None else device
        signs = torch.randint(0, 2, tuple(shape), generator=generator, device=source) * 2 - 1
        signs = signs.to(device or source or "cpu")
    return signs.to(dtype or torch.get_default_dtype())
