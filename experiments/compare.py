"""Samplers side by side on a finished run: quality against evaluations and seconds, from the same noise.

    python experiments/compare.py --run runs/vp --samplers pc,ddim,dpm_solver --nfe 10,20,50,100

Writes compare.md, compare.json, compare.png (quality against cost) and, for images, compare_sheet.png (a row of pictures for
each sampler and budget) into the run folder. The line "held-out data" is what real data score.
"""

from __future__ import annotations

import sys
from pathlib import Path

from numerics import UserError

if __name__ == "__main__":  # a script's own folder is on the path, but not the project's
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm.auto import tqdm

import samplers
from evaluation import evaluate_samples
from evaluation.report import default_features
from evaluation.sampler_comparison import compare_samplers, dataset_quality
from experiments import build, command_line
from experiments.results import write_json


def main(arguments: list[str]) -> int:
    parser = command_line.Parser(description="Compare samplers on a finished run.")
    parser.add_argument("--run", required=True, type=Path, help="the run folder")
    parser.add_argument(
        "--samplers", default="pc,ddim,dpm_solver", help="names with commas: " + ", ".join(samplers.available())
    )
    parser.add_argument("--nfe", default="10,20,50,100", help="budgets of evaluations, with commas")
    parser.add_argument("--n", default=1000, type=int, help="samples of each")
    parser.add_argument("--measures", default="FD,SW", help="of evaluation, with commas")
    parser.add_argument("--seed", default=0, type=int, help="of the noise, which all share")
    parser.add_argument("--batch_size", default=500, type=int, help="samples at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args(arguments)
    try:
        budgets = tuple(int(v) for v in args.nfe.split(","))
    except ValueError as error:
        raise UserError(f"got --nfe={args.nfe!r}; expected integers with commas") from error
    chosen = {name: samplers.create(name) for name in args.samplers.split(",")}
    run = build.load_run(args.run, build.device(args.device))
    measures = tuple(args.measures.split(","))
    features = default_features(run.dataset)
    held_out = evaluate_samples(run.dataset.split("test").x, run.dataset, features=features, measures=measures)
    total = sum(1 if s.evaluations is None else len(budgets) for s in chosen.values())
    with torch.no_grad(), tqdm(total=total, desc="comparing", unit="run") as bar:
        found = compare_samplers(
            run.sde,
            run.model,
            chosen,
            (args.n, *run.dataset.event_shape),
            nfe=budgets,
            quality=dataset_quality(run.dataset, run.transform, features=features, measures=measures),
            seed=args.seed,
            batch_size=args.batch_size,
            device=next(run.model.parameters()).device,
            progress=lambda row: bar.update(1),
        )
    floor = "  ".join(f"{m.name} {m.score.value:.3g} ± {m.score.stderr:.1g}" for m in held_out.measures)
    text = f"{found}\n\nheld-out data: {floor}"
    print(text)
    (args.run / "compare.md").write_text(f"# Samplers on {args.run.name}\n\n```\n{text}\n```\n")
    write_json(args.run / "compare.json", {**found.to_dict(), "held_out": held_out.to_dict()})
    found.save_plot(args.run / "compare.png")
    if run.dataset.levels is not None:
        found.save_contact_sheet(args.run / "compare_sheet.png", columns=16, to_unit=run.transform.to_unit)
    return 0


if __name__ == "__main__":
    command_line.run(main)
