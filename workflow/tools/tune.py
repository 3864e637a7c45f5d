"""A sampler of few evaluations, tuned to a finished run's own model: times and weights, without data, in minutes.

    score-sde tune --run runs/vp --nfe 6
    score-sde sample --run runs/vp --sampler tuned --steps 6

The tuned sampler is kept in RUN/tuned.json. It is judged on noise that it was not fitted to, beside the best of the plain
methods; where it is not better, `--sampler tuned` is that plain method.
"""

from __future__ import annotations

from typing import Any

from samplers.tuning import teach, tune
from workflow import progress
from workflow.flow_only import require_score
from workflow.tools import arguments as shared
from workflow.trained_run import load_run
from workflow.tuned import keep


def main(arguments: list[str]) -> int:
    """Tunes, and says how far tuned and plain samples end from the flow."""
    parser = shared.parser("Tune samplers of few evaluations to a finished run.")
    parser.add_argument(
        "--nfe",
        default="6",
        type=shared.integers(2),
        help="evaluations of the network a sample, several separated by commas",
    )
    parser.add_argument(
        "--n", default=128, type=shared.integer(8), help="number of samples to fit to, and of others to judge by"
    )
    parser.add_argument("--rounds", default=15, type=shared.integer(1), help="steps of the fit, at most")
    parser.add_argument("--tolerance", default=1e-4, type=float, help="of the tight solution of the flow")
    parser.add_argument("--seed", default=0, type=shared.integer(0), help="seed of the noise")
    parser.add_argument("--batch_size", default=64, type=shared.integer(1), help="number of samples at once")
    shared.add_label(parser, "class to tune for, for a class-conditional run; None: any")
    args = shared.parsed(parser, arguments)
    run = load_run(args.run, args.device)
    require_score(run, "draw with sample.py --sampler dpm_solver")
    run = run if args.label is None else run.given(args.label)
    shape = (args.n, *run.dataset.event_shape)
    progress.say(f"solving the flow of {2 * args.n} samples")
    given = {"data_std": run.flow.data_std, "batch_size": args.batch_size}
    pairs = teach(run.sde, run.score, shape, tolerance=args.tolerance, seed=args.seed, device=run.device, **given)
    for budget in args.nfe:
        with progress.bar(total=args.rounds, name=f"tuning {budget} evaluations", unit="round") as bar:

            def show(_: int, loss: float, bar: Any = bar) -> None:
                bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
                bar.update(1)

            found = tune(
                run.sde,
                run.score,
                shape,
                evaluations=budget,
                rounds=args.rounds,
                pairs=pairs,
                on_round=show,
                **given,
            )
        keep(run, found)
        print(found)
    of = "" if args.label is None else f" --label {args.label}"
    print(f"draw with: sample.py --run {args.run}{of} --sampler tuned --steps {args.nfe[0]}")
    return 0
