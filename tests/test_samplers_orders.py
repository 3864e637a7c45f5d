"""Deterministic samplers converge to the flow at their declared order, under every SDE, in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from oracles import SDES, gaussian, mixture

from numerics import RK4, Dopri5, Heun
from samplers import (
    DDIM,
    DEIS,
    DPMSolver,
    EulerMaruyama,
    HeunEDM,
    Karras,
    LogSNR,
    PredictorCorrector,
    ProbabilityFlow,
    TimeGrid,
    UniPC,
)

LAWS = {"gaussian": gaussian(), "mixture": mixture()}

# (declared order, sampler of N steps on a grid, the first N)
METHODS = {
    "ddim": (1, lambda n, grid: DDIM(steps=n, grid=grid, denoise=False), 40),
    "dpm_solver_1": (1, lambda n, grid: DPMSolver(order=1, steps=n, grid=grid, denoise=False), 40),
    "dpm_solver_2": (2, lambda n, grid: DPMSolver(order=2, steps=n, grid=grid, denoise=False), 80),
    "dpm_solver_3": (3, lambda n, grid: DPMSolver(order=3, steps=n, grid=grid, denoise=False), 320),
    "unipc_1": (2, lambda n, grid: UniPC(order=1, steps=n, grid=grid, denoise=False), 160),
    "unipc_2": (3, lambda n, grid: UniPC(order=2, steps=n, grid=grid, denoise=False), 160),
    "deis_2": (2, lambda n, grid: DEIS(order=2, steps=n, grid=grid, denoise=False), 160),
    "deis_3": (3, lambda n, grid: DEIS(order=3, steps=n, grid=grid, denoise=False), 160),
    "deis_2_t": (2, lambda n, grid: DEIS(order=2, steps=n, grid=grid, denoise=False, variable="t"), 160),
    "deis_3_t": (3, lambda n, grid: DEIS(order=3, steps=n, grid=grid, denoise=False, variable="t"), 160),
    "edm": (2, lambda n, grid: HeunEDM(steps=n, grid=grid, denoise=False), 40),
    "euler_maruyama_ode": (
        1,
        lambda n, grid: PredictorCorrector(
            predictor=EulerMaruyama(stochasticity=0.0), corrector=None, steps=n, grid=grid, denoise=False
        ),
        320,
    ),
    "flow_heun": (2, lambda n, grid: ProbabilityFlow(solver=Heun(steps=n), grid=grid), 80),
    "flow_rk4": (4, lambda n, grid: ProbabilityFlow(solver=RK4(steps=n), grid=grid), 40),
}


def grid_for(law: str) -> TimeGrid:
    # On a Gaussian, with equal steps in log-SNR over the whole range, the leading error of third-order methods cancels
    # (measured: order 4). Karras's spacing, which is uneven, shows the order itself.
    return LogSNR() if law == "mixture" else Karras(rho=7.0)


@functools.cache
def problem(name: str, law: str):
    sde, oracle = SDES[name], LAWS[law]
    score = oracle.score(sde)
    x_T = oracle.marginal_sample(sde, 16, sde.T, generator=torch.Generator().manual_seed(1))
    tight = ProbabilityFlow(solver=Dopri5(rtol=1e-11, atol=1e-11))
    return sde, score, x_T, tight(sde, score, x_T.shape, x_T=x_T).x


def error(sampler, name: str, law: str) -> float:
    sde, score, x_T, truth = problem(name, law)
    return float((sampler(sde, score, x_T.shape, x_T=x_T).x - truth).square().mean().sqrt())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", METHODS)
def test_order(method: str, name: str, law: str) -> None:
    """N is doubled until two slopes agree within 0.1, and then both are within 0.2 of the declared order."""
    declared, make, n = METHODS[method]
    grid = grid_for(law)
    errors = [error(make(n, grid), name, law)]
    slopes: list[float] = []
    while len(slopes) < 2 or abs(slopes[-1] - slopes[-2]) > 0.1:
        assert len(slopes) < 5, f"slopes {slopes} do not settle; errors {errors}"
        n *= 2
        errors.append(error(make(n, grid), name, law))
        slopes.append(math.log2(errors[-2] / errors[-1]))
    assert slopes[-1] == pytest.approx(declared, abs=0.2), (slopes, errors)
    assert slopes[-2] == pytest.approx(declared, abs=0.2), (slopes, errors)
