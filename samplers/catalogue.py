"""Samplers by name, for command lines and run folders; programs construct the classes.

    create("pc", steps=500, predictor="ancestral", corrector={"name": "langevin", "snr": 0.1}, grid="karras")
    options("pc")       # every option with its default: the fields of the classes

An option that is an object may be given by its name, as a mapping `{name, **options}`, or as the object; `corrections` are a
tuple of these, to which `clip=True` adds `ClipDenoised()`. `steps` are always those of the grid: for "ald" the levels (and
`corrector_steps` the Langevin steps at each), and for "ode" they choose Heun's method on a grid unless a solver is named.

The names that the field uses for the same methods are entries too: euler, euler_ancestral, dpmpp_2m, dpmpp_2m_sde,
dpmpp_3m_sde, ddpm.

>>> create("ddim", steps=20, grid={"name": "karras", "rho": 3.0}, clip=True)
DDIM(grid=Karras(t_start=None, t_end=None, rho=3.0), corrections=(ClipDenoised(low=-1.0, high=1.0),), steps=20)
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from numerics import Catalogue, Dopri5, Heun, Solver, UserError, argument_help
from numerics.solvers import SOLVERS
from samplers.adaptive_sde import AdaptiveSDE
from samplers.ancestral import Ancestral
from samplers.annealed_langevin import AnnealedLangevin, AnnealedLangevinCorrector
from samplers.base import Sampler
from samplers.corrections import ClipDenoised, Correction, DynamicThreshold, Temperature
from samplers.correctors import Corrector
from samplers.ddim import DDIM
from samplers.deis import DEIS
from samplers.dpm_solver import DPMSolver
from samplers.euler_maruyama import EulerMaruyama
from samplers.heun_edm import HeunEDM
from samplers.langevin import Langevin
from samplers.predictor_corrector import PredictorCorrector
from samplers.predictors import Predictor
from samplers.probability_flow import ProbabilityFlow
from samplers.reverse_diffusion import ReverseDiffusion
from samplers.seeds import SEEDS
from samplers.torchsde_solver import TorchSDE
from samplers.unipc import UniPC
from sde_lib import FLOWS, TIME_GRIDS, Flow, TimeGrid, WhitenedFlow

T = TypeVar("T")
Corrections = tuple[Correction, ...]
# the classes' own defaults
_REVERSE_DIFFUSION, _LANGEVIN, _WHITENED = ReverseDiffusion(), Langevin(), WhitenedFlow()

PREDICTORS: Catalogue[Predictor] = Catalogue(
    "predictor",
    {"reverse_diffusion": ReverseDiffusion, "euler_maruyama": EulerMaruyama, "ancestral": Ancestral},
)
CORRECTORS: Catalogue[Corrector] = Catalogue("corrector", {"langevin": Langevin, "ald": AnnealedLangevinCorrector})
CORRECTIONS: Catalogue[Correction] = Catalogue(
    "correction",
    {"clip_denoised": ClipDenoised, "dynamic_threshold": DynamicThreshold, "temperature": Temperature},
)


def predictor_corrector(
    *,
    predictor: Predictor | None = _REVERSE_DIFFUSION,
    corrector: Corrector | AnnealedLangevin | None = _LANGEVIN,
    snr: float | None = None,
    corrector_steps: int | None = None,
    sequence: Literal["corrector_first", "predictor_first"] = "corrector_first",
    order: Literal["corrector_first", "predictor_first"] | None = None,
    steps: int = 1000,
    grid: TimeGrid | None = None,
    denoise: bool = True,
    corrections: Corrections = (),
) -> PredictorCorrector:
    """`PredictorCorrector`, with the corrector's `snr` and number of steps as options of its own.

    Args:
        snr: the corrector's signal-to-noise ratio; None for that of `corrector`.
        corrector_steps: the corrector's number of steps; None for that of `corrector`.
    """
    return PredictorCorrector(
        predictor=predictor,
        corrector=_changed("corrector", corrector, snr=snr, steps=corrector_steps),
        sequence=sequence,
        order=order,
        steps=steps,
        grid=grid,
        denoise=denoise,
        corrections=corrections,
    )


def annealed_langevin(
    *,
    steps: int | None = None,
    corrector_steps: int = 1,
    snr: float = 0.16,
    step_size: float | None = None,
    levels: int = 1000,
    grid: TimeGrid | None = None,
    denoise: bool = True,
    corrections: Corrections = (),
) -> AnnealedLangevin:
    """`AnnealedLangevin`; `steps` are the levels, and `corrector_steps` the Langevin steps at each.

    Args:
        steps: number of levels; None for `levels`.
        corrector_steps: number of Langevin steps at each level, of one evaluation each.
    """
    return AnnealedLangevin(
        levels=levels if steps is None else steps,
        steps=corrector_steps,
        snr=snr,
        step_size=step_size,
        grid=grid,
        denoise=denoise,
        corrections=corrections,
    )


def ancestral(
    *,
    variance: Literal["posterior", "transition", "learned"] = "posterior",
    steps: int = 1000,
    grid: TimeGrid | None = None,
    denoise: bool = True,
    corrections: Corrections = (),
) -> PredictorCorrector:
    """`Ancestral` without a corrector.

    Args:
        variance: as in `Ancestral`.
    """
    predictor = Ancestral(variance=variance)
    return PredictorCorrector(
        predictor=predictor, corrector=None, steps=steps, grid=grid, denoise=denoise, corrections=corrections
    )


def reverse_diffusion(
    *, steps: int = 1000, grid: TimeGrid | None = None, denoise: bool = True, corrections: Corrections = ()
) -> PredictorCorrector:
    """`ReverseDiffusion` without a corrector."""
    return PredictorCorrector(corrector=None, steps=steps, grid=grid, denoise=denoise, corrections=corrections)


def euler_maruyama(
    *,
    stochasticity: float = 1.0,
    steps: int = 1000,
    grid: TimeGrid | None = None,
    denoise: bool = True,
    corrections: Corrections = (),
) -> PredictorCorrector:
    """`EulerMaruyama` without a corrector.

    Args:
        stochasticity: as in `EulerMaruyama`.
    """
    predictor = EulerMaruyama(stochasticity=stochasticity)
    return PredictorCorrector(
        predictor=predictor, corrector=None, steps=steps, grid=grid, denoise=denoise, corrections=corrections
    )


def probability_flow(
    *,
    solver: Solver | None = None,
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    flow: Flow = _WHITENED,
    grid: TimeGrid | None = None,
    denoise: bool = False,
    corrections: Corrections = (),
) -> ProbabilityFlow:
    """`ProbabilityFlow`, with the solver's number of steps and tolerances as options of its own.

    Args:
        solver: the ODE solver; None for Dopri5, or for Heun's method where `steps` are given.
        steps: number of steps of a solver of fixed steps; None for the solver's own.
        rtol, atol: relative and absolute tolerance of an adaptive solver; None for the solver's own.
    """
    if solver is None:
        solver = Dopri5() if steps is None else Heun()
    solver = _changed("solver", solver, steps=steps, rtol=rtol, atol=atol)
    return ProbabilityFlow(solver=solver, flow=flow, grid=grid, denoise=denoise, corrections=corrections)


def _changed(what: str, value: T, **given: Any) -> T:
    """The object `value` with those of the `given` fields that are not None."""
    changes = {name: v for name, v in given.items() if v is not None}
    if not changes:
        return value
    own = [f.name for f in fields(value)] if is_dataclass(value) else []
    for name, v in changes.items():
        if name not in own:
            raise UserError(
                f"got {name}={v!r} for {what}={value!r}; expected an option that it takes, some of "
                f"{', '.join(own) or 'none'}"
            )
    return replace(value, **changes)  # type: ignore[type-var]


def _entry(kind: Callable[..., Sampler], /, **fixed: Any) -> Callable[..., Sampler]:
    """What makes a `kind` of the `fixed` options: from all its others, and `clip`."""

    def make(*, clip: bool = False, **options: Any) -> Sampler:
        sampler = kind(**fixed, **options)
        return replace(sampler, corrections=(*sampler.corrections, ClipDenoised())) if clip else sampler

    own = [p for p in inspect.signature(kind).parameters.values() if p.name not in fixed]
    added = inspect.Parameter("clip", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    hints = typing.get_type_hints(kind)  # of a class: each field's, where it was written
    make.__signature__ = inspect.Signature([*own, added])  # type: ignore[attr-defined]
    make.__annotations__ = {**{p.name: hints[p.name] for p in own}, "clip": bool}
    texts = {**argument_help(hints.get("return", kind)), **argument_help(kind)}
    texts["clip"] = "whether to clip the denoised mean to [-1, 1] at every evaluation"
    summary = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0]
    make.__doc__ = "\n".join([summary, "", "Args:", *(f"    {name}: {text}." for name, text in texts.items())])
    return make


SAMPLERS: Catalogue[Sampler] = Catalogue(
    "sampler",
    {
        "pc": _entry(predictor_corrector),
        "ald": _entry(annealed_langevin),
        "ancestral": _entry(ancestral),
        "reverse_diffusion": _entry(reverse_diffusion),
        "euler_maruyama": _entry(euler_maruyama),
        "ode": _entry(probability_flow),
        "ddim": _entry(DDIM),
        "dpm_solver": _entry(DPMSolver),
        "unipc": _entry(UniPC),
        "heun": _entry(HeunEDM),
        "deis": _entry(DEIS),
        "adaptive_sde": _entry(AdaptiveSDE),
        "seeds": _entry(SEEDS),
        "torchsde": _entry(TorchSDE),
        # what the field calls them
        "ddpm": _entry(ancestral, variance="posterior", denoise=True),
        "euler": _entry(DDIM, eta=0.0),
        "euler_ancestral": _entry(DDIM, eta=1.0),
        "dpmpp_2m": _entry(DPMSolver, order=2, stochastic=False),
        "dpmpp_2m_sde": _entry(DPMSolver, order=2, stochastic=True),
        "dpmpp_3m_sde": _entry(DPMSolver, order=3, stochastic=True),
    },
    parts={
        "grid": TIME_GRIDS,
        "predictor": PREDICTORS,
        "corrector": CORRECTORS,
        "corrections": CORRECTIONS,
        "solver": SOLVERS,
        "torchsde.solver": None,  # a plain word: torchsde's solvers are its own
        "flow": FLOWS,
    },
    needs={"torchsde": "torchsde"},
)
available, options, create = SAMPLERS.available, SAMPLERS.options, SAMPLERS.create
