r"""Inverse problems with a trained score of images, which was told of none of them.

Each image of a test split is measured, y = A x + n z, and restored by every method from y alone: several samples, whose mean
is the estimate and whose spread says how sure it is. Two questions are asked of the spread, under their own names:

    coverage of test images       do samples and truth look alike? It tests the model and the method together
    coverage of the model's own   the same of truths that the model drew itself: then only the method can be wrong

If truth and the S samples are draws of one law, the truth of a pixel lies between the smallest and the largest of them with
probability (S - 1) / (S + 1). Of the model's own truths the ranks of random projections among the samples are uniform, too
(simulation-based calibration; Talts et al. 2018, arXiv:1804.06788), which a chi-square tests.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation.pictures import save_grid
from guidance import (
    TMPD,
    Blur,
    Downsample,
    Grey,
    Linear,
    Mask,
    Measurement,
    MomentMatching,
    PiGDM,
    PublishedDPS,
    posterior,
)
from likelihood import UniformDequantizer, estimate_noise_level
from numerics import SampleStreams, UserError, normal
from samplers import DDNM, Ancestral, DPMSolver, LogSNR, PredictorCorrector, RePaint, Replacement, Sampler, TwistedSMC
from sde_lib import SDE, Operator, Score
from workflow import progress
from workflow.shown_measurement import back_projected, train_shown

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.trained_run import TrainedRun

_COLUMNS = 8
"""Of a contact sheet: images at most."""
_PROJECTIONS = 8
_SR3_PROBLEM = "super-resolution"
_NOISE, _LEVEL, _DEQUANTISED, _OWN = 1, 2, 3, 4
"""What is added to the run's seed for the measurements' noise, the level's probes, the test images' dequantisation and the
model's own truths. Restorations have the seed itself: a truth whose numbers a posterior sample shared would be correlated with
it, whatever the measurement says."""
_TOGETHER = 64
"""Samples that are drawn together: a network's call costs little more for them than for one."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A way of measuring images.

    Attributes:
        operator: made for the shape of an image `(C, H, W)`.
        std: of the noise, in model units; None: the configuration's.
        fits: whether images of that shape can be measured so.
        blind: whether methods are told the noise that `likelihood.estimate_noise_level` finds, not the true one; for an
            operator that changes nothing.
    """

    operator: Callable[[tuple[int, ...]], Operator]
    std: float | None = None
    fits: Callable[[tuple[int, ...]], bool] = lambda shape: True
    blind: bool = False


def _right_half(shape: tuple[int, ...]) -> Mask:
    seen = torch.ones(shape, dtype=torch.bool)
    seen[..., shape[-1] // 2 :] = False
    return Mask(seen)


def _projections(shape: tuple[int, ...]) -> Linear:
    D = math.prod(shape)
    matrix = torch.randn(D // 4, D, generator=torch.Generator().manual_seed(0)) / math.sqrt(D)
    return Linear(matrix, shape)


PROBLEMS: Mapping[str, Problem] = {
    "inpainting": Problem(operator=_right_half),
    "super-resolution": Problem(
        operator=lambda shape: Downsample(2), fits=lambda shape: all(n % 2 == 0 for n in shape[1:])
    ),
    "deblurring": Problem(operator=lambda shape: Blur.gaussian(1.0, size=5), fits=lambda shape: min(shape[1:]) >= 5),
    "compressed sensing": Problem(operator=_projections),
    "denoising": Problem(operator=lambda shape: Mask(torch.ones(shape)), std=0.5),
    "blind denoising": Problem(operator=lambda shape: Mask(torch.ones(shape)), std=0.5, blind=True),
    "colourisation": Problem(operator=lambda shape: Grey(), fits=lambda shape: shape[0] == 3),
}

Way = Callable[[SDE, Score, Measurement, int, float], tuple[Sampler, Score]]
"""From an SDE, a score, a measurement, a number of steps and the data's standard deviation to what is called and with which
score."""


def _guided(make: Callable[[float], Any]) -> Way:
    def way(sde: SDE, score: Score, y: Measurement, steps: int, data_std: float) -> tuple[Sampler, Score]:
        sampler = DPMSolver(order=2, stochastic=True, steps=steps)
        return sampler, posterior(sde, score, y, method=make(data_std))

    return way


def _published(sde: SDE, score: Score, y: Measurement, steps: int, data_std: float) -> tuple[Sampler, Score]:
    grid = LogSNR()
    given = posterior(sde, score, y, method=PublishedDPS(times=grid(sde, steps)))
    return PredictorCorrector(predictor=Ancestral(), corrector=None, steps=steps, grid=grid), given


METHODS: Mapping[str, Way] = {
    "MomentMatching": _guided(lambda data_std: MomentMatching(iterations=3, data_std=data_std)),
    "TMPD": _guided(lambda data_std: TMPD()),
    "PiGDM": _guided(lambda data_std: PiGDM(data_std=data_std)),
    "DPS": _published,  # DPS() itself needs far more steps at little noise
    "Replacement": lambda sde, score, y, steps, sd: (Replacement(measurement=y, steps=steps, grid=LogSNR()), score),
    "RePaint": lambda sde, score, y, steps, sd: (
        RePaint(measurement=y, steps=steps, resamplings=4, jump=5, grid=LogSNR()),
        score,
    ),
    "DDNM": lambda sde, score, y, steps, sd: (DDNM(measurement=y, steps=steps, grid=LogSNR(), data_std=sd), score),
    "TwistedSMC": lambda sde, score, y, steps, sd: (
        TwistedSMC(measurement=y, steps=steps, particles=8, data_std=sd),
        score,
    ),
}


FEW: Mapping[str, Any] = {
    "problems": ("inpainting", "super-resolution", "deblurring", "compressed sensing"),
    "methods": ("MomentMatching", "PiGDM", "DDNM"),
    "images": 8,
    "samples": 4,
}
"""What is restored of larger images: four operators, three methods, eight images."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What one method made of one problem.

    Attributes:
        samples: `(S, B, *)`, in model units.
        seconds: of wall clock, for an image's sample.
        nfe: evaluations of the score, for a sample.
    """

    samples: Tensor
    seconds: float
    nfe: int


def restore(
    sde: SDE,
    score: Score,
    measurement: Measurement,
    method: str,
    shape: Sequence[int],
    *,
    samples: int,
    steps: int,
    seed: int,
    data_std: float,
    ways: Mapping[str, Way] = METHODS,
) -> Restored:
    """`samples` restorations of each of the measured images, of `shape` `(B, *)`, by the method of that name among `ways`.

    Raises:
        UserError: a method that is not there, or cannot take the measurement.
    """
    if method not in ways:
        raise UserError(f"got method={method!r}; expected one of {', '.join(ways)}")
    images, *rest = shape
    total, made, begun, nfe = samples * images, [], time.perf_counter(), 0
    together = max(1, _TOGETHER // images) * images
    for first in range(0, total, together):
        ids = torch.arange(first, min(first + together, total))
        some = measurement.take((ids % images).to(measurement.y.device))
        sampler, given = ways[method](sde, score, some, steps, data_std)
        with warnings.catch_warnings():
            # what an approximate posterior says at T is the network's error there times sigma^2 / alpha, not the data's size
            warnings.filterwarnings("ignore", message=".*the noise at T does not hide")
            result = sampler(
                sde, given, (len(ids), *rest), generator=SampleStreams(seed, ids), device=measurement.y.device
            )
        made.append(result.x)
        nfe = result.nfe * getattr(sampler, "particles", 1)
    seconds = (time.perf_counter() - begun) / total
    return Restored(samples=torch.cat(made).reshape(samples, *shape), seconds=seconds, nfe=nfe)


def psnr(estimate: Tensor, truth: Tensor, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio in dB, `(B,)`."""
    return 10 * torch.log10(data_range**2 / (estimate - truth).flatten(1).square().mean(dim=1))


