"""Stochastic samplers draw from the right law: the bias of their steps, exactly, and their noise, by chi-square."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import (
    FAMILY_WISE,
    SDES,
    exact_law,
    fast_mixture_score,
    gaussian,
    law_error,
    mixture,
    moments,
    whitened_moments_p,
)

from numerics import Dopri5, SampleStreams
from samplers import (
    DDIM,
    SEEDS,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    EulerMaruyama,
    HeunEDM,
    Karras,
    Langevin,
    Logistic,
    LogSNR,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Temperature,
    TorchSDE,
    Uniform,
    UniPC,
)
from sde_lib import VESDE, VPSDE
from sde_lib.analytic import Gaussian


def pc(predictor, corrector=None, **options):
    return lambda n, grid: PredictorCorrector(
        predictor=predictor, corrector=corrector, steps=n, grid=grid, denoise=False, **options
    )


# weak order of the bias in mean and covariance, and the sampler of N steps
STOCHASTIC = {
    "euler_maruyama": (1, pc(EulerMaruyama())),
    "euler_maruyama_half": (1, pc(EulerMaruyama(stochasticity=0.5))),
    "reverse_diffusion": (1, pc(ReverseDiffusion())),
    "ancestral_posterior": (1, pc(Ancestral())),
    "ancestral_transition": (1, pc(Ancestral(variance="transition"))),
    "ddim_half": (1, lambda n, grid: DDIM(eta=0.5, steps=n, grid=grid, denoise=False)),
    "ddim_one": (1, lambda n, grid: DDIM(eta=1.0, steps=n, grid=grid, denoise=False)),
    "dpm_solver_sde_1": (1, lambda n, grid: DPMSolver(order=1, stochastic=True, steps=n, grid=grid, denoise=False)),
    "dpm_solver_sde_2": (2, lambda n, grid: DPMSolver(order=2, stochastic=True, steps=n, grid=grid, denoise=False)),
    "dpm_solver_half_2": (2, lambda n, grid: DPMSolver(order=2, stochastic=0.5, steps=n, grid=grid, denoise=False)),
    "dpm_solver_sde_3": (2, lambda n, grid: DPMSolver(order=3, stochastic=True, steps=n, grid=grid, denoise=False)),
    "edm_churn": (2, lambda n, grid: HeunEDM(churn=10.0, steps=n, grid=grid, denoise=False)),
    "seeds_1": (1, lambda n, grid: SEEDS(order=1, steps=n, grid=grid, denoise=False)),
    "seeds_2": (2, lambda n, grid: SEEDS(order=2, steps=n, grid=grid, denoise=False)),
    # two leading terms of opposite signs: 0.0016, 0.00056, 0.00017 at N = 40, 80, 160
    "seeds_3": (1.8, lambda n, grid: SEEDS(order=3, steps=n, grid=grid, denoise=False)),
    "seeds_1_noise": (1, lambda n, grid: SEEDS(order=1, prediction="noise", steps=n, grid=grid, denoise=False)),
    "seeds_2_noise": (2, lambda n, grid: SEEDS(order=2, prediction="noise", steps=n, grid=grid, denoise=False)),
    "seeds_3_noise": (2, lambda n, grid: SEEDS(order=3, prediction="noise", steps=n, grid=grid, denoise=False)),
}


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", STOCHASTIC)
def test_the_bias_of_a_step_falls_at_the_declared_rate(method: str, name: str) -> None:
    """On a Gaussian the law of the result is known without Monte Carlo: its error at N, 2N, 4N falls by 2^order.

    Faster is no failure: a leading term may cancel.
    """
    order, make = STOCHASTIC[method]
    sde, oracle = SDES[name], gaussian()
    truth = moments(oracle, sde, sde.t_end)
    grid = Uniform() if method.startswith("euler") else LogSNR()
    n = 320 if method.startswith("euler") and name == "ve" else 80
    errors = [law_error(exact_law(make(m, grid), sde, oracle, 3 * m), truth) for m in (n, 2 * n, 4 * n)]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert slopes[-1] > order - 0.15, (slopes, errors)
    assert errors[-1] < 0.1


@pytest.mark.parametrize("name", SDES)
def test_langevin_on_a_gaussian_has_its_own_stationary_variance(name: str) -> None:
    """v / (1 - e / (2 v)), with e = 2 (alpha_t/alpha_s)^2 (snr sigma_t)^2, at every level that the chain has time to
    reach, and so the right one as snr -> 0."""
    sde = SDES[name]
    oracle = Gaussian(torch.tensor([0.3]), torch.tensor([[0.7]]))
    grid = LogSNR(t_start=sde.T, t_end=0.9 * sde.T)
    times = grid(sde, 1)
    v = float(moments(oracle, sde, float(times[1]))[1])
    for snr in (0.3, Langevin().snr, 0.1):
        e = 2 * (snr * float(sde.sigma(times[1]))) ** 2
        law = exact_law(
            PredictorCorrector(
                predictor=None, corrector=Langevin(snr=snr, steps=600), steps=1, grid=grid, denoise=False
            ),
            sde,
            oracle,
            600,
        )
        assert float(law[1]) == pytest.approx(v / (1 - e / (2 * v)), rel=1e-6)
        assert float(law[0]) == pytest.approx(float(sde.alpha(times[1]) * 0.3), abs=1e-4)


NARROW = Gaussian(torch.tensor([0.5]), torch.tensor([[0.1]]))
"""Data of a variance at which a step's bias on VP is near its worst: 0.0069, 0.0023 at 0.1 and 1.4 for PredictorCorrector()."""


