"""The loop: one function that trains a score model and can be stopped and resumed at any step.

    result = train(model, dataset.split("train"), dataset.transform(), TrainingOptions(steps=1000), folder="runs/vp")

A step: the batch of that step, the draws of the objective, forward and backward (in parts, if asked), norm, clipping and
Adam in one pass, averages. Nothing in it waits for the device; every `log_every` steps the sums are fetched. Everything
random is a function of (seed, step), so a run that resumes from a checkpoint continues bit for bit on the same machine.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import Split
from data.transforms import Transform
from numerics import UserError
from sde_lib import SDE
from training.batches import Batches
from training.callbacks import Callback
from training.checkpoint import CheckpointFolder
from training.configuration import check_same
from training.distributed import Group, current_group
from training.ema import EMA
from training.errors import CheckpointError, DiskError, Interrupted, NonFiniteError, UsageError
from training.objectives import DSM, Draws, Objective
from training.options import TrainingOptions
from training.parallel import parallelize
from training.posthoc_ema import PowerEMA
from training.prefetch import Prefetch
from training.reporting import LossMeter, Reporter, peak_memory
from training.run_lock import RunLock
from training.signals import Interruption
from training.state import TrainState
from training.streams import StepStreams, preserved_global_rng, seed_dropout
from training.update import FiniteGuard, apply_update, gradient_norm, make_optimizer

CHECKPOINTS = "checkpoints"
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_POLL_EVERY = 8


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        steps: updates done, over all sessions of the run.
        seconds: of training, over all sessions.
        losses: `(step, mean loss since the previous one)`.
        finished: False where `max_seconds` stopped the run before its last step.
        steps_per_second: in this session.
        peak_memory: bytes of the GPU's memory, or of this process's.
        checkpoint: the last checkpoint, or None without a folder.
    """

    steps: int
    seconds: float
    losses: tuple[tuple[int, float], ...]
    finished: bool
    steps_per_second: float
    peak_memory: int = 0
    checkpoint: Path | None = None


