"""The bits/dim of a split of any finished run, with its error budget.

    score-sde nll --run runs/vp --split test
    score-sde nll --run runs/conditional --label own            each image given its own class
    score-sde nll --run runs/vp --precision 0.005           the mean to a precision, few images scored; --plan: what it takes
    torchrun --nproc-per-node 2 -- experiments/nll.py --run runs/vp     the same numbers, shared out

Interrupted, the same command goes on where it stopped. Per-image values lie in RUN/nll/SPLIT-.../part_*.npz, the numbers and
the protocol in RUN/results.json. (The `--` keeps torchrun from taking `--run` for one of its own options.)
"""

from __future__ import annotations

from numerics import UserError
from workflow import progress
from workflow.protocol import Protocol
from workflow.score import score_split
from workflow.survey import plan_split, survey_split
from workflow.tools import arguments as shared
from workflow.trained_run import TrainedRun, load_run


def _refuse_unused(protocol: Protocol) -> None:
    """Refuses options that would change nothing; a configuration may hold both, as a default and a choice."""
    if protocol.spacing and protocol.probes == 0:
        raise UserError(
            f"got --spacing {protocol.spacing} with --probes 0, the exact trace; expected --probes 1 or more, or no --spacing"
        )
    if protocol.steps is None:
        return
    if protocol.solver != "fast":
        raise UserError(
            f"got --steps {protocol.steps} with --solver {protocol.solver}, which takes its own; expected --tolerance"
        )
    if protocol.tolerance is not None:
        raise UserError(
            f"got --steps {protocol.steps} and --tolerance {protocol.tolerance:g}, which chooses steps; expected one of them"
        )


def _refuse_unused_for(run: TrainedRun, protocol: Protocol) -> None:
    """Refuses options that would change nothing for the run's data."""
    name, dim = run.dataset.name, run.dataset.dim
    if protocol.spacing and protocol.for_samples(dim, run.transform.levels).probes == 0:
        raise UserError(
            f"got --spacing {protocol.spacing} for {name}, whose trace is exact in {dim} dimensions; expected no --spacing, or "
            "--probes beside it"
        )
    if run.transform.levels is not None:
        return
    if protocol.draws not in (None, 1):
        raise UserError(
            f"got --draws {protocol.draws} for {name}, which has no grey levels and gets no noise; expected no --draws"
        )
    if protocol.dequantizer != "uniform":
        raise UserError(
            f"got --dequantizer {protocol.dequantizer} for {name}, which has no grey levels and gets no noise; expected no "
            "--dequantizer"
        )


def main(arguments: list[str]) -> int:
    """Scores, and prints the mean with its errors."""
    parser = shared.parser("Bits/dim of a finished run.")
    shared.add_fields(parser, Protocol)
    parser.add_argument(
        "--plan", action="store_true", help="with --precision: print what a pilot says it would take, and stop"
    )
    options = vars(shared.parsed(parser, arguments))
    folder, device, _, plan = (options.pop(name) for name in ("run", "device", "quiet", "plan"))
    protocol = Protocol(**options)
    _refuse_unused(protocol)
    run = load_run(folder, device)
    _refuse_unused_for(run, protocol)
    if plan:
        if protocol.precision is None:
            raise UserError("got --plan without a precision; expected --precision, such as --precision 0.005")
        print(plan_split(run, protocol))
        return 0
    scored = score_split(run, protocol) if protocol.precision is None else survey_split(run, protocol)
    if scored is None:
        progress.say(f"parts written to {run.folder.path / 'nll'}; other processes have still to write theirs")
        return 0
    run.folder.update_results({f"nll/{scored.parts.name}": scored.entry(folder)})
    print(scored.result)
    return 0
