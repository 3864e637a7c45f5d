"""Bits/dim per image of a run's test split beside those of other data: can the model tell them apart?

    python experiments/ood.py --run runs/vp --other noise

The other data are a data set of the same shape and number of levels, or `noise` (uniform grey levels); vertically flipped test
images and noise are always scored too. An image's value depends neither on its batch mates nor on the order: noise and
probes are keyed by the image's number. Draws the histograms to RUN/ood_OTHER.png and writes the values to RUN/ood_OTHER.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import data
from data import DataError
from experiments import build, command_line
from experiments.results import update_results
from likelihood import BitsPerDim, Hutchinson, Uniform, bits_per_dim, fast
from numerics import SampleStreams


def others(run: build.Run, name: str, n: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
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
    noise = torch.randint(0, levels, part.x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
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


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """The probability that an image of `outside` costs more bits than one of `inside`, ties counting half."""
    order = np.sort(inside)
    below = np.searchsorted(order, outside, side="left") + np.searchsorted(order, outside, side="right")
    return float(below.mean() / (2 * len(inside)))


def draw(values: dict[str, np.ndarray], first: str, second: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    both = np.concatenate([values[first], values[second]])
    edges = np.linspace(both.min(), both.max(), 41)
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
    parser = command_line.Parser(description="Bits/dim of a run's test split and of other data, as histograms.")
    parser.add_argument("--run", required=True, type=Path, help="the run folder")
    parser.add_argument(
        "--other", default="noise", help="a data set of the same shape and levels, or noise, or flipped"
    )
    parser.add_argument("--limit", default=0, type=int, help="images of each; 0: all")
    parser.add_argument("--steps", default=64, type=int, help="of the flow's solver")
    parser.add_argument("--batch_size", default=64, type=int, help="images at once")
    parser.add_argument("--seed", default=0, type=int, help="of noise and probes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    options = parser.parse_args(arguments)
    device = build.device(options.device)
    run = build.load_run(options.run, device)
    name = options.other
    scored = others(run, "noise" if name == "flipped" else name, options.limit, options.seed)
    pilot = run.dataset.split("train").x[:8].to(device)
    x, _ = Uniform()(pilot, run.transform, run.sde, run.sde.t_min, generator=SampleStreams(options.seed))
    method = fast(run.sde, run.model, x, steps=options.steps, data_std=run.flow.data_std)
    values: dict[str, np.ndarray] = {}
    for which, (images, ids) in scored.items():
        parts = [
            bits_per_dim(
                run.sde,
                run.model,
                images[i : i + options.batch_size].to(device),
                run.transform,
                method=method,
                divergence=Hutchinson(probes=2),
                companions=0,
                generator=SampleStreams(options.seed, ids[i : i + options.batch_size]),
            )
            for i in tqdm(range(0, len(images), options.batch_size), desc=f"scoring {which}", unit="batch")
        ]
        found = BitsPerDim.concatenate(parts)
        values[which] = found.per_image.cpu().numpy()
        for line in found.failures:
            print(f"{which}: {line}")
    finite = {which: v[np.isfinite(v)] for which, v in values.items()}
    file = options.run / f"ood_{name}.png"
    draw(finite, "test", name, file)
    np.savez(file.with_suffix(".npz"), **values)
    summary = {
        which: {"mean": float(v.mean()), "images": len(v), "auroc": auroc(finite["test"], v)}
        for which, v in finite.items()
        if len(v)
    }
    update_results(options.run, {f"ood/{name}": summary})
    for which, row in summary.items():
        print(f"{which}: {row['mean']:.3f} bits/dim, {row['images']} images, above the test split's {row['auroc']:.3f}")
    print(f"histograms: {file}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
