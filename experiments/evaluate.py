"""All measures of a finished run's samples, beside what held-out data score, and a check for memorised images.

    python experiments/evaluate.py --run runs/vp --sampler dpm_solver --n 2000

Adds to the run's results.json and report.md; writes samples/nearest.png: samples (odd rows) above their nearest training
images (even rows).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import samplers
from evaluation import evaluate_samples, nearest
from evaluation.pictures import save_grid
from experiments import build, command_line
from experiments.pictures import draw_in_chunks
from experiments.results import update_results


def main(arguments: list[str]) -> int:
    parser = command_line.Parser(description="Measure a finished run's samples.")
    parser.add_argument("--run", required=True, type=Path, help="the run folder")
    parser.add_argument("--sampler", default="dpm_solver", help=", ".join(samplers.available()))
    parser.add_argument("--steps", default=None, type=int, help="of the sampler; its own default unless given")
    parser.add_argument("--n", default=2000, type=int, help="samples")
    parser.add_argument("--seed", default=0, type=int, help="of the noise")
    parser.add_argument("--batch_size", default=500, type=int, help="samples at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args(arguments)
    sampler = samplers.create(args.sampler, **({} if args.steps is None else {"steps": args.steps}))
    run = build.load_run(args.run, build.device(args.device))
    x, nfe, _ = draw_in_chunks(run, sampler, args.n, seed=args.seed, batch_size=args.batch_size, name=args.sampler)
    if x is None:
        print("other processes have still to write their samples; run this once they have")
        return 0
    made = run.transform.to_data(x)
    report = evaluate_samples(made, run.dataset)
    print(report)
    update_results(args.run, {"evaluation": {**report.to_dict(), "sampler": repr(sampler), "nfe": nfe}})
    lines = ["", f"## {args.n:,} samples by `{sampler!r}`, {nfe} evaluations", "", "```", str(report), "```", ""]
    if run.dataset.levels is not None:
        train = run.dataset.split("train").x
        _, index = nearest(made[:32].flatten(1).to(torch.float64), train.flatten(1).to(torch.float64))
        pairs = torch.stack([made[:32], train[index]]).reshape(2, -1, 16, *made.shape[1:]).transpose(0, 1)
        picture = args.run / "samples" / "nearest.png"
        save_grid(picture, pairs.flatten(0, 2).float() / (run.dataset.levels - 1), 16, scale=2)
        lines += [f"Samples above their nearest training images: ![nearest]({picture.relative_to(args.run)})", ""]
    with open(args.run / "report.md", "a") as file:
        file.write("\n".join(lines))
    return 0


if __name__ == "__main__":
    command_line.run(main)
