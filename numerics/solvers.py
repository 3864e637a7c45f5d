"""The solvers by name: what a command line or a configuration calls them."""

from __future__ import annotations

from numerics.catalogue import Catalogue
from numerics.external import SciPy, TorchDiffEq
from numerics.multistep import Adams
from numerics.ode import RK4, Dopri5, Heun, Solver

SOLVERS: Catalogue[Solver] = Catalogue(
    "solver",
    {"dopri5": Dopri5, "heun": Heun, "rk4": RK4, "adams": Adams, "torchdiffeq": TorchDiffEq, "scipy": SciPy},
    needs={"torchdiffeq": "torchdiffeq", "scipy": "scipy"},
    derived=("parameters",),  # tensors that gradients are wanted for
)
