"""Every stage of an experiment in seconds: `--dry_run`.

Trains a few steps with the run's own network and batches, goes on from the checkpoint, draws by both samplers in a few steps,
scores a few images, writes the report; and says from that what the run itself would take.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data import Dataset
from experiments import build, report, stages
from experiments.baselines import bits_per_dim_of_baselines
from experiments.results import update_results
from training import Plan, UsageError, process_group
from training import plan as plan_training

_STEPS, _MORE, _VALIDATION = 4, 2, 16  # of training; after the checkpoint; images at each evaluation
_SAMPLES, _SAMPLER_STEPS = 64, 4
_IMAGES, _SOLVER_STEPS, _BOUND_DRAWS = 100, 4, 4  # one of the run's chunks at most


def rehearse(
    config: ConfigDict,
    workdir: Path,
    *,
    keep: bool,
    init_from: Path | None = None,
    then: Callable[[ConfigDict], Callable[[Path], None]] | None = None,
) -> None:
    """Goes through an experiment and prints what the run would take.

    Args:
        workdir: of the run.
        keep: whether what is written goes there, and stays.
        init_from, then: as in `experiment`.
    """
    started = time.perf_counter()
    stages.set_threads(config)
    seconds: dict[str, float] = {}
    with process_group() as group, contextlib.ExitStack() as stack:
        if group.world > 1:
            raise UsageError(f"got --dry_run in {group.world} processes; expected one: start it without torchrun")
        if keep and stages.holds_run(workdir):
            raise UsageError(
                f"got --dry_run with the run folder {workdir}, which holds a run; expected another --workdir, or none"
            )
        dataset = build.dataset(config)
        stages.plan(config, dataset)  # what the run would refuse is refused
        if keep:
            folder = workdir
        else:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="dry_run-", ignore_cleanup_errors=True))
            )
        small = shrink(config, dataset)
        with _timed(f"training, {_STEPS} steps", seconds, "fit"):
            stages.fit(small, folder, group, init_from=init_from, quiet=True)
        small.training.steps += _MORE
        with _timed(f"training, {_MORE} more from the checkpoint", seconds, "resume"):
            stages.fit(small, folder, group, resume=True, allow_change=("training.steps",), quiet=True)
        run = build.load_run(folder, build.device(config.device))
        with _timed(f"drawing {small.sampling.n} samples by two samplers", seconds, "draw"):
            stages.draw(run, small)
        with _timed(f"scoring {small.likelihood.limit} images", seconds, "score"):
            results = stages.score(run, small)
        if small.baselines and dataset.levels is not None:
            with _timed("baselines", seconds, "baselines"):
                results = update_results(folder, {"baselines": bits_per_dim_of_baselines(dataset, config.seed)})
        with _timed("report", seconds, "report"):
            results = update_results(folder, {"seconds": time.perf_counter() - started})
            report.write(folder, small, results, keep=False)
        if then is not None:
            with _timed("bound", seconds, "bound"), contextlib.redirect_stdout(io.StringIO()):
                then(small)(folder)
        with _timed("steps of training, to measure", seconds, "measure"):
            cost = _measure(config, dataset)
        pilot = _pilot_seconds(folder)
    kept = f"what was written is in {folder}" if keep else "nothing is kept"
    print(f"every stage went through, in {time.perf_counter() - started:.0f} s; {kept}")
    print(_text(cost, _expected(config, small, dataset, cost, results, seconds, pilot), stages.free_bytes(workdir)))


def shrink(config: ConfigDict, dataset: Dataset) -> ConfigDict:
    """The same experiment with few steps, samples and images; the network and the batches are as they were."""
    small = copy.deepcopy(config)
    t, s, l = small.training, small.sampling, small.likelihood
    t.update({"steps": _STEPS, "log_every": 1, "eval_every": _STEPS, "checkpoint_every": _STEPS})
    t.validation = min(t.validation, _VALIDATION)
    first, second, _ = stages.plan(config, dataset)
    s.n = min(s.n, _SAMPLES)
    for key, sampler in (("steps", first), ("second_steps", second)):
        s[key] = min(getattr(sampler, "steps", 0), _SAMPLER_STEPS)  # one that chooses its steps stays as it is
    l.limit = min(_IMAGES, l.batch_size, _images(config, dataset))
    l.steps = min(l.steps, _SOLVER_STEPS)
    if "bound_draws" in l:
        l.bound_draws = min(l.bound_draws, _BOUND_DRAWS)
    return small


def _images(config: ConfigDict, dataset: Dataset) -> int:
    """How many images the run would score."""
    n = len(dataset.split(config.likelihood.split))
    return min(n, config.likelihood.limit or n)


def _measure(config: ConfigDict, dataset: Dataset) -> Plan:
    data, _, _ = stages.splits(config, dataset)
    model = build.model(config, dataset).to(build.device(config.device))
    transform, options = build.transform(config, dataset), build.options(config)
    return plan_training(model, data, transform, options, objective=build.objective(config), steps=5)


def _pilot_seconds(folder: Path) -> float:
    """How long the run that places the solver's steps took: it does not grow with the images."""
    grid = next(folder.glob("nll/*/grid.json"), None)
    return 0.0 if grid is None else max(0.0, grid.stat().st_mtime - (grid.parent / "index.json").stat().st_mtime)


