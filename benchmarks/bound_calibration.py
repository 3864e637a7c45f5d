"""Are the error bars of the variational bounds right? rms(error) / rms(stated), and how often the error is beyond four bars.

One image of 64 values, N(0, 1/4), exact score, against the closed form, for VP, VE and sub-VP, the continuous bound and
chains of 200 and 1,000 steps, and 8 to 1,000 draws: about four minutes on one core.

    python benchmarks/bound_calibration.py [--repetitions 2000]
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
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
from sde_lib.analytic import Gaussian

LAW = Gaussian(torch.zeros(64), torch.full((64,), 0.25))


def truth(sde: SDE, x_0: Tensor, steps: int | None) -> float:
    """The sum over steps, or the integral over log-SNR, of E |eps - eps-hat|^2 / 2, nats."""
    if steps is None:
        l = torch.linspace(float(sde.log_snr(sde.t_min)), float(sde.log_snr(sde.T)), 20001, dtype=torch.float64)
        times, weights = sde.time_of_log_snr((l[1:] + l[:-1]) / 2), (l[:-1] - l[1:]) / 2
    else:
        times = torch.linspace(sde.t_min, sde.T, steps + 1, dtype=torch.float64)
        l = sde.log_snr(times)
        times, weights = times[1:], torch.expm1(l[:-1] - l[1:]) / 2
    alpha, sigma = sde.alpha(times).unsqueeze(1), sde.sigma(times).unsqueeze(1)
    variance = alpha**2 * LAW.cov + sigma**2
    error = ((alpha**2 * LAW.cov / variance) ** 2 + (sigma * alpha / variance * (x_0 - LAW.mean)) ** 2).sum(dim=1)
    return float((weights * error).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    n = parser.parse_args().repetitions
    torch.set_num_threads(1)
    x_0 = LAW.sample(1, generator=torch.Generator().manual_seed(0))
    print("| SDE | steps | draws | bound, nats | rms error | rms error / rms stated | beyond 4 bars |")
    print("|---|---|---|---|---|---|---|")
    for sde in (VPSDE(), VESDE(), SubVPSDE()):
        for steps in (200, 1000, None):
            right = truth(sde, x_0[0].double(), steps)
            for draws in (8, 16, 64, 1000):
                bound = elbo(
                    sde,
                    LAW.score(sde),
                    x_0.expand(n, -1),
                    steps=steps,
                    draws=draws,
                    generator=torch.Generator().manual_seed(1),
                )
                error, stated = bound.diffusion - right, bound.diffusion_stderr
                rms = float(error.square().mean().sqrt())
                ratio = rms / math.sqrt(float(stated.square().mean()))
                beyond = float((error.abs() > 4 * stated).double().mean())
                name = f"{type(sde).__name__} | {steps or 'continuous'} | {draws:,}"
                print(f"| {name} | {right:,.0f} | {rms:,.1f} | {ratio:.2f} | {beyond:.1%} |", flush=True)


if __name__ == "__main__":
    main()
