"""Are the error bars of bits/dim right? rms(error) / rms(stated), for the trace's probes and the dequantisation noise apart.

Exact scores of a Gaussian with a full covariance and of a mixture, in 6 dimensions and 16 grey levels, under VP, VE and sub-VP.
An image's error is that of the mean of its four estimates, against the exact trace of the same noise (probes), or of its four
draws of the noise with the exact trace, against the closed form over 2,000 draws (dequantisation); the stated one is what
`BitsPerDim` has for a set of that one image. Pooled over 42,000 images: about four minutes on one core.

    python benchmarks/error_bars.py [--images 7000]
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from pathlib import Path

# a folder here has the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import torch
from torch import Tensor

from data.transforms import Rescale
from likelihood import Exact, Hutchinson, bits_per_dim, fast
from numerics import SampleStreams
from sde_lib import VESDE, VPSDE, SubVPSDE
from sde_lib.analytic import Gaussian, GaussianMixture

D, K, M = 6, 4, 2000
TRANSFORM = Rescale(levels=16)


def laws() -> dict[str, Gaussian | GaussianMixture]:
    """By name, of data in [-1, 1]."""
    g = torch.Generator().manual_seed(0)
    root = 0.15 * torch.randn(D, D, generator=g)
    return {
        "Gaussian, full covariance": Gaussian(torch.zeros(D), root @ root.T + 0.02 * torch.eye(D)),
        "mixture of three": GaussianMixture(
            means=0.4 * torch.randn(3, D, generator=g),
            stds=torch.tensor([0.1, 0.15, 0.2]),
            weights=torch.tensor([0.5, 0.3, 0.2]),
        ),
    }


def images(law: Gaussian | GaussianMixture, n: int, seed: int) -> Tensor:
    x = law.sample(n, generator=torch.Generator().manual_seed(seed))
    return ((x + 1) * 8).floor().clamp(0, 15).to(torch.uint8)


def ratio(error: Tensor, stated: Tensor) -> tuple[float, float]:
    """rms(error) / rms(stated), and its standard error from 50 groups."""
    squares = torch.stack([error.square(), stated.square()]).chunk(50, dim=1)
    parts = torch.stack([p.mean(dim=1) for p in squares])
    whole = parts.mean(dim=0)
    value = float((whole[0] / whole[1]).sqrt())
    # of a ratio of means, to first order
    off = (parts[:, 0] - value**2 * parts[:, 1]) / whole[1]
    return value, float(off.std()) / math.sqrt(len(parts)) / (2 * value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=7000)
    n = parser.parse_args().images
    torch.set_num_threads(1)
    pooled: dict[str, list[tuple[Tensor, Tensor]]] = {}
    print("| law | SDE | part | images | rms error, bits/dim | rms error / rms stated |")
    print("|---|---|---|---|---|---|")

    def row(law: str, sde: str, part: str, error: Tensor, stated: Tensor) -> None:
        value, off = ratio(error, stated)
        rms = float(error.square().mean().sqrt())
        print(f"| {law} | {sde} | {part} | {len(error):,} | {rms:.4f} | {value:.3f} ± {off:.3f} |", flush=True)

    for seed, ((name, law), sde) in enumerate(itertools.product(laws().items(), (VPSDE(), VESDE(), SubVPSDE()))):
        grey, score = images(law, n, seed), law.score(sde)
        pilot = TRANSFORM(grey[:64].to(torch.float32) + 0.5)
        scored = functools.partial(
            bits_per_dim,
            sde,
            score,
            grey,
            TRANSFORM,
            method=fast(sde, score, pilot, steps=48, data_std=float(pilot.std())),
            companions=0,
        )
        # both with the same noise: streams go on where the last call left them
        exact, probes = (
            scored(draws=m, divergence=divergence, generator=SampleStreams(seed, torch.arange(n))).estimates
            for m, divergence in ((K, Exact()), (1, Hutchinson(probes=K)))
        )
        exact, probes = exact.squeeze(2), probes.squeeze(1)
        t = torch.full((n,), sde.t_min, dtype=torch.float64)
        truth = torch.zeros(n, dtype=torch.float64)
        g = torch.Generator().manual_seed(100 + seed)
        for _ in range(M):
            x = TRANSFORM(grey.to(torch.float64) + torch.rand(grey.shape, generator=g, dtype=torch.float64))
            truth -= law.log_prob(sde, x, t) / M
        truth = (truth - D * TRANSFORM.log_det) / (D * math.log(2))
        found = {
            "probes": (probes.mean(dim=1) - exact[:, 0], probes.std(dim=1) / math.sqrt(K)),
            # the mean over M draws has its own error
            "dequantisation": (
                (exact.mean(dim=1) - truth) / math.sqrt(1 + K / M),
                exact.std(dim=1) / math.sqrt(K),
            ),
        }
        for part, (error, stated) in found.items():
            row(name, type(sde).__name__, part, error, stated)
            pooled.setdefault(part, []).append((error, stated))
    for part, pairs in pooled.items():
        row("all", "all", part, *(torch.cat(side) for side in zip(*pairs, strict=True)))


if __name__ == "__main__":
    main()
