"""A network, an SDE, and what the network's output means: together, a score.

    score = -eps / sigma,    eps = parametrization.noise(net(scale_input(x), label), x, alpha, sigma)

Coefficients are computed in float64, once per call; the network runs in its own dtype; the result comes back
in the dtype of `x` (an ODE's state is float64). There is one cast on the way in and one on the way out.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.conditioning import Conditioning, LogSNR
from models.network import Network
from models.parametrization import NOISE, Parametrization
from models.under import UnderAnotherSDE
from numerics import UserError, batch_time, class_labels, expand_as, ordinary
from sde_lib import SDE

_NO_CLASS = (
    "got no class for a model that was trained with classes only (label_dropout=0), so what it says without one means nothing; "
    "expected a class: use model.condition(labels) or --label, or train with label_dropout=0.1"
)


class Evaluation(NamedTuple):
    """One call of the network: `output (B, *)`, `x (B, *)` in the working dtype, `alpha`, `sigma (B,)`
    float64.
    """

    output: Tensor
    x: Tensor
    alpha: Tensor
    sigma: Tensor


class ScoreModel(nn.Module):
    """`model(x, t)` is the score: `x (B, *)` of any floating dtype, `t ()` or `(B,)` -> `(B, *)` of x's
    dtype.

    Args:
        net: called as `net(x, label)` or `net(x, label, class_label)`; see `models.network`.
        sde: whose `alpha`, `sigma` the samples follow.
        parametrization: what the output means (`NOISE`, `DATA`, `VELOCITY`, `SCORE`,
            `Preconditioned(data_std=…)`).
        conditioning: the label, from `(sde, t)`. By default what the network needs, where it needs something of its own (an
            index for NCSN's, sigma for a Fourier embedding); else `LogSNR()`, which is for smooth embeddings.
        data_std: standard deviation of the data, for solvers that scale their state by it; the
            parametrisation's if it has one.
        data_range: smallest and largest value of the data that the model was trained on.

    Everything that it was made from stays readable under these names. `learned_without_class` says whether a network with
    classes was also trained to do without one (training writes it, cards keep it; None: not known); one that was not warns
    wherever it is used without.

    Raises:
        UserError: an `sde` or a `parametrization` of another class, or a conditioning whose labels mean nothing to the network.
            All methods: a `t` whose shape is neither `()` nor `(B,)`.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        parametrization: Parametrization = NOISE,
        *,
        conditioning: Conditioning | None = None,
        data_std: float | None = None,
        data_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        for name, value, kind, example in (
            ("sde", sde, SDE, "VPSDE()"),
            ("parametrization", parametrization, Parametrization, "NOISE or Preconditioned(data_std=0.5)"),
        ):
            if not isinstance(value, kind):
                raise UserError(f"got {name}={value!r}; expected an object such as {example}")
        self.net = net
        self.sde = sde
        self.parametrization = parametrization
        if conditioning is None:
            conditioning = net.needed_conditioning(net.options) if isinstance(net, Network) else None
        self.conditioning = LogSNR() if conditioning is None else conditioning
        if isinstance(net, Network):
            net.check_labels(self.conditioning(sde, torch.tensor([sde.t_min, sde.T], dtype=torch.float64)))
        self.data_std = getattr(parametrization, "data_std", None) if data_std is None else data_std
        self.data_range = (float(data_range[0]), float(data_range[1]))
        self.card: dict[str, Any] = {}
        self.learned_without_class: bool | None = None

    @property
    def network(self) -> nn.Module:
        """The plain network, `net`."""
        return self.net

    @property
    def num_classes(self) -> int | None:
        """How many classes the network knows; None where it takes no labels."""
        return getattr(self.net, "num_classes", None)

    @property
    def learned_variance(self) -> bool:
        """Whether half of the network's output channels are variances."""
        return bool(getattr(self.net, "learned_variance", False))

    def evaluate(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Evaluation:
        """One call of the network and what is needed to interpret it."""
        if class_label is None and self.learned_without_class is False and self.num_classes is not None:
            warnings.warn(_NO_CLASS, stacklevel=2)
        t = batch_time(t, x)
        label = self.conditioning(self.sde, t)
        return self.evaluate_at(x, self.sde.alpha(t), self.sde.sigma(t), label, class_label)

    def evaluate_at(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor, class_label: Tensor | None = None
    ) -> Evaluation:
        """One call of the network, at coefficients and a label that are known, each `(B,)`."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = next(self.net.parameters(), x)
        inputs = self.parametrization.scale_input(x, alpha, sigma)
        if not getattr(self.net, "fine_input", False):
            inputs = inputs.to(weight.dtype)
        # a label is a time: it is not rounded to what the weights are rounded to
        label = label.to(torch.promote_types(weight.dtype, torch.float32))
        output = self.net(inputs, label) if class_label is None else self.net(inputs, label, class_label)
        return Evaluation(output, x, alpha, sigma)

    def _predict(self, x: Tensor, t: Tensor, class_label: Tensor | None) -> Evaluation:
        """One evaluation, its output cut down to the prediction and cast to the working dtype."""
        one = self.evaluate(x, t, class_label)
        output = one.output.chunk(2, dim=1)[0] if getattr(self.net, "learned_variance", False) else one.output
        return one._replace(output=output.to(one.x.dtype))

    def forward(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The score, `(B, *)`."""
        one = self._predict(x, t, class_label)
        return (self.parametrization.noise(*one) / expand_as(-one.sigma, one.x)).to(x.dtype)

    def score(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The score grad_x log p_t(x), `(B, *)`; the same as calling the model."""
        return self.forward(x, t, class_label)

    def noise(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The estimate of `eps`, `(B, *)`."""
        return self.parametrization.noise(*self._predict(x, t, class_label)).to(x.dtype)

    def denoised(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The estimate of `E[x_0 | x]`, `(B, *)`."""
        return self.parametrization.data(*self._predict(x, t, class_label)).to(x.dtype)

    def velocity(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The estimate of `v = alpha eps - sigma x_0`, `(B, *)`."""
        one = self._predict(x, t, class_label)
        eps, x_0 = self.parametrization.noise(*one), self.parametrization.data(*one)
        return (expand_as(one.alpha, eps) * eps - expand_as(one.sigma, eps) * x_0).to(x.dtype)

    def score_and_variance(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The score and the learned variance's place between its bounds, w in [0, 1] (0 the posterior's, 1 the
        transition's), both `(B, *)`, from one call: w = (v + 1) / 2 of the network's v (Nichol and Dhariwal 2021,
        arXiv:2102.09672, equation (15)).

        Raises:
            UserError: for a network without learned variance.
        """
        if not getattr(self.net, "learned_variance", False):
            raise UserError(
                f"got {type(self.net).__name__}, which has no learned variance; expected one made with "
                "learned_variance=True: use the posterior's or the transition's variance"
            )
        one = self.evaluate(x, t, class_label)
        output, v = one.output.to(one.x.dtype).chunk(2, dim=1)
        score = self.parametrization.noise(output, one.x, one.alpha, one.sigma) / expand_as(-one.sigma, one.x)
        return score.to(x.dtype), ((v + 1) / 2).to(x.dtype)

    def noise_and_variance(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The estimate of `eps` and the learned variance's place w between its bounds, both `(B, *)`, from one call; see
        `score_and_variance`.
        """
        one = self.evaluate(x, t, class_label)
        output, v = one.output.to(one.x.dtype).chunk(2, dim=1)
        eps = self.parametrization.noise(output, one.x, one.alpha, one.sigma)
        return eps.to(x.dtype), ((v + 1) / 2).to(x.dtype)

    def output(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The network's own output, in its own dtype, for losses: to be compared with
        `parametrization.target`.
        """
        return self.evaluate(x, t, class_label).output

    def condition(self, labels: Tensor | Sequence[int] | int | None) -> ConditionedScore:
        """The score given class labels: `(B,)` integers, one integer for all, or None (no class).

        Raises:
            UserError: labels of another form, or that are not classes of the network's.
        """
        return ConditionedScore(self, labels)

    def reading(self, captions: Sequence[str]) -> ScoreModel:
        """This model with the same weights, in which class k is caption k of these instead: captions of any words that its
        network knows.

        Raises:
            UserError: a network that reads no captions, or captions that it cannot read.
        """
        if not isinstance(self.net, Network):
            raise UserError(
                f"got captions for {type(self.net).__name__}, which reads none; expected a captioned_unet: use labels"
            )
        made = ScoreModel(
            self.net.reading(captions),
            self.sde,
            self.parametrization,
            conditioning=self.conditioning,
            data_std=self.data_std,
            data_range=self.data_range,
        )
        made.learned_without_class = self.learned_without_class
        return made.train(self.training)

    def under(self, sde: SDE) -> UnderAnotherSDE:
        """This model as a score along another SDE; see `models.under`."""
        return UnderAnotherSDE(self, sde)

    def save_pretrained(self, folder: str | os.PathLike[str], *, card: Mapping[str, Any] | None = None) -> None:
        """Write `model.safetensors` and `card.json` into `folder`; see `models.pretrained`."""
        from models.pretrained import save_pretrained

        save_pretrained(self, folder, card=card)

    @staticmethod
    def from_pretrained(folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> ScoreModel:
        """The model that `save_pretrained` wrote, in eval mode; see `models.pretrained`."""
        from models.pretrained import from_pretrained

        return from_pretrained(folder, device=device)

    def extra_repr(self) -> str:
        return f"sde={self.sde}, parametrization={self.parametrization}, conditioning={self.conditioning}"


class ConditionedScore:
    """A class-conditional model with its labels filled in: a score that carries per-sample state.

    Args:
        model: the class-conditional model.
        labels: classes, `()` or `(B,)`; None for no class.

    Raises:
        UserError: for labels of another type, shape or range, or a model without classes.
    """

    def __init__(self, model: ScoreModel, labels: Tensor | Sequence[int] | int | None) -> None:
        num_classes = getattr(model.net, "num_classes", None)
        if num_classes is None and labels is not None:
            raise UserError("got labels for a network that has no classes; expected a network made with num_classes=…")
        self.model = model
        self.labels = None if labels is None else class_labels(labels, num_classes)

    @property
    def sde(self) -> SDE:
        return self.model.sde

    def _labels(self, x: Tensor) -> Tensor | None:
        if self.labels is None:
            return None
        labels = ordinary(self.labels.to(x.device))
        return labels.expand(x.shape[0]) if labels.ndim == 0 else labels

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, `(B, *)`."""
        return self.model.score(x, t, self._labels(x))

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.score(x, t, self._labels(x))

    def score_and_variance(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As `ScoreModel.score_and_variance`."""
        return self.model.score_and_variance(x, t, self._labels(x))

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.noise(x, t, self._labels(x))

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.denoised(x, t, self._labels(x))

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.velocity(x, t, self._labels(x))

    def under(self, sde: SDE) -> UnderAnotherSDE:
        """This score along another SDE; see `models.under`."""
        return UnderAnotherSDE(self, sde)

    def take(self, index: Tensor) -> ConditionedScore:
        """The score of the samples `index` alone."""
        if self.labels is None or self.labels.ndim == 0:
            return self
        return ConditionedScore(self.model, self.labels[index.to(self.labels.device)])