def coverage(samples: Tensor, truth: Tensor) -> Tensor:
    """Of each image `(B,)`, the share of its numbers that lie between the smallest and the largest of the samples `(S, B,
    *)`."""
    inside = (truth >= samples.amin(dim=0)) & (truth <= samples.amax(dim=0))
    return inside.flatten(1).double().mean(dim=1)


def rank_p_value(samples: Tensor, truth: Tensor) -> float:
    """The p-value that truths `(B, *)` are exchangeable with their samples `(S, B, *)`: of the ranks of random projections, the
    smallest of the chi-squares' times their number."""
    from scipy.stats import chisquare

    S, B, D = len(samples), len(truth), truth[0].numel()
    directions = torch.randn(D, _PROJECTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_truth = truth.flatten(1).double().cpu() @ directions
    of_samples = samples.reshape(S, B, D).double().cpu() @ directions
    ranks = (of_samples < of_truth).sum(dim=0)  # (B, projections), 0 to S
    counts = [torch.bincount(column, minlength=S + 1).numpy() for column in ranks.unbind(dim=1)]
    return min(1.0, _PROJECTIONS * min(float(chisquare(count).pvalue) for count in counts))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one problem.

    Attributes:
        psnr, psnr_stderr: of the samples' mean, dB.
        psnr_of_sample: of single samples.
        coverage, coverage_stderr: of test images; `expected` is what it should be.
        own_coverage, own_coverage_stderr, own_p: coverage of the model's own truths, and the ranks' p-value.
        seconds, nfe: for a sample.
        std, told, own_told: the noise, and what the method was told of it, for test images and for the model's own.
    """

    problem: str
    method: str
    psnr: float
    psnr_stderr: float
    psnr_of_sample: float
    coverage: float
    coverage_stderr: float
    expected: float
    own_coverage: float
    own_coverage_stderr: float
    own_p: float
    seconds: float
    nfe: int
    std: float
    told: float
    own_told: float


def report_inverse(
    run: TrainedRun,
    folder: RunFolder,
    *,
    images: int,
    samples: int,
    steps: int,
    std: float,
    methods: Sequence[str] = tuple(METHODS),
    problems: Sequence[str] = tuple(PROBLEMS),
    sr3_steps: int = 0,
    prefix: str = "",
    replaces: bool = True,
) -> list[Row]:
    """Restores test images and the model's own by every method: `inverse` in results.json, a section of report.md, and a
    contact sheet for each problem, of truth, measurement, and for each method two samples, the mean and the standard deviation.

    Args:
        images: of the test split, at most, and as many of the model's own.
        samples: of each, at least 2.
        steps: of each method; RePaint takes four times as many.
        std: of the noise, in model units.
        methods, problems: names; of the problems those that images of this shape have.
        sr3_steps: of training a network that is shown the measurement, for super-resolution alone; 0 for none.
        prefix: of the options' names in what is refused.
        replaces: earlier rows of the folder, whatever they were made with; else those of the same settings and weights stay.

    Raises:
        UserError: data that are no images, an unknown name, problems none of which these images have, or earlier rows of other
            settings that are not to be replaced.
    """
    from workflow.pictures import draw_samples  # it imports the systems

    shape = run.dataset.event_shape
    check_names(methods, problems, prefix)
    chosen = chosen_problems(problems, tuple(shape), prefix, sr3_steps=sr3_steps)
    low, high = run.model.data_range
    seed, device = run.setup.options.seed, run.device
    stored = run.dataset.split("test").x[:images].to(device)
    images = len(stored)  # a split may have fewer
    made_with = {"images": images, "samples": samples, "steps": steps, "std": std, "model": run.fingerprint}
    earlier = [] if replaces else _earlier(folder, made_with)
    uniform = SampleStreams(seed + _DEQUANTISED)
    truth, _ = UniformDequantizer()(stored, run.transform, run.sde, run.sde.t_min, generator=uniform)
    truth = truth.float()
    walk = DPMSolver(order=2, stochastic=True, steps=2 * steps)
    own = draw_samples(run.setup, run.score, walk, images, seed=seed + _OWN, shown=False)[0].to(device)
    data_std = run.model.data_std or 1.0
    rows = []
    extra = int(sr3_steps > 0 and _SR3_PROBLEM in chosen)
    with progress.bar(total=len(chosen) * len(methods) + extra, name="inverse problems", unit="method") as bar:
        for name, problem in chosen.items():
            operator, noise = problem.operator(tuple(shape)), std if problem.std is None else problem.std
            measured = {}
            for whose, x in (("test", truth), ("own", own)):
                y = operator(x)
                y = y + noise * normal(y.shape, SampleStreams(seed + _NOISE), device=device, dtype=y.dtype)
                told = noise
                if problem.blind:
                    told = estimate_noise_level(run.sde, run.score, y, generator=SampleStreams(seed + _LEVEL)).joint
                measured[whose] = Measurement(operator, y, told)
            sheet = [truth[:_COLUMNS], back_projected(measured["test"]).clamp(low, high)[:_COLUMNS]]
            ways = {method: METHODS[method] for method in methods}
            if sr3_steps and name == _SR3_PROBLEM:
                ways["SR3"] = _sr3(run, measured["test"], sr3_steps)
            for method in ways:
                found = {}
                for whose, x in (("test", truth), ("own", own)):
                    found[whose] = restore(
                        run.sde,
                        run.score,
                        measured[whose],
                        method,
                        x.shape,
                        samples=samples,
                        steps=steps,
                        seed=seed,
                        data_std=data_std,
                        ways=ways,
                    )
                said = (float(measured["test"].std), float(measured["own"].std))
                rows.append(_row(name, method, found["test"], truth, found["own"], own, high - low, noise, said))
                seen = found["test"].samples
                sd = low + (high - low) * (seen.std(dim=0) / (high - low) * 2).clamp(max=1)
                sheet += [part[:_COLUMNS] for part in (seen[0], seen[1], seen.mean(dim=0), sd)]
                bar.update(1)
            picture = folder.path / "samples" / f"{_stem(name)}.png"
            named = ["truth", "measured"]
            for method in ways:
                named += [method, "another sample", "mean", "deviation (doubled)"]
            _save(picture, torch.cat(sheet), run, min(_COLUMNS, images), named)
    rows = _joined(earlier, rows)
    _write(folder, rows, made_with)
    return rows


def _joined(earlier: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Both, a new row in the place of the same method's on the same problem, and a problem's rows together."""
    made = {(row.problem, row.method): row for row in (*earlier, *new)}
    problems = list(dict.fromkeys(problem for problem, _ in made))
    return sorted(made.values(), key=lambda row: problems.index(row.problem))


def _earlier(folder: RunFolder, made_with: Mapping[str, Any]) -> list[Row]:
    """The rows that are there, if they were made with the same settings.

    Raises:
        UserError: with the settings that differ.
    """
    entry = folder.results().get("inverse")
    if entry is None:
        return []
    other = [f"{key}={entry.get(key)!r}" for key, value in made_with.items() if entry.get(key) != value]
    if other:
        raise UserError(
            f"got a folder whose results were made with {', '.join(other)}; expected the same: take them, or another "
            "--workdir, so that nothing is lost"
        )
    stored: list[dict[str, Any]] = entry["rows"]
    known: list[dict[str, Any]] = [{k: math.nan if v is None else v for k, v in row.items()} for row in stored]
    return [Row(**row) for row in known]


def check_names(methods: Sequence[str], problems: Sequence[str], prefix: str = "") -> None:
    """Refuses names that no method or problem has, one twice, and none at all; `prefix` is what the user calls them with.

    Raises:
        UserError: with those that there are.
    """
    for what, names, known in (("methods", methods, METHODS), ("problems", problems, PROBLEMS)):
        if not names or any(name not in known for name in names):
            raise UserError(f"got {prefix}{what}={tuple(names)!r}; expected some of {', '.join(known)}")
        if len(set(names)) < len(names):
            raise UserError(f"got {prefix}{what}={tuple(names)!r}; expected each name once: leave the second out")


def chosen_problems(
    problems: Sequence[str], shape: tuple[int, ...], prefix: str = "", *, sr3_steps: int = 0
) -> dict[str, Problem]:
    """Those of the named problems that images of `shape` `(C, H, W)` have, by name.

    Raises:
        UserError: for none, data that are no images, or updates of a network for super-resolution that is none of them.
    """
    if len(shape) != 3:
        raise UserError(f"got data of shape {shape}; expected images (C, H, W), which these problems are of")
    chosen = {name: PROBLEMS[name] for name in problems if PROBLEMS[name].fits(shape)}
    if not chosen:
        fit = ", ".join(name for name, problem in PROBLEMS.items() if problem.fits(shape))
        raise UserError(
            f"got {prefix}problems={tuple(problems)!r}, none of which images of shape {shape} have; expected some of {fit}"
        )
    if sr3_steps and _SR3_PROBLEM not in chosen:
        raise UserError(
            f"got {prefix}sr3_steps={sr3_steps} without {_SR3_PROBLEM}; expected it among {prefix}problems, or 0"
        )
    return chosen


def _stem(problem: str) -> str:
    return f"inverse_{problem.replace(' ', '_')}"


def _row(
    problem: str,
    method: str,
    test: Restored,
    truth: Tensor,
    own: Restored,
    own_truth: Tensor,
    data_range: float,
    std: float,
    told: tuple[float, float],
) -> Row:
    of_mean = psnr(test.samples.mean(dim=0), truth, data_range)
    covered, own_covered = coverage(test.samples, truth), coverage(own.samples, own_truth)
    S, root = len(test.samples), math.sqrt(len(truth))
    return Row(
        problem=problem,
        method=method,
        psnr=float(of_mean.mean()),
        psnr_stderr=float(of_mean.std()) / root,
        psnr_of_sample=float(torch.stack([psnr(x, truth, data_range) for x in test.samples]).mean()),
        coverage=float(covered.mean()),
        coverage_stderr=float(covered.std()) / root,
        expected=(S - 1) / (S + 1),
        own_coverage=float(own_covered.mean()),
        own_coverage_stderr=float(own_covered.std()) / root,
        own_p=rank_p_value(own.samples, own_truth),
        seconds=test.seconds,
        nfe=test.nfe,
        std=std,
        told=told[0],
        own_told=told[1],
    )


def _sr3(run: TrainedRun, measured: Measurement, steps: int) -> Way:
    """Super-resolution by a network that was trained for it, and is shown the measurement."""
    model = train_shown(run, measured, steps)

    def way(sde: SDE, score: Score, y: Measurement, steps: int, data_std: float) -> tuple[Sampler, Score]:
        return DPMSolver(order=2, stochastic=True, steps=steps), model.given(back_projected(y))

    return way


def _save(file: Path, x: Tensor, run: TrainedRun, columns: int, rows: Sequence[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unit = run.transform.to_unit(x[:, : 3 if x.shape[1] >= 3 else 1].cpu())
    save_grid(file, unit, columns, scale=max(1, round(32 / x.shape[-1])), rows=rows)


def _write(folder: RunFolder, rows: Sequence[Row], made_with: Mapping[str, Any]) -> None:
    from workflow.report import table  # it imports the systems

    folder.update_results({"inverse": {**made_with, "rows": [asdict(row) for row in rows]}})
    blind = next(
        (
            f"; where it is unknown, the likelihood says {row.told:.3f}, and {row.own_told:.3f} of the model's own"
            for row in rows
            if PROBLEMS[row.problem].blind
        ),
        "",
    )
    lines = [
        f"{made_with['images']} test images and as many of the model's own, {made_with['samples']} samples each, "
        f"{made_with['steps']} steps, noise {made_with['std']:g} in model units (denoising: 0.5{blind}). Coverage should be "
        f"{rows[0].expected:.3f}; a small p says that the method is wrong of the model's own truths, whatever the model.",
        "",
    ]
    head = (
        "problem",
        "method",
        "PSNR of the mean",
        "of a sample",
        "coverage, test",
        "coverage, own",
        "p of ranks",
        "ms",
        "nfe",
    )
    cells = [
        (
            row.problem,
            row.method,
            f"{row.psnr:.2f} ± {row.psnr_stderr:.2f}",
            f"{row.psnr_of_sample:.2f}",
            f"{row.coverage:.3f} ± {row.coverage_stderr:.3f}",
            f"{row.own_coverage:.3f} ± {row.own_coverage_stderr:.3f}",
            f"{row.own_p:.2g}",
            f"{1e3 * row.seconds:.1f}",
            str(row.nfe),
        )
        for row in rows
    ]
    lines += table(head, cells)
    for name in dict.fromkeys(row.problem for row in rows):
        lines.append(f"![{name}](samples/{_stem(name)}.png)")
    lines += [
        "",
        "Rows of a sheet: truth, measurement, then two samples, mean and standard deviation of "
        f"{', '.join(dict.fromkeys(row.method for row in rows))}.",
    ]
    folder.add_section("Inverse problems", lines)
    print("\ninverse problems, PSNR of the mean in dB")
    for row in rows:
        print(
            f"  {row.problem:<20} {row.method:<16} {row.psnr:6.2f} ± {row.psnr_stderr:.2f}   coverage {row.coverage:.3f}"
        )
