"""Every stage of a run in seconds: `--dry_run`.

Trains a few steps with the run's own network and batches, resumes from the checkpoint, draws by both samplers in a few steps,
scores a few samples, writes the report; and says from that what the run itself would take.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from samplers import AnnealedLangevin, Sampler
from training import Plan, UsageError, process_group
from training import plan as plan_training
from workflow import progress, report
from workflow.baselines import bits_per_dim_of_baselines
from workflow.draw import Drawn
from workflow.fit import fit
from workflow.run_folder import RunFolder
from workflow.score import Scored
from workflow.setup import Setup
from workflow.survey import Surveyed
from workflow.trained_run import load_run

_STEPS, _MORE, _VALIDATION = 4, 2, 16  # of training; after the checkpoint; samples at each evaluation
_SAMPLES, _SAMPLER_STEPS = 64, 4
_IMAGES, _SOLVER_STEPS = 50, 4  # one of the run's chunks at most
_LIKELY_STEPS = 96
# the score of a network that is as good as untrained is rough, and costs the pilot many attempts: a loose one will do
_PILOTS = ((1000.0, 40),)


@dataclass
class _Clock:
    """Seconds of each stage, said as they end."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, name: str, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begun
        progress.say(f"{what}: {self.seconds[name]:.1f} s")


def rehearse(setup: Setup, folder: RunFolder, *, keep: bool, init_from: Path | None = None) -> None:
    """Goes through a run and prints what it would take.

    Args:
        folder: the run's.
        keep: write there, and leave it; else into a folder that is removed.
        init_from: weights to start from.

    Raises:
        UsageError: in several processes, or in a folder that holds a run.
    """
    started, clock = time.perf_counter(), _Clock()
    with process_group() as group, contextlib.ExitStack() as stack:
        if group.world > 1:
            raise UsageError(f"got --dry_run in {group.world} processes; expected one: start it without torchrun")
        if keep and folder.has_work:
            raise UsageError(
                f"got --dry_run with the run folder {folder}, which holds a run; expected another --workdir, or none"
            )
        place = folder
        if not keep:
            temporary = tempfile.TemporaryDirectory(prefix="dry_run-", ignore_cleanup_errors=True)
            place = RunFolder(stack.enter_context(temporary))
        fresh = copy.deepcopy(setup.model)
        small = shorten(setup)
        with clock.timed("fit", f"training, {_STEPS} steps"):
            fit(small, place, group, init_from=init_from, quiet=True)
        longer = replace(small, options=replace(small.options, steps=_STEPS + _MORE))
        with clock.timed("resume", f"training, {_MORE} more from the checkpoint"):
            fit(longer, place, group, resume=True, quiet=True)
        run = load_run(place.path, setup=longer)
        place.update_results({"weights": run.fingerprint})
        with clock.timed("draw", f"drawing {small.n} samples"):
            drawn = small.system.draw(run)
        with clock.timed("score", f"scoring {small.protocol.limit} {small.noun}s"):
            scored = small.system.score(run)
            assert not isinstance(scored, Surveyed)  # without a precision
        if small.baselines and small.dataset.levels is not None:
            with clock.timed("baselines", "baselines"):
                place.update_results({"baselines": bits_per_dim_of_baselines(small.dataset, small.options.seed)})
        with clock.timed("report", "report"):
            report.write(place, small, keep=False)
        with clock.timed("finish", f"what is {small.name}'s own"), contextlib.redirect_stdout(io.StringIO()):
            small.system.finish(run, place)
        with clock.timed("measure", "steps of training, to measure"):
            cost = plan_training(
                fresh, setup.training_data, setup.transform, setup.options, objective=setup.objective, steps=5
            )
        pilot = 0.0 if scored is None else _pilot_seconds(scored.parts)
        expected = expected_seconds(setup, small, cost, drawn, scored, clock.seconds, pilot=pilot)
    kept = f"what was written is in {folder}" if keep else "nothing is kept"
    print(f"every stage went through, in {time.perf_counter() - started:.0f} s; {kept}")
    print(_text(cost, expected, folder.free_bytes))


