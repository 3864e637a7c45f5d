r"""The smallest change that a classifier is not to mind: projected gradient descent in a ball around each sample.

    x <- P(x + a sign grad -log p(y | x)),      P onto |x - x_0|_inf <= epsilon, and into the box of the data

(Madry et al. 2018, arXiv:1706.06083, section 2.1), from a random point of the ball. Accuracy under it is an upper bound of the
accuracy under every change within epsilon: a stronger attack may find more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from numerics import (
    Generator,
    UserError,
    class_labels,
    ordinary,
    ordinary_mode,
    require_box,
    require_count,
    require_positive,
    require_range,
    uniform,
)

_ROUNDING = 1e-5  # of the box's width, by which x may lie outside

__all__ = ["ProjectedGradient"]


@dataclass(frozen=True, kw_only=True)
class ProjectedGradient:
    """PGD in the ball of the largest norm.

    Args:
        steps: of it.
        stride: a, as a part of epsilon.
        box: (low, high) of the data; None for none.

    Raises:
        UserError: no steps, a stride that is not positive, or a box that is none.
    """

    steps: int = 20
    stride: float = 0.15
    box: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")
        require_positive(self.stride, "stride")
        if self.box is not None:
            require_box(self.box, "box")

    def __call__(
        self,
        logits: Callable[[Tensor], Tensor],
        x: Tensor,
        labels: Tensor,
        epsilon: float,
        *,
        generator: Generator = None,
    ) -> Tensor:
        """Samples within epsilon of `x` `(B, *)` whose class is to be mistaken, of the same shape.

        Of all points on the way, x itself among them, each sample's with the largest loss is kept, of those that are mistaken
        where any is: with three classes or more another point may have the larger loss.

        Args:
            logits: x -> `(B, K)`; the network of a classifier.
            labels: true classes `(B,)`.
            epsilon: of the ball, in the units of x.

        Raises:
            UserError: a negative epsilon, x outside the box, or labels that are not one class for each sample.
        """
        require_range(epsilon, "epsilon", 0)
        self._require_inside(x)
        with ordinary_mode(x.device), torch.enable_grad():
            clean = ordinary(x.detach())
            first = logits(clean).detach()
            labels = _labels_for(labels, x, first)
            low, high = clean - epsilon, clean + epsilon
            if self.box is not None:
                low, high = low.clamp(*self.box), high.clamp(*self.box)
            best, worst, mistaken = (
                clean,
                F.cross_entropy(first, labels, reduction="none"),
                first.argmax(dim=1) != labels,
            )
            at = clean + epsilon * (2 * uniform(clean.shape, generator, device=clean.device, dtype=clean.dtype) - 1)
            at = at.clamp(low, high)
            for step in range(self.steps + 1):
                at = at.detach().requires_grad_()
                found = logits(at)
                loss = F.cross_entropy(found, labels, reduction="none")
                wrong = found.detach().argmax(dim=1) != labels
                more = (wrong & ~mistaken) | ((wrong == mistaken) & (loss.detach() > worst))
                best = torch.where(more.reshape(-1, *[1] * (at.ndim - 1)), at.detach(), best)
                worst, mistaken = torch.where(more, loss.detach(), worst), wrong | mistaken
                if step < self.steps:
                    (slope,) = torch.autograd.grad(loss.sum(), at)
                    at = (at.detach() + self.stride * epsilon * slope.sign()).clamp(low, high)
        return best

    def _require_inside(self, x: Tensor) -> None:
        """Refuses samples outside the box, which a step would move into it by more than epsilon."""
        if not x.is_floating_point() or x.ndim == 0:
            raise UserError(
                f"got x of {x.dtype} and shape {tuple(x.shape)}; expected real floating-point numbers (B, *)"
            )
        if self.box is None or x.numel() == 0:
            return
        low, high = self.box
        slack = _ROUNDING * (high - low)
        if not bool(((x >= low - slack) & (x <= high + slack)).all()):
            raise UserError(
                f"got x from {float(x.min()):.4g} to {float(x.max()):.4g} for the box {self.box}; expected it inside: box=None "
                "where data have none"
            )


def _labels_for(labels: Tensor, x: Tensor, logits: Tensor) -> Tensor:
    """The true classes `(B,)`, int64."""
    if logits.ndim != 2 or len(logits) != len(x):
        raise UserError(f"got logits of shape {tuple(logits.shape)} for {len(x)} samples; expected (B, K)")
    found = class_labels(labels, logits.shape[1]).to(x.device)
    if found.shape != x.shape[:1]:
        raise UserError(f"got labels of shape {tuple(found.shape)} for {len(x)} samples; expected one for each")
    return found
