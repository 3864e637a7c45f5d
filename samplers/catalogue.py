"""Samplers by name, for command lines and run folders; programs construct the classes.

Options are the class's own. Where an option is an object, a name stands for it: `grid="karras"`, `solver="rk4"`,
`predictor="ancestral"`, `corrector="none"`; `clip=True` adds `ClipDenoised()` to the corrections. Objects pass as well.
`steps` are always those of the grid: for "ald" the levels (and `corrector_steps` the Langevin steps at each), and for "ode"
it chooses Heun's method on a grid unless a solver is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from inspect import signature
from typing import Any

from numerics import RK4, Dopri5, Heun, SciPy, Solver, TorchDiffEq, UserError
from samplers.adaptive_sde import AdaptiveSDE
from samplers.ancestral import Ancestral
from samplers.annealed_langevin import AnnealedLangevin
from samplers.base import Sampler
from samplers.corrections import ClipDenoised
from samplers.ddim import DDIM
from samplers.deis import DEIS
from samplers.dpm_solver import DPMSolver
from samplers.edm import EDM
from samplers.euler_maruyama import EulerMaruyama
from samplers.langevin import Langevin
from samplers.predictor_corrector import PredictorCorrector
from samplers.probability_flow import ProbabilityFlow
from samplers.reverse_diffusion import ReverseDiffusion
from samplers.seeds import SEEDS
from samplers.torchsde_solver import TorchSDE
from samplers.unipc import UniPC
from sde_lib import time_grids

_SOLVERS: dict[str, type[Solver]] = {
    "dopri5": Dopri5,
    "heun": Heun,
    "rk4": RK4,
    "torchdiffeq": TorchDiffEq,
    "scipy": SciPy,
}
_PREDICTORS: dict[str, Callable[..., Any]] = {
    "reverse_diffusion": ReverseDiffusion,
    "euler_maruyama": EulerMaruyama,
    "ancestral": Ancestral,
    "none": lambda: None,
}
_CORRECTORS: dict[str, Callable[..., Any]] = {
    "langevin": Langevin,
    "ald": AnnealedLangevin,
    "none": lambda: None,
}


def _pc(
    *,
    predictor: Any = "reverse_diffusion",
    corrector: Any = "langevin",
    snr: float | None = None,
    corrector_steps: int | None = None,
    **options: Any,
) -> Sampler:
    chain = {k: v for k, v in (("snr", snr), ("steps", corrector_steps)) if v is not None}
    return PredictorCorrector(
        predictor=_named("predictor", predictor, _PREDICTORS),
        corrector=_named("corrector", corrector, _CORRECTORS, **chain),
        **options,
    )


def _predictor_only(kind: Callable[..., Any]) -> Callable[..., Sampler]:
    def build(**options: Any) -> Sampler:
        own = {f.name for f in fields(kind)} if is_dataclass(kind) else set()
        return PredictorCorrector(
            predictor=kind(**{k: v for k, v in options.items() if k in own}),
            corrector=None,
            **{k: v for k, v in options.items() if k not in own},
        )

    return build


def _ald(*, steps: int | None = None, corrector_steps: int | None = None, **options: Any) -> Sampler:
    options.update({k: v for k, v in (("levels", steps), ("steps", corrector_steps)) if v is not None})
    return AnnealedLangevin(**options)


def _ode(
    *,
    solver: Any = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    **options: Any,
) -> Sampler:
    own = {k: v for k, v in (("steps", steps), ("rtol", rtol), ("atol", atol)) if v is not None}
    if solver is None:
        solver = "dopri5" if steps is None else "heun"
    return ProbabilityFlow(solver=_named("solver", solver, _SOLVERS, **own), **options)


def _named(what: str, value: Any, known: dict[str, Any], **options: Any) -> Any:
    """The object that a name stands for, made with `options`; an object itself, which then takes none."""
    if value is None or not isinstance(value, str):
        if options:
            raise UserError(f"got {sorted(options)} beside {what}={value!r}; expected them in the object itself")
        return value
    if value not in known:
        raise UserError(f"got {what}={value!r}; expected one of {', '.join(known)}")
    try:
        return known[value](**options)
    except TypeError as error:
        raise UserError(f"got {sorted(options)} for {what}={value!r}, which does not take all of them") from error


_NAMES: dict[str, Callable[..., Sampler]] = {
    "pc": _pc,
    "ald": _ald,
    "ancestral": _predictor_only(Ancestral),
    "reverse_diffusion": _predictor_only(ReverseDiffusion),
    "euler_maruyama": _predictor_only(EulerMaruyama),
    "ode": _ode,
    "ddim": DDIM,
    "dpm_solver": DPMSolver,
    "unipc": UniPC,
    "heun": EDM,
    "deis": DEIS,
    "adaptive_sde": AdaptiveSDE,
    "seeds": SEEDS,
    "torchsde": TorchSDE,
}
_BUILT: dict[str, type[Sampler]] = {"ode": ProbabilityFlow, "ald": AnnealedLangevin}
_CLASSES: dict[Any, type[Sampler]] = {
    builder: _BUILT.get(name, PredictorCorrector) for name, builder in _NAMES.items() if not isinstance(builder, type)
}
_NEEDS = {"torchsde": "torchsde"}


def available() -> tuple[str, ...]:
    """The names that `create` knows; those whose optional dependency is missing are left out."""
    return tuple(name for name in _NAMES if name not in _NEEDS or find_spec(_NEEDS[name]) is not None)


def create(name: str, **options: Any) -> Sampler:
    """The sampler of that name, with its options.

    Raises:
        UserError: for an unknown name or option, or a missing dependency.
    """
    if name in _NAMES and name not in available():
        raise UserError(f"got the sampler {name!r}, which needs the package {_NEEDS[name]}: install it")
    if name not in _NAMES:
        raise UserError(f"got the sampler {name!r}; expected one of {', '.join(available())}")
    if isinstance(options.get("grid"), str):
        options["grid"] = time_grids.create(options["grid"])
    if options.pop("clip", False):
        options["corrections"] = (*options.get("corrections", ()), ClipDenoised())
    try:
        return _NAMES[name](**options)
    except TypeError as error:
        unknown = str(error).rsplit("argument ", 1)[-1]
        raise UserError(
            f"got the option {unknown} for the sampler {name!r}; expected some of {', '.join(_options(_NAMES[name]))}"
        ) from error


def _options(builder: Callable[..., Sampler]) -> list[str]:
    """The names of the options a sampler takes."""
    kind: Any = _CLASSES.get(builder, builder)
    own = [p.name for p in signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return sorted({*own, *(f.name for f in fields(kind)), "clip"})
