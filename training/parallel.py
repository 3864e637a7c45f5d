"""Wrapping the loss for several processes: DDP, or FSDP2 where the weights do not fit one device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from training.distributed import Group

NoSync = Callable[[], AbstractContextManager[Any]]


def parallelize(loss: nn.Module, engine: str, group: Group) -> tuple[nn.Module, NoSync]:
    """`loss` under `engine` ("ddp" or "fsdp"), and the context in which its gradients are not exchanged.

    Both engines average gradients over processes. One process needs neither.
    """
    if group.world == 1:
        return loss, contextlib.nullcontext
    if engine == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        device = next(loss.parameters()).device
        wrapped = DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)
        return wrapped, wrapped.no_sync
    from torch.distributed.fsdp import fully_shard

    for child in _blocks(loss):
        fully_shard(child)
    fully_shard(loss)

    @contextmanager
    def no_sync() -> Iterator[None]:
        loss.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            loss.set_requires_gradient_sync(True)  # type: ignore[operator]

    return loss, no_sync


def _blocks(loss: nn.Module) -> list[nn.Module]:
    """The largest lists of submodules, whose entries are gathered one at a time."""
    lists = [m for m in loss.modules() if isinstance(m, nn.ModuleList)]
    return [
        child
        for m in lists
        for child in m
        if any(True for _ in child.parameters()) and not isinstance(child, nn.ModuleList)
    ]
