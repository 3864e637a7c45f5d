r"""Linear maps from data to measurements, y = A x, with their adjoints and, where it is cheap, their singular values.

An *operator* is any callable `A(x)` with x `(B, *)` and y `(B, ...)`; a linear one has `A.adjoint(y)`, the map A^T for which

    (1)  <A x, y> = <x, A^T y>

and may have `A.svd(noise)`, the decomposition A = U diag(s) V^T in whose coordinates the measurement falls apart,

    (2)  (U^T y)_i = s_i (V^T x)_i + n_i z_i

with independent noises n_i z_i. A class of the user's with these methods, or `LinearMap(forward, adjoint)`, is as good as
those below. An operator that holds data of single samples has `take(index)`; one whose rows differ in length may say so by
`row_sizes()`, of the shape of one measurement.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError, ordinary, real_dtype, require_count

LARGEST_MATRIX = 4096
"""A matrix has its singular values where the smaller side is at most this: some seconds."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SVD:
    """The coordinates of (2): only those with s_i > 0.

    Attributes:
        values: s, `(r,)`.
        noise: n, `(r,)`.
        left: y `(B, ...)` to U^T y `(B, r)`, which may be complex.
        right: x `(B, *)` to V^T x `(B, r)`.
        lift: coordinates c `(B, r)` to V c `(B, *)`.
    """

    values: Tensor
    noise: Tensor
    left: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]
    lift: Callable[[Tensor], Tensor]


def as_numbers(value: object, name: str) -> Tensor:
    """`value`, a tensor or what torch makes one of, such as nested lists or an array of numpy, that autograd can save.

    Raises:
        UserError: for anything else, or numbers that are not finite.
    """
    try:
        made = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"got {name}={value!r}; expected a tensor, or lists of numbers of equal lengths") from error
    if made.is_complex() or not bool(made.isfinite().all()):
        raise UserError(f"got {name} with entries that are not finite real numbers; expected such ones")
    return ordinary(made)


