"""Likelihoods: error against evaluations and time, for each solver and each trace estimator, on one network's weights.

    python benchmarks/likelihood.py --run pretrained/vp_fashion_mnist          # about 20 minutes on one core
    python benchmarks/likelihood.py --run runs/smooth --usual runs/usual --json likelihood.json --plot likelihood.png

Solvers, all with the same single probe of random signs along the whole path, so that the solver's error is all that differs:
  reference code   SciPy's RK45 on the flattened batch in (x, t), the network run twice an evaluation (once for the drift,
                   once for the trace), its own float32 expression for sigma(t): restated from the description of the
                   score_sde code (Song et al. 2021), at several tolerances. Its default is 1e-5
  SciPy, torchdiffeq, accurate    in the whitened state and clock of `sde_lib.WhitenedFlow`, one network run an evaluation
  fast             `likelihood.fast`, its grid placed by a pilot run on eight training images
The truth is a `fast` solution of many steps; one of half as many says how far the truth itself can be trusted.

Selection and report are apart: of the reference code's and of the fast settings the cheapest that meets the target on
*training* images is chosen, and then run, timed and reported on test images, next to all others. With `--usual`, a run
told 999 t by sines, the reference code is also run on that network, against its own truth: what smooth conditioning saves
in all. Both networks' bits/dim on the same images then say whether it costs anything.

Estimators, on the fast grid: the standard deviation of an image's value over repeated draws of the probes, and the time.

Times are medians of interleaved repeats, of processor time of this process.
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

from likelihood import Coloured, Hutchinson, Method, Uniform, accurate, bits_per_dim, fast, log_likelihood
from numerics import Adams, SampleStreams, SciPy, TorchDiffEq, rademacher
from workflow import load_run

FAMILIES = ("reference code", "SciPy", "torchdiffeq", "accurate", "fast")


def reference_code(sde, model, x, probe, tolerance):
    """log p of the batch the way the score_sde code computes it, and its evaluations of the network."""
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


class Subject:
    """A trained network and images, with all the ways of scoring them."""

    def __init__(self, folder, split, first, n, truth):
        self.run = load_run(folder)
        self.sde, self.model, self.flow = self.run.sde, self.run.model, self.run.flow
        if self.run.setup.config["sde"]["name"] != "vp":
            sys.exit(
                f"benchmarks/likelihood.py: got {folder}, a run of {self.run.setup.config['sde']['name']}; expected one of vp"
            )
        self.D = math.prod(self.run.dataset.event_shape)
        self.n, self.images = n, self.run.dataset.split(split).x[first : first + n]
        self.x = self.noisy(self.images, 1)
        self.streams = lambda: SampleStreams(11, torch.arange(n))
        self.probe = rademacher((n, 1, *self.x.shape[1:]), self.streams(), dtype=self.x.dtype).squeeze(1)
        begun = time.process_time()
        pilot = self.noisy(self.run.dataset.split("train").x[:8], 2)
        self.method = fast(self.sde, self.model, pilot, steps=48, data_std=self.flow.data_std)
        self.pilot_seconds = time.process_time() - begun
        self.truth = self.bits(self.fast(truth)[0])
        self.doubt = float((self.bits(self.fast(truth // 2)[0]) - self.truth).abs().mean())

    def noisy(self, images, seed):
        return Uniform()(images, self.run.transform, self.sde, self.sde.t_min, generator=SampleStreams(seed))[0]

    def bits(self, log_prob):
        return -(log_prob / self.D + self.run.transform.log_det) / math.log(2)

    def ours(self, solver, grid=None):
        found = log_likelihood(
            self.sde,
            self.model,
            self.x,
            method=Method(solver, flow=self.flow, grid=grid),
            divergence=Hutchinson(fresh=False),
            generator=self.streams(),
        )
        return found.log_prob, found.nfe

    def fast(self, steps):
        return self.ours(Adams(steps=steps, points=5, start="rising"), self.method.grid)

    def rows(self, families=FAMILIES):
        found = {}
        for tolerance in (1e-3, 3e-4, 1e-4, 5e-5, 1e-5):
            found[f"reference code, RK45 {tolerance:g}"] = lambda tol=tolerance: reference_code(
                self.sde, self.model, self.x, self.probe, tol
            )
        for tolerance in (1e-3, 1e-4, 1e-5):
            found[f"SciPy RK45 {tolerance:g}, whitened"] = lambda tol=tolerance: self.ours(SciPy("RK45", tol))
            found[f"torchdiffeq dopri5 {tolerance:g}, whitened"] = lambda tol=tolerance: self.ours(
                TorchDiffEq("dopri5", tol)
            )
            found[f"accurate, {tolerance:g}, per sample"] = lambda tol=tolerance: self.ours(
                accurate(tolerance=tol).solver
            )
        for steps in (20, 24, 28, 32, 40, 48, 64, 96):
            found[f"fast, {steps} steps"] = lambda n=steps: self.fast(n)
        return {name: row for name, row in found.items() if name.startswith(families)}


def measure(subject, rows, repeats):
    """A dict a row: error against the subject's truth, evaluations, and the median time of interleaved repeats."""
    times, values = {name: [] for name in rows}, {}
    for _ in range(repeats):
        for name, row in rows.items():
            begun = time.process_time()
            values[name] = row()
            times[name].append(time.process_time() - begun)
    table = []
    for name, (log_prob, calls) in values.items():
        error = subject.bits(log_prob) - subject.truth
        table.append(
            {
                "row": name,
                "network_runs": calls,
                "seconds": statistics.median(times[name]),
                "mean_error": float(error.abs().mean()),
                "max_error": float(error.abs().max()),
                "bias": float(error.mean()),
            }
        )
    return table


