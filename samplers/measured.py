"""Samplers of data given a measurement that change steps, and not the score."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from numerics import UserError
from samplers.base import GridSampler
from samplers.result import SampleResult
from samplers.run import Run, numbers
from samplers.step import StatefulStep, Step
from sde_lib import SDE, SVD, Measurement


@dataclass(frozen=True, kw_only=True, repr=False)
class MeasuredSampler(GridSampler):
    """A sampler on a grid for one measurement a sample, or one for all.

    Args:
        measurement: y = A x_0 + n z, of an operator with an SVD.
        steps, grid, denoise, corrections: as in every `GridSampler`.
    """

    measurement: Measurement

    needs_svd: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.measurement, Measurement):
            raise UserError(
                f"got a {type(self.measurement).__name__} for a measurement; expected Measurement(operator, y, std)"
            )
        if self.needs_svd:
            _ = self._svd

    @property
    def _svd(self) -> SVD:
        """The measurement's coordinates.

        Raises:
            UserError: where its operator has none.
        """
        svd = self.measurement.svd
        if svd is None:
            raise UserError(
                f"got an operator without singular values for {type(self).__name__}; expected Mask, Downsample, Grey, or, with "
                "one noise for all entries, Linear or Blur: for others use guidance.posterior or TwistedSMC"
            )
        return svd

    @abstractmethod
    def method(self, sde: SDE, times: Tensor) -> Step | StatefulStep[Any]:
        """The step for the grid `times` `(N+1,)`."""

    def take(self, index: Tensor) -> Self:
        """The sampler for the samples at `index` `(b,)`."""
        return replace(self, measurement=self.measurement.take(index))

    def _sample(self, run: Run, x: Tensor, times: Tensor) -> SampleResult:
        self.measurement.check(x)
        return self._finished(super()._sample(run, x, times), run, times)

    @property
    def _size(self) -> float:
        """About the standard deviation of the data: what is measured less finely is left to the score."""
        return 1.0

    def _finished(self, found: SampleResult, run: Run, times: Tensor) -> SampleResult:
        """The denoised result with what was measured more finely than the last step of the grid `times` put in once more."""
        if not self.denoise:
            return found
        before, end = (0.5 * run.sde.log_snr(times[-2:])).neg().exp().tolist()
        return replace(found, x=pasted(self.measurement, self._svd, found.x, run, max(end, min(before, self._size))))


def pasted(measurement: Measurement, svd: SVD, x: Tensor, run: Run, kappa: float) -> Tensor:
    """`x` `(B, *)` with the coordinates whose noise is below `kappa` drawn as y' + (n / s) z.

    Where the law is flat over n / s, this is the posterior, and what was measured without noise is y'. The chain has not heard
    the finest of y: it tells nothing apart that is finer than sigma / alpha at its end, and between the last time at which that
    is above n / s and the end `Clamp` puts nothing in. So `kappa` is that of the time before the last, or the data's size.
    """
    spread = svd.noise / svd.values
    fine = spread < kappa
    if not bool(fine.any()):
        return x
    off = svd.left(measurement.y) / svd.values - svd.right(x)
    if bool((fine & (spread > 0)).any()):
        off = off + spread * svd.right(run.noise(x))
    return x + svd.lift(torch.where(fine, off, torch.zeros_like(off))).to(x.dtype)


class Clamp:
    r"""Puts what is known of the measured coordinates c = V^T x into a state at a time of a grid.

    With y' = U^T y / s = c_0 + (n / s) z, a measured coordinate is

        alpha y' + sqrt(sigma^2 - (alpha n / s)^2) z        while alpha n / s <= sigma

    which has the law of alpha c_0 + sigma z, the noise of the measurement being a part of it. From the time on at which that
    noise is all the noise there is, nothing is put in: the coordinate is at that level by itself, and the score denoises it.

    Args:
        measurement, svd: whose.
        sde: the SDE.
        times: `(N+1,)`, the grid.
    """

    def __init__(self, measurement: Measurement, svd: SVD, sde: SDE, times: Tensor) -> None:
        self.svd, self.spread = svd, svd.noise / svd.values
        self.known = svd.left(measurement.y) / svd.values
        self.alpha, self.sigma = numbers(sde.alpha(times)), numbers(sde.sigma(times))

    def __call__(self, i: int, x: Tensor, run: Run, held: Tensor | None = None) -> Tensor:
        """The state `x` `(B, *)` at t_i with the measurement put in, and, where nothing is put in any more, with the
        coordinates of `held` `(B, *)`, if that is given."""
        own = self.svd.right(x)
        left = self.sigma[i] ** 2 - (self.alpha[i] * self.spread).square()
        put = self.alpha[i] * self.known + left.clamp(min=0).sqrt() * self.svd.right(run.noise(x))
        rest = own if held is None else self.svd.right(held)
        return x + self.svd.lift(torch.where(left >= 0, put, rest) - own).to(x.dtype)
