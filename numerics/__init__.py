"""Numerical tools that know nothing of scores: broadcasting, random streams, initial value problems."""

from numerics.broadcast import as_time, batch_time, expand_as, real_dtype, require_float64
from numerics.catalogue import Catalogue, Option, argument_help
from numerics.checks import nearest, require_box, require_choice, require_count, require_positive, require_range
from numerics.conjugate_gradients import conjugate_gradients, inner
from numerics.errors import UserError
from numerics.external import SciPy, TorchDiffEq
from numerics.hamiltonian import (
    Chain,
    Hamiltonian,
    LogDensity,
    Point,
    falls_outwards,
    largest_curvature,
    point,
    run_chain,
)
from numerics.labels import class_labels, labels_for, require_classes
from numerics.modes import ordinary, ordinary_mode
from numerics.multistep import Adams
from numerics.ode import RK4, Dopri5, Heun, RungeKutta, Solution, Solver, Status, take
from numerics.solvers import SOLVERS
from numerics.streams import Generator, SampleStreams, mix, normal, rademacher, uniform
from numerics.tempered_langevin import TemperedLangevin

__all__ = [
    "RK4",
    "SOLVERS",
    "Adams",
    "Catalogue",
    "Chain",
    "Option",
    "UserError",
    "nearest",
    "require_box",
    "require_choice",
    "require_classes",
    "require_count",
    "ordinary",
    "ordinary_mode",
    "require_float64",
    "require_positive",
    "require_range",
    "Dopri5",
    "Generator",
    "Hamiltonian",
    "Heun",
    "LogDensity",
    "Point",
    "RungeKutta",
    "SampleStreams",
    "SciPy",
    "Solution",
    "Solver",
    "Status",
    "TemperedLangevin",
    "TorchDiffEq",
    "argument_help",
    "as_time",
    "batch_time",
    "class_labels",
    "conjugate_gradients",
    "inner",
    "mix",
    "expand_as",
    "falls_outwards",
    "labels_for",
    "largest_curvature",
    "normal",
    "point",
    "rademacher",
    "real_dtype",
    "run_chain",
    "take",
    "uniform",
]
