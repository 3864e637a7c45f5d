r"""Fitting a sampler of few steps to one network, without data.

The probability flow takes noise x_T to one clean image, and can be solved tightly: that is the teacher. A student of N
evaluations

    x_{i+1} = a_i x_i + sum_j w_ij D(x_{i-j}, t_{i-j})                    (`samplers.tuned`)

has times t_1 ... t_{N-1}, factors a_i and weights w_ij. They begin as those of an exponential multistep method
(`samplers.exponential`) on a usual grid, and are changed so that student and teacher end near each other from the same noise,

    minimise     the mean over samples of sqrt(1 + e^2 / c^2) - 1,      e the root-mean-square difference of a sample.

This grows like e for the few samples whose flow parts close to their path: no method of few steps gets them right, and their
squares would decide the fit. Times of such methods were learned by Watson et al. 2022 (arXiv:2202.05830), Zhou et al. 2024
(AMED, arXiv:2312.00094) and Chen et al. 2024 (GITS, arXiv:2405.11326), coefficients by Zheng et al. 2023 (DPM-Solver-v3,
arXiv:2310.13268), and both from a tight solution by Frankel et al. 2025 (S4S, arXiv:2502.17423), with gradients of the network.

Here it is a problem of least squares with some 30 unknowns and a residual for every number of every sample, and some ten steps
of Levenberg and Marquardt's method solve it. Derivatives are differences, which ask nothing of the network but values: a step
is linear in its weights, so a run with one of them changed begins there, and the last step's weights take no evaluation.

What was fitted to some noise is judged on other noise. It is kept only where its error there is smaller than that of the best
plain method, by three standard errors of the paired difference; else that plain method stands for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from numerics import Dopri5, SampleStreams, UserError, require_count, require_positive, take
from samplers.base import Sampler
from samplers.catalogue import create
from samplers.exponential import exponential_weights
from samplers.probability_flow import ProbabilityFlow
from samplers.result import SamplingError
from samplers.tuned import Tuned
from sde_lib import SDE, Score, WhitenedFlow, time_grids
from sde_lib.score import tweedie

HISTORY = 3
"""How many values of D a step uses at most."""

METHODS: tuple[dict[str, Any], ...] = (
    {"name": "dpm_solver", "order": 2},
    {"name": "dpm_solver", "order": 3},
    {"name": "unipc", "order": 2},
    {"name": "unipc", "order": 3},
    {"name": "ddim"},
)
GRIDS = ("logistic", "log_snr", "karras", "cosine", "quadratic", "uniform")
"""Of these the best plain method is chosen, with and without final denoising."""

_FIT, _JUDGE = 1, 2  # 0 is the noise that samples are drawn from and samplers are compared on
_COARSEST = 1e-2
_BETWEEN = 1 << 40  # of the kinds of noise, in the samples' ids


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Noise, and where the flow takes it.

    Attributes:
        noise: `(n, *)`, the state at T.
        x: `(n, *)`, the denoised mean at t_end.
        nfe, seconds: what the solution took: evaluations of the network, times samples, and wall clock.
    """

    noise: Tensor
    x: Tensor
    nfe: int = 0
    seconds: float = 0.0

    def errors(self, sampler: Sampler, sde: SDE, score: Score, batch_size: int) -> Tensor:
        """`(n,)`: the root mean square per entry by which a sampler misses, infinite where its values are."""
        try:
            return rms(_run(sampler, sde, score, self.noise, batch_size) - self.x)
        except SamplingError:
            return torch.full((len(self.x),), math.inf, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a fit has found.

    Attributes:
        evaluations: of the samplers.
        tuned: the fitted sampler.
        plain: the best plain one, as `samplers.create` takes it.
        tuned_errors, plain_errors: `(n,)`, of samples from noise that neither has seen.
        nfe: evaluations of the network that it took, times samples, those of the pairs' tight solution included, also where
            that serves several fits.
        seconds: of wall clock, likewise.
    """

    evaluations: int
    tuned: Tuned
    plain: dict[str, Any]
    tuned_errors: Tensor
    plain_errors: Tensor
    nfe: int
    seconds: float

    @property
    def gain(self) -> tuple[float, float]:
        """By how much the tuned sampler's mean error is below the plain one's, and the standard error of that."""
        less = self.plain_errors - self.tuned_errors
        return float(less.mean()), float(less.std()) / math.sqrt(len(less))

    @property
    def kept(self) -> bool:
        """Is the tuned sampler surely better, by three standard errors?"""
        gain, stderr = self.gain
        return gain > 3 * stderr  # False where a value is not finite

    @property
    def sampler(self) -> Sampler:
        """What to draw with."""
        return self.tuned if self.kept else create(**self.plain)

    def __str__(self) -> str:
        (gain, stderr), n = self.gain, len(self.plain_errors)
        surely = "surely " if gain > 0 else ""
        kept = "tuned" if self.kept else f"not {surely}better: the plain one is kept"
        return (
            f"{self.evaluations} evaluations: from the flow {float(self.plain_errors.mean()):.4f} plain "
            f"({create(**self.plain)!r}), {float(self.tuned_errors.mean()):.4f} tuned, by {gain:.4f} ± {stderr:.4f} less on "
            f"{n} other samples: {kept} ({self.nfe:,} evaluations of a sample, {self.seconds:.0f} s)"
        )


def tune(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    evaluations: int,
    data_std: float = 1.0,
    rounds: int = 15,
    tolerance: float = 1e-4,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    pairs: tuple[Pairs, Pairs] | None = None,
    on_round: Callable[[int, float], None] | None = None,
) -> Tuning:
    """Fits a sampler of some evaluations to a score, and judges it beside the best plain one.

        tuned = tune(sde, score, (128, 1, 28, 28), evaluations=6).sampler
        tuned(sde, score, (16, 1, 28, 28)).x

    Args:
        shape: `(n, *)`, of the samples it is fitted to; it is judged on as many others.
        evaluations: of the sampler, 2 or more.
        data_std: the data's standard deviation in model units, for the tight solution.
        rounds: steps of Levenberg and Marquardt's method, at most.
        tolerance: of the tight solution.
        seed: of the noise.
        batch_size: samples at once.
        device: of the samples.
        pairs: noise and its tight solution from `teach`, where several samplers are fitted.
        on_round: called with the number of a step and the loss after it.

    Raises:
        UserError: for fewer than 2 evaluations, fewer than 8 samples, or pairs of another shape.
        SamplingError: where the tight solution fails.
    """
    require_count(evaluations, "evaluations", 2)
    require_count(rounds, "rounds")
    require_count(batch_size, "batch_size")
    sizes = _sizes(shape)
    if pairs is None:
        pairs = teach(
            sde, score, shape, data_std=data_std, tolerance=tolerance, seed=seed, batch_size=batch_size, device=device
        )
    fit, judge = pairs
    for each in pairs:
        if each.noise.shape != sizes or each.x.shape != sizes:
            raise UserError(
                f"got pairs of noise {tuple(each.noise.shape)} and samples {tuple(each.x.shape)} for shape={sizes}; expected "
                "that shape of all: give teach the same one"
            )
    begun, counted = time.perf_counter(), _Counted(score)

    def error(sampler: Sampler) -> float:
        mean = float(fit.errors(sampler, sde, counted, batch_size).mean())
        return math.inf if math.isnan(mean) else mean  # a first one that is NaN would stay the least

    plain = min(plain_methods(evaluations), key=lambda options: error(create(**options)))
    student = Student(sde=sde, score=counted, pairs=fit, batch_size=batch_size)
    starts = [start(sde, time_grids.create(name)(sde, evaluations)) for name in GRIDS]
    first = min(starts, key=error)
    tuned = student.fitted(first, rounds=rounds, on_round=on_round)
    return Tuning(
        evaluations=evaluations,
        tuned=tuned,
        plain=plain,
        tuned_errors=judge.errors(tuned, sde, counted, batch_size),
        plain_errors=judge.errors(create(**plain), sde, counted, batch_size),
        nfe=counted.samples + fit.nfe + judge.nfe,
        seconds=time.perf_counter() - begun + fit.seconds + judge.seconds,
    )


def teach(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    data_std: float = 1.0,
    tolerance: float = 1e-4,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> tuple[Pairs, Pairs]:
    """Noise and its tight solution: to fit to, and to judge by; `shape` `(n, *)` of each.

    Raises:
        UserError: for fewer than 8 samples, a seed below 0, or a tolerance above 1e-2, at which nothing is tight.
        SamplingError: where the solution fails.
    """
    require_positive(tolerance, "tolerance")
    if tolerance > _COARSEST:
        raise UserError(f"got tolerance={tolerance:g} for the tight solution; expected at most {_COARSEST:g}")
    require_count(seed, "seed", 0)
    require_count(batch_size, "batch_size")
    sizes = _sizes(shape)
    teacher = ProbabilityFlow(
        solver=Dopri5(rtol=tolerance, atol=tolerance), flow=WhitenedFlow(data_std=data_std), denoise=True
    )

    def made(kind: int) -> Pairs:
        streams = SampleStreams(seed, torch.arange(sizes[0]) + kind * _BETWEEN)
        x_T = sde.prior_sample(sizes, generator=streams, device=device, dtype=torch.float32)
        begun, counted = time.perf_counter(), _Counted(score)
        x = _run(teacher, sde, counted, x_T, batch_size)
        return Pairs(noise=x_T, x=x, nfe=counted.samples, seconds=time.perf_counter() - begun)

    return made(_FIT), made(_JUDGE)


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """`shape`, of enough samples.

    Raises:
        UserError: for anything else.
    """
    if not isinstance(shape, Sequence) or len(shape) < 2:
        raise UserError(f"got shape={shape!r}; expected (n, *) of 8 samples or more")
    for size in shape:
        require_count(size, "a size of shape")
    if shape[0] < 8:
        raise UserError(f"got shape={tuple(shape)}; expected (n, *) of 8 samples or more")
    return tuple(int(size) for size in shape)


def plain_methods(evaluations: int) -> Iterator[dict[str, Any]]:
    """The plain samplers of so many evaluations, as `samplers.create` takes them."""
    for method in METHODS:
        for grid in GRIDS:
            for denoise in (True, False):
                yield {**method, "grid": grid, "denoise": denoise, "steps": evaluations - denoise}


def start(sde: SDE, times: Tensor, history: int = HISTORY) -> Tuned:
    """The exponential multistep method in D at the times `(N+1,)`: `DPMSolver`'s, of rising order up to `history`."""
    alpha, l = sde.alpha(times), sde.log_snr(times) / 2
    places = l.tolist()
    rows = []
    for i in range(len(times) - 1):
        points = [places[i - j] for j in range(min(i + 1, history))]
        rows.append([float(alpha[i + 1]) * w for w in exponential_weights(points, places[i], places[i + 1], 1.0)])
    return Tuned(grid=times, of_x=(alpha[1:] / alpha[:-1] * torch.exp(-l.diff())).tolist(), weights=rows)


@dataclass(frozen=True, kw_only=True)
class Student:
    """The fit of a tuned sampler to pairs.

    Its unknowns are, step by step, the half log-SNR of the time (not of the first, T), the factor of x relative to where it
    began, and the weights in units of alpha (1 - exp(-h)), the weight of a step of first order.
    """

    sde: SDE
    score: Score
    pairs: Pairs
    batch_size: int
    step: float = 1e-3  # of the differences: far above the rounding of float32, far below what bends

    def fitted(self, first: Tuned, *, rounds: int, on_round: Callable[[int, float], None] | None = None) -> Tuned:
        """`first` after some rounds of Levenberg and Marquardt's method; it never becomes worse on these pairs."""
        form = _Form.of(self.sde, first)
        theta = torch.zeros(form.size, dtype=torch.float64)
        errors = self.pairs.errors(first, self.sde, self.score, self.batch_size)
        scale = max(float(errors.median()) / 2, 1e-12)

        def loss(e: Tensor) -> float:
            return float((torch.sqrt(1 + (e / scale).square()) - 1).mean())

        value, damping = loss(errors), 1e-2
        for k in range(rounds):
            normal, slope = self._normal(form, theta, scale)
            before = value
            for _ in range(6):
                # a direction that the errors do not feel gets a little of the others' stiffness
                diagonal = normal.diag() + 1e-6 * normal.diag().max()
                change = -torch.linalg.solve(normal + (damping * diagonal).diag(), slope)
                try:
                    found = loss(self.pairs.errors(form.sampler(theta + change), self.sde, self.score, self.batch_size))
                except UserError:  # times that no longer fall
                    found = math.inf
                if found < value:
                    theta, value, damping = theta + change, found, max(damping / 5, 1e-7)
                    break
                damping *= 5
            if on_round is not None:
                on_round(k + 1, value)
            if value > 0.998 * before:
                break
        return form.sampler(theta)

    def _normal(self, form: _Form, theta: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """The normal equations' matrix `(P, P)` and right side `(P,)`, summed over samples."""
        normal, slope = torch.zeros(form.size, form.size, dtype=torch.float64), torch.zeros_like(theta)
        for first in range(0, len(self.pairs.x), self.batch_size):
            ids = torch.arange(first, min(first + self.batch_size, len(self.pairs.x)))
            off, columns = self._columns(form, theta, ids)
            held = (1 + off.square().mean(dim=1) / scale**2).rsqrt().sqrt().unsqueeze(1)
            J = (columns * held).flatten(1)
            normal += (J @ J.T).cpu()
            slope += (J @ (off * held).flatten()).cpu()
        return normal, slope

    @torch.no_grad()
    def _columns(self, form: _Form, theta: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What is missed `(b, D)`, and its derivatives by theta `(P, b, D)`, by differences."""
        score, x = take(self.score, ids), self.pairs.noise[ids]
        base = form.sampler(theta)

        def denoised(x: Tensor, t: float) -> Tensor:
            time = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
            return tweedie(self.sde, score(x, time), x, time)

        def onwards(sampler: Tuned, i: int, x: Tensor, values: list[Tensor], path: list[Any] | None = None) -> Tensor:
            """The end of a run, from x and the values of D at t_i and before."""
            times = sampler.grid.times  # type: ignore[union-attr]
            for k in range(i, sampler.steps):
                if k > i:
                    values = [denoised(x, times[k]), *values][:HISTORY]
                if path is not None:
                    path.append((x, values))
                x = sampler.of_x[k] * x + sum(w * D for w, D in zip(sampler.weights[k], values, strict=False))
            return x.flatten(1).double()

        path: list[tuple[Tensor, list[Tensor]]] = []
        times = base.grid.times  # type: ignore[union-attr]
        end = onwards(base, 0, x, [denoised(x, times[0])], path)
        columns = []
        for j, (i, is_time) in enumerate(form.places):
            moved = theta.clone()
            moved[j] += self.step
            sampler = form.sampler(moved)
            x, values = path[i]
            if is_time:
                values = [denoised(x, sampler.grid.times[i]), *values[1:]]  # type: ignore[union-attr]
            columns.append((onwards(sampler, i, x, values) - end) / self.step)
        return end - self.pairs.x[ids].flatten(1).double(), torch.stack(columns)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Tuned samplers around one, by numbers theta `(P,)` that are 0 there.

    Attributes:
        places: for each number the step it belongs to, and whether it is its time.
    """

    sde: SDE
    first: Tuned
    half_log_snr: Tensor
    units: list[float]
    places: list[tuple[int, bool]]

    @classmethod
    def of(cls, sde: SDE, first: Tuned) -> _Form:
        times = torch.tensor(first.grid.times, dtype=torch.float64)  # type: ignore[union-attr]
        l = sde.log_snr(times) / 2
        places = [
            place
            for i, row in enumerate(first.weights)
            for place in [*([(i, True)] if i else []), (i, False), *[(i, False)] * len(row)]
        ]
        units = (-sde.alpha(times[1:]) * torch.expm1(-l.diff())).tolist()
        return cls(sde=sde, first=first, half_log_snr=l, units=units, places=places)

    @property
    def size(self) -> int:
        return len(self.places)

    def sampler(self, theta: Tensor) -> Tuned:
        """That of theta.

        Raises:
            UserError: for times that do not fall.
        """
        given = iter(theta.tolist())
        l, of_x, rows = self.half_log_snr.clone(), [], []
        for i, row in enumerate(self.first.weights):
            if i:
                l[i] += next(given)
            of_x.append(self.first.of_x[i] * (1 + next(given)))
            rows.append([w + self.units[i] * next(given) for w in row])
        times = self.sde.time_of_log_snr(2 * l)
        times[0], times[-1] = self.first.grid.times[0], self.first.grid.times[-1]  # type: ignore[union-attr]
        return Tuned(grid=times, of_x=of_x, weights=rows)


class _Counted:
    """A score that counts the samples it has seen."""

    def __init__(self, score: Score, seen: list[int] | None = None) -> None:
        self.score, self._seen = score, [0] if seen is None else seen

    @property
    def samples(self) -> int:
        return self._seen[0]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self._seen[0] += len(x)
        return self.score(x, t)

    def take(self, index: Tensor) -> _Counted:
        return _Counted(take(self.score, index), self._seen)


def rms(difference: Tensor) -> Tensor:
    """`(n,)`, float64: root mean square per entry of `(n, *)`."""
    return difference.flatten(1).double().square().mean(dim=1).sqrt().cpu()


def _run(sampler: Sampler, sde: SDE, score: Score, x_T: Tensor, batch_size: int) -> Tensor:
    parts = []
    for first in range(0, len(x_T), batch_size):
        ids = torch.arange(first, min(first + batch_size, len(x_T)))
        parts.append(sampler(sde, take(score, ids), (len(ids), *x_T.shape[1:]), x_T=x_T[ids]).x)
    return torch.cat(parts)