@pytest.mark.parametrize("name", SDES)
def test_the_defaults_step_bias_is_below_two_percent(name: str) -> None:
    """Of PredictorCorrector() as it is, Langevin at snr = 0.16 included: N against 2N, and against the true law."""
    sde = SDES[name]
    laws = [exact_law(PredictorCorrector(steps=n, denoise=False), sde, NARROW, 2 * n) for n in (1000, 2000)]
    assert PredictorCorrector().steps == 1000
    assert law_error(laws[0], laws[1]) < 0.004
    assert law_error(laws[0], moments(NARROW, sde, sde.t_end)) < 0.008


@pytest.mark.parametrize(("steps", "bias"), [(1000, 0.0227), (1500, 0.0154)])
def test_ancestral_steps_on_vp_leave_what_is_stated(steps: int, bias: float) -> None:
    """1,000 are a little too few for 2 %; DDIM of eta = 1 is the same method."""
    sde, truth = VPSDE(), moments(NARROW, VPSDE(), VPSDE().t_end)
    law = exact_law(pc(Ancestral())(steps, None), sde, NARROW, steps)
    assert law_error(law, truth) == pytest.approx(bias, rel=0.02)
    assert float(law[1]) < float(truth[1])
    assert law_error(exact_law(DDIM(eta=1.0, steps=steps, denoise=False), sde, NARROW, steps), law) < 1e-9


def wide() -> Gaussian:
    """A correlated Gaussian in 64 dimensions, its variances from 0.1 to 3.9."""
    generator = torch.Generator().manual_seed(7)
    A = torch.randn(64, 64, generator=generator, dtype=torch.float64) / 8
    mean = torch.randn(64, generator=generator, dtype=torch.float64)
    return Gaussian(mean, A @ A.T + 0.1 * torch.eye(64, dtype=torch.float64))


@pytest.mark.parametrize("name", SDES)
def test_the_bias_of_a_step_in_64_dimensions(name: str) -> None:
    sde, oracle = SDES[name], wide()
    truth = moments(oracle, sde, sde.t_end)
    errors = [
        law_error(exact_law(DPMSolver(order=2, stochastic=True, steps=n, denoise=False), sde, oracle, n), truth)
        for n in (30, 60)
    ]
    assert errors[1] < 0.02 and errors[0] / errors[1] > 3


def test_the_corrector_removes_an_error_of_the_predictor() -> None:
    sde, oracle = VPSDE(), gaussian()
    truth = moments(oracle, sde, sde.t_end)
    errors = [
        law_error(exact_law(pc(ReverseDiffusion(), corrector, order=order)(160, None), sde, oracle, 160 * draws), truth)
        for corrector, draws, order in (
            (None, 1, "corrector_first"),
            (Langevin(snr=0.16), 2, "corrector_first"),
            (Langevin(snr=0.16), 2, "predictor_first"),
        )
    ]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[0]


