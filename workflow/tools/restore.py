"""Restores test images from measurements of them, with the unconditional score of any finished run.

    score-sde restore --run runs/vp --problems inpainting --methods MomentMatching,PiGDM --images 8
    score-sde restore --run pretrained/vp_fashion_mnist --preset few --workdir runs/restored

It is what `controllable_generation` does in the code of Song et al. 2021 (arXiv:2011.13456), for any linear measurement with
noise. Adds `inverse` to results.json, a section to report.md, and a contact sheet for each problem.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numerics import require_positive
from workflow.flow_only import require_score
from workflow.inverse_problems import FEW, METHODS, PROBLEMS, check_names, report_inverse
from workflow.run_folder import RunFolder
from workflow.tools import arguments as shared
from workflow.trained_run import load_run

PRESETS: dict[str, dict[str, Any]] = {
    "all": {"problems": ",".join(PROBLEMS), "methods": ",".join(METHODS), "images": 8, "samples": 4},
    "few": {key: ",".join(value) if isinstance(value, tuple) else value for key, value in FEW.items()},
}
"""Values by name of the preset; what is given beside it wins."""


def main(arguments: list[str]) -> int:
    """Restores, and prints the table."""
    parser = shared.parser("Restore test images from measurements of them.")
    parser.add_argument(
        "--preset", default="all", choices=tuple(PRESETS), help="values of the options that are not given"
    )
    parser.add_argument("--problems", default=None, help="names with commas between: " + ", ".join(PROBLEMS))
    parser.add_argument("--methods", default=None, help="names with commas between: " + ", ".join(METHODS))
    parser.add_argument(
        "--images", default=None, type=shared.integer(2), help="test images, at least 2, and as many of the model's own"
    )
    parser.add_argument("--samples", default=None, type=shared.integer(2), help="posterior samples of each, at least 2")
    parser.add_argument("--steps", default=50, type=shared.integer(1), help="steps of the samplers")
    parser.add_argument("--std", default=0.1, type=float, help="standard deviation of the noise, in model units")
    parser.add_argument(
        "--sr3_steps",
        default=0,
        type=shared.integer(0),
        help="updates of a network that is trained for super-resolution and shown the measurement; 0 for none",
    )
    parser.add_argument("--workdir", default=None, type=Path, help="folder for what is written; None: the run's")
    args = shared.parsed(parser, arguments)
    chosen = {k: v if getattr(args, k) is None else getattr(args, k) for k, v in PRESETS[args.preset].items()}
    require_positive(args.std, "--std")
    problems, methods = (tuple(name.strip() for name in chosen[key].split(",")) for key in ("problems", "methods"))
    check_names(methods, problems, "--")
    if args.workdir is not None:
        RunFolder(args.workdir).require_place()
    run = load_run(args.run, args.device)
    require_score(run, "a run of vp, ve or sub_vp")
    report_inverse(
        run,
        RunFolder(args.workdir or args.run),
        images=chosen["images"],
        samples=chosen["samples"],
        steps=args.steps,
        std=args.std,
        methods=methods,
        problems=problems,
        sr3_steps=args.sr3_steps,
        prefix="--",
        replaces=False,
    )
    return 0
