"""What training asks of a model.

A loss needs the SDE and the predicted noise. The rest of training also asks how many classes there are, which network to
compile, whether variances are learned, and for a score to validate. `models.ScoreModel` answers all of it. A module of
your own needs `.sde` and `.noise(x, t)` alone, or what its objective asks in place of the noise (`Objective.needs`):
`as_trainable` fills in the rest, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor, nn

from numerics import expand_as
from sde_lib import SDE, Score
from training.errors import UsageError


class NoisePredictor(Protocol):
    """What a denoising loss needs of a model.

    Attributes:
        sde: whose kernel x_t = alpha(t) x_0 + sigma(t) eps the model knows.
    """

    sde: SDE

    def noise(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The prediction of eps, `(B, *)`, from `x` `(B, *)`, `t` `(B,)` and classes `(B,)`, if it has any."""


class Trainable(Protocol):
    """What training needs of a model; `models.ScoreModel` and `models.EnergyModel` have all of it.

    Attributes:
        sde: whose kernel x_t = alpha(t) x_0 + sigma(t) eps the model knows.
    """

    sde: SDE

    @property
    def network(self) -> nn.Module:
        """The part that computes: what torch.compile compiles. One whose activations can be computed again in the
        backward pass has an attribute `checkpoint_activations`, a bool."""

    @property
    def num_classes(self) -> int | None:
        """How many classes it knows; None where it takes no labels. The label `num_classes` stands for no class."""

    @property
    def learned_variance(self) -> bool:
        """Whether `noise_and_variance` can be asked."""

    data_std: float | None
    """The standard deviation of the data in model units, for the bound that validates; None where it is not known."""

    def noise(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        """The prediction of eps, `(B, *)`."""

    def noise_and_variance(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The prediction of eps and the place w of the variance between its bounds, both `(B, *)`, from one call."""

    def condition(self, labels: Tensor | None) -> Score:
        """The score given classes `(B,)`, or without."""


_ANSWERS = ("sde", "network", "num_classes", "learned_variance", "data_std", "noise", "noise_and_variance", "condition")


def as_trainable(model: nn.Module, needs: tuple[str, ...] = ("noise",)) -> Trainable:
    """`model` itself where it is `Trainable`, else `model` with these answers for what it does not say itself:

        network              model.net if it has one, or model
        num_classes          that of the network, or None: no labels
        learned_variance     that of the network, or False
        data_std             None
        noise_and_variance   refused
        condition(labels)    the score -noise(x, t[, labels]) / sigma(t)

    Args:
        needs: what the objective asks of the model, `Objective.needs`.

    Raises:
        UsageError: a model without `.sde`, or without what is needed.
    """
    if all(hasattr(model, name) for name in (*_ANSWERS, *needs)):
        return cast(Trainable, model)
    asked = ("sde", *needs)
    lacking = " and ".join(f".{name}" for name in asked if not hasattr(model, name))
    if lacking:
        expected = ".sde and .noise(x, t): use models.ScoreModel(network, sde), or add them"
        raise UsageError(
            f"got a model of class {type(model).__name__} without {lacking}; expected "
            + (
                expected
                if needs == ("noise",)
                else f"{' and '.join(f'.{name}' for name in asked)}, which this objective asks"
            )
        )
    return _Completed(model)


def recompute_activations(model: Trainable) -> None:
    """Lets the network of `model` compute activations again in the backward pass, to save memory.

    Raises:
        UsageError: a network that cannot.
    """
    if not hasattr(model.network, "checkpoint_activations"):
        raise UsageError(
            f"got checkpoint_activations=True for the network {type(model.network).__name__}, which cannot; expected one "
            "of models.available(): leave the option out, or choose such a network"
        )
    model.network.checkpoint_activations = True  # type: ignore[assignment]


def learn_classes(model: nn.Module, label_dropout: float) -> None:
    """Writes into `model`, where it has a place for that, whether it learns to do without a class; what it has learned before
    (weights to start from, an earlier session) stays."""
    if hasattr(model, "learned_without_class") and as_trainable(model).num_classes is not None:
        model.learned_without_class = label_dropout > 0 or bool(model.learned_without_class)  # type: ignore[assignment]


def recall_classes(model: nn.Module, learned: bool | None) -> None:
    """Writes into `model`, where it has a place for that, what a file says of it; None says nothing."""
    if hasattr(model, "learned_without_class") and learned is not None:
        model.learned_without_class = learned  # type: ignore[assignment]


class _Completed:
    """A noise predictor with the answers of `as_trainable`."""

    def __init__(self, model: Any) -> None:
        self.model, self.sde = model, model.sde
        self.network: nn.Module = getattr(model, "network", getattr(model, "net", model))
        self.num_classes: int | None = self._said("num_classes", None)
        self.learned_variance = bool(self._said("learned_variance", False))
        self.data_std: float | None = getattr(model, "data_std", None)

    def _said(self, name: str, default: Any) -> Any:
        return getattr(self.model, name, getattr(self.network, name, default))

    def noise(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        return self.model.noise(x, t) if class_label is None else self.model.noise(x, t, class_label)

    def noise_and_variance(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        asked: Callable[..., tuple[Tensor, Tensor]] | None = getattr(self.model, "noise_and_variance", None)
        if asked is None:
            raise UsageError(
                f"got a model of class {type(self.model).__name__} without .noise_and_variance; expected it for learned "
                "variances: use models.ScoreModel, or add it"
            )
        return asked(x, t, class_label)

    def condition(self, labels: Tensor | None) -> Score:
        asked: Callable[[Tensor | None], Score] | None = getattr(self.model, "condition", None)
        if asked is not None:
            return asked(labels)

        def score(x: Tensor, t: Tensor) -> Tensor:
            given = None if labels is None else labels.to(x.device)
            eps = self.noise(x, t, given)
            return -eps / expand_as(self.sde.sigma(t), eps)

        return score
