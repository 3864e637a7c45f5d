"""How the same test images are scored in the literature and here: network passes, seconds, the mean and its errors.

    python benchmarks/protocols.py --run pretrained/vp_fashion_mnist --images 16

    score_sde      SciPy's RK45 at 1e-5 on the batch as one system, in t and x; one probe along the path, and the network run
                   twice an evaluation, for the drift and for the trace (Song et al. 2021)
    torchdiffeq    dopri5 at 1e-5 in t and x, as flow-matching codes score; one forward pass and one product an evaluation
    fast           ours, the steps chosen for 1e-3 bits/dim, two fresh probes an evaluation

All see the same images with the same dequantisation noise. The truth is a fixed grid of 128 steps, with fresh 2x2 coloured
probes, whose own noise is stated beside it. Passes count a forward pass 1 and a vector-Jacobian product 2.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

# this folder has a file with the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import torch

from likelihood import Coloured, Hutchinson, Method, Uniform, bits_per_dim, choose_steps
from numerics import SampleStreams, SciPy, TorchDiffEq
from sde_lib import PlainFlow
from workflow import load_run
from workflow.report import table


class Twice:
    """A score whose network is run a second time, as a code does that computes drift and trace apart."""

    def __init__(self, score):
        self.score = score

    def __call__(self, x, t):
        with torch.no_grad():
            self.score(x.detach(), t)
        return self.score(x, t)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, nargs="+", type=Path, help="run folders")
    parser.add_argument("--images", default=16, type=int, help="test images of each")
    parser.add_argument("--truth", default=128, type=int, help="steps of the truth")
    args = parser.parse_args()
    for folder in args.run:
        run, n = load_run(folder, "cpu"), args.images
        images, ids = run.dataset.split("test").x[:n], torch.arange(n)
        pilot = Uniform()(run.pilot(16), run.transform, run.sde, run.sde.t_min, generator=SampleStreams(2))[0]
        begun = time.process_time()
        choice = choose_steps(run.sde, run.score, pilot, tolerance=1e-3, data_std=run.flow.data_std)
        print(
            f"{folder.name}: {choice.steps} steps, {choice.passes:,} passes, {time.process_time() - begun:.0f} s",
            flush=True,
        )
        fast = choice.method(data_std=run.flow.data_std)
        one = Hutchinson(fresh=False)
        tight = replace(fast, solver=fast.solver.with_steps(args.truth), refinement=None)
        ways = {
            "truth": (tight, Coloured(spacing=2), run.score, 0),
            "score_sde": (Method(SciPy("RK45", 1e-5), flow=PlainFlow()), one, Twice(run.score), 4),
            "torchdiffeq": (Method(TorchDiffEq("dopri5", 1e-5), flow=PlainFlow()), one, run.score, 3),
            "fast": (fast, Hutchinson(probes=2), run.score, 5),
        }
        rows, truth = [], None
        for name, (method, divergence, score, cost) in ways.items():
            begun = time.process_time()
            found = bits_per_dim(
                run.sde,
                score,
                images,
                run.transform,
                method=method,
                divergence=divergence,
                draws=1,
                companions=n if name == "fast" else 0,
                generator=SampleStreams(0, ids),
            )
            seconds = time.process_time() - begun
            if truth is None:
                truth = found
                print(f"truth {truth.mean:.4f}, its probes ± {truth.probe_stderr:.4f}, {seconds:.0f} s", flush=True)
                continue
            off = found.per_image - truth.per_image
            stated = ", ".join(
                f"{what} {'unknown' if math.isnan(v) else f'{v:.4f}'}"
                for what, v in (("probe", found.probe_stderr), ("solver", found.budget.solver))
            )
            mean, rms = f"{found.mean:.4f}", f"{float(off.square().mean().sqrt()):.4f}"
            own = seconds / n if name != "fast" else math.nan
            rows.append(
                (
                    name,
                    str(found.nfe),
                    str(cost * found.nfe),
                    f"{own:.2f}",
                    mean,
                    stated,
                    f"{float(off.mean()):+.4f}",
                    rms,
                )
            )
            print(rows[-1], flush=True)
            if name == "fast":  # without the companions, which state the solver's error
                begun = time.process_time()
                bits_per_dim(
                    run.sde, score, images, run.transform, method=method, divergence=divergence, draws=1, companions=0,
                    generator=SampleStreams(0, ids),
                )  # fmt: skip
                rows[-1] = (*rows[-1][:3], f"{(time.process_time() - begun) / n:.2f}", *rows[-1][4:])
        head = (
            "way",
            "evaluations",
            "passes an image",
            "seconds an image",
            "mean",
            "stated",
            "true error of the mean",
            "rms of an image",
        )
        print("\n".join(table(head, rows)), flush=True)


if __name__ == "__main__":
    main()
