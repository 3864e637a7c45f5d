"""The loop: one function that trains a score model and can be stopped and resumed at any step.

    result = train(model, dataset.split("train"), dataset.transform(), TrainingOptions(steps=1000), folder="runs/vp")

For each step: an update (`training.updater`), then whatever is due (`training.triggers`): a report, an evaluation, a
checkpoint, the end. Nothing in an update waits for the device; every `log_every` steps its sums are fetched. Everything
random is a function of (seed, step), so a run that resumes from a checkpoint continues bit for bit on the same machine.
"""

from __future__ import annotations

import contextlib
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data import Split
from data.transforms import Transform
from sde_lib import SDE, mismatch_warning, prior_mismatch
from training.batches import Batches
from training.callbacks import Callback
from training.checkpoint import CHECKPOINTS, CheckpointFolder
from training.distributed import Group, current_group
from training.errors import DiskError, Interrupted, UsageError
from training.objectives import DSM, Objective
from training.prefetch import Prefetch
from training.reporting import Reporter, peak_memory
from training.result import TrainingResult
from training.resume import begin
from training.run_lock import RunLock
from training.signals import Interruption
from training.streams import preserved_global_rng
from training.trainable import as_trainable, learn_classes
from training.training_options import TrainingOptions
from training.triggers import Triggers
from training.updater import Updater