def show(table, title):
    print(f"\n{title:44}{'network runs':>13}{'seconds':>9}{'mean |error|':>14}{'largest':>10}{'bias':>10}")
    for row in table:
        print(
            f"{row['row']:44}{row['network_runs']:13}{row['seconds']:9.2f}{row['mean_error']:14.1e}"
            f"{row['max_error']:10.1e}{row['bias']:+10.0e}",
            flush=True,
        )


def cheapest(table, family, target):
    """The row of the family that meets the target with the fewest network runs, or None."""
    meeting = [r for r in table if r["row"].startswith(family) and r["mean_error"] <= target]
    return min(meeting, key=lambda r: r["network_runs"], default=None)


def estimators(subject, steps, repeats):
    """The spread of an image's bits/dim over draws of the probes, for each estimator, on the fast grid."""
    solver = Adams(steps=steps, points=5, start="rising")
    table = []
    for name, divergence in (
        ("one probe along the path", Hutchinson(fresh=False)),
        ("one fresh probe a node", Hutchinson()),
        ("four fresh probes a node", Hutchinson(probes=4)),
        ("2x2 coloured, fresh", Coloured(spacing=2)),
        ("4x4 coloured, fresh", Coloured(spacing=4)),
        ("one fresh Gaussian probe a node", Hutchinson(noise="gaussian")),
    ):
        begun, values = time.process_time(), []
        for k in range(repeats):
            found = log_likelihood(
                subject.sde,
                subject.model,
                subject.x,
                method=Method(solver, flow=subject.flow, grid=subject.method.grid),
                divergence=divergence,
                generator=SampleStreams(100 + k, torch.arange(subject.n)),
            )
            values.append(subject.bits(found.log_prob))
        spread = float(torch.stack(values).var(dim=0).mean().sqrt())
        seconds = (time.process_time() - begun) / repeats
        relative = 1 / math.sqrt(2 * subject.n * (repeats - 1))
        table.append({"estimator": name, "spread": spread, "relative_error": relative, "seconds": seconds})
        print(f"{name:44}{spread:9.4f} ± {spread * relative:.4f} bits/dim an image{seconds:9.2f} s", flush=True)
    return table


