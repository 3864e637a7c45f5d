r"""Langevin dynamics whose step and noise are chosen apart, as energies of pictures are sampled.

    x <- x - a grad E(x) + s z,        z ~ N(0, I)

With s^2 = 2 a this is the Langevin chain of `numerics.hamiltonian`, whose law is exp(-E) up to O(a). Otherwise its law is
exp(-E / T), with the temperature T = s^2 / (2 a), up to O(a): the published a = 1, s = 0.01 (Grathwohl et al. 2020,
arXiv:1912.03263) is T = 5e-5, which is a descent with a little noise and no sampler of exp(-E).

In a box, states that leave it are reflected at its sides, as a density on the box alone has it; on a box exp(-E) has an
integral, whatever E is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from numerics.checks import require_box, require_positive, require_range
from numerics.errors import UserError
from numerics.hamiltonian import curvature_over, gone
from numerics.modes import ordinary, ordinary_mode

Energy = Callable[[Tensor], Tensor]
"""x `(B, *)` -> E(x) `(B,)`; differentiable."""


@dataclass(frozen=True, kw_only=True)
class TemperedLangevin:
    """Steps of x <- x - `step` grad E(x) + `noise` z, reflected at the sides of a box.

    Args:
        step: a > 0.
        noise: s >= 0, the standard deviation of what a step adds.
        box: (low, high) of every coordinate; None for all of space.

    Raises:
        UserError: a step or a noise out of range, or a box that is none.
    """

    step: float
    noise: float
    box: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        require_positive(self.step, "step")
        require_range(self.noise, "noise", 0)
        if self.box is not None:
            require_box(self.box, "box")

    @property
    def temperature(self) -> float:
        """T: the chain's law is exp(-E / T), up to O(step)."""
        return self.noise**2 / (2 * self.step)

    def inside(self, x: Tensor) -> Tensor:
        """`x` `(B, *)`, reflected at the sides of the box, as often as it takes."""
        if self.box is None:
            return x
        low, high = self.box
        width = high - low
        folded = (x - low).remainder(2 * width)
        return low + torch.minimum(folded, 2 * width - folded)

    def run(self, energy: Energy, x: Tensor, noise: Tensor, *, checked: bool = True) -> Tensor:
        """The states `(B, *)` after as many steps as there are normals.

        Args:
            x: `(B, *)`, where the chains are.
            noise: `(B, K, *)`, standard normals for K steps.
            checked: whether to call `require_near` at the end, which waits for the device; False for a caller that does.

        Raises:
            UserError: chains that have left for infinity, with the step that is stable; x that are no real floating-point
                numbers, noise that is not of its shape, or an energy that does not follow x.
        """
        if not x.is_floating_point() or noise.ndim != x.ndim + 1 or noise.shape[:1] + noise.shape[2:] != x.shape:
            raise UserError(
                f"got x of {x.dtype} and shape {tuple(x.shape)} with noise of shape {tuple(noise.shape)}; expected real "
                "floating-point numbers (B, *) with (B, K, *)"
            )
        with ordinary_mode(x.device), torch.enable_grad():
            start = x = ordinary(x.detach())
            for z in noise.unbind(dim=1):
                x = x.requires_grad_()
                total = energy(x).sum()
                (slope,) = torch.autograd.grad(total, x, allow_unused=True) if total.requires_grad else (None,)
                if slope is None:
                    raise UserError(
                        "got an energy that has no gradient in x; expected one computed from x, without detach() or no_grad()"
                    )
                x = self.inside(x.detach() - self.step * slope + self.noise * z)
        if checked:
            self.require_near(energy, start.detach(), x, noise.shape[1])
        return x

    def require_near(self, energy: Energy, start: Tensor, x: Tensor, steps: int) -> None:
        """Refuses chains that have left for infinity on their way from `start` to `x`, and says why: a step beyond
        2 / curvature, or else an energy without a bottom.

        Raises:
            UserError: with the first of these.
        """
        if not bool(gone(start, x).any()):
            return
        if not bool(start.isfinite().all()):
            raise UserError("got chains that begin where x is not finite; expected numbers")
        curvature = float(curvature_over(lambda x: -energy(x), start, self.noise or self.step).max())
        if self.step * curvature >= 2:
            raise UserError(
                f"got step={self.step:.4g}, with which the chains diverge (seen after {steps} steps); expected less than "
                f"2 / (largest curvature) = {2 / curvature:.3g}"
            )
        raise UserError(
            f"got chains that have left for infinity after {steps} steps of {self.step:.4g}; expected an energy that grows "
            "outwards, and no faster than the step allows: take a smaller step, a box, or train longer"
        )
