"""Grey values that come as other numbers: recognised, and made integers again.

A pixel of L grey levels is an integer k from 0 to L - 1. People also have it as a float: k itself, k / (L - 1) in [0, 1], or
2k / (L - 1) - 1 in [-1, 1]. Read as real numbers, such data lie on a grid, where a density has no bound: the better the model,
the lower the score, without an end and without a meaning. So they are either converted, exactly, where the number of levels is
stated, or refused, unless they are said to be real numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import DataError

__all__ = ["MAX_LEVELS", "Reading", "dtype_of_levels", "recognised"]

MAX_LEVELS = 2**16
"""Of 16-bit pictures: the largest number whose values, with noise added, float32 tells apart."""

_ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
_FLOAT32 = 2**-22  # of float64 too, since its numbers often were float32 before
# Numbers of a table with so many columns are taken for a flattened image.
_FLATTENED = 16
# So many numbers have to be there before anything is said of them.
_EVIDENCE = 32
_FIRST = 256
_CHUNK = 2**17
_DENOMINATORS = (*range(1, 257), *(2**bits - 1 for bits in range(9, 17)), 2**16)


def dtype_of_levels(levels: int) -> torch.dtype:
    """The type in which grey values are stored: uint8 up to 256 levels, and int32 above, since torch has no arithmetic for
    uint16."""
    return torch.uint8 if levels <= 256 else torch.int32


def _rounding(dtype: torch.dtype, steps: int) -> float:
    """How far, in steps, numbers of this type in [0, 1] may be from a grid of so many steps."""
    return steps * _ROUNDING.get(dtype, _FLOAT32)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How floats v stand for grey values k of L levels: k = (v - shift) * steps.

    Args:
        levels: L.
        shift, steps: 0 and 1 for k itself, 0 and L - 1 for k / (L - 1), -1 and (L - 1) / 2 for numbers in [-1, 1].
    """

    levels: int
    shift: float
    steps: float

    @classmethod
    def of(cls, v: Tensor, levels: int, name: str) -> Reading:
        """The reading that the range of v (N, *) tells.

        Raises:
            DataError: a range that is none of the three, or numbers that are 0 and 1 only, of more levels than two.
        """
        low, high = _extent(v)
        if not (low >= -1 and high <= levels - 1) or (low < 0 and high > 1):
            raise DataError(
                f"{name}: got floats from {low:g} to {high:g} for {levels} grey levels; expected 0 to {levels - 1}, or [0, 1] "
                "or [-1, 1]; check the number of levels"
            )
        if low < 0:
            return cls(levels=levels, shift=-1.0, steps=(levels - 1) / 2)
        if high > 1:
            return cls(levels=levels, shift=0.0, steps=1.0)
        if high > 0 and levels > 2 and all(bool(((c == 0) | (c == 1)).all()) for c in v.split(_rows(v))):
            raise DataError(
                f"{name}: got floats that are 0 and 1 only for {levels} grey levels, which may mean 0 and 1 or 0 and "
                f"{levels - 1}; expected levels=2, or integers"
            )
        return cls(levels=levels, shift=0.0, steps=float(levels - 1))

    def __call__(self, v: Tensor, name: str) -> Tensor:
        """The grey values (N, *) of v (N, *), in the type in which they are stored.

        Raises:
            DataError: a number that is no level, or of a type too coarse to tell the levels apart.
        """
        allowed = 0.02 + (0.0 if self.steps == 1 else _rounding(v.dtype, self.levels - 1))
        if allowed > 0.3:
            raise DataError(f"{name}: got {v.dtype}, which does not tell {self.levels} levels apart; expected float32")
        found = torch.empty(v.shape, dtype=dtype_of_levels(self.levels), device=v.device)
        for first in range(0, len(v), _rows(v)):
            part = v[first : first + _rows(v)].double()
            exact = (part - self.shift) * self.steps
            k = exact.round()
            # written so that NaN is bad
            bad = ~(((exact - k).abs() <= allowed) & (k >= 0) & (k <= self.levels - 1))
            if bool(bad.any()):
                raise DataError(
                    f"{name}: got {float(part[bad][0]):g}, which is none of the {self.levels} grey values {self}; expected "
                    "those only: round them, or check the number of levels"
                )
            found[first : first + _rows(v)] = k.to(found.dtype)
        return found

    def __str__(self) -> str:
        top = self.levels - 1
        if self.shift < 0:
            return f"2k/{top} - 1"
        return f"0 to {top}" if self.steps == 1 else f"k/{top}"


