r"""Four ways of fitting one score to one density in the plane: loss, error, variance of the gradient, cost.

One network s(x), told no noise level, is trained on the same batches by

    exact              E[ |s|^2 + 2 tr grad s ]                    Hyvarinen 2005, theorem 1
    sliced             the trace as v' (grad s) v                  Song, Garg, Shi, Ermon 2020 (arXiv:1905.07088)
    finite difference  the product as a difference of values       Pang et al. 2020 (arXiv:2007.03317)
    denoising          E |s(x + sigma eps) + eps / sigma|^2        Vincent 2011

The first three have E |s - grad log p|^2 - E |grad log p|^2 as their expectation, so the loss of the truth is known: minus
the Fisher information. Denoising has the score of q_sigma, the law of x + sigma eps, as its minimiser whatever the network,
so as an estimate of grad log p it is biased by

    (1)  B(sigma) = E_p |grad log q_sigma - grad log p|^2,         N(0, v): D sigma^4 / (v (v + sigma^2)^2)

while the variance of its gradient grows as 1 / sigma^2 where sigma falls (Song and Kingma 2021, arXiv:2101.03288, section
3.2). Both are computed here: (1) by quadrature on a grid (`evaluation.plane`).

All losses are put on the score's own scale, w = 1 / sigma^2. The undenoised ones get noise of `SMALL` so that one code
serves all: B(SMALL) is nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import models
from data import Split
from data.transforms import Transform
from evaluation.plane import GridLaw
from numerics import UserError, expand_as, require_count, require_positive
from sde_lib import SDE, VESDE
from training import (
    DSM,
    DiscreteTime,
    ExactScoreMatching,
    FiniteDifferenceScoreMatching,
    Objective,
    ScoreError,
    SlicedScoreMatching,
    TrainingOptions,
    as_trainable,
    train,
)
from training.batches import Batches
from training.streams import StepStreams
from workflow import progress
from workflow.plane import Truth

SMALL = 1e-3
"""The noise under the methods that need none, in units of the data's standard deviation."""

_ONE_LEVEL = DiscreteTime(levels=1)


