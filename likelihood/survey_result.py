"""What a survey found, and what is to be said of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from likelihood.regression_estimate import RegressionEstimate
from likelihood.step_correction import FAR
from likelihood.student_error import stated_error
from likelihood.survey_budget import REPEATS, SHARE
from likelihood.survey_design import Design


def _named(images: Tensor) -> str:
    """The first few images by number."""
    return ", ".join(str(int(i)) for i in images[:10]) + (", ..." if len(images) > 10 else "")


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a survey found.

    Attributes:
        estimate: the mean of values as they were made and its two errors, the correction apart.
        design: what the pilot had found.
        scored: the images with exact values, `(n,)`, rising.
        exact: their values `(n,)` bits/dim, as they were made, with half the steps where the design says so; NaN where one
            failed.
        solver_error: `(n,)` bits/dim, as stated.
        suspect: `(N,)`, the images scored in any case.
        refined: `(k,)`, the scored images that were solved again with more steps, because theirs were far too few.
        passes: network passes in all, the pilot's included: forward 1, vector-Jacobian product 2.
    """

    estimate: RegressionEstimate
    design: Design
    scored: Tensor
    exact: Tensor
    solver_error: Tensor
    suspect: Tensor
    refined: Tensor
    passes: int

    @property
    def mean(self) -> float:
        """Bits/dim of the set."""
        return self.estimate.mean + self.design.correction.mean

    @property
    def stderr(self) -> float:
        """The standard error of `mean`, the choice of the set's images included; the solver's bias is `solver`."""
        return math.hypot(self.estimate.total, self.design.correction.stderr)

    @property
    def _hidden(self) -> float:
        """By how much the sampling error is larger than residuals say, of which the pilot's have chosen the predictors."""
        random = int((~self.suspect[self.scored]).sum())
        share = min(1.0, self.design.pilot / max(1, random))
        return math.sqrt(1 + share * (self.design.curse**2 - 1))

    @property
    def estimate_stderr(self) -> float:
        """The standard error of `mean` as the mean of this set; NaN where no value was made twice.

        Two of it cover 95 %, however few repetitions the noise is known from (`likelihood.student_error`). It is never above
        `stderr`, of which it is a part. (Where the noise is three times the images' spread, and two of 20 images are repeated,
        two of that smaller one cover 92 %.)
        """
        e, d = self.estimate, self.design
        parts = [
            ((self._hidden * e.skewed * e.sampling_stderr) ** 2, e.degrees),
            (e.noise_stderr**2, d.degrees),
            d.correction.variance,
        ]
        return min(stated_error(parts), self.stderr)  # the first of them where the other is not known

    @property
    def solver(self) -> float:
        """Bits/dim, the solver's error as stated: a bias, which no sample makes smaller. NaN where it is not known.

        What twice the method's steps still changed, by which the mean has been corrected; else what the solver states, or what
        twice the steps changed on four images.
        """
        known = self.solver_error[self.solver_error.isfinite()]
        if self.design.correction.images or not len(known):
            return self.design.correction.left
        return float(known.mean())

    @property
    def failed(self) -> Tensor:
        """`(k,)`: the scored images that have no value."""
        return self.scored[self.exact.isnan()]

    @property
    def _failing(self) -> float:
        """The share of the set that fails, from those scored: a suspect image stands for itself, another for more."""
        failed, suspect, N = self.exact.isnan(), self.suspect[self.scored], len(self.suspect)
        others = int((~suspect).sum())
        weight = int((~self.suspect).sum()) / others if others else 0.0
        return (int((failed & suspect).sum()) + weight * int((failed & ~suspect).sum())) / N

    @property
    def notes(self) -> list[str]:
        """What is to be said beside the numbers, a line each."""
        lines, e, d = [], self.estimate, self.design
        if self.solver > max(d.precision, self.estimate_stderr):
            lines.append("the solver's error is larger than the precision: take more steps, or a smaller tolerance")
        if self.solver != self.solver:
            lines.append(
                "the solver's error is not known, and so few images have no room to find it out: let a tolerance choose the "
                "steps, or score them without a precision"
            )
        if d.everything:
            lines.append(f"all images were scored: {d.why_all}")
        if self.estimate_stderr != self.estimate_stderr:
            lines.append(
                f"asked for ± {d.precision:g}: no value was made twice, so that the error as this set's mean is unknown: take "
                "two draws of the noise, or of points the exact trace"
            )
        if d.at_once and 0 < d.degrees < REPEATS:
            times = "1 repetition" if d.degrees == 1 else f"{d.degrees} repetitions"
            lines.append(f"the values' noise is known from {times}, and its error is wider for it")
        if not d.everything and not d.which and not d.free:
            lines.append("no predictions would make it cheaper: the mean is the sample's own")
        reached = f"{self.estimate_stderr:.2g}"
        missed = f"asked for ± {d.precision:g}, reached ± {reached}"
        if float(reached) > d.precision:  # as it is printed
            cause = (
                "twice the steps change images by too different amounts: take more steps"
                if d.correction.stderr > d.precision / 2
                else "the values' own noise: take more draws of it, or more probes"
                if d.everything
                else "the pilot's images were easier to predict than the sample's"
            )
            lines.append(f"{missed}: {cause}")
        far = FAR * d.precision
        kept = torch.isin(self.scored, self.refined) & (self.solver_error > far)
        if bool(kept.any()):
            named = _named(self.scored[kept])
            lines.append(
                f"{int(kept.sum())} of {len(self.refined)} images that were solved again with more steps ({named}) still err "
                f"by up to {float(self.solver_error[kept].max()):.2g} bits/dim: take more steps"
            )
        lost = d.correction.failed
        if lost:
            rest = "the mean is corrected by the others'" if d.correction.images else "the mean is not corrected"
            lines.append(
                f"{lost} of {d.correction.compared} images that were to show what more steps change failed: {rest}"
            )
        k = len(self.failed)
        if k:
            known = self.exact[~self.exact.isnan()]
            furthest = float((known - e.mean).abs().max()) if len(known) else math.nan
            share = self._failing
            lines.append(
                f"{k} of {len(self.scored):,} scored images failed ({_named(self.failed)}) and have no value; were such images "
                f"off by {furthest:.2g} bits/dim, the furthest value, the mean would move by {share * furthest:.2g}"
            )
        return lines

    def __str__(self) -> str:
        e, d = self.estimate, self.design
        r2 = "" if e.r2 != e.r2 else f", R2 {e.r2:.3f}"

        def known(value: float) -> str:
            return "unknown" if value != value else f"{value:.2g}"

        text = (
            f"{self.mean:.4f} ± {known(self.estimate_stderr)} bits/dim (this set's mean; with the choice of its images "
            f"± {known(self.stderr)}; solver {known(self.solver)}), from "
            f"{len(self.scored):,} of {d.size:,} images{r2}; {self.passes:,} network passes, {d.all_passes:,.0f} for all images"
        )
        return text + "".join(f"; {line}" for line in self.notes)

    def asdict(self) -> dict[str, object]:
        """Plain numbers for a results file."""
        e, c, failed = self.estimate, self.design.correction, len(self.failed)
        return {
            "mean": self.mean,
            "stderr": self.stderr,
            "data_stderr": e.images_stderr,
            "solver_error": self.solver,
            "images": len(self.scored) - failed,  # with a value, as wherever images are scored
            "not_converged": failed,
            "survey": {
                "images": self.design.size,
                "images_scored": len(self.scored) - failed,
                "images_failed": failed,
                "all_scored_because": self.design.why_all if self.design.everything else None,
                "estimate_stderr": self.estimate_stderr,
                "r2": e.r2,
                "evaluations": self.passes,
                "precision": self.design.precision,
                "predictors": list(self.design.which),
                "free_predictors": self.design.free,
                "residual": e.residual,
                "noise": self.design.noise,
                "noise_degrees": self.design.degrees,
                "correction": {
                    "half_the_steps": c.half,
                    "mean": c.mean,
                    "stderr": c.stderr,
                    "images": c.images,
                    "failed": c.failed,
                },
                "suspect": int(self.suspect.sum()),
                "solved_again": len(self.refined),
                "pilot_evaluations": self.design.spent,
                "evaluations_for_all": self.design.all_passes,
                "most_above_all": SHARE,
                "notes": self.notes,
            },
        }