def test_annealed_langevin_is_ncsn_algorithm_one() -> None:
    """Against the published loop, written out: step alpha_i / 2 with alpha_i = e sigma_i^2 / sigma_L^2."""
    sde = VESDE(sigma_min=0.01, sigma_max=1.0, t_end=0.0, t_min=0.0)
    oracle = mixture()
    score = oracle.score(sde)
    x_T = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = AnnealedLangevin.ncsn()(sde, score, (5, 2), x_T=x_T, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(1)
    sigmas = torch.logspace(0, -2, 10, dtype=torch.float64)
    x = x_T
    for sigma in sigmas:
        t = torch.full((5,), float((sigma / 0.01).log() / math.log(100)), dtype=torch.float64)
        size = 2e-5 * sigma**2 / sigmas[-1] ** 2
        for _ in range(100):
            z = torch.randn(5, 2, dtype=torch.float64, generator=noise)
            x = x + size / 2 * score(x, t) + size.sqrt() * z
    assert float((result.x - x).abs().max()) < 1e-9
    assert (result.nfe, len(result.times)) == (1000, 11)
    # NCSNv2 ends with x + sigma_L^2 score
    t = torch.zeros(5, dtype=torch.float64)
    v2 = AnnealedLangevin(levels=10, steps=100, step_size=2e-5)(
        sde, score, (5, 2), x_T=x_T, generator=torch.Generator().manual_seed(1)
    )
    assert float((v2.x - (x + 0.01**2 * score(x, t))).abs().max()) < 1e-9
    assert v2.nfe == 1001


def test_annealed_langevin_tends_to_the_law_as_its_steps_become_small_and_many() -> None:
    sde = VESDE(sigma_min=0.5, sigma_max=10.0)
    oracle = gaussian()
    truth = moments(oracle, sde, sde.t_end)
    errors = [
        law_error(
            exact_law(AnnealedLangevin(snr=snr, steps=steps, levels=10, denoise=False), sde, oracle, 10 * steps),
            truth,
        )
        for snr, steps in ((0.4, 40), (0.2, 160))
    ]
    # the excess of variance, e / (2 v), falls with snr^2
    assert errors[1] < 0.04
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.7)


@pytest.mark.parametrize("name", SDES)
def test_temperature_gives_the_tempered_gaussian(name: str) -> None:
    """Data N(0, v I) at temperature tau are N(0, tau v I): exact for the flow with the corrected score."""
    sde, v, tau = SDES[name], 0.5, 0.6
    oracle = Gaussian(torch.zeros(2), torch.full((2,), v))
    cold = Gaussian(torch.zeros(2), torch.full((2,), v * tau))
    flow = ProbabilityFlow(solver=Dopri5(rtol=1e-8, atol=1e-8), corrections=(Temperature(tau=tau, data_std=v**0.5),))
    x_T = cold.marginal_sample(sde, 8, sde.T, generator=torch.Generator().manual_seed(0))
    x = flow(sde, oracle.score(sde), (8, 2), x_T=x_T).x
    scale = (moments(cold, sde, sde.t_end)[1][0, 0] / moments(cold, sde, sde.T)[1][0, 0]).sqrt()
    assert float((x / x_T / scale - 1).abs().max()) < 1e-5


# -- Monte Carlo ----------------------------------------------------------------------------------------------------

N_SAMPLES = 80_000  # four standard errors of a variance are 4 sqrt(2 / n) = 2 %

MIDDLE = Logistic(center=1.5, scale=2.0)

# Fixed-grid methods on the mixture; the numbers of steps keep the bias of the step below a standard error.
CASES = {
    "euler_maruyama": lambda name: pc(EulerMaruyama())(1500, MIDDLE),
    "reverse_diffusion": lambda name: pc(ReverseDiffusion())(2000, MIDDLE),
    "ancestral_posterior": lambda name: pc(Ancestral())(2500, MIDDLE),
    "ancestral_transition": lambda name: pc(Ancestral(variance="transition"))(1500, MIDDLE),
    "pc": lambda name: pc(ReverseDiffusion(), Langevin())(1000, MIDDLE),  # the default but for the grid
    "pc_ancestral": lambda name: pc(Ancestral(), Langevin())(500, MIDDLE),
    "pc_langevin": lambda name: pc(ReverseDiffusion(), Langevin(snr=0.03))(2000, MIDDLE),
    "pc_ald": lambda name: pc(EulerMaruyama(), AnnealedLangevin(snr=0.03), order="predictor_first")(1500, MIDDLE),
    "ddim_half": lambda name: DDIM(eta=0.5, steps=1500, grid=MIDDLE, denoise=False),
    "dpm_solver_sde_2": lambda name: DPMSolver(order=2, stochastic=True, steps=400, denoise=False),
    "dpm_solver_sde_3": lambda name: DPMSolver(order=3, stochastic=True, steps=300, denoise=False),
    "dpm_solver_2": lambda name: DPMSolver(order=2, steps=200, denoise=False),
    "unipc_2": lambda name: UniPC(order=2, steps=100, denoise=False),
    "edm_churn": lambda name: HeunEDM(churn=20.0, steps=300, denoise=False),
    "seeds_2_noise": lambda name: SEEDS(order=2, prediction="noise", steps=200, denoise=False),
    "seeds_3": lambda name: SEEDS(order=3, steps=100, denoise=False),
}
FAMILY = len(SDES) * (len(CASES) + 4)
FAST = [("dpm_solver_sde_2", "vp"), ("edm_churn", "ve"), ("seeds_3", "sub_vp"), ("pc_ancestral", "sub_vp")]


