r"""Markov chains that leave a density alone, from its logarithm and gradient: Langevin, MALA, Hamiltonian Monte Carlo.

One transition draws momenta p ~ N(0, I), goes L leapfrog steps of length h along H = -log f(x) + |p|^2 / 2, and accepts the end
with probability min(1, exp(H_0 - H_1)), which makes f, normalised or not, its stationary law (Neal 2011, "MCMC using
Hamiltonian dynamics", section 3). With L = 1 that is MALA; L = 1 with every end accepted is the Langevin chain

    x <- x + h^2 / 2 grad log f(x) + h z,        z ~ N(0, I),

called SGLD where the gradient is of an energy network. It has a stationary law of its own: on N(0, v) the variance is
v / (1 - h^2 / (4 v)). For h >= 2 / sqrt(largest curvature) it has none, it diverges; there, leapfrog steps do as well, and
nothing is accepted. On an energy without a bottom the chain leaves for infinity, slowly or at once, and with the test it comes
to a halt on the way, where the slope has become too steep for its step; `run_chain` reports all of these. Along a direction of
standard deviation s the path is a rotation by L h / s: by about pi / 2 forgets most, and by pi nothing, since it leads to -x
(ibid., section 3.2).

That a chain diverges is seen before it is far away. Without noise, two states h apart along v are after one step

    m h v,      m = 1 - h^2 c / 2,      c = v . (grad log f(x) - grad log f(x + h v)) / h

apart: c is the curvature as seen by steps of length h, and m <= -1 is divergence. v is the stiffest direction at x, by power
iteration. It has to be so at half the states: one narrow place that chains are thrown out of, as the middle of a law with
heavy tails, biases them and does not make them diverge. A few states beyond all return leave without noise, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from numerics.broadcast import expand_as
from numerics.checks import require_count, require_positive
from numerics.errors import UserError
from numerics.modes import ordinary, ordinary_mode
from numerics.streams import Generator, normal, uniform

LogDensity = Callable[[Tensor], Tensor]
"""x `(B, *)` -> log f(x) `(B,)` in nats, up to one number; differentiable."""

_BLOCK = 100  # transitions between two looks at whether the chain is finite
_FAR = 1e6
_AHEAD = 10  # steps without noise after which a chain beyond return has left
_DOUBLINGS = 40  # of the way out that an energy is followed: to 1e12 times as far
_ROUNDING = 1e-4  # by which a step may be below the stable one and count as it
_HALTED = 0.02  # acceptance of a chain that hardly moves


class Point(NamedTuple):
    """States with what is known there.

    Attributes:
        x: `(B, *)`.
        value: `(B,)` nats, log f(x).
        slope: `(B, *)`, its gradient.
    """

    x: Tensor
    value: Tensor
    slope: Tensor


def point(log_density: LogDensity, x: Tensor) -> Point:
    """Value and gradient at `x` `(B, *)`, from one evaluation.

    Raises:
        UserError: x that are no real floating-point numbers, or a log-density whose value is not `(B,)` or does not follow x.
    """
    if not x.is_floating_point():
        raise UserError(f"got x of {x.dtype}; expected real floating-point numbers, such as x.float()")
    with ordinary_mode(x.device), torch.enable_grad():
        x = ordinary(x.detach()).requires_grad_()
        value = log_density(x)
        if value.shape != x.shape[:1]:
            raise UserError(
                f"got a log-density of shape {tuple(value.shape)} for x of shape {tuple(x.shape)}; expected ({x.shape[0]},)"
            )
        (slope,) = torch.autograd.grad(value.sum(), x, allow_unused=True) if value.requires_grad else (None,)
        if slope is None:
            raise UserError(
                "got a log-density that has no gradient in x; expected one computed from x, without detach() or no_grad()"
            )
    return Point(x.detach(), value.detach(), slope)


@dataclass(frozen=True, kw_only=True)
class Hamiltonian:
    """A transition of L leapfrog steps of length h; see `numerics.hamiltonian`.

    Args:
        step: h > 0, in the units of x.
        leapfrog: L, leapfrog steps of one evaluation each; 1 is MALA.
        adjust: whether ends are accepted or refused, so that the law is exact; False with L = 1 is the plain Langevin chain.

    Raises:
        UserError: a step or a number that is not positive.
    """

    step: float
    leapfrog: int = 1
    adjust: bool = True

    def __post_init__(self) -> None:
        require_positive(self.step, "step")
        require_count(self.leapfrog, "leapfrog")

    def move(
        self, log_density: LogDensity, at: Point, *, generator: Generator = None, scale: float = 1.0
    ) -> tuple[Point, Tensor]:
        """One transition from `at`: the new states, and the probability with which each was accepted, `(B,)`.

        Args:
            scale: what the step is multiplied by.
        """
        h = self.step * scale
        p = normal(at.x.shape, generator, device=at.x.device, dtype=at.x.dtype)
        start = at.value - _rows(p).square().sum(dim=1) / 2
        end = at
        for _ in range(self.leapfrog):
            p = torch.add(p, end.slope, alpha=h / 2)
            end = point(log_density, torch.add(end.x, p, alpha=h))
            p = torch.add(p, end.slope, alpha=h / 2)
        change = end.value - _rows(p).square().sum(dim=1) / 2 - start
        # an end where something overflowed is refused
        probability = change.nan_to_num(nan=-torch.inf).clamp(max=0).exp()
        if not self.adjust:
            return end, torch.ones_like(probability)
        accepted = uniform(probability.shape, generator, device=at.x.device) < probability
        chosen = tuple(torch.where(expand_as(accepted, new).bool(), new, old) for new, old in zip(end, at, strict=True))
        return Point(*chosen), probability


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What a run of a transition leaves.

    Attributes:
        x: `(B, *)`, the last states.
        acceptance: the mean probability of acceptance; 1 without the test.
        evaluations: of the log-density and its gradient, for the whole batch, but for looks at whether it is sound.
    """

    x: Tensor
    acceptance: float
    evaluations: int


