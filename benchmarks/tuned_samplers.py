"""Tuned samplers beside plain ones and predictor-corrector sampling: quality against evaluations.

    python experiments/tune.py --run runs/vp --nfe 4,5,6,8,10
    python benchmarks/tuned_samplers.py --run runs/vp --nfe 4,5,6,8,10 --n 1000 --pc 1000
    python benchmarks/tuned_samplers.py --run runs/vp --nfe "" --flow 0 --pc_n 200 --pc_batch 25      # PC alone

Draws with DPM-Solver++ of its default grid, with the best plain sampler that tune.py has found, and with the tuned one, all
from the same noise; with many evaluations, which is what the flow itself is worth; and with PC of `--pc` steps (0: not at
all). All are judged in groups of one size, the fewest samples that any has or `--group`, so that their numbers compare:
distances of fewer samples are larger. A row is the mean of its groups; its error is their spread by the root of their number,
or of fewer than five groups what the jackknife says of each, put together. Parts stay in the run folder, so that the command
can be taken up again; PC's have `--pc_batch` samples.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

# this folder has a file with the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import torch

import samplers
from data.dataset import permutation
from evaluation import default_features, frechet_distance, sliced_wasserstein
from samplers.tuned import Tuned
from workflow import load_run
from workflow.pictures import draw_in_chunks
from workflow.report import table
from workflow.tuned import FILE

MEASURES, REFERENCE = (frechet_distance, sliced_wasserstein), 10_000


def shuffled(x, most):
    """At most so many rows, at random in a fixed way."""
    return x[torch.from_numpy(permutation(len(x), seed=0)[:most].copy())]


def judged(features, reference, size):
    """FD and SW, as (value, error) of the mean over whole groups of `size` rows."""
    found = []
    for measure in MEASURES:
        each = [measure(features[i : i + size], reference) for i in range(0, len(features) - size + 1, size)]
        values = [one.value for one in each]
        k = len(values)
        error = statistics.stdev(values) / math.sqrt(k) if k > 4 else math.hypot(*(one.stderr for one in each)) / k
        found.append((statistics.fmean(values), error))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--nfe", default="4,5,6,8,10", help="evaluations, separated by commas; none for an empty text")
    parser.add_argument("--n", default=1000, type=int, help="samples of each")
    parser.add_argument("--pc", default=1000, type=int, help="steps of PC; 0: none")
    parser.add_argument("--flow", default=50, type=int, help="evaluations of UniPC that count as the flow; 0: none")
    parser.add_argument("--pc_n", default=None, type=int, help="samples of PC, where others")
    parser.add_argument("--pc_batch", default=100, type=int, help="samples of PC at once")
    parser.add_argument("--group", default=None, type=int, help="samples that are judged together")
    parser.add_argument("--seed", default=1000, type=int, help="of the noise; tune.py's is 0")
    parser.add_argument("--batch_size", default=100, type=int)
    args = parser.parse_args()
    run = load_run(args.run, "cpu")
    budgets, kept = [int(n) for n in args.nfe.split(",") if n.strip()], args.run / FILE
    entries = {
        e["evaluations"]: e
        for e in (json.loads(kept.read_text())["samplers"] if budgets and kept.exists() else ())
        if e["model"] == run.fingerprint
    }
    asked = {}
    if args.flow:
        asked["the flow itself", args.flow] = samplers.create("unipc").within(args.flow)
    for nfe in budgets:
        asked["DPM-Solver++ 2", nfe] = samplers.create("dpm_solver").within(nfe)
        if nfe in entries:
            asked["best plain", nfe] = samplers.create(**entries[nfe]["plain"])
            asked["tuned", nfe] = Tuned.from_dict(entries[nfe]["tuned"])
    if args.pc:
        asked["PC", 2 * args.pc + 1] = samplers.create("pc", steps=args.pc)
    features, drawn = default_features(run.dataset), {}
    for (name, nfe), sampler in asked.items():
        begun, pc = time.process_time(), name == "PC"
        n, size = (args.pc_n or args.n, args.pc_batch) if pc else (args.n, args.batch_size)
        made = draw_in_chunks(run, sampler, n, seed=args.seed, batch_size=size, name="tuned-table")
        assert made.x is not None and made.nfe == nfe
        drawn[name, nfe] = features.extract(run.transform.to_data(made.x)).values
        print(
            f"{name} {nfe}: {n} samples, {time.process_time() - begun:.0f} s of processor time, {sampler!r:.90}",
            flush=True,
        )
    held_out, reference = (
        features.extract(shuffled(run.dataset.split(split).x, REFERENCE)).values for split in ("test", "train")
    )
    size = args.group or min(len(x) for x in (held_out, *drawn.values()))
    rows = []
    for (name, nfe), x in drawn.items():
        entry = entries.get(nfe, {})
        flow = entry.get("from_the_flow", {}).get({"best plain": "plain", "tuned": "tuned"}.get(name, ""))
        shown = "" if flow is None else f"{flow['mean']:.4f} ± {flow['stderr']:.4f}"
        fd, sw = (f"{value:.3g} ± {error:.2g}" for value, error in judged(x, reference, size))
        rows.append((name, f"{nfe:,}", f"{len(x):,}", fd, sw, shown))
    floor = "; ".join(f"{value:.3g} ± {error:.2g}" for value, error in judged(held_out, reference, size))
    print(f"\nheld-out data, FD and SW: {floor}; all in groups of {size}\n")
    print("\n".join(table(("sampler", "evaluations", "samples", "FD", "SW", "from the flow"), rows)))


if __name__ == "__main__":
    main()
