"""Are the error bars of the variational bounds right? rms(error) / rms(stated), and how often the error is beyond four bars.

Exact scores of two laws under VP, VE (also with sigma_max = 1e4) and sub-VP: N(0, 1/4) in 64 dimensions against the closed
form, and two narrow modes in 2, against a mean of 4,000 estimates of 512 draws each. The continuous bound, with the noise's
length in it and without, chains of 200 and 1,000 steps, and 8 to 1,000 draws: about 15 minutes on one core.

    python benchmarks/bound_calibration.py [--repetitions 2000]
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

from likelihood import elbo
from sde_lib import SDE, VESDE, VPSDE, SubVPSDE
from sde_lib.analytic import Gaussian, GaussianMixture

GAUSSIAN = Gaussian(torch.zeros(64), torch.full((64,), 0.25))
MODES = GaussianMixture(
    means=torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), stds=torch.tensor([0.05, 0.05]), weights=torch.tensor([0.5, 0.5])
)
LAWS = {"Gaussian": (GAUSSIAN, 0.5), "two modes": (MODES, 2.1)}


def truth(sde: SDE, x_0: Tensor, steps: int | None) -> float:
    """Of the Gaussian: the sum over steps, or the integral over log-SNR, of E |eps - eps-hat|^2 / 2, nats."""
    if steps is None:
        l = torch.linspace(float(sde.log_snr(sde.t_min)), float(sde.log_snr(sde.T)), 20001, dtype=torch.float64)
        times, weights = sde.time_of_log_snr((l[1:] + l[:-1]) / 2), (l[:-1] - l[1:]) / 2
    else:
        times = torch.linspace(sde.t_min, sde.T, steps + 1, dtype=torch.float64)
        l = sde.log_snr(times)
        times, weights = times[1:], torch.expm1(l[:-1] - l[1:]) / 2
    alpha, sigma = sde.alpha(times).unsqueeze(1), sde.sigma(times).unsqueeze(1)
    variance = alpha**2 * GAUSSIAN.cov + sigma**2
    error = ((alpha**2 * GAUSSIAN.cov / variance) ** 2 + (sigma * alpha / variance * (x_0 - GAUSSIAN.mean)) ** 2).sum(
        dim=1
    )
    return float((weights * error).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    repetitions = parser.parse_args().repetitions
    torch.set_num_threads(1)
    print("| law | SDE | bound of | draws | nats | rms error | rms error / rms stated | beyond 4 bars |")
    print("|---|---|---|---|---|---|---|---|")
    sdes = {"VP": VPSDE(), "VE": VESDE(), "VE, 1e4": VESDE(sigma_max=1e4), "sub-VP": SubVPSDE()}
    ways = {
        "200 steps": (200, False),
        "1,000 steps": (1000, False),
        "continuous": (None, False),
        "continuous, data_std": (None, True),
        "1,000 steps, data_std": (1000, True),
    }
    for (law_name, (law, std)), (sde_name, sde), (way, (steps, told)) in itertools.product(
        LAWS.items(), sdes.items(), ways.items()
    ):
        x_0 = law.sample(1, generator=torch.Generator().manual_seed(0))

        bounds = functools.partial(
            elbo, sde, law.score(sde), steps=steps, reconstructions=1, data_std=std if told else None
        )
        if law is GAUSSIAN:
            right = truth(sde, x_0[0].double(), steps)
        else:
            fine = bounds(x_0.expand(4000, -1), draws=512, generator=torch.Generator().manual_seed(9))
            right = float(fine.diffusion.mean())
        for draws in (8, 16, 64, 1000):
            bound = bounds(x_0.expand(repetitions, -1), draws=draws, generator=torch.Generator().manual_seed(1))
            error, stated = bound.diffusion - right, bound.diffusion_stderr
            rms = float(error.square().mean().sqrt())
            ratio = rms / math.sqrt(float(stated.square().mean()))
            beyond = float((error.abs() > 4 * stated).double().mean())
            numbers = f"{right:,.4g} | {rms:,.3g} | {ratio:.2f} | {beyond:.1%}"
            print(f"| {law_name} | {sde_name} | {way} | {draws:,} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
