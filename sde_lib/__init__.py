"""Forward processes: linear SDEs, their scores, and exact oracles for them."""

from __future__ import annotations

from dataclasses import fields

from numerics import UserError
from sde_lib import analytic, time_grids
from sde_lib.base import SDE
from sde_lib.custom import KernelSDE, TableVESDE, TableVPSDE
from sde_lib.probability_flow import Flow, FlowTimes, PlainFlow, WhitenedFlow
from sde_lib.score import CountedScore, Score, denoised, noise
from sde_lib.sub_vp import SubVPSDE
from sde_lib.tables import cosine_betas, geometric_sigmas, linear_betas
from sde_lib.time_grids import TimeGrid
from sde_lib.ve import VESDE
from sde_lib.vp import VPSDE

_NAMES: dict[str, type[SDE]] = {
    "vp": VPSDE,
    "ve": VESDE,
    "sub_vp": SubVPSDE,
    "table_vp": TableVPSDE,
    "table_ve": TableVESDE,
}


def available() -> tuple[str, ...]:
    """The names that `create` knows."""
    return tuple(_NAMES)


def create(name: str, **options: object) -> SDE:
    """The SDE of that name, for command lines, run folders and pretrained models.

    Raises:
        UserError: for an unknown name or option.
    """
    if name not in _NAMES:
        raise UserError(f"got the SDE {name!r}; expected one of {', '.join(_NAMES)}")
    known = [f.name for f in fields(_NAMES[name]) if f.init]  # type: ignore[arg-type]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise UserError(f"got {', '.join(unknown)} for the SDE {name!r}; expected some of {', '.join(known)}")
    try:
        return _NAMES[name](**options)
    except TypeError as error:
        raise UserError(f"got options {sorted(options)} for the SDE {name!r}: {error}") from error


def describe(sde: SDE) -> dict[str, object]:
    """The `name` and the options with which `create` makes `sde` again, in plain types.

    Raises:
        UserError: for an SDE of a class that has no name here (a user's own, or one made of functions).
    """
    for name, kind in _NAMES.items():
        if type(sde) is kind:
            options = {f.name: getattr(sde, f.name) for f in fields(sde) if f.init}  # type: ignore[arg-type]
            return {"name": name, **options}
    raise UserError(
        f"got an SDE of class {type(sde).__name__}, which cannot be written down by name; "
        f"expected one of {', '.join(_NAMES)}: keep the program that makes it instead"
    )


__all__ = [
    "SDE",
    "CountedScore",
    "Flow",
    "FlowTimes",
    "KernelSDE",
    "PlainFlow",
    "Score",
    "SubVPSDE",
    "TableVESDE",
    "TableVPSDE",
    "TimeGrid",
    "VESDE",
    "VPSDE",
    "WhitenedFlow",
    "analytic",
    "available",
    "cosine_betas",
    "create",
    "denoised",
    "describe",
    "geometric_sigmas",
    "linear_betas",
    "noise",
    "time_grids",
]
