r"""Bits per dimension, with every constant visible.

Let x = low + (high - low) v / levels be the transform from level units v to model units x (`data.transforms`), and
v = k + u a dequantised image. Then, in nats for an image of D values,

    (1)  log p(v) = log p(x) + D log|dx/dv|,        log|dx/dv| = log((high - low) / levels)
    (2)  bits/dim = -log p(v) / (D log 2)

for uniform u; `likelihood.dequantization` has the general case. For data in [-1, 1] with 256 levels log|dx/dv| is
-7 log 2: the "7" of the score_sde code. A density that is uniform over the data's range gives exactly log2(levels).

The error of a set's mean, over n images with m draws of the noise each and K independent trace estimates a draw:

    total             standard deviation over images / sqrt(n), in which all three parts are contained
    probe             from the spread over the K estimates of a draw
    dequantisation    from the spread over the m draws of an image, less what the probes explain of it
    data              the total less the spread over draws, in quadrature: what other images would change

A part that would need two draws, or two estimates, where there is one cannot be known and is NaN. The solver's error is a
bias, not a spread; it stands beside them.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.transforms import Transform
from likelihood.dequantization import Dequantizer, Uniform
from likelihood.divergence import Divergence, Hutchinson
from likelihood.integration import Prior
from likelihood.probability_flow import log_likelihood
from numerics import Generator, SampleStreams, Solver, Status, UserError
from sde_lib import SDE, CountedScore, Flow, Score, TimeGrid


@dataclass(frozen=True, kw_only=True)
class BitsPerDim:
    """Negative log-probabilities of images in bits per dimension, and their errors.

    Attributes:
        estimates: `(B, m, K)` bits/dim, for every image, draw of the noise and independent trace estimate; NaN where
            the integration failed.
        solver_error: `(B,)` bits/dim, the solver's own estimate, the mean over draws; NaN where there is none.
        exact: is the trace exact (then the probe's part is 0)?
        noisy: was noise drawn (else there is no dequantisation, and its part is 0)?
        dimensions: D, of an image.
        nfe, nbe: forward evaluations and vector-Jacobian products, by calls, of one draw of one batch (the most).
        companion_nfe: forward evaluations that the companion solutions took besides, for the solver's error.
        status: `(B,)`, the worst of an image's draws, see `numerics.Status`.
        failed_at: `(B,)`, the time at which its integration stopped; NaN where it did not fail.
    """

    estimates: Tensor
    solver_error: Tensor
    exact: bool
    noisy: bool
    dimensions: int
    nfe: int
    nbe: int
    companion_nfe: int
    status: Tensor
    failed_at: Tensor

    @property
    def converged(self) -> Tensor:
        """`(B,)`: all draws of the image arrived, and their values are finite."""
        return (self.status == int(Status.DONE)) & self.estimates.isfinite().all(dim=2).all(dim=1)

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
        """What of `stderr` is due to the choice of images: the total less the spread over an image's draws."""
        rest = self.stderr**2 - self._noise_variance  # NaN where that is
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
        """What of it is due to the dequantisation noise; 0 without noise, NaN with one draw, or one random estimate a draw.

        A single estimate's error cannot be told from the noise of its draw.
        """
        if not self.noisy:
            return 0.0
        between = self._noise_variance - self.probe_stderr**2
        return math.sqrt(max(between, 0.0)) if between == between else math.nan

    @property
    def _noise_variance(self) -> float:
        """The variance of `mean` that repeating noise and probes on the same images would show; NaN where it is unknown."""
        n, m, _ = self._good.shape
        if not self.noisy and (self.exact or m < 2):
            return self.probe_stderr**2
        if m < 2 or n < 1:
            return math.nan
        return float(self._good.mean(dim=2).var(dim=1).sum() / m / n**2)

    def importance_weighted(self, K: int | None = None) -> Tensor:
        """The K-sample bound, `(B,)` bits/dim, from groups of K draws of the noise (all of them unless given).

        -log (1/K) sum over a group of p(v_k), v_k the image with its k-th noise (for other than uniform noise p/q), which
        is at least -log P(image) on average and falls to it as K grows (Burda et al. 2016, arXiv:1509.00519, theorem 1);
        the mean over the groups where there are several. Values far below the one-draw mean from few draws have a heavy tail.

        The trace has to be exact, or its error small: an error e of log p in nats raises the mean of exp(log p) by
        about var(e)/2, which is no longer a bound. The trace estimates of a draw are averaged before.

        Raises:
            UserError: for more draws than there are.
        """
        m = self.estimates.shape[1]
        K = m if K is None else K
        if not 1 <= K <= m:
            raise UserError(f"got K={K}; expected 1 to {m}, the draws: score with more draws")
        nats = self.estimates.mean(dim=2)[:, : m // K * K] * -(self.dimensions * math.log(2))
        groups = nats.reshape(len(nats), m // K, K).logsumexp(dim=2) - math.log(K)
        return groups.mean(dim=1) / -(self.dimensions * math.log(2))

    @property
    def mean_solver_error(self) -> float:
        """The mean of the solver's error estimates over the images that have one; NaN where none has."""
        known = self.solver_error[self.converged & self.solver_error.isfinite()]
        return float(known.mean()) if len(known) else math.nan

    def __str__(self) -> str:
        def number(value: float) -> str:
            return "unknown" if value != value else f"{value:.3f}" if value >= 5e-4 or value == 0 else "< 0.001"

        solver = self.mean_solver_error
        text = (
            f"{self.mean:.3f} ± {number(self.stderr)} bits/dim (probe {number(self.probe_stderr)}, "
            f"dequantisation {number(self.dequantization_stderr)}, data {number(self.data_stderr)}; "
            f"solver {number(solver)}; {len(self._good):,} images; {self.nfe:,}+{self.nbe:,} evaluations)"
        )
        if solver > max(0.01, self.stderr):
            text += "; the solver's error is the largest: take more steps, or a smaller tolerance"
        return text + "".join(f"; {line}" for line in self.failures)

    @property
    def failures(self) -> list[str]:
        """A line for each way in which images failed: how many, why, and from which time on."""
        lines = []
        for status in Status:
            if status == Status.DONE:
                continue
            times = self.failed_at[self.status == int(status)]
            if len(times):
                lines.append(f"{len(times)} images failed at t = {_range(times)} and are left out ({status.explain()})")
        rest = int((~self.converged & (self.status == int(Status.DONE))).sum())
        return lines + ([f"{rest} images have values that are not finite and are left out"] if rest else [])

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
            "failures": self.failures,
            "draws": self.estimates.shape[1],
            "trace_estimates": self.estimates.shape[2],
            "nfe": self.nfe,
            "nbe": self.nbe,
            "companion_nfe": self.companion_nfe,
        }

    @classmethod
    def concatenate(cls, parts: list[BitsPerDim]) -> BitsPerDim:
        """One result from those of consecutive batches."""
        return cls(
            estimates=torch.cat([p.estimates for p in parts]),
            solver_error=torch.cat([p.solver_error for p in parts]),
            exact=all(p.exact for p in parts),
            noisy=any(p.noisy for p in parts),
            dimensions=parts[0].dimensions,
            nfe=max(p.nfe for p in parts),
            nbe=max(p.nbe for p in parts),
            companion_nfe=sum(p.companion_nfe for p in parts),
            status=torch.cat([p.status for p in parts]),
            failed_at=torch.cat([p.failed_at for p in parts]),
        )


def _range(times: Tensor) -> str:
    low, high = (f"{float(t):.3g}" for t in (times.min(), times.max()))
    return low if low == high else f"{low} to {high}"


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
    prior: Prior | None = None,
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
        divergence, solver, flow, grid, t_min, prior: as in `log_likelihood`.
        companions: with a solver of fixed steps, so many images of the batch get the solver's error from a companion
            solution of more steps (`companion_error`), and the others NaN; 0 for none. They cost about 2.5 draws of
            so many images.

    Raises:
        UserError: for images of another type or range than the transform's levels.
    """
    if not isinstance(draws, int) or draws < 1:
        raise UserError(f"got draws={draws!r}; expected an integer >= 1")
    check_levels(images, transform)
    dequantizer = Uniform() if dequantizer is None else dequantizer
    t_min = sde.t_min if t_min is None else t_min
    D = images[0].numel()
    estimates, errors, statuses, failed = [], [], [], []
    nfe = nbe = companion_nfe = 0
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
            prior=prior,
            generator=generator,
        )
        if first is None:
            first = x
        estimates.append(in_bits(-(found.estimates + cost.unsqueeze(1)), D))
        errors.append(in_bits(found.solver_error, D))
        statuses.append(found.status)
        failed.append(found.failed_at)
        nfe, nbe = max(nfe, found.nfe), max(nbe, found.nbe)
    solver_error = torch.stack(errors, dim=1).mean(dim=1)
    if solver is not None and not solver.adaptive and companions and first is not None:
        # the embedded estimate of a fixed grid would be drowned by fresh probes
        counted = CountedScore(score)
        found_error = companion_error(
            sde, counted, first[:companions], solver, flow=flow, grid=grid, t_min=t_min, prior=prior
        )
        companion_nfe = counted.nfe
        solver_error = torch.full_like(solver_error, math.nan)
        solver_error[:companions] = in_bits(found_error, D)
    return BitsPerDim(
        estimates=torch.stack(estimates, dim=1),
        solver_error=solver_error,
        exact=bool(divergence is not None and divergence.exact),
        noisy=transform.levels is not None,
        dimensions=D,
        nfe=nfe,
        nbe=nbe,
        companion_nfe=companion_nfe,
        status=torch.stack(statuses, dim=1).amax(dim=1),
        failed_at=torch.stack(failed, dim=1).nan_to_num(math.inf).amin(dim=1).nan_to_num(posinf=math.nan),
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
    prior: Prior | None = None,
) -> Tensor:
    """The error of a solver of fixed steps, `(B,)` nats, from a companion solution of half as many steps again.

    Both with one and the same probe along the whole path, so that nothing but the steps differs, and doubled: for a method
    of second order the difference is (1 - 1.5^-2) = 0.56 of the error, and no more than that order is to be believed of
    grids that are coarse for a rough network. (Coarser companions say how bad *they* are: at a quarter of the steps a
    trained network's flow is far from where errors fall regularly, and the error was overstated 10 to 25 times.)
    """
    steps: int = solver.steps  # type: ignore[attr-defined]
    one, other = (
        log_likelihood(
            sde,
            score,
            x,
            divergence=Hutchinson(fresh=False),
            solver=each,
            flow=flow,
            grid=grid,
            t_min=t_min,
            prior=prior,
            generator=SampleStreams(0),
        ).log_prob
        for each in (solver, replace(solver, steps=steps + max(1, steps // 2)))  # type: ignore[type-var]
    )
    return 2 * (one - other).abs()


def in_bits(nats: Tensor, dimensions: int) -> Tensor:
    """Nats per sample as bits per dimension."""
    return nats / (dimensions * math.log(2))


def check_levels(images: Tensor, transform: Transform) -> None:
    """Refuses images that are not grey values 0 ... levels - 1 (or, without levels, not floating); names the bad ones.

    Warns where no image comes near the highest level: with 256 levels for data of 17 every number would be off.
    """
    levels = transform.levels
    if images.ndim < 2 or images.shape[0] < 1:
        raise UserError(f"got images of shape {tuple(images.shape)}; expected a batch (B, *) of one or more")
    if levels is None:
        if not images.is_floating_point():
            raise UserError(f"got data of type {images.dtype} for a transform without levels; expected real numbers")
        return
    if images.is_floating_point() or images.dtype == torch.bool:
        raise UserError(
            f"got images of type {images.dtype}; expected integers 0 ... {levels - 1}: "
            "pass the grey values, the dequantisation is done here"
        )
    flat = images.flatten(1)
    # as int64: 256 is no uint8
    lowest, highest = flat.amin(dim=1).long(), flat.amax(dim=1).long()
    bad = ((lowest < 0) | (highest >= levels)).nonzero().squeeze(1).tolist()
    if bad:
        raise UserError(
            f"got grey values from {int(lowest.min())} to {int(highest.max())}, outside the range in {len(bad)} images (the "
            f"first: {', '.join(map(str, bad[:5]))}); expected 0 ... {levels - 1}: remove them, or give the transform "
            "the data's number of levels"
        )
    if int(highest.max()) + 1 <= levels // 2:
        warnings.warn(
            f"got grey values of at most {int(highest.max())} for a transform of {levels} levels; if the data have fewer "
            "levels, give the transform their number: bits/dim depend on it",
            stacklevel=3,
        )
