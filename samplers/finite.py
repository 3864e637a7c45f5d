"""Noticing that values have stopped being finite, without asking the device at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from samplers.result import SamplingError


class StepWatch:
    """Notes after which step of a grid values stopped being finite, and asks the device every fiftieth time only.

    Args:
        times: the grid, N+1 numbers.
        device: of the states.
    """

    every = 50

    def __init__(self, times: list[float], device: torch.device) -> None:
        self.times = times
        self.sums = torch.zeros(len(times), dtype=torch.float32, device=device)
        self.seen = 0

    def see(self, i: int, x: Tensor) -> None:
        """Notes the state `x` `(B, *)` after step `i`."""
        # a sum is finite only where all its terms are
        self.sums[i] = x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        self.seen = i + 1
        if self.seen % self.every == 0:
            self.check(x)

    def check(self, x: Tensor) -> None:
        """Looks at all that was noted; `x` `(B, *)` is the state by now.

        Raises:
            SamplingError: with the first step that was not finite, and its times.
        """
        finite = self.sums[: self.seen].isfinite()
        if bool(finite.all()):
            return
        i = int((~finite).nonzero()[0])
        bad = int((~x.flatten(1).isfinite().all(dim=1)).sum())
        if i < len(self.times) - 1:
            where = f"step {i + 1} of {len(self.times) - 1}, from t = {self.times[i]:.6g} to {self.times[i + 1]:.6g}"
        else:
            where = f"the final denoising, at t = {self.times[-1]:.6g}"
        raise SamplingError(
            f"got values that are not finite in {where}, by now in {bad} of {len(x)} samples; "
            "expected finite ones: look at the score at that time, or take more steps"
        )
