"""How often a survey's stated errors hold, from stored values of a network's images.

    python benchmarks/survey_coverage.py --run pretrained/vp_fashion_mnist --images 2000 --values v.npz     # scores them, once
    python benchmarks/survey_coverage.py --values v.npz --surveys 5000

The values of the images (two draws of noise and probes each) and all candidates' predictions are stored; surveys with new
samples, pilots and designs are then drawn from them, and their pulls, (estimate - truth) / stated error, counted. The set that
is surveyed has `--size` images: the stored ones, each as often as it takes. `--outliers` makes a share of them far ones, which
their predictors tell.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

# this folder has a file with the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import numpy as np
import torch

from likelihood.survey import conduct, plan_survey
from likelihood.survey_design import Table
from workflow import Protocol, load_run


def score(folder, n, file):
    """Stores the values and the predictors of the first `n` test images."""
    from workflow.score import Task
    from workflow.survey import StoredImages

    run = load_run(folder)
    protocol = Protocol(precision=1.0, limit=n)
    task = Task.of(run, protocol)
    place = file.with_suffix("")
    place.mkdir(parents=True, exist_ok=True)
    images = StoredImages(task, place)
    everyone = torch.arange(images.size)
    values = [images.values(everyone, repeat) for repeat in (0, 1)]
    np.savez(
        file,
        free=images.free(everyone).numpy(),
        paid=images.paid(everyone, range(images.candidates)).numpy(),
        bits=np.stack([v.bits.numpy() for v in values]),
        solver_error=np.stack([v.solver_error.numpy() for v in values]),
        passes=values[0].passes / len(everyone),
        spent=images.spent,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run folder, to score and store")
    parser.add_argument("--images", default=2000, type=int, help="how many of its test images")
    parser.add_argument("--values", required=True, type=Path, help="the stored values, .npz")
    parser.add_argument("--surveys", default=5000, type=int, help="how many surveys are drawn; 0: none")
    parser.add_argument("--size", default=10_000, type=int, help="images in the set that is surveyed")
    parser.add_argument("--precision", default=0.005, type=float, help="bits/dim")
    parser.add_argument("--outliers", default=0.0, type=float, help="share of the images made far ones")
    args = parser.parse_args()
    if args.run:
        score(args.run, args.images, args.values)
    stored = np.load(args.values)
    free, paid, bits = (torch.from_numpy(stored[name]).double() for name in ("free", "paid", "bits"))
    good = bits.isfinite().all(dim=0)
    free, paid, bits = free[good], paid[good], bits[:, good]
    spread, noise = float(bits[0].std()), float((bits[1] - bits[0]).square().mean().div(2).sqrt())
    print(
        f"{bits.shape[1]} images: mean {float(bits[0].mean()):.4f}, spread {spread:.3f}, noise of a value {noise:.4f} bits/dim"
    )
    if not args.surveys:
        return
    at = torch.arange(args.size) % bits.shape[1]
    free, paid, bits = free[at], paid[at], bits[:, at]
    if args.outliers:
        far = torch.rand(args.size, generator=torch.Generator().manual_seed(1)) < args.outliers
        more = 1 + 0.3 * torch.rand(args.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        bits = bits + 6 * far * more
        paid = paid + 30 * paid.std(dim=0) * (far * more).unsqueeze(1)
    table, truth = Table(free, paid, bits, passes=round(float(stored["passes"]))), float(bits[0].mean())
    z, errors, passes, used = [], [], [], []
    begun = time.perf_counter()
    for seed in range(args.surveys):
        result = conduct(table, plan_survey(table, precision=args.precision, seed=seed), seed=seed)
        z.append((result.mean - truth) / result.estimate_stderr)
        errors.append(result.estimate_stderr)
        passes.append(result.passes)
        used.append(len(result.scored))
    z = torch.tensor(z).abs()
    k = len(z)
    for limit, share in ((1, 0.683), (2, 0.954)):
        seen = float((z < limit).double().mean())
        print(f"within {limit} stated errors: {100 * seen:.1f} ± {100 * math.sqrt(share * (1 - share) / k):.1f} %")
    errors = torch.tensor(errors)
    print(
        f"stated ± {float(errors.mean()):.5f} (to {float(errors.max()):.5f}) for {args.precision:g}, "
        f"R2 {result.estimate.r2:.3f}, "
        f"{sum(used) / k:.0f} images scored, {sum(passes) / k:,.0f} passes of {table._passes * args.size:,} for all "
        f"({time.perf_counter() - begun:.0f} s)"
    )


if __name__ == "__main__":
    main()
