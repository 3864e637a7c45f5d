"""Images changed by way of their latents, and by SDEdit: what is changed, what is kept, and the round trip's error.

    python benchmarks/latent_edits.py --run pretrained/vp_digits --save latent_edits.png        # minutes on one core

The attribute is ink: images brighter than the median of the training images have it. Its direction is the difference of mean
latents; a second one is orthogonal to the directions of all classes, so that an image's class is left alone. An independent
classifier of clean images (`evaluation`) says whether an edited image is still of its class. The errors of round trips are
root mean squares per entry in grey levels, whose spacing in model units is (high - low) / levels.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# this folder has a file with the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import torch

from evaluation import default_features, save_grid, share
from likelihood import attribute_direction, edit_latents, encode, fast, round_trip, slerp_grid
from numerics import SampleStreams
from samplers import DPMSolver, sdedit
from workflow import load_run
from workflow.report import table

SHIFTS, TEMPERATURES, LEVELS = (-2.0, -1.0, 0.0, 1.0, 2.0), (0.6, 0.8, 1.0, 1.2), (4.0, 2.0, 0.0, -2.0, -4.0)


class Kept:
    """Judges edited images beside those that were given."""

    def __init__(self, run, x, labels):
        self.run, self.x, self.labels = run, x, labels
        self.features = default_features(run.dataset)
        low, high = (float(run.setup.config["data"][end]) for end in ("low", "high"))
        self.level = (high - low) / run.dataset.levels

    def grey_levels(self, error):
        """An error per entry, in model units, as mean and largest in grey levels."""
        error = error[error.isfinite()] / self.level
        return float(error.mean()), float(error.max())

    def __call__(self, x):
        """The share that keeps its class, the mean change of brightness and its root mean square, in grey levels."""
        found = self.features.extract(self.run.transform.to_data(x)).log_probs.argmax(dim=1)
        off = (x - self.x).flatten(1).double() / self.level
        return {
            "class kept": str(share(found == self.labels)),
            "brightness": float(off.mean()),
            "change": float(off.square().mean().sqrt()),
        }


def row(name, found):
    return [name, found["class kept"], f"{found['brightness']:+.2f}", f"{found['change']:.2f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--n", default=200, type=int, help="test images that are edited")
    parser.add_argument("--train", default=600, type=int, help="training images whose latents make the directions")
    parser.add_argument("--steps", default=64, type=int, help="of the flow, each way")
    parser.add_argument("--save", default=None, type=Path, help="picture of the first ten test images, edited")
    parser.add_argument("--json", default=None, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = load_run(options.run, "cpu")
    sde, score, test, train = run.sde, run.score, run.dataset.split("test"), run.dataset.split("train")

    def centres(split, n):
        return run.transform.centres(split.x[:n]).float()

    x, given = centres(test, options.n), centres(train, options.train)
    kept = Kept(run, x, test.labels[: options.n])
    results, rows = {"round trips": {}, "edits": {}}, []

    def method(steps):
        return fast(sde, score, given[:16], steps=steps, data_std=run.model.data_std)

    with torch.no_grad():
        for steps in (options.steps // 2, options.steps, 2 * options.steps):
            there = round_trip(sde, score, x, method=method(steps))
            results["round trips"][steps] = kept.grey_levels(there.error)
        own = method(options.steps)
        latents = encode(sde, score, given, method=own).x
        labels, bright = train.labels[: options.train], given.flatten(1).mean(dim=1)
        ink = bright > bright.median()
        classes = [attribute_direction(latents, labels == k) for k in labels.unique()]
        directions = {
            "ink": attribute_direction(latents, ink),
            "ink, orthogonal to the classes": attribute_direction(latents, ink, orthogonal_to=classes),
        }
        sheet = {"digits": x}
        for name, d in directions.items():
            # as far along each, so that they can be compared
            d = d * directions["ink"].norm() / d.norm()
            changes = [lambda z, s=s, d=d: z + s * d for s in SHIFTS]
            found = edit_latents(sde, score, x, changes, method=own)
            for s, made in zip(SHIFTS, found.x, strict=True):
                results["edits"][f"{name}, {s:+g}"] = kept(made)
            results["edits"][f"{name}: error"] = kept.grey_levels(found.round_trip_error)
            short = name.replace("orthogonal to the classes", "orthogonal")
            sheet |= {f"{short} {SHIFTS[i]:+g}": found.x[i] for i in (0, -1)}
        found = edit_latents(sde, score, x, [lambda z, tau=tau: tau * z for tau in TEMPERATURES], method=own)
        for tau, made in zip(TEMPERATURES, found.x, strict=True):
            results["edits"][f"temperature {tau:g}"] = kept(made)
        results["edits"]["temperature: error"] = kept.grey_levels(found.round_trip_error)
        sheet[f"temperature {TEMPERATURES[0]:g}"] = found.x[0]
        sampler = DPMSolver(order=2, stochastic=True, steps=20)
        for level in LEVELS:
            t = float(sde.time_of_log_snr(torch.tensor(level, dtype=torch.float64)))
            found = sdedit(sampler, sde, score, x, t_start=t, generator=SampleStreams(0, torch.arange(len(x))))
            results["edits"][f"SDEdit from log-SNR {level:g}"] = kept(found.x)
            if level in (0.0, -4.0):
                sheet[f"SDEdit from {level:g}"] = found.x
        corners = torch.stack([x[int((kept.labels == k).nonzero()[0])] for k in (0, 1, 3, 8)])
        grid = slerp_grid(sde, score, corners, 5, 5, method=own)
        results["slerp grid: error"] = kept.grey_levels(grid.round_trip_error)
        results["slerp grid: corners"] = float(
            (grid.x[[0, 0, -1, -1], [0, -1, 0, -1]] - corners).square().mean().sqrt() / kept.level
        )
    rows = [row(name, found) for name, found in results["edits"].items() if isinstance(found, dict)]
    print("\n".join(table(("edit", "class kept", "brightness", "change"), rows)))
    print(json.dumps({k: v for k, v in results.items() if k != "edits"}, indent=1))
    if options.save:
        unit = run.transform.to_unit
        save_grid(options.save, unit(torch.cat([part[:10] for part in sheet.values()])), 10, scale=8, rows=tuple(sheet))
        other = options.save.with_name(f"{options.save.stem}_grid{options.save.suffix}")
        save_grid(other, unit(grid.x.flatten(0, 1)), 5, scale=8)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
