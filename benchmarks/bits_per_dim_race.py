r"""Bits/dim at equal time: the published recipe against this project's, one U-Net, one thread.

    python benchmarks/bits_per_dim_race.py                                       # digits: half an hour of training in all
    python benchmarks/bits_per_dim_race.py --data digits,fashion_mnist --seconds 300 --seeds 5

    reference   Song et al. 2021 (arXiv:2011.13456, appendix H): the network predicts eps and is told 999 t through the
                positional embedding, t uniform on [1e-5, 1], simple weighting, Adam (0.9, 0.999) at a constant rate,
                gradient clipped at 1, EMA min(0.9999, (1 + n)/(10 + n)), fp32
    ours        `experiments/vp.py` under the data set's preset: preconditioned and told the log-SNR smoothly, log kappa
                drawn from a normal law, Adam (0.9, 0.99) at 2e-3 falling as a cosine, EMA 0.999; sine features of the
                input on the digits, bf16 on Fashion-MNIST

Both have the same U-Net body, batch, data and seeds, and VP with beta from 0.1 to 20. The reference's warm-up of 5,000 steps
(of 1.3 million) would outlast these runs: both warm up over ours. Its rate is the better, by the ELBO of validation images
after a run of the full budget on the other training images, of the published 2e-4 and our 2e-3; ours is taken as it is.

Equal time means: before a data set's race, blocks of training steps of the two take turns on one thread, and the median CPU
time of a step says how many steps of each fit into the budget. All runs do just these numbers, so load on the machine in the
course of the race favours nobody; the CPU time that the runs took is reported too. The recipes take turns seed by seed, and
who begins alternates.

Both are scored on the same test images through the flow with the same protocol: dequantisation noise and probes are keyed by
the image's id, the solver's grid is placed by a pilot run on training images. With d_is the difference on image i of the
networks of seed s, the error of the mean is sqrt(var_i(mean_s d)/images + var_s(mean_i d)/seeds), which counts what belongs to
image and seed together twice, and so errs on the safe side. Everything is kept in the work folder; the same command goes on.
"""

# ruff: noqa: E402 - the imports must follow the change of the path below

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path

# a folder here has the name of a package, and a script's own folder comes first
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]

import numpy as np
import torch
from tqdm.auto import tqdm

import models
from data import DataError
from training import DSM, Callback, TrainingOptions, UniformTime, Validation, train
from workflow.configuration import config_for
from workflow.protocol import Protocol
from workflow.run_folder import RunFolder
from workflow.score import score_split
from workflow.setup import resolve
from workflow.trained_run import TrainedRun, fingerprint

RECIPES = ("reference", "ours")
RATES = (2e-4, 2e-3)  # offered to the reference: the published one, and ours
ROUNDS, BLOCK = 12, 12  # of the cost's measurement; steps a block
SELECTION_SEED = 1000  # of no run that is scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Race:
    """A data set's terms. seconds: of CPU time a run; images: of the test set, 0 for all; steps, batch: of the scoring."""

    data: str
    seconds: float
    images: int
    steps: int
    batch: int


RACES = {
    "digits": Race(data="digits", seconds=210, images=0, steps=128, batch=100),
    "fashion_mnist": Race(data="fashion_mnist", seconds=300, images=100, steps=96, batch=50),
}


class Watch(Callback):
    """Keeps a run's state, and the CPU time after every step."""

    def __init__(self) -> None:
        self.state, self.at = None, []

    def on_step(self, state) -> None:
        self.state = state
        self.at.append(time.process_time())


def plan(recipe: str, race: Race, seed: int, rate: float, steps: int):
    """The set-up of a fresh run of `steps`; `rate` is the reference's."""
    setup = resolve(config_for("vp", race.data, {"seed": seed}))
    options = dataclasses.replace(setup.options, steps=steps, eval_every=0, checkpoint_every=0)
    if recipe == "ours":
        return dataclasses.replace(setup, options=options)
    m = setup.config["model"]
    torch.manual_seed(seed)
    body = {name: m[name] for name in ("channels", "multipliers", "blocks", "dropout")}
    model = models.ScoreModel(
        models.for_data("unet", setup.dataset.event_shape, embedding="positional", **body),
        setup.sde,
        models.NOISE,
        conditioning=models.ContinuousTime(),
        data_std=setup.model.data_std,  # for the solver's state alone
        data_range=setup.model.data_range,
    )
    options = TrainingOptions(
        steps=steps,
        batch_size=options.batch_size,
        seed=seed,
        learning_rate=rate,
        warmup=options.warmup,
        log_every=options.log_every,
        progress=True,
    )
    return dataclasses.replace(setup, model=model, options=options, objective=DSM(times=UniformTime()))


