"""Broadcasting, in one place.

A time-like quantity has shape `()` or `(B,)`; a state has shape `(B, *)`. Every product of the two goes through
`expand_as`, so a batch of B vectors of length B cannot be multiplied along the wrong axis without anyone noticing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from numerics.errors import UserError


def expand_as(c: Tensor, x: Tensor) -> Tensor:
    """The time-like `c`, shaped to multiply the state `x` and cast to its dtype and device.

    Args:
        c: `()`, `(B,)`, or already expanded: `(B, 1, ..., 1)` with as many axes as `x`.
        x: `(B, *)`.

    Returns:
        `()` or `(B, 1, ..., 1)`, in the dtype of `x` where that is a floating one (a mask stays a mask).
        This is the one cast between coefficients, which are float64, and a state or a network, which need not be.

    Raises:
        UserError: for any other shape of `c`.
    """
    if x.is_floating_point() and c.dtype != x.dtype and c.dtype != torch.bool:
        c = c.to(x.dtype)
    if c.device != x.device:
        c = c.to(x.device)
    if c.ndim == 0:
        return c
    if x.ndim > 0 and c.shape[0] == x.shape[0]:
        if c.ndim == 1:
            return c.reshape(-1, *(1,) * (x.ndim - 1))
        if c.ndim == x.ndim and c.numel() == c.shape[0]:
            return c
    raise UserError(
        f"got a time-like quantity of shape {tuple(c.shape)} for a state of shape {tuple(x.shape)}; "
        f"expected () or ({x.shape[0] if x.ndim else 'B'},): pass one value, or one per sample"
    )


def batch_time(t: Tensor | float, x: Tensor) -> Tensor:
    """`t` as a float64 vector `(B,)` on the device of `x` `(B, *)`; it may come as a number, `()` or `(B,)`.

    Raises:
        UserError: for any other shape.
    """
    t = as_time(t, device=x.device)
    if t.ndim == 0:
        return t.expand(x.shape[0])
    if t.shape != x.shape[:1]:
        raise UserError(
            f"got t of shape {tuple(t.shape)} for x of shape {tuple(x.shape)}; "
            f"expected () or ({x.shape[0]},): pass one time, or one per sample"
        )
    return t


def real_dtype(device: torch.device | str | None) -> torch.dtype:
    """float64, or float32 on a device that has no such numbers (Apple's)."""
    return torch.float32 if device is not None and torch.device(device).type == "mps" else torch.float64


def require_float64(x: Tensor, what: str) -> None:
    """Refuses `x` on a device that has no float64, for `what` is done in it.

    Raises:
        UserError: with the device.
    """
    if real_dtype(x.device) is not torch.float64:
        raise UserError(
            f"got {what} on the device {x.device.type}, which has no float64; expected a device that has: move the model and "
            "the data to the CPU"
        )


def as_time(t: Tensor | float, *, device: torch.device | str | None = None) -> Tensor:
    """`t` as a float64 tensor of its own shape (float32 on a device that has no float64)."""
    if not isinstance(t, Tensor):
        t = torch.as_tensor(t, dtype=real_dtype(device), device=device)
    elif device is not None and t.device != torch.device(device):
        t = t.to(real_dtype(device)).to(device)
    return t.to(real_dtype(t.device))
