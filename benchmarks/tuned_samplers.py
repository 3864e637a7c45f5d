"""Tuned samplers beside plain ones and predictor-corrector sampling: quality against evaluations.

    python experiments/tune.py --run runs/vp --nfe 4,5,6,8,10
    python benchmarks/tuned_samplers.py --run runs/vp --nfe 4,5,6,8,10 --n 1000 --pc 1000

Draws with DPM-Solver++ of its default grid, with the best plain sampler that tune.py has found, and with the tuned one, all
from the same noise; with many evaluations, which is what the flow itself is worth; and with PC of `--pc` steps (0: not at
all). Samples are judged in groups as large as the held-out data,
so that numbers of different n compare. Parts stay in the run folder, so that the command can be taken up again.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

# this folder has a file with the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import samplers
from evaluation import default_features, evaluate_samples
from samplers.tuned import Tuned
from workflow import load_run
from workflow.pictures import draw_in_chunks
from workflow.report import table
from workflow.tuned import FILE


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--nfe", default="4,5,6,8,10")
    parser.add_argument("--n", default=1000, type=int, help="samples of each")
    parser.add_argument("--pc", default=1000, type=int, help="steps of PC; 0: none")
    parser.add_argument("--flow", default=50, type=int, help="evaluations of UniPC that count as the flow; 0: none")
    parser.add_argument("--pc_n", default=None, type=int, help="samples of PC, where others")
    parser.add_argument("--seed", default=1000, type=int, help="of the noise; tune.py's is 0")
    parser.add_argument("--batch_size", default=100, type=int)
    args = parser.parse_args()
    run = load_run(args.run, "cpu")
    entries = {
        e["evaluations"]: e
        for e in json.loads((args.run / FILE).read_text())["samplers"]
        if e["model"] == run.fingerprint
    }
    asked = {}
    for nfe in map(int, args.nfe.split(",")):
        asked["DPM-Solver++ 2", nfe] = samplers.create("dpm_solver").within(nfe)
        if nfe in entries:
            asked["best plain", nfe] = samplers.create(**entries[nfe]["plain"])
            asked["tuned", nfe] = Tuned.from_dict(entries[nfe]["tuned"])
    if args.flow:
        asked["the flow itself", args.flow] = samplers.create("unipc").within(args.flow)
    if args.pc:
        asked["PC", 2 * args.pc + 1] = samplers.create("pc", steps=args.pc)
    features, rows = default_features(run.dataset), []
    for (name, nfe), sampler in asked.items():
        begun = time.process_time()
        n = args.pc_n if name == "PC" and args.pc_n else args.n
        given = {"seed": args.seed, "batch_size": args.batch_size, "name": "tuned-table"}
        made = draw_in_chunks(run, sampler, n, **given)
        x, counted = made.x, made.nfe
        assert x is not None and counted == nfe
        seconds = time.process_time() - begun
        report = evaluate_samples(run.transform.to_data(x), run.dataset, features=features, measures=("FD", "SW"))
        fd, sw = (report[key].score for key in ("FD", "SW"))
        flow = (
            entries.get(nfe, {}).get("from_the_flow", {}).get({"best plain": "plain", "tuned": "tuned"}.get(name, ""))
        )
        shown = "" if flow is None else f"{flow['mean']:.4f} ± {flow['stderr']:.4f}"
        rows.append(
            (
                name,
                f"{nfe:,}",
                f"{n:,}",
                f"{fd.value:.3g} ± {fd.stderr:.1g}",
                f"{sw.value:.3g} ± {sw.stderr:.1g}",
                shown,
            )
        )
        print(f"{rows[-1]} {seconds:.0f} s of processor time, {sampler!r:.90}", flush=True)
    floor = [report[key].floor for key in ("FD", "SW")]
    print(f"\nheld-out data: FD {floor[0]}, SW {floor[1]}; all in groups of {report.group}\n")
    print("\n".join(table(("sampler", "evaluations", "samples", "FD", "SW", "from the flow"), rows)))


if __name__ == "__main__":
    main()
