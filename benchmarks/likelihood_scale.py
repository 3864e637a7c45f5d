"""Cost of a data set's likelihood: processor time and peak memory against the number of images, each in a process of its own.

    python benchmarks/likelihood_scale.py --run pretrained/vp_digits

Chunks of a fixed size are scored one after the other, as `experiments/nll.py` does; time should grow in proportion to the
images and the peak memory not at all. Images beyond the end of the split are taken from its beginning again.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import torch

from likelihood import Uniform, bits_per_dim, fast
from numerics import SampleStreams
from workflow import load_run


def score(args, n):
    torch.set_num_threads(args.threads)
    run = load_run(args.run)
    images = run.dataset.split("test").x
    pilot = run.dataset.split("train").x[:8]
    x, _ = Uniform()(pilot, run.transform, run.sde, run.sde.t_min, generator=SampleStreams(0))
    method = fast(run.sde, run.model, x, steps=args.steps, data_std=run.flow.data_std)
    begun = time.process_time()
    for first in range(0, n, args.chunk):
        ids = torch.arange(first, min(first + args.chunk, n))
        part = images[ids % len(images)]
        bits_per_dim(
            run.sde, run.model, part, run.transform, method=method, companions=0, generator=SampleStreams(0, ids)
        )
    seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{n:7} images {seconds:9.2f} s {1e3 * seconds / n:8.2f} ms an image {peak:8.0f} MiB peak", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if len(args.images) == 1:
        score(args, args.images[0])
        return
    for n in args.images:
        options = [
            "--run",
            args.run,
            "--images",
            n,
            "--chunk",
            args.chunk,
            "--steps",
            args.steps,
            "--threads",
            args.threads,
        ]
        subprocess.run([sys.executable, __file__, *map(str, options)], check=True)


if __name__ == "__main__":
    main()
