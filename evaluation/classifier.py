"""The default features: a small classifier trained on the data set at hand.

Features that are trained to tell the classes of these images apart see a missing class, which random or
generic ones do not, and need no download. Their values mean nothing for other data sets, so they are never
called FID: a score is named by the data set and by four digits of a hash of the weights, FD[clf-digits-1a2b].
Trained on one thread from one seed, the weights are the same on the same kind of machine; where they are not,
the names differ, and the file in the cache can be copied.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from data import DataError, Dataset, Split
from evaluation.features import Extracted, Features, unit_images
from evaluation.network import ConvolutionalClassifier

__all__ = ["Classifier", "train_classifier"]

_BATCH = 128
_STANDARDISE = 10_000
_RECIPE = 2
"""Raised when anything below changes that decides the weights: files of another recipe are not used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier(Features):
    """Features of a trained classifier.

    Args:
        network: images (B, C, H, W) in [0, 1] to features (B, 64 + K) and class log-probabilities.
        dataset: name of the data set that it was trained on.
        event_shape: (C, H, W).
        levels: grey levels of the images.
        accuracy: on the test split.
    """

    network: ConvolutionalClassifier = field(repr=False)
    dataset: str
    event_shape: tuple[int, ...]
    levels: int
    accuracy: float

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"clf-{self.dataset}-{self.weights_hash[:4]}"

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights, hexadecimal."""
        digest = hashlib.sha256()
        for key, value in sorted(self.network.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def extract(self, data: Tensor) -> Extracted:
        if tuple(data.shape[1:]) != self.event_shape:
            raise DataError(
                f"got images of shape {tuple(data.shape)}; expected (N, "
                f"{', '.join(map(str, self.event_shape))}) as in {self.dataset}"
            )
        features, log_probs = _apply(self.network, data, self.levels)
        return Extracted(features.double(), log_probs.double())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, so that the weights do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "score_sde"


def train_classifier(
    dataset: Dataset, *, seed: int = 0, steps: int | None = None, cache: str | os.PathLike[str] | bool | None = True
) -> Classifier:
    """Train the classifier of a labelled image data set, or read it from the cache.

    Args:
        dataset: with labels of at least two classes.
        seed: of weights and batches.
        steps: of AdamW, with batches of 128; three times through the data, and at least 300, where None.
        cache: folder of trained classifiers; True for the user's cache folder, None or False to train anew.

    Raises:
        DataError: no images or labels, a cached file that is damaged, or training that diverged.
    """
    train = dataset.split("train")
    if dataset.levels is None or train.labels is None or dataset.num_classes < 2:
        raise DataError(
            f"got {dataset.name} with {'no labels' if train.labels is None else 'no images or one class'}; expected "
            "labelled images for classifier features; use Pixels or Coordinates"
        )
    steps = max(300, 3 * len(train) // _BATCH) if steps is None else steps
    if steps < 1:
        raise DataError(f"got steps={steps}; expected at least 1")
    place: Path | None = None
    recipe = {
        "recipe": _RECIPE,
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "seed": seed,
        "steps": steps,
        "classes": dataset.num_classes,
        "event_shape": list(dataset.event_shape),
        "levels": dataset.levels,
    }
    if cache:
        key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
        folder = _default_cache() if cache is True else Path(cache).expanduser()
        place = folder / f"clf-{dataset.name}-{key}.safetensors"
        if place.exists():
            return _load(place, dataset, dataset.levels, recipe)
    generator = torch.Generator().manual_seed(seed)
    network = ConvolutionalClassifier(dataset.event_shape, dataset.num_classes, generator)
    with _one_thread():
        try:
            _fit(network, train.x, train.labels, dataset.levels, steps, generator)
        except FloatingPointError as error:
            raise DataError(f"{dataset.name}: {error}; expected a finite one; look at the data") from error
        network.eval().requires_grad_(False)
        network.standardise(_apply(network, train.x[:_STANDARDISE], dataset.levels)[0])
        accuracy = _accuracy(network, dataset.split("test"), dataset.levels)
    if place is not None:
        _save(place, network, {**recipe, "accuracy": accuracy})
    return Classifier(
        network=network, dataset=dataset.name, event_shape=dataset.event_shape, levels=dataset.levels, accuracy=accuracy
    )


def _fit(
    network: ConvolutionalClassifier, x: Tensor, labels: Tensor, levels: int, steps: int, generator: torch.Generator
) -> None:
    """Minimise the cross-entropy. Raises FloatingPointError where it is not finite."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for step in range(steps):
        index = torch.randint(len(x), (_BATCH,), generator=generator)
        _, log_probs = network(unit_images(x[index], levels))
        loss = functional.nll_loss(log_probs, labels[index])
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"the classifier's loss is {float(loss)} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _apply(network: ConvolutionalClassifier, images: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Features (N, F) and log-probabilities (N, K), in float32, on the CPU."""
    with torch.no_grad():
        parts = [network(unit_images(chunk, levels)) for chunk in images.split(500)]
    return torch.cat([features for features, _ in parts]), torch.cat([log_probs for _, log_probs in parts])


def _accuracy(network: ConvolutionalClassifier, test: Split, levels: int) -> float:
    if test.labels is None:
        return math.nan
    return float((_apply(network, test.x, levels)[1].argmax(dim=1) == test.labels).double().mean())


def _save(place: Path, network: ConvolutionalClassifier, facts: dict[str, object]) -> None:
    from safetensors.torch import save_file

    scratch = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: value.contiguous() for key, value in network.state_dict().items()},
            scratch,
            metadata={"facts": json.dumps(facts)},
        )
        scratch.replace(place)
    except OSError as error:
        raise DataError(
            f"{place} cannot be written: {error.strerror or error}; set cache=None to work without a cache"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def _load(place: Path, dataset: Dataset, levels: int, recipe: dict[str, object]) -> Classifier:
    from safetensors import SafetensorError, safe_open

    network = ConvolutionalClassifier(dataset.event_shape, dataset.num_classes, torch.Generator())
    try:
        with safe_open(place, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "null"))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        if not isinstance(facts, dict) or any(facts.get(key) != value for key, value in recipe.items()):
            raise DataError(f"{place} belongs to another data set or recipe than its name says; delete it")
        if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            raise DataError(f"{place} holds NaN or infinity; delete it")
        network.load_state_dict(weights)
        accuracy = float(facts["accuracy"])
    except DataError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{place} is not a cached classifier ({reason}); delete it, and it is trained again") from error
    network.eval().requires_grad_(False)
    return Classifier(
        network=network, dataset=dataset.name, event_shape=dataset.event_shape, levels=levels, accuracy=accuracy
    )