def shorten(setup: Setup) -> Setup:
    """The same run with few steps, samples and images; the network and the batches are as they were."""
    # the checkpoint is gone on from with more steps, at which a schedule that ends would jump
    options = replace(
        setup.options, steps=_STEPS, schedule="constant", log_every=1, eval_every=_STEPS, checkpoint_every=_STEPS
    )
    protocol = setup.protocol
    chunk = protocol.batch_size or _IMAGES
    protocol = replace(
        protocol,
        limit=min(_IMAGES, chunk, _images(setup)),
        steps=min(protocol.steps or _SOLVER_STEPS, _SOLVER_STEPS),
        precision=None,
    )
    small = replace(
        setup,
        options=options,
        protocol=protocol,
        validation=min(setup.validation, _VALIDATION),
        n=min(setup.n, _SAMPLES),
        samplers={name: _short(sampler) for name, sampler in setup.samplers.items()},
        pilots=_PILOTS,
    )
    return setup.system.rehearsal(small)


def _short(sampler: Sampler) -> Sampler:
    """The sampler with a few steps, an annealed one with as few at each of a few levels; one that chooses its steps stays as it
    is.
    """
    if isinstance(sampler, AnnealedLangevin):
        sampler = replace(sampler, steps=min(sampler.steps, _SAMPLER_STEPS))
    evaluations, steps = sampler.evaluations, _steps(sampler)
    if evaluations is None or steps <= _SAMPLER_STEPS:
        return sampler
    each = (evaluations - int(sampler.denoise)) // steps
    return sampler.within(each * _SAMPLER_STEPS + int(sampler.denoise))


def _steps(sampler: Sampler) -> int:
    """Of its grid: an annealed sampler's levels, another's steps."""
    return int(getattr(sampler, "levels", getattr(sampler, "steps", 0)))


def _images(setup: Setup) -> int:
    """How many samples the run would score."""
    n = len(setup.dataset.split(setup.protocol.split))
    return min(n, setup.protocol.limit or n)


def expected_seconds(
    setup: Setup,
    small: Setup,
    cost: Plan,
    drawn: Mapping[str, Drawn],
    scored: Scored | None,
    seconds: dict[str, float],
    *,
    pilot: float,
) -> dict[str, float]:
    """Seconds of each stage of the run: those of the small one, by evaluations of the network and by samples.

    Args:
        seconds: of the small run's stages.
        pilot: seconds of the run that places the solver's steps, which do not grow with the samples.
    """
    expected = {"training": cost.seconds}
    for name, found in drawn.items():
        sampler = setup.samplers.get(name)
        nfe = (sampler.evaluations if sampler else None) or found.nfe
        expected[name] = found.seconds * nfe / found.nfe * setup.n / small.n
    images = _images(setup) / small.protocol.limit
    if scored is None:
        expected["scoring"] = seconds["score"] * images
    else:
        nfe = scored.result.nfe
        if setup.protocol.solver == "fast":
            # the first ones are as many for any number of steps; where pilot runs are to choose it, it is a guess
            nfe += (setup.protocol.steps or _LIKELY_STEPS) - (small.protocol.steps or 0)
        expected["scoring"] = pilot + max(0.0, scored.seconds - pilot) * images * nfe / scored.result.nfe
    done, full = setup.system.effort(small, small.protocol.limit), setup.system.effort(setup, _images(setup))
    if setup.system.counts_evaluations:
        # those of the small run come in small batches, and most of its time is what does not grow
        price = 1 / (3 * setup.options.batch_size * cost.steps_per_second)
        expected["its own"] = max(0.0, seconds["finish"] - done * price) + full * price
    elif done:
        expected["its own"] = seconds["finish"] * full / done
    return {**expected, "the rest": sum(seconds.get(name, 0.0) for name in ("baselines", "report"))}


def _pilot_seconds(parts: Path) -> float:
    """How long the run that places the solver's steps took: it does not grow with the samples."""
    grid = parts / "grid.json"
    return max(0.0, grid.stat().st_mtime - (parts / "index.json").stat().st_mtime) if grid.exists() else 0.0


def _text(cost: Plan, expected: dict[str, float], free: int) -> str:
    minutes = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in expected.items())
    return (
        f"the run itself, from that ({cost.parameters:,} parameters, {cost.steps_per_second:.3g} steps/s):\n"
        f"  time    {sum(expected.values()) / 60:.1f} minutes ({minutes})\n"
        f"  memory  {cost.memory / 2**30:.2f} GiB\n"
        f"  disk    checkpoints of {cost.checkpoint / 2**20:.1f} MiB, at most {cost.disk / 2**20:.1f} MiB; "
        f"{free / 2**30:.1f} GiB are free"
    )
