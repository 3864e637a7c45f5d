"""The probability flow as a sampler, by every kind of solver: the exact flow of a Gaussian, grids, costs, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES, gaussian

from numerics import RK4, Adams, Dopri5, Heun, SampleStreams, SciPy
from samplers import Custom, Karras, LogSNR, ProbabilityFlow
from sde_lib import CountedScore, FlowField, FlowTimes, PlainFlow, WhitenedFlow, check_score, transport

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())

FIXED = {
    "heun": lambda n: Heun(steps=n),
    "rk4": lambda n: RK4(steps=n),
    "adams, 2 points": lambda n: Adams(steps=n, points=2),
    "adams, 5 points": lambda n: Adams(steps=n, points=5),
    "adams, rising": lambda n: Adams(steps=n, points=5, start="rising"),
}
each_solver = pytest.mark.parametrize("make", FIXED.values(), ids=FIXED.keys())


def constant_network(sde, s, c):
    """The score of a network that adds the constant c to the Gaussian guess of standard deviation s, (5) of `WhitenedFlow`."""

    def score(x, t):
        alpha, sigma = sde.alpha(t).unsqueeze(1), sde.sigma(t).unsqueeze(1)
        kappa = sigma / alpha
        r = torch.hypot(torch.tensor(s, dtype=torch.float64), kappa)
        return -(kappa * x / (alpha * r) + s * c) / (r * sigma)

    return score


@each_sde
class TestAdams:
    def test_order_against_the_exact_flow_of_a_gaussian(self, sde):
        """The flow keeps a Gaussian's whitened coordinates, so their change from T to t_end is the error."""
        law = gaussian()
        x_T = law.marginal_sample(sde, 6, sde.T, generator=torch.Generator().manual_seed(0))
        kept = law.whiten(sde, x_T, sde.T)
        for points in (2, 3, 4):
            errors = []
            for n in (80, 160, 320):
                flow = ProbabilityFlow(solver=Adams(steps=n, points=points))
                x = flow(sde, law.score(sde), x_T.shape, x_T=x_T).x
                errors.append(float((law.whiten(sde, x, sde.t_end) - kept).abs().max()))
            slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
            assert slopes[-1] == pytest.approx(points, abs=0.3), (points, errors)
        assert errors[0] < 1e-3

    def test_the_known_factor_of_the_slopes_is_integrated_exactly(self, sde):
        """w moves by c times the change of arctan(kappa / s), in eight steps as in any number: Adams is exponential."""
        s, c = 0.6, torch.tensor([0.3, -1.2], dtype=torch.float64)
        score, flow = constant_network(sde, s, c), WhitenedFlow(data_std=s)
        x_T = torch.tensor([[0.5, -0.4]], dtype=torch.float64) * sde.prior_std
        angle = lambda t: torch.atan(sde.sigma(t) / sde.alpha(t) / s)
        moved = x_T / flow.scale(sde, sde.T) + c * (angle(sde.t_end) - angle(sde.T))
        expected = moved * flow.scale(sde, sde.t_end)
        sampler = ProbabilityFlow(solver=Adams(steps=8, points=5, start="rising"), flow=flow)
        assert torch.allclose(sampler(sde, score, (1, 2), x_T=x_T).x, expected, rtol=1e-6)
        assert torch.allclose(sampler.decode(sde, score, x_T).x, expected, rtol=1e-6)
        assert torch.allclose(sampler.encode(sde, score, expected).x, x_T, rtol=1e-6)


@each_solver
@pytest.mark.parametrize("denoise", [False, True])
class TestCost:
    def test_declared_is_counted(self, make, denoise):
        sde = SDES["vp"]
        for n in (1, 2, 7):
            for grid in (None, Karras()):
                sampler = ProbabilityFlow(solver=make(n), grid=grid, denoise=denoise)
                counted = CountedScore(gaussian().score(sde))
                result = sampler(sde, counted, (3, 2), generator=SampleStreams(0), keep_path=True, dtype=torch.float64)
                assert counted.nfe == result.nfe == sampler.evaluations
                assert len(result.times) == n + 1 and result.path.shape == (n + 1, 3, 2)

    def test_a_budget_is_used_as_far_as_it_goes(self, make, denoise):
        sampler = ProbabilityFlow(solver=make(20), denoise=denoise)
        least = ProbabilityFlow(solver=make(1), denoise=denoise).evaluations
        for budget in range(least, least + 12):
            fitted = sampler.within(budget)
            one_more = ProbabilityFlow(solver=make(fitted.solver.steps + 1), denoise=denoise)
            assert fitted.evaluations <= budget < one_more.evaluations
        with pytest.raises(ValueError, match=f"expected at least {least}, which is one step"):
            sampler.within(least - 1)


@each_solver
def test_a_grid_is_walked_by_every_solver_of_fixed_steps(make):
    """The times are the grid's, its ends included, and the result is another one than on equal steps."""
    sde, law = SDES["vp"], gaussian()
    x_T = law.marginal_sample(sde, 2, 0.8, generator=torch.Generator().manual_seed(0))
    for grid in (
        LogSNR(t_start=0.8, t_end=0.01),
        Custom(times=[0.8, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.015, 0.012, 0.01]),
    ):
        run = lambda grid: ProbabilityFlow(solver=make(9), grid=grid)(
            sde, law.score(sde), (2, 2), x_T=x_T, keep_path=True
        )
        result = run(grid)
        assert torch.allclose(result.times, grid(sde, 9), rtol=1e-9)
        kept = law.whiten(sde, result.path[0], 0.8)
        assert float((law.whiten(sde, result.x, 0.01) - kept).abs().max()) < 0.5
        other = run(Karras(t_start=0.8, t_end=0.01))
        assert not torch.allclose(other.x, result.x, rtol=1e-9)


