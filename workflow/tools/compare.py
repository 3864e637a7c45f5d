"""Samplers side by side on a finished run: quality against evaluations and seconds, from the same noise.

    score-sde compare --run runs/vp --samplers pc,ddim,dpm_solver --nfe 10,20,50,100

    score-sde compare --run runs/vp --samplers dpm_solver,tuned --nfe 5,6       tuned: what tune.py has left for the run
    score-sde compare --run runs/conditional --label 3      of one class, beside the data of that class

Writes compare.md, compare.json, compare.png (quality against cost) and, for images, compare_sheet.png (a row of pictures for
each sampler and budget) into the run folder. The line "held-out data" is what real data score.
"""

from __future__ import annotations

import torch

import samplers
from evaluation import evaluate_samples
from evaluation.report import AVAILABLE, default_features
from evaluation.sampler_comparison import ByBudget, compare_samplers, dataset_quality
from numerics import UserError
from samplers import Sampler
from workflow import progress
from workflow.flow_only import fitting
from workflow.tools import arguments as shared
from workflow.trained_run import load_run
from workflow.tuned import NAME, TunedSamplers


def main(arguments: list[str]) -> int:
    """Compares, and prints the table."""
    parser = shared.parser("Compare samplers on a finished run.")
    parser.add_argument(
        "--samplers",
        default="pc,ddim,dpm_solver",
        help="names, separated by commas: " + ", ".join((NAME, *samplers.available())),
    )
    parser.add_argument(
        "--nfe", default="10,20,50,100", type=shared.integers(1), help="budgets of evaluations, separated by commas"
    )
    parser.add_argument("--n", default=1000, type=shared.integer(1), help="number of samples drawn by each sampler")
    parser.add_argument("--measures", default="FD,SW", help="measures, separated by commas: " + ", ".join(AVAILABLE))
    parser.add_argument(
        "--seed", default=0, type=shared.integer(0), help="seed of the noise that all samplers start from"
    )
    parser.add_argument("--batch_size", default=500, type=shared.integer(1), help="number of samples drawn together")
    shared.add_label(parser, "class to draw and to compare with its own data, for a class-conditional run; None: any")
    args = shared.parsed(parser, arguments)
    budgets = args.nfe
    names = args.samplers.split(",")
    plain = {name: samplers.create(name) for name in names if name != NAME}  # a wrong name before the run is read
    run = load_run(args.run, args.device)
    features = default_features(run.dataset)  # of all classes, also where one is judged
    run = run if args.label is None else run.of_class(args.label)
    objective = run.setup.objective
    if objective.of_flow and NAME in names:
        raise UserError(
            f"got --samplers with {NAME} for a flow trained by likelihood; expected others: ddim, dpm_solver"
        )
    chosen: dict[str, Sampler | ByBudget] = {
        name: TunedSamplers(run) if name == NAME else fitting(plain[name], objective) for name in names
    }
    measures = tuple(args.measures.split(","))
    held_out = evaluate_samples(run.dataset.split("test").x, run.dataset, features=features, measures=measures)
    total = sum(1 if s.evaluations is None else len(budgets) for s in chosen.values())
    with torch.no_grad(), progress.bar(total=total, name="comparing", unit="run") as bar:
        comparison = compare_samplers(
            run.sde,
            run.score,
            chosen,
            (args.n, *run.dataset.event_shape),
            nfe=budgets,
            quality=dataset_quality(run.dataset, run.transform, features=features, measures=measures),
            seed=args.seed,
            batch_size=args.batch_size,
            device=run.device,
            progress=lambda row: bar.update(1),
        )
    floor = "  ".join(f"{m.name} {m.score.value:.3g} ± {m.score.stderr:.1g}" for m in held_out.measures)
    of = "" if args.label is None else f" of class {args.label}"
    text = f"{comparison}\n\nheld-out data{of}: {floor}"
    print(text)
    run.folder.write_text("compare.md", f"# Samplers on {args.run.name}{of}\n\n```\n{text}\n```\n")
    stated = {**comparison.to_dict(), "label": args.label, "held_out": held_out.to_dict()}
    run.folder.write_json("compare.json", stated)
    comparison.save_plot(args.run / "compare.png")
    if run.dataset.levels is not None:
        comparison.save_contact_sheet(args.run / "compare_sheet.png", columns=16, to_unit=run.transform.to_unit)
    return 0
