"""What a training run is told, in one frozen object; everything it holds is checked when it is made."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any

from numerics import argument_help
from training.errors import UsageError
from training.precision import PRECISIONS

OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "cosine")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of `training.train`. The optimiser's defaults are those of Song et al. 2021 (arXiv:2011.13456, appendix H).

    The lines below are also the help texts of a command line; `options_help` reads them. The experiments' own values are in
    `workflow/defaults.py`.

    Args:
        steps: number of updates in all.
        batch_size: samples per update, over all processes and parts.
        seed: the seed of batches, noise, times and dropout.
        optimizer: "adam" or "adamw", which decays weights apart from the gradient.
        learning_rate: the largest learning rate.
        warmup: steps over which the learning rate rises linearly to its largest value.
        schedule: "constant", or "cosine", which falls to `final_rate` times the largest learning rate at the last step.
        final_rate: end of the cosine schedule, as a fraction of the largest learning rate.
        betas: Adam's decays of the averages of the gradient and of its square.
        adam_eps: Adam's epsilon, added to the root of the average square.
        weight_decay: how strongly the optimiser pulls weights to zero.
        clip: the largest norm of the gradient; longer ones are shortened to it; None for no limit.
        ema: decays of the weights' moving averages; the first is used for samples; () for none.
        ema_warmup: whether averages are shorter at first, so that they forget the initial weights; see `training.ema`.
        power_ema: widths sigma_rel of averages kept for post-hoc reconstruction; see `training.posthoc_ema`.
        accumulate: parts into which a batch is divided, one after the other, to save memory.
        precision: numbers of the network: "fp32", or "bf16" or "fp16" under autocast; see `training.precision`.
        dequantize: whether grey values get fresh uniform noise at every step; else they are put at the centres of their bins,
            as DDPM's discretised decoder needs.
        flip: whether images are mirrored at random.
        label_dropout: how often a conditional network is not told the class, which classifier-free guidance needs.
        log_every: steps between two reports; a loss that is not finite is found there.
        eval_every: steps between two evaluations; 0 for none.
        checkpoint_every: steps between two checkpoints; 0 for the last one alone.
        keep: number of the newest checkpoints that stay.
        keep_every: checkpoints at multiples of this many steps stay too; 0 for none.
        max_seconds: seconds of training in all, after which the run stops with everything saved; None for no limit.
        cpu_seconds: seconds of processor time of training in all, of this process's threads, after which the run stops as well;
            `schedule` goes by it where it is further than the steps; None for no limit.
        nonfinite: "stop" at the first loss or gradient that is not finite, or "skip" such updates.
        max_skips: largest number of updates to skip.
        compile: whether torch.compile compiles the network for the time of the training.
        checkpoint_activations: whether activations are computed again in the backward pass, to save memory.
        parallel: how several processes share the work: "ddp" copies the weights, "fsdp" divides them.
        progress: whether to show a progress bar; None shows it on a terminal.
        tensorboard: whether to write TensorBoard events into the run folder.

    Raises:
        UsageError: for a value out of its range.
    """

    steps: int
    batch_size: int = 128
    seed: int = 0
    optimizer: str = "adam"
    learning_rate: float = 2e-4
    warmup: int = 5000
    schedule: str = "constant"
    final_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0
    ema: tuple[float, ...] = (0.9999,)
    ema_warmup: bool = True
    power_ema: tuple[float, ...] = ()
    accumulate: int = 1
    precision: str = "fp32"
    dequantize: bool = True
    flip: bool = False
    label_dropout: float = 0.1
    log_every: int = 100
    eval_every: int = 0
    checkpoint_every: int = 0
    keep: int = 3
    keep_every: int = 0
    max_seconds: float | None = None
    cpu_seconds: float | None = None
    nonfinite: str = "stop"
    max_skips: int = 10
    compile: bool = False
    checkpoint_activations: bool = False
    parallel: str = "ddp"
    progress: bool | None = None
    tensorboard: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "ema", _tuple(self.ema))
        object.__setattr__(self, "power_ema", _tuple(self.power_ema))
        object.__setattr__(self, "betas", _tuple(self.betas))
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep"):
            self._check(name, _is_count(getattr(self, name)) and getattr(self, name) >= 1, "an integer >= 1")
        for name in ("warmup", "eval_every", "checkpoint_every", "keep_every", "max_skips"):
            self._check(name, _is_count(getattr(self, name)), "an integer >= 0")
        for name in ("learning_rate", "adam_eps"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and 0 < value < math.inf, "a finite number > 0")
        for name in ("final_rate", "label_dropout"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
        self._check("weight_decay", _is_number(self.weight_decay) and self.weight_decay >= 0, "a number >= 0")
        self._check("betas", len(self.betas) == 2 and all(map(_is_decay, self.betas)), "two numbers in [0, 1)")
        for name in ("clip", "max_seconds", "cpu_seconds"):
            value = getattr(self, name)
            self._check(name, value is None or (_is_number(value) and value > 0), "a number > 0, or None")
        different = all(map(_is_decay, self.ema)) and len(set(self.ema)) == len(self.ema)
        self._check("ema", different, "different numbers in [0, 1)")
        self._check("power_ema", all(_is_number(s) and 0 < s < 0.28 for s in self.power_ema), "numbers in (0, 0.28)")
        self._check("accumulate", self.accumulate <= self.batch_size, f"at most batch_size={self.batch_size}")
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", tuple(PRECISIONS)),
            ("nonfinite", ("stop", "skip")),
            ("parallel", PARALLEL),
        ):
            self._check(name, getattr(self, name) in choices, "one of " + ", ".join(choices))

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise UsageError(f"got {name}={getattr(self, name)!r}; expected {expected}")

    def rate(self, step: int, spent: float = 0.0) -> float:
        """The learning rate of the update that follows `step` updates and `spent` seconds of processor time.

        A cosine schedule ends with the steps, or with `cpu_seconds` where these are used up before: so a run for a given
        processor time anneals its rate whatever number of steps that makes.
        """
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return self.learning_rate * warm
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.cpu_seconds is not None:
            progress = max(progress, spent / self.cpu_seconds)
        progress = min(1.0, max(0.0, progress))
        return (
            self.learning_rate
            * warm
            * (self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * progress)))
        )


def options_help() -> dict[str, str]:
    """A line of plain English for every field of `TrainingOptions`, by name: what a command line shows.

    >>> options_help()["clip"]
    'the largest norm of the gradient; longer ones are shortened to it; None for no limit'
    """
    texts = argument_help(TrainingOptions)
    return {f.name: texts.get(f.name, "") for f in fields(TrainingOptions)}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_decay(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _tuple(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
