"""All measures of a finished run's samples, beside what held-out data score, and a check for memorised ones.

    score-sde evaluate --run runs/vp --sampler dpm_solver --n 2000
    score-sde evaluate --run runs/vp --sampler pc --option corrector=none --steps 100
    score-sde evaluate --run runs/vp --features inception --inception inception-2015-12-05.pt

Adds to the run's results.json and report.md, one entry and one section for each sampler, features and class: done again, they
are replaced. Writes samples/evaluation-....png, the first samples, and samples/nearest-....png: samples (odd rows) above their
nearest training data (even rows), for images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data import Dataset
from evaluation import (
    Coordinates,
    Features,
    Memorisation,
    Pixels,
    default_features,
    load_inception,
    nearest,
)
from evaluation.pictures import save_grid, shown_channels
from evaluation.report import LEAST
from numerics import UserError
from workflow import progress
from workflow.measured import SEARCHED, measure, space
from workflow.pictures import draw_in_chunks, save_samples
from workflow.splits import checked_split
from workflow.tools import arguments as shared
from workflow.trained_run import TrainedRun, load_run

_SHOWN = 100  # samples on the contact sheet
_PAIRS = 32  # samples above their nearest training data


def main(arguments: list[str]) -> int:
    """Draws, measures, and prints the measures beside those of held-out data."""
    parser = shared.parser("Measure a finished run's samples.")
    shared.add_sampler(parser)
    parser.add_argument(
        "--n", default=2000, type=shared.integer(LEAST), help=f"number of samples, at least {LEAST}; take thousands"
    )
    parser.add_argument("--seed", default=0, type=shared.integer(0), help="seed of the noise")
    parser.add_argument("--batch_size", default=500, type=shared.integer(1), help="number of samples drawn together")
    shared.add_label(parser, "class to draw and to compare with its own data, for a class-conditional run; None: any")
    parser.add_argument("--split", default="test", help="split of held-out data to compare with")
    parser.add_argument(
        "--features",
        default="auto",
        choices=("auto", "classifier", "pixels", "inception"),
        help="auto: a classifier for labelled images, pixels for other images, coordinates for other data",
    )
    parser.add_argument("--inception", default=None, type=Path, help="TorchScript file for --features inception")
    args = shared.parsed(parser, arguments)
    choose = shared.sampler_of(args)
    run = load_run(args.run, args.device)
    checked_split(run.dataset, args.split)
    if args.split in ("train", "fit"):
        raise UserError(
            f"got --split {args.split}, which the model was trained on; expected held-out data, such as test"
        )
    features = _features(args.features, args.inception, run.dataset)
    if args.label is not None:
        run = run.of_class(args.label)
        checked_split(run.dataset, args.split)
    drawn = draw_in_chunks(run, choose(run), args.n, seed=args.seed, batch_size=args.batch_size, name=args.sampler)
    x, parts = drawn.x, drawn.folder
    if x is None:
        progress.say("other processes have still to write their samples; run this once they have")
        return 0
    made = run.transform.to_data(x)
    entry, report, copies = measure(
        run, made, features=features, sampler=drawn.sampler, nfe=drawn.nfe, split=args.split, label=args.label
    )
    print(f"{report}\n\nnearest training data, in {space(run.dataset)}:\n{copies}")

    sheet = args.run / "samples" / f"evaluation-{parts.name}.png"
    save_samples(sheet, x[:_SHOWN], run.setup)
    pictures = {f"The first {min(_SHOWN, len(x))}": sheet}
    if run.dataset.levels is not None:
        pairs = args.run / "samples" / f"nearest-{parts.name}.png"
        _save_pairs(pairs, made[:_PAIRS], run)
        pictures["Samples above their nearest training images"] = pairs
    run.folder.add_section(f"Samples measured: {entry}", _section(str(report), drawn.nfe, run, copies, pictures))
    print("\n".join(str(picture) for picture in pictures.values()))
    return 0


def _features(name: str, inception: Path | None, dataset: Dataset) -> Features:
    if (name == "inception") != (inception is not None):
        raise UserError(
            f"got --features {name}{'' if inception is None else f' with --inception {inception}'}; expected --features "
            "inception together with --inception FILE"
        )
    if inception is not None:
        return load_inception(inception, levels=dataset.levels or 256)
    if name == "pixels":
        return Coordinates() if dataset.levels is None else Pixels(levels=dataset.levels)
    if name == "classifier" and (dataset.levels is None or dataset.num_classes < 2):
        raise UserError(f"got --features classifier for {dataset.name}, which has no labelled images; expected pixels")
    return default_features(dataset)


def _training(run: TrainedRun) -> Tensor:
    """All that the run may have learned from, (N, D), in the data's own type: it may be mapped from a file."""
    return run.dataset.split("train").x.flatten(1)


def _save_pairs(file: Path, made: Tensor, run: TrainedRun) -> None:
    """Rows of samples above the rows of their nearest training images."""
    train = run.dataset.split("train").x
    _, index = nearest(made.flatten(1), _training(run))
    columns = min(16, len(made))
    whole = len(made) // columns * columns
    pairs = torch.stack([made[:whole], train[index[:whole]]]).reshape(2, -1, columns, *made.shape[1:]).transpose(0, 1)
    shown = shown_channels(pairs.flatten(0, 2))
    unit = shown.float() / ((run.dataset.levels or 256) - 1)
    save_grid(file, unit, columns, scale=max(1, round(32 / made.shape[-1])))


def _section(report: str, nfe: int, run: TrainedRun, copies: Memorisation, pictures: dict[str, Path]) -> list[str]:
    lines = [f"{nfe} evaluations of the network a sample.", "", "```", report, "```", ""]
    lines += [
        f"Distances to the nearest of all {len(run.dataset.split('train')):,} training data, in {space(run.dataset)}, of at "
        f"most {SEARCHED:,} samples and as many held-out data:",
        *("", "```", str(copies), "```", ""),
    ]
    for text, picture in pictures.items():
        lines += [f"{text}:", "", f"![{picture.stem}](samples/{picture.name})", ""]
    return lines
