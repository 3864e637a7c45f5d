"""Class labels, checked: integers, one for all samples or one for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from numerics.errors import UserError
from numerics.modes import ordinary


def class_labels(labels: Tensor | Sequence[int] | int, num_classes: int | None = None) -> Tensor:
    """The labels as int64, `()` or `(B,)`.

    Args:
        num_classes: how many classes there are, where that is known.

    Raises:
        UserError: what is not that, has no values, or is out of range.
    """
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"got labels={labels!r}; expected integers of shape () or (B,)") from error
    if found.ndim > 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise UserError(
            f"got labels of shape {tuple(found.shape)} and {found.dtype}; expected integers of shape () or (B,)"
        )
    if found.is_meta:
        raise UserError('got labels on the device "meta", where tensors have no values; expected them elsewhere')
    found = ordinary(found.to(torch.int64))
    require_classes(found, num_classes)
    return found


def labels_for(x: Tensor, labels: Tensor | Sequence[int] | int, num_classes: int | None) -> Tensor:
    """The class of each sample of `x` `(B, *)`, int64 `(B,)` on its device. Values that are on an accelerator already are not
    looked at, which would wait for it; it refuses those out of range itself.

    Args:
        num_classes: of the network; None for one that has none.

    Raises:
        UserError: labels for a network without classes, or that are not one class for all samples or one for each.
    """
    if num_classes is None:
        raise UserError("got labels for a network that has no classes; expected a network made with num_classes=…")
    there = isinstance(labels, Tensor) and labels.device.type not in ("cpu", "meta") and labels.dtype == torch.int64
    found = ordinary(torch.as_tensor(labels)) if there else class_labels(labels, num_classes).to(x.device)
    if found.ndim == 0:
        found = found.expand(len(x))
    if found.shape != x.shape[:1]:
        raise UserError(f"got labels of shape {tuple(found.shape)} for {len(x)} samples; expected one for each")
    return found


def require_classes(labels: Tensor, num_classes: int | None) -> None:
    """Refuses integers that are not classes from 0, and below `num_classes` where that is known.

    Raises:
        UserError: with the first such label.
    """
    wrong = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if bool(wrong.any()):
        expected = "from 0" if num_classes is None else f"0 to {num_classes - 1}"
        raise UserError(f"got the label {int(labels[wrong][0])}; expected classes {expected}")
