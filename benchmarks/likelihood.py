"""Likelihoods: error against time, for each solver and formulation, on one network's weights and the same held-out images.

    python benchmarks/likelihood.py --run runs/vp                 # about ten minutes on two cores
    python benchmarks/likelihood.py --run runs/vp --images 8 --json likelihood.json --plot likelihood.png

Rows:
  reference code   SciPy's RK45 on the flattened batch in (x, t), the network run twice an evaluation (once for the drift,
                   once for the trace), its own float32 expression for sigma(t): restated from the description of the
                   score_sde code (Song et al. 2021), at several tolerances. Its default is 1e-5
  SciPy, torchdiffeq, Dopri5    in the whitened state and clock of `sde_lib.WhitenedFlow`, one network run an evaluation
  Adams            on a grid placed by a pilot run on *training* images

All take the same single probe of random signs along the whole path, so that the solver's error is all that differs. The
truth is an Adams solution of many steps; a second of half as many says how far the truth itself can be trusted. Times are
medians of interleaved repeats.
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

# this file has the name of the package that it measures, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import numpy as np
import torch

from experiments import build
from likelihood import Hutchinson, Uniform, log_likelihood, pilot_grid
from numerics import Adams, Dopri5, SampleStreams, SciPy, TorchDiffEq, rademacher


def reference_code(sde, model, x, probe, tolerance):
    """log p of the batch the way the score_sde code computes it, and its evaluations of the network (forward, backward)."""
    from scipy.integrate import solve_ivp

    shape, D = x.shape, x[0].numel()
    beta_min, beta_max = sde.beta_min, sde.beta_max
    calls = 0

    def drift(v, t):
        nonlocal calls
        calls += 1
        # float32 coefficients, and the score from the network's noise by the float32 sigma
        t32 = torch.full((shape[0],), t, dtype=torch.float32)
        log_alpha = -0.25 * t32**2 * (beta_max - beta_min) - 0.5 * t32 * beta_min
        sigma = torch.sqrt(1.0 - torch.exp(2.0 * log_alpha))
        beta = beta_min + t32 * (beta_max - beta_min)
        column = (-1, *(1,) * (x.ndim - 1))
        score = -model.noise(v, t32) / sigma.reshape(column)
        return -0.5 * beta.reshape(column) * (v + score)

    def slope(t, state):
        v = torch.from_numpy(state[: -shape[0]]).reshape(shape).float()
        with torch.no_grad():
            velocity = drift(v, t)
        v = v.requires_grad_()
        with torch.enable_grad():
            (product,) = torch.autograd.grad((drift(v, t) * probe).sum(), v)
        trace = (product * probe).flatten(1).sum(dim=1)
        return np.concatenate([velocity.double().flatten().numpy(), trace.double().numpy()])

    start = np.concatenate([x.double().flatten().numpy(), np.zeros(shape[0])])
    found = solve_ivp(slope, (1e-5, sde.T), start, rtol=tolerance, atol=tolerance, method="RK45")
    z = torch.from_numpy(found.y[: -shape[0], -1]).reshape(shape)
    change = torch.from_numpy(found.y[-shape[0] :, -1])
    prior = -0.5 * z.flatten(1).square().sum(dim=1) - 0.5 * D * math.log(2 * math.pi)
    return prior + change, calls


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="a run of experiments/vp.py")
    parser.add_argument("--images", type=int, default=16, help="of the test split (the pilot runs on training images)")
    parser.add_argument("--truth", type=int, default=1000, help="steps of the solution that counts as the truth")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--target", type=float, default=1e-3, help="mean |error| in bits/dim that a row should meet")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    run = build.load_run(args.run)
    sde, model, flow = run.sde, run.model, run.flow
    if not hasattr(sde, "beta_min") or "VPSDE(" not in repr(sde) or repr(sde).startswith("Sub"):
        sys.exit("benchmarks/likelihood.py: got a run that is not VP; expected one of experiments/vp.py")

    def states(split, n, seed):
        images = run.dataset.split(split).x[:n]
        return Uniform()(images, run.transform, sde, sde.t_min, generator=SampleStreams(seed))[0]

    x, D = states("test", args.images, 1), math.prod(run.dataset.event_shape)
    streams = lambda: SampleStreams(11, torch.arange(args.images))  # noqa: E731
    probe = rademacher((args.images, 1, *x.shape[1:]), streams(), dtype=x.dtype).squeeze(1)
    bits = lambda log_prob: -log_prob / (D * math.log(2))  # noqa: E731

    def ours(solver, grid=None):
        found = log_likelihood(
            sde, model, x, divergence=Hutchinson(fresh=False), solver=solver, flow=flow, grid=grid, generator=streams()
        )
        return found.log_prob, found.nfe

    begun = time.perf_counter()
    grid = pilot_grid(sde, model, states("train", 8, 2), flow=flow)
    pilot_seconds = time.perf_counter() - begun
    truth = bits(ours(Adams(steps=args.truth, points=4), grid)[0])
    doubt = float((bits(ours(Adams(steps=args.truth // 2, points=4), grid)[0]) - truth).abs().mean())
    print(
        f"{args.images} images of {D} dimensions; the truth is good to {doubt:.1e} bits/dim; pilot {pilot_seconds:.1f} s"
    )

    rows = {}
    for tolerance in (1e-3, 1e-4, 5e-5, 1e-5):
        rows[f"reference code, RK45 {tolerance:g}"] = lambda tol=tolerance: reference_code(sde, model, x, probe, tol)
    for tolerance in (1e-3, 1e-4, 1e-5):
        rows[f"SciPy RK45 {tolerance:g}, whitened"] = lambda tol=tolerance: ours(SciPy("RK45", tol))
        rows[f"torchdiffeq dopri5 {tolerance:g}, whitened"] = lambda tol=tolerance: ours(TorchDiffEq("dopri5", tol))
        rows[f"Dopri5 {tolerance:g}, per sample"] = lambda tol=tolerance: ours(Dopri5(rtol=tol, atol=tol))
    for steps in (24, 32, 48, 64, 96, 128, 192):
        rows[f"Adams 4, {steps} steps on a pilot's grid"] = lambda n=steps: ours(Adams(steps=n, points=4), grid)
    times = {name: [] for name in rows}
    values = {}
    for _ in range(args.repeats):
        for name, row in rows.items():
            begun = time.perf_counter()
            values[name] = row()
            times[name].append(time.perf_counter() - begun)
    table = []
    for name in rows:
        log_prob, calls = values[name]
        error = (bits(log_prob) - truth).abs()
        table.append(
            {
                "row": name,
                "network_runs": calls,
                "seconds": statistics.median(times[name]),
                "mean_error": float(error.mean()),
                "max_error": float(error.max()),
                "bias": float((bits(log_prob) - truth).mean()),
            }
        )
    print(f"\n{'':44}{'network runs':>13}{'seconds':>9}{'mean |error|':>14}{'largest':>10}{'bias':>10}")
    for row in table:
        print(
            f"{row['row']:44}{row['network_runs']:13}{row['seconds']:9.2f}{row['mean_error']:14.1e}"
            f"{row['max_error']:10.1e}{row['bias']:+10.0e}"
        )
    theirs = [row for row in table if row["row"].startswith("reference")]
    meeting = [row for row in theirs if row["mean_error"] <= args.target]
    fast = [row for row in table if not row["row"].startswith("reference") and row["mean_error"] <= args.target]
    if fast:
        best = min(fast, key=lambda row: row["seconds"])
        print(f"\nmean |error| <= {args.target:g}: the fastest of ours is {best['row']}")
        if meeting:
            loosest = min(meeting, key=lambda row: row["seconds"])
            print(
                f"  {loosest['seconds'] / best['seconds']:.1f} times less time than {loosest['row']}, the fastest that meets it"
            )
        print(f"  {theirs[-1]['seconds'] / best['seconds']:.1f} times less time than {theirs[-1]['row']}, its default")
    if args.json:
        args.json.write_text(
            json.dumps({"truth_error": doubt, "pilot_seconds": pilot_seconds, "rows": table}, indent=1)
        )
    if args.plot:
        plot(table, args.plot)


def plot(table, file):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for family in ("reference", "SciPy", "torchdiffeq", "Dopri5", "Adams"):
        rows = [row for row in table if row["row"].startswith(family)]
        axes.plot([r["seconds"] for r in rows], [r["mean_error"] for r in rows], marker="o", label=family)
    axes.set(xscale="log", yscale="log", xlabel="seconds", ylabel="mean |error|, bits/dim")
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