class LossModule(nn.Module):
    """The sum of a part's losses, as a module: what data-parallel wrappers need to see."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x_0: Tensor, draws: Draws, labels: Tensor | None) -> Tensor:
        """Losses `(B,)`, without importance weights."""
        return self.objective.loss(self.model, x_0, draws, labels)  # type: ignore[arg-type]


def train(
    model: nn.Module,
    split: Split,
    transform: Transform | None,
    options: TrainingOptions,
    *,
    objective: Objective | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    allow_change: Sequence[str] = (),
    data_fingerprint: str | None = None,
    callbacks: Sequence[Callback] = (),
    stage: Any = None,
) -> TrainingResult:
    """Trains `model` on `split`; its weights are those of the last step when this returns.

    Args:
        model: has `.sde`, `.noise(x, t[, labels])`; a `models.ScoreModel`. It stays on the device where it is.
        split: grey values or points.
        transform: to model units.
        options: see `TrainingOptions`.
        objective: `DSM()` (simple weighting, stratified uniform times) unless given.
        folder: the run folder, for checkpoints, metrics and events; None keeps nothing.
        resume: go on from the newest checkpoint, or start where there is none.
        config: plain values kept in checkpoints and compared on resume.
        allow_change: dotted names of values of `config` that may differ on resume.
        data_fingerprint: of the data, compared on resume.
        callbacks: see `Callback`.
        stage: told the stages of every save; for tests.

    Raises:
        UsageError: options that do not fit the model, or checkpoints in the folder and no `resume`.
        TrainingDataError: data that do not fit.
        NonFiniteError: a loss or gradient that is not finite; the weights are those before that update.
        CheckpointError, DiskError, LockedError: see `training.checkpoint` and `training.run_lock`.
        Interrupted: a signal came; a checkpoint was saved.
    """
    group = current_group()
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserved_global_rng())
        run = _Run(
            model,
            Batches(
                split,
                transform,
                batch_size=options.batch_size,
                seed=options.seed,
                device=next(model.parameters(), torch.zeros(())).device,
                dequantize=options.dequantize,
                flip=options.flip,
                label_dropout=options.label_dropout,
                num_classes=getattr(getattr(model, "net", None), "num_classes", None),
            ),
            options,
            objective or DSM(),
            group,
            None if folder is None else Path(folder),
            tuple(callbacks),
            config or {},
            data_fingerprint,
            stage,
        )
        if folder is not None:
            error: Exception | None = None
            if group.is_main:
                try:
                    stack.enter_context(RunLock(folder))
                except DiskError as locked:
                    error = locked
            group.broadcast_error(error)
        run.start(resume, tuple(allow_change))
        interruption = stack.enter_context(Interruption())
        was_training = model.training
        try:
            return run.go(interruption)
        finally:
            run.close()
            model.train(was_training)


class _Run:
    """One session of a run."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        options: TrainingOptions,
        objective: Objective,
        group: Group,
        folder: Path | None,
        callbacks: tuple[Callback, ...],
        config: Mapping[str, Any],
        data_fingerprint: str | None,
        stage: Any,
    ) -> None:
        if options.batch_size < group.world * options.accumulate:
            raise UsageError(
                f"got batch_size={options.batch_size} for {group.world} processes times accumulate={options.accumulate}; "
                f"expected at least {group.world * options.accumulate}"
            )
        self.model, self.batches, self.options, self.objective = model, batches, options, objective
        self.group, self.folder, self.callbacks = group, folder, callbacks
        self.device = batches.device
        self.sde: SDE = model.sde  # type: ignore[assignment]
        if options.checkpoint_activations:
            if not hasattr(getattr(model, "net", None), "checkpoint_activations"):
                raise UsageError(
                    "got checkpoint_activations=True for a network that cannot; expected one of models.available()"
                )
            model.net.checkpoint_activations = True  # type: ignore[union-attr]
        if options.compile:
            getattr(model, "net", model).compile()
        self.loss, self.no_sync = parallelize(LossModule(model, objective), options.parallel, group)
        self.fused = self.device.type in ("cpu", "cuda", "mps") and not (group.world > 1 and options.parallel == "fsdp")
        optimizer = make_optimizer(model.parameters(), options, fused=self.fused)
        self.state = TrainState(
            model=model,
            optimizer=optimizer,
            ema=EMA(model.named_parameters(), options.ema, warmup=options.ema_warmup),
            power_ema=PowerEMA(model.named_parameters(), options.power_ema),
            scaler=torch.amp.GradScaler(self.device.type, enabled=options.precision == "fp16"),
            objective=objective,
            options=options,
            config=config,
            data_fingerprint=data_fingerprint,
        )
        self.checkpoints = (
            None
            if folder is None
            else CheckpointFolder(
                folder / CHECKPOINTS,
                keep=options.keep,
                keep_every=options.keep_every,
                **({} if stage is None else {"stage": stage}),
            )
        )
        self.reporter: Reporter | None = None
        self.saved_step = -1

    # -- beginning and end --------------------------------------------------------------------------------------------

    def start(self, resume: bool, allow_change: tuple[str, ...]) -> None:
        """Loads the newest checkpoint where there is one to go on from, and opens the reports."""
        error: Exception | None = None
        found = None
        if self.checkpoints is not None:
            try:
                if resume:
                    found = self.checkpoints.read()
                elif self.checkpoints.exists():
                    raise UsageError(
                        f"got the run folder {self.folder}, which has checkpoints up to step "
                        f"{max(self.checkpoints.steps(), default=0)}; expected a new one: resume, or choose another folder"
                    )
                if found is not None:
                    check_same(found.content.get("config") or {}, self.state.config, allow_change)
            except (CheckpointError, UsageError, DiskError) as problem:
                error = problem
        self.group.broadcast_error(error)
        if found is not None:
            if found.step > self.options.steps:
                raise UsageError(
                    f"got steps={self.options.steps} for a run that is at step {found.step}; expected at least {found.step}"
                )
            self.state.load(found.content, found.step)
            self.saved_step = found.step
        if self.group.is_main:
            self.reporter = Reporter(
                self.folder,
                step=self.state.step,
                steps=self.options.steps,
                batch_size=self.options.batch_size,
                progress=self.options.progress,
                tensorboard=self.options.tensorboard,
            )
            self.state.writer = self.reporter.writer
            try:
                for callback in self.callbacks:
                    callback.on_start(self.state)
            except (DiskError, UserError) as problem:
                error = problem
            except OSError as problem:
                error = DiskError(f"{self.folder}: cannot be written ({problem.strerror}); make room or write access")
        self.group.broadcast_error(error)

    def close(self) -> None:
        if self.reporter is not None:
            self.reporter.close()

    def go(self, interruption: Interruption) -> TrainingResult:
        state, options = self.state, self.options
        state.interruption = interruption
        guard = FiniteGuard(self.device, sticky=options.nonfinite == "stop")
        meter = LossMeter(self.sde, self.device)
        first_step, began, before = state.step, time.perf_counter(), state.seconds
        finished = True
        self.model.train()
        with Prefetch(self.batches, state.step, options.steps) as prefetch:
            while state.step < options.steps:
                self._step(prefetch, guard, meter)
                state.seconds = before + time.perf_counter() - began
                if self.reporter is not None:
                    self.reporter.advance()
                    for callback in self.callbacks:
                        callback.on_step(state)
                step = state.step
                last = step == options.steps
                evaluate = options.eval_every and (step % options.eval_every == 0 or last)
                save = (
                    self.checkpoints is not None and options.checkpoint_every and step % options.checkpoint_every == 0
                )
                stop, timed_out = self._asked_to_stop(interruption)
                log = step % options.log_every == 0 or last or timed_out
                if log or save or evaluate or stop:
                    self._refuse(guard)
                if log:
                    self._report(guard, meter)
                if evaluate:
                    self._evaluate()
                if save:
                    self._save()
                if stop:
                    self._save()
                    where = (
                        f"saved at step {step} in {self.folder}; the same command with --resume goes on"
                        if self.folder
                        else f"stopped at step {step}"
                    )
                    where = f"{signal.Signals(stop).name}: {where}"
                    raise Interrupted(where, signal_number=stop, distributed=self.group.world > 1)
                if timed_out and not last:
                    finished = False
                    break
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        state.seconds = before + time.perf_counter() - began
        self._save()
        elapsed = max(time.perf_counter() - began, 1e-9)
        result = TrainingResult(
            steps=state.step,
            seconds=state.seconds,
            losses=tuple(state.losses),
            finished=finished,
            steps_per_second=(state.step - first_step) / elapsed,
            peak_memory=peak_memory(self.device),
            checkpoint=None if self.checkpoints is None else self.checkpoints.path(state.step),
        )
        if self.group.is_main:
            for callback in self.callbacks:
                callback.on_end(state, result)
        return result

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self, prefetch: Prefetch, guard: FiniteGuard, meter: LossMeter) -> None:
        state, options = self.state, self.options
        step = state.step
        batch = prefetch.next()
        draws = self.objective.draw(self.sde, batch.x_0.shape, StepStreams(options.seed, step, self.device))
        n = options.batch_size
        mine = self.group.rows(n)
        size = mine.stop - mine.start
        dtype = AUTOCAST[options.precision]
        losses = []
        for part in range(options.accumulate):
            rows = slice(
                mine.start + part * size // options.accumulate, mine.start + (part + 1) * size // options.accumulate
            )
            some = batch.part(rows)
            some_draws = {name: value[rows] for name, value in draws.items()}
            seed_dropout(options.seed, step, self.group.rank * options.accumulate + part)
            last = part == options.accumulate - 1
            with contextlib.nullcontext() if last else self.no_sync():
                with torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = self.loss(some.x_0, some_draws, some.labels)
                # engines that divide the work average gradients over processes
                mean = (loss * some_draws["weight"].to(loss.dtype)).sum() * (self.group.world / n)
                if options.precision == "fp16" and guard.sticky:
                    # whether fp16 steps is the scaler's decision alone, and this gives it a gradient that is not finite
                    mean = mean * torch.where(guard.refused > 0, torch.nan, 1.0)
                state.scaler.scale(mean).backward()
            losses.append(loss.detach())
        local = torch.cat(losses)
        total = self.group.sum_((local * draws["weight"][mine].to(local.dtype)).sum() / n)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = options.rate(step)
        if options.precision == "fp16":
            state.scaler.unscale_(state.optimizer)
            norm = gradient_norm(state.optimizer)
            refused = guard.check(step + 1, total, torch.ones_like(norm), draws["t"][mine], local)
            if options.clip is not None:
                trained = [p for g in state.optimizer.param_groups for p in g["params"]]
                torch.nn.utils.clip_grads_with_norm_(trained, options.clip, norm)
            state.scaler.step(state.optimizer)
            state.scaler.update()
        else:
            norm = gradient_norm(state.optimizer)
            refused = guard.check(step + 1, total, norm, draws["t"][mine], local)
            apply_update(state.optimizer, norm, refused, options, fused=self.fused)
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update()
        state.power_ema.update()
        self._observe(draws["t"], local, mine)
        meter.add(total, norm, refused, draws["t"][mine], local)
        state.step = step + 1

    def _observe(self, t: Tensor, local: Tensor, mine: slice) -> None:
        if not self.objective.state_dict():
            return
        if self.group.world > 1:
            everything = torch.zeros(len(t), dtype=local.dtype, device=local.device)
            everything[mine] = local
            local = self.group.sum_(everything)
        self.objective.observe(self.sde, t, local)

    # -- looking, evaluating, saving ----------------------------------------------------------------------------------

    def _refuse(self, guard: FiniteGuard) -> None:
        """Stops the run if an update was refused and that is not tolerated."""
        options = self.options
        refused, step, t, loss = guard.report()
        if refused and (options.nonfinite == "stop" or refused > options.max_skips):
            allowed = (
                "" if options.nonfinite == "stop" else f" ({refused} in all, more than max_skips={options.max_skips})"
            )
            raise NonFiniteError(
                f"step {step}: the loss is {loss:g} or its gradient is not finite, worst at t={t:.6g}{allowed}; the "
                "update was not applied: lower learning_rate, use precision=fp32, or check the data; "
                "nonfinite=skip tolerates a few",
                step=step,
                t=t,
                loss=loss,
            )

    def _report(self, guard: FiniteGuard, meter: LossMeter) -> None:
        """Fetches the sums and reports them."""
        state, options = self.state, self.options
        values = meter.fetch()
        state.losses.append((state.step, values["loss"]))
        values["learning_rate"] = options.rate(state.step - 1)
        if options.nonfinite == "skip":
            values["skipped"] = float(guard.refused)
        values["memory_gib"] = peak_memory(self.device) / 2**30
        if self.reporter is not None:
            self.reporter.log(state.step, values)

    def _evaluate(self) -> None:
        for callback in self.callbacks:
            values = callback.on_eval(self.state)
            if values:
                if "metric" in values:
                    self.state.metric = float(values["metric"])
                if self.reporter is not None:
                    self.reporter.record(self.state.step, {f"eval/{k}": float(v) for k, v in values.items()})
                for name, value in values.items():
                    self.state.scalar(f"eval/{name}", float(value))
        self.model.train()

    def _save(self) -> None:
        state = self.state
        if self.checkpoints is None or self.saved_step == state.step:
            return
        content = state.content()
        error: Exception | None = None
        if self.group.is_main:
            try:
                path = self.checkpoints.save(content, state.step, metric=state.metric)
            except DiskError as problem:
                error = problem
        self.group.broadcast_error(error)
        self.saved_step = state.step
        if self.group.is_main:
            for callback in self.callbacks:
                callback.on_checkpoint(state, path)

    def _asked_to_stop(self, interruption: Interruption) -> tuple[int, bool]:
        """(number of the signal or 0, whether the time is up), the same in all processes."""
        late = self.options.max_seconds is not None and self.state.seconds >= self.options.max_seconds
        signal_number = interruption.requested or 0
        if self.group.world > 1:
            if self.state.step % _POLL_EVERY:
                return 0, False
            late = bool(self.group.maximum(float(late)))
            signal_number = int(self.group.maximum(float(signal_number)))
        return signal_number, late
