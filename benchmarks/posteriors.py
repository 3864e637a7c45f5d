"""How far every posterior method is from exact posteriors, and what it costs.

    python benchmarks/posteriors.py                     # both tables, about 20 minutes on one core
    python benchmarks/posteriors.py --only gaussian     # moment matching on Gaussians, 20,000 samples, 2,000 steps
    python benchmarks/posteriors.py --only methods --samples 1000 --steps 100 --json posteriors.json

"gaussian" is the promise of `guidance.MomentMatching`: on Gaussian data its score is the posterior's, so what is left is the
sampler's error and that of finitely many samples. "methods" puts every method beside the exact posterior's own score in the
same sampler, which is the floor: on a Gaussian in eight dimensions and on a mixture of which the measurement all but rules
out a mode. The mean's error is the largest of an entry, in posterior standard deviations; the covariance's is a relative
Frobenius norm; the weights' are those of the modes. Samples are not denoised. "mates" is the largest change of a sample, per
entry, when it is drawn without its batch mates. Where azula is installed its methods follow, in its own loops on these steps.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

from evaluation import exact_posterior, posterior_errors
from guidance import (
    DPS,
    TMPD,
    Blur,
    Downsample,
    Linear,
    Mask,
    Measurement,
    MomentMatching,
    PiGDM,
    PublishedDPS,
    posterior,
)
from numerics import SampleStreams
from numerics import normal as numbers
from samplers import (
    DDNM,
    Ancestral,
    DPMSolver,
    LogSNR,
    PredictorCorrector,
    RePaint,
    Replacement,
    SampleResult,
    SamplingError,
    TwistedSMC,
)
from sde_lib import VESDE, VPSDE, CountedScore, SubVPSDE
from sde_lib.analytic import Gaussian, GaussianMixture

SDES = {"VP": VPSDE(), "VE": VESDE(), "sub-VP": SubVPSDE()}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian():
    """Eight correlated entries off the origin, variances from 0.1 to about 3."""
    A = normal(8, 8, seed=1) / 8**0.5
    return Gaussian(normal(8, seed=2), A @ A.T + 0.1 * torch.eye(8, dtype=torch.float64))


def fast_score(law, sde):
    """The Gaussian's score as one product, for batches that share one time."""

    def score(x, t):
        alpha, sigma = float(sde.alpha(t[0])), float(sde.sigma(t[0]))
        inverse = (alpha**2 * law.cov + sigma**2 * torch.eye(len(law.mean), dtype=torch.float64)).inverse()
        return (alpha * law.mean - x) @ inverse

    return score


def operators():
    return {
        "projections": Linear(normal(4, 8, seed=3) / 8**0.5),
        "mask": Mask(torch.tensor([1, 0, 1, 0, 1, 1, 0, 0])),
        "down-sampling": Downsample(2, axes=1),
        "blur": Blur(torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)),
    }


def measured(operator, law, std):
    x_0 = law.sample(1, generator=torch.Generator().manual_seed(4))
    y = operator(x_0)
    return Measurement(operator, y + std * normal(*y.shape, seed=5), std)


def of_gaussians(options):
    law, rows, squares = gaussian(), [], {}
    print(f"\n| SDE | operator | noise | mean | covariance | seconds |\n|{'---|' * 6}")
    for name, sde in SDES.items():
        for what in options.operators:
            for std in options.noise:
                measurement = measured(operators()[what], law, std)
                score = posterior(
                    sde, fast_score(law, sde), measurement, method=MomentMatching(iterations=options.iterations)
                )
                sampler = DPMSolver(order=2, stochastic=True, steps=options.fine, denoise=False)
                begun = time.perf_counter()
                shape = (options.many, 8)
                x = sampler(sde, score, shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).x
                seconds = time.perf_counter() - begun
                exact = exact_posterior(law, measurement)
                e = posterior_errors(exact, sde, x, sde.t_end)
                rows.append(
                    {"sde": name, "operator": what, "std": std, "mean": e.mean.value, "covariance": e.covariance.value}
                )
                rows[-1] |= {"floor": e.floor, "seconds": seconds}
                norm2 = float(exact.cov.norm()) ** 2
                off = squares.setdefault(name, [0.0, 0.0])
                off[0], off[1] = off[0] + e.covariance.value**2 * norm2, off[1] + norm2
                print(
                    f"| {name} | {what} | {std} | {e.mean.value:.3f} | {100 * e.covariance.value:.1f} % | {seconds:.0f} |",
                    flush=True,
                )
    pooled = {name: (a / b) ** 0.5 for name, (a, b) in squares.items()}
    print("\npooled covariance error:", ", ".join(f"{name} {100 * value:.1f} %" for name, value in pooled.items()))
    print(f"floors of {options.many} exact draws: mean {e.floor[0]:.3f}, covariance {100 * e.floor[1]:.1f} %")
    print("largest mean error:", f"{max(row['mean'] for row in rows):.3f}")
    return {"rows": rows, "pooled": pooled}