def costs(race: Race, folder: Path) -> dict[str, dict[str, float]]:
    """CPU seconds of a step by recipe, their ratio and its standard error, measured in turns."""
    file = folder / "costs.json"
    if not file.exists():
        rounds = {recipe: [] for recipe in RECIPES}
        for _ in tqdm(range(ROUNDS), desc=f"{race.data}, the cost of a step", unit="round"):
            for recipe, seen in rounds.items():
                setup, watch = plan(recipe, race, 0, RATES[0], BLOCK), Watch()
                fit(
                    dataclasses.replace(setup, options=dataclasses.replace(setup.options, progress=False)),
                    "train",
                    watch,
                )
                seen.append((watch.at[-1] - watch.at[1]) / (BLOCK - 2))  # the first steps allocate
        ratios = [ours / reference for reference, ours in zip(*(rounds[recipe] for recipe in RECIPES), strict=True)]
        found = {recipe: statistics.median(seen) for recipe, seen in rounds.items()}
        found |= {"ratio": statistics.mean(ratios), "ratio_stderr": statistics.stdev(ratios) / math.sqrt(ROUNDS)}
        _write(file, found)
    return json.loads(file.read_text())


def fit(setup, split: str, watch) -> None:
    """Trains on a split."""
    data = setup.dataset.split(split)
    train(setup.model, data, setup.transform, setup.options, objective=setup.objective, callbacks=[watch])


def run(recipe: str, race: Race, seed: int, rate: float, split: str, cost: float):
    """Trains for the budget; (set-up, the model's state, what is to be written down)."""
    setup = plan(recipe, race, seed, rate, round(race.seconds / cost))
    options = setup.options
    print(f"{race.data} {recipe} seed {seed}: {options.steps:,} steps at {options.learning_rate:g}", flush=True)
    begun, watch = time.process_time(), Watch()
    fit(setup, split, watch)
    facts = {
        "cpu_seconds": time.process_time() - begun,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "parameters": models.parameter_count(setup.model),
    }
    return setup, watch.state, facts


def selected_rate(race: Race, folder: Path, cost: float) -> dict[str, object]:
    """The reference's rate, by the validation images."""
    found = {}
    for rate in RATES:
        file = folder / f"selection_{rate:g}.json"
        if not file.exists():
            setup, state, facts = run("reference", race, SELECTION_SEED, rate, "fit", cost)
            judge = Validation(setup.dataset.split("validation"), setup.transform, n=200, draws=32)
            _write(file, {**facts, **judge.on_eval(state)})
        found[rate] = json.loads(file.read_text())
    best = min(found, key=lambda rate: found[rate]["metric"])
    return {
        "rate": best,
        "bounds": {rate: (one["metric"], one["bits_per_dim_bound_stderr"]) for rate, one in found.items()},
    }


def compete(recipe: str, race: Race, seed: int, rate: float, cost: float, folder: Path) -> None:
    """One run, trained and scored, unless it is there."""
    file, weights = folder / f"{recipe}_{seed}.json", folder / f"{recipe}_{seed}.pt"
    if file.exists():
        return
    if weights.exists():
        setup = plan(recipe, race, seed, rate, 1)
        stored = torch.load(weights, weights_only=True)
        facts = stored["facts"]
    else:
        setup, state, facts = run(recipe, race, seed, rate, "train", cost)
        with state.averaged() as averaged:
            stored = {"facts": facts, "model": {k: v.detach().clone() for k, v in averaged.state_dict().items()}}
        _save(weights, stored)
    model = setup.model
    model.load_state_dict(stored["model"])
    model.eval().requires_grad_(False)
    protocol = Protocol(solver="fast", steps=race.steps, probes=1, draws=1, batch_size=race.batch, limit=race.images)
    begun = time.process_time()
    trained = TrainedRun(
        folder=RunFolder(folder), setup=setup, step=facts["steps"], fingerprint=fingerprint(model), score=model
    )
    found = score_split(trained, protocol, alone=True).result
    np.savez(
        folder / f"{recipe}_{seed}.npz",
        ids=setup.dataset.split("test").ids[: len(found.per_image)].numpy(),
        per_image=found.per_image.numpy(),
        converged=found.converged.numpy(),
        solver_error=found.stated_error.numpy(),
    )
    _write(
        file,
        {**facts, **found.asdict(), "solver_steps": race.steps, "scoring_cpu_seconds": time.process_time() - begun},
    )
    print(
        f"{race.data} {recipe} seed {seed}: {facts['steps']:,} steps in {facts['cpu_seconds']:.0f} CPU s; {found}",
        flush=True,
    )


