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

from numerics import Generator, ordinary, ordinary_mode, require_count, require_positive, require_range, uniform

__all__ = ["ProjectedGradient"]


@dataclass(frozen=True, kw_only=True)
class ProjectedGradient:
    """PGD in the ball of the largest norm.

    Args:
        steps: of it.
        stride: a, as a part of epsilon.
        box: (low, high) of the data; None for none.

    Raises:
        UserError: no steps, or a stride that is not positive.
    """

    steps: int = 20
    stride: float = 0.15
    box: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require_count(self.steps, "steps")
        require_positive(self.stride, "stride")

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

        Of all points on the way, each sample's with the largest loss is kept, x itself among them.

        Args:
            logits: x -> `(B, K)`; the network of a classifier.
            labels: true classes `(B,)`.
            epsilon: of the ball, in the units of x.

        Raises:
            UserError: a negative epsilon.
        """
        require_range(epsilon, "epsilon", 0)
        with ordinary_mode(x.device), torch.enable_grad():
            clean = ordinary(x.detach())
            low, high = clean - epsilon, clean + epsilon
            if self.box is not None:
                low, high = low.clamp(*self.box), high.clamp(*self.box)
            best, worst = clean, F.cross_entropy(logits(clean), labels, reduction="none").detach()
            at = clean + epsilon * (2 * uniform(clean.shape, generator, device=clean.device, dtype=clean.dtype) - 1)
            at = at.clamp(low, high)
            for step in range(self.steps + 1):
                at = at.detach().requires_grad_()
                loss = F.cross_entropy(logits(at), labels, reduction="none")
                more = loss.detach() > worst
                best = torch.where(more.reshape(-1, *[1] * (at.ndim - 1)), at.detach(), best)
                worst = torch.where(more, loss.detach(), worst)
                if step < self.steps:
                    (slope,) = torch.autograd.grad(loss.sum(), at)
                    at = (at.detach() + self.stride * epsilon * slope.sign()).clamp(low, high)
        return best
