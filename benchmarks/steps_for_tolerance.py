"""Whether the steps that are chosen for a tolerance keep it on held-out images.

    python benchmarks/steps_for_tolerance.py --run pretrained/vp_digits pretrained/vp_fashion_mnist --images 16

For each network and each tolerance: the steps that `likelihood.choose_steps` takes from `--pilot` training images, and the mean
|error| on test images against the adaptive solver at 1e-6, both with the same trace: exact up to `--exact` dimensions, else one
set of coloured probes along the path (of `--spacing` 1: one probe). Images that were solved again are counted; "without" is the
error had none been. The ladder's solutions are made once for all tolerances of a network, and the steps placed once: only the
first tolerance's passes have those that place them.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

# this folder has a file with the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from likelihood import Coloured, Exact, Uniform, accurate, choose_steps, log_likelihood, pilot_grid, steps
from numerics import SampleStreams
from workflow import load_run


def once(f, key=lambda *given, **named: None):
    """`f`, called once for every key."""
    known = {}

    def found(*given, **named):
        at = key(*given, **named)
        if at not in known:
            known[at] = f(*given, **named)
        return known[at]

    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, nargs="+", type=Path, help="run folders")
    parser.add_argument("--images", default=16, type=int, help="test images of each")
    parser.add_argument("--pilot", default=16, type=int, help="training images")
    parser.add_argument("--spacing", default=2, type=int, help="of the coloured probes")
    parser.add_argument("--tolerance", default=[1e-2, 1e-3, 1e-4], nargs="+", type=float, help="bits/dim")
    parser.add_argument("--exact", default=64, type=int, help="dimensions up to which the trace is exact")
    parser.add_argument("--json", type=Path, help="where the rows go, too")
    args = parser.parse_args()
    rows = []
    for folder in args.run:
        run = load_run(folder)
        sde, model, D = run.sde, run.model, run.dataset.dim

        def noisy(images, seed, run=run):
            return Uniform()(images, run.transform, run.sde, run.sde.t_min, generator=SampleStreams(seed))[0]

        x = noisy(run.dataset.split("test").x[: args.images], 1)
        pilot = noisy(run.dataset.split("train").x[: args.pilot], 2)
        trace = Exact() if args.exact >= D else Coloured(spacing=args.spacing, fresh=False)

        def bits(method, run=run, x=x, trace=trace, D=D):
            found = log_likelihood(run.sde, run.model, x, method=method, divergence=trace, generator=SampleStreams(11))
            return found, found.log_prob / (D * math.log(2))

        kept, placed = once(log_likelihood, lambda sde, score, x, **given: (len(x), given["method"])), once(pilot_grid)
        truth = bits(accurate(tolerance=1e-6, data_std=run.flow.data_std, max_steps=4000))[1]
        for tolerance in args.tolerance:
            begun = time.perf_counter()
            with mock.patch.object(steps, "log_likelihood", kept), mock.patch.object(steps, "pilot_grid", placed):
                choice = choose_steps(sde, model, pilot, tolerance=tolerance, data_std=run.flow.data_std)
            seconds = time.perf_counter() - begun
            method = choice.method(data_std=run.flow.data_std)
            found, values = bits(method)
            errors = (values - truth).abs()
            plain = (bits(replace(method, refinement=None))[1] - truth).abs()
            stated = found.state_error * (choice.refinement.ratio if choice.refinement else 0.0) / math.log(2)
            row = {
                "run": folder.name,
                "tolerance": tolerance,
                "steps": choice.steps,
                "reached": choice.reached,
                "pilot": choice.error,
                "error": float(errors.nanmean()),
                "stderr": float(errors.std()) / math.sqrt(len(errors)),
                "largest": float(errors.nan_to_num().max()),
                "without": float(plain.nanmean()),
                "refined": int((found.refined > 0).sum()),
                "covered": float((2 * stated >= errors).double().mean()),
                "passes": choice.passes,
                "seconds": seconds,
            }
            rows.append(row)
            print(
                f"{row['run']:24} {tolerance:7.0e} {choice.steps:5} steps{'' if choice.reached else ' (not reached)'}: pilot "
                f"{choice.error:.1e}, held out {row['error']:.1e} ± {row['stderr']:.0e} (largest "
                f"{row['largest']:.1e}, without refinement {row['without']:.1e}), {row['refined']} of "
                f"{len(x)} again, 2x stated covers {row['covered']:.0%}; pilot "
                f"{choice.passes:,} passes, {seconds:.0f} s",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