class Operator(ABC):
    """A linear map A from data `(B, *)` to measurements `(B, ...)`."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""

    def svd(self, noise: Tensor) -> SVD | None:
        """The decomposition (2) for noises `noise` of the shape of one measurement; None where there is no cheap one."""
        return None

    def observed(self, y: Tensor) -> Tensor:
        """`y`, with 0 in entries that are no measurements."""
        return y


@dataclass(frozen=True, eq=False)
class LinearMap(Operator):
    """Two functions as an operator.

    Args:
        forward: x `(B, *)` to A x.
        transpose: y to A^T y.
    """

    forward: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.transpose(y)


@dataclass(frozen=True, eq=False)
class Linear(Operator):
    """A matrix times the data, flattened: y `(B, m)`. A Gaussian matrix makes it compressed sensing.

    Args:
        matrix: `(m, D)`.
        shape: of the data, `(*)` of D entries; `(D,)` unless given.

    Raises:
        UserError: for a matrix that is none, or a shape of another number of entries.
    """

    matrix: Tensor
    shape: Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", as_numbers(self.matrix, "matrix"))
        if self.matrix.ndim != 2 or not self.matrix.is_floating_point():
            raise UserError(
                f"got a matrix of shape {tuple(self.matrix.shape)} and {self.matrix.dtype}; expected (m, D) of real numbers"
            )
        D = self.matrix.shape[1]
        shape = (D,) if self.shape is None else tuple(int(n) for n in self.shape)
        if math.prod(shape) != D or any(n < 1 for n in shape):
            raise UserError(f"got shape={shape} for a matrix of {D} columns; expected a shape of {D} entries")
        object.__setattr__(self, "shape", shape)

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix.to(y)).reshape(len(y), *self._shape)

    @property
    def _shape(self) -> tuple[int, ...]:
        assert self.shape is not None
        return tuple(self.shape)

    def row_sizes(self) -> Tensor:
        """The lengths of the rows, `(m,)`."""
        lengths: Tensor = self.matrix.to(real_dtype(self.matrix.device)).norm(dim=1)
        return lengths

    def svd(self, noise: Tensor) -> SVD | None:
        if min(self.matrix.shape) > LARGEST_MATRIX:
            return None
        alike = bool((noise == noise[0]).all())
        if not alike and not bool((noise > 0).all()):
            return None
        A = self.matrix.to(noise.device, real_dtype(noise.device))
        # how many rows are no combination of others is seen where all are of one length: of rows divided by their noise, or in
        # units of their own, all but the largest would look like the rounding of it
        sizes = A.norm(dim=1)
        sizes = torch.where(sizes > 0, sizes, 1.0)
        rank = int((torch.linalg.svdvals(A / sizes.unsqueeze(1)) > rounding(self.matrix, noise)).sum())
        # noises that differ are made equal: the rows divided by them; without noise rows may be of any length
        exact = alike and not bool(noise[0])
        scale = sizes if exact else torch.ones_like(sizes) if alike else noise.to(A)
        # from the largest row to the smallest, which keeps the digits of small singular values beside large ones
        rows = A / scale.unsqueeze(1)
        order = rows.norm(dim=1).argsort(descending=True)
        U, s, Vh = torch.linalg.svd(rows[order], full_matrices=False)
        U, s, Vh = (part.to(noise) for part in (U[order.argsort(), :rank], s[:rank], Vh[:rank]))
        return SVD(
            values=s,
            noise=(noise[0] if alike else torch.ones_like(noise[0])).expand_as(s),
            left=lambda y: (y / scale.to(y)) @ U.to(y),
            right=lambda x: x.flatten(1) @ Vh.to(x).T,
            lift=lambda c: (c @ Vh.to(c)).reshape(len(c), *self._shape),
        )


@dataclass(frozen=True, eq=False)
class Mask(Operator):
    """What is seen where `mask` is true, and 0 elsewhere: y has the shape of x. A mask of ones is denoising; `Masks` are one a
    sample.

    Args:
        mask: of the shape of one sample, `(*)`, boolean or of zeros and ones.

    Raises:
        UserError: for a mask of other values, or of none but zeros.
    """

    mask: Tensor

    def __post_init__(self) -> None:
        mask = as_numbers(self.mask, "mask")
        seen = mask.bool()
        if bool((seen.to(mask.dtype) != mask).any()) or not bool(seen.any()):
            raise UserError(
                "got a mask that is not of zeros and ones with at least one 1; expected 1 where data are seen"
            )
        object.__setattr__(self, "mask", ordinary(seen))

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.mask.shape:
            raise UserError(
                f"got a mask of shape {tuple(self.mask.shape)} for x of shape {tuple(x.shape)}; expected one of "
                f"{tuple(x.shape[1:])}, expanded to every channel, or Masks(masks) for one a sample"
            )
        return torch.where(self.mask.to(x.device), x, 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    def observed(self, y: Tensor) -> Tensor:
        return self(y)

    def svd(self, noise: Tensor) -> SVD | None:
        index, shape = self.mask.flatten().nonzero().squeeze(1).to(noise.device), self.mask.shape

        def entries(x: Tensor) -> Tensor:
            return x.flatten(1)[:, index.to(x.device)]

        return SVD(
            values=torch.ones_like(noise.flatten()[index]),
            noise=noise.flatten()[index],
            left=entries,
            right=entries,
            lift=lambda c: (
                c.new_zeros(len(c), shape.numel()).index_copy(1, index.to(c.device), c).reshape(len(c), *shape)
            ),
        )


@dataclass(frozen=True, eq=False)
class Downsample(Operator):
    """The mean over blocks of `factor` entries along each of the last `axes` axes.

    Args:
        factor: >= 1; the data's sizes are multiples of it.
        axes: 2 for pictures.
    """

    factor: int
    axes: int = 2

    def __post_init__(self) -> None:
        require_count(self.factor, "factor")
        require_count(self.axes, "axes")

    def __call__(self, x: Tensor) -> Tensor:
        sizes = x.shape[1:]
        if len(sizes) < self.axes or any(n % self.factor for n in sizes[len(sizes) - self.axes :]):
            raise UserError(
                f"got x of shape {tuple(x.shape)} for blocks of {self.factor}; expected at least {self.axes} axes beside the "
                f"batch, the last {self.axes} of sizes that {self.factor} divides: crop or pad the data"
            )
        for axis in range(-self.axes, 0):
            at = x.ndim + axis
            x = x.reshape(*x.shape[:at], x.shape[at] // self.factor, self.factor, *x.shape[at + 1 :]).mean(dim=at + 1)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        for axis in range(-self.axes, 0):
            y = y.repeat_interleave(self.factor, dim=axis)
        return y / float(self.factor**self.axes)

    def svd(self, noise: Tensor) -> SVD | None:
        return orthogonal_rows(self, noise, self.factor ** (-self.axes / 2))


@dataclass(frozen=True, eq=False)
class Grey(Operator):
    """A weighted mean of the channels: x `(B, C, *)` to y `(B, 1, *)`. The inverse problem is colourisation.

    Args:
        weights: one a channel; the luma of ITU-R BT.601 unless given.

    Raises:
        UserError: for no weights, or none but zeros.
    """

    weights: Sequence[float] = (0.299, 0.587, 0.114)

    def __post_init__(self) -> None:
        try:
            weights = tuple(float(w) for w in self.weights)
        except (TypeError, ValueError):
            weights = ()
        if not math.isfinite(sum(weights)) or not sum(w * w for w in weights) > 0:
            raise UserError(f"got weights={self.weights!r}; expected a number for each channel, not all 0")
        object.__setattr__(self, "weights", weights)

    def _column(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=like.dtype, device=like.device).reshape(-1, *(1,) * (like.ndim - 2))

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != len(self.weights):
            raise UserError(
                f"got x of shape {tuple(x.shape)} for {len(self.weights)} weights; expected (B, {len(self.weights)}, ...)"
            )
        return (x * self._column(x)).sum(dim=1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self._column(y)

    def svd(self, noise: Tensor) -> SVD | None:
        return orthogonal_rows(self, noise, math.sqrt(sum(w * w for w in self.weights)))


def rounding(*given: Tensor) -> float:
    """Singular values of at most this are the rounding of the numbers that are `given`, where a matrix has rows of length 1."""
    return 100 * max(torch.finfo(torch.promote_types(numbers.dtype, torch.float32)).eps for numbers in given)


def orthogonal_rows(operator: Operator, noise: Tensor, scale: float) -> SVD:
    """The decomposition of an `operator` with A A^T = scale^2 I: U is the identity, and the noises may differ."""
    return SVD(
        values=torch.full_like(noise.flatten(), scale),
        noise=noise.flatten(),
        left=lambda y: y.flatten(1),
        right=lambda x: operator(x).flatten(1) / scale,
        lift=lambda c: operator.adjoint(c.reshape(len(c), *noise.shape)) / scale,
    )
