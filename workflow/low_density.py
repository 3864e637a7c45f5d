r"""Why noise levels: Langevin dynamics between two modes, without and with them, on an exact score.

    p = 1/5 N((-5, -5), I) + 4/5 N((5, 5), I)

Where the modes do not overlap, grad log p near one of them does not depend on its weight, so that a Langevin chain of any
affordable length keeps the shares of its start: from a uniform one, half and half. Annealed chains are divided where the noise
has joined the modes, by the weights (Song and Ermon 2019, arXiv:1907.05600, sections 3.2.2 and 4.3, whose example this is). No
network is in it: what is lost is lost by the dynamics alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from evaluation.pictures import save_surfaces
from evaluation.plane import Plane
from numerics import Hamiltonian, SampleStreams, normal, require_count, run_chain, uniform
from samplers import AnnealedLangevin, Uniform
from sde_lib import TableVESDE, geometric_sigmas
from sde_lib.analytic import GaussianMixture

LAW = GaussianMixture(torch.tensor([[-5.0, -5.0], [5.0, 5.0]]), torch.ones(2), torch.tensor([0.2, 0.8]))
HALF = 9.0


@dataclass(frozen=True, kw_only=True, eq=False)
class LowDensity:
    """Samples of three kinds, and the share of the heavier mode in each, whose true weight is 0.8.

    Attributes:
        exact, langevin, annealed: `(n, 2)`.
    """

    exact: Tensor = field(repr=False)
    langevin: Tensor = field(repr=False)
    annealed: Tensor = field(repr=False)

    def share(self, x: Tensor) -> float:
        """The part of `x` `(n, 2)` that is nearer to the heavier mode."""
        return float((x.sum(dim=1) > 0).double().mean())

    def asdict(self) -> dict[str, float]:
        """The shares, for results.json, with the standard error of one of so many independent samples."""
        shares = {name: self.share(getattr(self, name)) for name in ("exact", "langevin", "annealed")}
        return {**shares, "truth": 0.8, "stderr": math.sqrt(0.8 * 0.2 / len(self.exact))}

    def save(self, file: Path) -> None:
        """The three over the log-density."""
        sde = _ladder()
        surface = LAW.log_prob(sde, Plane(half=HALF, n=150).points, 0.0).reshape(150, 150)
        names = {"exact": "exact samples", "langevin": "Langevin", "annealed": "annealed Langevin"}
        clouds = {
            f"{said}: {self.share(getattr(self, name)):.2f} in the upper mode": getattr(self, name)
            for name, said in names.items()
        }
        save_surfaces(file, dict.fromkeys(clouds, surface), HALF, points=clouds, span=16.0, unit="nats")


def low_density(n: int = 2000, *, steps: int = 1000, levels: int = 10, seed: int = 0) -> LowDensity:
    """Draws `n` samples of each kind.

    Args:
        steps: of Langevin, in all: for the annealed ones divided among the levels.
        levels: sigmas from 20 down to 0.1, geometric.

    Raises:
        UserError: no samples or steps, or fewer than two levels.
    """
    for name, value, least in (("n", n, 1), ("steps", steps, 1), ("levels", levels, 2)):
        require_count(value, name, least)
    sde = _ladder(levels)
    start = HALF * (2 * uniform((n, 2), SampleStreams(seed), dtype=torch.float64) - 1)
    kernel = Hamiltonian(step=math.sqrt(0.1), adjust=False)
    plain = run_chain(kernel, lambda x: LAW.log_prob(sde, x, 0.0), start, steps, generator=SampleStreams(seed + 1))
    sampler = AnnealedLangevin(
        levels=levels, steps=max(1, steps // levels), step_size=0.1 * 0.1**2, grid=Uniform(), denoise=False
    )
    x_T = 20.0 * normal((n, 2), SampleStreams(seed + 2), dtype=torch.float64)
    annealed = sampler(sde, LAW.score(sde), (n, 2), x_T=x_T, generator=SampleStreams(seed + 3)).x
    exact = LAW.sample(n, generator=torch.Generator().manual_seed(seed))
    return LowDensity(exact=exact, langevin=plain.x, annealed=annealed)


def _ladder(levels: int = 10) -> TableVESDE:
    return TableVESDE(sigmas=geometric_sigmas(levels=levels, largest=20.0, smallest=0.1), t_end=0.0)
