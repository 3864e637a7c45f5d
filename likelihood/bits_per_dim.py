r"""Bits per dimension, with every constant visible.

Let x = low + (high - low) v / levels be the transform from level units v to model units x (`data.transforms`), and
v = k + u a dequantised image. Then, in nats for an image of D values,

    (1)  log p(v) = log p(x) + D log|dx/dv|,        log|dx/dv| = log((high - low) / levels)
    (2)  bits/dim = -log p(v) / (D log 2)

for uniform u; `likelihood.dequantization` has the general case. For data in [-1, 1] with 256 levels log|dx/dv| is
-7 log 2: the "7" of the score_sde code. A density that is uniform over the data's range gives exactly log2(levels).

`likelihood.error_budget` says what the error of a set's mean is made of.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.transforms import Transform
from likelihood.companion import companion_error
from likelihood.dequantization import Dequantizer, default_dequantizer
from likelihood.divergence import Divergence
from likelihood.error_budget import ErrorBudget
from likelihood.integration import Prior
from likelihood.method import Method
from likelihood.probability_flow import log_likelihood
from numerics import Generator, SampleStreams, Status, UserError, require_count, take
from sde_lib import SDE, CountedScore, Score, prior_mismatch
from sde_lib.terminal import VISIBLE


@dataclass(frozen=True, kw_only=True)
class BitsPerDim:
    """Negative log-probabilities of images in bits per dimension, and their errors.

    Attributes:
        estimates: `(B, m, K)` bits/dim, for every image, draw of the noise and independent trace estimate; NaN where
            the integration failed.
        solver_error: `(B,)` bits/dim, the solver's own estimate, the mean over draws; NaN where there is none.
        companion_error: `(B,)` bits/dim, from a companion solution of more steps (`likelihood.companion_error`); NaN where none
            was made.
        exact: is the trace exact (then the probe's part is 0)?
        noisy: was noise drawn (else there is no dequantisation, and its part is 0)?
        dimensions: D, of an image.
        nfe, nbe: forward evaluations and vector-Jacobian products, by calls, of one draw of one batch (the most).
        companion_nfe: forward evaluations that the companion solutions took besides, for the solver's error.
        status: `(B,)`, the worst of an image's draws, see `numerics.Status`.
        failed_at: `(B,)`, the time at which its integration stopped; NaN where it did not fail.
        refined: `(B,)`, how often the steps of an image's draws were doubled, at most (`Refinement`).
        evaluations: `(B,)`, evaluations of the network that the image took part in, all draws together; companions apart.
        prior_mismatch: `(B,)` bits/dim: on average, the most that the prior's standing for the law of x_T can cost
            (`sde_lib.prior_mismatch`); NaN where another prior was given.
    """

    estimates: Tensor
    solver_error: Tensor
    companion_error: Tensor
    exact: bool
    noisy: bool
    dimensions: int
    nfe: int
    nbe: int
    companion_nfe: int
    status: Tensor
    failed_at: Tensor
    refined: Tensor
    evaluations: Tensor
    prior_mismatch: Tensor

    @property
    def converged(self) -> Tensor:
        """`(B,)`: all draws of the image arrived, and their values are finite."""
        return (self.status == int(Status.DONE)) & self.estimates.isfinite().all(dim=2).all(dim=1)

    @property
    def per_image(self) -> Tensor:
        """`(B,)` bits/dim."""
        return self.estimates.mean(dim=(1, 2))

    @property
    def stated_error(self) -> Tensor:
        """`(B,)` bits/dim, the solver's error as it is stated: the larger of its own estimate and the companions'."""
        return torch.fmax(self.solver_error, self.companion_error)

    @property
    def budget(self) -> ErrorBudget:
        """The mean and its errors, over the images that converged."""
        good = self.converged
        return ErrorBudget(
            estimates=self.estimates[good],
            solver_errors=self.stated_error[good],
            exact=self.exact,
            noisy=self.noisy,
        )

    @property
    def mean(self) -> float:
        """The set's bits/dim: the mean over the images that converged."""
        return self.budget.mean

    @property
    def stderr(self) -> float:
        """The standard error of `mean`, everything included: the spread over images by sqrt(n). NaN for one image."""
        return self.budget.total

    @property
    def data_stderr(self) -> float:
        """What of `stderr` is due to the choice of images; see `ErrorBudget`."""
        return self.budget.data

    @property
    def probe_stderr(self) -> float:
        """What of it is due to the trace's probes; 0 for an exact trace, NaN with one estimate."""
        return self.budget.probe

    @property
    def dequantization_stderr(self) -> float:
        """What of it is due to the dequantisation noise; 0 without noise, NaN where it cannot be known."""
        return self.budget.dequantization

    @property
    def _noun(self) -> str:
        return "images" if self.noisy else "points"

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

    def __str__(self) -> str:
        def number(value: float) -> str:
            return "unknown" if value != value else f"{value:.3f}" if value >= 5e-4 or value == 0 else "< 0.001"

        b = self.budget
        text = (
            f"{b.mean:.3f} ± {number(b.total)} bits/dim (probe {number(b.probe)}, "
            f"dequantisation {number(b.dequantization)}, data {number(b.data)}; "
            f"solver {number(b.solver)}; {len(b.estimates):,} {self._noun}; {self.nfe:,}+{self.nbe:,} evaluations)"
        )
        if b.solver > max(0.01, b.total):
            text += "; the solver's error is the largest: take more steps, or a smaller tolerance"
        again = int((self.refined > 0).sum())
        if again:
            text += f"; {again:,} {self._noun} solved again with more steps"
        hidden = float(self.prior_mismatch.mean())
        if hidden * math.log(2) > VISIBLE:
            text += (
                f"; the noise at T does not hide these data, which may cost {hidden:.2g} bits/dim: scale them to about unit "
                "size, or take a larger beta_max or sigma_max"
            )
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
                lines.append(
                    f"{len(times)} {self._noun} failed at t = {_range(times)} and are left out ({status.explain()})"
                )
        rest = int((~self.converged & (self.status == int(Status.DONE))).sum())
        return lines + ([f"{rest} {self._noun} have values that are not finite and are left out"] if rest else [])

    def asdict(self) -> dict[str, object]:
        """Plain numbers for a results file."""
        b = self.budget
        return {
            "mean": b.mean,
            "stderr": b.total,
            "probe_stderr": b.probe,
            "dequantization_stderr": b.dequantization,
            "data_stderr": b.data,
            "solver_error": b.solver,
            "prior_mismatch": float(self.prior_mismatch.mean()),
            "images": int(self.converged.sum()),
            "not_converged": int((~self.converged).sum()),
            "refined": int((self.refined > 0).sum()),
            "failures": self.failures,
            "draws": self.estimates.shape[1],
            "trace_estimates": self.estimates.shape[2],
            "nfe": self.nfe,
            "nbe": self.nbe,
            "companion_nfe": self.companion_nfe,
        }

    def first(self, n: int) -> BitsPerDim:
        """The result of the first `n` images."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        cut: dict[str, Any] = {name: v[:n] if isinstance(v, Tensor) else v for name, v in values.items()}
        return BitsPerDim(**cut)

    @classmethod
    def concatenate(cls, parts: list[BitsPerDim]) -> BitsPerDim:
        """One result from those of consecutive batches."""
        return cls(
            estimates=torch.cat([p.estimates for p in parts]),
            solver_error=torch.cat([p.solver_error for p in parts]),
            companion_error=torch.cat([p.companion_error for p in parts]),
            exact=all(p.exact for p in parts),
            noisy=any(p.noisy for p in parts),
            dimensions=parts[0].dimensions,
            nfe=max(p.nfe for p in parts),
            nbe=max(p.nbe for p in parts),
            companion_nfe=sum(p.companion_nfe for p in parts),
            status=torch.cat([p.status for p in parts]),
            failed_at=torch.cat([p.failed_at for p in parts]),
            refined=torch.cat([p.refined for p in parts]),
            evaluations=torch.cat([p.evaluations for p in parts]),
            prior_mismatch=torch.cat([p.prior_mismatch for p in parts]),
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
    method: Method | None = None,
    dequantizer: Dequantizer | None = None,
    draws: int = 1,
    divergence: Divergence | None = None,
    companions: int = 16,
    prior: Prior | None = None,
    generator: Generator = None,
    dtype: torch.dtype = torch.float32,
) -> BitsPerDim:
    """Bits/dim of a batch by dequantisation and the probability flow:

        bits/dim = -(log p(x) + cost) / (D log 2),    x, cost = dequantizer(images),    cost = D log((high - low) / levels)

    for uniform noise (Theis, van den Oord and Bethge 2016, arXiv:1511.01844, section 3.1).

    Args:
        images: grey values 0 ... levels - 1, `(B, *)`, integers or exact floats (also in [0, 1]); or, with a transform
            that has no levels, real data `(B, *)`, whose -log2-densities per dimension are returned and to which no
            noise is added.
        transform: from level units to model units.
        method, prior: as in `log_likelihood`.
        dequantizer: `UniformDequantizer()` for grey values and `NoDequantization()` for real data unless given.
        draws: m, how many draws of the noise each image gets; with two or more their share of the error is known.
        divergence: how to get the trace, as in `log_likelihood`.
        companions: with a solver of fixed steps, so many images of the batch get the solver's error from solutions of more
            steps (`companion_error`), and the others NaN; 0 for none. They cost 5.5 draws of so many images. A grid of own
            times (`Custom`) has none.
        generator: for noise and probes; `SampleStreams(seed, ids)` makes an image's value its own.
        dtype: of the state that the score is given.

    Raises:
        UserError: for images of another type or range than the transform's levels, or as `log_likelihood` does.
    """
    require_count(draws, "draws")
    require_count(companions, "companions", 0)
    method, divergence = Method.of(method), Divergence.of(divergence)
    dequantizer = default_dequantizer(transform) if dequantizer is None else dequantizer
    images = transform.grey_values(images)
    dequantizer.check(images, transform)
    t_min, D = method.time(sde), images[0].numel()
    if not dtype.is_floating_point or torch.finfo(dtype).bits < 32:
        raise UserError(
            f"got dtype={dtype} for bits/dim; expected torch.float32 or torch.float64: no error bar covers less"
        )
    mismatches = torch.full((len(images),), math.nan, dtype=torch.float64, device=images.device)
    estimates, errors, statuses, failed, refined, evaluations = [], [], [], [], [], []
    nfe = nbe = 0
    first: Tensor | None = None
    for _ in range(draws):
        x, cost = dequantizer(images, transform, sde, t_min, generator=generator, dtype=dtype)
        mismatches = prior_mismatch(sde, x) if first is None and prior is None else mismatches
        found = log_likelihood(sde, score, x, method=method, divergence=divergence, prior=prior, generator=generator)
        first = x if first is None else first
        estimates.append(in_bits(-(found.estimates + cost.unsqueeze(1)), D))
        errors.append(in_bits(found.solver_error, D))
        statuses.append(found.status)
        failed.append(found.failed_at)
        refined.append(found.refined)
        evaluations.append(found.evaluations)
        nfe, nbe = max(nfe, found.nfe), max(nbe, found.nbe)
    assert first is not None
    solver_error = torch.stack(errors, dim=1).mean(dim=1)
    by_companions, counted = torch.full_like(solver_error, math.nan), CountedScore(score)
    if companions and method.finer() is not None:
        some = first[:companions]
        few = take(counted, torch.arange(len(some), device=some.device))
        streams = take(generator, torch.arange(len(some))) if isinstance(generator, SampleStreams) else None
        error = companion_error(sde, few, some, method=method, prior=prior, generator=streams)
        by_companions[:companions] = in_bits(error, D)
        # a companion says how bad the steps were that an image was then solved again with more of
        by_companions = torch.where(torch.stack(refined).amax(dim=0) > 0, math.nan, by_companions)
    return BitsPerDim(
        estimates=torch.stack(estimates, dim=1),
        solver_error=solver_error,
        companion_error=by_companions,
        exact=divergence.exact,
        noisy=dequantizer.noisy,
        dimensions=D,
        nfe=nfe,
        nbe=nbe,
        companion_nfe=counted.nfe,
        status=torch.stack(statuses, dim=1).amax(dim=1),
        refined=torch.stack(refined, dim=1).amax(dim=1),
        evaluations=torch.stack(evaluations, dim=1).sum(dim=1),
        prior_mismatch=in_bits(mismatches, D),
        failed_at=torch.stack(failed, dim=1).nan_to_num(math.inf).amin(dim=1).nan_to_num(posinf=math.nan),
    )


def in_bits(nats: Tensor, dimensions: int) -> Tensor:
    """Nats per sample as bits per dimension."""
    return nats / (dimensions * math.log(2))