def test_own_times_give_the_solver_their_number():
    times = [1.0, 0.5, 0.2, 0.001]
    assert ProbabilityFlow(grid=times, solver=Adams()).evaluations == 4
    assert ProbabilityFlow(grid=times, solver=Adams(steps=3)).solver.steps == 3
    with pytest.raises(ValueError, match="a grid of 4 times; expected steps=3"):
        ProbabilityFlow(grid=times, solver=Adams(steps=7))
    with pytest.raises(ValueError, match="a grid of 4 times; expected steps=3"):
        ProbabilityFlow(grid=times, solver=Heun()).within(100)


def test_adaptive_solvers_take_a_grids_ends():
    sde, law = SDES["vp"], gaussian()
    x_T = law.marginal_sample(sde, 2, 0.8, generator=torch.Generator().manual_seed(0))
    for solver in (Dopri5(rtol=1e-8, atol=1e-8), SciPy(rtol=1e-8)):
        sampler = ProbabilityFlow(solver=solver, grid=LogSNR(t_start=0.8, t_end=0.01))
        assert sampler.evaluations is None
        x = sampler(sde, law.score(sde), (2, 2), x_T=x_T).x
        assert torch.allclose(law.whiten(sde, x, 0.01), law.whiten(sde, x_T, 0.8), atol=1e-5)


@pytest.mark.parametrize("x", [torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3)], ids=["integers", "one axis"])
def test_states_that_are_no_batch_are_refused_both_ways(x):
    sde, score = SDES["vp"], gaussian().score(SDES["vp"])
    for way in (ProbabilityFlow().encode, ProbabilityFlow().decode):
        with pytest.raises(ValueError, match="expected a floating batch"):
            way(sde, score, x)


class TestFlowField:
    def test_it_is_the_slope_of_the_state(self):
        """Against the change of w = x / c along `sde.flow`, by differences."""
        for sde in SDES.values():
            score = gaussian().score(sde)
            for flow in (WhitenedFlow(data_std=0.5), PlainFlow()):
                times = FlowTimes(flow, sde, sde.T, sde.t_end)
                t = torch.tensor([0.3, 0.7], dtype=torch.float64)
                u, h = flow.clock(sde, t), 1e-6
                x = torch.tensor([[0.3, -0.2], [1.0, 0.4]], dtype=torch.float64)
                (slope,) = FlowField(times, score, torch.float64)(u, (x / flow.scale(sde, t).unsqueeze(1),))
                velocity = sde.flow(score, x, t)
                ahead, behind = ((x + k * velocity) / flow.scale(sde, t + k).unsqueeze(1) for k in (h, -h))
                rate = (flow.clock(sde, t + h) - flow.clock(sde, t - h)).unsqueeze(1)
                assert torch.allclose(slope, (ahead - behind) / rate, rtol=1e-5, atol=1e-6)

    def test_it_takes_the_score_along(self):
        class Shifted:
            def __init__(self, shift):
                self.shift = shift

            def take(self, index):
                return Shifted(self.shift[index])

            def __call__(self, x, t):
                return self.shift - x

        sde = SDES["vp"]
        field = FlowField(FlowTimes(WhitenedFlow(), sde, 1e-3, 1.0), Shifted(torch.randn(4, 2).double()), torch.float64)
        u, w = torch.linspace(-2, 1, 4, dtype=torch.float64), torch.randn(4, 2).double()
        index = torch.tensor([2, 0])
        assert torch.equal(field.take(index)(u[index], (w[index],))[0], field(u, (w,))[0][index])
        assert (
            field.take(index).weight is not None
            and FlowField(FlowTimes(PlainFlow(), sde, 1e-3, 1.0), Shifted(w), torch.float64).weight is None
        )

    def test_a_score_of_another_shape_is_refused(self):
        sde, x = SDES["vp"], torch.zeros(3, 2)
        with pytest.raises(ValueError, match=r"score of shape \(3, 1\) for x of shape \(3, 2\)"):
            transport(FlowTimes(WhitenedFlow(), sde, 1e-3, 1.0), lambda x, t: x[:, :1], x, Dopri5())
        assert check_score(x, x) is x


def test_transport_there_and_back_is_the_identity():
    for sde in SDES.values():
        law = gaussian()
        x = law.marginal_sample(sde, 4, 0.01, generator=torch.Generator().manual_seed(0))
        solver, score, flow = Dopri5(rtol=1e-9, atol=1e-9), law.score(sde), WhitenedFlow()
        there = transport(FlowTimes(flow, sde, 0.01, 0.6), score, x, solver)
        assert torch.allclose(law.whiten(sde, there.x, 0.6), law.whiten(sde, x, 0.01), atol=1e-7)
        back = transport(FlowTimes(flow, sde, 0.6, 0.01), score, there.x, solver)
        assert torch.allclose(back.x, x, atol=1e-7)
        assert torch.allclose(back.reached, torch.full((4,), 0.01, dtype=torch.float64))
        assert bool(back.converged.all()) and float(back.solver_error.max()) < 1e-6