def mean_and_error(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, standard error, the share of it that is the seeds') of `(seeds, images)`; see the module's text."""
    seeds, images = values.shape
    over_images = values.mean(axis=0).var(ddof=1) / images
    over_seeds = values.mean(axis=1).var(ddof=1) / seeds if seeds > 1 else math.nan
    return float(values.mean()), math.sqrt(over_images + over_seeds), math.sqrt(over_seeds)


def report(race: Race, folder: Path, seeds: int, selection: dict[str, object], cost: dict[str, float]) -> str:
    """The table, as Markdown."""
    values, facts = {}, {}
    good = True
    for recipe in RECIPES:
        arrays = [np.load(folder / f"{recipe}_{seed}.npz") for seed in range(seeds)]
        values[recipe] = np.stack([a["per_image"] for a in arrays])
        good = good & np.all([a["converged"] for a in arrays], axis=0)
        facts[recipe] = [json.loads((folder / f"{recipe}_{seed}.json").read_text()) for seed in range(seeds)]
    values = {recipe: v[:, good] for recipe, v in values.items()}
    tried = "; ".join(f"{rate:g}: {bound:.3f} ± {error:.3f}" for rate, (bound, error) in selection["bounds"].items())
    lines = [
        f"### {race.data}: {race.seconds:g} CPU seconds a run, {seeds} seeds, {int(good.sum())} test images",
        "",
        "| recipe | test bits/dim | of ± the seeds' | each seed | steps | solver's error |",
        "|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        mean, error, of_seeds = mean_and_error(values[recipe])
        each = ", ".join(f"{v:.3f}" for v in values[recipe].mean(axis=1))
        steps = ", ".join(f"{one['steps']:,}" for one in facts[recipe])
        solver = ", ".join(f"{one['solver_error']:.4f}" for one in facts[recipe])
        lines.append(f"| {recipe} | {mean:.3f} ± {error:.3f} | {of_seeds:.3f} | {each} | {steps} | {solver} |")
    difference = values["reference"] - values["ours"]
    mean, error, of_seeds = mean_and_error(difference)
    each = ", ".join(f"{v:.3f}" for v in difference.mean(axis=1))
    won = 100 * float((difference.mean(axis=0) > 0).mean())
    lines += [
        f"| **reference - ours**, paired | **{mean:.3f} ± {error:.3f}** | {of_seeds:.3f} | {each} | | |",
        "",
        f"Ours is better on {won:.0f} % of the images, and {mean / error:.1f} standard errors ahead. A step of ours costs "
        f"{cost['ratio']:.3f} ± {cost['ratio_stderr']:.3f} of one of the reference. CPU seconds that the runs took: reference "
        + ", ".join(f"{one['cpu_seconds']:.1f}" for one in facts["reference"])
        + "; ours "
        + ", ".join(f"{one['cpu_seconds']:.1f}" for one in facts["ours"])
        + f". Parameters: {facts['reference'][0]['parameters']:,} and {facts['ours'][0]['parameters']:,}. The reference's "
        f"learning rate is {selection['rate']:g}: the bound of 200 validation images (bits/dim) was, by rate, {tried}. "
        f"Scored by Adams with {race.steps} steps.",
        "",
    ]
    return "\n".join(lines)


def _write(file: Path, content: dict[str, object]) -> None:
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(file)


def _save(file: Path, content: dict[str, object]) -> None:
    temporary = file.with_suffix(".part")
    torch.save(content, temporary)
    temporary.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help=f"comma-separated, of {', '.join(RACES)}")
    parser.add_argument("--seconds", type=float, default=0, help="of CPU time a run; 0 for the data set's own")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=-1, help="of the test set; 0 for all, -1 for the data set's own")
    parser.add_argument("--steps", type=int, default=0, help="of the likelihood's solver; 0 for the data set's own")
    parser.add_argument("--workdir", default="runs/race")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"got --seeds {args.seeds}; expected at least 2, or the seeds' spread is unknown")
    torch.set_num_threads(1)
    reports = []
    for name in args.data.split(","):
        if name not in RACES:
            parser.error(f"got --data {name}; expected of {', '.join(RACES)}")
        race = RACES[name]
        race = dataclasses.replace(
            race,
            seconds=args.seconds or race.seconds,
            images=race.images if args.images < 0 else args.images,
            steps=args.steps or race.steps,
        )
        folder = Path(args.workdir) / f"{name}-{race.seconds:g}s-{race.images or 'all'}-{race.steps}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            cost = costs(race, folder)
            selection = selected_rate(race, folder, cost["reference"])
        except DataError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        print(f"{name}: the reference's rate is {selection['rate']:g}, of {selection['bounds']}", flush=True)
        for seed in range(args.seeds):
            for recipe in RECIPES[:: -1 if seed % 2 else 1]:
                compete(recipe, race, seed, selection["rate"], cost[recipe], folder)
        reports.append(report(race, folder, args.seeds, selection, cost))
        (Path(args.workdir) / f"{name}.md").write_text(reports[-1])
    print("\n" + "\n".join(reports))


if __name__ == "__main__":
    main()
