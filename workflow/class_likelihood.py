r"""Classification by likelihood: which class makes a sample likeliest?

    p(k | x) = p(x | k) p(k) / sum_j p(x | j) p(j)

with p(x | k) the exact density of the flow of the score given class k (Zimmermann et al. 2021, arXiv:2107.04786, classify by
a score's likelihood; Li et al. 2023, arXiv:2303.16203, by a bound). No classifier is trained. All classes are given the same
dequantisation noise and the same probes of the trace, so that much of their error cancels in the differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import Split
from likelihood import Hutchinson, Method, bits_per_dim, fast
from numerics import SampleStreams
from workflow import progress
from workflow.chunks import Chunks
from workflow.score import from_arrays
from workflow.splits import checked_split
from workflow.trained_run import TrainedRun

_CHUNK = 50


@dataclass(frozen=True, kw_only=True)
class ByClass:
    """Bits/dim of samples under every class.

    Attributes:
        bits: `(n, K)` bits/dim.
        labels: `(n,)`, the true classes.
        prior: `(K,)`, the shares of the classes in the training data.
        dimensions: D, of a sample.
        nfe: forward evaluations for one batch and one class.
    """

    bits: Tensor
    labels: Tensor
    prior: Tensor
    dimensions: int
    nfe: int

    @property
    def log_posterior(self) -> Tensor:
        """log p(k | x), `(n, K)`."""
        log_likelihood = -self.bits * (self.dimensions * math.log(2))
        return (log_likelihood + self.prior.log()).log_softmax(dim=1)


def class_shares(split: Split, classes: int) -> Tensor:
    """The share of each class, `(K,)`, float64, none of them 0."""
    assert split.labels is not None
    counts = split.labels.cpu().bincount(minlength=classes).double() + 0.5
    return counts / counts.sum()


def labelled_method(run: TrainedRun, steps: int) -> Method:
    """A flow of that many steps, on a grid placed by a pilot run on training data with their labels."""
    labels = run.dataset.split("train").labels
    assert labels is not None  # the model has labels
    pilot = run.transform.centres(run.pilot()).to(torch.float32)
    return fast(run.sde, run.model.condition(labels[: len(pilot)]), pilot, steps=steps, data_std=run.flow.data_std)


def bits_by_class(run: TrainedRun, *, n: int, steps: int, split: str = "test") -> ByClass:
    """The bits/dim of the first `n` samples of a split under each class, in chunks that are kept.

    Args:
        steps: of the flow, on a grid placed by a pilot run on training data with their classes.
    """
    model, dataset, seed = run.model, run.dataset, run.setup.options.seed
    data, train = checked_split(dataset, split), dataset.split("train")
    classes = int(model.num_classes or 0)
    assert data.labels is not None and train.labels is not None
    n = min(n, len(data))
    stated = {
        "split": split,
        "images": n,
        "steps": steps,
        "classes": classes,
        "seed": seed,
        "chunk": _CHUNK,
        "model": run.fingerprint,
        "data": dataset.fingerprint,
        "sde": repr(run.sde),
        "torch": torch.__version__,
    }
    chunks = Chunks(run.folder.path / "by_class", split, stated, n, _CHUNK)
    if not chunks.complete:
        method = labelled_method(run, steps)
        with progress.bar(total=n, initial=chunks.done, name="likelihood under each class", unit=run.setup.noun) as bar:
            for k, first, last in chunks.todo(alone=True):
                x, ids, found, nfe = data.x[first:last].to(run.device), data.ids[first:last], [], 0
                for label in range(classes):
                    result = bits_per_dim(
                        run.sde,
                        chunks.watched(model.condition(label)),
                        x,
                        run.transform,
                        method=method,
                        divergence=Hutchinson(probes=1),
                        companions=0,
                        generator=SampleStreams(seed, ids),
                    )
                    found.append(result.per_image.cpu())
                    nfe = max(nfe, result.nfe)
                chunks.save(k, ids=ids, bits=torch.stack(found, dim=1), nfe=nfe)
                bar.update(last - first)
    parts = chunks.load("bits", also=("nfe",), ids=data.ids)
    return ByClass(
        bits=torch.cat([torch.from_numpy(part["bits"]) for part in parts]),
        labels=data.labels[:n].cpu(),
        prior=class_shares(train, classes),
        dimensions=dataset.dim,
        nfe=max(int(part["nfe"]) for part in parts),
    )


def bits_of_classes(parts: Path, labels: Tensor, classes: int) -> list[tuple[int, float, float]]:
    """For each class the number of its samples that have values, their mean bits/dim and its standard error, from the parts of
    a scored split, or from a survey's, whose random sample stands for the samples that were not scored.

    Args:
        parts: the folder of the values per sample; labels: of the split, `(N,)`.
    """
    if (parts / "survey.npz").exists():
        values, weights = _surveyed(parts / "survey.npz")
    else:
        values = torch.cat([from_arrays(_arrays(file)).per_image for file in sorted(parts.glob("part_*.npz"))])
        weights = torch.ones_like(values)
    labels = labels[: len(values)].cpu()
    rows = []
    for k in range(classes):
        own = (labels == k) & values.isfinite() & (weights > 0)
        y, w = values[own], weights[own]
        n, mean = len(y), float((w * y).sum() / w.sum()) if len(y) else math.nan
        spread = float((w * (y - mean)).square().sum().sqrt() / w.sum()) if n > 1 else math.nan
        rows.append((n, mean, spread * math.sqrt(n / (n - 1)) if n > 1 else math.nan))
    return rows


def _surveyed(file: Path) -> tuple[Tensor, Tensor]:
    """The values of a surveyed split `(N,)`, NaN where an image was not scored, and for how many images each stands."""
    stored = {name: torch.from_numpy(v) for name, v in _arrays(file).items()}
    scored, suspect = torch.isin(stored["ids"], stored["scored_ids"]), stored["suspect"]
    values = torch.full((len(scored),), math.nan, dtype=torch.float64)
    values[scored] = stored["scored"] + stored["correction"]
    random = scored & ~suspect
    weights = scored.double()
    weights[random] = float((~suspect).sum()) / max(1, int(random.sum()))
    return values, weights


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as part:
        return {name: part[name] for name in part.files}
