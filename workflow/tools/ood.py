"""Bits/dim per image of a run's test split beside those of other data: can the model tell them apart?

    score-sde ood --run runs/vp --other noise

The other data are a data set of the same shape and number of levels, or `noise` (uniform grey levels); vertically flipped test
images and noise are always scored too. An image's value depends neither on its batch mates nor on the order: noise and
probes are keyed by the image's number. Draws the histograms to RUN/ood_OTHER.png and writes the values to RUN/ood_OTHER.npz.
Given a class with --label, a model has only the test images of that class to tell from other data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
from data import DataError
from evaluation import auroc
from likelihood import UniformDequantizer, fast
from numerics import SampleStreams
from workflow.outside import bits_of_images
from workflow.tools import arguments as shared
from workflow.trained_run import TrainedRun, load_run


def others(run: TrainedRun, name: str, n: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and ids of everything that is scored, at most `n` of each, by name.

    Raises:
        DataError: for data of another shape or number of levels.
    """
    levels = run.transform.levels
    if levels is None:
        raise DataError(f"got the run {run.folder} on {run.dataset.name}, which has no grey levels; expected images")
    test = run.dataset.split("test")
    part = test.take(slice(0, min(n, len(test)) if n else len(test)))
    found = {"test": (part.x, part.ids), "flipped": (part.x.flip(-2), part.ids)}
    noise = torch.randint(0, levels, part.x.shape, generator=torch.Generator().manual_seed(seed), dtype=part.x.dtype)
    found["noise"] = (noise, torch.arange(len(noise)))
    if name != "noise":
        other = data.create(name)
        if other.levels != levels or other.event_shape != run.dataset.event_shape:
            raise DataError(
                f"got {name} with samples of shape {other.event_shape} and {other.levels} levels; expected those of "
                f"{run.dataset.name}: {run.dataset.event_shape} and {levels}"
            )
        split = other.split("test")
        split = split.take(slice(0, min(n, len(split)) if n else len(split)))
        found[name] = (split.x, split.ids)
    return found


def draw(values: dict[str, np.ndarray], first: str, second: str, file: Path) -> None:
    """The histograms of two of the data sets."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    both = np.concatenate([values[first], values[second]])
    edges = np.linspace(both.min(), both.max(), 41).tolist()
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for name in (first, second):
        axes.hist(values[name], bins=edges, density=True, alpha=0.6, label=name)
    axes.set_xlabel("bits/dim")
    axes.set_ylabel("density")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    """Scores, and prints how well bits/dim tell the data apart."""
    parser = shared.parser("Score a run's test split and other data in bits/dim, and draw the histograms.")
    parser.add_argument("--other", default="noise", help="a data set of the same shape and levels, noise or flipped")
    parser.add_argument("--limit", default=0, type=shared.integer(0), help="number of images of each; 0: all")
    parser.add_argument("--steps", default=64, type=shared.integer(1), help="number of steps of the flow's solver")
    parser.add_argument("--batch_size", default=64, type=shared.integer(1), help="number of images scored together")
    parser.add_argument("--seed", default=0, type=shared.integer(0), help="seed of noise and probes")
    shared.add_label(
        parser, "class whose test images are scored, and that all are given, for a class-conditional run; None: any"
    )
    options = shared.parsed(parser, arguments)
    run = load_run(options.run, options.device)
    run = run if options.label is None else run.of_class(options.label)
    name = options.other
    if options.limit == 1 or len(run.dataset.split("test")) < 2:
        raise DataError(
            "got one test image; expected two or more, to tell other data from: raise --limit, or 0 for all"
        )
    scored = others(run, "noise" if name == "flipped" else name, options.limit, options.seed)
    x, _ = UniformDequantizer()(
        run.pilot(), run.transform, run.sde, run.sde.t_min, generator=SampleStreams(options.seed)
    )
    method = fast(run.sde, run.score, x, steps=options.steps, data_std=run.flow.data_std)
    values: dict[str, np.ndarray] = {}
    for which, (images, ids) in scored.items():
        found = bits_of_images(
            run, images, ids, method=method, name=which, batch_size=options.batch_size, seed=options.seed
        )
        values[which] = found.per_image.cpu().numpy()
        for line in found.failures:
            print(f"{which}: {line}")
    finite = {which: v[np.isfinite(v)] for which, v in values.items()}
    of = "" if options.label is None else f"_class_{options.label}"
    file = options.run / f"ood_{name}{of}.png"
    draw(finite, "test", name, file)
    arrays: Any = values
    np.savez(file.with_suffix(".npz"), **arrays)
    summary = {
        which: {
            "mean": float(v.mean()),
            "images": len(v),
            "auroc": auroc(*map(torch.from_numpy, (finite["test"], v))).value,
        }
        for which, v in finite.items()
        if len(v)
    }
    run.folder.update_results({f"ood/{name}{of}": summary})
    for which, row in summary.items():
        print(f"{which}: {row['mean']:.3f} bits/dim, {row['images']} images, above the test split's {row['auroc']:.3f}")
    print(f"histograms: {file}")
    return 0