def mixture():
    """Three modes of two entries, weights 0.5, 0.2, 0.3, and a measurement of one direction after which one has 0.04 %."""
    law = GaussianMixture(
        torch.tensor([[-1.5, 1.0], [1.5, 0.5], [0.5, -1.5]]),
        torch.tensor([0.4, 0.4, 0.3]),
        torch.tensor([0.5, 0.2, 0.3]),
    )
    return law, Measurement(
        Linear(torch.tensor([[0.3, 1.0]], dtype=torch.float64)), torch.tensor([[0.45]]).double(), 0.35
    )


def methods(options):
    """By name: a function of (sde, law's score, exact score, measurement) -> (sampler, score, samples)."""
    n, steps = options.samples, options.steps

    def as_score(make, sampler=None):
        def run(sde, score, exact, measurement):
            walk = DPMSolver(order=2, stochastic=True, steps=steps, denoise=False) if sampler is None else sampler(sde)
            return walk, make(sde, score, exact, measurement), n

        return run

    def as_sampler(make, n=n):
        return lambda sde, score, exact, measurement: (make(measurement), score, n)

    def guided(method):
        return lambda sde, score, exact, measurement: posterior(sde, score, measurement, method=method)

    def published(zeta):
        times = {name: LogSNR()(sde, steps) for name, sde in SDES.items()}

        def make(sde, score, exact, measurement):
            own = next(times[name] for name, known in SDES.items() if known == sde)
            return posterior(sde, score, measurement, method=PublishedDPS(zeta=zeta, times=own))

        walk = lambda sde: PredictorCorrector(
            predictor=Ancestral(), corrector=None, steps=steps, grid=LogSNR(), denoise=False
        )
        return as_score(make, walk)

    grid = LogSNR()
    return {
        "exact score (floor)": as_score(lambda sde, score, exact, measurement: exact),
        "MomentMatching, 1 iteration": as_score(guided(MomentMatching(iterations=1))),
        "MomentMatching, 3": as_score(guided(MomentMatching(iterations=3))),
        "MomentMatching, 5": as_score(guided(MomentMatching(iterations=5))),
        "TMPD": as_score(guided(TMPD())),
        "PiGDM": as_score(guided(PiGDM())),
        "DPS": as_score(guided(DPS())),
        "DPS as published, zeta 0.3": published(0.3),
        "DPS as published, zeta 1": published(1.0),
        "Replacement": as_sampler(lambda m: Replacement(measurement=m, steps=steps, grid=grid, denoise=False)),
        "RePaint, 10 rounds": as_sampler(
            lambda m: RePaint(measurement=m, steps=steps // 2, resamplings=10, jump=10, grid=grid, denoise=False)
        ),
        "DDNM": as_sampler(lambda m: DDNM(measurement=m, steps=steps, grid=grid, denoise=False)),
        "TwistedSMC, 4 particles": as_sampler(
            lambda m: TwistedSMC(measurement=m, particles=4, steps=steps, denoise=False), n // 2
        ),
        "TwistedSMC, 32 particles": as_sampler(
            lambda m: TwistedSMC(measurement=m, particles=32, steps=steps, denoise=False), n // 4
        ),
    }


@dataclass(frozen=True, kw_only=True)
class OfAzula:
    """A method of azula (github.com/probabilists/azula), called as the samplers here are, with their noise.

    Its times are equally spaced in its schedule's; the schedule is the SDE's with u linear in log-SNR.

    Attributes:
        make: of azula's denoiser, the measurement and options of a sampler, the sampler.
    """

    make: Any
    case: Measurement
    steps: int

    def within(self, evaluations):
        return replace(self, steps=min(self.steps, evaluations))

    def __call__(self, sde, score, shape, *, generator, dtype):
        from azula.denoise import Denoiser, DiracPosterior
        from azula.noise import Schedule

        first, last = float(sde.log_snr(sde.T)), float(sde.log_snr(sde.t_end))
        time_of = lambda u: sde.time_of_log_snr(last + (first - last) * u)

        class AsHere(Schedule):
            def __call__(self, u):
                t = time_of(u)
                return sde.alpha(t), sde.sigma(t)

        class Denoised(Denoiser):
            schedule, calls = AsHere(), 0

            def forward(self, x, u):
                self.calls += 1
                alpha, sigma = self.schedule(u)
                return DiracPosterior(mean=(x + sigma**2 * score(x, time_of(u).expand(len(x)))) / alpha)

        drawn = lambda like: numbers(like.shape, generator, device=like.device, dtype=like.dtype)
        denoiser = Denoised()
        sampler = self.make(denoiser, self.case, {"steps": self.steps, "silent": True, "dtype": dtype})
        x = sde.prior_std * numbers(shape, generator, device="cpu", dtype=dtype)
        with patch.object(torch, "randn_like", drawn):
            return SampleResult(x=sampler(x), nfe=denoiser.calls, times=None)


def of_azula(options):
    """azula's methods as in `methods`; none where it is not installed, which is said."""
    if importlib.util.find_spec("azula") is None:
        print("azula is not installed: its methods are left out")
        return {}
    from azula import guidance as theirs
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDPMSampler

    def denoised(make):
        return lambda denoiser, case, o: DDPMSampler(make(denoiser, case.y, case.operator, case.std), **o)

    def moments(iterations):
        return denoised(
            lambda denoiser, y, A, std: theirs.MMPSDenoiser(
                denoiser, y, A, IsotropicCovariance(torch.tensor(std**2).double()), iterations=iterations
            )
        )

    def inverse(case):
        return lambda y: case.svd.lift(case.svd.left(y) / case.svd.values)

    made = {
        "azula MMPS, 1 iteration": moments(1),
        "azula MMPS, 3": moments(3),
        "azula MMPS, 5": moments(5),
        "azula TMPD": denoised(lambda denoiser, y, A, std: theirs.TMPDenoiser(denoiser, y, A, std**2)),
        "azula PiGDM": lambda denoiser, case, o: theirs.PGDMSampler(
            denoiser, case.y, case.operator, inverse(case), eta=1.0, **o
        ),
        "azula DPS, zeta 1": lambda denoiser, case, o: theirs.DPSSampler(denoiser, case.y, case.operator, **o),
        "azula DiffPIR": denoised(lambda denoiser, y, A, std: theirs.DiffPIRDenoiser(denoiser, y, A, std**2)),
    }

    def as_method(make):
        return lambda sde, score, exact, case: (
            OfAzula(make=make, case=case, steps=options.steps),
            score,
            options.samples,
        )

    return {name: as_method(make) for name, make in made.items()}


class Products:
    """Vector-Jacobian products through a score, counted at its input."""

    def __init__(self, score):
        self.score, self.calls = score, 0

    def __call__(self, x, t):
        if x.requires_grad:
            x = x.clone()
            x.register_hook(self._seen)
        return self.score(x, t)

    def _seen(self, gradient):
        self.calls += 1


def batch_mates(make, sde, score, exact, measurement):
    """The largest change of an entry of one of three samples when drawn alone."""
    walk, guided, _ = make(sde, score, exact, measurement)
    walk = walk if hasattr(walk, "predictor") and not hasattr(walk, "measurement") else walk.within(60)
    together = walk(sde, guided, (3, *exact_shape(measurement)), generator=SampleStreams(0), dtype=torch.float64).x
    worst = 0.0
    for i in range(3):
        ids = torch.tensor([i])
        alone = walk(
            sde, guided, (1, *exact_shape(measurement)), generator=SampleStreams(0, ids), dtype=torch.float64
        ).x
        worst = max(worst, float((alone - together[ids]).abs().max()))
    return worst


def exact_shape(measurement):
    return measurement.event_shape


def of_methods(options):
    law, (modes, seen) = gaussian(), mixture()
    cases = {
        "8-D Gaussian, 4 projections, noise 0.1": (law, measured(operators()["projections"], law, 0.1)),
        "8-D Gaussian, mask, noise 0.5": (law, measured(operators()["mask"], law, 0.5)),
        "2-D mixture": (modes, seen),
    }
    rows, peers = [], of_azula(options)
    for case, (prior, measurement) in cases.items():
        exact = exact_posterior(prior, measurement)
        weights = ", ".join(f"{w:.4f}" for w in exact.weights.tolist())
        for name in options.sdes:
            sde = SDES[name]
            print(f"\n{case}, {name}; true weights {weights}\n")
            print(
                f"| method | mean | covariance | weights | evaluations | products | ms a sample | mates |\n|{'---|' * 8}"
            )
            for method, make in {**methods(options), **peers}.items():
                if options.method and not any(part in method for part in options.method):
                    continue
                base = prior.score(sde) if "mixture" in case else fast_score(prior, sde)
                products = Products(base)
                counted = CountedScore(products)
                walk, score, n = make(sde, counted, exact.score(sde), measurement)
                shape = (n, *exact_shape(measurement))
                begun = time.perf_counter()
                try:
                    result = walk(sde, score, shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                except SamplingError:
                    print(f"| {method} | not finite | | | | | | |", flush=True)
                    rows.append({"case": case, "sde": name, "method": method, "finite": False})
                    continue
                seconds = time.perf_counter() - begun
                e = posterior_errors(exact, sde, result.x, sde.t_end)
                found = ", ".join(f"{w.value:.4f}" for w in e.weights) if len(e.weights) > 1 else "-"
                plain = prior.score(sde)
                mates = batch_mates(make, sde, plain, exact.score(sde), measurement)
                particles = getattr(walk, "particles", 1)
                rows.append(
                    {
                        "case": case,
                        "sde": name,
                        "method": method,
                        "samples": n,
                        "mean": e.mean.to_dict(),
                        "covariance": e.covariance.to_dict(),
                        "weights": [w.to_dict() for w in e.weights],
                        "true_weights": e.true_weights,
                        "nfe": result.nfe * particles,
                        "products": products.calls * particles,
                        "seconds": seconds,
                        "mates": mates,
                    }
                )
                print(
                    f"| {method} | {e.mean.value:.3f} ± {e.mean.stderr:.3f} | {100 * e.covariance.value:.0f} ± "
                    f"{100 * e.covariance.stderr:.0f} % | {found} | {result.nfe * particles} | {products.calls * particles} | "
                    f"{1e3 * seconds / n:.1f} | {mates:.0e} |",
                    flush=True,
                )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["gaussian", "methods"])
    parser.add_argument("--samples", type=int, default=4000, help="of each method; fewer of TwistedSMC")
    parser.add_argument("--steps", type=int, default=400, help="of each method")
    parser.add_argument("--many", type=int, default=20_000, help="samples on Gaussians")
    parser.add_argument("--fine", type=int, default=2000, help="steps on Gaussians")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.2], help="of the measurements of Gaussians")
    parser.add_argument("--operators", nargs="+", choices=list(operators()), default=list(operators()))
    parser.add_argument("--iterations", type=int, default=6, help="of conjugate gradients on Gaussians")
    parser.add_argument("--sdes", nargs="+", choices=list(SDES), default=["VP"], help="of the methods' table")
    parser.add_argument("--method", nargs="+", help="only methods whose name has one of these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "got a score of data")  # the oracles are off the origin
    found = {}
    if options.only != "methods":
        found["gaussian"] = of_gaussians(options)
    if options.only != "gaussian":
        found["methods"] = of_methods(options)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
