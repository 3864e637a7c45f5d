r"""A network that is shown the measurement: the conditional score learned, where `guidance.posterior` infers it.

    minimise  E w(t) |eps - eps_hat(x_t, t, A^+ y)|^2,      y = A x_0 + n z,    x_t = alpha x_0 + sigma eps

Given x_0 the measurement and x_t are independent, so the minimum is E[eps | x_t, A^+ y], which is the posterior's score (where
A A^T is a multiple of the identity A^+ y says as much as y). With A the mean over blocks of pixels this is super-resolution by
SR3 (Saharia et al. 2021, arXiv:2104.07636, section 2): there too the network gets the up-sampled picture as further channels of
its input. It knows this one operator and this noise, and has to be trained for others anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from models import ScoreModel
from numerics import UserError, expand_as, normal
from sde_lib import SDE, Measurement
from training import LogNormal, Simple, Weighting, train
from training.objectives import Draws, TimedObjective
from training.streams import StepStreams
from workflow import progress

if TYPE_CHECKING:
    from workflow.trained_run import TrainedRun


def back_projected(measurement: Measurement, y: Tensor | None = None) -> Tensor:
    """A^+ y, `(B, *)`: what is measured, as data; of another `y` `(B, ...)` by the same operator, if that is given.

    Raises:
        UserError: for an operator without singular values.
    """
    svd = measurement.svd
    if svd is None:
        raise UserError(
            "got an operator without singular values, so that nothing can be shown to a network; expected one such as "
            "Downsample(2) or Mask(mask)"
        )
    y = measurement.y if y is None else y
    return svd.lift(svd.left(y) / svd.values).to(y.dtype)


class ShownModel(nn.Module):
    """The score given a picture, of a network with twice the channels: `given(shown)`.

    Args:
        net: `net(x, label)` of x `(B, 2C, H, W)`, noisy data before what is shown, to `(B, C, H, W)`.
        like: what says the SDE, and what inputs and outputs mean. Its own network is not used.
    """

    def __init__(self, net: nn.Module, like: ScoreModel) -> None:
        super().__init__()
        self.net = net
        self.sde, self.parametrization, self.conditioning = like.sde, like.parametrization, like.conditioning
        self.data_std, self.data_range = like.data_std, like.data_range

    @staticmethod
    def beside(model: ScoreModel, seed: int) -> ShownModel:
        """One whose network is the model's with other channels, and fresh weights from the seed.

        Raises:
            UserError: for a network whose input and output cannot differ.
        """
        net = model.net
        options = dict(getattr(net, "options", {}))
        if not {"in_channels", "out_channels"} <= options.keys():
            raise UserError(
                f"got the network {type(net).__name__}, whose output has the channels of its input; expected one that is shown "
                "more than it makes, such as ncsnpp: leave sr3_steps out"
            )
        channels = options["in_channels"]
        options.update({"in_channels": 2 * channels, "out_channels": options["out_channels"] or channels})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: nn.Module = type(net)(**{**options, "num_classes": None})
        return ShownModel(made, model).to(next(net.parameters()).device)

    def given(self, shown: Tensor) -> ShownScore:
        """The score of data given what is shown of each, `(B, C, H, W)`."""
        return ShownScore(self, shown)


class ShownScore:
    """The score of `ShownModel.given`: `score(x, t)`."""

    def __init__(self, model: ShownModel, shown: Tensor) -> None:
        self.model, self.shown = model, shown
        self._score = ScoreModel(
            _Beside(model.net, shown),
            model.sde,
            model.parametrization,
            conditioning=model.conditioning,
            data_std=model.data_std,
            data_range=model.data_range,
        )

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score at `x` `(B, C, H, W)` and `t` `()` or `(B,)`.

        Raises:
            UserError: for x that is not of the shape of what is shown.
        """
        self._require_shape(x)
        return self._score.score(x, t)

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of eps, `(B, *)`."""
        self._require_shape(x)
        return self._score.noise(x, t)

    def _require_shape(self, x: Tensor) -> None:
        if x.shape != self.shown.shape:
            raise UserError(
                f"got x of shape {tuple(x.shape)} for a score given pictures of {tuple(self.shown.shape)}; expected one "
                "picture a sample: score.take(index) has some of them"
            )

    def take(self, index: Tensor) -> ShownScore:
        """The score of the samples at `index` `(b,)`."""
        return ShownScore(self.model, self.shown[index])


class _Beside(nn.Module):
    """The network with what is shown filled in."""

    def __init__(self, net: nn.Module, shown: Tensor) -> None:
        super().__init__()
        self.net, self.shown = net, shown

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        found: Tensor = self.net(torch.cat([x, self.shown.to(x)], dim=1), label)
        return found


@dataclass(frozen=True, kw_only=True)
class ShownDSM(TimedObjective):
    """Denoising score matching given a measurement, fresh at every step; of models with `given(shown)`.

    Args:
        measured: whose operator and noise data are measured by; its y says nothing here.
        times, t_min, weighting: as in `training.DSM`.
    """

    measured: Measurement
    weighting: Weighting = Simple()

    needs: ClassVar[tuple[str, ...]] = ("given",)

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        of_y = (int(shape[0]), *self.measured.y.shape[1:])
        z = normal(of_y, streams.generator("measurement's noise"), device=streams.device, dtype=dtype)
        return {**super().draw(sde, shape, streams, dtype=dtype), "z": z}

    def loss(self, model: ShownModel, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:  # type: ignore[override]
        y = self.measured.operator(x_0) + self.measured.std * draws["z"]
        t, eps = draws["t"], draws["eps"]
        error = eps - model.given(back_projected(self.measured, y)).noise(model.sde.perturb(x_0, t, eps), t)
        loss = error.flatten(1).square().mean(dim=1)
        return loss * expand_as(self.weighting(model.sde, t), loss)


def train_shown(run: TrainedRun, measured: Measurement, steps: int) -> ShownModel:
    """A network like the run's, trained on the run's data to restore what is measured so; with its averaged weights, if any.

    Args:
        measured: whose operator and noise are learned.
        steps: of training, with the run's other options.
    """
    own = run.setup.options
    options = replace(
        own,
        steps=steps,
        warmup=min(own.warmup, steps),
        eval_every=0,
        checkpoint_every=0,
        progress=not progress.is_silent(),
        tensorboard=False,
    )
    objective = ShownDSM(measured=measured, times=getattr(run.setup.objective, "times", LogNormal()))
    model = ShownModel.beside(run.model, own.seed).train()
    result = train(model, run.setup.training_data, run.transform, options, objective=objective)
    if result.averages:  # with ema=() the last weights stay, as in the run itself
        result.load_averages(model)
    return model.eval().requires_grad_(False)