def train(
    model: nn.Module,
    split: Split,
    transform: Transform | None,
    options: TrainingOptions,
    *,
    objective: Objective | None = None,
    folder: str | Path | None = None,
    checkpoints: CheckpointFolder | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    allow_change: Sequence[str] = (),
    data_fingerprint: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Trains `model` on `split`; its weights are those of the last step when this returns.

    Args:
        model: a `models.ScoreModel`, or a module with `.sde` and `.noise(x, t[, labels])`, or what else the objective needs;
            see `training.trainable`. It stays on the device where it is.
        split: grey values or points.
        transform: to model units.
        options: see `TrainingOptions`.
        objective: `DSM()` (simple weighting, stratified uniform times) unless given.
        folder: the run folder, for checkpoints, metrics and events; None keeps nothing.
        checkpoints: where checkpoints go, in place of `folder`/checkpoints with the `keep` and `keep_every` of `options`.
        resume: continue from the newest checkpoint, or start where there is none.
        config: plain values kept in checkpoints and compared on resume.
        allow_change: dotted names of values of `config` that may differ on resume.
        data_fingerprint: of the data, compared on resume.
        callbacks: see `Callback`.

    Raises:
        UsageError: options that do not fit the model, or checkpoints in the folder and no `resume`.
        TrainingDataError: data that do not fit.
        NonFiniteError: a loss or gradient that is not finite; the weights are those before that update.
        CheckpointError, DiskError, LockedError: see `training.checkpoint` and `training.run_lock`.
        Interrupted: a signal came; a checkpoint was saved.
    """
    group, folder = current_group(), None if folder is None else Path(folder)
    if options.batch_size < group.world * options.accumulate:
        raise UsageError(
            f"got batch_size={options.batch_size} for {group.world} processes times accumulate={options.accumulate}; "
            f"expected at least {group.world * options.accumulate}"
        )
    if options.cpu_seconds is not None and group.world > 1:
        raise UsageError(
            f"got cpu_seconds={options.cpu_seconds} in {group.world} processes, whose learning rates would differ; expected "
            "one process, or max_seconds"
        )
    if checkpoints is None and folder is not None:
        checkpoints = CheckpointFolder(folder / CHECKPOINTS, keep=options.keep, keep_every=options.keep_every)
    place = folder if folder is not None or checkpoints is None else checkpoints.folder
    device = next(model.parameters(), torch.zeros(())).device
    objective = DSM() if objective is None else objective
    trainable = as_trainable(model, objective.needs)
    if group.is_main and "noise" in objective.needs:
        _say_what_shows(trainable.sde, split, transform)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_global_rng())
        batches = Batches(
            split,
            transform,
            batch_size=options.batch_size,
            seed=options.seed,
            device=device,
            dequantize=options.dequantize,
            flip=options.flip,
            label_dropout=options.label_dropout,
            num_classes=trainable.num_classes,
        )
        updater = Updater(model, objective, options, group, device)
        state = updater.state
        state.config, state.data_fingerprint = config or {}, data_fingerprint
        if place is not None:
            group.on_main(lambda: stack.enter_context(RunLock(place)))
        saved_step = begin(state, checkpoints, group, resume=resume, allow_change=tuple(allow_change))
        learn_classes(model, options.label_dropout)
        reporter = group.everywhere(
            lambda: Reporter(
                folder if group.is_main else None,
                step=state.step,
                steps=options.steps,
                batch_size=options.batch_size,
                progress=options.progress if group.is_main else False,
                tensorboard=options.tensorboard,
            )
        )
        stack.callback(reporter.close)
        state.writer = reporter.writer
        run = _Run(
            updater=updater,
            triggers=Triggers(options, group, saves=checkpoints is not None),
            reporter=reporter,
            checkpoints=checkpoints,
            callbacks=tuple(callbacks),
            group=group,
            place=place,
            saved_step=saved_step,
        )
        group.on_main(run.announce)
        state.interruption = stack.enter_context(Interruption())
        stack.enter_context(updater.compiled.used())
        stack.callback(model.train, model.training)
        return run.go(batches)


def _say_what_shows(sde: SDE, split: Split, transform: Transform | None) -> None:
    """Warns where the noise at T does not hide the data: samples then begin where nothing was learned."""
    x = split.x[:1000]
    x_0 = x.to(torch.float32) if transform is None else transform.centres(x)
    warning = mismatch_warning(sde, float(prior_mismatch(sde, x_0).mean()) / x_0[0].numel())
    if warning is not None:
        warnings.warn(warning, stacklevel=3)


@dataclass(kw_only=True, eq=False)
class _Run:
    """One session of a run: what takes part in it.

    Attributes:
        callbacks: asked for evaluations in all processes, told of everything else in the main one.
        place: the folder that the run is in, for messages.
        saved_step: of the newest checkpoint, or -1.
    """

    updater: Updater
    triggers: Triggers
    reporter: Reporter
    checkpoints: CheckpointFolder | None
    callbacks: tuple[Callback, ...]
    group: Group
    place: Path | None
    saved_step: int

    def __post_init__(self) -> None:
        self.state = self.updater.state
        self.told = self.callbacks if self.group.is_main else ()

    def go(self, batches: Batches) -> TrainingResult:
        """Every step, and what is due after it."""
        state, last = self.state, self.state.options.steps
        first, before, began = state.step, state.seconds, time.perf_counter()
        spent, clock = state.cpu_seconds, time.process_time()
        state.model.train()
        end = first if self.triggers.spent(before, spent) else last
        with Prefetch(batches, first, end) as ahead:
            while state.step < end:
                self.updater.update(ahead.next())
                state.seconds = before + time.perf_counter() - began
                state.cpu_seconds = spent + time.process_time() - clock
                self.advance()
                due = self.triggers.due(state.step, state.seconds, state.interruption.requested, state.cpu_seconds)
                if due:
                    self.updater.look()
                if due.log:
                    self.log()
                if due.evaluate:
                    self.evaluate()
                if due.save:
                    self.save()
                if due.signal:
                    self.save()
                    raise self.interrupted(due.signal)
                if due.late:
                    break
        if batches.device.type == "cuda":
            torch.cuda.synchronize(batches.device)
        state.seconds = before + time.perf_counter() - began
        state.cpu_seconds = spent + time.process_time() - clock
        self.save()
        result = TrainingResult(
            steps=state.step,
            seconds=state.seconds,
            cpu_seconds=state.cpu_seconds,
            losses=tuple(state.losses),
            finished=state.step == last,
            steps_per_second=(state.step - first) / max(time.perf_counter() - began, 1e-9),
            peak_memory=peak_memory(batches.device),
            checkpoint=None if self.checkpoints is None else self.checkpoints.path(state.step),
            averages={decay: state.ema.weights(decay) for decay in state.ema.decays},
        )
        with self.updater.compiled.paused():
            for callback in self.told:
                callback.on_end(state, result)
        return result

    def announce(self) -> None:
        """Tells the callbacks that the run begins.

        Raises:
            DiskError: one could not write its files.
        """
        try:
            for callback in self.told:
                callback.on_start(self.state)
        except DiskError:
            raise
        except OSError as problem:
            raise DiskError(
                f"{self.place}: cannot be written ({problem.strerror}); make room or write access"
            ) from problem

    def advance(self) -> None:
        """Shows and tells that an update was queued."""
        self.reporter.advance()
        if self.told:
            with self.updater.compiled.paused():
                for callback in self.told:
                    callback.on_step(self.state)

    def log(self) -> None:
        """Reports the losses since the last report."""
        values = self.updater.report()
        self.state.losses.append((self.state.step, values["loss"]))
        values["memory_gib"] = peak_memory(self.updater.device) / 2**30
        self.reporter.log(self.state.step, values)

    def evaluate(self) -> None:
        """Asks the callbacks, in all processes, and writes down what they found."""
        state = self.state
        for callback in self.callbacks:
            with self.updater.compiled.paused():
                values = callback.on_eval(state)
            if values:
                if "metric" in values:
                    state.metric = float(values["metric"])
                self.reporter.record(state.step, {f"eval/{k}": float(v) for k, v in values.items()})
                for name, value in values.items():
                    state.scalar(f"eval/{name}", float(value))
        state.model.train()

    def save(self) -> None:
        """Writes a checkpoint, unless this step has one."""
        checkpoints, state = self.checkpoints, self.state
        if checkpoints is None or self.saved_step == state.step:
            return
        content = state.content()  # by all processes: each has a part of sharded weights
        self.group.on_main(lambda: checkpoints.save(content, state.step, metric=state.metric))
        self.saved_step = state.step
        with self.updater.compiled.paused():
            for callback in self.told:
                callback.on_checkpoint(state, checkpoints.path(state.step))

    def interrupted(self, number: int) -> Interrupted:
        """What is raised after a signal."""
        step = self.state.step
        where = (
            f"stopped at step {step}"
            if self.place is None
            else f"saved at step {step} in {self.place}; the same command with --resume continues"
        )
        return Interrupted(
            f"{signal.Signals(number).name}: {where}", signal_number=number, distributed=self.group.world > 1
        )
