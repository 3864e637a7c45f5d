"""What a sampler costs outside the network, beside the same methods of other libraries where they are installed.

    python benchmarks/samplers.py                       # a 28x28 U-Net, batch 4, 50 steps
    python benchmarks/samplers.py --batch 16 --steps 20 --repeats 5 --device cuda --json samplers.json

Every run is of one network and one VP process with the same number of evaluations, and none ends with a denoising step.
The share outside the network is 1 - (time of its calls) / (time of the run): on the CPU the calls are timed inside the
same run; on a GPU, where a call returns before it is done, the same number of bare calls is timed after it. Runs of the
different samplers are interleaved, and the medians are reported. On one thread of a CPU the clock is the thread's own, so
that other processes do not count.

The peers are diffusers, azula and k-diffusion; one that is not installed is said so and left out. Each wants another
prediction (noise, denoised data, denoised data in units of x / alpha) at another time (an index, t, kappa); that change of
variables is ours and not theirs, so it is timed as part of the network. diffusers' loop is written as its pipelines write
it. The pairs are of one method, though not of one grid: "ancestral" is k-diffusion's Euler ancestral, DDIM its Euler, and
DEIS its LMS (Adams-Bashforth in kappa, the paper's rhoAB) and azula's zEAB (in log kappa).
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# this file has the name of the package that it measures, and a script's own folder comes first
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch

import samplers
from models import ScoreModel, UNet
from samplers import DDIM, DEIS, DPMSolver, HeunEDM, Langevin, PredictorCorrector, ProbabilityFlow, UniPC
from sde_lib import VPSDE

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# what a library calls for a score, and the run with that, from x_T and a generator
Run = tuple[Callable[[Network], Network], Callable[[Network, torch.Tensor, torch.Generator], object]]


class Timed:
    """A network that adds up the time of its calls, and keeps the arguments of the last."""

    def __init__(self, network: Network, clock: Callable[[], float]) -> None:
        self.network, self.clock, self.seconds, self.calls = network, clock, 0.0, 0

    def __call__(self, x, t):
        start = self.clock()
        value = self.network(x, t)
        self.seconds += self.clock() - start
        self.calls += 1
        self.last = x, t
        return value


def ours(sde: VPSDE, steps: int) -> Iterator[tuple[str, str, Run]]:
    from numerics import Heun

    found = {
        "ancestral": samplers.create("ancestral", steps=steps, denoise=False),
        "DDIM": DDIM(steps=steps, denoise=False),
        "DPM-Solver++ 2M": DPMSolver(steps=steps, denoise=False),
        "DPM-Solver++ 3M": DPMSolver(steps=steps, order=3, denoise=False),
        "UniPC 2": UniPC(steps=steps, denoise=False),
        "DEIS 3": DEIS(steps=steps, denoise=False),
        "Heun (EDM)": HeunEDM(steps=steps // 2, denoise=False),
        "predictor-corrector": PredictorCorrector(steps=steps // 2, corrector=Langevin(), denoise=False),
        "flow, Heun": ProbabilityFlow(solver=Heun(steps=steps // 2)),
    }

    def run(sampler):
        return lambda score, x, generator: sampler(sde, score, x.shape, x_T=x, generator=generator)

    for method, sampler in found.items():
        yield method, "ours", (lambda score: score, run(sampler))


def of_diffusers(sde: VPSDE, steps: int) -> Iterator[tuple[str, str, Run]]:
    import diffusers

    chain = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    sigmas = sde.sigma((torch.arange(1000) + 1) / 1000).tolist()

    def noise(score):
        # a scheduler's index i stands for t = (i + 1) / 1000
        def network(x, index):
            t = x.new_full((len(x),), (float(index) + 1) / 1000, dtype=torch.float64)
            return -sigmas[int(index)] * score(x, t)

        return network

    def loop(scheduler, steps=steps, random=False, **options):
        def run(network, x, generator):
            scheduler.set_timesteps(steps)
            x = x * scheduler.init_noise_sigma
            drawn = {"generator": generator} if random else {}
            for t in scheduler.timesteps:
                eps = network(scheduler.scale_model_input(x, t), t)
                x = scheduler.step(eps, t, x, **options, **drawn).prev_sample
            return x

        return run

    found = {
        "ancestral": loop(diffusers.DDPMScheduler(clip_sample=False, **chain), random=True),
        "DDIM": loop(diffusers.DDIMScheduler(clip_sample=False, **chain), eta=0.0),
        "DPM-Solver++ 2M": loop(diffusers.DPMSolverMultistepScheduler(**chain)),
        "DPM-Solver++ 3M": loop(diffusers.DPMSolverMultistepScheduler(solver_order=3, **chain)),
        "UniPC 2": loop(diffusers.UniPCMultistepScheduler(**chain)),
        "DEIS 3": loop(diffusers.DEISMultistepScheduler(solver_order=3, **chain)),
        # its last step is of one evaluation
        "Heun (EDM)": loop(diffusers.HeunDiscreteScheduler(**chain), steps=steps // 2),
    }
    for method, run in found.items():
        yield method, "diffusers", (noise, run)


def of_azula(sde: VPSDE, steps: int) -> Iterator[tuple[str, str, Run]]:
    from azula import sample
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import Schedule

    class VP(Schedule):
        # as azula's own are: a few operations in the dtype of t
        def __call__(self, t):
            B = sde.beta_min * t + (sde.beta_max - sde.beta_min) / 2 * t**2
            return torch.exp(-B / 2), torch.sqrt(-torch.expm1(-B))

    class Denoised(Denoiser):
        def __init__(self, network) -> None:
            super().__init__()
            self.network, self.schedule = network, VP()

        def forward(self, x, t):
            return DiracPosterior(mean=self.network(x, t))

    def denoised(score):
        def network(x, t):
            alpha, sigma = VP()(t)
            return (x + sigma**2 * score(x, t.expand(len(x)).double())) / alpha

        return network

    def loop(sampler, steps=steps, **options):
        def run(network, x, generator):
            return sampler(Denoised(network), start=1.0, stop=sde.t_end, steps=steps, silent=True, **options)(x)

        return run

    found = {
        "ancestral": loop(sample.DDPMSampler),
        "DDIM": loop(sample.DDIMSampler),
        "DPM-Solver++ 2M": loop(sample.xEABSampler, order=2),
        "DPM-Solver++ 3M": loop(sample.xEABSampler, order=3),
        "DEIS 3": loop(sample.zEABSampler, order=3),
        "Heun (EDM)": loop(sample.HeunSampler, steps // 2),
        "predictor-corrector": loop(sample.PCSampler, steps // 2),
    }
    for method, run in found.items():
        yield method, "azula", (denoised, run)


def of_k_diffusion(sde: VPSDE, steps: int) -> Iterator[tuple[str, str, Run]]:
    from k_diffusion import sampling

    grid = samplers.HeunEDM.default_grid
    # the float32 kappas of the runs, and t, alpha there
    kappas = {n: torch.exp(-sde.log_snr(grid(sde, n)) / 2).float() for n in (steps, steps // 2)}
    known = {}
    for kappa in kappas.values():
        t = sde.time_of_log_snr(-2 * kappa.double().log())
        known.update(zip(kappa.tolist(), zip(t.tolist(), sde.alpha(t).tolist(), strict=True), strict=True))

    def denoised(score):
        def network(y, kappa):
            t, alpha = known[kappa[0].item()]
            x = y * alpha
            # (x + sigma^2 score) / alpha
            return torch.add(
                y, score(x, x.new_full((len(x),), t, dtype=torch.float64)), alpha=alpha * kappa[0].item() ** 2
            )

        return network

    def loop(method, steps=steps, **options):
        def run(network, x, generator):
            sigmas = kappas[steps].to(x.device)
            return method(network, x / known[sigmas[0].item()][1], sigmas, disable=True, **options)

        return run

    found = {
        "ancestral": loop(sampling.sample_euler_ancestral),
        "DDIM": loop(sampling.sample_euler),
        "DPM-Solver++ 2M": loop(sampling.sample_dpmpp_2m),
        "DEIS 3": loop(sampling.sample_lms, order=3),
        "Heun (EDM)": loop(sampling.sample_heun, steps=steps // 2),
    }
    for method, run in found.items():
        yield method, "k-diffusion", (denoised, run)


PEERS = {"diffusers": of_diffusers, "azula": of_azula, "k-diffusion": of_k_diffusion}


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
    clock = time.thread_time if on_cpu and options.threads == 1 else time.perf_counter

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    runs = list(ours(model.sde, options.steps))
    missing = {}
    for peer, methods in PEERS.items():
        try:
            runs += methods(model.sde, options.steps)
        except ModuleNotFoundError as error:
            missing[peer] = "not installed" if error.name == peer.replace("-", "_") else f"{error.name} not installed"
        except (ImportError, RuntimeError) as error:
            missing[peer] = f"could not be imported ({error})"
    methods = list(dict.fromkeys(method for method, _, _ in runs))
    runs.sort(key=lambda run: methods.index(run[0]))

    @torch.no_grad()
    def measure(run: Run) -> tuple[float, float, int]:
        adapt, sample = run
        timed = Timed(adapt(model), clock)
        generator = torch.Generator(device).manual_seed(0)
        wait()
        start = clock()
        sample(timed, x_T, generator)
        wait()
        total = clock() - start
        if on_cpu:
            return total, timed.seconds, timed.calls
        start = clock()
        for _ in range(timed.calls):
            timed.network(*timed.last)
        wait()
        return total, clock() - start, timed.calls

    found: list[list[tuple[float, float, int]]] = [[] for _ in runs]
    for _, _, run in runs:
        measure(run)  # warm
    for _ in range(options.repeats):
        for values, (_, _, run) in zip(found, runs, strict=True):
            values.append(measure(run))
    rows = []
    for (method, library, _), values in zip(runs, found, strict=True):
        rows.append(
            {
                "method": method,
                "library": library,
                "calls": values[0][2],
                "seconds": statistics.median(v[0] for v in values),
                "outside": statistics.median((v[0] - v[1]) / v[0] for v in values),
                "us_per_call": 1e6 * statistics.median((v[0] - v[1]) / v[2] for v in values),
            }
        )
    print(f"batch {options.batch}, 1x{options.size}x{options.size}, {options.threads} threads, {device}")
    print(
        f"{'method':20s} {'library':12s} {'calls':>5s} {'seconds':>8s} {'outside the network':>20s} {'us a call':>10s}"
    )
    for row in rows:
        print(
            f"{row['method']:20s} {row['library']:12s} {row['calls']:5d} {row['seconds']:8.3f} {row['outside']:20.1%} "
            f"{row['us_per_call']:10.0f}"
        )
    for peer, why in missing.items():
        print(f"{peer}: {why}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"options": vars(options), "rows": rows, "missing": missing}, file, indent=1)


if __name__ == "__main__":
    main()
