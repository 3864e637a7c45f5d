r"""What can be read from the energies of a trained score in the plane, each beside the truth.

At one noise level sigma the model has E(x), the truth is q_sigma, the data's law with that noise, on a grid. So

    differences    std_q(-E - log q) / std_q(log q): how far differences of energies are from those of log-densities
    log Z          by quadrature (the truth of it), and by annealed importance sampling, which is a lower bound
    chains         SGLD and MALA from noise: acceptance, and what is wrong with where they end: the mean of E against its mean
                   under exp(-E) / Z, and half the sum of |share of chains - mass| over cells of the plane (total variation)
    composition    with another energy: product exp(-E_1 - E_2), sum of the two densities, negation exp(-E_1 + gamma E_2)
                   (Du, Li, Mordatch 2020, arXiv:2004.06030, section 3), beside the same of the true laws
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.plane import GridLaw, Plane
from likelihood import AnnealedImportance, DiffusionPath, Exact, GeometricPath, Method, log_likelihood
from models import EnergyModel
from numerics import (
    Dopri5,
    Hamiltonian,
    LogDensity,
    SampleStreams,
    UserError,
    normal,
    require_count,
    require_positive,
    require_range,
    run_chain,
)
from sde_lib import SDE, WhitenedFlow
from workflow import progress
from workflow.plane import Truth

_WIDEST = 0.6  # a noise of which the grid's margin holds all but 1e-6
_CELLS = 24  # a side, of the plane, for total variation


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where and how energies are read.

    Args:
        sigma: the noise level, at most 0.6, in model units, where the data's standard deviation is 1.
        sigmas: noise levels, one or more, at most 0.6, at which differences of energies are compared with the truth's.
        chains: chains of each kind, and of importance sampling.
        length: transitions of each chain.
        steps: step sizes of SGLD and MALA, in model units.
        levels: of annealed importance sampling.
        flow_points: points whose log-densities by the flow are compared.
        gamma: of the negation.
        grid: points a side of the grid.

    Raises:
        UserError: a number out of its range.
    """

    sigma: float = 0.1
    sigmas: tuple[float, ...] = (0.1, 0.2, 0.4)
    chains: int = 1000
    length: int = 300
    steps: tuple[float, ...] = (0.05, 0.1, 0.2)
    levels: int = 200
    flow_points: int = 300
    gamma: float = 0.5
    grid: int = 240

    def __post_init__(self) -> None:
        require_range(self.sigma, "config.energy.sigma", 1e-3, _WIDEST)
        for sigma in self.sigmas:
            require_range(sigma, "one of config.energy.sigmas", 1e-3, _WIDEST)
        for name, least in (("chains", 2), ("length", 1), ("levels", 2), ("flow_points", 2), ("grid", 16)):
            require_count(getattr(self, name), f"config.energy.{name}", least)
        for step in self.steps:
            require_positive(step, "a step of config.energy.steps")
        require_range(self.gamma, "config.energy.gamma", 0, 1)
        if not self.sigmas:
            raise UserError("got config.energy.sigmas=(); expected one noise level or more")
        if len({f"{sigma:g}" for sigma in self.sigmas}) < len(self.sigmas):
            raise UserError(
                f"got config.energy.sigmas={self.sigmas}; expected each once, and to differ in their first six digits"
            )
        if not self.steps:
            raise UserError("got config.energy.steps=(); expected one step or more")


@dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """An energy at one noise level, on a grid.

    Attributes:
        model: whose energy it is.
        t: the time of the noise level.
        law: exp(-E) / Z.
    """

    model: EnergyModel
    t: float
    law: GridLaw

    @classmethod
    def of(cls, model: EnergyModel, sigma: float, plane: Plane) -> Read:
        """`model` at the time at which sigma / alpha is `sigma`.

        Raises:
            UserError: an energy that is not bounded on the grid, or a sigma outside the SDE's.
        """
        sde = model.sde
        require_within(sde, sigma)
        t = float(sde.time_of_log_snr(torch.tensor(-2 * math.log(sigma), dtype=torch.float64)))
        return cls(model=model, t=t, law=plane.law(log_density(model, t)))


def require_within(sde: SDE, *sigmas: float) -> None:
    """Refuses noise levels sigma / alpha that the SDE does not pass.

    Raises:
        UserError: the first of them.
    """
    low, high = (float((-sde.log_snr(t) / 2).exp()) for t in (sde.t_min, sde.T))
    for sigma in sigmas:
        if not low < sigma < high:
            raise UserError(
                f"got the noise level {sigma} of config.energy; expected sigma and sigmas between {low:.3g} and {high:.3g}, "
                "the SDE's"
            )


