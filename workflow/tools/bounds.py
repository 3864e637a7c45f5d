"""The three ways of stating bits/dim, on one finished run, in one table.

    score-sde bounds --run runs/vp --split test

Flow values (with uniform and with truncated-normal noise, one-sample and importance-weighted) and variational bounds
(continuous, and of DDPM's chain), each row with what it was given, on the same images. A row is the value of its own model
and its own protocol: rows of different data or different t_min are not one number measured twice. Writes RUN/bounds.md and
the numbers under "bounds" in results.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data import DataError
from likelihood import (
    BitsPerDim,
    Bound,
    Dequantizer,
    Exact,
    Hutchinson,
    TruncatedNormal,
    UniformDequantizer,
    bits_per_dim,
    elbo,
    fast,
)
from likelihood.bounds import Bins, Decoder, DiscretizedGaussian
from numerics import SampleStreams, require_positive
from workflow import progress
from workflow.flow_only import require_score
from workflow.splits import checked_split
from workflow.tools import arguments as shared
from workflow.trained_run import TrainedRun, load_run


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way: its name, what it was given, and the mean over the images with its standard error."""

    way: str
    given: str
    t_min: float
    mean: float
    stderr: float

    @classmethod
    def of(cls, way: str, given: str, t_min: float, values: Tensor) -> Row:
        """From values per image, `(B,)` bits/dim; those that are not finite are left out, and that is said."""
        good = values[values.isfinite()]
        lost = len(values) - len(good)
        stderr = float(good.std()) / math.sqrt(len(good)) if len(good) > 1 else math.nan
        text = given + (f"; {lost} images left out" if lost else "")
        return cls(way=way, given=text, t_min=t_min, mean=float(good.mean()), stderr=stderr)


def rows(
    run: TrainedRun,
    images: Tensor,
    ids: Tensor,
    *,
    seed: int = 0,
    K: int = 8,
    steps: int = 64,
    draws: int = 128,
    levels: int = 1000,
    probes: int = 4,
    truncation: float = 0.25,
    batch_size: int = 32,
) -> list[Row]:
    """The table's rows for grey values `images` `(B, *)`.

    Args:
        K: number of draws of the dequantisation noise, which the importance-weighted values use together.
        steps: number of steps of the flow's solver.
        draws: number of draws of the continuous bounds.
        probes: number of trace estimates for each draw; 0 for the exact trace.
        levels: number of levels of DDPM's chain, each evaluated once.
        truncation: sigma/alpha at the t_min of the rows on grid points, in bins. The network has learned images with uniform
            noise; once the noise is finer, it cannot tell where in its bin a pixel is.
        batch_size: number of images scored together.
    """
    sde, score, transform = run.sde, run.score, run.transform
    D = images[0].numel()
    t_cut = TruncatedNormal.t_min(sde, transform, truncation)
    found: list[Row] = []
    batches = [slice(i, i + batch_size) for i in range(0, len(images), batch_size)]

    def shown(name: str) -> Iterator[slice]:
        with progress.bar(total=len(batches), name=name, unit="batch") as bar:
            for part in batches:
                yield part
                bar.update(1)

    def flow(name: str, dequantizer: Dequantizer, data: str, t_min: float) -> None:
        x, _ = dequantizer(run.pilot(), transform, sde, t_min, generator=SampleStreams(seed))
        method = fast(sde, score, x, steps=steps, data_std=run.flow.data_std, t_min=t_min)
        result = BitsPerDim.concatenate(
            [
                bits_per_dim(
                    sde,
                    score,
                    images[part],
                    transform,
                    dequantizer=dequantizer,
                    draws=K,
                    divergence=Hutchinson(probes=probes) if probes else Exact(),
                    companions=0,
                    method=method,
                    generator=SampleStreams(seed, ids[part]),
                )
                for part in shown(f"flow, {name}")
            ]
        )
        trace = f"{probes} probes" if probes else "exact trace"
        found.append(Row.of(f"flow, {name}", f"{data}, {K} draws; {steps} steps, {trace}", t_min, result.per_image))
        # exp() turns the probes' errors into a gain: with s their standard deviation in nats, about s^2 / 2 at most
        spread = (
            float(result.estimates.var(dim=2).mean()) / max(probes, 1) * (D * math.log(2)) ** 2 if probes > 1 else 0.0
        )
        note = f"; the probes may lower it by up to {spread / 2 / (D * math.log(2)):.3f}" if probes > 1 else ""
        weighted = result.importance_weighted()
        found.append(
            Row.of(f"flow, {name}, importance-weighted", f"the same {K} draws, - log K{note}", t_min, weighted)
        )

    def bound(
        way: str,
        given: str,
        x_0: Tensor,
        decoder: Decoder | None,
        t_min: float,
        n: int,
        chain: int | None = None,
        **det: float,
    ) -> None:
        values = []
        for part in shown(way):
            result: Bound = elbo(
                sde,
                score,
                x_0[part],
                decoder=decoder,
                data=None if decoder is None else images[part],
                draws=n,
                steps=chain,
                t_min=t_min,
                data_std=run.model.data_std,
                generator=SampleStreams(seed, ids[part]),
            )
            values.append(result.bits_per_dim(D, **det))
        found.append(Row.of(way, f"{given}; {n} evaluations", t_min, torch.cat(values)))

    flow("uniform dequantisation", UniformDequantizer(), "images + uniform noise, read as states at t_min", sde.t_min)
    flow("truncated-normal dequantisation", TruncatedNormal(), "grid points + the noise of t_min", t_cut)
    centres = transform(images.to(torch.float32) + 0.5)
    noisy, _ = UniformDequantizer()(images, transform, sde, sde.t_min, generator=SampleStreams(seed + 1, ids))
    real, grid = "images + uniform noise", "grid points"
    bound("continuous ELBO, Gaussian decoder", real, noisy, None, sde.t_min, draws, log_det=transform.log_det)
    bound("continuous ELBO, Bins decoder", grid, centres, Bins(transform=transform), t_cut, draws)
    bound(
        f"chain bound of {levels:,} levels (DDPM), discretised Gaussian",
        grid,
        centres,
        DiscretizedGaussian(transform=transform),
        max(t_cut, sde.T / levels),
        levels - 1,
        levels - 1,
    )
    return found


