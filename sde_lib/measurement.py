r"""Measurements of clean data: what a posterior is conditioned on.

    (1)  y = A x_0 + n z,    z ~ N(0, I)

with an operator A (`sde_lib.operators`) and noise of standard deviation n, a number or one for each entry of a measurement.

A wrong adjoint makes every method silently wrong, so it is looked at when a `Measurement` is made: <A u, v> and <u, A^T v> of
random u and v are the same number for a linear A and its adjoint, and for nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from numerics import UserError, take
from sde_lib.operators import SVD


@dataclass(frozen=True, eq=False)
class Measurement:
    """y = operator(x_0) + std * noise.

    Args:
        operator: A; a callable with `adjoint` is linear, another one need not be.
        y: `(B, ...)`, one for each sample, or `(1, ...)`, one for all.
        std: n, a number >= 0 or a tensor that broadcasts to the shape of one measurement `(...)`.

    Attributes:
        linear: has the operator an adjoint?
        event_shape: of one sample, `(*)`, where the operator is linear.
        noiseless: is n = 0 in some entry?

    Raises:
        UserError: for y that is no batch of finite real numbers, noise that is negative or of another shape, an operator that
            does not take y's shape, or an adjoint that is not the operator's.
    """

    operator: Callable[[Tensor], Tensor]
    y: Tensor
    std: float | Tensor
    linear: bool = field(init=False)
    event_shape: tuple[int, ...] | None = field(init=False)
    noiseless: bool = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.y, Tensor) or self.y.ndim < 2 or not self.y.is_floating_point() or len(self.y) < 1:
            got = f"{tuple(self.y.shape)} and {self.y.dtype}" if isinstance(self.y, Tensor) else type(self.y).__name__
            raise UserError(
                f"got y of {got}; expected real numbers (B, ...), one measurement a sample, or (1, ...) for all"
            )
        if not callable(self.operator):
            raise UserError(
                f"got operator={self.operator!r}; expected one such as Mask(mask), or LinearMap(forward, transpose)"
            )
        adjoint = getattr(self.operator, "adjoint", None)
        observed = getattr(self.operator, "observed", None)
        y = self.y if observed is None else observed(self.y)
        if not bool(y.isfinite().all()):
            raise UserError(
                "got y with values that are not finite; expected numbers: mask what is missing by Mask(mask)"
            )
        settled: dict[str, object] = {"y": y, "linear": adjoint is not None, "event_shape": None}
        settled["std"] = _noise(self.std, y)
        settled["noiseless"] = bool((torch.as_tensor(settled["std"]) == 0).any())
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        if adjoint is not None:
            object.__setattr__(self, "event_shape", _checked(self.operator, adjoint, y))

    def check(self, x: Tensor) -> None:
        """Refuses a state `x` `(B, *)` that the measurement is not of.

        Raises:
            UserError: for another batch, event shape or device.
        """
        if len(self.y) not in (1, len(x)):
            raise UserError(
                f"got {len(self.y)} measurements for {len(x)} samples; expected one a sample, or one for all: "
                "measurement.take(index) has some of them"
            )
        if self.event_shape is not None and tuple(x.shape[1:]) != self.event_shape:
            raise UserError(
                f"got x of shape {tuple(x.shape)} for a measurement of data (B, {', '.join(map(str, self.event_shape))}); "
                "expected that shape"
            )
        if x.device != self.y.device:
            raise UserError(f"got x on {x.device} and y on {self.y.device}; expected one device: move y there first")

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, `(B, *)`."""
        transposed: Tensor = self.operator.adjoint(y)  # type: ignore[attr-defined]
        return transposed

    def residual(self, x_0: Tensor) -> Tensor:
        """y - A x_0, `(B, ...)`.

        Raises:
            UserError: where A x_0 has not the shape of y, or the operator cannot take an x_0 that autograd follows.
        """
        try:
            seen = self.operator(x_0)
        except RuntimeError as error:
            if not x_0.requires_grad or "requires grad" not in str(error):
                raise
            raise UserError(
                "got an operator that autograd cannot follow, which leaves torch; expected operations of torch on x, or, where "
                "it is linear, LinearMap(forward, transpose)"
            ) from error
        if seen.shape[1:] != self.y.shape[1:]:
            raise UserError(
                f"got an operator that makes {tuple(seen.shape)} of x {tuple(x_0.shape)} and y of shape {tuple(self.y.shape)}; "
                "expected the same shape"
            )
        return self.y.to(seen.dtype) - seen

    def variance(self, like: Tensor) -> Tensor | float:
        """n^2, a number or of the shape of one measurement, in the dtype of `like`."""
        return self.std.square().to(like) if isinstance(self.std, Tensor) else self.std**2

    def log_likelihood(self, x_0: Tensor) -> Tensor:
        """log p(y | x_0) in nats up to a constant: -|(y - A x_0) / n|^2 / 2, `(B,)`."""
        r = self.residual(x_0)
        return -0.5 * (r.square() / self.variance(r)).flatten(1).sum(dim=1)

    @cached_property
    def svd(self) -> SVD | None:
        """The coordinates in which the measurement falls apart, (2) of `sde_lib.operators`, where the operator has them."""
        decompose = getattr(self.operator, "svd", None)
        if decompose is None:
            return None
        one = self.y[0]
        noise = self.std.to(one) if isinstance(self.std, Tensor) else torch.full_like(one, self.std)
        found: SVD | None = decompose(noise.expand_as(one))
        return found

    def take(self, index: Tensor) -> Measurement:
        """The measurements of the samples at `index` `(b,)`; one for all stays as it is."""
        operator = take(self.operator, index)
        if len(self.y) == 1 and operator is self.operator:
            return self
        fewer = copy.copy(self)  # what was checked is
        object.__setattr__(fewer, "operator", operator)
        # of an operator that differs by sample, what was one for all is one for each
        object.__setattr__(fewer, "y", self.y[torch.zeros_like(index) if len(self.y) == 1 else index])
        if operator is not self.operator:
            fewer.__dict__.pop("svd", None)
        return fewer