def log_density(model: EnergyModel, t: float) -> LogDensity:
    """-E(x, t), x `(B, 2)` -> `(B,)` nats."""
    device = next(model.parameters()).device

    def value(x: Tensor) -> Tensor:
        at = x.to(device, torch.float32)
        return -model.energy(at, torch.full((len(x),), t, dtype=torch.float64, device=device)).to(x.device)

    return value


def differences(law: GridLaw, q: GridLaw) -> dict[str, float]:
    """How far the differences of energies are from those of the truth's log-densities, weighted by the truth."""
    mass = q.mass
    residual, scale = law.log_p - q.log_p, q.log_p
    seen = mass > 0

    def std(values: Tensor) -> float:
        mean = (mass * values)[seen].sum()
        return float((mass * (values - mean).square())[seen].sum().sqrt())

    return {"relative": std(residual) / std(scale), "nats": std(residual), "of": std(scale), "kl": q.kl(law)}


def differences_at(plan: Reading, model: EnergyModel, truth: Truth) -> dict[str, dict[str, float]]:
    """`differences` at every noise level of the plan, by sigma; and log Z, the number that all log-densities -E are off by."""
    found = {}
    for sigma in plan.sigmas:
        law = Read.of(model, sigma, truth.plane).law
        found[f"{sigma:g}"] = {**differences(law, truth.law.blurred(sigma)[0]), "log_z": law.log_z}
    return found


