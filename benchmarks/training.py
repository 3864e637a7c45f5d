"""Images per second in training, and the parts of a step, beside the reference recipe's operations on the same network.

    python benchmarks/training.py                                        # the demo's U-Net on 8x8 digits
    python benchmarks/training.py --network ddpmpp --threads 2           # DDPM++, 28x28x1, nf 32, batch 32
    python benchmarks/training.py --network ncsnpp --repeats 5 --json training.json

Three recipes take turns, one step each, and the medians are reported:

    reference   uniform t, torch's default Adam, clip_grad_norm_, an average parameter by parameter, the loss read at every
                step, and resampling and attention as the published code describes them (`restated` of benchmarks/networks.py)
    ours        stratified t, the norm, clipping and Adam in one fused pass, a foreach average, nothing read
    ours bf16   the same with the network under bf16 autocast

Read ratios, not milliseconds; they hold for these sizes on this machine.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

# this file has the name of the package that it measures, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent)] + [p for p in sys.path if Path(p or ".").resolve() != HERE]

import torch

import models
from data import from_tensor
from sde_lib import VESDE, VPSDE
from training import DSM, EMA, TrainingOptions
from training.batches import Batches
from training.streams import StepStreams
from training.update import FiniteGuard, apply_update, gradient_norm, make_optimizer

PARTS = ("data", "forward", "backward", "optimizer", "average")


def networks():
    """(constructor, shape, SDE, batch)."""
    ddpmpp = {"in_channels": 1, "image_size": 28, "channels": 32, "multipliers": (1, 2, 2), "blocks": 2}
    ncsnpp = {"image_size": 32, "channels": 32, "multipliers": (1, 2, 2), "blocks": 2, "attention_resolutions": (16,)}
    fir = {"fir_kernel": (1, 3, 3, 1), "progressive_input": "residual", "embedding": "fourier"}
    return {
        "unet": (lambda: models.UNet(channels=24, multipliers=(1, 2), blocks=1), (1, 8, 8), VPSDE(), 128),
        "ddpmpp": (lambda: models.NCSNpp(attention_resolutions=(14,), **ddpmpp), (1, 28, 28), VPSDE(), 32),
        "ncsnpp": (lambda: models.NCSNpp(**fir, **ncsnpp), (3, 32, 32), VESDE(), 32),
    }


class Clock:
    """Times the parts of a step; on a GPU it waits at their ends, so the parts do not overlap there."""

    def __init__(self, device):
        self.device, self.times, self.last = device, {}, 0.0

    def start(self):
        self.times, self.last = {}, self._now()

    def mark(self, part):
        now = self._now()
        self.times[part] = self.times.get(part, 0.0) + now - self.last
        self.last = now

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Ours:
    def __init__(self, model, batches, bf16):
        self.model, self.batches, self.bf16 = model, batches, bf16
        self.options = TrainingOptions(steps=1000)
        self.optimizer = make_optimizer(model.parameters(), self.options, fused=True)
        self.ema = EMA(model.named_parameters())
        self.guard = FiniteGuard(batches.device, sticky=True)
        self.objective = DSM()

    def step(self, step, clock):
        batch = self.batches(step)
        draws = self.objective.draw(self.model.sde, batch.x_0.shape, StepStreams(0, step, self.batches.device))
        clock.mark("data")
        with torch.autocast(self.batches.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.objective.loss(self.model, batch.x_0, draws, None)
        loss = (losses * draws["weight"].to(losses.dtype)).mean()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        norm = gradient_norm(self.optimizer)
        refused = self.guard.check(step, loss.detach(), norm, draws["t"], losses.detach())
        apply_update(self.optimizer, norm, refused, clip=self.options.clip)
        self.optimizer.zero_grad(set_to_none=True)
        clock.mark("optimizer")
        self.ema.update()
        clock.mark("average")


class Reference:
    def __init__(self, model, batches):
        self.model, self.batches = model, batches
        self.optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, eps=1e-8)
        self.shadow = [p.detach().clone() for p in model.parameters()]

    def step(self, step, clock):
        x_0 = self.batches(step).x_0
        t = torch.rand(len(x_0), device=x_0.device) * (1 - 1e-5) + 1e-5
        eps = torch.randn_like(x_0)
        clock.mark("data")
        self.optimizer.zero_grad()
        x_t = self.model.sde.perturb(x_0, t, eps)
        loss = (eps - self.model.noise(x_t, t)).flatten(1).square().mean(dim=1).mean()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=False)
        self.optimizer.step()
        loss.item()
        clock.mark("optimizer")
        with torch.no_grad():
            for s, p in zip(self.shadow, self.model.parameters(), strict=True):
                s.sub_(1e-4 * (s - p))
        clock.mark("average")


def restated():
    """The published way of resampling and attending, from the benchmark of the networks."""
    spec = importlib.util.spec_from_file_location("benchmark_networks", HERE / "networks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.restated()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=networks(), default="unet")
    parser.add_argument("--batch", type=int, default=0, help="samples per step; 0 for the network's own")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    make, shape, sde, batch = networks()[args.network]
    batch = args.batch or batch
    generator = torch.Generator().manual_seed(0)
    dataset = from_tensor(torch.randint(0, 256, (8 * batch, *shape), dtype=torch.uint8, generator=generator))

    def model():
        torch.manual_seed(0)
        return models.ScoreModel(make(), sde).to(device).train()

    batches = Batches(dataset.split("train"), dataset.transform(), batch_size=batch, seed=0, device=device)
    recipes = {
        "reference": (Reference(model(), batches), restated),
        "ours": (Ours(model(), batches, False), contextlib.nullcontext),
        "ours bf16": (Ours(model(), batches, True), contextlib.nullcontext),
    }
    clock, times = Clock(device), {name: [] for name in recipes}
    for repeat in range(-2, args.repeats):
        for name, (recipe, context) in recipes.items():
            with context():
                clock.start()
                recipe.step(repeat + 3, clock)
            if repeat >= 0:
                times[name].append(dict(clock.times))
    parameters = models.parameter_count(recipes["ours"][0].model)
    print(f"{args.network}: {parameters:,} parameters, {batch} x {shape}, {device}, {torch.get_num_threads()} threads")
    print(
        f"{'':12s} {'images/s':>9s} {'ms/step':>8s} {'faster':>7s}  "
        + " ".join(f"{part:>10s}" for part in PARTS)
        + "   opt+avg"
    )
    rows = {}
    for name, steps in times.items():
        total = statistics.median(sum(step.values()) for step in steps)
        parts = {part: statistics.median(step[part] for step in steps) for part in PARTS}
        rows[name] = {"images_per_second": batch / total, "seconds": total, "parts": parts}
        rows[name]["faster"] = rows["reference"]["seconds"] / total
        share = (parts["optimizer"] + parts["average"]) / total
        print(
            f"{name:12s} {batch / total:9.1f} {1e3 * total:8.1f} {rows[name]['faster']:7.2f}  "
            + " ".join(f"{1e3 * parts[part]:10.2f}" for part in PARTS)
            + f"   {100 * share:6.1f}%"
        )
    if args.json:
        Path(args.json).write_text(json.dumps({"network": args.network, "batch": batch, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
