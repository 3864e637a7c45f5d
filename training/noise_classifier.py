r"""Training a classifier of noisy samples, for guidance.

    minimise  E -log p(y | x_t, t),     x_t = alpha x_0 + sigma eps,   t from the times that denoising is trained at

(Dhariwal and Nichol 2021, arXiv:2105.05233, section 4.1.) At every t its minimum is the posterior of the class given x_t: what
guidance differentiates. The weights' running average is kept, and what is random follows from the seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Split
from data.transforms import Transform
from numerics import normal
from sde_lib import SDE
from training.batches import Batches
from training.ema import EMA
from training.errors import NonFiniteError
from training.streams import StepStreams
from training.time_sampling import TimeSampler
from training.training_options import TrainingOptions


def train_noise_classifier(
    classifier: nn.Module,
    sde: SDE,
    split: Split,
    transform: Transform | None,
    options: TrainingOptions,
    *,
    times: TimeSampler,
    num_classes: int,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Trains `classifier(x, t)` -> logits `(B, num_classes)` in place, and leaves it with its averaged weights, in eval mode.

    Args:
        split, transform: labelled data, and the map to model units.
        options: steps, batch_size, learning_rate with its warm-up and schedule, weight_decay, betas, adam_eps, clip, the first
            of ema, dequantize, flip, log_every and seed; the others say nothing here.
        times: at which noise is added.
        on_step: called every `log_every` steps with the number of steps done and the loss `()`.

    Raises:
        TrainingDataError: data without labels.
        NonFiniteError: a loss that is not finite, looked at every `log_every` steps.
    """
    device = next(classifier.parameters()).device
    batches = Batches(
        split,
        transform,
        batch_size=min(options.batch_size, len(split)),
        seed=options.seed,
        device=device,
        dequantize=options.dequantize,
        flip=options.flip,
        num_classes=num_classes,
    )
    parameters = list(classifier.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, betas=options.betas, eps=options.adam_eps, weight_decay=options.weight_decay
    )
    average = EMA(classifier.named_parameters(), options.ema[:1])
    classifier.train().requires_grad_(True)
    for step in range(options.steps):
        batch, streams = batches(step), StepStreams(options.seed, step, device)
        t, _ = times(sde, len(batch.x_0), streams.generator("classifier's times"))
        eps = normal(batch.x_0.shape, streams.generator("classifier's noise"), device=device, dtype=batch.x_0.dtype)
        assert batch.labels is not None  # Batches has seen to that
        loss = F.cross_entropy(classifier(sde.perturb(batch.x_0, t, eps), t), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if options.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, options.clip)
        for group in optimizer.param_groups:
            group["lr"] = options.rate(step)
        optimizer.step()
        average.update()
        if (step + 1) % options.log_every == 0 or step + 1 == options.steps:
            if not bool(loss.isfinite()):
                value = float(loss)
                raise NonFiniteError(
                    f"got the loss {value} of the classifier at step {step + 1}; expected a finite one: lower its rate",
                    step=step + 1,
                    t=float(t.max()),
                    loss=value,
                )
            if on_step is not None:
                on_step(step + 1, loss.detach())
    for shadows in average.shadows.values():
        for parameter, shadow in zip(parameters, shadows, strict=True):
            parameter.data.copy_(shadow)
    classifier.eval().requires_grad_(False)
