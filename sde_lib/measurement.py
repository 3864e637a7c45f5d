r"""Measurements of clean data: what a posterior is conditioned on.

    (1)  y = A x_0 + n z,    z ~ N(0, I)

with an operator A (`sde_lib.operators`) and noise of standard deviation n, a number or one for each entry of a measurement.

A wrong adjoint makes every method silently wrong, so it is looked at when a `Measurement` is made: <A u, v> and <u, A^T v> are
the same number for a linear A and its adjoint, and for nothing else. Of random u and independent v both are smaller by sqrt(D)
than the rounding they are made of, |A u| |v|; so v = A u + |A u| / |r| r is looked at, with a random r, for which |A u|^2 is a
part of them. And every other u is A^T of a random vector: of random u, an operator with large and small singular values makes
little of |u| |A^T v|, too.

An operator without an adjoint is differentiated by autograd, which also has an answer for one that rounds x (a derivative
of 0) or detaches it (none). So it is looked at where a method first needs its derivative.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from numerics import UserError, expand_as, ordinary, ordinary_mode, take
from sde_lib.operators import SVD

_PROBES, _SIGNS = 2, 16
_ROUNDING = 100
"""Of dot products, in units of the last place: what an adjoint may be off by."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """y = operator(x_0) + std * noise.

    Args:
        operator: A; a callable with `adjoint` is linear, another one need not be.
        y: `(B, ...)`, one for each sample, or `(1, ...)`, one for all; kept in float32 at least.
        std: n, a number >= 0 or a tensor that broadcasts to the shape of one measurement `(...)`.

    Attributes:
        linear: has the operator an adjoint?
        event_shape: of one sample, `(*)`, where the operator is linear.
        std: n as given; of entries that are never observed, 1.
        noiseless: is n = 0 in some entry that is observed?

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
    # what has been looked at, shared with those of take()
    _looked: list[bool] = field(init=False, repr=False, default_factory=lambda: [False])
    _alone: list[bool] = field(init=False, repr=False, default_factory=lambda: [False])

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
        y = self.y.to(torch.promote_types(self.y.dtype, torch.float32))
        y = y if observed is None else _applied(observed, y, "observed")
        if not bool(y.isfinite().all()):
            raise UserError(
                "got y with values that are not finite; expected numbers: mask what is missing by Mask(mask)"
            )
        settled: dict[str, object] = {"y": ordinary(y), "linear": adjoint is not None, "event_shape": None}
        settled["std"] = _noise(self.std, y, observed)
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
        if len(self.y) != len(x) and hasattr(self.operator, "take"):
            raise UserError(
                f"got an operator that differs by sample, of one sample, for {len(x)}; expected one of each, or an operator "
                "for all, such as Mask(mask)"
            )
        if self.event_shape is not None and tuple(x.shape[1:]) != self.event_shape:
            raise UserError(
                f"got x of shape {tuple(x.shape)} for a measurement of data (B, {', '.join(map(str, self.event_shape))}); "
                "expected that shape"
            )
        if not x.is_floating_point():
            raise UserError(f"got x of {x.dtype}; expected real numbers, such as torch.float32")
        if x.device != self.y.device:
            raise UserError(f"got x on {x.device} and y on {self.y.device}; expected one device: move y there first")

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, `(B, *)`."""
        transposed: Tensor = self.operator.adjoint(y)  # type: ignore[attr-defined]
        return transposed

    def residual(self, x_0: Tensor) -> Tensor:
        """y - A x_0, `(B, ...)`.

        Raises:
            UserError: where A x_0 has not the shape of y, the operator cannot take an x_0 that autograd follows, or, of one
                without an adjoint, the first batch of two samples or more shows that it mixes them.
        """
        try:
            seen = self.operator(x_0)
        except RuntimeError as error:
            if not x_0.requires_grad or not self._takes(x_0.detach()):
                raise
            raise UserError(
                "got an operator that autograd cannot follow, which leaves torch or holds tensors made under "
                "torch.inference_mode(); expected operations of torch on x with ordinary tensors, or, where it is linear, "
                "LinearMap(forward, transpose)"
            ) from error
        if not isinstance(seen, Tensor) or not seen.is_floating_point():
            got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
            raise UserError(
                f"got an operator that makes {got} of x; expected real numbers: torch.view_as_real makes them of complex ones"
            )
        if seen.shape[1:] != self.y.shape[1:] or len(seen) != len(x_0):
            raise UserError(
                f"got an operator that makes {tuple(seen.shape)} of x {tuple(x_0.shape)} and y of shape {tuple(self.y.shape)}; "
                "expected the same shape, of as many samples as x has"
            )
        if not self.linear and not self._alone[0] and len(x_0) > 1:
            with torch.no_grad():
                alone = take(self.operator, torch.zeros(1, dtype=torch.int64, device=x_0.device))
                _require_same(alone(x_0[:1].detach()), seen[:1].detach(), "value")
            self._alone[0] = True
        return self.y.to(seen.dtype) - seen

    def _takes(self, x_0: Tensor) -> bool:
        try:
            self.operator(x_0)
        except RuntimeError:
            return False
        return True

    def variance(self, like: Tensor) -> Tensor | float:
        """n^2, a number or of the shape of one measurement, in the dtype of `like`."""
        return self.std.square().to(like) if isinstance(self.std, Tensor) else self.std**2

    @cached_property
    def row_size(self) -> Tensor:
        """|A_i|, the length of the rows of a linear operator: of the shape of one measurement where the operator has
        `row_sizes()`, and otherwise the root of their mean square, `()`, or `(B, ...)` of one that differs by sample.

        The mean is that of |A^T v|^2 over sixteen vectors v of random signs, the same for each sample.
        """
        y = self.y
        with ordinary_mode(y.device), torch.no_grad():
            sizes = getattr(self.operator, "row_sizes", None)
            if sizes is not None:
                own: Tensor = sizes().to(y)
                return own.reshape(y.shape[1:])
            signs = torch.randint(0, 2, (_SIGNS, *y.shape[1:]), generator=torch.Generator().manual_seed(0)) * 2 - 1
            v = signs.to(y)
            if not hasattr(self.operator, "take"):
                return (self.adjoint(v).square().sum() / v.numel()).sqrt()
            squares = [self.adjoint(one.expand_as(y)).square().flatten(1).sum(dim=1) for one in v]
            return expand_as((torch.stack(squares).sum(dim=0) / v.numel()).sqrt(), y)

    def scale(self, r2: Tensor, like: Tensor) -> Tensor:
        """The standard deviation of y's entries for data of variance r^2, sqrt(n^2 + r^2 |A_i|^2), 1 where that is 0.

        In units of it the equations (n^2 + A C A^T) w = y - A D are of one size, whatever the noises of the entries.

        Args:
            r2: `(B,)`.
            like: residuals, `(B, ...)`.
        """
        found = (self.variance(like) + expand_as(r2, like).to(like) * self.row_size.to(like).square()).sqrt()
        return torch.where(found > 0, found, 1.0)

    def log_likelihood(self, x_0: Tensor) -> Tensor:
        """log p(y | x_0) in nats up to a constant: -|(y - A x_0) / n|^2 / 2, `(B,)`."""
        r = self.residual(x_0)
        return -0.5 * (r.square() / self.variance(r)).flatten(1).sum(dim=1)

    def require_derivative(self, x_0: Tensor) -> None:
        """Looks, once, whether autograd can follow the operator at the data `x_0` `(B, *)`.

        Raises:
            UserError: where it finds no derivative, or one that is exactly 0 in all entries, at x_0 and at data near it.
        """
        if self._looked[0]:
            return
        generator = torch.Generator().manual_seed(0)
        nowhere = True
        with torch.enable_grad():
            for spread in (0.0, 2.0):
                away = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
                at = (x_0.detach() + spread * away).requires_grad_()
                seen = self.residual(at)
                slope = None
                if seen.requires_grad:  # which parameters are enough for
                    v = torch.randn(seen.shape, generator=generator, dtype=seen.dtype).to(seen.device)
                    (slope,) = torch.autograd.grad(seen, at, v, allow_unused=True)
                if slope is None:
                    raise UserError(
                        "got an operator that autograd cannot follow to x; expected operations of torch on x, without "
                        "detach(): write it so, or, where it is linear, give its adjoint by LinearMap(forward, transpose)"
                    )
                nowhere &= bool((slope == 0).all())
        if nowhere:
            raise UserError(
                "got an operator whose derivative is 0 everywhere, as that of rounding is, so that y would be ignored; "
                "expected one that autograd can follow: leave out the rounding, and let std cover it"
            )
        self._looked[0] = True

    @cached_property
    def svd(self) -> SVD | None:
        """The coordinates in which the measurement falls apart, (2) of `sde_lib.operators`, where the operator has them."""
        decompose = getattr(self.operator, "svd", None)
        if decompose is None:
            return None
        one = self.y[0]
        with ordinary_mode(one.device):  # kept for whoever asks next, who may differentiate through it
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
        chosen = torch.zeros_like(index) if len(self.y) == 1 else index
        object.__setattr__(fewer, "y", ordinary(self.y[chosen.to(self.y.device)]))
        if operator is not self.operator:
            for kept in ("svd", "row_size"):
                fewer.__dict__.pop(kept, None)
        return fewer


def _noise(std: float | Tensor, y: Tensor, observed: Callable[[Tensor], Tensor] | None) -> float | Tensor:
    """The noise as a number, or a tensor on the device of `y`, checked; 1 in entries that no sample observes."""
    try:
        given = torch.as_tensor(std)
        if given.is_complex() or given.dtype == torch.bool:
            raise TypeError  # refused below
        value = torch.as_tensor(std, dtype=y.dtype)  # once more: a number of Python's has more digits than float32
        fits = value.expand(y.shape[1:]).shape == y.shape[1:] and bool((value.isfinite() & (value >= 0)).all())
    except (RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        got = tuple(std.shape) if isinstance(std, Tensor) and std.ndim else repr(std)
        raise UserError(
            f"got std={got} for measurements of shape {tuple(y.shape[1:])}; expected a finite number >= 0, or one for each "
            "entry of a measurement"
        )
    if value.ndim == 0:
        return float(value)
    value = value.to(y.device)
    if observed is not None:
        value = torch.where((observed(torch.ones_like(y)) != 0).any(dim=0), value, 1.0)
    return ordinary(value)


def _checked(operator: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], y: Tensor) -> tuple[int, ...]:
    """The event shape of the data, after dot products of a linear operator and its adjoint."""
    few = y[:1] if not hasattr(operator, "take") else y
    with torch.no_grad():
        back = _applied(adjoint, few, "adjoint")
        if back.ndim < 2 or len(back) != len(few):
            raise UserError(
                f"got an adjoint that makes {tuple(back.shape)} of y {tuple(few.shape)}; expected data {(len(few), '*')}"
            )
        generator = torch.Generator().manual_seed(0)
        for smooth in (False, True) * _PROBES:
            u, r = (torch.randn(x.shape, generator=generator, dtype=y.dtype).to(y.device) for x in (back, few))
            if smooth:
                u = _applied(adjoint, r, "adjoint")
            seen = _applied(operator, u, "forward map")
            if seen.shape != few.shape:
                raise UserError(
                    f"got an operator that makes {tuple(seen.shape)} of x {tuple(u.shape)}, and y of shape {tuple(y.shape)}; "
                    "expected y of the operator's shape"
                )
            v = seen + seen.norm() / r.norm() * r
            back = _applied(adjoint, v, "adjoint")
            if back.shape != u.shape:
                raise UserError(
                    f"got an adjoint that makes {tuple(back.shape)} of one measurement and {tuple(u.shape)} of another; "
                    "expected one shape"
                )
            there, here = (float((a.double() * b.double()).sum()) for a, b in ((seen, v), (u, back)))
            scale = float(seen.double().norm() * v.double().norm() + u.double().norm() * back.double().norm())
            if not abs(there - here) <= _ROUNDING * torch.finfo(y.dtype).eps * scale + 1e-300:
                raise UserError(
                    f"got an adjoint with <A u, v> = {there:.9g} and <u, adjoint v> = {here:.9g} for random u and v; expected "
                    "the same number: the operator is not linear, or this is not its transpose"
                )
        if not hasattr(operator, "take"):
            _require_alone(operator, u, "forward map")
            _require_alone(adjoint, v, "adjoint")
        elif len(few) > 1:
            for i in (0, len(few) - 1):
                own = take(operator, torch.tensor([i], device=y.device))
                _require_same(_applied(own, u[i : i + 1], "forward map"), seen[i : i + 1], "forward map")
                back_alone: Callable[[Tensor], Tensor] = own.adjoint  # type: ignore[attr-defined]
                _require_same(_applied(back_alone, v[i : i + 1], "adjoint"), back[i : i + 1], "adjoint")
    return tuple(back.shape[1:])


def _require_alone(function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> None:
    """Refuses a function of batches, an operator's `name`, that makes something else of `x` `(1, ...)` beside another sample.

    Raises:
        UserError: where it does.
    """
    mate = 3 + 2 * x.flip(*range(1, x.ndim))
    alone, beside = _applied(function, x, name), _applied(function, torch.cat([x, mate]), name)
    _require_same(alone, beside[:1] if len(beside) == 2 else torch.full_like(alone, torch.inf), name)


def _require_same(alone: Tensor, beside: Tensor, name: str) -> None:
    """Refuses what an operator makes of a sample alone where beside others it is something else, `(1, ...)` both.

    Raises:
        UserError: where the two differ.
    """
    both = alone.isfinite() | beside.isfinite()  # a logarithm, say, of what is no picture yet
    off, size = (alone - beside)[both], torch.where(both, beside, 0.0).norm()
    if not float(off.norm()) <= _ROUNDING * torch.finfo(beside.dtype).eps * float(size):
        raise UserError(
            f"got an operator whose {name} for a sample is another where the batch has others; expected each sample "
            "by itself: means and norms over all axes but the first"
        )


def _applied(function: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    """What the operator's `name` makes of `x`.

    Raises:
        UserError: where it is no tensor of real numbers, or torch cannot make it.
    """
    try:
        made = function(x)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"got an operator whose {name} cannot take a tensor of shape {tuple(x.shape)} and {x.dtype} "
            f"({str(error).splitlines()[0]}); expected y of the operator's shape, and an adjoint that takes y to data"
        ) from error
    if not isinstance(made, Tensor) or not made.is_floating_point():
        got = made.dtype if isinstance(made, Tensor) else type(made).__name__
        raise UserError(f"got an operator whose {name} returns {got}; expected a tensor of real numbers")
    return made
