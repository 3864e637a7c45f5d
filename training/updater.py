"""One step of training: the draws of the objective, forward and backward (in parts, if asked), clipping and Adam, averages.

Nothing in it waits for the device. What it adds up there, `look` and `report` fetch.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from training.batches import Batch
from training.compilation import CompiledCalls, refuse_what_cannot_be_compiled
from training.distributed import Group
from training.ema import EMA
from training.errors import NonFiniteError
from training.objectives import Draws, Objective
from training.parallel import parallelize
from training.posthoc_ema import PowerEMA
from training.precision import PRECISIONS, BatchLoss
from training.reporting import LossMeter
from training.state import TrainState
from training.streams import StepStreams, seed_dropout
from training.trainable import as_trainable, recompute_activations
from training.training_options import TrainingOptions
from training.update import FiniteGuard, make_optimizer


class LossModule(nn.Module):
    """The losses of a part of a batch, as a module: what data-parallel wrappers need to see.

    Args:
        model: what is trained.
        objective: gives the losses.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x_0: Tensor, draws: Draws, labels: Tensor | None) -> Tensor:
        """Losses `(B,)`, without importance weights."""
        return self.objective.loss(self.model, x_0, draws, labels)  # type: ignore[arg-type]


class Updater:
    """Updates a model, step by step.

    Args:
        model: what is trained, on its device; compiled and wrapped as `options` ask.
        objective: gives the losses.
        options: of the run.
        group: the processes that share a batch.

    Attributes:
        state: of the run, at step 0.
        compiled: the network's compiled call, used while the run lasts; None without compilation.

    Raises:
        UsageError: options that do not fit the model.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, options: TrainingOptions, group: Group, device: torch.device
    ) -> None:
        trainable = as_trainable(model, objective.needs)
        if options.checkpoint_activations:
            recompute_activations(trainable)
        if options.compile:
            refuse_what_cannot_be_compiled(trainable.network, objective)
        self.compiled = CompiledCalls(trainable.network, wanted=options.compile)
        self.sde, self.objective, self.options, self.group, self.device = (
            trainable.sde,
            objective,
            options,
            group,
            device,
        )
        self.loss, self.no_sync = parallelize(LossModule(model, objective), options.parallel, group)
        sharded = group.world > 1 and options.parallel == "fsdp"
        self.precision = PRECISIONS[options.precision](device)
        self.state = TrainState(
            model=model,
            optimizer=make_optimizer(
                model.parameters(), options, fused=device.type in ("cpu", "cuda", "mps") and not sharded
            ),
            ema=EMA(model.named_parameters(), options.ema, warmup=options.ema_warmup),
            power_ema=PowerEMA(model.named_parameters(), options.power_ema),
            precision=self.precision,
            objective=objective,
            options=options,
        )
        self.guard = FiniteGuard(device, sticky=options.nonfinite == "stop")
        self.meter = LossMeter(self.sde, device)

    def update(self, batch: Batch) -> None:
        """One update on the global `batch`, of which this process computes its rows."""
        state, options = self.state, self.options
        draws = self.objective.draw(self.sde, batch.x_0.shape, StepStreams(options.seed, state.step, self.device))
        mine = self.group.rows(options.batch_size)
        losses = self._losses_and_gradients(batch, draws, mine)
        weight = draws["weight"][mine].to(losses.dtype)
        mean = self.group.sum_((losses * weight).sum() / options.batch_size)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = options.rate(state.step, state.cpu_seconds)
        t = draws["t"][mine]
        loss = BatchLoss(number=state.step + 1, mean=mean, t=t, losses=losses)
        norm, refused = self.precision.step(state.optimizer, self.guard, loss, clip=options.clip)
        state.optimizer.zero_grad(set_to_none=True)
        state.ema.update()
        state.power_ema.update()
        self._observe(draws["t"], losses, mine)
        self.meter.add(mean, norm, refused, t, losses)
        state.step += 1

    def _losses_and_gradients(self, batch: Batch, draws: Draws, mine: slice) -> Tensor:
        """The losses of the rows `mine`, part by part, their gradients added to those of the weights."""
        options, parts, losses = self.options, self.options.accumulate, []
        size = mine.stop - mine.start
        for part in range(parts):
            rows = slice(mine.start + part * size // parts, mine.start + (part + 1) * size // parts)
            some, some_draws = batch.part(rows), {name: value[rows] for name, value in draws.items()}
            seed_dropout(options.seed, self.state.step, self.group.rank * parts + part)
            last = part == parts - 1
            with contextlib.nullcontext() if last else self.no_sync():
                with self.precision.forward():
                    loss = self.loss(some.x_0, some_draws, some.labels)
                # engines that divide the work average gradients over processes
                mean = (loss * some_draws["weight"].to(loss.dtype)).sum() * (self.group.world / options.batch_size)
                self.precision.backward(mean, self.guard)
            losses.append(loss.detach())
        return torch.cat(losses)

    def _observe(self, t: Tensor, losses: Tensor, mine: slice) -> None:
        if not self.objective.state_dict():
            return
        if self.group.world > 1:
            everything = torch.zeros(len(t), dtype=losses.dtype, device=losses.device)
            everything[mine] = losses
            losses = self.group.sum_(everything)
        self.objective.observe(self.sde, t, losses)

    def look(self) -> None:
        """Waits for the device, to see whether an update was refused.

        Raises:
            NonFiniteError: one was, and `options.nonfinite` does not tolerate it.
        """
        options = self.options
        refused, step, t, loss = self.guard.report()
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

    def report(self) -> dict[str, float]:
        """Mean loss, gradient norm and more since the last report. Waits for the device."""
        values = self.meter.fetch()
        values["learning_rate"] = self.options.rate(self.state.step - 1, self.state.cpu_seconds)
        if self.options.nonfinite == "skip":
            values["skipped"] = float(self.guard.refused)
        return values
