"""Time grids: their ends, their formulas, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES

from samplers import Cosine, Custom, DDPMIndices, Karras, Logistic, LogSNR, Quadratic, Uniform, time_grids
from sde_lib import VPSDE

GRIDS = [Uniform(), Quadratic(), LogSNR(), Karras(), Karras(rho=3.0), Cosine(), Logistic()]
GRIDS += [DDPMIndices(spacing=s) for s in DDPMIndices.spacings]


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 999])
def test_grids_run_from_exactly_T_to_exactly_t_end_strictly_downwards(sde, grid, steps) -> None:
    times = grid(sde, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert float(times[0]) == sde.T
    assert float(times[-1]) == sde.t_end
    assert bool((times.diff() < 0).all())
    assert eval(repr(grid)) == grid


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_each_grid_is_linear_in_its_own_variable(sde) -> None:
    def kappa(t):
        return sde.sigma(t) / sde.alpha(t)

    variables = {
        Uniform(): lambda t: t,
        Quadratic(): lambda t: t.sqrt(),
        LogSNR(): sde.log_snr,
        Karras(rho=3.0): lambda t: kappa(t) ** (1 / 3),
        Cosine(): lambda t: torch.atan(kappa(t)),
        Logistic(center=1.0, scale=2.0): lambda t: ((sde.log_snr(t) - 1) / 2).sigmoid(),
    }
    for grid, variable in variables.items():
        steps = variable(grid(sde, 50)).diff()
        assert float((steps - steps.mean()).abs().max() / steps.mean().abs()) < 1e-6, grid


def test_other_ends_replace_those_of_the_sde() -> None:
    times = Karras(t_start=0.7, t_end=0.02)(VPSDE(), 10)
    assert (float(times[0]), float(times[-1])) == (0.7, 0.02)


def test_ddpm_indices_are_those_of_the_published_ways() -> None:
    assert DDPMIndices(spacing="linspace").indices(4).tolist() == [999, 749, 500, 250, 0]
    assert DDPMIndices(spacing="leading").indices(4).tolist() == [999, 750, 500, 250, 0]
    assert DDPMIndices(spacing="trailing").indices(4).tolist() == [999, 749, 499, 249, 0]
    for spacing in DDPMIndices.spacings:
        assert DDPMIndices(spacing=spacing).indices(999).tolist() == list(range(999, -1, -1))
        for steps in range(1, 999, 37):
            indices = DDPMIndices(spacing=spacing).indices(steps)
            assert len(indices) == steps + 1
            assert bool((indices.diff() < 0).all()), (spacing, steps)
    # with t_end = 1/1000, index i of VP is DDPM's (i + 1) / 1000
    times = DDPMIndices(spacing="trailing")(VPSDE(), 4)
    assert times.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.001])


def test_a_custom_grid_is_taken_as_it_is() -> None:
    grid = Custom(times=torch.tensor([1.0, 0.4, 0.001]))
    assert grid.steps == 2
    assert grid(VPSDE(), 2).tolist() == pytest.approx([1.0, 0.4, 0.001])
    assert eval(repr(grid)) == grid


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Uniform()(VPSDE(), 0), "expected an integer >= 1"),
        (lambda: Uniform()(VPSDE(), 2.5), "expected an integer >= 1"),
        (lambda: Uniform(t_start=1.5)(VPSDE(), 3), r"the SDE's \[t_min, T\]"),
        (lambda: Uniform(t_end=1e-9)(VPSDE(), 3), r"the SDE's \[t_min, T\]"),
        (lambda: Uniform(t_start=0.1, t_end=0.2)(VPSDE(), 3), "t_end < t_start"),
        (lambda: Karras(rho=0.0), "rho=0.0"),
        (lambda: Logistic(scale=-1.0), "scale=-1.0; expected a finite number > 0"),
        (lambda: DDPMIndices(spacing="middle"), "'leading', 'trailing', 'linspace'"),
        (lambda: DDPMIndices()(VPSDE(), 1000), "with the final denoising that is 1000 evaluations"),
        (lambda: Custom(times=[0.1, 0.5]), "strictly decreasing"),
        (lambda: Custom(times=[1.0]), "strictly decreasing"),
        (lambda: Custom(times=[1.0, math.nan]), "strictly decreasing"),
        (lambda: time_grids.create("square"), "expected one of uniform"),
        (lambda: time_grids.create("karras", power=2), "power"),
    ],
)
def test_bad_grids_are_refused_with_what_to_do(make, words) -> None:
    with pytest.raises(ValueError, match=words):
        make()