def _rows(v: Tensor) -> int:
    return max(1, _CHUNK // max(1, math.prod(v.shape[1:])))


def _extent(v: Tensor) -> tuple[float, float]:
    parts = [c.aminmax() for c in v.split(_rows(v))]
    return min(float(p.min) for p in parts), max(float(p.max) for p in parts)


def recognised(x: Tensor) -> str | None:
    """What to say of numbers x (N, *) that look like grey values, though they are not stated to be: what they are, what is
    expected, and what to do. None for all others, among them tables of fewer than 16 columns, whose whole numbers may be
    anything.

    Real numbers are told from the first few; only numbers on a grid are looked at to the end.
    """
    if x.ndim < 2 or x.numel() < _EVIDENCE or (x.ndim == 2 and x.shape[1] < _FLATTENED):
        return None
    first = x[: max(1, _FIRST // math.prod(x.shape[1:]))].flatten()[:_FIRST]
    grids = [grid for grid in _grids(x.dtype) if grid.holds(first.double())]
    for rows in x.split(_rows(x)):
        if not grids:
            return _few_values(x)
        values = rows.unique().double()
        grids = [grid for grid in grids if grid.holds(values)]
    low, high = _extent(x)
    return _advice(x, grids[0], high) if grids and low < high else None if low == high else _few_values(x)


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """The numbers shift + k / steps, k = 0, 1, ..., up to `most`."""

    shift: float
    steps: float
    allowed: float
    most: float = 1.0

    def holds(self, values: Tensor) -> bool:
        k = (values - self.shift) * self.steps
        return bool((((k - k.round()).abs() <= self.allowed) & (k > -0.5) & (values <= self.most)).all())


def _grids(dtype: torch.dtype) -> list[_Grid]:
    """Those that are looked for: whole numbers, then k / m in [0, 1] and in [-1, 1], the coarsest first."""
    whole = _Grid(shift=0.0, steps=1.0, allowed=1e-6, most=MAX_LEVELS - 1)
    if not dtype.is_floating_point:
        return [whole]
    fine = {m: max(1e-6, _rounding(dtype, m)) for m in _DENOMINATORS if _rounding(dtype, m) <= 0.13}
    unit = [_Grid(shift=0.0, steps=m, allowed=allowed) for m, allowed in fine.items() if m > 1]
    return [whole, *unit, *(_Grid(shift=-1.0, steps=m / 2, allowed=allowed) for m, allowed in fine.items())]


def _advice(x: Tensor, grid: _Grid, high: float) -> str:
    if grid.most > 1:
        top = int(high)
        levels = top + 1 if top <= 16 else 256 if top <= 255 else MAX_LEVELS
        text = f"all whole numbers from 0 to {top}"
    else:
        top = round(grid.steps if grid.shift == 0 else 2 * grid.steps)
        levels, text = top + 1, f"all k/{top}" if grid.shift == 0 else f"all 2k/{top} - 1"
    if grid.most == 1 and top in (256, MAX_LEVELS):
        levels, do = top, f"scale them to integers k and give levels={top}"
    elif x.ndim > 4 or x.ndim == 2:
        do = f"reshape them to images (N, C, H, W) and give levels={levels}"
    else:
        do = f"give levels={levels} (--config.data.levels={levels}), which makes them grey values"
    return _text(text, f", as grey values of {levels} levels are", do)


def _few_values(x: Tensor) -> str | None:
    """The same of images whose channels take a few values each, again and again: grey values that were standardised, say, or
    averaged; and of integers below 0, such as bytes read as signed ones."""
    if x.dtype == torch.bfloat16:
        return None
    if not x.dtype.is_floating_point:
        low, high = _extent(x.to(torch.int64))
        return _text(
            f"integers from {low:g} to {high:g}", ", as shifted grey values are", "give them from 0 on, with levels="
        )
    channel = (x[: max(1, _CHUNK // math.prod(x.shape[2:])), 0] if x.ndim == 4 else x[: _rows(x)]).flatten()
    values, times = channel.unique(return_counts=True)
    count = len(values)
    if not 1 < count <= 1024 or len(channel) < max(8 * _EVIDENCE, 2 * count) or 2 * int((times > 1).sum()) < count:
        return None
    where = " (in the first channel)" if x.ndim == 4 else ""
    return _text(f"{count} values only{where}", ", as grey values do", "give those as integers, with levels=")


def _text(values: str, alike: str, do: str) -> str:
    return (
        f"numbers that are {values}{alike}; expected a word on what they are: {do}, or say continuous=True "
        "(--config.data.continuous=True), which keeps them as real numbers"
    )
