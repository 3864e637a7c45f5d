"""The networks by name, for command lines, run folders and pretrained folders; and a network for data of any shape."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from models import presets
from models.adm import ADM
from models.dit import DiT
from models.mlp import MLP
from models.ncsnpp import NCSNpp, level_resolutions
from models.network import Network
from models.refinenet import NCSN, NCSNv2, RefineNet
from models.unet import UNet
from numerics import Catalogue, Option, UserError

DERIVED = ("dim", "in_channels", "image_size", "num_classes")
"""Options that follow from the data: `for_data` fills them in."""

_CLASSES: dict[str, Callable[..., Network]] = {
    "mlp": MLP,
    "unet": UNet,
    "ncsnpp": NCSNpp,
    "adm": ADM,
    "dit": DiT,
    "refinenet": RefineNet,
    "ncsn": NCSN,
    "ncsnv2": NCSNv2,
}
_OWN: Catalogue[Network] = Catalogue("network", _CLASSES, derived=DERIVED)


def _auto(*, image: bool, **options: Any) -> Network:
    """A U-Net of images, an MLP of everything else, each with those of the options that it has."""
    name = "unet" if image else "mlp"
    return create(name, **{k: v for k, v in options.items() if k in _OWN.options(name)})


def _union() -> inspect.Signature:
    """The options of both networks that "auto" may choose."""
    both = {**_OWN.options("mlp"), **_OWN.options("unet")}
    image = inspect.Parameter("image", inspect.Parameter.KEYWORD_ONLY, annotation=bool)
    return inspect.Signature(
        [
            image,
            *(
                inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=o.annotation)
                for o in both.values()
                if o.name not in DERIVED
            ),
        ]
    )


_auto.__signature__ = _union()  # type: ignore[attr-defined]

NETWORKS: Catalogue[Network] = Catalogue(
    "network",
    {
        "auto": _auto,
        **_CLASSES,
        **{name: partial(_CLASSES[p.network], **p.options) for name, p in presets.PRESETS.items()},
    },
    derived=(*DERIVED, "image"),
)
"""All networks: "auto", the classes, and the published ones."""


def available() -> tuple[str, ...]:
    """The names that `create` knows."""
    return NETWORKS.available()


def options(name: str) -> dict[str, Option]:
    """The options of the network of that name.

    Raises:
        UserError: an unknown name.
    """
    return NETWORKS.options(name)


def create(name: str, **options: Any) -> Network:
    """The network of that name.

    Raises:
        UserError: for an unknown name, option or value.
    """
    return NETWORKS.create(name, **options)


def for_data(name: str, event_shape: Sequence[int], num_classes: int | None = None, **options: Any) -> Network:
    """The network of that name for samples of `event_shape`; "auto" is a U-Net for `(C, H, W)` and an MLP for the rest.

    Args:
        event_shape: `(D,)`, `(C, L)` or `(C, H, W)`; H and W may differ.
        num_classes: of class labels, or None.
        options: the network's own; what follows from the data is filled in. Of the resolutions with attention those stay that
            the network has at this size.

    Raises:
        UserError: for a network that does not take such samples, or such classes.
    """
    shape, classes = tuple(event_shape), num_classes or None
    if name == "auto":
        chosen = "unet" if len(shape) == 3 else "mlp"
        options = {k: v for k, v in options.items() if k in _OWN.options(chosen)}
        return for_data(chosen, shape, classes, **options)
    own = NETWORKS.options(name)
    derived: dict[str, Any] = {}
    if "dim" in own:
        derived["dim"] = math.prod(shape)
    elif len(shape) != 3:
        raise UserError(f"got the network {name!r} for samples of shape {shape}; expected images (C, H, W): use mlp")
    else:
        derived["in_channels"] = shape[0]
        size = max(shape[1:])
        if "image_size" in own:
            derived["image_size"] = size
        if "attention_resolutions" in own and options.get("attention_resolutions", 0) is not None:
            levels = options.get("multipliers", own["multipliers"].default)
            wanted = options.get("attention_resolutions", own["attention_resolutions"].default)
            if wanted is not None:
                known = level_resolutions(size, len(tuple(levels)))
                options = {**options, "attention_resolutions": tuple(r for r in tuple(wanted) if r in known)}
    if classes is not None and "num_classes" not in own:
        raise UserError(
            f"got the network {name!r} for {classes} classes; expected one that takes classes, such as unet"
        )
    if "num_classes" in own:
        derived["num_classes"] = classes
    return create(name, **options, **derived)


def describe(net: object) -> dict[str, object]:
    """The `name` and `options` with which `create(name, **options)` makes `net` again, up to its weights.

    Raises:
        UserError: for a module of a class that has no name here.
    """
    for name, kind in _CLASSES.items():
        if type(net) is kind:
            return {"name": name, "options": dict(net.options)}  # type: ignore[attr-defined]
    raise UserError(
        f"got a network of class {type(net).__name__}, which cannot be written down by name; expected one of "
        f"{', '.join(_CLASSES)}: save its state_dict and keep the program that makes it instead"
    )