def check_law(sampler, name: str, seed: int, *, n: int = N_SAMPLES, score=None, dtype=torch.float32) -> None:
    sde, oracle = SDES[name], mixture()
    generator = torch.Generator().manual_seed(seed)
    x_T = oracle.marginal_sample(sde, n, sde.T, generator=generator).to(dtype)
    score = fast_mixture_score(sde) if score is None else score
    result = sampler(sde, score, x_T.shape, x_T=x_T, generator=generator)
    p = whitened_moments_p(oracle, sde, sde.t_end, result.x)
    assert p > FAMILY_WISE / FAMILY, p


def test_the_fast_score_is_the_oracles() -> None:
    for sde in SDES.values():
        x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for t in (1e-3, 0.3, 1.0):
            t = torch.full((64,), t, dtype=torch.float64)
            assert float((fast_mixture_score(sde)(x, t) / mixture().score(sde)(x, t) - 1).abs().max()) < 1e-8


def test_the_chi_square_finds_an_error_of_two_percent_and_passes_the_truth() -> None:
    sde, oracle = SDES["vp"], mixture()
    x = oracle.marginal_sample(sde, N_SAMPLES, sde.t_end, generator=torch.Generator().manual_seed(0))
    assert whitened_moments_p(oracle, sde, sde.t_end, x) > 1e-3
    mean = x.mean(dim=0)
    assert whitened_moments_p(oracle, sde, sde.t_end, mean + (x - mean) * 1.012) < 1e-5  # variance 2.4 % too large
    assert whitened_moments_p(oracle, sde, sde.t_end, x[: N_SAMPLES // 2].repeat(2, 1) + 0.02) < 1e-5


@pytest.mark.parametrize(("method", "name"), FAST)
def test_law_of_samples(method: str, name: str) -> None:
    check_law(CASES[method](name), name, seed=1)


def gaussian_p(x: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> float:
    """The p-value that `x` `(n, D)` are drawn from N(mean, cov): of the whitened samples the means are N(0, 1/n), and the
    entries of their second moment N(0, 1/n) off the diagonal and N(1, 2/n) on it, all uncorrelated."""
    from scipy.stats import chi2

    n, D = x.shape
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (x.double() - mean).T, upper=False)
    off = z @ z.T / n - torch.eye(D, dtype=torch.float64)
    statistic = n * (z.mean(dim=1).square().sum() + off.square().sum() / 2)
    return float(chi2.sf(float(statistic), D + D * (D + 1) // 2))


@pytest.mark.parametrize(
    ("name", "steps", "n"),
    [("vp", 75, 20_000), *(pytest.param(name, 300, N_SAMPLES, marks=pytest.mark.slow) for name in SDES)],
)
def test_law_of_samples_in_64_dimensions(name: str, steps: int, n: int) -> None:
    """On a Gaussian the samples are exactly normal, so mean and covariance have known errors in any dimension."""
    sde, oracle = SDES[name], wide()
    generator = torch.Generator().manual_seed(8)
    x_T = oracle.marginal_sample(sde, n, sde.T, generator=generator).float()

    def score(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mean, cov = moments(oracle, sde, float(t[0]))
        return (mean.to(x) - x) @ cov.inverse().to(x)

    sampler = DPMSolver(order=2, stochastic=True, steps=steps, denoise=False)
    x = sampler(sde, score, x_T.shape, x_T=x_T, generator=generator).x
    mean, cov = moments(oracle, sde, sde.t_end)
    assert gaussian_p(x, mean, cov) > FAMILY_WISE / FAMILY
    assert gaussian_p(mean + (x - mean) * 1.01, mean, cov) < 1e-5  # variances 2 % too large


@pytest.mark.slow
@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", CASES)
def test_law_of_samples_everywhere(method: str, name: str) -> None:
    check_law(CASES[method](name), name, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SDES)
def test_law_of_the_adaptive_sde_solver(name: str) -> None:
    check_law(AdaptiveSDE(rtol=0.002, atol=0.002, denoise=False), name, seed=3, score=mixture().score(SDES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SDES)
def test_law_of_the_adaptive_flow(name: str) -> None:
    flow = ProbabilityFlow(solver=Dopri5(rtol=1e-4, atol=1e-4))
    check_law(flow, name, seed=4, score=mixture().score(SDES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SDES)
def test_law_of_torchsde(name: str) -> None:
    check_law(TorchSDE(solver="srk", steps=150, grid=LogSNR(), denoise=False), name, seed=5)


def test_torchsde_refines_the_same_path() -> None:
    """With additive noise Euler's method has strong order 1: twice the steps, half the distance to the same path.
    Milstein's method is the same here, and the Runge-Kutta method is nearer."""
    sde, oracle = VPSDE(), gaussian()
    score, x_T = oracle.score(sde), torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def end(solver: str, steps: int):
        sampler = TorchSDE(solver=solver, steps=steps, grid=Uniform(t_end=0.2), denoise=False)
        return sampler(sde, score, (16, 2), x_T=x_T, generator=torch.Generator().manual_seed(7)).x

    truth = end("euler", 1024)
    errors = [float((end("euler", n) - truth).square().mean().sqrt()) for n in (32, 64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2.1, abs=0.4)
    assert errors[1] / errors[2] == pytest.approx(2.2, abs=0.5)
    assert torch.equal(end("milstein", 32), end("euler", 32))
    assert float((end("srk", 32) - truth).square().mean().sqrt()) < errors[2]


@pytest.mark.parametrize("name", SDES)
def test_the_adaptive_solver_meets_a_coarse_check_of_its_law(name: str) -> None:
    check_law(
        AdaptiveSDE(rtol=0.005, atol=0.005, denoise=False, grid=None),
        name,
        seed=6,
        n=3_000,
        score=mixture().score(SDES[name]),
    )


def test_a_shorter_step_takes_its_part_of_the_same_path() -> None:
    """The increment over h and what is left over the rest add up to what was known, and have the law of a bridge."""
    from samplers.adaptive_sde import _increment

    n = 40_000
    z = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    known = torch.full((n, 1), 1.5, dtype=torch.float64)
    length, h = torch.full((n,), 0.8, dtype=torch.float64), torch.full((n,), 0.2, dtype=torch.float64)
    part = _increment(h, length, known, z)
    error = 4 * math.sqrt(0.15 / n)
    assert float(part.mean()) == pytest.approx(1.5 * 0.25, abs=error)
    assert float(part.var()) == pytest.approx(0.2 * 0.6 / 0.8, rel=4 * math.sqrt(2 / n))
    beyond = _increment(torch.full((n,), 1.0, dtype=torch.float64), length, known, z)
    assert float(beyond.mean()) == pytest.approx(1.5, abs=4 * math.sqrt(0.2 / n))
    assert float(beyond.var()) == pytest.approx(0.2, rel=4 * math.sqrt(2 / n))


def test_churn_without_noise_is_the_limit_of_little_noise() -> None:
    """The state is at kappa^ in units of y = x / alpha, also where nothing is added."""
    sde, x_T = SDES["vp"], torch.randn(50, 2, generator=torch.Generator().manual_seed(0))

    def drawn(scale):
        sampler = HeunEDM(steps=20, churn=8.0, noise_scale=scale)
        return sampler(sde, mixture().score(sde), (50, 2), x_T=x_T, generator=SampleStreams(0), dtype=torch.float64).x

    torch.testing.assert_close(drawn(0.0), drawn(1e-9), rtol=0, atol=1e-6)


def test_karras_churn_at_its_limit_stays_within_T() -> None:
    sde = VESDE()
    seen = []

    def score(x, t):
        seen.append(float(t[0]))
        return mixture().score(sde)(x, t)

    HeunEDM(churn=1e9, steps=10, grid=Karras())(sde, score, (4, 2), generator=torch.Generator().manual_seed(0))
    assert max(seen) <= sde.T
    assert len(seen) == 21
