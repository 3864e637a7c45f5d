"""How a split is scored: everything that the numbers depend on, besides the model and the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from data.transforms import Transform
from likelihood import Choice, Coloured, Dequantizer, Divergence, Exact, Hutchinson, Method, TruncatedNormal, accurate
from likelihood import create as create_part
from likelihood.steps import fast_on
from numerics import SciPy, TorchDiffEq, UserError, require_choice, require_count, require_positive
from sde_lib import SDE, TimeGrid, WhitenedFlow

FEW_DIMENSIONS = 16
"""Up to so many the exact trace is the default, which costs about what two random probes cost."""

SHARE_OF_PRECISION = 5
"""A survey's precision over the tolerance of its steps."""

USUAL, COARSEST = 1e-5, 1e-3
"""Of a solver that chooses its own steps: the tolerance unless told, and the largest one, which is no error in bits/dim."""

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
        steps: fixes the steps of the fast solver; None for the fewest that pilot runs on training data see to keep `tolerance`,
            with single samples whose own error is far above it solved again with more.
        tolerance: of the fast solver in bits/dim, the mean |error| of its steps, None for 0.001, in a survey for a fifth of
            the precision; not used with `steps`; of the other solvers relative and absolute, None for 1e-5.
        refine: where pilot runs choose the steps: solve single samples again whose own error is far above the tolerance? In a
            survey also those of which half the steps, or fixed ones, lose far more than of the others.
        probes: estimates of the trace for each draw of the noise; 0 for the exact trace, None for the exact trace in at most
            16 dimensions and 2 estimates in more, 1 in a survey.
        spacing: spacing k of coloured probes on pixel lattices, which take k^2 products an estimate; 0 for independent probes.
        dequantizer: uniform noise in a grey value's bin, or truncated_normal noise, at the time at which the noise is a quarter
            of a grey level.
        draws: how often each image gets new dequantisation noise; None for 2, and for 1 in a survey.
        batch_size: samples in a chunk; None for some 6,400 numbers, but 50 to 2,000 samples.
        limit: score only the first so many samples; 0 for all.
        seed: seed of noise and probes.
        t_min: the time of the density; None for the SDE's, or what the dequantiser needs.
        label: class label for a class-conditional model: own (each sample its own class), a number (all samples that class)
            or none.
        precision: standard error of the split's mean to reach, in bits/dim, by a survey that scores only as many images as that
            takes; None scores all.
    """

    split: str = "test"
    solver: str = "fast"
    steps: int | None = None
    tolerance: float | None = None
    refine: bool = True
    probes: int | None = None
    spacing: int = 0
    dequantizer: str = "uniform"
    draws: int | None = None
    batch_size: int | None = None
    limit: int = 0
    seed: int = 0
    t_min: float | None = None
    label: str = "none"
    precision: float | None = None

    def __post_init__(self) -> None:
        require_choice(self.solver, "solver", SOLVERS)
        require_choice(self.dequantizer, "dequantizer", DEQUANTIZERS)
        for name, least in (("spacing", 0), ("limit", 0), ("seed", 0)):
            require_count(getattr(self, name), name, least)
        for name, least in (("steps", 1), ("draws", 1), ("probes", 0), ("batch_size", 1)):
            if getattr(self, name) is not None:
                require_count(getattr(self, name), name, least)
        for name in ("tolerance", "t_min", "precision"):
            if getattr(self, name) is not None:
                require_positive(getattr(self, name), name)
        if self.solver != "fast" and self.tolerance is not None and self.tolerance > COARSEST:
            raise UserError(
                f"got tolerance={self.tolerance:g} with solver={self.solver!r}, whose tolerance is relative; expected at most "
                f"{COARSEST:g}, such as {USUAL:g}"
            )
        text = str(self.label).lower()
        if text not in ("own", "none") and not text.isdecimal():
            raise UserError(f"got label={self.label!r}; expected own, none, or the number of a class")
        object.__setattr__(self, "label", text)

    def for_samples(self, dim: int, levels: int | None) -> Protocol:
        """With what was left open decided, for samples of `dim` numbers; data without grey levels get no noise."""
        few = dim <= FEW_DIMENSIONS
        # what a survey has to spend is better spent on more images
        repeats = 2 if self.precision is None else 1
        usual = (1e-3 if self.precision is None else self._of_precision) if self.solver == "fast" else USUAL
        asked = usual if self.tolerance is None else self.tolerance
        decided = replace(
            self,
            tolerance=asked if self.solver != "fast" or self.chooses_steps else None,  # nothing would use it
            probes=(0 if few else repeats) if self.probes is None else self.probes,
            draws=repeats if self.draws is None else self.draws,
            batch_size=min(2000, max(50, 6400 // dim)) if self.batch_size is None else self.batch_size,
        )
        return decided if levels is not None else replace(decided, draws=1, dequantizer="uniform")

    @property
    def _of_precision(self) -> float | None:
        """The tolerance of a survey's steps unless told: a bias of so much makes the whole error 2 % larger."""
        return None if self.precision is None else self.precision / SHARE_OF_PRECISION

    @property
    def follows_precision(self) -> bool:
        """Are the steps chosen for what a survey's precision asks for, and for no other tolerance?"""
        return self.precision is not None and self.chooses_steps and self.tolerance in (None, self._of_precision)

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

    @property
    def chooses_steps(self) -> bool:
        """Are the steps chosen by pilot runs?"""
        return self.solver == "fast" and self.steps is None

    @property
    def described_solver(self) -> str:
        """The solver, as the parts' index states it."""
        if self.chooses_steps:
            return f"Adams(points=5, start='rising'), the steps for {self.tolerance} bits/dim in grid.json"
        return repr(self.method(data_std=1.0, t_min=1.0).solver)

    def method(
        self, *, data_std: float, t_min: float, grid: TimeGrid | None = None, choice: Choice | None = None
    ) -> Method:
        """How the flow is integrated.

        Args:
            data_std: standard deviation of the data in model units.
            t_min: from `time`.
            grid: of the fast solver's steps where their number is fixed, from a pilot run.
            choice: steps and grid where pilot runs have chosen both.
        """
        if choice is not None:
            return choice.method(data_std=data_std, t_min=t_min)
        if self.solver == "fast":
            if self.steps is None:
                raise UserError(
                    "got a protocol without steps, and no choice of them; expected what likelihood.choose_steps has found: "
                    "give choice=..., or steps"
                )
            return fast_on(grid, steps=self.steps, data_std=data_std, t_min=t_min)
        tolerance = USUAL if self.tolerance is None else self.tolerance
        if self.solver == "accurate":
            return accurate(tolerance=tolerance, data_std=data_std, t_min=t_min)
        solver = SciPy("RK45", tolerance) if self.solver == "scipy" else TorchDiffEq("dopri5", tolerance)
        return Method(solver, flow=WhitenedFlow(data_std=data_std), t_min=t_min)
