"""The networks by name, for command lines, run folders and pretrained folders; and a network for data of any shape."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from models import presets
from models.adm import ADM
from models.captioned_unet import CaptionedUNet
from models.conditioning import Conditioning
from models.dit import DiT
from models.mlp import MLP
from models.ncsnpp import NCSNpp, level_resolutions
from models.network import Network, check_sizes
from models.refinenet import NCSN, NCSNv2, RefineNet
from models.unet import UNet
from models.unet_1d import UNet1d
from numerics import Catalogue, Option, UserError, argument_help

DERIVED = ("dim", "in_channels", "image_size", "length", "num_classes", "class_names", "reads")
"""Options that follow from the data: `for_data` fills them in."""

_CLASSES: dict[str, Callable[..., Network]] = {
    "mlp": MLP,
    "unet": UNet,
    "unet_1d": UNet1d,
    "captioned_unet": CaptionedUNet,
    "ncsnpp": NCSNpp,
    "adm": ADM,
    "dit": DiT,
    "refinenet": RefineNet,
    "ncsn": NCSN,
    "ncsnv2": NCSNv2,
}
_OWN: Catalogue[Network] = Catalogue("network", _CLASSES, derived=DERIVED)


_LONG = 8
"""From so many places on, `(C, L)` is a sequence that convolutions suit."""


def _auto(*, event_shape: Sequence[int], num_classes: int | None = None, **options: Any) -> Network:
    """A U-Net for images `(C, H, W)` and for sequences `(C, L)` from L = 8 on, an MLP for everything else, each with those of
    the options that it has."""
    long = len(event_shape) == 2 and event_shape[1] >= _LONG
    name = "unet" if len(event_shape) == 3 else "unet_1d" if long else "mlp"
    return for_data(name, event_shape, num_classes, **{k: v for k, v in options.items() if k in _OWN.options(name)})


def _union() -> inspect.Signature:
    """The shape and the classes, and the options of the networks that "auto" may choose."""
    own = [p for p in inspect.signature(_auto, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = {**_OWN.options("mlp"), **_OWN.options("unet_1d"), **_OWN.options("unet")}
    return inspect.Signature(
        [
            *own,
            *(
                inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=o.default, annotation=o.annotation)
                for o in options.values()
                if o.name not in DERIVED
            ),
        ]
    )


_auto.__signature__ = _union()  # type: ignore[attr-defined]
_TEXTS = {**argument_help(MLP), **argument_help(UNet1d), **argument_help(UNet)}
_auto.__doc__ = "\n".join(
    [_auto.__doc__ or "", "", "Args:", *(f"    {name}: {text}." for name, text in _TEXTS.items())]
)

NETWORKS: Catalogue[Network] = Catalogue(
    "network",
    {
        "auto": _auto,
        **_CLASSES,
        **{name: partial(_CLASSES[p.network], **p.options) for name, p in presets.PRESETS.items()},
    },
    derived=(*DERIVED, "event_shape"),
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


def needed_conditioning(name: str, **options: Any) -> Conditioning | None:
    """The conditioning that the network of that name needs; None where any label suits it.

    Args:
        options: those of the network that are not at their defaults.

    Raises:
        UserError: an unknown name.

    >>> needed_conditioning("ncsnv2_cifar10")
    DiscreteIndex(levels=232, reverse=True)
    """
    own = {n: o.default for n, o in NETWORKS.options(name).items()}
    entry = NETWORKS.entries[name]
    kind = entry.func if isinstance(entry, partial) else entry
    while isinstance(kind, partial):
        kind = kind.func
    maker = kind if isinstance(kind, type) and issubclass(kind, Network) else Network
    return maker.needed_conditioning({**own, **options})


def create(name: str, **options: Any) -> Network:
    """The network of that name.

    Raises:
        UserError: for an unknown name, option or value.
    """
    return NETWORKS.create(name, **options)


def for_data(
    name: str,
    event_shape: Sequence[int],
    num_classes: int | None = None,
    *,
    class_names: Sequence[str] = (),
    **options: Any,
) -> Network:
    """The network of that name for samples of `event_shape`; "auto" is a U-Net for `(C, H, W)`, a one-dimensional one for
    `(C, L)` from L = 8 on, and an MLP for the rest.

    Args:
        name: one of `available()`.
        event_shape: `(D,)`, `(C, L)` or `(C, H, W)`; H and W may differ.
        num_classes: of class labels, or None.
        class_names: their names, for a network that reads them.
        options: the network's own, without those of `DERIVED`, which are filled in here. `image_size` is the longer side, so
            that attention at resolution r is over at most r^2 pixels. At its default, `attention_resolutions` means the levels
            nearest to these resolutions, within a factor sqrt(2): 14 for 16 at 28×28, none at 8×8. Given otherwise, each has
            to be a level's. A published network keeps its levels, whatever the size of the images.

    Raises:
        UserError: for an unknown name or option, or a network that does not take such samples or such classes.

    >>> import torch
    >>> net = for_data("auto", (1, 8, 16), channels=16)
    >>> type(net).__name__, net(torch.zeros(2, 1, 8, 16), torch.zeros(2)).shape
    ('NCSNpp', torch.Size([2, 1, 8, 16]))
    >>> for_data("auto", (2,), width=32).dim
    2
    """
    shape, classes = tuple(event_shape), num_classes or None
    check_sizes(event_shape=shape)
    own = NETWORKS.options(name)
    if filled := sorted(set(options) & set(NETWORKS.derived)):
        raise UserError(f"got {filled[0]}={options[filled[0]]!r}; expected no value, since it follows from the data")
    if name == "auto":
        return create(name, event_shape=shape, num_classes=classes, **options)
    derived: dict[str, Any] = {}
    if "dim" in own:
        derived["dim"] = math.prod(shape)
    elif "length" in own:
        if len(shape) != 2:
            raise UserError(
                f"got the network {name!r} for samples of shape {shape}; expected sequences (C, L): use unet or mlp"
            )
        derived["in_channels"], derived["length"] = shape
    elif len(shape) != 3:
        sequences = " or unet_1d" if len(shape) == 2 else ""
        raise UserError(
            f"got the network {name!r} for samples of shape {shape}; expected images (C, H, W): use mlp{sequences}"
        )
    else:
        derived["in_channels"] = shape[0]
        if "image_size" in own and name not in presets.PRESETS:
            derived["image_size"] = max(shape[1:])
            options = _with_attention(own, options, derived["image_size"])
    if "class_names" in own:
        derived["class_names"] = tuple(class_names)
    elif classes is not None and "num_classes" not in own:
        raise UserError(
            f"got the network {name!r} for {classes} classes; expected one that takes classes, such as unet"
        )
    if "num_classes" in own:
        derived["num_classes"] = classes
    return create(name, **options, **derived)


def _with_attention(own: Mapping[str, Option], options: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """The options with the default `attention_resolutions` brought to the levels of this size."""
    key = "attention_resolutions"
    if key not in own or own[key].default is None:
        return dict(options)
    default, given = tuple(own[key].default), options.get(key, own[key].default)
    multipliers = options.get("multipliers", own["multipliers"].default)
    if not all(isinstance(v, (tuple, list)) for v in (given, multipliers)) or tuple(given) != default:
        return dict(options)
    sides = level_resolutions(image_size, len(multipliers))

    def distance(side: int, wanted: int) -> float:
        return abs(math.log2(side / wanted))

    nearest = [(min(sides, key=lambda side, r=r: distance(side, r)), r) for r in default]  # type: ignore[misc]
    return {**options, key: tuple(side for side, r in nearest if distance(side, r) <= 0.5)}


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
