"""Is the network behind a score in train mode, with parts that answer differently there?

Dropout draws anew at every call and batch normalisation depends on the batch mates: an adaptive solver then never settles, and
samples and densities are of another model than the one that was trained. Train mode alone is harmless.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from numerics import UserError

_DEEP = 8  # wrappers around wrappers
_WIDE = 64  # of a list or a table, so many entries are looked at: an ensemble's networks, and not a data set


def require_eval_mode(score: Callable[..., Any]) -> None:
    """Refuses a score whose network is in train mode and has dropout or batch statistics at work.

    Args:
        score: a module, a method of one, or an object that holds one (labels, corrections, guidance), or several in a list or a
            dict. What a plain function refers to is not seen.

    Raises:
        UserError: with the first such part, and where it is.
    """
    for network in _networks(score, set(), _DEEP):
        for place, part in network.named_modules():
            found = _at_work(part)
            if found:
                where = f" in {place}" if place else ""
                raise UserError(
                    f"got {type(network).__name__} in train mode with {found} at work{where}; expected one answer for one x "
                    "and t: call model.eval() first"
                )


def networks_of(score: Callable[..., Any]) -> Iterator[nn.Module]:
    """The networks that a score is, or holds, as far as they can be seen; see `require_eval_mode`."""
    return _networks(score, set(), _DEEP)


def _at_work(part: nn.Module) -> str:
    """What makes this module answer differently in train mode, as it is now; "" for nothing."""
    if not part.training:
        return ""
    if isinstance(part, _DropoutNd) and part.p > 0:
        return f"{type(part).__name__}(p={part.p:g})"
    if isinstance(part, _BatchNorm) and part.running_mean is not None:
        return f"{type(part).__name__}, the batch's own statistics"
    if isinstance(part, nn.MultiheadAttention | nn.RNNBase) and part.dropout > 0:
        return f"dropout={part.dropout:g} of {type(part).__name__}"
    return type(part).__name__ if isinstance(part, nn.RReLU) else ""


def _networks(held: Any, seen: set[int], depth: int) -> Iterator[nn.Module]:
    """The modules that `held` is, or holds."""
    if id(held) in seen or depth == 0:
        return
    seen.add(id(held))
    if isinstance(held, nn.Module):
        yield held
        return
    inner: list[Any] = []
    if isinstance(held, functools.partial):
        inner = [held.func, *held.args, *held.keywords.values()]
    elif isinstance(held, MethodType):
        inner = [held.__self__]
    elif not isinstance(held, FunctionType | BuiltinFunctionType | ModuleType | type):
        entries = getattr(held, "__dict__", {}).values()
        if isinstance(held, dict | list | tuple):
            entries = itertools.islice(held.values() if isinstance(held, dict) else held, _WIDE)
        inner = [v for v in entries if callable(v) or isinstance(v, nn.Module | dict | list | tuple)]
    for value in inner:
        yield from _networks(value, seen, depth - 1)
