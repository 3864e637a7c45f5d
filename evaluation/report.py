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

import numpy as np
import torch
from torch import Tensor

from data import DataError, Dataset
from data.dataset import check_count, permutation
from evaluation.classifier import train_classifier
from evaluation.estimate import Estimate, check_features
from evaluation.features import Coordinates, Extracted, Features, Pixels
from evaluation.frechet import frechet_distance
from evaluation.inception_score import class_score
from evaluation.kernel import kernel_distance, mmd
from evaluation.neighbours import Memorisation, manifold, memorisation
from evaluation.sliced import sliced_wasserstein

__all__ = ["EvaluationReport", "Measure", "default_features", "evaluate_samples"]

LEAST = 10
"""Samples that can be compared at all."""
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
        split: which held-out data.
        held_out: number of held-out data.
        reference: number of training data compared with.
        group: number of samples that a single comparison had.
        measures: in a fixed order.
        memorisation: how near to training data the samples and the held-out data come, in the features.
        warnings: what makes a number doubtful, one line each.
        seconds: wall time.
    """

    dataset: str
    fingerprint: str
    features: str
    samples: int
    split: str
    held_out: int
    reference: int
    group: int
    measures: tuple[Measure, ...]
    memorisation: Memorisation
    warnings: tuple[str, ...]
    seconds: float

    def __getitem__(self, key: str) -> Measure:
        """The measure of that key or name."""
        for measure in self.measures:
            if key in (measure.key, measure.name):
                return measure
        raise KeyError(f"got the unknown measure {key!r}; expected one of {', '.join(m.key for m in self.measures)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON (NaN as None)."""

        return {
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "features": self.features,
            "samples": self.samples,
            "split": self.split,
            "held_out": self.held_out,
            "reference": self.reference,
            "group": self.group,
            "measures": {
                m.name: {"score": m.score.to_dict(), "floor": m.floor.to_dict(), "higher_is_better": m.higher_is_better}
                for m in self.measures
            },
            "memorisation": self.memorisation.to_dict(),
            "warnings": list(self.warnings),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        rows = [("", "samples", "held-out data", "worse by (standard errors)")]
        for m in self.measures:
            better = "   higher is better" if m.higher_is_better else ""
            rows.append((m.name, str(m.score), str(m.floor), f"{m.errors_from_floor:6.1f}{better}"))
        name, score, floor = (max(len(row[i]) for row in rows) for i in range(3))
        lines = [
            f"{self.samples:,} samples against {self.reference:,} training data of {self.dataset}, in groups of "
            f"{self.group:,}; held out: {self.held_out:,} ({self.split})",
            *(f"{row[0]:{name}}   {row[1]:>{score}}   {row[2]:>{floor}}   {row[3]}" for row in rows),
        ]
        if any(m.score.interval for m in self.measures):
            lines.append("(in brackets: 95 % bootstrap intervals)")
        lines += [f"note: {warning}" for warning in self.warnings]
        return "\n".join(lines)


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


def _as_samples(samples: Tensor | np.ndarray, dataset: Dataset) -> Tensor:
    """The samples on the CPU, checked."""
    if isinstance(samples, np.ndarray) and samples.dtype.kind in "biuf":
        samples = torch.from_numpy(np.ascontiguousarray(samples))
    if not isinstance(samples, Tensor):
        raise DataError(
            f"got samples of class {type(samples).__name__}; expected a tensor or an array of numbers (N, *)"
        )
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
            f"got samples of {samples.dtype} {tuple(samples.shape)}; expected {wanted} like {dataset.name}{hint}"
        )
    if images and samples.dtype != torch.uint8:
        raise DataError(f"got samples of {samples.dtype}; expected {wanted}")
    if len(samples) < LEAST:
        raise DataError(
            f"got {len(samples)} samples; expected at least {LEAST}, and for numbers that mean "
            "something as many as held-out data"
        )
    if dataset.levels is not None and int(samples.max()) >= dataset.levels:
        raise DataError(f"got samples with a grey value {int(samples.max())}; expected 0..{dataset.levels - 1}")
    if not images and not bool(torch.isfinite(samples).all()):
        raise DataError(
            "got samples with NaN or infinity; expected finite numbers: the sampler or the network diverged"
        )
    return samples.detach().cpu()


def _mean(estimates: list[Estimate]) -> Estimate:
    """Of independent groups, given the reference that they share: their mean, with the error that follows from theirs."""
    count = len(estimates)
    if count == 1:
        return estimates[0]

    def spread(deviations: list[float]) -> float:
        return math.sqrt(math.fsum(deviation**2 for deviation in deviations)) / count

    value = math.fsum(e.value for e in estimates) / count
    sides = [(e.value - e.interval[0], e.interval[1] - e.value) for e in estimates if e.interval is not None]
    return Estimate(
        value=value,
        stderr=spread([e.stderr for e in estimates]),
        # Each side's widths add up as standard errors do.
        interval=(value - spread([low for low, _ in sides]), value + spread([high for _, high in sides]))
        if len(sides) == count
        else None,
    )