def table(found: list[Row], run: TrainedRun, split: str, images: int) -> str:
    """The rows as a page of Markdown."""
    of = "" if run.label is None else f" of class {run.label}, given that class,"
    lines = [
        f"# Bits/dim of {run.setup.name} ({run.dataset.name}), step {run.step}",
        "",
        f"{images} images{of} of the split {split!r}; ± is the standard error over images, everything included.",
        "A bound holds for its own model: flow rows for the probability flow, ELBO and chain rows for the reverse SDE. With a",
        "learned score these are different models, and either may be lower. Papers mostly quote the first row.",
        "",
        "| way | given | t_min | bits/dim |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.way} | {r.given} | {r.t_min:.2g} | {r.mean:.3f} ± {r.stderr:.3f} |" for r in found]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Scores in all three ways and prints the table."""
    parser = shared.parser("State bits/dim of a finished run in the three ways that papers do, in one table.")
    parser.add_argument("--split", default="test", help="split of the run's data set")
    parser.add_argument("--limit", default=64, type=shared.integer(0), help="number of images to score; 0: all")
    parser.add_argument("--K", default=8, type=shared.integer(1), help="number of draws of the dequantisation noise")
    parser.add_argument("--steps", default=64, type=shared.integer(1), help="number of steps of the flow's solver")
    parser.add_argument("--draws", default=128, type=shared.integer(1), help="number of draws of the continuous bounds")
    parser.add_argument(
        "--levels", default=1000, type=shared.integer(2), help="number of levels of the chain, each evaluated once"
    )
    parser.add_argument(
        "--probes", default=4, type=shared.integer(0), help="number of trace estimates for each draw; 0: exact trace"
    )
    parser.add_argument("--truncation", default=0.25, type=float, help="sigma/alpha on grid points at t_min, in bins")
    parser.add_argument("--batch_size", default=32, type=shared.integer(1), help="number of images scored together")
    parser.add_argument("--seed", default=0, type=shared.integer(0), help="seed of noise and probes")
    shared.add_label(parser, "class whose images are scored, given it, for a class-conditional run; None: any")
    options = shared.parsed(parser, arguments)
    require_positive(options.truncation, "--truncation")
    run = load_run(options.run, options.device)
    require_score(run, "nll.py has this flow's likelihood")
    run = run if options.label is None else run.of_class(options.label)
    if run.transform.levels is None:
        raise DataError(f"got the run {options.run} on {run.dataset.name}, which has no grey levels; expected images")
    data = checked_split(run.dataset, options.split)
    n = min(len(data), options.limit or len(data))
    part = data.take(slice(0, n))
    found = rows(
        run,
        part.x.to(run.device),
        part.ids,
        seed=options.seed,
        K=options.K,
        steps=options.steps,
        draws=options.draws,
        levels=options.levels,
        batch_size=options.batch_size,
        probes=options.probes,
        truncation=options.truncation,
    )
    text = table(found, run, options.split, n)
    run.folder.write_text("bounds.md", text)
    stated = {"split": options.split, "label": run.label, "images": n, "rows": [vars(r) for r in found]}
    run.folder.update_results({"bounds": stated})
    print(text, end="")
    return 0
