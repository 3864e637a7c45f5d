"""The same numbers in every autograd mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def ordinary_mode(device: torch.device) -> Iterator[None]:
    """Leaves `torch.inference_mode()`, in which nothing can be differentiated, and autocast, which changes a score's digits.

    Args:
        device: where the tensors are.
    """
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def ordinary(x: Tensor) -> Tensor:
    """`x`, as a copy where it was made under `torch.inference_mode()` and so cannot be differentiated by."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):  # in it a copy is one too
        return x.clone()