_MEASURES: dict[str, Callable[[Tensor, Tensor], Estimate]] = {
    "FD": frechet_distance,
    "KD": kernel_distance,
    "MMD": mmd,
    "SW": sliced_wasserstein,
}
_MANIFOLD = ("precision", "recall", "density", "coverage")
_INCEPTION_NAMES = {"FD": "FID", "KD": "KID", "CS": "IS"}
AVAILABLE = (*_MEASURES, *_MANIFOLD, "CS")
_UNKNOWN = Estimate(value=math.nan, stderr=math.nan)


def _measure(
    group: Extracted, reference: Extracted, keys: tuple[str, ...], failed: dict[str, str]
) -> dict[str, Estimate]:
    """The measures of these keys; one that has no value here is NaN, and `failed` says why."""
    # Distances to nearest neighbours depend on how many there are: as many data as samples.
    size = min(len(group.values), len(reference.values))
    found = dict.fromkeys(keys, _UNKNOWN)
    for key in keys:
        try:
            if key in _MEASURES:
                found[key] = _MEASURES[key](group.values, reference.values)
            elif key == "CS" and group.log_probs is not None:
                found[key] = class_score(group.log_probs)
            elif key in _MANIFOLD and found[key] is _UNKNOWN:
                four = manifold(group.values[:size], reference.values[:size])
                found |= {name: getattr(four, name) for name in _MANIFOLD if name in keys}
        except DataError as error:
            failed[key] = str(error)
    return found


def _rows(x: Tensor, most: int) -> Tensor:
    """At most that many rows, chosen at random in a fixed way (files may be sorted by class)."""
    return x[torch.from_numpy(permutation(len(x), seed=0)[:most].copy())]


def _extract(features: Features, x: Tensor, what: str) -> Extracted:
    found = features.extract(x)
    return Extracted(check_features(found.values, what), found.log_probs)


def _check_keys(measures: tuple[str, ...] | None) -> tuple[str, ...]:
    if measures is None:
        return AVAILABLE
    if isinstance(measures, str) or len(measures) == 0:
        raise DataError(f"got measures={measures!r}; expected some of {', '.join(AVAILABLE)}, as in ('FD',)")
    unknown = [key for key in measures if key not in AVAILABLE]
    if unknown:
        raise DataError(f"got the unknown measure {unknown[0]!r}; expected some of {', '.join(AVAILABLE)}")
    return tuple(measures)


def _part(extracted: Extracted, rows: slice) -> Extracted:
    return Extracted(extracted.values[rows], None if extracted.log_probs is None else extracted.log_probs[rows])


def evaluate_samples(
    samples: Tensor | np.ndarray,
    dataset: Dataset,
    *,
    features: Features | None = None,
    measures: tuple[str, ...] | None = None,
    split: str = "test",
    max_reference: int = 10_000,
) -> EvaluationReport:
    """Compare samples with a data set by every measure.

    Args:
        samples: (N, *) in data units: uint8 for images (`transform.to_data` of a sampler's x), any real
            numbers for continuous data. In random order: they are cut into groups.
        dataset: its train split is the reference.
        features: what to compare in; `default_features(dataset)` where None.
        measures: keys of those wanted, all where None: FD, KD, MMD, SW, precision, recall, density, coverage,
            CS.
        split: of the held-out data; where that is cut out of train, the rest of train is the reference.
        max_reference: at most this many training and held-out data are used.

    Returns:
        An `EvaluationReport`; `print` it.

    Raises:
        DataError: samples of the wrong kind, too few, out of range or not finite; features that are NaN; an unknown
            measure or split. A single measure that has no value is NaN, with a warning.
    """
    start = time.perf_counter()
    samples = _as_samples(samples, dataset)
    keys = _check_keys(measures)
    check_count("max_reference", max_reference, LEAST, 2**31 - 1)
    if split in ("train", "fit"):
        raise DataError(f"got split={split!r}, which the model was trained on; expected held-out data such as 'test'")
    held_out = _rows(dataset.split(split).x, max_reference)
    train = _rows(dataset.split("train" if split in dataset.splits else "fit").x, max_reference)
    if features is None:
        features = default_features(dataset)
    if min(len(held_out), len(train)) < LEAST:
        raise DataError(
            f"got {dataset.name} with {len(held_out)} held-out and {len(train)} training data; expected at least "
            f"{LEAST} of each"
        )
    size = min(len(samples), len(held_out), len(train))
    groups = min(_MAX_GROUPS, len(samples) // size)
    of_samples = _extract(features, samples[: groups * size], "samples")
    of_held_out, of_train = _extract(features, held_out, "held-out"), _extract(features, train, "training")
    if of_samples.log_probs is None:
        keys = tuple(key for key in keys if key != "CS")

    failed: dict[str, str] = {}
    per_group = [
        _measure(_part(of_samples, slice(i * size, (i + 1) * size)), of_train, keys, failed) for i in range(groups)
    ]
    floors = _measure(_part(of_held_out, slice(size)), of_train, keys, failed)
    memorised = memorisation(of_samples.values, of_held_out.values, of_train.values)
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
        split=split,
        held_out=len(held_out),
        reference=len(train),
        group=size,
        measures=tuple(found),
        memorisation=memorised,
        warnings=(
            *(f"{key} has no value: {reason}" for key, reason in failed.items()),
            *_warnings(samples, of_samples, size, groups),
            *_class_shares(of_samples, of_train, dataset),
            *((str(memorised).splitlines()[-1],) if memorised.suspicious else ()),
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
