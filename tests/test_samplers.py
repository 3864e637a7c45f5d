"""What holds for every sampler: the contract, cost, identities, independence of the batch, and refusals."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from oracles import SDES, mixture

import numerics
import samplers
import sde_lib
from numerics import RK4, Dopri5, Heun, SampleStreams, SciPy, TorchDiffEq
from samplers import (
    DDIM,
    DEIS,
    SEEDS,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    ClipDenoised,
    DDPMIndices,
    DPMSolver,
    DynamicThreshold,
    EulerMaruyama,
    HeunEDM,
    Karras,
    Langevin,
    LogSNR,
    PredictorCorrector,
    ProbabilityFlow,
    Progress,
    ReverseDiffusion,
    SamplingError,
    Temperature,
    TorchSDE,
    Trajectory,
    Uniform,
    UniPC,
    all_of,
)
from sde_lib import VPSDE, SubVPSDE, WhitenedFlow

PREDICTORS = [EulerMaruyama(), ReverseDiffusion(), Ancestral(), Ancestral(variance="transition"), None]
CORRECTORS = [Langevin(), Langevin(steps=2), AnnealedLangevin(), AnnealedLangevin(step_size=2e-5), None]

# name -> (sampler of N steps, evaluations of a run without denoising)
ON_A_GRID = {
    "ddim": (lambda n, **o: DDIM(steps=n, **o), lambda n: n),
    "ddim_one": (lambda n, **o: DDIM(steps=n, eta=1.0, **o), lambda n: n),
    "dpm_solver_1": (lambda n, **o: DPMSolver(steps=n, order=1, **o), lambda n: n),
    "dpm_solver_2": (lambda n, **o: DPMSolver(steps=n, order=2, **o), lambda n: n),
    "dpm_solver_3": (lambda n, **o: DPMSolver(steps=n, order=3, **o), lambda n: n),
    "dpm_solver_sde": (lambda n, **o: DPMSolver(steps=n, order=2, stochastic=True, **o), lambda n: n),
    "unipc_2": (lambda n, **o: UniPC(steps=n, order=2, **o), lambda n: n),
    "unipc_3": (lambda n, **o: UniPC(steps=n, order=3, **o), lambda n: n),
    "deis": (lambda n, **o: DEIS(steps=n, **o), lambda n: n),
    "deis_4": (lambda n, **o: DEIS(steps=n, order=4, variable="t", **o), lambda n: n),
    "edm": (lambda n, **o: HeunEDM(steps=n, **o), lambda n: 2 * n),
    "edm_churn": (lambda n, **o: HeunEDM(steps=n, churn=5.0, noise_scale=1.003, **o), lambda n: 2 * n),
    "seeds_1": (lambda n, **o: SEEDS(steps=n, order=1, **o), lambda n: n),
    "seeds_3": (lambda n, **o: SEEDS(steps=n, order=3, **o), lambda n: 3 * n),
    "ald": (lambda n, **o: AnnealedLangevin(levels=n + 1, steps=2, **o), lambda n: 2 * (n + 1)),
    "torchsde_euler": (lambda n, **o: TorchSDE(steps=n, **o), lambda n: n),
    "torchsde_srk": (lambda n, **o: TorchSDE(steps=n, solver="srk", **o), lambda n: 4 * n),
    "flow_heun": (lambda n, **o: ProbabilityFlow(solver=Heun(steps=n), **o), lambda n: 2 * n),
    "flow_rk4_karras": (
        lambda n, **o: ProbabilityFlow(**{"solver": RK4(steps=n), "grid": Karras(), **o}),
        lambda n: 4 * n,
    ),
}
for p in PREDICTORS:
    for c in CORRECTORS:
        if p is None and c is None:
            continue
        for order in ("corrector_first", "predictor_first")[: 1 if c is None else 2]:
            key = f"pc {p} {type(c).__name__}{'' if c is None else (c.steps, getattr(c, 'step_size', 0))} {order}"
            ON_A_GRID[key] = (
                lambda n, p=p, c=c, order=order, **o: PredictorCorrector(
                    predictor=p, corrector=c, steps=n, order=order, **o
                ),
                lambda n, p=p, c=c: n * ((p is not None) + (0 if c is None else c.steps)),
            )
ADAPTIVE = {
    "flow_dopri5": ProbabilityFlow(),
    "adaptive_sde": AdaptiveSDE(rtol=0.05, atol=0.05),
}


def counted(score):
    def call(x, t):
        call.calls += 1
        assert t.shape == x.shape[:1]
        return score(x, t)

    call.calls = 0
    return call


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", ON_A_GRID)
def test_cost_times_and_finiteness_at_few_steps(method: str, name: str) -> None:
    """N = 1, 2, 5, 10: finite, of the right shape and dtype, at the declared number of calls, on the declared times."""
    make, cost = ON_A_GRID[method]
    sde = SDES[name]
    if "2e-05" in method and name == "sub_vp":
        with pytest.raises(ValueError, match="above which the chain diverges"):
            make(5)(sde, mixture().score(sde), (3, 2))
        return
    for n in (1, 2, 5, 10):
        for denoise in (True, False):
            score = counted(mixture().score(sde))
            sampler = make(n, denoise=denoise)
            result = sampler(sde, score, (3, 2), generator=SampleStreams(1), keep_path=True, dtype=torch.float64)
            assert result.x.shape == (3, 2)
            assert result.x.dtype == torch.float64
            assert bool(result.x.isfinite().all())
            assert float(result.x.abs().max()) < 1e3 * sde.prior_std
            assert result.nfe == score.calls == cost(n) + int(denoise) == sampler.evaluations
            assert (float(result.times[0]), float(result.times[-1])) == (sde.T, sde.t_end)
            assert result.path.shape == (*result.times.shape, 3, 2)
            if not denoise:
                assert torch.equal(result.path[-1], result.x)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_cost(method: str, name: str) -> None:
    sde, sampler = SDES[name], ADAPTIVE[method]
    score = counted(mixture().score(sde))
    result = sampler(sde, score, (5, 2), generator=SampleStreams(1), dtype=torch.float64)
    assert result.nfe == score.calls
    assert int(result.nfe_per_sample.max()) == result.nfe
    assert (result.times, result.path, sampler.evaluations) == (None, None, None)
    assert bool(result.x.isfinite().all())


def test_denoising_is_tweedie_at_the_end_of_the_path() -> None:
    for sde in SDES.values():
        score = mixture().score(sde)
        for sampler in (DDIM(steps=9), AnnealedLangevin(levels=9), ProbabilityFlow(solver=RK4(steps=9), denoise=True)):
            result = sampler(sde, score, (4, 2), generator=SampleStreams(0), keep_path=True, dtype=torch.float64)
            expected = sde_lib.denoised(sde, score, result.path[-1], sde.t_end)
            assert float((result.x - expected).abs().max()) < 1e-12


def test_the_corrector_comes_before_or_after_the_predictor() -> None:
    def times(order):
        seen = []

        def score(x, t):
            seen.append(float(t[0]))
            return -x

        sampler = PredictorCorrector(grid=[1.0, 0.6, 0.2], order=order, denoise=False)
        sampler(VPSDE(), score, (2, 2))
        return seen

    assert times("corrector_first") == [1.0, 1.0, 0.6, 0.6]
    assert times("predictor_first") == [1.0, 0.6, 0.6, 0.2]


def test_within_a_budget() -> None:
    for name in samplers.available():
        sampler = samplers.create(name)
        if sampler.evaluations is None:
            with pytest.raises(ValueError, match="set its tolerance"):
                sampler.within(20)
            continue
        assert 17 <= sampler.within(20).evaluations <= 20, sampler
        with pytest.raises(ValueError, match="budget of 0"):
            sampler.within(0)


# -- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
def test_identities(sde) -> None:
    score = mixture().score(sde)

    def run(sampler):
        return sampler(sde, score, (16, 2), generator=SampleStreams(3), dtype=torch.float64).x

    def close(a, b):
        assert float((run(a) - run(b)).abs().max()) < 1e-9, (a, b)

    for grid in (None, Uniform(), LogSNR(), DDPMIndices(spacing="trailing")):
        ancestral = PredictorCorrector(predictor=Ancestral(), corrector=None, steps=25, grid=grid)
        close(DDIM(steps=25, eta=1.0, grid=grid), ancestral)
    close(DDIM(steps=25, eta=1.0, grid=LogSNR()), DPMSolver(order=1, steps=25, stochastic=True, grid=LogSNR()))
    close(DDIM(steps=25, grid=LogSNR()), DPMSolver(order=1, steps=25, grid=LogSNR()))
    close(DDIM(steps=25, grid=Karras()), DEIS(order=1, steps=25, grid=Karras()))
    # x_s of order 1 without noise of SEEDS and of the reverse diffusion differ; its first stage is DDIM's twofold
    close(samplers.create("reverse_diffusion", steps=9), PredictorCorrector(corrector=None, steps=9))
    close(
        PredictorCorrector(corrector=Langevin(snr=1e-12), steps=9, predictor=EulerMaruyama(stochasticity=0.0)),
        PredictorCorrector(corrector=None, steps=9, predictor=EulerMaruyama(stochasticity=0.0)),
    )
    close(PredictorCorrector(corrector=Langevin(), steps=9), PredictorCorrector(corrector=AnnealedLangevin(), steps=9))


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
@pytest.mark.parametrize(
    ("solver", "bound"),
    [
        (Dopri5(rtol=1e-8, atol=1e-8), None),
        (RK4(steps=200), 1e-5),
        (TorchDiffEq(rtol=1e-8), 1e-5),
        (SciPy(rtol=1e-8), 1e-5),
    ],
    ids=lambda v: type(v).__name__,
)
def test_encode_then_decode_returns_the_data(sde, solver, bound) -> None:
    score = mixture().score(sde)
    x = mixture().marginal_sample(sde, 6, sde.t_end, generator=torch.Generator().manual_seed(0))
    flow = ProbabilityFlow(solver=solver, flow=WhitenedFlow(data_std=0.9))
    encoding = flow.encode(sde, score, x)
    back = flow.decode(sde, score, encoding.x)
    error = (back.x - x).square().mean(dim=1).sqrt()
    if bound is None:
        # each way has its stated error, and the way back carries the first one along
        stated = back.solver_error + encoding.solver_error * sde.sigma(sde.t_end) / sde.sigma(sde.T) * 100
        assert bool((error <= 4 * stated + 1e-9).all()), (error, stated)
        assert float(stated.max()) < 1e-4
    else:
        assert float(error.max()) < bound
    assert encoding.x.shape == x.shape
    assert int(encoding.evaluations.max()) == encoding.nfe
    # decoding is sampling from that latent
    again = flow(sde, score, x.shape, x_T=encoding.x)
    assert torch.equal(again.x, back.x)


def test_solvers_of_others_agree_with_ours() -> None:
    sde = VPSDE()
    score = mixture().score(sde)
    x_T = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solvers = (Dopri5(rtol=1e-8, atol=1e-8), TorchDiffEq(rtol=1e-8), SciPy(rtol=1e-8))
    a, b, c = (ProbabilityFlow(solver=s)(sde, score, (8, 2), x_T=x_T).x for s in solvers)
    assert float((a - b).abs().max()) < 1e-5
    assert float((a - c).abs().max()) < 1e-5


# -- randomness -----------------------------------------------------------------------------------------------------

INDEPENDENT = {
    **{k: ON_A_GRID[k][0](8) for k in ON_A_GRID if "2e-05" not in k},
    **ADAPTIVE,
    "norm_sample": PredictorCorrector(corrector=Langevin(norm="sample"), steps=8),
    "threshold": DDIM(steps=8, corrections=(DynamicThreshold(quantile=0.6),)),
}


@pytest.mark.parametrize("method", INDEPENDENT)
def test_a_sample_does_not_depend_on_its_batch(method: str) -> None:
    """Sample i is the same alone, in another order, in a larger batch, and beside a far outlier."""
    sampler, sde = INDEPENDENT[method], SDES["sub_vp"]
    score = mixture().score(sde)

    def draw(ids, x_T=None):
        shape = (len(ids), 2)
        return sampler(sde, score, shape, x_T=x_T, generator=SampleStreams(5, ids), dtype=torch.float64).x

    whole = draw(range(9))
    assert float((draw([7]) - whole[7]).abs().max()) < 1e-9
    assert float((draw([6, 2, 4]) - whole[[6, 2, 4]]).abs().max()) < 1e-9
    assert float((draw(range(3)) - whole[:3]).abs().max()) < 1e-9
    x_T = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outlier = torch.cat([x_T, torch.full((1, 2), 300.0, dtype=torch.float64)])
    assert float((draw(range(3), x_T) - draw(range(4), outlier)[:3]).abs().max()) < 1e-9


def test_the_same_seed_gives_the_same_samples_and_another_does_not() -> None:
    for sampler in (PredictorCorrector(steps=5), AdaptiveSDE(), TorchSDE(steps=5), DDIM(steps=5)):
        for make in (lambda seed: torch.Generator().manual_seed(seed), SampleStreams):
            a, b, c = (sampler(VPSDE(), mixture().score(VPSDE()), (4, 2), generator=make(s)).x for s in (1, 1, 2))
            assert torch.equal(a, b)
            assert not torch.equal(a, c)


def test_streams_go_on_where_a_run_left_them() -> None:
    """Two runs from one object are different noise, also after samples have left an adaptive run."""
    for sampler in (AdaptiveSDE(), PredictorCorrector(steps=5)):
        streams = SampleStreams(1)
        a, b = (sampler(VPSDE(), mixture().score(VPSDE()), (4, 2), generator=streams).x for _ in range(2))
        assert not torch.equal(a, b)
    streams = SampleStreams(1)
    AdaptiveSDE()(VPSDE(), mixture().score(VPSDE()), (4, 2), generator=streams)
    assert streams.draw == 1 + AdaptiveSDE().max_steps  # x_T, and all attempts, of whichever the slowest sample needed


def test_global_randomness_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for sampler in (PredictorCorrector(steps=3), AdaptiveSDE(), TorchSDE(steps=3), HeunEDM(steps=3, churn=1.0)):
        sampler(VPSDE(), mixture().score(VPSDE()), (2, 2), generator=SampleStreams(0))
    assert torch.equal(torch.get_rng_state(), before)


# -- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", INDEPENDENT)
def test_images_and_square_batches_are_flat_vectors_in_disguise(method: str) -> None:
    """(B, C, H, W) gives what (B, D) gives, reshaped; and (B, D) with B = D mixes no axes."""
    from sde_lib.analytic import GaussianMixture

    sde, sampler = SDES["vp"], INDEPENDENT[method]
    means = torch.linspace(-1, 1, 16).reshape(2, 8)
    stds, weights = torch.tensor([0.3, 0.5]), torch.tensor([0.5, 0.5])
    flat, image = GaussianMixture(means, stds, weights), GaussianMixture(means.reshape(2, 2, 2, 2), stds, weights)
    options = {"generator": SampleStreams(2), "dtype": torch.float64}
    a = sampler(sde, flat.score(sde), (8, 8), **options).x  # B = D
    options["generator"] = SampleStreams(2)
    b = sampler(sde, image.score(sde), (8, 2, 2, 2), **options).x
    assert b.shape == (8, 2, 2, 2)
    assert float((a - b.flatten(1)).abs().max()) < 1e-9
    options["generator"] = SampleStreams(2, range(3))
    assert float((sampler(sde, flat.score(sde), (3, 8), **options).x - a[:3]).abs().max()) < 1e-9


def test_the_dtype_of_x_is_kept_and_the_score_sees_it() -> None:
    sde = SubVPSDE()

    def score(x, t):
        assert x.dtype == torch.float32
        return mixture().score(sde)(x, t)

    for name in samplers.available():
        sampler = samplers.create(name)
        sampler = sampler if sampler.evaluations is None else sampler.within(24)
        result = sampler(sde, score, (3, 2), generator=SampleStreams(0), dtype=torch.float32)
        assert result.x.dtype == torch.float32
        assert not result.x.requires_grad


# -- corrections ----------------------------------------------------------------------------------------------------


def test_clipping_bounds_the_denoised_mean_and_no_more() -> None:
    sde = VPSDE()
    score, x = mixture().score(sde), 3 * torch.randn(50, 2, dtype=torch.float64)
    t = torch.full((50,), 0.3, dtype=torch.float64)
    plain = sde_lib.denoised(sde, score, x, t)
    clipped = sde_lib.denoised(sde, ClipDenoised(low=-0.8, high=0.9)(sde, score), x, t)
    assert float((clipped - plain.clamp(-0.8, 0.9)).abs().max()) < 1e-12
    clipping = DDIM(steps=5, corrections=ClipDenoised(low=-0.5, high=0.5))
    result = clipping(sde, score, (50, 2), generator=SampleStreams(0))
    assert float(result.x.abs().max()) <= 0.5 + 1e-5
    assert result.nfe == 6


def test_dynamic_thresholding_scales_each_sample_by_its_own_quantile() -> None:
    x_0 = torch.tensor([[0.1, -0.2, 0.3, 0.4], [0.5, -1.0, 2.0, 4.0]], dtype=torch.float64)
    out = DynamicThreshold(quantile=0.75).denoised(x_0)
    assert torch.equal(out[0], x_0[0])  # within the range already
    assert out[1].tolist() == pytest.approx([0.25, -0.5, 1.0, 1.0])


def test_a_corrected_score_keeps_its_per_sample_data() -> None:
    class Labelled:
        def __init__(self, labels):
            self.labels = labels

        def __call__(self, x, t):
            return (self.labels.unsqueeze(1) - x) / 4

        def take(self, index):
            return Labelled(self.labels[index])

    labels = torch.tensor([1.0, 2.0, 3.0])
    corrected = ClipDenoised()(VPSDE(), Labelled(labels)).take(torch.tensor([2, 0]))
    assert corrected.score.labels.tolist() == [3.0, 1.0]
    for sampler in (AdaptiveSDE(corrections=(Temperature(tau=0.9),)), ProbabilityFlow()):
        whole = sampler(VPSDE(), Labelled(labels.double()), (3, 2), generator=SampleStreams(0), dtype=torch.float64).x
        one = sampler(
            VPSDE(), Labelled(labels[1:2].double()), (1, 2), generator=SampleStreams(0, [1]), dtype=torch.float64
        ).x
        assert float((whole[1] - one[0]).abs().max()) < 1e-12


class LearnedVariance:
    """The exact score with a place between the variances' bounds, from one call."""

    def __init__(self, sde, place: float) -> None:
        self.score, self.place = mixture().score(sde), place

    def __call__(self, x, t):
        return self.score(x, t)

    def score_and_variance(self, x, t):
        return self.score(x, t), torch.full_like(x, self.place)


