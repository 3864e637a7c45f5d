"""Samples against data: every measure beside what held-out data score, with errors.

A distance estimated from n samples is biased by an amount that depends on n, so a number alone says little.
Here the samples are cut into groups of as many as there are held-out data, each group is compared with the
training data, and the groups' mean is reported. Held-out data are compared with the same training data in the
same way: that is the floor (for measures where more is better, the ceiling), the value of a perfect sampler.
Errors are standard errors over the samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data import DataError, Dataset
from data.dataset import permutation
from evaluation.classifier import train_classifier
from evaluation.estimate import Estimate
from evaluation.features import Coordinates, Extracted, Features, Pixels
from evaluation.frechet import frechet_distance
from evaluation.inception_score import class_score
from evaluation.kernel import kernel_distance, mmd
from evaluation.neighbours import manifold, nearest
from evaluation.sliced import sliced_wasserstein

__all__ = ["EvaluationReport", "Measure", "default_features", "evaluate_samples"]

_LEAST = 10
_MAX_GROUPS = 10


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of samples, beside that of held-out data.

    Args:
        key: short name: FD, KD, MMD, SW, precision, recall, density, coverage, CS (on Inception features FID,
            KID, IS).
        name: key and features, as in FD[clf-digits-1a2b].
        score: of the samples.
        floor: of held-out data, the value of a perfect sampler up to its own error.
        higher_is_better: the direction.
    """

    key: str
    name: str
    score: Estimate
    floor: Estimate
    higher_is_better: bool

    @property
    def errors_from_floor(self) -> float:
        """How much worse than held-out data, in standard errors of the difference; negative where better."""
        worse = self.score.value - self.floor.value
        if self.higher_is_better:
            worse = -worse
        error = math.hypot(self.score.stderr, self.floor.stderr)
        if error == 0:
            return 0.0 if worse == 0 else math.copysign(math.inf, worse)
        return worse / error


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What `evaluate_samples` found.

    Args:
        dataset: name.
        fingerprint: of the data set.
        features: name of the features.
        samples: number of samples.
        held_out: number of held-out data, of the test split.
        reference: number of training data compared with.
        group: number of samples that a single comparison had.
        measures: in a fixed order.
        warnings: what makes a number doubtful, one line each.
        seconds: wall time.
    """

    dataset: str
    fingerprint: str
    features: str
    samples: int
    held_out: int
    reference: int
    group: int
    measures: tuple[Measure, ...]
    warnings: tuple[str, ...]
    seconds: float

    def __getitem__(self, key: str) -> Measure:
        """The measure of that key or name."""
        for measure in self.measures:
            if key in (measure.key, measure.name):
                return measure
        raise KeyError(f"no measure {key!r}, expected one of {', '.join(m.key for m in self.measures)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON (NaN as None)."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        def estimate(e: Estimate) -> dict[str, Any]:
            found: dict[str, Any] = {"value": plain(e.value), "stderr": plain(e.stderr)}
            if e.interval is not None:
                found["interval"] = [plain(bound) for bound in e.interval]
            return found

        return {
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "features": self.features,
            "samples": self.samples,
            "held_out": self.held_out,
            "reference": self.reference,
            "group": self.group,
            "measures": {
                m.name: {"score": estimate(m.score), "floor": estimate(m.floor), "higher_is_better": m.higher_is_better}
                for m in self.measures
            },
            "warnings": list(self.warnings),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        width = max(len(measure.name) for measure in self.measures)
        lines = [
            f"{self.samples:,} samples against {self.reference:,} training data of {self.dataset}, in groups of "
            f"{self.group:,}; held out: {self.held_out:,}",
            f"{'':{width}}   {'samples':>20}   {'held-out data':>20}   worse by (standard errors)",
        ]
        for measure in self.measures:
            better = "higher is better" if measure.higher_is_better else ""
            lines.append(
                f"{measure.name:{width}}   {_shown(measure.score):>20}   {_shown(measure.floor):>20}   "
                f"{measure.errors_from_floor:6.1f}   {better}".rstrip()
            )
        lines += [f"note: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _shown(estimate: Estimate) -> str:
    """The value to the digit that its error reaches, as in 1.23 ± 0.04."""
    value, error = estimate.value, estimate.stderr
    if not math.isfinite(error) or error <= 0:
        return f"{value:.4g}"
    digits = min(12, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def default_features(dataset: Dataset, **options: Any) -> Features:
    """The features that a data set is judged by: a classifier where there are labelled images, else the
    pixels; the coordinates of continuous data.

    Args:
        dataset: the data.
        options: of `train_classifier` (seed, steps, cache).
    """
    if dataset.levels is None:
        return Coordinates()
    if dataset.num_classes >= 2:
        return train_classifier(dataset, **options)
    return Pixels(levels=dataset.levels)


def _check_samples(samples: Tensor, dataset: Dataset) -> None:
    expected = dataset.split("train").x
    images = dataset.levels is not None
    wanted = f"{'uint8' if images else 'floating-point'} (N, {', '.join(map(str, dataset.event_shape))})"
    if samples.shape[1:] != expected.shape[1:] or samples.is_floating_point() == images:
        hint = (
            "; samples in model units become that by transform.to_data"
            if samples.is_floating_point() and images
            else ""
        )
        raise DataError(
            f"samples are {samples.dtype} {tuple(samples.shape)}, expected {wanted} like {dataset.name}{hint}"
        )
    if images and samples.dtype != torch.uint8:
        raise DataError(f"samples are {samples.dtype}, expected {wanted}")
    if len(samples) < _LEAST:
        raise DataError(
            f"there are {len(samples)} samples, expected at least {_LEAST}, and for numbers that mean "
            "something as many as held-out data"
        )
    if dataset.levels is not None and int(samples.max()) >= dataset.levels:
        raise DataError(f"samples have a grey value {int(samples.max())}, expected 0..{dataset.levels - 1}")
    if not images and not bool(torch.isfinite(samples).all()):
        raise DataError("samples hold NaN or infinity, expected finite numbers: the sampler or the network diverged")


def _mean(estimates: list[Estimate]) -> Estimate:
    """Of independent groups: their mean, with the error that follows from theirs."""
    count = len(estimates)
    if count == 1:
        return estimates[0]
    return Estimate(
        value=math.fsum(e.value for e in estimates) / count,
        stderr=math.sqrt(math.fsum(e.stderr**2 for e in estimates)) / count,
    )


_MEASURES: dict[str, tuple[Callable[[Tensor, Tensor], Estimate], bool]] = {
    "FD": (frechet_distance, False),
    "KD": (kernel_distance, False),
    "MMD": (mmd, False),
    "SW": (sliced_wasserstein, False),
}
_MANIFOLD = ("precision", "recall", "density", "coverage")
_INCEPTION_NAMES = {"FD": "FID", "KD": "KID", "CS": "IS"}
AVAILABLE = (*_MEASURES, *_MANIFOLD, "CS")


def _measure(group: Extracted, reference: Extracted, keys: tuple[str, ...]) -> dict[str, Estimate]:
    found = {key: _MEASURES[key][0](group.values, reference.values) for key in keys if key in _MEASURES}
    if any(key in _MANIFOLD for key in keys):
        # Distances to nearest neighbours depend on how many there are: as many data as samples.
        size = min(len(group.values), len(reference.values))
        four = manifold(group.values[:size], reference.values[:size])
        found |= {key: getattr(four, key) for key in _MANIFOLD if key in keys}
    if "CS" in keys and group.log_probs is not None:
        found["CS"] = class_score(group.log_probs)
    return found


def _rows(x: Tensor, most: int) -> Tensor:
    """At most that many rows, chosen at random in a fixed way (files may be sorted by class)."""
    return x[torch.from_numpy(permutation(len(x), seed=0)[:most].copy())]


def _part(extracted: Extracted, rows: slice) -> Extracted:
    return Extracted(extracted.values[rows], None if extracted.log_probs is None else extracted.log_probs[rows])


def evaluate_samples(
    samples: Tensor,
    dataset: Dataset,
    *,
    features: Features | None = None,
    measures: tuple[str, ...] | None = None,
    max_reference: int = 10_000,
) -> EvaluationReport:
    """Compare samples with a data set by every measure.

    Args:
        samples: (N, *) in data units: uint8 for images (`transform.to_data` of a sampler's x), any real
            numbers for continuous data. In random order: they are cut into groups.
        dataset: its train split is the reference and its test split the held-out data.
        features: what to compare in; `default_features(dataset)` where None.
        measures: keys of those wanted, all where None: FD, KD, MMD, SW, precision, recall, density, coverage,
            CS.
        max_reference: at most this many training and held-out data are used.

    Returns:
        An `EvaluationReport`; `print` it.

    Raises:
        DataError: samples of the wrong kind, too few, out of range or not finite; features that are NaN.
    """
    start = time.perf_counter()
    _check_samples(samples, dataset)
    keys = AVAILABLE if measures is None else tuple(measures)
    unknown = [key for key in keys if key not in AVAILABLE]
    if unknown:
        raise DataError(f"measure {unknown[0]!r} is unknown, expected some of {', '.join(AVAILABLE)}")
    if max_reference < _LEAST:
        raise DataError(f"max_reference is {max_reference}, expected at least {_LEAST}")
    if features is None:
        features = default_features(dataset)
    samples = samples.detach().cpu()
    held_out = _rows(dataset.split("test").x, max_reference)
    train = _rows(dataset.split("train").x, max_reference)
    if min(len(held_out), len(train)) < _LEAST:
        raise DataError(
            f"{dataset.name} has {len(held_out)} held-out and {len(train)} training data, expected at least "
            f"{_LEAST} of each"
        )
    size = min(len(samples), len(held_out), len(train))
    groups = min(_MAX_GROUPS, len(samples) // size)
    of_samples, of_held_out, of_train = (features.extract(x) for x in (samples[: groups * size], held_out, train))
    if of_samples.log_probs is None:
        keys = tuple(key for key in keys if key != "CS")

    per_group = [_measure(_part(of_samples, slice(i * size, (i + 1) * size)), of_train, keys) for i in range(groups)]
    floors = _measure(_part(of_held_out, slice(size)), of_train, keys)
    found = []
    for key in keys:
        short = _INCEPTION_NAMES.get(key, key) if features.inception else key
        found.append(
            Measure(
                key=short,
                name=f"{short}[{features.name}]",
                score=_mean([g[key] for g in per_group]),
                floor=floors[key],
                higher_is_better=key in (*_MANIFOLD, "CS"),
            )
        )
    return EvaluationReport(
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        features=features.name,
        samples=len(samples),
        held_out=len(held_out),
        reference=len(train),
        group=size,
        measures=tuple(found),
        warnings=(
            *_warnings(samples, of_samples, size, groups),
            *_class_shares(of_samples, of_train, dataset),
            *_memorised(of_samples, of_held_out, of_train),
        ),
        seconds=time.perf_counter() - start,
    )


def _warnings(samples: Tensor, extracted: Extracted, size: int, groups: int) -> tuple[str, ...]:
    notes = []
    width = extracted.values.shape[1]
    if size <= width:
        notes.append(
            f"a comparison had {size} samples for {width} features: covariances are singular and the Fréchet "
            "distance is mostly bias; use more samples or fewer features"
        )
    if bool((samples == samples[:1]).all()):
        notes.append("all samples are equal")
    elif bool((extracted.values == extracted.values[:1]).all()):
        notes.append("all samples have equal features")
    elif len(torch.unique(samples[:2000].flatten(1), dim=0)) < min(2000, len(samples)):
        notes.append("some samples are exact copies of others")
    if groups * size < len(samples):
        notes.append(
            f"{len(samples) - groups * size:,} of {len(samples):,} samples did not fill a group and were left out"
        )
    return tuple(notes)


def _class_shares(samples: Extracted, reference: Extracted, dataset: Dataset) -> tuple[str, ...]:
    """A line for every class of which there are clearly too few or too many, by the features' own classifier."""
    if samples.log_probs is None or reference.log_probs is None or samples.log_probs.shape[1] != dataset.num_classes:
        return ()
    p, q = samples.log_probs.exp(), reference.log_probs.exp()
    error = (p.var(dim=0) / len(p) + q.var(dim=0) / len(q)).sqrt()
    away = (p.mean(dim=0) - q.mean(dim=0)) / error.clamp(min=1e-12)
    return tuple(
        f"class {dataset.classes[k] if dataset.classes else k}: {100 * float(p[:, k].mean()):.1f} % of the samples, "
        f"{100 * float(q[:, k].mean()):.1f} % of the data ({float(away[k]):+.0f} standard errors)"
        for k in range(p.shape[1])
        if abs(float(away[k])) > 5
    )


def _memorised(samples: Extracted, held_out: Extracted, reference: Extracted) -> tuple[str, ...]:
    """A line where too many samples are nearer to a training sample than nearly all held-out data are. (Distances
    between laws do not see that: copies of the training data follow its law.)"""
    near, _ = nearest(samples.values, reference.values)
    usual, _ = nearest(held_out.values, reference.values)
    share = float((near < torch.quantile(usual, 0.05)).double().mean())
    error = math.sqrt(0.05 * 0.95 * (1 / len(near) + 1 / len(usual)))
    if share < 0.05 + 5 * error:
        return ()
    return (
        f"{100 * share:.0f} % of the samples are nearer to a training sample than 95 % of held-out data are: "
        "look for memorised ones",
    )
