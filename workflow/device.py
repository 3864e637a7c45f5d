"""The device of a run, and the threads of a CPU."""

from __future__ import annotations

import os

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


def use_threads(asked: int) -> int:
    """Lets torch use `asked` threads, but no more than the machine has cores for this process, and than OMP_NUM_THREADS says
    where it is set; 0 leaves torch's own number. Returns how many it uses."""
    if asked:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        said = os.environ.get("OMP_NUM_THREADS", "")
        torch.set_num_threads(max(1, min(asked, cores, int(said) if said.isdecimal() else asked)))
    return torch.get_num_threads()