def plot(tables, file):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for label, table in tables.items():
        for family in FAMILIES:
            rows = [row for row in table if row["row"].startswith(family)]
            for axis, x in zip(axes, ("network_runs", "seconds"), strict=True):
                if rows:
                    axis.plot([r[x] for r in rows], [r["mean_error"] for r in rows], marker="o", label=family + label)
    for axis, name in zip(axes, ("network runs", "seconds"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=name)
    axes[0].set_ylabel("mean |error|, bits/dim")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(file, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="a run of experiments/vp.py, or a pretrained folder")
    parser.add_argument("--usual", type=Path, help="the same with --config.model.conditioning=time")
    parser.add_argument(
        "--images", type=int, default=16, help="of the test split, and as many of training to choose by"
    )
    parser.add_argument("--truth", type=int, default=256, help="steps of the solution that counts as the truth")
    parser.add_argument("--usual_truth", type=int, default=1000, help="the same for --usual")
    parser.add_argument("--repeats", type=int, default=1, help="of the timing")
    parser.add_argument("--draws", type=int, default=6, help="of the probes, for the estimators; 0 leaves them out")
    parser.add_argument("--target", type=float, default=1e-3, help="mean |error| in bits/dim that a row should meet")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen_on = Subject(args.run, "train", 1000, args.images, args.truth)
    selection = measure(chosen_on, chosen_on.rows(("reference code", "fast")), 1)
    show(selection, "to choose by: training images")
    subject = Subject(args.run, "test", 0, args.images, args.truth)
    print(f"\ntruth good to {subject.doubt:.1e} bits/dim; pilot {subject.pilot_seconds:.1f} s")
    table = measure(subject, subject.rows(), args.repeats)
    show(table, "to report: test images")
    result = {
        "truth_error": subject.doubt,
        "pilot_seconds": subject.pilot_seconds,
        "selection": selection,
        "rows": table,
    }
    by_name = {row["row"]: row for row in table}
    default = by_name["reference code, RK45 1e-05"]
    ours = cheapest(selection, "fast", args.target)
    print(f"\nchosen to meet mean |error| <= {args.target:g} on training images, on test images:")
    for family in FAMILIES:
        choice = cheapest(selection, family, args.target)
        if choice is not None:
            row = by_name[choice["row"]]
            ratio = row["seconds"] / by_name[ours["row"]]["seconds"] if ours else math.nan
            print(f"  {row['row']:42}{row['mean_error']:9.1e}{row['seconds']:9.2f} s, {ratio:.1f} x the fast one's")
    if ours:
        seconds = by_name[ours["row"]]["seconds"]
        print(f"  the reference's default takes {default['seconds'] / seconds:.1f} times as long as {ours['row']}")
    tables = {"": table}
    if args.draws:
        print(f"\nestimators, {ours['row'] if ours else 'fast, 32 steps'}")
        result["estimators"] = estimators(subject, int(ours["row"].split()[1]) if ours else 32, args.draws)
    if args.usual:
        theirs = Subject(args.usual, "test", 0, args.images, args.usual_truth)
        print(f"\nthe network told 999 t by sines: truth good to {theirs.doubt:.1e} bits/dim")
        usual = measure(theirs, theirs.rows(("reference code, RK45 0.0001", "reference code, RK45 1e-05", "fast")), 1)
        show(usual, "the usual embedding: test images")
        tables[", usual embedding"] = usual
        row = next(r for r in usual if r["row"] == default["row"])
        print(f"\n{default['row']} on it: {row['seconds']:.1f} s", end="")
        if ours:
            print(
                f", {row['seconds'] / by_name[ours['row']]['seconds']:.1f} times as long as {ours['row']} on the smooth one"
            )
        values = {}
        for name, one in (("smooth", subject), ("usual", theirs)):
            values[name] = bits_per_dim(
                one.sde,
                one.model,
                one.run.dataset.split("test").x[:64],
                one.run.transform,
                method=Method(Adams(steps=96, points=5, start="rising"), flow=one.flow, grid=one.method.grid),
                generator=SampleStreams(5, torch.arange(64)),
            )
            print(f"{name}: {values[name]}")
        gap = values["usual"].per_image - values["smooth"].per_image
        stderr = float(gap.std()) / 8
        print(f"usual - smooth, paired by image: {float(gap.mean()):+.3f} ± {stderr:.3f} bits/dim (64 test images)")
        result["usual"] = {"rows": usual, "truth_error": theirs.doubt, "gap": float(gap.mean()), "gap_stderr": stderr}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(tables, args.plot)


if __name__ == "__main__":
    main()
