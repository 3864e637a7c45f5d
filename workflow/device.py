"""The device of a run."""

from __future__ import annotations

import torch

from numerics import UserError


def chosen_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one.

    Raises:
        UserError: a device that is not here.
    """
    if name != "auto":
        try:
            chosen = torch.device(name)
            torch.empty(0, device=chosen)  # a device that torch knows need not be there
            return chosen
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"got the device {name!r}, which this machine does not have; expected auto, cpu, cuda, cuda:N or mps"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