def normalisers(plan: Reading, read: Read, truth: Truth, exact: Tensor, seed: int) -> dict[str, Any]:
    """log Z of the energy by annealed importance sampling and by quadrature; and the bracket on the data's own density.

    Where importance sampling refuses the energy, its values are None and "reason" says why.

    Args:
        exact: samples of the data `(N, 2)`.
    """
    sde, model = read.model.sde, read.model
    device = next(model.parameters()).device
    annealed = AnnealedImportance(levels=plan.levels, kernel=Hamiltonian(step=0.5, leapfrog=3))
    path = DiffusionPath(
        sde=sde, energy=model.energy, shape=(2,), t=read.t, std=math.hypot(sde.prior_std, model.data_std or 1.0)
    )
    own, reason = None, ""
    with progress.bar(total=plan.levels, name="annealed importance sampling", unit="level") as bar:
        try:
            own = annealed.forward(
                path, plan.chains, generator=SampleStreams(seed), device=device, callback=lambda _: bar.update(1)
            )
        except UserError as error:  # of a trained energy nobody knows before; the rest of the reading stands
            reason = str(error)
    base = GeometricPath(target=truth.log_density, shape=(2,), std=1.2)
    kernel = Hamiltonian(step=0.25 * truth.narrowest, leapfrog=4)
    brackets = {}
    for levels in (max(2, plan.levels // 4), plan.levels):
        found = AnnealedImportance(levels=levels, kernel=kernel).bracket(base, exact, generator=SampleStreams(seed + 1))
        brackets[str(levels)] = {
            "lower": found.lower.bound,
            "lower_stderr": found.lower.stderr,
            "upper": found.upper.bound,
            "upper_stderr": found.upper.stderr,
            "contains_truth": found.contains(0.0),
        }
    return {
        "quadrature": read.law.log_z,
        "ais_lower_bound": None if own is None else own.bound,
        "ais_stderr": None if own is None else own.stderr,
        "ais_log_mean_weight": None if own is None else own.log_z,
        "effective_chains": None if own is None else own.effective,
        "acceptance": None if own is None else own.acceptance,
        "reason": reason,
        "bracket_of_the_data": brackets,
    }


def by_the_flow(plan: Reading, read: Read, points: Tensor) -> dict[str, float]:
    """Energies of noised points `(N, 2)` beside their exact log-densities by the flow of the same network."""
    model = read.model
    method = Method(Dopri5(rtol=1e-5, atol=1e-5), flow=WhitenedFlow(data_std=model.data_std or 1.0), t_min=read.t)
    found = log_likelihood(model.sde, model, points, method=method, divergence=Exact()).log_prob.cpu()
    energy = log_density(model, read.t)(points).detach().cpu().to(torch.float64)
    return {
        "std_of_difference": float((energy - found).std()),
        "std_of_log_density": float(found.std()),
        "nats_by_flow": -float(found.mean()),
        "nats_by_energy": -float(energy.mean()) + read.law.log_z,
        "nats_by_energy_alone": -float(energy.mean()),
    }


def chains(plan: Reading, law: GridLaw, density: LogDensity, seed: int) -> tuple[list[dict[str, Any]], Tensor]:
    """SGLD and MALA from N(0, I) at every step of the plan; and where the last MALA chains are, `(N, 2)`."""
    start = normal((plan.chains, 2), SampleStreams(seed), dtype=torch.float32)
    expected = -float((law.mass * (law.log_p + law.log_z)).nan_to_num(0.0).sum())
    rows, x = [], start
    kinds = [(name, step, adjust) for step in plan.steps for name, adjust in (("SGLD", False), ("MALA", True))]
    with progress.bar(total=len(kinds) * plan.length, name="chains", unit="step") as bar:
        for name, step, adjust in kinds:
            row: dict[str, Any] = {"chain": name, "step": step}
            try:
                kernel = Hamiltonian(step=step, adjust=adjust)
                found = run_chain(
                    kernel,
                    density,
                    start,
                    plan.length,
                    generator=SampleStreams(seed + 1),
                    callback=lambda _: bar.update(1),
                )
            except UserError as error:
                rows.append({**row, "diverged": str(error)})
                continue
            with torch.no_grad():
                energy = -density(found.x).to(torch.float64)
            rows.append(
                {
                    **row,
                    "acceptance": found.acceptance,
                    "energy_off": float(energy.mean()) - expected,
                    "energy_stderr": float(energy.std()) / math.sqrt(plan.chains),
                    "total_variation": total_variation(law, found.x),
                }
            )
            x = found.x if adjust else x
    return rows, x


def total_variation(law: GridLaw, x: Tensor) -> float:
    """Half the sum over cells of |share of the points `x` `(N, 2)` - mass|, in `_CELLS` x `_CELLS` cells of the plane."""
    half, n = law.plane.half, law.plane.n
    side = ((law.plane.axis + half) / (2 * half) * _CELLS).long().clamp(0, _CELLS - 1)
    cell = (side.unsqueeze(1) * _CELLS + side).flatten()
    mass = torch.zeros(_CELLS**2, dtype=torch.float64).index_add_(0, cell, law.mass.flatten())
    nearest = ((x.detach().cpu().double() + half) / law.plane.spacing).round().long().clamp(0, n - 1)
    count = torch.bincount(cell.reshape(n, n)[nearest[:, 0], nearest[:, 1]], minlength=_CELLS**2) / len(x)
    return float((count - mass).abs().sum() / 2)


def floor(law: GridLaw, n: int) -> float:
    """The total variation that `n` exact samples have."""
    drawn = torch.multinomial(law.mass.flatten(), n, replacement=True, generator=torch.Generator().manual_seed(0))
    return total_variation(law, law.plane.points[drawn])


def compositions(gamma: float) -> Mapping[str, Callable[[GridLaw, GridLaw], Tensor]]:
    """What two laws make, as an unnormalised log-density on the grid."""
    return {
        "product": lambda a, b: a.log_p + b.log_p,
        "sum": lambda a, b: torch.logaddexp(a.log_p, b.log_p),
        "negation": lambda a, b: a.log_p - gamma * b.log_p,
    }


def composed(gamma: float, learned: tuple[GridLaw, GridLaw], true: tuple[GridLaw, GridLaw]) -> dict[str, Any]:
    """Each composition of the learned laws and of the true ones, and how far apart they are."""
    found: dict[str, Any] = {}
    for name, compose in compositions(gamma).items():
        # beyond the learned support a negated density has nothing that keeps it down; a product may be anywhere
        seen = (true[0].log_p > true[0].log_p.max() - 14) | (name != "negation")
        laws = [GridLaw.of(pair[0].plane, torch.where(seen, compose(*pair), -torch.inf)) for pair in (true, learned)]
        found[name] = {"laws": laws, "kl": laws[0].kl(laws[1]), **differences(laws[1], laws[0])}
    return found


def shortened(plan: Reading) -> dict[str, Any]:
    """The values of a plan of seconds."""
    return {
        **asdict(plan),
        "chains": 50,
        "length": 5,
        "steps": plan.steps[:1],
        "levels": 8,
        "flow_points": 20,
        "grid": 120,
    }