def run_chain(
    kernel: Hamiltonian,
    log_density: LogDensity,
    x: Tensor,
    steps: int,
    *,
    generator: Generator = None,
    callback: Callable[[int], None] | None = None,
) -> Chain:
    """`steps` transitions from `x` `(B, *)`, every sample a chain of its own.

    Args:
        callback: called after each transition with its number, from 1.

    Raises:
        UserError: a chain that diverges, with the step that does not; an energy that is not bounded; or no chains.
    """
    require_count(steps, "steps")
    if x.ndim == 0 or len(x) == 0:
        raise UserError(f"got x of shape {tuple(x.shape)}; expected (B, *): one chain or more")
    before = at = point(log_density, x)
    if not bool(at.value.isfinite().all()):
        raise UserError("got a log-density that is not finite where the chain starts; expected a start where it is")
    totals = [torch.zeros((), dtype=torch.float64, device=x.device)]  # of probabilities, for each block
    last = at.value  # of each chain, as long as it is known
    for i in range(steps):
        at, probability = kernel.move(log_density, at, generator=generator)
        totals[-1] += probability.mean()
        last = torch.where(at.value > -torch.inf, at.value, last)
        if callback is not None:
            callback(i + 1)
        if (i + 1) % _BLOCK == 0 or i + 1 == steps:
            _require_finite(kernel, log_density, x, before, at, last, i + 1)
            if i + 1 in (_BLOCK, steps):
                _require_stable(kernel, log_density, x, at, i + 1)
            if (i + 1) % _BLOCK == 0:
                _require_moving(kernel, log_density, x, at, [float(total) / _BLOCK for total in totals])
                totals.append(torch.zeros_like(totals[0]))
            before = at
    if falls_outwards(log_density, at, at.x - x.mean(dim=0)):
        raise UserError(
            f"got an energy that is not bounded below: after {steps} steps of {kernel.step:.3g} it falls on, or stays level, "
            "outwards from the chain that ended lowest; expected one that grows outwards: train longer, or add a quadratic"
        )
    return Chain(x=at.x, acceptance=float(sum(totals)) / steps, evaluations=1 + steps * kernel.leapfrog)


def falls_outwards(log_density: LogDensity, at: Point, way: Tensor) -> bool:
    """Whether log f never falls from the highest of the states `at` on, seen at twice, four, ..., 1e12 times its `way` `(B, *)`
    from where it came. Beyond a mode it would fall; of a law that can be normalised it does on every way.
    """
    highest = at.value.argmax()
    here = at.value[highest]
    if not bool(way[highest].any()):
        return False
    with torch.no_grad():
        for k in range(1, _DOUBLINGS + 1):
            # every chain goes along: a log-density may have labels, one for each
            beyond = log_density(at.x + (2.0**k - 1) * way)[highest]
            if not bool(beyond >= here):
                return False
            if bool(beyond.isposinf()):
                return True
            here = beyond
    return True