def _noise(std: float | Tensor, y: Tensor) -> float | Tensor:
    """The noise as a number, or a tensor on the device of `y`, checked."""
    try:
        value = torch.as_tensor(std, dtype=y.dtype)
        fits = value.expand(y.shape[1:]).shape == y.shape[1:] and bool((value.isfinite() & (value >= 0)).all())
    except (RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        got = tuple(std.shape) if isinstance(std, Tensor) and std.ndim else repr(std)
        raise UserError(
            f"got std={got} for measurements of shape {tuple(y.shape[1:])}; expected a finite number >= 0, or one for each "
            "entry of a measurement"
        )
    return float(value) if value.ndim == 0 else value.to(y.device)


def _checked(operator: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], y: Tensor) -> tuple[int, ...]:
    """The event shape of the data, after the dot product of a linear operator and its adjoint."""
    generator = torch.Generator().manual_seed(0)
    few = y[:1].shape if not hasattr(operator, "take") else y.shape
    v = torch.randn(few, generator=generator, dtype=y.dtype).to(y.device)
    with torch.no_grad():
        try:
            back = adjoint(v)
        except RuntimeError as error:
            raise UserError(
                f"got y of shape {tuple(y.shape)}, which the operator's adjoint cannot take ({error}); expected y of "
                "the operator's shape"
            ) from error
        u = torch.randn(back.shape, generator=generator, dtype=y.dtype).to(y.device)
        seen = operator(u)
        if seen.shape != v.shape:
            raise UserError(
                f"got an operator that makes {tuple(seen.shape)} of x {tuple(u.shape)}, and y of shape {tuple(y.shape)}; "
                "expected y of the operator's shape"
            )
        there, here = float((seen.double() * v).sum()), float((u.double() * back).sum())
        scale = float(seen.double().norm() * v.norm() + u.norm() * back.double().norm())
    tolerance = math.sqrt(torch.finfo(y.dtype).eps) / 10
    if not abs(there - here) <= tolerance * scale + 1e-300:
        raise UserError(
            f"got an adjoint with <A u, v> = {there:.6g} and <u, adjoint v> = {here:.6g} for random u and v; expected the same "
            "number: the operator is not linear, or this is not its transpose"
        )
    return tuple(back.shape[1:])
