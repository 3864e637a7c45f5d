"""Training, sampling and scoring on a GPU, in one table.

    python benchmarks/gpu.py [--json gpu.json] [--size 32] [--batch 64] [--device cuda]

Each line is the median of several runs after one that is left out; the host waits for the device at both ends of a run only.
Without a GPU it says so and ends; `--device cpu --size 8 --batch 4` runs the same code, to test it. No number of a GPU is in
this repository: none was there when this was written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent)] + [p for p in sys.path if Path(p or ".").resolve() != HERE]

import torch  # noqa: E402

import models  # noqa: E402
import samplers  # noqa: E402
from data import from_tensor  # noqa: E402
from likelihood import Hutchinson, fast, log_likelihood  # noqa: E402
from models import Preconditioned, ScoreModel  # noqa: E402
from sde_lib import VPSDE  # noqa: E402
from training import TrainingOptions, train  # noqa: E402

REPEATS = 5


def model_on(args):
    torch.manual_seed(0)
    net = models.UNet(in_channels=3, image_size=args.size, channels=64, multipliers=(1, 2), blocks=2)
    return ScoreModel(net, VPSDE(), Preconditioned(data_std=0.5)).to(args.device)


def seconds(args, work):
    """Median seconds of `work()`, and the peak of memory in GiB."""
    cuda = torch.device(args.device).type == "cuda"
    times = []
    if cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize(args.device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:]), torch.cuda.max_memory_allocated(args.device) / 2**30 if cuda else 0.0


def training_line(args, name, **changes):
    """Images per second of training, as the loop itself measures it."""
    grey = torch.randint(0, 256, (4 * args.batch, 3, args.size, args.size), dtype=torch.uint8)
    dataset = from_tensor(grey, levels=256)
    options = TrainingOptions(
        steps=args.steps, batch_size=args.batch, log_every=args.steps, progress=False, tensorboard=False, **changes
    )
    model = model_on(args)
    train(model, dataset.split("train"), dataset.transform(), options)
    result = train(model, dataset.split("train"), dataset.transform(), options)
    return [f"training, {name}", f"{result.steps_per_second * args.batch:.1f} images/s", result.peak_memory / 2**30]


def lines(args):
    for name, changes in (
        ("fp32", {}),
        ("bf16", {"precision": "bf16"}),
        ("bf16, compiled", {"precision": "bf16", "compile": True}),
        ("bf16, activations again", {"precision": "bf16", "checkpoint_activations": True}),
    ):
        if not (changes.get("compile") and args.no_compile):
            yield training_line(args, name, **changes)
    model = model_on(args).eval().requires_grad_(False)
    shape = (args.batch, 3, args.size, args.size)
    for name in ("pc", "ddim", "dpm_solver", "unipc", "heun"):
        sampler = samplers.create(name, steps=10)
        took, peak = seconds(args, lambda sampler=sampler: sampler(model.sde, model, shape, device=args.device))
        yield [f"sampling, {name}", f"{took / sampler.evaluations * 1e3:.2f} ms an evaluation", peak]
    x = torch.randn(shape, device=args.device) / 2
    method = fast(model.sde, model, x[:4], steps=8, data_std=0.5)
    for probes in (1, 2):
        divergence = Hutchinson(probes=probes)
        took, peak = seconds(
            args, lambda d=divergence: log_likelihood(model.sde, model, x, method=method, divergence=d)
        )
        yield [f"likelihood, {probes} probes", f"{took / 8 * 1e3:.2f} ms a step", peak]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default=32, type=int, help="pixels a side")
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--steps", default=50, type=int, help="of training")
    parser.add_argument("--no_compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", default=None, type=Path, help="file for the numbers")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing is measured")
        return
    name = torch.cuda.get_device_name(args.device) if torch.device(args.device).type == "cuda" else args.device
    print(f"{name}, torch {torch.__version__}, {args.size}x{args.size}x3, batch {args.batch}\n")
    print("| what | speed | peak GiB |\n|---|---|---|")
    rows = []
    for what, speed, peak in lines(args):
        print(f"| {what} | {speed} | {peak:.2f} |", flush=True)
        rows.append({"what": what, "speed": speed, "peak_gib": peak})
    if args.json is not None:
        args.json.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
