"""Time to get a batch, beside that of the training step that uses it: processor time on one thread, so that other processes
do not count.

    python benchmarks/data.py                      # the digits
    python benchmarks/data.py --preset fashion_mnist [--root FOLDER]

A batch is got from memory and from the mapped files of `data.save`: gathered in a random order, dequantised, mapped to model
units. (Training fetches the first part ahead in another thread; here it waits.)
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# this file has the name of the package that it measures, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent)] + [p for p in sys.path if Path(p or ".").resolve() != HERE]

import torch

import data
from training import train
from training.batches import Batches
from workflow.configuration import config_for
from workflow.setup import resolve


def batch_milliseconds(split, transform, size, repeats):
    batches = Batches(split, transform, batch_size=size, seed=0)
    times = []
    for step in range(repeats):
        start = time.process_time()
        batches(step)
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def step_milliseconds(config, few, many):
    """Of a training step, from runs of two lengths: what they have in common is no step's. The first run warms up."""
    seconds = []
    for steps in (few, few, many):
        setup = resolve(config)
        options = replace(setup.options, log_every=1000, progress=False, steps=steps, warmup=1)
        start = time.process_time()
        train(setup.model, setup.training_data, setup.transform, options, objective=setup.objective)
        seconds.append(time.process_time() - start)
    return 1e3 * (seconds[2] - seconds[1]) / (many - few)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=("digits", "fashion_mnist"))
    parser.add_argument("--root", default="")
    parser.add_argument("--repeats", default=100, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = config_for("vp", args.preset, {"data.root": args.root} if args.root else {})
    setup = resolve(config)
    dataset, size, transform = setup.dataset, setup.options.batch_size, setup.transform
    with tempfile.TemporaryDirectory() as folder:
        mapped = data.save(dataset, Path(folder) / "mapped")
        step = step_milliseconds(config, 3, 23)
        print(f"{dataset.name}, batch {size}: {step:.0f} ms a training step")
        for name, source in (("memory", dataset), ("mapped files", mapped)):
            got = batch_milliseconds(source.split("train"), transform, size, args.repeats)
            print(f"  a batch from {name}: {got:.2f} ms, {100 * got / step:.2f} % of the step")


if __name__ == "__main__":
    main()
