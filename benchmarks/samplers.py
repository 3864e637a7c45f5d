"""What a sampler costs outside the network, beside the same methods of other libraries where they are installed.

    python benchmarks/samplers.py                       # a 28x28 U-Net, batch 4, 50 steps
    python benchmarks/samplers.py --batch 16 --steps 20 --repeats 5 --device cuda --json samplers.json

Every sampler runs on one network and one VP process. The share outside the network is 1 - (time of its calls) / (time of
the run): on the CPU the calls are timed inside the same run; on a GPU, where a call returns before it is done, the same
number of bare calls is timed beside it. Runs of the different samplers are interleaved, and the medians are reported.
diffusers' schedulers are of a discrete chain; their loop is written here as its pipelines write it. Without diffusers
(`pip install diffusers`) its rows are left out.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

# this file has the name of the package that it measures, and a script's own folder comes first
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch

import samplers
from models import ScoreModel, UNet
from samplers import DDIM, DEIS, EDM, DPMSolver, Langevin, PredictorCorrector, ProbabilityFlow, UniPC
from sde_lib import VPSDE


class Timed:
    """A score that adds up the time of its calls."""

    def __init__(self, score) -> None:
        self.score, self.seconds, self.calls = score, 0.0, 0

    def __call__(self, x, t):
        start = time.perf_counter()
        value = self.score(x, t)
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return value


def ours(steps: int):
    from numerics import Heun

    return {
        "pc (Langevin)": PredictorCorrector(steps=steps // 2, corrector=Langevin(), denoise=False),
        "ancestral": samplers.create("ancestral", steps=steps, denoise=False),
        "ddim": DDIM(steps=steps, denoise=False),
        "dpm_solver 2": DPMSolver(steps=steps, denoise=False),
        "dpm_solver 3": DPMSolver(steps=steps, order=3, denoise=False),
        "unipc 2": UniPC(steps=steps, denoise=False),
        "deis 3": DEIS(steps=steps, denoise=False),
        "edm (Heun)": EDM(steps=steps // 2, denoise=False),
        "flow, Heun": ProbabilityFlow(solver=Heun(steps=steps // 2)),
    }


def theirs(steps: int):
    """(label, the same method of ours, a function of (network, x, generator) that runs it)."""
    if find_spec("diffusers") is None:
        return []
    from diffusers import (
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    )

    chain = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}

    def loop(scheduler, **options):
        def run(network, x, generator):
            scheduler.set_timesteps(steps)
            x = x * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                eps = network(scheduler.scale_model_input(x, t), t)
                x = scheduler.step(eps, t, x, generator=generator, **options).prev_sample
            return x

        return run

    def plain(scheduler):
        def run(network, x, generator):
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t), t, x).prev_sample
            return x

        return run

    return [
        ("diffusers DDPM", "ancestral", loop(DDPMScheduler(clip_sample=False, **chain))),
        ("diffusers DDIM", "ddim", loop(DDIMScheduler(clip_sample=False, **chain), eta=0.0)),
        ("diffusers DPM-Solver++ 2M", "dpm_solver 2", plain(DPMSolverMultistepScheduler(**chain))),
        ("diffusers DPM-Solver++ 3M", "dpm_solver 3", plain(DPMSolverMultistepScheduler(solver_order=3, **chain))),
        ("diffusers UniPC 2", "unipc 2", plain(UniPCMultistepScheduler(**chain))),
        ("diffusers DEIS 3", "deis 3", plain(DEISMultistepScheduler(solver_order=3, **chain))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = ScoreModel(UNet(image_size=options.size, channels=32, multipliers=(1, 2, 2)), VPSDE()).to(device).eval()
    shape = (options.batch, 1, options.size, options.size)
    x_T = torch.randn(shape, device=device)
    on_cpu = device.type == "cpu"

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def discrete(score):
        # a scheduler's index i stands for t = (i + 1) / 1000, and its network predicts the noise
        def network(x, index):
            t = ((index.to(device) + 1) / 1000).expand(len(x)).double()
            return -model.sde.sigma(t).to(x.dtype).reshape(-1, 1, 1, 1) * score(x, t)

        return network

    runs = {}
    for name, sampler in ours(options.steps).items():
        runs[name] = lambda score, sampler=sampler: sampler(
            model.sde, score, shape, x_T=x_T, generator=torch.Generator(device).manual_seed(0)
        )
    for name, _, run in theirs(options.steps):
        runs[name] = lambda score, run=run: run(discrete(score), x_T, torch.Generator(device).manual_seed(0))

    @torch.no_grad()
    def measure(run) -> tuple[float, float, int]:
        timed = Timed(model)
        wait()
        start = time.perf_counter()
        run(timed)
        wait()
        total = time.perf_counter() - start
        if on_cpu:
            return total, timed.seconds, timed.calls
        t = torch.full((options.batch,), 0.5, dtype=torch.float64, device=device)
        start = time.perf_counter()
        for _ in range(timed.calls):
            model(x_T, t)
        wait()
        return total, time.perf_counter() - start, timed.calls

    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
    for run in runs.values():
        measure(run)  # warm
    for _ in range(options.repeats):
        for name, run in runs.items():
            found[name].append(measure(run))
    rows = []
    for name, values in found.items():
        total = statistics.median(v[0] for v in values)
        outside = statistics.median((v[0] - v[1]) / v[0] for v in values)
        step = statistics.median((v[0] - v[1]) / v[2] for v in values)
        rows.append(
            {"sampler": name, "calls": values[0][2], "seconds": total, "outside": outside, "us_per_call": 1e6 * step}
        )
    print(f"batch {options.batch}, 1x{options.size}x{options.size}, {options.threads} threads, {device}")
    print(f"{'sampler':28s} {'calls':>5s} {'seconds':>8s} {'outside the network':>20s} {'us a call':>10s}")
    for row in rows:
        print(
            f"{row['sampler']:28s} {row['calls']:5d} {row['seconds']:8.3f} {row['outside']:19.1%} {row['us_per_call']:10.0f}"
        )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