def _expected(
    config: ConfigDict,
    small: ConfigDict,
    dataset: Dataset,
    cost: Plan,
    results: dict[str, Any],
    seconds: dict[str, float],
    pilot: float,
) -> dict[str, float]:
    """Seconds of each stage of the run: those of the small one, by evaluations of the network and by images."""
    expected = {"training": cost.seconds}
    first, second, _ = stages.plan(config, dataset)
    for name, key, sampler in (
        (config.sampling.sampler, "steps", first),
        (config.sampling.second, "second_steps", second),
    ):
        found = results["sampling"]["all"][name]
        few, many = small.sampling[key], getattr(sampler, "steps", 0)
        nfe = (found["nfe"] - 1) * many / few + 1 if few else found["nfe"]  # one is for the last denoising
        expected[name] = found["seconds"] * nfe / found["nfe"] * config.sampling.n / small.sampling.n
    found = results["bits_per_dim"]
    images = _images(config, dataset) / small.likelihood.limit
    nfe = found["nfe"]
    if config.likelihood.solver == "fast":
        nfe += config.likelihood.steps - small.likelihood.steps  # the first ones are as many for any number of steps
    expected["scoring"] = pilot + max(0.0, found["seconds"] - pilot) * images * nfe / found["nfe"]
    if "bound" in seconds:
        draws = config.likelihood.bound_draws / small.likelihood.bound_draws
        expected["bound"] = seconds["bound"] * images * draws
    rest = sum(seconds.get(name, 0.0) for name in ("baselines", "report"))
    return {**expected, "the rest": rest}


def _text(cost: Plan, expected: dict[str, float], free: int) -> str:
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in expected.items())
    return (
        f"the run itself, from that ({cost.parameters:,} parameters, {cost.steps_per_second:.3g} steps/s):\n"
        f"  time    {sum(expected.values()) / 60:.1f} minutes ({minutes})\n"
        f"  memory  {cost.memory / 2**30:.2f} GiB\n"
        f"  disk    checkpoints of {cost.checkpoint / 2**20:.1f} MiB, at most {cost.disk / 2**20:.1f} MiB; "
        f"{free / 2**30:.1f} GiB are free"
    )


@contextlib.contextmanager
def _timed(what: str, seconds: dict[str, float], name: str) -> Iterator[None]:
    """Says how long a stage took, and notes it."""
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun
    print(f"{what}: {seconds[name]:.1f} s", flush=True)
