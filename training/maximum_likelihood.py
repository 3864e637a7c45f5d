r"""Maximum likelihood through the probability flow: a continuous normalizing flow.

The flow of a model's predicted noise, dx/dt = v(x, t) = f x + g^2 / (2 sigma) eps_hat(x, t), whatever it was trained for, takes
x at t_min to z at T, and

    (1)  log p(x) = log p_T(z) + integral from t_min to T of tr(dv/dx) dt

(Chen et al. 2018, arXiv:1806.07366, theorem 1; with random traces FFJORD, Grathwohl et al. 2019, arXiv:1810.01367). Here the
network is trained by (1) itself: the integration is differentiated, by the adjoint (a second integration, backwards, whose
memory does not grow with the steps) or through the steps. Nothing ties such a flow to the law of noised data, so its "score" is
the score of nothing; its density is exact all the same.

Many flows have the same ends. Two penalties choose a simple one, which costs a solver fewer evaluations (Finlay et al. 2020,
arXiv:2002.02798, equations (5) and (6)), each integrated along the path and per dimension:

    (2)  K = integral of |v|^2 dt / D,      J = integral of |dv/dx|_F^2 dt / D

With random vectors |v' dv/dx|^2 is an unbiased estimate of the second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from numerics import (
    RK4,
    Solver,
    Status,
    TorchDiffEq,
    UserError,
    ordinary,
    rademacher,
    require_choice,
    require_count,
    require_positive,
    require_range,
)
from sde_lib import SDE
from training.objectives import Draws, Objective, predicted_noise
from training.streams import StepStreams
from training.trainable import NoisePredictor

SOLVERS = ("dopri5", "bosh3", "adaptive_heun", "rk4")
_DISCRETE = ("rk4",)


class FlowPass(NamedTuple):
    """What one pass up the flow gives.

    Attributes:
        log_prob: `(B,)` nats, float64, (1).
        kinetic, jacobian: `(B,)`, K and J of (2).
        evaluations: of the network, refused steps among them.
    """

    log_prob: Tensor
    kinetic: Tensor
    jacobian: Tensor
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class MaximumLikelihood(Objective):
    """Minus log p(x_0) of the probability flow in nats per dimension, plus penalties (2), `(B,)`.

    x_0 is taken as the state at t_min. Chen et al. 2018 (arXiv:1806.07366); Grathwohl et al. 2019 (arXiv:1810.01367).

    Args:
        solver: dopri5, bosh3 or adaptive_heun of torchdiffeq, on the whole batch; or rk4 in `steps` equal steps.
        adjoint: differentiate by a second integration, backwards; else through the steps, which is as right, faster, and takes
            memory for every evaluation.
        kept: with `adjoint`, at how many equal parts of the way the state is kept, from which the way back begins anew. The
            flow of a trained network contracts on its way to noise. Retraced from z alone it left the path of images by so much
            that gradients were 1e13 times too large, at a tolerance of 1e-3 too; with 16 they were off by 3 to 5 % at 1e-2.
        tolerance: relative and absolute, of the adaptive solvers.
        steps: of rk4, of four evaluations each.
        probes: random vectors a sample, the same along the whole path, for the trace; 0 for the exact trace.
        kinetic: the weight of K.
        jacobian: the weight of J.
        t_min: where the data stand; the SDE's unless given.

    Raises:
        UserError: another solver, an adjoint of a discrete one, a tolerance or weight out of range.
    """

    solver: str = "dopri5"
    adjoint: bool = True
    kept: int = 16
    tolerance: float = 1e-4
    steps: int = 12
    probes: int = 0
    kinetic: float = 0.0
    jacobian: float = 0.0
    t_min: float | None = None

    of_flow: ClassVar[bool] = True
    differentiates: ClassVar[bool] = True
    """The loss takes derivatives of the network, which then cannot be compiled; see `training.compilation`."""

    def __post_init__(self) -> None:
        require_choice(self.solver, "solver", SOLVERS)
        require_positive(self.tolerance, "tolerance")
        require_count(self.steps, "steps")
        require_count(self.kept, "kept")
        require_count(self.probes, "probes", 0)
        require_range(self.kinetic, "kinetic", 0)
        require_range(self.jacobian, "jacobian", 0)
        if self.adjoint and self.solver in _DISCRETE:
            raise UserError(
                f"got adjoint=True with solver={self.solver!r}, whose backward integration takes other steps than the forward "
                "one, so that gradients are of neither; expected an adaptive solver such as dopri5, or adjoint=False"
            )
        if self.t_min is not None:
            require_positive(self.t_min, "t_min")

    def draw(
        self, sde: SDE, shape: Sequence[int], streams: StepStreams, *, dtype: torch.dtype = torch.float32
    ) -> Draws:
        t = torch.full((int(shape[0]),), sde.T, dtype=torch.float64, device=streams.device)
        draws = {"t": t, "weight": torch.ones_like(t)}
        if self.probes:
            size = (shape[0], self.probes, *shape[1:])
            draws["v"] = rademacher(size, streams.generator("probes"), device=streams.device, dtype=dtype)
        return draws

    def loss(self, model: NoisePredictor, x_0: Tensor, draws: Mapping[str, Tensor], labels: Tensor | None) -> Tensor:
        found = self.up(model, x_0, draws.get("v"), labels)
        penalties = self.kinetic * found.kinetic + self.jacobian * found.jacobian
        return (penalties - found.log_prob / math.prod(x_0.shape[1:])).to(x_0.dtype)

    def up(
        self, model: NoisePredictor, x_0: Tensor, probes: Tensor | None = None, labels: Tensor | None = None
    ) -> FlowPass:
        """Takes `x_0` `(B, *)` up the flow; differentiable in the network's parameters where gradients are on.

        NaN where the solver gave up.

        Args:
            probes: `(B, n, *)`, or None for the exact trace.
            labels: classes `(B,)`.

        Raises:
            UserError: no samples, or t_min beyond T.
        """
        if x_0.ndim == 0 or len(x_0) == 0:
            raise UserError(f"got x_0 of shape {tuple(x_0.shape)}; expected (B, *): one sample or more")
        wanted = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):  # in inference mode there is no trace
            probes, labels = (None if given is None else ordinary(given) for given in (probes, labels))
            return self._up(model, ordinary(x_0), probes, labels)

    def _up(self, model: NoisePredictor, x_0: Tensor, probes: Tensor | None, labels: Tensor | None) -> FlowPass:
        sde, D = model.sde, math.prod(x_0.shape[1:])
        vectors = _units(x_0) if probes is None else probes
        share = 1.0 if probes is None else 1 / vectors.shape[1]

        def field(t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, wanted = y[0], torch.is_grad_enabled()
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                value = _velocity(model, x, t, labels)
                rows = [
                    torch.autograd.grad((value * v).sum(), x, create_graph=wanted, retain_graph=True)[0]
                    for v in vectors.unbind(dim=1)
                ]
            of_rows = torch.stack([r.flatten(1) for r in rows], dim=1)
            trace = (of_rows * vectors.flatten(2)).flatten(1).sum(dim=1)
            square = of_rows.flatten(1).square().sum(dim=1)
            energy = value.flatten(1).square().sum(dim=1)
            slopes = (value, *(part.unsqueeze(1) / D for part in (share * trace, energy, share * square)))
            return slopes if wanted else tuple(slope.detach() for slope in slopes)

        state = x_0.to(torch.float32 if x_0.device.type == "mps" else torch.float64)
        zero = torch.zeros(len(x_0), 1, dtype=state.dtype, device=state.device)
        t_min = sde.t_min if self.t_min is None else self.t_min
        if not t_min < sde.T:
            raise UserError(f"got t_min={t_min:g} for times up to T={sde.T:g}; expected less")
        found = self._made(model)(field, (state, zero, zero, zero), t_min, sde.T)
        z, change, kinetic, jacobian = found.y
        log_prob = sde.prior_log_prob(z) + D * change.squeeze(1)
        done = found.status == int(Status.DONE)
        return FlowPass(
            log_prob=torch.where(done, log_prob, torch.nan),
            kinetic=kinetic.squeeze(1),
            jacobian=jacobian.squeeze(1),
            evaluations=int(found.evaluations.max()),
        )

    def _made(self, model: NoisePredictor) -> Solver:
        if self.solver in _DISCRETE:
            return RK4(steps=self.steps)
        wanted = torch.is_grad_enabled() and self.adjoint
        parameters = tuple(p for p in cast(nn.Module, model).parameters() if p.requires_grad) if wanted else ()
        return TorchDiffEq(self.solver, self.tolerance, adjoint=wanted, kept=self.kept, parameters=parameters)


def _velocity(model: NoisePredictor, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """v(x, t), `(B, *)`; all samples are at one time, so that its coefficients are numbers."""
    sde, now = model.sde, t[:1]
    of_x, of_noise = sde.f(now), sde.g(now).square() / (2 * sde.sigma(now))
    return of_x.to(x.dtype) * x + of_noise.to(x.dtype) * predicted_noise(model, x, t, labels)


def _units(x: Tensor) -> Tensor:
    """The unit vectors of every sample, `(B, D, *)`."""
    D = math.prod(x.shape[1:])
    return torch.eye(D, dtype=x.dtype, device=x.device).reshape(1, D, *x.shape[1:]).expand(len(x), -1, *x.shape[1:])
