"""How often a survey's stated errors hold: from stored values of a network's images, and with fresh noise.

    python benchmarks/survey_coverage.py --run pretrained/vp_fashion_mnist --images 2000 --values v.npz     # scores them, once
    python benchmarks/survey_coverage.py --values v.npz --surveys 5000
    python benchmarks/survey_coverage.py --fresh 400 --steps 32 --precision 0.02            # of a mixture with an exact score
    python benchmarks/survey_coverage.py --run pretrained/vp_digits --fresh 200 --steps 24 --precision 0.03

Stored: the values of random test images with half the steps that are chosen (or all of them, where they say `half=False`), a
second draw of noise and probes for some, what more steps change for some and by which state's error they tell it, and all
predictions. Surveys with new samples, pilots and designs are then drawn from them, and their pulls, (estimate - truth) / stated
error, counted. The set that is surveyed has `--size` images: the stored ones, each as often as it takes. `--outliers` makes a
share of them far ones, which their predictors tell; `--events` makes half the steps lose half a bit/dim and more of a share,
which their state's error tells to a factor of 1.5 and nothing else does.

Fresh: whole surveys of the test set, or of 1,000 images of a mixture, each with its own sample, noise and probes. The
truth is the mean of all images over several draws with twice the steps, which is what a survey's correction aims at.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

# this folder has a file with the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import numpy as np
import torch

from data.transforms import Rescale
from likelihood import Hutchinson, Uniform, bits_per_dim, fast, survey
from likelihood.survey import conduct, order_of, plan_survey
from likelihood.survey_population import Table
from numerics import SampleStreams
from sde_lib import VPSDE
from sde_lib.analytic import GaussianMixture
from workflow import Protocol, load_run

REPEATED, COMPARED = 128, 64
"""Of how many of the stored images a second draw tells the noise, and of how many more steps what they change."""


def score(folder, n, file, seed=0):
    """Stores the values and the predictors of `n` random test images."""
    from workflow.score import Task
    from workflow.survey import StoredImages

    task = Task.of(load_run(folder), Protocol(precision=0.005))
    place = file.with_suffix("")
    place.mkdir(parents=True, exist_ok=True)
    images = StoredImages(task, place)
    index = order_of(images.size, seed)[:n].sort().values
    values, again = images.values(index, 0, True), images.values(index[:REPEATED], 1, True)
    differences = images.differences(index[:: max(1, len(index) // COMPARED)])
    bits = torch.full((2, len(index)), math.nan, dtype=torch.float64)
    bits[0], bits[1, : len(again.bits)] = values.bits, again.bits
    np.savez(
        file,
        free=images.free(index).numpy(),
        paid=images.paid(index, range(images.candidates)).numpy(),
        bits=bits.numpy(),
        differences=differences.half.numpy(),
        finer=differences.whole.numpy(),
        state_errors=differences.state_error.numpy(),
        half=True,
        passes=values.passes / len(index),
    )


def mixture():
    """A tight mode and a wide one, 4x4 pixels, whose score is known."""
    means = torch.stack([torch.full((1, 4, 4), -0.5), torch.full((1, 4, 4), 0.6)])
    return GaussianMixture(means=means, stds=torch.tensor([0.1, 0.35]), weights=torch.tensor([0.6, 0.4]))


def fresh(folder, seeds, steps, precision, draws=4):
    """The pulls of whole surveys with their own noise."""
    if folder:
        run = load_run(folder)
        sde, score, data_std = run.sde, run.score, run.flow.data_std
        images, transform, pilot = run.dataset.split("test").x, run.transform, run.pilot(8)
    else:
        sde, law, data_std, transform = VPSDE(), mixture(), 0.6, Rescale(levels=17)
        images = transform.to_images(law.sample(1008, generator=torch.Generator().manual_seed(0)).clamp(-1, 1))
        score, pilot, images = law.score(sde), images[1000:], images[:1000]
    pilot = Uniform()(pilot, transform, sde, sde.t_min, generator=SampleStreams(2))[0]
    method = fast(sde, score, pilot, steps=steps, data_std=data_std)
    given = {"divergence": Hutchinson(probes=1)}
    everyone = bits_per_dim(
        sde, score, images, transform, draws=draws, companions=0,
        generator=SampleStreams(10**6, torch.arange(len(images))), method=method.with_steps(2 * steps), **given,
    )  # fmt: skip
    truth, own = everyone.mean, math.sqrt(float(everyone.estimates.mean(dim=2).var(dim=1).mean()) / draws / len(images))
    print(f"truth {truth:.4f} ± {own:.4f} from {draws} draws of {len(images)} images", flush=True)
    for seed in seeds:
        yield survey(
            sde, score, images, transform, precision=precision, seed=seed, batch_size=100 if folder else 1000,
            data_std=data_std, method=method, **given,
        ), truth  # fmt: skip


def stored_set(file, size, outliers, events):
    """A set whose values are known, made of the stored images."""
    stored = np.load(file)
    free, paid, bits = (torch.from_numpy(stored[name]).double() for name in ("free", "paid", "bits"))
    good = bits[0].isfinite()
    free, paid, bits = free[good], paid[good], bits[:, good]
    twice = bits[1].isfinite()
    spread, noise = float(bits[0].std()), float((bits[1] - bits[0])[twice].square().mean().div(2).sqrt())
    print(
        f"{bits.shape[1]} images: mean {float(bits[0].mean()):.4f}, spread {spread:.3f}, noise of a value {noise:.4f} bits/dim"
    )
    # a second draw of those that have none: noise of the size that the others tell
    drawn = torch.randn(bits.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bits[1] = torch.where(twice, bits[1], bits[0] + math.sqrt(2) * noise * drawn)
    lost, finer = (torch.from_numpy(stored[name]).double() for name in ("differences", "finer"))
    print(
        f"twice the steps in place of half of them change {float(lost.mean()):+.4f}, spread {float(lost.std()):.4f} bits/dim, "
        f"in place of all of them {float(finer.mean()):+.4f}, {float(finer.std()):.4f}"
    )
    again = torch.randint(len(lost), (size,), generator=torch.Generator().manual_seed(4))
    lost, finer, told = lost[again], finer[again], torch.from_numpy(stored["state_errors"]).double()[again]
    at = torch.arange(size) % bits.shape[1]
    free, paid, bits = free[at], paid[at], bits[:, at]
    if "half" in stored and not stored["half"]:  # values of all the steps: those of half of them are what is lost below
        bits = bits - lost + finer
    if outliers:
        far = torch.rand(size, generator=torch.Generator().manual_seed(1)) < outliers
        more = 1 + 0.3 * torch.rand(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        bits = bits + 6 * far * more
        paid = paid + 30 * paid.std(dim=0) * (far * more).unsqueeze(1)
    if events:
        far = torch.rand(size, generator=torch.Generator().manual_seed(5)) < events
        more = 0.5 * far * (1 + torch.rand(size, generator=torch.Generator().manual_seed(6), dtype=torch.float64))
        lost, bits = lost + more, bits - more
        told = lost.abs() * torch.exp(
            0.4 * torch.randn(size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        )
    passes = round(float(stored["passes"]))
    table = Table(free, paid, bits, passes=passes, differences=lost, finer=finer, state_errors=told)
    return table, float((bits[0] + lost).mean())


def from_stored(table, truth, seeds, precision):
    """Surveys of a set whose values are known."""
    for seed in seeds:
        yield conduct(table, plan_survey(table, precision=precision, seed=seed), seed=seed), truth


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run folder, to score and store, or for fresh surveys")
    parser.add_argument("--images", default=2000, type=int, help="how many of its test images are stored")
    parser.add_argument("--values", type=Path, help="the stored values, .npz")
    parser.add_argument("--surveys", default=5000, type=int, help="how many surveys are drawn from them; 0: none")
    parser.add_argument("--size", default=10_000, type=int, help="images in the set that is surveyed")
    parser.add_argument("--outliers", default=0.0, type=float, help="share of the images made far ones")
    parser.add_argument(
        "--events", default=0.0, type=float, help="share of the images that half the steps lose far more of"
    )
    parser.add_argument("--fresh", default=0, type=int, help="how many surveys of the run's test set, with fresh noise")
    parser.add_argument(
        "--first", default=0, type=int, help="seed of the first survey; each next one has the next seed"
    )
    parser.add_argument("--steps", default=24, type=int, help="of the solver, in fresh ones")
    parser.add_argument("--precision", default=0.005, type=float, help="bits/dim")
    args = parser.parse_args()
    if args.fresh:
        found = fresh(args.run, range(args.first, args.first + args.fresh), args.steps, args.precision)
    else:
        if args.run:
            score(args.run, args.images, args.values)
        if "finer" not in np.load(args.values):
            parser.error(
                f"got {args.values}, stored by an earlier version; expected `finer` in it: score again with --run"
            )
        found = from_stored(
            *stored_set(args.values, args.size, args.outliers, args.events),
            range(args.first, args.first + args.surveys),
            args.precision,
        )
    begun, results, every = time.process_time(), [], 50 if args.fresh else 1000
    for result, truth in found:
        off = (result.mean - truth) / result.estimate_stderr
        results.append((off, result.estimate_stderr, result.passes, len(result.scored), result.estimate.r2))
        if len(results) % every == 0:
            report(results, args.precision)
    if results:
        if len(results) % every:
            report(results, args.precision)
        seconds = time.process_time() - begun
        print(f"all images would take {result.design.all_passes:,.0f} passes ({seconds:.0f} s of processor time)")


def report(results, precision):
    """How often the surveys' errors held, and what they took."""
    pulls, errors, passes, used, r2 = torch.tensor(results, dtype=torch.float64).unbind(dim=1)
    k = len(results)
    for limit, share in ((1, 0.683), (2, 0.954)):
        seen = float((pulls.abs() < limit).double().mean())
        print(
            f"within {limit} stated errors: {100 * seen:.1f} ± {100 * math.sqrt(share * (1 - share) / k):.1f} % of {k}"
        )
    print(f"pulls: mean {float(pulls.mean()):+.3f}, rms {float(pulls.square().mean().sqrt()):.3f}")
    above = 100 * float((errors > precision).double().mean())
    print(
        f"stated ± {float(errors.mean()):.5f} (above {precision:g} in {above:.0f} % of the surveys, the largest "
        f"{float(errors.max()):.5f}), R2 {float(r2.nanmean()):.3f}, {float(used.mean()):.0f} images scored, "
        f"{float(passes.mean()):,.0f} passes (up to {float(passes.max()):,.0f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
