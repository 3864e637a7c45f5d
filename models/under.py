"""A model seen under another SDE.

Two linear SDEs blur the same data: `x = alpha x_0 + sigma eps`. At times t and t' of equal noise-to-signal
ratio, `kappa = sigma / alpha = kappa'`, the samples differ by a factor only, `x / alpha = x' / alpha'`, and
the noise in them is the same:

    eps'(x', t') = eps(x' alpha / alpha', t),    score' = -eps' / sigma'

(Karras et al. 2022, section 2 and appendix B.2). So a model trained under VP can be used along VE, EDM's or
any other path, as far as its own range of kappa goes; beyond it the network was never trained, and the view
refuses.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from numerics import UserError, batch_time, expand_as, take
from sde_lib import SDE


class NoiseModel(Protocol):
    """What the view needs of a model: `ScoreModel` and `ConditionedScore` have it."""

    @property
    def sde(self) -> SDE: ...

    def noise(self, x: Tensor, t: Tensor) -> Tensor: ...


class UnderAnotherSDE:
    """The score of `model` along `sde`: `x (B, *)` and `t ()` or `(B,)` of `sde` -> `(B, *)`.

    On a GPU, where looking at a time would wait for the device, the values at such a time are NaN in place of the error;
    samplers and likelihoods stop at those.

    Raises:
        UserError: from every call on the CPU at a time whose log-SNR the model's own SDE does not reach between its
            `t_min` and `T`.
    """

    def __init__(self, model: NoiseModel, sde: SDE) -> None:
        self.model, self.sde = model, sde
        own = model.sde
        self.log_snr_range = (float(own.log_snr(own.T)), float(own.log_snr(own.t_min)))

    def _translate(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The sample and the time under the model's own SDE."""
        log_snr = self.sde.log_snr(t)
        low, high = self.log_snr_range
        slack = 1e-6  # the ends themselves are inside, also as float32
        outside = (log_snr < low - slack) | (log_snr > high + slack)
        if t.device.type == "cpu" and bool(outside.any()):
            raise UserError(
                f"got times with a log-SNR from {float(log_snr.min()):.4g} to {float(log_snr.max()):.4g}; "
                f"expected {low:.4g} to {high:.4g}, where the model was trained: choose an SDE or times within it"
            )
        own = self.model.sde
        time = own.time_of_log_snr(log_snr.clamp(low, high)).clamp(own.t_min, own.T)
        scale = torch.where(outside, torch.nan, own.alpha(time) / self.sde.alpha(t))
        return x * expand_as(scale, x), time

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of `eps`, `(B, *)`."""
        return self.model.noise(*self._translate(x, batch_time(t, x)))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score under `sde`, `(B, *)`."""
        t = batch_time(t, x)
        eps = self.model.noise(*self._translate(x, t))
        return eps / expand_as(-self.sde.sigma(t), eps)

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimate of `E[x_0 | x]`, `(B, *)`."""
        t = batch_time(t, x)
        eps = self.model.noise(*self._translate(x, t))
        return (x - expand_as(self.sde.sigma(t), x) * eps) / expand_as(self.sde.alpha(t), x)

    def take(self, index: Tensor) -> UnderAnotherSDE:
        """The score of the samples `index` alone."""
        return UnderAnotherSDE(take(self.model, index), self.sde)
