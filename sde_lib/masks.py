r"""What is seen of each sample by a mask of its own: a batch of pictures, each with another hole.

The number of seen entries is a sample's own. So all D entries are coordinates of the measurement here, with s = 1, and one that
is not seen is 0 on both sides of (2) of `sde_lib.operators`, says nothing, and is not lifted.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics import UserError, ordinary
from sde_lib.operators import SVD, Operator, as_numbers


@dataclass(frozen=True, eq=False)
class Masks(Operator):
    """What is seen of sample i where `masks[i]` is true, and 0 elsewhere: y has the shape of x. `Mask` is one for all.

    Args:
        masks: `(B, *)`, boolean or of zeros and ones.

    Raises:
        UserError: for masks of other values, or one of none but zeros; when called, for data of another shape or batch.

    >>> hidden = Masks(torch.tensor([[1, 0], [0, 1]]))
    >>> hidden(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
    [[1.0, 0.0], [0.0, 4.0]]
    """

    masks: Tensor

    def __post_init__(self) -> None:
        masks = as_numbers(self.masks, "masks")
        seen = masks.bool()
        if seen.ndim < 2 or bool((seen.to(masks.dtype) != masks).any()) or not bool(seen.flatten(1).any(dim=1).all()):
            raise UserError(
                f"got masks of shape {tuple(self.masks.shape)} that are not each of zeros and ones with at least one 1; "
                "expected (B, *), 1 where data are seen: leave out samples of which nothing is"
            )
        object.__setattr__(self, "masks", ordinary(seen))

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.masks.shape:
            raise UserError(
                f"got masks of shape {tuple(self.masks.shape)} for x of shape {tuple(x.shape)}; expected one mask a sample, "
                "of its shape with every channel: Mask(mask) is one for all"
            )
        return torch.where(self.masks.to(x.device), x, 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self(y)

    def observed(self, y: Tensor) -> Tensor:
        return self(y)

    def svd(self, noise: Tensor) -> SVD | None:
        masks = self.masks
        return SVD(
            values=torch.ones_like(noise.flatten()),
            noise=noise.flatten(),
            left=lambda y: self(y).flatten(1),
            right=lambda x: self(x).flatten(1),
            lift=lambda c: torch.where(masks.to(c.device), c.reshape(masks.shape), 0.0),
        )

    def take(self, index: Tensor) -> Masks:
        """The masks of the samples at `index` `(b,)`."""
        fewer = copy.copy(self)  # what was checked is
        object.__setattr__(fewer, "masks", ordinary(self.masks[index.to(self.masks.device)]))
        return fewer
