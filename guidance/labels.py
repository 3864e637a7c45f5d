"""Class labels as guidance holds them: checked integers, one for all samples or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from numerics import UserError, ordinary


def class_labels(labels: Tensor | Sequence[int] | int, num_classes: int | None = None) -> Tensor:
    """The labels as int64, `()` or `(B,)`.

    Args:
        num_classes: how many classes there are, where that is known.

    Raises:
        UserError: what is not that, or is out of range.
    """
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"got labels={labels!r}; expected integers of shape () or (B,)") from error
    if found.ndim > 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise UserError(
            f"got labels of shape {tuple(found.shape)} and {found.dtype}; expected integers of shape () or (B,)"
        )
    found = ordinary(found.to(torch.int64))
    if found.numel() and int(found.min()) < 0:
        raise UserError(f"got the label {int(found.min())}; expected classes from 0")
    if num_classes is not None:
        require_below(found, num_classes)
    return found


def require_below(labels: Tensor, num_classes: int) -> None:
    """Refuses labels that are not below `num_classes`.

    Raises:
        UserError: with the largest.
    """
    if labels.numel() and int(labels.max()) >= num_classes:
        raise UserError(f"got the label {int(labels.max())}; expected classes 0 to {num_classes - 1}")
