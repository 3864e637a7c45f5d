"""What every network of this package has in common.

A network is a plain module: it is told its sizes by keyword arguments, never by a configuration, and it is
called as `net(x, label)` or `net(x, label, class_label)`, where `label (B,)` is whatever number stands for
the noise level (see `models.conditioning`). It knows nothing of SDEs, of scores or of what its output means
(see `models.parametrization`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.conditioning import Conditioning, Sigma
from models.float_tables import FloatTables
from numerics import UserError

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class ListOf(nn.ModuleList, Generic[M]):
        """A ModuleList whose modules are all of one kind, for the type checker."""

        def __init__(self, modules: Iterable[M] | None = None) -> None: ...
        def __iter__(self) -> Iterator[M]: ...
        def append(self, module: M) -> ListOf[M]: ...  # type: ignore[override]
        def __getitem__(self, i: int) -> M: ...  # type: ignore[override]
else:
    ListOf = nn.ModuleList


class Network(FloatTables, ABC):
    """A module called as `net(x, label, class_label=None)`; a subclass's constructor starts with `super().__init__(locals())`.

    Attributes:
        options: the keyword arguments it was made with, so that a saved model can be made again.
        num_classes: of class labels; None where it takes none.
        learned_variance: whether the output has twice the channels, the second half for variances.
        checkpoint_activations: whether `run` recomputes activations in the backward pass.
        fine_input: whether x is to come in float32 at least, whatever the weights are: where fast sines of it are taken.
    """

    options: dict[str, Any]
    num_classes: int | None = None
    learned_variance: bool = False
    checkpoint_activations: bool = False
    fine_input: bool = False

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        # Called with `locals()` on the constructor's first line, when it holds the arguments and nothing else.
        self.options = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels that this network makes nothing of, such as a log-SNR where it looks up an index; all pass here.

        Args:
            labels: some labels that the network will get, `(N,)`.

        Raises:
            UserError: what was got, and the conditioning that fits.
        """

    @classmethod
    def needed_conditioning(cls, options: Mapping[str, Any]) -> Conditioning | None:
        """The conditioning that a network made with these `options` needs; None where any label suits it.

        Here: an embedding that takes the label's logarithm needs sigma itself.
        """
        return Sigma() if options.get("embedding") == "fourier" else None

    def reading(self, captions: Sequence[str]) -> Network:
        """This network with the same weights, in which class k is caption k of these instead; refused here.

        Raises:
            UserError: a network that reads no captions, or captions that it cannot read.
        """
        raise UserError(
            f"got captions for {type(self).__name__}, which reads none; expected a captioned_unet: use labels, or a run of text"
        )

    @abstractmethod
    def forward(self, x: Tensor, label: Tensor | None = None, class_label: Tensor | None = None) -> Tensor:
        """`x (B, *)`, `label (B,)` floating, `class_label (B,)` integer or None -> `(B, *)`."""

    def run(self, block: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """`block(*inputs)`; with `checkpoint_activations` its activations are recomputed in the backward
        pass.
        """
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def parameter_count(net: nn.Module) -> int:
    """The number of trainable parameters of `net`."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def check_sizes(**sizes: object) -> None:
    """Raise a `UserError` that names the first argument that is not an integer >= 1, or a sequence of such; None passes."""
    for name, value in sizes.items():
        if value is None:
            continue
        entries = value if isinstance(value, list | tuple) else (value,)
        if not entries or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in entries):
            raise UserError(f"got {name}={value!r}; expected integers >= 1")


def check_dropout(dropout: float) -> None:
    """Raise a `UserError` for what is no probability below 1."""
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"got dropout={dropout!r}; expected a number in [0, 1)")


def check_images(x: Tensor, channels: int) -> None:
    """Raise a `UserError` for what is not `(B, channels, H, W)`."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise UserError(f"got x of shape {tuple(x.shape)}; expected images (B, {channels}, H, W)")


def check_index(labels: Tensor, levels: int) -> None:
    """Raise a `UserError` for labels that are no indices of `levels` noise levels."""
    if bool(((labels < 0) | (labels > levels - 1) | (labels != labels.round())).any()):
        raise UserError(
            f"got labels from {float(labels.min()):.4g} to {float(labels.max()):.4g}; expected the indices 0 to {levels - 1} "
            f"of the network's noise levels: DiscreteIndex(levels={levels}, reverse=True)"
        )


def check_fourier(embedding: str, labels: Tensor) -> None:
    """Raise a `UserError` for labels that have no logarithm, where the embedding takes it."""
    if embedding == "fourier" and not bool((labels > 0).all()):
        raise UserError(
            f"got labels from {float(labels.min()):.4g} to {float(labels.max()):.4g} for embedding='fourier', which takes "
            "their logarithm; expected numbers > 0: the conditioning Sigma()"
        )


def require_label(label: Tensor | None) -> Tensor:
    """`label`, or a `UserError` where a network that is told the noise level was called without it."""
    if label is None:
        raise UserError(
            "got no label; expected one of shape (B,), since this network is told the noise level: net(x, label)"
        )
    return label
