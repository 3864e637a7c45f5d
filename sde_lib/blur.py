r"""Blur: a periodic convolution, which the Fourier transform makes diagonal.

    y = F^* diag(h) F x,    A^T y = F^* diag(conj h) F y,    singular values |h|

with F the unitary transform over the last axes and h the transform of the kernel, centred at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError, real_dtype, require_count, require_positive
from sde_lib.operators import SVD, Operator, as_numbers, rounding


@dataclass(frozen=True, eq=False)
class Blur(Operator):
    """A convolution with `kernel` over the last axes, periodic at the edges; y has the shape of x.

    Args:
        kernel: over as many of the last axes as it has, of odd sizes, the middle at 0; each channel is convolved alike.

    Raises:
        UserError: for an even size; when called, for data smaller than the kernel.
    """

    kernel: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", as_numbers(self.kernel, "kernel"))
        if self.kernel.ndim < 1 or not self.kernel.is_floating_point() or any(n % 2 == 0 for n in self.kernel.shape):
            raise UserError(
                f"got a kernel of shape {tuple(self.kernel.shape)} and {self.kernel.dtype}; expected real numbers of "
                f"odd sizes, "
                "so that it has a middle"
            )

    @classmethod
    def gaussian(cls, std: float, *, size: int, axes: int = 2) -> Blur:
        """A Gaussian kernel of `size` entries, odd, and standard deviation `std` along each axis, of sum 1.

        Raises:
            UserError: for a std that is not above 0, or sizes that are no odd counts.
        """
        require_positive(std, "std")
        require_count(size, "size")
        require_count(axes, "axes")
        line = torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - size // 2) / std).square())
        kernel = line
        for _ in range(axes - 1):
            kernel = kernel.unsqueeze(-1) * line
        return cls(kernel / kernel.sum())

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-self.kernel.ndim, 0))

    def _transfer(self, like: Tensor) -> Tensor:
        """h, of the last axes' sizes."""
        sizes = like.shape[like.ndim - self.kernel.ndim :]
        if like.ndim <= self.kernel.ndim or any(n < k for n, k in zip(sizes, self.kernel.shape, strict=True)):
            raise UserError(
                f"got x of shape {tuple(like.shape)} for a kernel of shape {tuple(self.kernel.shape)}; expected at "
                "least as many entries along each of the last axes"
            )
        placed = like.new_zeros(sizes)
        placed[tuple(slice(0, k) for k in self.kernel.shape)] = self.kernel.to(like)
        found: Tensor = torch.fft.fftn(placed.roll([-(k // 2) for k in self.kernel.shape], self._axes))
        return found

    def _forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.fft.fftn(x, dim=self._axes, norm="ortho")
        return found

    def _back(self, c: Tensor) -> Tensor:
        found: Tensor = torch.fft.ifftn(c, dim=self._axes, norm="ortho").real
        return found

    def __call__(self, x: Tensor) -> Tensor:
        return self._back(self._transfer(x) * self._forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._back(self._transfer(y).conj() * self._forward(y))

    def svd(self, noise: Tensor) -> SVD | None:
        first = noise.flatten()[0]
        if not bool((noise == first).all()):
            return None
        shape = noise.shape
        h = self._transfer(noise.unsqueeze(0).to(real_dtype(noise.device))).expand(shape).flatten()
        index = (h.abs() > rounding(self.kernel, noise) * h.abs().max()).nonzero().squeeze(1)
        h = h[index].to(torch.promote_types(noise.dtype, torch.complex64))
        phase = (h / h.abs()).conj()

        def coordinates(x: Tensor) -> Tensor:
            return self._forward(x).flatten(1)[:, index]

        def lift(c: Tensor) -> Tensor:
            return self._back(c.new_zeros(len(c), shape.numel()).index_copy(1, index, c).reshape(len(c), *shape))

        return SVD(
            values=h.abs(),
            noise=first.expand(len(index)),
            left=lambda y: phase * coordinates(y),
            right=coordinates,
            lift=lift,
        )
