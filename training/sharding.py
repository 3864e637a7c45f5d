"""Whole tensors from shards and back, so that a checkpoint does not know how many processes wrote it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def unshard(value: Any) -> Any:
    """`value`, a tensor or nested dicts of them, with sharded tensors made whole. Collective where there are any."""
    if isinstance(value, dict):
        return {key: unshard(entry) for key, entry in value.items()}
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def shard_like(value: Tensor, own: Tensor) -> Tensor:
    """The whole tensor `value`, on the device, in the dtype and in the shards of `own`."""
    value = value.to(own.device, own.dtype)
    if hasattr(own, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, own.device_mesh, own.placements)  # type: ignore[attr-defined]
    return value
