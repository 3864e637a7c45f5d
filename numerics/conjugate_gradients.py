"""Conjugate gradients, a system for each sample of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from numerics.broadcast import expand_as


def conjugate_gradients(apply: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """An approximate solution x `(B, *)` of M x = b from `iterations` products with M, begun at 0.

    M is symmetric and positive semi-definite, one for each sample; exact after as many iterations as b has components along
    different eigenvalues (Hestenes and Stiefel 1952, "Methods of conjugate gradients for solving linear systems"). A sample
    whose residual is lost in rounding, or that meets a direction of no curvature, stays where it is: so each solution is that
    of its own system, whatever the batch, and nothing waits for the device.

    Args:
        apply: the product with M, `(B, *)` to `(B, *)`.
        b: the right-hand sides, `(B, *)`.
        iterations: products made, also where fewer would do.
    """
    x, r, p = torch.zeros_like(b), b, b
    square = _dot(r, r)
    done = torch.finfo(b.dtype).eps ** 2 * square
    for k in range(iterations):
        product = apply(p)
        curvature = _dot(p, product)
        going = (curvature > 0) & (square > done)
        step = expand_as(torch.where(going, square / torch.where(going, curvature, 1.0), 0.0), b)
        x = x + step * p
        if k == iterations - 1:
            break
        r = r - step * product
        new = _dot(r, r)
        p = r + expand_as(torch.where(going, new / torch.where(going, square, 1.0), 0.0), b) * p
        square = torch.where(going, new, square)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner products `(B,)`, of the product's own dtype."""
    return (a * b).flatten(1).sum(dim=1)
