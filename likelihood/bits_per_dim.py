r"""Bits per dimension, with every constant visible.

Let x = low + (high - low) v / levels be the transform from level units v to model units x (`data.transforms`), and
v = k + u a dequantised image. Then, in nats for an image of D values,

    (1)  log p(v) = log p(x) + D log|dx/dv|,        log|dx/dv| = log((high - low) / levels)
    (2)  bits/dim = -log p(v) / (D log 2)

for uniform u; `likelihood.dequantization` has the general case. For data in [-1, 1] with 256 levels log|dx/dv| is
-7 log 2: the "7" of the score_sde code. A density that is uniform over the data's range gives exactly log2(levels).

The error of a set's mean, over n images with m draws of the noise each and K independent trace estimates a draw:

    data              standard deviation over images / sqrt(n): the *total*, in which the other two are contained
    dequantisation    from the spread over the m draws of an image, less what the probes explain of it
    probe             from the spread over the K estimates of a draw

With fewer than two draws, or two estimates, that part cannot be known and is NaN. The solver's error is a bias, not a
spread; it stands beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.transforms import Transform
from likelihood.dequantization import Dequantizer, Uniform
from likelihood.divergence import Divergence, Hutchinson
from likelihood.probability_flow import log_likelihood
from numerics import Generator, SampleStreams, Solver
from sde_lib import SDE, Flow, Score, TimeGrid


@dataclass(frozen=True, kw_only=True)
class BitsPerDim:
    """Negative log-probabilities of images in bits per dimension, and their errors.

    Attributes:
        estimates: `(B, m, K)` bits/dim, for every image, draw of the noise and independent trace estimate; NaN where
            the integration failed.
        solver_error: `(B,)` bits/dim, the solver's own estimate, the mean over draws; NaN where there is none.
        exact: is the trace exact (then the probe's part is 0)?
        nfe, nbe: forward evaluations and vector-Jacobian products, by calls, of one draw of one batch (the most).
        converged: `(B,)`: all draws of the image arrived.
    """

    estimates: Tensor
    solver_error: Tensor
    exact: bool
    nfe: int
    nbe: int
    converged: Tensor

    @property
    def per_image(self) -> Tensor:
        """`(B,)` bits/dim."""
        return self.estimates.mean(dim=(1, 2))

    @property
    def _good(self) -> Tensor:
        return self.estimates[self.converged]

    @property
    def mean(self) -> float:
        """The set's bits/dim: the mean over the images that converged."""
        return float(self._good.mean())

    @property
    def stderr(self) -> float:
        """The standard error of `mean`, everything included: the spread over images by sqrt(n). NaN for one image."""
        n = len(self._good)
        return float(self._good.mean(dim=(1, 2)).std() / math.sqrt(n)) if n > 1 else math.nan

    @property
    def data_stderr(self) -> float:
        """What of `stderr` is due to the choice of images: the total less the two other parts, in quadrature."""
        rest = self.stderr**2 - sum(v**2 for v in (self.probe_stderr, self.dequantization_stderr) if v == v)
        return math.sqrt(rest) if rest >= 0 else math.nan  # below 0 where too few images give no estimate of it

    @property
    def probe_stderr(self) -> float:
        """What of it is due to the trace's probes; 0 for an exact trace, NaN with one estimate."""
        n, m, K = self._good.shape
        if self.exact:
            return 0.0
        if K < 2 or n < 1:
            return math.nan
        return float((self._good.var(dim=2) / K).mean(dim=1).div(m).sum().sqrt() / n)

    @property
    def dequantization_stderr(self) -> float:
        """What of it is due to the dequantisation noise; NaN with one draw."""
        n, m, K = self._good.shape
        if m < 2 or n < 1:
            return math.nan
        between = self._good.mean(dim=2).var(dim=1) / m
        if not self.exact and K > 1:
            between = between - (self._good.var(dim=2) / K).mean(dim=1) / m
        return float(between.sum().clamp(min=0).sqrt() / n)

    def importance_weighted(self, dimensions: int, K: int | None = None) -> Tensor:
        """The K-sample bound, `(B,)` bits/dim, from groups of K draws of the noise (all of them unless given).

        -log (1/K) sum over a group of p(v_k), v_k the image with its k-th noise (for other than uniform noise p/q), which
        is at least -log P(image) on average and falls to it as K grows (Burda et al. 2016, arXiv:1509.00519, theorem 1);
        the mean over the groups where there are several. Values far below the one-draw mean from few draws have a heavy tail.

        The trace has to be exact, or its error small: an error e of log p in nats raises the mean of exp(log p) by
        about var(e)/2, which is no longer a bound. The trace estimates of a draw are averaged before.

        Args:
            dimensions: D, of an image.

        Raises:
            ValueError: for more draws than there are.
        """
        m = self.estimates.shape[1]
        K = m if K is None else K
        if not 1 <= K <= m:
            raise ValueError(f"got K={K}; expected 1 to {m}, the draws: score with more draws")
        nats = self.estimates.mean(dim=2)[:, : m // K * K] * -(dimensions * math.log(2))
        groups = nats.reshape(len(nats), m // K, K).logsumexp(dim=2) - math.log(K)
        return groups.mean(dim=1) / -(dimensions * math.log(2))

    @property
    def mean_solver_error(self) -> float:
        """The mean of the solver's error estimates over the images that have one; NaN where none has."""
        known = self.solver_error[self.converged & self.solver_error.isfinite()]
        return float(known.mean()) if len(known) else math.nan

    def __str__(self) -> str:
        def number(value: float) -> str:
            return "unknown" if value != value else f"{value:.3f}" if value >= 5e-4 or value == 0 else "< 0.001"

        solver = self.mean_solver_error
        lost = int((~self.converged).sum())
        text = (
            f"{self.mean:.3f} ± {number(self.stderr)} bits/dim (probe {number(self.probe_stderr)}, "
            f"dequantisation {number(self.dequantization_stderr)}, data {number(self.data_stderr)}; "
            f"solver {number(solver)}; {len(self._good):,} images; {self.nfe:,}+{self.nbe:,} evaluations)"
        )
        return text + (f"; {lost} images did not converge and are left out" if lost else "")

    def asdict(self) -> dict[str, object]:
        """Plain numbers for a results file."""
        return {
            "mean": self.mean,
            "stderr": self.stderr,
            "probe_stderr": self.probe_stderr,
            "dequantization_stderr": self.dequantization_stderr,
            "data_stderr": self.data_stderr,
            "solver_error": self.mean_solver_error,
            "images": int(self.converged.sum()),
            "not_converged": int((~self.converged).sum()),
            "draws": self.estimates.shape[1],
            "trace_estimates": self.estimates.shape[2],
            "nfe": self.nfe,
            "nbe": self.nbe,
        }

    @classmethod
    def concatenate(cls, parts: list[BitsPerDim]) -> BitsPerDim:
        """One result from those of consecutive batches."""
        return cls(
            estimates=torch.cat([p.estimates for p in parts]),
            solver_error=torch.cat([p.solver_error for p in parts]),
            exact=all(p.exact for p in parts),
            nfe=max(p.nfe for p in parts),
            nbe=max(p.nbe for p in parts),
            converged=torch.cat([p.converged for p in parts]),
        )


def bits_per_dim(
    sde: SDE,
    score: Score,
    images: Tensor,
    transform: Transform,
    *,
    dequantizer: Dequantizer | None = None,
    draws: int = 1,
    divergence: Divergence | None = None,
    solver: Solver | None = None,
    flow: Flow | None = None,
    grid: TimeGrid | None = None,
    companions: int = 16,
    t_min: float | None = None,
    generator: Generator = None,
    dtype: torch.dtype = torch.float32,
) -> BitsPerDim:
    """Bits/dim of a batch by uniform dequantisation and the probability flow, (1) and (2).

    Args:
        images: grey values 0 ... levels - 1, `(B, *)`, of an integer type; or, with a transform that has no levels,
            real data `(B, *)`, whose -log2-densities per dimension are returned and to which no noise is added.
        transform: from level units to model units.
        dequantizer: `Uniform()` unless given.
        draws: m, how many draws of the noise each image gets; with two or more their share of the error is known.
        generator: for noise and probes; `SampleStreams(seed, ids)` makes an image's value its own.
        dtype: of the state that the score is given.
        divergence, solver, flow, grid, t_min: as in `log_likelihood`.
        companions: with a solver of fixed steps, so many images of the batch get the solver's error from a companion
            solutions of fewer steps (`companion_error`), and the others NaN; 0 for none.

    Raises:
        ValueError: for images of another type or range than the transform's levels.
    """
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"got draws={draws!r}; expected an integer >= 1")
    check_levels(images, transform)
    dequantizer = Uniform() if dequantizer is None else dequantizer
    t_min = sde.t_min if t_min is None else t_min
    D = images[0].numel()
    estimates, errors, converged = [], [], []
    nfe = nbe = 0
    first: Tensor | None = None
    for _ in range(draws):
        if transform.levels is None:
            x, cost = (
                transform(images.to(dtype)),
                torch.full((len(images),), D * transform.log_det, dtype=torch.float64),
            )
            cost = cost.to(images.device)
        else:
            x, cost = dequantizer(images, transform, sde, t_min, generator=generator, dtype=dtype)
        found = log_likelihood(
            sde,
            score,
            x,
            divergence=divergence,
            solver=solver,
            flow=flow,
            grid=grid,
            t_min=t_min,
            generator=generator,
        )
        if first is None:
            first = x
        estimates.append(in_bits(-(found.estimates + cost.unsqueeze(1)), D))
        errors.append(in_bits(found.solver_error, D))
        converged.append(found.converged)
        nfe, nbe = max(nfe, found.nfe), max(nbe, found.nbe)
    solver_error = torch.stack(errors, dim=1).mean(dim=1)
    if solver is not None and not solver.adaptive and companions and first is not None:
        # the embedded estimate of a fixed grid would be drowned by fresh probes
        found_error = companion_error(sde, score, first[:companions], solver, flow=flow, grid=grid, t_min=t_min)
        solver_error = torch.full_like(solver_error, math.nan)
        solver_error[:companions] = in_bits(found_error, D)
    return BitsPerDim(
        estimates=torch.stack(estimates, dim=1),
        solver_error=solver_error,
        exact=bool(divergence is not None and divergence.exact),
        nfe=nfe,
        nbe=nbe,
        converged=torch.stack(converged, dim=1).all(dim=1),
    )


def companion_error(
    sde: SDE,
    score: Score,
    x: Tensor,
    solver: Solver,
    *,
    flow: Flow | None = None,
    grid: TimeGrid | None = None,
    t_min: float | None = None,
) -> Tensor:
    """The error of a solver of fixed steps, `(B,)` nats, by companion solutions of a half and a quarter of its steps.

    All with one and the same probe along the whole path, so that nothing but the steps differs. With d_1 = |full - half|
    and d_2 = |half - quarter|, the errors fall by r = mean d_2 / mean d_1 when the steps double, and Richardson's estimate
    is d_1 / (r - 1). r is taken between 2 and 4: on coarse grids no more than second order is to be believed.
    """
    steps: int = solver.steps  # type: ignore[attr-defined]
    if steps < 4:  # there is nothing coarser to compare with
        return torch.full((x.shape[0],), math.nan, dtype=torch.float64, device=x.device)
    values = [
        log_likelihood(
            sde,
            score,
            x,
            divergence=Hutchinson(fresh=False),
            solver=one,
            flow=flow,
            grid=grid,
            t_min=t_min,
            generator=SampleStreams(0),
        ).log_prob
        for one in (replace(solver, steps=max(1, steps // part)) for part in (1, 2, 4))  # type: ignore[type-var]
    ]
    fine, coarse = (values[0] - values[1]).abs(), (values[1] - values[2]).abs()
    known = fine.isfinite() & coarse.isfinite()
    ratio = float(coarse[known].sum() / fine[known].sum()) if bool(known.any()) else math.nan
    return fine / (min(max(ratio, 2.0), 4.0) - 1 if ratio == ratio else 1.0)


def in_bits(nats: Tensor, dimensions: int) -> Tensor:
    """Nats per sample as bits per dimension."""
    return nats / (dimensions * math.log(2))


def check_levels(images: Tensor, transform: Transform) -> None:
    """Refuses images that are not grey values 0 ... levels - 1 (or, without levels, not floating)."""
    levels = transform.levels
    if levels is None:
        if not images.is_floating_point():
            raise ValueError(f"got data of type {images.dtype} for a transform without levels; expected real numbers")
        return
    if images.is_floating_point() or images.dtype == torch.bool:
        raise ValueError(
            f"got images of type {images.dtype}; expected integers 0 ... {levels - 1}: "
            "pass the grey values, the dequantisation is done here"
        )
    low, high = int(images.min()), int(images.max())
    if low < 0 or high >= levels:
        raise ValueError(
            f"got grey values from {low} to {high}; expected 0 ... {levels - 1}: "
            f"give the transform the data's number of levels"
        )
