"""Samples from any finished run, by any sampler.

    score-sde sample --run runs/vp --sampler dpm_solver --steps 20 --n 64
    score-sde sample --run runs/text --caption "bold italic serif 3" --guidance 2
    score-sde sample --run runs/vp --sampler pc --option corrector=none --option grid=log_snr --gif run.gif
    torchrun --nproc-per-node 2 experiments/sample.py --run runs/vp --n 10000       the same samples, shared out

Sample i is the same for any --n and any number of processes, and an interrupted command continues where it stopped. The picture
goes to RUN/samples/SAMPLER-....png, the values beside it in parts (.npz). With `--save png` the folder
RUN/samples/SAMPLER-...-png gets an 8-bit file for each sample, and SAMPLER-...-png.npz all of them: what tools for FID read.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from evaluation.pictures import require_picture, save_gif
from numerics import SampleStreams, UserError
from samplers import Sampler
from samplers.callbacks import Trajectory
from workflow import eight_bit, progress
from workflow.pictures import draw_in_chunks, require_samples_file, save_samples
from workflow.tools import arguments as shared
from workflow.trained_run import TrainedRun, load_run

_SHOWN_IMAGES, _SHOWN_POINTS = 1024, 10_000


def main(arguments: list[str]) -> int:
    """Draws, and says where the picture and the values are."""
    parser = shared.parser("Draw samples from a finished run.")
    shared.add_sampler(parser)
    parser.add_argument("--n", default=64, type=shared.integer(1), help="number of samples")
    parser.add_argument("--seed", default=0, type=shared.integer(0), help="seed of the noise")
    parser.add_argument("--batch_size", default=256, type=shared.integer(1), help="number of samples drawn together")
    parser.add_argument("--out", default=None, type=Path, help="file for the picture; None: beside the parts")
    parser.add_argument(
        "--gif", default=None, type=Path, help="file for an animation of the first 16 images from noise to data"
    )
    shared.add_label(parser)
    parser.add_argument(
        "--caption",
        default=None,
        help='words to draw, for a run that reads captions, such as "bold italic serif 3"; None: any',
    )
    parser.add_argument(
        "--guidance",
        default=None,
        type=float,
        help="scale of classifier-free guidance to --label or --caption: 0 none, 1 the class alone; None: 1",
    )
    parser.add_argument(
        "--save",
        default="none",
        choices=("none", "png"),
        help="png: also write each sample as an 8-bit PNG, in a folder beside the parts, and all of them in one npz",
    )
    args = shared.parsed(parser, arguments)
    choose = shared.sampler_of(args)
    run = load_run(args.run, args.device)
    if args.save == "png":
        eight_bit.check(run.dataset)
    if args.out is not None:
        require_samples_file(args.out, run.setup)
    _require_no_class(run, args)
    if args.guidance is not None and args.label is None and args.caption is None:
        raise UserError(
            f"got --guidance {args.guidance} without a class; expected --label K or --caption TEXT beside it"
        )
    if args.label is not None and args.caption is not None:
        raise UserError(f"got --label {args.label} and --caption {args.caption!r}; expected one of them")
    if args.caption is not None:
        run = run.captioned(args.caption)
        if args.guidance is not None:
            run = run.guided(0, args.guidance)
    if args.label is not None:
        run = run.given(args.label) if args.guidance is None else run.guided(args.label, args.guidance)
    sampler = choose(run)
    if sampler is None and args.gif is not None:
        raise UserError(f"got --gif for a run of {run.setup.name}, which has no score; expected a run with one")
    if args.gif is not None:
        if run.dataset.levels is None:
            raise UserError(f"got --gif for {run.dataset.name}, which has no images; expected a run on images")
        require_picture(args.gif)
    start = time.perf_counter()
    made = draw_in_chunks(run, sampler, args.n, seed=args.seed, batch_size=args.batch_size, name=args.sampler)
    x, parts = made.x, made.folder
    if x is None:
        progress.say(f"parts written to {parts}; other processes have still to write theirs")
        return 0
    seconds = time.perf_counter() - start
    picture = args.out or parts.with_suffix(".png")
    save_samples(picture, x[: _SHOWN_POINTS if run.dataset.levels is None else _SHOWN_IMAGES], run.setup)
    if args.save == "png":
        folder = eight_bit.save(x, run, parts)
        print(f"{len(x)} files of 8 bits: {folder}; the same in one array: {folder.with_suffix('.npz')}")
    print(f"{args.n} samples by {made.sampler}: {made.nfe} evaluations, {seconds:.1f} s; {picture}, {parts}")
    if args.gif is not None and sampler is not None:
        _animate(args.gif, run, sampler, args.seed, args.n)
    return 0


def _require_no_class(run: TrainedRun, args: argparse.Namespace) -> None:
    """Refuses a class for a system without a score, whose own way of drawing takes none."""
    given = [name for name in ("label", "caption", "guidance") if getattr(args, name) is not None]
    if given and run.setup.system.no_score:
        raise UserError(
            f"got --{given[0]} {getattr(args, given[0])} for a run of {run.setup.name}, whose own way of drawing takes no "
            f"class; expected --sampler {shared.OWN} alone"
        )


def _animate(file: Path, run: TrainedRun, sampler: Sampler, seed: int, n: int) -> None:
    """The states of the first samples from noise to data, each scaled to the picture's range by its own spread."""
    path = Trajectory()
    with torch.no_grad():
        ids = torch.arange(min(16, n))
        sampler(
            run.sde,
            run.score,
            (len(ids), *run.dataset.event_shape),
            generator=SampleStreams(seed, ids),
            device=run.device,
            callback=path,
        )
    every = max(1, len(path.frames) // 60)
    low, high = run.model.data_range
    frames = []
    for t, x in list(zip(path.times, path.frames, strict=True))[::every]:
        t = float(torch.as_tensor(t).max())
        # to unit signal-plus-noise: a state of VE would be far out of the picture
        spread = float(run.flow.scale(run.sde, t)) / (run.model.data_std or 1.0)
        frames.append(run.transform.to_unit((x - (low + high) / 2) / spread + (low + high) / 2))
    save_gif(file, frames, columns=4, scale=4)
    print(f"{len(frames)} frames; {file}")
