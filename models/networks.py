"""The networks by name, for command lines, run folders and pretrained folders. Nothing else looks a name up."""

from __future__ import annotations

from collections.abc import Callable

from models.adm import ADM
from models.dit import DiT
from models.mlp import MLP
from models.ncsnpp import NCSNpp
from models.network import Network
from models.refinenet import NCSN, NCSNv2, RefineNet
from models.unet import UNet
from numerics import UserError

_NETWORKS: dict[str, Callable[..., Network]] = {
    "mlp": MLP,
    "unet": UNet,
    "ncsnpp": NCSNpp,
    "adm": ADM,
    "dit": DiT,
    "refinenet": RefineNet,
    "ncsn": NCSN,
    "ncsnv2": NCSNv2,
}


def available() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(_NETWORKS)


def create(name: str, **options: object) -> Network:
    """The network of that name.

    Raises:
        UserError: for an unknown name, option or value.
    """
    if name not in _NETWORKS:
        raise UserError(f"got the network {name!r}; expected one of {', '.join(_NETWORKS)}")
    try:
        return _NETWORKS[name](**options)
    except TypeError as error:
        raise UserError(f"got options {sorted(options)} for the network {name!r}: {error}") from error


def describe(net: object) -> dict[str, object]:
    """The `name` and `options` with which `create(name, **options)` makes `net` again, up to its weights.

    Raises:
        UserError: for a module of a class that has no name here.
    """
    for name, kind in _NETWORKS.items():
        if type(net) is kind:
            return {"name": name, "options": dict(net.options)}  # type: ignore[attr-defined]
    raise UserError(
        f"got a network of class {type(net).__name__}, which cannot be written down by name; expected one of "
        f"{', '.join(_NETWORKS)}: save its state_dict and keep the program that makes it instead"
    )