def largest_curvature(log_density: LogDensity, x: Tensor, *, iterations: int = 20) -> float:
    """The largest absolute eigenvalue of the Hessian of log f over the states `x` `(B, *)`, by power iteration."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    largest = torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        v = v / expand_as(_rows(v).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny), v)
        with ordinary_mode(x.device), torch.enable_grad():
            y, v = ordinary(x.detach()).requires_grad_(), ordinary(v)
            (slope,) = torch.autograd.grad(log_density(y).sum(), y, create_graph=True)
            # of a log-density that is linear in y the slope has no graph, or one without y
            product = None
            if slope.requires_grad:
                (product,) = torch.autograd.grad((slope * v).sum(), y, allow_unused=True)
            product = torch.zeros_like(y) if product is None else product
        v, largest = product, _rows(product).norm(dim=1)
    return float(largest[largest.isfinite()].max()) if bool(largest.isfinite().any()) else float("nan")


def curvature_over(log_density: LogDensity, x: Tensor, length: float, *, iterations: int = 20) -> Tensor:
    """c of each state of `x` `(B, *)` along its stiffest direction, `(B,)`, as gradients `length` apart show it (farther apart
    where x is so large that this would be lost to rounding): positive where log f falls off, 0 where that is not a number. Of
    a Gaussian it is the largest curvature.
    """
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    here = point(log_density, x).slope
    curvature = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    apart = expand_as((torch.finfo(x.dtype).eps ** 0.5 * _rows(x).norm(dim=1)).clamp(min=length), x)
    for _ in range(iterations):
        v = v / expand_as(_rows(v).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny), v)
        change = (here - point(log_density, x + apart * v).slope) / apart
        curvature, v = _rows(v * change).sum(dim=1), change
    return curvature.nan_to_num(nan=0.0)


def _stable_step(log_density: LogDensity, x: Tensor, step: float) -> float:
    """2 / sqrt(largest curvature) at the states `x` and where the noise of one step leads from them."""
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    curvature = max(float(curvature_over(log_density, at, step).max()) for at in (x, torch.add(x, z, alpha=step)))
    return 2 / curvature**0.5 if curvature > 0 else float("inf")


def _too_long(step: float, stable: float, steps: int) -> UserError:
    return UserError(
        f"got step={step:.4g}, with which Langevin diverges (seen after {steps} steps); expected less than "
        f"2 / sqrt(largest curvature) = {stable:.3g}, and a tenth of that for a small bias"
    )


def _rows(x: Tensor) -> Tensor:
    """`(B, D)` of `x` `(B, *)`; D = 1 of `(B,)`."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def gone(start: Tensor, x: Tensor) -> Tensor:
    """Which of the states `x` `(B, *)` are not finite or far beyond where they began, `(B,)`."""
    reach = _FAR * (1 + start.abs().max())
    return ~_rows(x.abs() < reach).all(dim=1)


def _require_finite(
    kernel: Hamiltonian, log_density: LogDensity, start: Tensor, before: Point, at: Point, last: Tensor, steps: int
) -> None:
    """Refuses a chain that has left for infinity since the states `before`, and says why it has: where log f, as last known,
    has risen there is no bottom, and else the step is too long.
    """
    left = gone(start, at.x) | ~at.value.isfinite()
    if not bool(left.any()):
        return
    if not kernel.adjust and not bool((last > before.value)[left].any()):
        raise _too_long(kernel.step, _stable_step(log_density, before.x, kernel.step), steps)
    raise UserError(
        f"got an energy that is not bounded below: after {steps} steps of {kernel.step:.3g} a chain had left for infinity; "
        "expected one that grows outwards: train longer, or add a quadratic"
    )


def _require_stable(kernel: Hamiltonian, log_density: LogDensity, start: Tensor, at: Point, steps: int) -> None:
    """Refuses a chain without a test that diverges and is not far away yet; see `numerics.hamiltonian`."""
    if kernel.adjust:
        return
    curvature = float(curvature_over(log_density, at.x, kernel.step).median())
    if curvature > 0 and kernel.step >= (1 - _ROUNDING) * 2 / curvature**0.5:
        raise _too_long(kernel.step, 2 / curvature**0.5, steps)
    ahead = at
    for _ in range(_AHEAD):
        ahead = point(log_density, torch.add(ahead.x, ahead.slope, alpha=kernel.step**2 / 2))
    leaving = gone(start, ahead.x)
    if bool((leaving & ~(ahead.value > at.value)).any()):
        staying = torch.where(expand_as(leaving, at.x).bool(), start, at.x)
        raise _too_long(kernel.step, _stable_step(log_density, staying, kernel.step), steps)


def _require_moving(
    kernel: Hamiltonian, log_density: LogDensity, start: Tensor, at: Point, acceptance: list[float]
) -> None:
    """Refuses a chain that has come to a halt on its way to infinity: that hardly accepts any more, though it did in its first
    block, where log f goes on rising outwards from the start. Beyond a mode it would fall.
    """
    first, last = acceptance[0], acceptance[-1]
    if not kernel.adjust or last > min(_HALTED, first / 10):
        return
    if falls_outwards(log_density, at, at.x - start):
        raise UserError(
            f"got an energy that is not bounded below: after {_BLOCK * len(acceptance)} steps of {kernel.step:.3g} the chains "
            f"have halted (acceptance {first:.2g} at first, {last:.2g} now) where it falls on outwards; expected one that "
            "grows outwards: train longer, or add a quadratic"
        )
