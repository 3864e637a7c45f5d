"""Samples from any finished run, by any sampler.

    python experiments/sample.py --run runs/vp --sampler dpm_solver --steps 20 --n 64
    python experiments/sample.py --run runs/vp --sampler pc --option corrector=none --option grid=log_snr --gif run.gif
    torchrun --nproc-per-node 2 experiments/sample.py --run runs/vp --n 10000       the same samples, shared out

Sample i is the same for any --n and any number of processes, and an interrupted command goes on where it stopped. The picture
goes to RUN/samples/SAMPLER-....png, the values beside it in parts (.npz).
"""

from __future__ import annotations

import ast
import dataclasses
import sys
import time
from pathlib import Path

from numerics import UserError

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import samplers
from evaluation.pictures import save_gif
from experiments import build, command_line
from experiments.pictures import draw_in_chunks, save_samples
from numerics import SampleStreams
from samplers.callbacks import Trajectory


def main(arguments: list[str]) -> int:
    parser = command_line.Parser(description="Samples from a finished run.")
    parser.add_argument("--run", required=True, type=Path, help="the run folder")
    parser.add_argument("--sampler", default="dpm_solver", help=", ".join(samplers.available()))
    parser.add_argument("--steps", default=None, type=int, help="of the sampler; its own default unless given")
    parser.add_argument("--n", default=64, type=int, help="how many")
    parser.add_argument("--seed", default=0, type=int, help="of the noise")
    parser.add_argument("--batch_size", default=256, type=int, help="samples at a time")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the sampler; repeatable"
    )
    parser.add_argument("--out", default=None, type=Path, help="the picture; beside the parts unless given")
    parser.add_argument("--gif", default=None, type=Path, help="an animation of the first 16 samples' way, images only")
    parser.add_argument("--label", default=None, type=int, help="class, of a class-conditional run; none: any")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args(arguments)
    if args.n < 1 or args.batch_size < 1:
        raise UserError(f"got --n={args.n}, --batch_size={args.batch_size}; expected integers >= 1")
    options = dict(option(text) for text in args.option)
    if args.steps is not None:
        options["steps"] = args.steps
    sampler = samplers.create(args.sampler, **options)
    run = build.load_run(args.run, build.device(args.device))
    if args.label is not None:
        run = dataclasses.replace(
            run, score=run.model.condition(args.label), fingerprint=f"{run.fingerprint}/{args.label}"
        )
    start = time.perf_counter()
    x, nfe, parts = draw_in_chunks(run, sampler, args.n, seed=args.seed, batch_size=args.batch_size, name=args.sampler)
    if x is None:
        print(f"parts written to {parts}; other processes have still to write theirs")
        return 0
    seconds = time.perf_counter() - start
    picture = args.out or parts.with_suffix(".png")
    save_samples(picture, x[:1024], run.transform, run.dataset)
    print(f"{args.n} samples by {sampler!r}: {nfe} evaluations, {seconds:.1f} s; {picture}, {parts}")
    if args.gif is not None:
        _animate(args.gif, run, sampler, args.seed, args.n)
    return 0


def _animate(file: Path, run: build.Run, sampler: samplers.Sampler, seed: int, n: int) -> None:
    """The states of the first samples on their way, each scaled to the picture's range by its own spread."""
    if run.dataset.levels is None:
        raise UserError(f"got --gif for {run.dataset.name}, which has no images; expected a run on images")
    path = Trajectory()
    with torch.no_grad():
        ids = torch.arange(min(16, n))
        sampler(
            run.sde,
            run.score or run.model,
            (len(ids), *run.dataset.event_shape),
            generator=SampleStreams(seed, ids),
            device=next(run.model.parameters()).device,
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


def option(text: str) -> tuple[str, object]:
    """Name and value of an `--option NAME=VALUE`; what is no Python literal is text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"got --option {text!r}; expected NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    command_line.run(main)
