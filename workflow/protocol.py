"""How a split is scored: everything that the numbers depend on, besides the model and the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from data.transforms import Transform
from likelihood import Coloured, Dequantizer, Divergence, Exact, Hutchinson, Method, TruncatedNormal, accurate
from likelihood import create as create_part
from likelihood.methods import fast_on
from numerics import SciPy, TorchDiffEq, UserError, require_choice, require_count, require_positive
from sde_lib import SDE, TimeGrid, WhitenedFlow

FEW_DIMENSIONS = 16
"""Up to so many the exact trace is the default, which costs about what two random probes cost, and fewer steps are enough: on
the swiss roll (10,000 points, an MLP, VP) 32 steps erred by 5e-5 bits/dim on average, 4.6e-4 at most."""

SOLVERS = ("fast", "accurate", "scipy", "torchdiffeq")
DEQUANTIZERS = ("uniform", "truncated_normal")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How bits/dim are computed.

    Args:
        split: split of the data set.
        solver: fast (`likelihood.fast`: a grid placed by a pilot run on training data), accurate (adaptive, each sample with
            its own steps, at `tolerance`), scipy (RK45) or torchdiffeq (dopri5) at `tolerance`, whose values depend on the
            chunk.
        steps: steps of the fast solver; None for 32 in at most 16 dimensions, where a network is smooth, and 128 in more.
        tolerance: relative and absolute tolerance of the other solvers.
        probes: estimates of the trace for each draw of the noise; 0 for the exact trace, None for the exact trace in at most
            16 dimensions and 2 estimates in more.
        spacing: spacing k of coloured probes on pixel lattices, which take k^2 products an estimate; 0 for independent probes.
        dequantizer: uniform noise in a grey value's bin, or truncated_normal noise, at the time at which the noise is a quarter
            of a grey level.
        draws: how often each image gets new dequantisation noise.
        batch_size: samples in a chunk; None for some 6,400 numbers, but 50 to 2,000 samples.
        limit: score only the first so many samples; 0 for all.
        seed: seed of noise and probes.
        t_min: the time of the density; None for the SDE's, or what the dequantiser needs.
        label: class label for a class-conditional model: own (each sample its own class), a number (all samples that class)
            or none.
    """

    split: str = "test"
    solver: str = "fast"
    steps: int | None = None
    tolerance: float = 1e-5
    probes: int | None = None
    spacing: int = 0
    dequantizer: str = "uniform"
    draws: int = 2
    batch_size: int | None = None
    limit: int = 0
    seed: int = 0
    t_min: float | None = None
    label: str = "none"

    def __post_init__(self) -> None:
        require_choice(self.solver, "solver", SOLVERS)
        require_choice(self.dequantizer, "dequantizer", DEQUANTIZERS)
        for name, least in (("spacing", 0), ("draws", 1), ("limit", 0), ("seed", 0)):
            require_count(getattr(self, name), name, least)
        for name, least in (("steps", 1), ("probes", 0), ("batch_size", 1)):
            if getattr(self, name) is not None:
                require_count(getattr(self, name), name, least)
        require_positive(self.tolerance, "tolerance")
        if self.t_min is not None:
            require_positive(self.t_min, "t_min")
        text = str(self.label).lower()
        if text not in ("own", "none") and not text.isdecimal():
            raise UserError(f"got label={self.label!r}; expected own, none, or the number of a class")
        object.__setattr__(self, "label", text)

    def for_samples(self, dim: int, levels: int | None) -> Protocol:
        """With what was left open decided, for samples of `dim` numbers; data without grey levels get no noise."""
        few = dim <= FEW_DIMENSIONS
        decided = replace(
            self,
            steps=(32 if few else 128) if self.steps is None else self.steps,
            probes=(0 if few else 2) if self.probes is None else self.probes,
            batch_size=min(2000, max(50, 6400 // dim)) if self.batch_size is None else self.batch_size,
        )
        return decided if levels is not None else replace(decided, draws=1, dequantizer="uniform")

    @property
    def divergence(self) -> Divergence:
        """How the trace is got."""
        if self.probes == 0:
            return Exact()
        probes = 2 if self.probes is None else self.probes
        return Coloured(spacing=self.spacing, sets=probes) if self.spacing else Hutchinson(probes=probes)

    def noise(self, transform: Transform) -> Dequantizer:
        """The dequantiser; one that adds nothing for data without grey levels."""
        made = create_part("none" if transform.levels is None else self.dequantizer)
        assert isinstance(made, Dequantizer)
        return made

    def time(self, sde: SDE, transform: Transform) -> float:
        """t_min, the time of the density."""
        if self.t_min is not None:
            if self.t_min >= sde.T:
                raise UserError(f"got t_min={self.t_min}; expected a time in (0, {sde.T}), the SDE's T")
            return self.t_min
        return TruncatedNormal.t_min(sde, transform) if self.dequantizer == "truncated_normal" else sde.t_min

    def method(self, *, data_std: float, t_min: float, grid: TimeGrid | None = None) -> Method:
        """How the flow is integrated.

        Args:
            data_std: standard deviation of the data in model units.
            t_min: from `time`.
            grid: of the fast solver's steps, from a pilot run.
        """
        if self.solver == "fast":
            return fast_on(grid, steps=self.steps or 128, data_std=data_std, t_min=t_min)
        if self.solver == "accurate":
            return accurate(tolerance=self.tolerance, data_std=data_std, t_min=t_min)
        solver = SciPy("RK45", self.tolerance) if self.solver == "scipy" else TorchDiffEq("dopri5", self.tolerance)
        return Method(solver, flow=WhitenedFlow(data_std=data_std), t_min=t_min)