def test_learned_variance_runs_between_its_bounds_at_one_evaluation_a_step() -> None:
    sde = VPSDE()
    ends = {}
    for place, bound in ((0.0, "posterior"), (1.0, "transition")):
        learned = PredictorCorrector(predictor=Ancestral(variance="learned"), corrector=None, steps=6)
        fixed = PredictorCorrector(predictor=Ancestral(variance=bound), corrector=None, steps=6)
        score = LearnedVariance(sde, place)
        a = learned(sde, score, (5, 2), generator=SampleStreams(0), dtype=torch.float64)
        b = fixed(sde, score, (5, 2), generator=SampleStreams(0), dtype=torch.float64)
        assert float((a.x - b.x).abs().max()) < 1e-10
        assert a.nfe == b.nfe == 7
        ends[bound] = a.x
    assert not torch.allclose(ends["posterior"], ends["transition"])
    with pytest.raises(ValueError, match='use variance="posterior"'):
        learned(sde, mixture().score(sde), (5, 2))


# -- callbacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [DDIM(steps=6), PredictorCorrector(steps=6), ProbabilityFlow(solver=RK4(steps=6))])
def test_callbacks_are_told_every_step(sampler) -> None:
    sde, seen = VPSDE(), []
    trajectory = Trajectory()
    result = sampler(
        sde,
        mixture().score(sde),
        (3, 2),
        generator=SampleStreams(0),
        keep_path=True,
        callback=all_of(seen.append, trajectory, None),
    )
    assert [info.step for info in seen] == [1, 2, 3, 4, 5, 6]
    assert {info.steps for info in seen} == {6}
    assert [info.t for info in seen] == pytest.approx(result.times[1:].tolist())
    assert [info.nfe for info in seen] == [(i + 1) * (result.nfe // 6) for i in range(6)]
    assert torch.allclose(torch.stack(trajectory.frames), result.path[1:])
    assert trajectory.times == [info.t for info in seen]


def test_the_denoised_estimate_is_the_last_evaluations_and_costs_nothing() -> None:
    sde = VPSDE()
    score, estimates = counted(mixture().score(sde)), []
    result = DDIM(steps=6, denoise=False)(
        sde,
        score,
        (3, 2),
        generator=SampleStreams(0),
        keep_path=True,
        dtype=torch.float64,
        callback=lambda info: estimates.append(info.denoised),
    )
    assert score.calls == 6
    for i, estimate in enumerate(estimates):
        expected = sde_lib.denoised(sde, score, result.path[i], float(result.times[i]))
        assert float((estimate - expected).abs().max()) < 1e-12
    every_other = Trajectory(every=4, what="denoised")
    DDIM(steps=6)(sde, score, (3, 2), callback=every_other)
    assert len(every_other.frames) == 2  # the fourth and the last
    with pytest.raises(ValueError, match="no denoised estimate"):
        AdaptiveSDE()(sde, score, (3, 2), callback=Trajectory(what="denoised"))


def test_the_adaptive_solvers_tell_a_time_per_sample(capsys) -> None:
    for sampler in (AdaptiveSDE(), ProbabilityFlow()):
        seen = []
        with Progress(disable=True) as bar:
            result = sampler(
                VPSDE(), mixture().score(VPSDE()), (3, 2), generator=SampleStreams(0), callback=all_of(seen.append, bar)
            )
        assert all(info.t.shape == (3,) and info.x.shape == (3, 2) and info.steps is None for info in seen)
        assert seen[-1].t.tolist() == pytest.approx([1e-3] * 3)
        assert float((seen[-1].x - result.x).abs().max()) < 0.2  # before denoising


# -- names and code -------------------------------------------------------------------------------------------------


def test_the_repr_of_a_sampler_is_the_code_that_makes_it() -> None:
    names = {**vars(numerics), **vars(sde_lib), **vars(samplers)}
    made = [
        *(make(7) for make, _ in ON_A_GRID.values()),
        *ADAPTIVE.values(),
        *(samplers.create(n) for n in samplers.available()),
        DDIM(grid=[1.0, 0.5, 0.1], corrections=(ClipDenoised(high=2.0), Temperature(tau=0.5))),
        HeunEDM(churn_max=50.0, grid=Karras(rho=3.0, t_end=0.01)),
        ProbabilityFlow(solver=SciPy(), flow=WhitenedFlow(data_std=0.5)),
    ]
    for sampler in made:
        assert eval(repr(sampler), names) == sampler, sampler
        assert dataclasses.is_dataclass(sampler)
    assert repr(DDIM(steps=20)) == "DDIM(steps=20)"


def test_names_and_their_options() -> None:
    assert set(samplers.available()) >= {
        *("pc", "ald", "ancestral", "euler_maruyama", "ode", "ddim", "dpm_solver", "unipc", "heun", "deis"),
        *("adaptive_sde", "seeds", "torchsde"),
    }
    create = samplers.create
    assert create("pc", steps=10, snr=0.1, corrector_steps=2) == PredictorCorrector(
        steps=10, corrector=Langevin(snr=0.1, steps=2)
    )
    assert create("pc", predictor="ancestral", corrector="none") == create("ancestral")
    assert create("ancestral", variance="transition", steps=3) == PredictorCorrector(
        predictor=Ancestral(variance="transition"), corrector=None, steps=3
    )
    assert create("ode", solver="rk4", steps=9, grid="karras") == ProbabilityFlow(solver=RK4(steps=9), grid=Karras())
    assert create("ddim", clip=True, eta=0.5) == DDIM(eta=0.5, corrections=(ClipDenoised(),))
    assert create("ode") == ProbabilityFlow()
    assert create("ode", steps=12) == ProbabilityFlow(solver=Heun(steps=12))
    assert create("ode", rtol=1e-3) == ProbabilityFlow(solver=Dopri5(rtol=1e-3))
    assert create("ald", steps=12, corrector_steps=5) == AnnealedLangevin(levels=12, steps=5)


def test_a_missing_package_leaves_its_sampler_out(monkeypatch) -> None:
    from numerics import catalogue

    monkeypatch.setattr(catalogue, "find_spec", lambda name: None)
    assert "torchsde" not in samplers.available()
    assert "ddim" in samplers.available()
    with pytest.raises(ValueError, match="needs the package torchsde"):
        samplers.create("torchsde")


# -- refusals -------------------------------------------------------------------------------------------------------


def call(sampler, shape=(3, 2), **options):
    return sampler(VPSDE(), mixture().score(VPSDE()), shape, **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDIM(steps=0), "steps=0; expected an integer >= 1"),
        (lambda: DPMSolver(steps=2.0), "expected an integer >= 1"),
        (lambda: PredictorCorrector(steps=-1), "expected an integer >= 1"),
        (lambda: AnnealedLangevin(levels=1), "levels=1; expected an integer >= 2"),
        (lambda: DDIM(eta=1.5), r"eta=1.5; expected a number in \[0, 1\]"),
        (lambda: DPMSolver(order=4), "order=4; expected one of 1, 2, 3"),
        (lambda: UniPC(order=0), "expected one of 1, 2, 3"),
        (lambda: DEIS(variable="kappa"), "'t', 'log_kappa'"),
        (lambda: HeunEDM(churn=-1.0), "churn=-1.0"),
        (lambda: SEEDS(order=4), "order=4"),
        (lambda: TorchSDE(solver="heun"), "'euler', 'milstein', 'srk'"),
        (lambda: AdaptiveSDE(rtol=0.0, atol=0.0), "one of them > 0"),
        (lambda: AdaptiveSDE(safety=2.0), "safety=2.0"),
        (lambda: Langevin(snr=0.0), "snr=0.0"),
        (lambda: Langevin(snr=1.0), "snr=1; expected less than 1"),
        (lambda: AnnealedLangevin(snr=1.5), "snr=1.5; expected less than 1"),
        (lambda: Langevin(norm="l2"), "'batch', 'sample'"),
        (lambda: Langevin(steps=0), "steps=0"),
        (lambda: EulerMaruyama(stochasticity=-0.1), "stochasticity"),
        (lambda: Ancestral(variance="small"), "'posterior', 'transition', 'learned'"),
        (lambda: PredictorCorrector(predictor=None, corrector=None), "expected at least one"),
        (lambda: PredictorCorrector(predictor=Langevin()), r"such as ReverseDiffusion\(\)"),
        (lambda: PredictorCorrector(corrector="langevin"), r"such as Langevin\(\)"),
        (lambda: PredictorCorrector(sequence="both"), "sequence='both'; expected one of 'corrector_first'"),
        (lambda: ProbabilityFlow(solver="rk45"), r"such as Dopri5\(\)"),
        (lambda: ProbabilityFlow(flow=3), "WhitenedFlow"),
        (lambda: DDIM(corrections=(abs,)), "ClipDenoised"),
        (lambda: ClipDenoised(low=1.0, high=-1.0), "low < high"),
        (lambda: DynamicThreshold(quantile=1.0), r"in \(0, 1\)"),
        (lambda: Temperature(tau=0.0), "finite number > 0"),
        (lambda: Trajectory(every=0), "every=0"),
        (lambda: DDIM(grid=[0.1, 1.0]), "strictly decreasing"),
        (lambda: DDIM(grid="karras"), "such as Karras"),
        (lambda: DDIM(corrections=3), "ClipDenoised"),
        (lambda: DDIM(grid=[1.0, 0.5, 0.1], steps=7), "leave steps out"),
        (lambda: call(DDIM(grid=[2.0, 0.5])), r"within \[1e-05, 1\]"),
        (lambda: call(DDIM(grid=[1.0, 1e-7])), r"within \[1e-05, 1\]"),
        (lambda: call(DDIM(steps=3, grid=lambda sde, n: torch.linspace(1, 0.1, n))), "strictly decreasing"),
        (lambda: call(DDIM(steps=3, grid=Uniform(t_start=0.5))), "give x_T"),
        (lambda: call(DDIM(steps=3), shape=()), r"expected \(B, \*\)"),
        (lambda: call(DDIM(steps=3), shape=(0, 2)), r"expected \(B, \*\)"),
        (lambda: call(DDIM(steps=3), shape=7), r"expected \(B, \*\)"),
        (lambda: call(DDIM(steps=3), dtype=torch.int64), "floating"),
        (lambda: call(DDIM(steps=3), x_T=torch.zeros(2, 2)), r"shape \(2, 2\); expected shape=\(3, 2\)"),
        (lambda: call(DDIM(steps=3), x_T=torch.zeros(3, 2, dtype=torch.int64)), "convert it"),
        (lambda: call(DDIM(steps=3), shape=(8,)), r"give \(8, 1\)"),
        (lambda: call(AdaptiveSDE(), keep_path=True), "method on a grid"),
        (lambda: call(ProbabilityFlow(), keep_path=True), "solver on a grid"),
        (lambda: ProbabilityFlow().encode(VPSDE(), abs, torch.zeros(3, 2, dtype=torch.int64)), "convert it"),
        (lambda: samplers.create("ddmi"), "expected one of pc, ald"),
        (
            lambda: samplers.create("ddim", eat=1),
            "'eat' for the sampler 'ddim', did you mean 'eta'.*some of .*steps, eta",
        ),
        (lambda: samplers.create("pc", corrector="mala"), "'mala'.*expected one of langevin, ald"),
        (lambda: samplers.create("ode", solver="rk5"), "expected one of dopri5, heun, rk4"),
        (lambda: samplers.create("ddim", grid="square"), "expected one of uniform"),
        (lambda: samplers.create("ode", solver="rk4", rtol=0.1), r"rtol=0.1 for solver=RK4\(.*some of steps"),
        (lambda: samplers.create("pc", corrector="none", snr=0.1), "snr=0.1 for corrector=None"),
        (lambda: samplers.create("adaptive_sde", steps=5), "'steps' for the sampler 'adaptive_sde'"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(make, words) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("method", [*(m for m in ON_A_GRID if "(2, " not in m), *ADAPTIVE])
def test_a_score_that_becomes_nan_stops_the_run_and_names_the_time(method: str) -> None:
    sampler = ADAPTIVE[method] if method in ADAPTIVE else ON_A_GRID[method][0](10)
    sde = VPSDE()

    def score(x, t):
        value = mixture().score(sde)(x, t)
        return torch.where((t < 0.3).unsqueeze(1), math.nan, value)

    with pytest.raises(SamplingError, match="of 3 samples") as caught:
        sampler(sde, score, (3, 2), generator=SampleStreams(0), dtype=torch.float64)
    times = [float(v) for v in re.findall(r"(?:t =|to) ([0-9.]+)", str(caught.value))]
    assert 1 <= len(times) <= 2
    assert times[-1] < 0.3 or method in ("flow_heun", "flow_rk4_karras", *ADAPTIVE)
    assert 0.1 < times[0] < 0.5  # the step that meets 0.3, or the last time that was right
    assert "expected" in str(caught.value) or "look at" in str(caught.value)


def test_nan_is_noticed_before_the_run_is_over() -> None:
    """Within fifty steps, although the device is not asked at each."""
    calls = 0

    def score(x, t):
        nonlocal calls
        calls += 1
        return torch.full_like(x, math.nan if calls > 100 else 0.0)

    with pytest.raises(SamplingError, match="step 101 of 1000"):
        DDIM(steps=1000)(VPSDE(), score, (3, 2))
    assert calls <= 150


def test_a_score_of_another_shape_is_refused() -> None:
    for sampler in (DDIM(steps=3), ProbabilityFlow()):
        with pytest.raises(ValueError, match=r"score of shape \(3,\)"):
            sampler(VPSDE(), lambda x, t: x[:, 0], (3, 2))


def test_solvers_that_give_up_say_where() -> None:
    with pytest.raises(SamplingError, match="raise max_steps"):
        call(AdaptiveSDE(max_steps=3))
    with pytest.raises(SamplingError, match="of 3 samples: the first was last right at t = "):
        call(ProbabilityFlow(solver=Dopri5(rtol=1e-9, atol=1e-9, max_steps=5)))


def test_norms_of_the_langevin_step_are_the_published_ones() -> None:
    """e = 2 (alpha_t/alpha_s)^2 (snr |z| / |score|)^2, the norms averaged over the batch, or each sample's own; or sigma_t
    in their place."""
    sde = VPSDE()
    score, x = mixture().score(sde), torch.randn(4, 2, dtype=torch.float64)
    times = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
    z = SampleStreams(9).normal((4, 2))
    for norm in (None, "batch", "sample"):
        sampler = PredictorCorrector(
            predictor=None,
            corrector=Langevin(norm=norm, snr=0.1),
            grid=times,
            denoise=False,
            sequence="corrector_first",
        )
        # the first correction is at t = 0.5, before 0.2
        path = sampler(sde, score, (4, 2), x_T=x, generator=SampleStreams(9), keep_path=True).path
        s = score(x, torch.full((4,), 0.5))
        of_s, of_z = s.norm(dim=1, keepdim=True), z.norm(dim=1, keepdim=True)
        if norm == "batch":
            of_s, of_z = of_s.mean(), of_z.mean()
        ratio = sde.sigma(0.5) if norm is None else of_z / of_s
        e = 2 * (sde.alpha(0.5) / sde.alpha(0.2)) ** 2 * (0.1 * ratio) ** 2
        assert float((path[1] - (x + e * s + (2 * e).sqrt() * z)).abs().max()) < 1e-10


def test_ddims_encoding_keeps_its_digits_in_half_precision() -> None:
    """The state is in float32; the score alone is asked in float16."""
    sde, asked = SDES["vp"], set()
    x = mixture().sample(6, generator=torch.Generator().manual_seed(0)).half()

    def score(x, t):
        asked.add(x.dtype)
        return mixture().score(sde)(x.float(), t).to(x.dtype)

    half, fine = (DDIM(steps=200).encode(sde, score, each) for each in (x, x.float()))
    assert half.dtype == torch.float32 and asked == {torch.float16, torch.float32}
    assert float((half - fine).abs().max()) < 2e-3


def test_ddims_encoding_says_where_it_ends_to_be_finite() -> None:
    sde, x = SDES["vp"], torch.zeros(3, 2)
    x[1, 0] = math.nan
    with pytest.raises(SamplingError, match="step 1 of 10.* in 1 of 3 samples"):
        DDIM(steps=10).encode(sde, mixture().score(sde), x)
    with pytest.raises(SamplingError, match="step 10 of 10.* in 3 of 3 samples"):
        DDIM(steps=10).encode(sde, lambda x, t: x / (t.max() < 0.85), torch.ones(3, 2))


def test_what_is_drawn_after_an_adaptive_run_does_not_depend_on_the_batch() -> None:
    sde, score = SDES["vp"], mixture().score(SDES["vp"])
    sampler = AdaptiveSDE(rtol=0.2, atol=0.2)

    def twice(ids):
        streams = SampleStreams(0, ids)
        return [sampler(sde, score, (len(ids), 2), generator=streams, dtype=torch.float64).x for _ in range(2)]

    together = twice([0, 1, 2, 3])
    assert float((together[1] - together[0]).abs().min()) > 1e-6
    for i in range(4):
        for alone, mates in zip(twice([i]), together, strict=True):
            torch.testing.assert_close(alone, mates[i : i + 1], rtol=1e-9, atol=1e-9)