class Timeless(nn.Module):
    """A score s(x) of one law, told no noise level: `noise(x, t)` is -sigma(t) s(x).

    Args:
        net: called as `net(x, label)`; the label is always 0.
        sde: of the noise in the training; a law's score does not depend on it.
    """

    def __init__(self, net: nn.Module, sde: SDE) -> None:
        super().__init__()
        self.net, self.sde = net, sde

    def forward(self, x: Tensor) -> Tensor:
        """The score at `x` `(B, *)`."""
        value: Tensor = self.net(x, x.new_zeros(len(x)))
        return value

    def noise(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """-sigma(t) s(x), `(B, *)`."""
        sigma = self.sde.sigma(t).to(x.dtype)
        return -expand_as(sigma, x) * self.forward(x)


def one_level(sigma: float) -> SDE:
    """An SDE whose last time, the only one asked, has noise sigma."""
    return VESDE(sigma_min=sigma / 10, sigma_max=sigma)


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained and for how long.

    Args:
        steps: updates of each network.
        batch_size, learning_rate: of each.
        width, depth: of the network, a residual perceptron.
        sigmas: noise levels of the denoising ones, in model units, where the data's standard deviation is 1.
        difference: h of the finite differences, in model units.
        repeats: trainings of each, from other weights and batches: how far one of them is from the next.
        batches: batches from which the variance of a gradient is computed.
        seed: of weights, batches and noise.

    Raises:
        UserError: a number that is not positive, no noise level or one twice.
    """

    steps: int = 2000
    batch_size: int = 512
    learning_rate: float = 3e-3
    width: int = 64
    depth: int = 3
    sigmas: tuple[float, ...] = (0.02, 0.04, 0.08, 0.16, 0.32)
    difference: float = 1e-3
    repeats: int = 1
    batches: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("width", 4),
            ("depth", 1),
            ("repeats", 1),
            ("batches", 3),
        ):
            require_count(getattr(self, name), f"config.study.{name}", least)
        for name in ("learning_rate", "difference"):
            require_positive(getattr(self, name), f"config.study.{name}")
        for sigma in self.sigmas:
            require_positive(sigma, "a noise level of config.study.sigmas")
        if not self.sigmas or len({f"{sigma:g}" for sigma in self.sigmas}) < len(self.sigmas):
            raise UserError(
                f"got config.study.sigmas={self.sigmas}; expected one or more noise levels, each once, that differ in their "
                "first six digits"
            )

    @property
    def methods(self) -> Mapping[str, tuple[float, Objective]]:
        """By name: the noise level, and the objective at it."""
        own = {"times": _ONE_LEVEL, "weighting": ScoreError()}
        without = {
            "exact": ExactScoreMatching(**own),  # type: ignore[arg-type]
            "sliced": SlicedScoreMatching(**own),  # type: ignore[arg-type]
            "finite difference": FiniteDifferenceScoreMatching(**own, step=self.difference / SMALL),  # type: ignore[arg-type]
        }
        denoising = {f"denoising, {sigma:g}": (sigma, DSM(**own)) for sigma in self.sigmas}  # type: ignore[arg-type]
        return {**{name: (SMALL, objective) for name, objective in without.items()}, **denoising}

    @property
    def work(self) -> float:
        """Updates in all."""
        return float(self.steps * self.repeats * len(self.methods))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one method did.

    Attributes:
        sigma: the noise level.
        loss: of the trained network over the last tenth of the training, per dimension; best: that of the minimiser.
        fisher: E_p |s - grad log p|^2, the error as an estimate of the data's score, of each training.
        own_fisher: the same against the score of what it was asked to fit, q_sigma, under that law.
        bias: (1), which no training removes.
        variance: the trace of the covariance of one sample's gradient, at weights that all methods share.
        gradient: the squared norm of the mean gradient there.
        milliseconds: of one update of the weights, without the optimiser; of processor time, on a GPU of the clock's.
        seconds: of the training, of processor time.
    """

    sigma: float
    loss: float
    best: float
    fisher: tuple[float, ...]
    own_fisher: float
    bias: float
    variance: float
    gradient: float
    milliseconds: float
    seconds: float

    @property
    def error(self) -> float:
        """The mean of `fisher` over the trainings."""
        return sum(self.fisher) / len(self.fisher)


def study(plan: Study, split: Split, transform: Transform, truth: Truth, device: torch.device) -> dict[str, Found]:
    """Trains every method of the plan, and measures it against the truth.

    Args:
        split: what is trained on.
        truth: the density in model units, on a grid.

    Raises:
        UserError: a noise level below the grid's spacing.
    """
    fits: dict[str, tuple[Timeless, float, float]] = {}
    again: dict[str, list[Timeless]] = {}
    with progress.bar(total=len(plan.methods) * plan.repeats, name="score matching, each way", unit="network") as bar:
        for name, (sigma, objective) in plan.methods.items():
            bar.set_postfix_str(name)
            fits[name] = _fit(plan, sigma, objective, split, transform, device)
            bar.update(1)
            again[name] = []
            for i in range(1, plan.repeats):
                other = replace(plan, seed=plan.seed + i)
                again[name].append(_fit(other, sigma, objective, split, transform, device)[0])
                bar.update(1)
    shared = _fresh(plan, SMALL, device)  # half-way to the truth, where a gradient is neither all signal nor all noise
    shared.load_state_dict(fits["exact"][0].state_dict())
    found = {}
    for name, (sigma, objective) in plan.methods.items():
        model, loss, seconds = fits[name]
        at = Timeless(shared.net, one_level(sigma))
        mean, variance = gradient_moments(at, objective, _batches(plan, split, transform, device), plan.batches)
        law, target = (truth.law, truth.score) if sigma == SMALL else truth.law.blurred(sigma)
        learned = _field(model, law, device)
        information = law.fisher(target, torch.zeros_like(target))
        errors = (truth.law.fisher(_field(one, truth.law, device), truth.score) for one in (model, *again[name]))
        found[name] = Found(
            sigma=sigma,
            loss=loss,
            best=(1 / sigma**2 if isinstance(objective, DSM) else 0.0) - information / 2,
            fisher=tuple(errors),
            own_fisher=law.fisher(learned, target),
            bias=0.0 if sigma == SMALL else truth.law.fisher(target, truth.score),
            variance=variance,
            gradient=mean,
            milliseconds=_cost(at, objective, _batches(plan, split, transform, device)),
            seconds=seconds,
        )
    return found


def _field(model: Timeless, law: GridLaw, device: torch.device) -> Tensor:
    """The model's score at the points of `law`'s grid, `(n, n, 2)`."""
    return law.field(lambda x: model(x.to(device, torch.float32)).cpu())


def gaussian_bias(variance: float, sigma: float, D: int) -> float:
    """(1) in closed form for N(0, variance I) in D dimensions."""
    return D * sigma**4 / (variance * (variance + sigma**2) ** 2)


def gradient_moments(model: nn.Module, objective: Objective, batches: Batches, n: int) -> tuple[float, float]:
    """The squared norm of the mean gradient, and the trace of the covariance of one sample's gradient, both unbiased, from the
    gradients of `n` batches of independent samples."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(_loss(model, objective, batches, i), parameters)])
            for i in range(n)
        ]
    ).to(torch.float64)
    of_batch = float((found - found.mean(dim=0)).square().sum() / (n - 1))
    squared = float(found.mean(dim=0).square().sum()) - of_batch / n
    return squared, of_batch * batches.shape[0]


def _loss(model: nn.Module, objective: Objective, batches: Batches, step: int) -> Tensor:
    """The mean loss of the batch of `step`."""
    asked, batch = as_trainable(model), batches(step)
    draws = objective.draw(asked.sde, batches.shape, StepStreams(batches.seed + 1, step, batches.device))
    return objective.loss(asked, batch.x_0, draws, None).mean()


def _batches(plan: Study, split: Split, transform: Transform, device: torch.device) -> Batches:
    size = min(plan.batch_size, len(split))  # as in training
    return Batches(split, transform, batch_size=size, seed=plan.seed + 1, device=device)


def _fresh(plan: Study, sigma: float, device: torch.device) -> Timeless:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        net = models.MLP(dim=2, width=plan.width, depth=plan.depth)
    return Timeless(net, one_level(sigma)).to(device)


def _fit(
    plan: Study, sigma: float, objective: Objective, split: Split, transform: Transform, device: torch.device
) -> tuple[Timeless, float, float]:
    """The network with averaged weights, its loss over the last tenth of the training, and the processor seconds that took."""
    model = _fresh(plan, sigma, device)
    options = TrainingOptions(
        steps=plan.steps,
        batch_size=min(plan.batch_size, len(split)),
        seed=plan.seed,
        learning_rate=plan.learning_rate,
        warmup=min(50, plan.steps),
        schedule="cosine",
        ema=(0.995,),
        log_every=max(1, plan.steps // 10),
        progress=False,
        tensorboard=False,
    )
    with warnings.catch_warnings():
        # the noise at T is the one level, which is not meant to hide the data
        warnings.simplefilter("ignore")
        result = train(model, split, transform, options, objective=objective)
    result.load_averages(model)
    return model.eval().requires_grad_(True), result.losses[-1][1], result.cpu_seconds


def _cost(model: nn.Module, objective: Objective, batches: Batches, times: int = 9) -> float:
    """Milliseconds of a loss and its gradient for one batch, the median."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    on_gpu = batches.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    taken: list[float] = []
    for i in range(times):
        begun = clock()
        torch.autograd.grad(_loss(model, objective, batches, i), parameters)
        if on_gpu:
            torch.cuda.synchronize(batches.device)
        taken.append(1e3 * (clock() - begun))
    return sorted(taken)[times // 2]


def shortened(plan: Study) -> Study:
    """A plan of seconds: a few updates, two noise levels, two trainings at most."""
    short = {"steps": min(20, plan.steps), "batches": min(4, plan.batches), "repeats": min(2, plan.repeats)}
    return replace(plan, **short, sigmas=plan.sigmas[-2:])


def of_denoising(found: Mapping[str, Found]) -> Sequence[Found]:
    """The denoising ones, by noise level."""
    return sorted((f for name, f in found.items() if name.startswith("denoising")), key=lambda f: f.sigma)
