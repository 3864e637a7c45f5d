"""Conjugate gradients, a system for each sample of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from numerics.broadcast import expand_as


class Solved(NamedTuple):
    """What `conjugate_gradients` found, sample by sample.

    Attributes:
        x: the solutions, `(B, *)`.
        residual: |b - M x| / |b|, `(B,)`, as the recursion has it: how far the iterations were from enough; 0 where b is 0.
        indefinite: `(B,)`, true where a direction of no curvature, or of less than there can be, was met with more than
            rounding left to solve (a residual above the square root of eps): x stays where it was.
    """

    x: Tensor
    residual: Tensor
    indefinite: Tensor


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    iterations: int,
    *,
    least: Callable[[Tensor], Tensor] | None = None,
) -> Solved:
    """An approximate solution x `(B, *)` of M x = b from `iterations` products with M, begun at 0.

    M is symmetric and positive semi-definite, one for each sample; exact after as many iterations as b has components along
    different eigenvalues (Hestenes and Stiefel 1952, "Methods of conjugate gradients for solving linear systems"). A sample
    whose residual is lost in rounding, or that meets a direction of no curvature, stays where it is: so each solution is that
    of its own system, whatever the batch, and nothing waits for the device. So does one that meets less curvature than there
    can be, where the products are those of a network and M is no such matrix after all.

    Args:
        apply: the product with M, `(B, *)` to `(B, *)`.
        b: the right-hand sides, `(B, *)`.
        iterations: products made, also where fewer would do.
        least: from a direction p to what p^T M p is known not to be below, `(B, *)` to `(B,)`.
    """
    x, r, p = torch.zeros_like(b), b, b
    square = inner(r, r)
    done = torch.finfo(b.dtype).eps ** 2 * square
    going = square > done
    indefinite = torch.zeros_like(going)
    for k in range(iterations):
        product = apply(p)
        curvature = inner(p, product)
        going = going & (square > done)
        enough = curvature > 0
        if least is not None:
            enough = enough & (curvature >= least(p))
        indefinite = indefinite | (going & ~enough)
        going = going & enough
        step = expand_as(torch.where(going, square / torch.where(going, curvature, 1.0), 0.0), b)
        x, r = x + step * p, r - step * product
        if k == iterations - 1:
            break
        new = inner(r, r)
        p = r + expand_as(torch.where(going, new / torch.where(going, square, 1.0), 0.0), b) * p
        square = torch.where(going, new, square)
    start, left = inner(b, b), inner(r, r)
    residual = torch.where(start > 0, left / torch.where(start > 0, start, 1.0), 0.0).sqrt()
    return Solved(x, residual, indefinite & (residual.square() > torch.finfo(b.dtype).eps))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner products `(B,)` of `a` and `b`, both `(B, *)`, sample by sample, in their own dtype."""
    return (a * b).flatten(1).sum(dim=1)
