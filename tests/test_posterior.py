"""Posterior scores: exact where they say so, the same in every mode and batch, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES, exact_law, law_error
from test_measurements import OPERATORS, random

from evaluation import exact_posterior, posterior_errors
from guidance import (
    DPS,
    TMPD,
    Blur,
    Linear,
    LinearMap,
    Mask,
    Masks,
    Measurement,
    MomentMatching,
    PiGDM,
    PublishedDPS,
    posterior,
)
from likelihood import Exact, Method, log_likelihood
from numerics import Adams, Dopri5, SampleStreams, UserError
from samplers import Ancestral, DPMSolver, LogSNR, PredictorCorrector, TwistedSMC
from sde_lib import CorrelatedMixture, TableVESDE, TableVPSDE, geometric_sigmas, linear_betas
from sde_lib.analytic import Gaussian, GaussianMixture

ALL_SDES = {
    **SDES,
    "table_vp": TableVPSDE(betas=linear_betas(steps=100)),
    "table_ve": TableVESDE(sigmas=geometric_sigmas(largest=20.0, smallest=0.01, levels=50)),
}


def law(event, seed=3):
    """A correlated Gaussian of any event shape."""
    D = math.prod(event)
    A = random(D, D, seed=seed) / math.sqrt(D)
    mean = random(*event, seed=seed + 1)
    return Gaussian(mean, A @ A.T + 0.1 * torch.eye(D, dtype=torch.float64))


def measured(name, std=0.2):
    operator, event = OPERATORS[name]
    y = operator(law(event).sample(1, generator=torch.Generator().manual_seed(4)))
    return Measurement(operator, y, std), law(event)


def states(sde, oracle, n=6):
    """A batch at times of their own, of the law's marginals."""
    t = torch.linspace(0.02, 0.95, n, dtype=torch.float64) * sde.T
    x_0 = oracle.sample(n, generator=torch.Generator().manual_seed(6))
    return sde.perturb(x_0, t, random(*x_0.shape, seed=7)), t


def check_exact(sde, measurement, oracle, method, tolerance=1e-6):
    x, t = states(sde, oracle)
    found = posterior(sde, oracle.score(sde), measurement, method=method)(x, t)
    truth = exact_posterior(oracle, measurement).score(sde)(x, t)
    scale = truth.flatten(1).norm(dim=1)
    assert float(((found - truth).flatten(1).norm(dim=1) / scale).max()) < tolerance


@pytest.mark.parametrize("sde", ALL_SDES)
@pytest.mark.parametrize("name", ["linear", "mask", "downsample_line", "blur_line", "functions"])
def test_moment_matching_is_exact_on_gaussians(name, sde):
    measurement, oracle = measured(name)
    check_exact(ALL_SDES[sde], measurement, oracle, MomentMatching(iterations=measurement.y.numel() + 2))


def test_noise_for_each_entry():
    operator, event = OPERATORS["linear"]
    measurement, oracle = measured("linear", std=torch.tensor([0.05, 0.3, 1.0], dtype=torch.float64))
    check_exact(SDES["vp"], measurement, oracle, MomentMatching(iterations=6))
    plain = Gaussian(law(event).mean, 0.49 * torch.eye(6, dtype=torch.float64))
    check_exact(SDES["vp"], measurement, plain, PiGDM(data_std=0.7))


UNLIKE = [(0.01, 0.1, 1.0, 10.0), (0.001, 0.1, 1.0, 30.0), (0.3, 0.3, 0.3, 1e4), (1e-5, 1.0, 1.0, 1e5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", UNLIKE, ids=str)
@pytest.mark.parametrize("unit", [1.0, 1e5])
def test_as_many_iterations_as_measured_entries_suffice_whatever_the_noises(std, unit, dtype):
    """Also in other units of an entry."""
    oracle, A, sde = law((4,)), random(4, 4, seed=9), SDES["vp"]
    units, std = torch.tensor([1.0, unit, 1.0, 1.0]).double(), torch.tensor(std).double()
    y = random(1, 4, seed=10)
    measurement = Measurement(
        Linear((A * units.unsqueeze(1)).to(dtype)), (y * units).to(dtype), (std * units).to(dtype)
    )
    truth = exact_posterior(oracle, Measurement(Linear(A), y, std)).score(sde)
    x, t = states(sde, oracle)
    given = posterior(sde, oracle.score(sde), measurement, method=MomentMatching(iterations=4))
    wanted, found = truth(x, t), given(x.to(dtype), t.to(dtype)).double()
    off = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(off.max()) < (2e-3 if dtype == torch.float32 else 1e-9)
    solved = given.method.solve(given.at(x.to(dtype), t.to(dtype)), measurement)
    assert float(solved.residual.max()) < (0.1 if dtype == torch.float32 else 1e-7)
    assert not solved.stopped.any() and not solved.replaced.any()


@pytest.mark.parametrize("std", UNLIKE, ids=str)
def test_pseudoinverse_guidance_by_iterations_is_that_by_singular_values(std):
    A, y, std, sde = random(4, 4, seed=9).float(), random(1, 4, seed=10).float(), torch.tensor(std), SDES["vp"]
    oracle = law((4,))
    x, t = states(sde, oracle)
    functions, matrix = (
        posterior(sde, oracle.score(sde), Measurement(operator, y, std), method=PiGDM(iterations=8))(
            x.float(), t.float()
        )
        for operator in (LinearMap(lambda x: x @ A.T, lambda y: y @ A), Linear(A))
    )
    torch.testing.assert_close(functions, matrix, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:got a score of data that the noise at T does not hide")
@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_a_score_whose_derivative_is_no_covariance(sde, iterations):
    """Of a network the variances near T are errors times sigma^2 / alpha, far below 0; samples came out at 40 to 1,780."""
    measurement, oracle = measured("mask")
    kind = SDES[sde]

    def off(x, t):  # 1 % too large, and a part that is no gradient
        value = oracle.score(kind)(x, t)
        return 1.01 * value + 0.003 * value.roll(1, dims=-1)

    sampler = DPMSolver(order=2, stochastic=True, steps=100)
    for data_std in (1.0, 2.0):
        method = MomentMatching(iterations=iterations, data_std=data_std)
        score = posterior(kind, off, measurement, method=method)
        x = sampler(kind, score, (400, *oracle.event_shape), generator=torch.Generator().manual_seed(0)).x.double()
        exact = exact_posterior(oracle, measurement)
        sd = exact.cov.diagonal().sqrt()
        assert float(((x.flatten(1).mean(dim=0) - exact.mean.flatten()) / sd).abs().max()) < (
            1.0 if iterations == 1 else 0.35
        )
        assert float((x.flatten(1).std(dim=0) / sd - 1).abs().max()) < (0.6 if iterations == 1 else 0.25)


@pytest.mark.parametrize("data_std", [1.0, 2.0])
def test_where_the_derivative_is_no_covariance_the_width_is_pseudoinverse_guidances(data_std):
    """At T the variances of a score that is 1 % too large are negative for every sample."""
    measurement, oracle = measured("mask")
    sde = SDES["vp"]

    def off(x, t):
        return 1.01 * oracle.score(sde)(x, t)

    x, t = states(sde, oracle)
    t = torch.full_like(t, sde.T)
    found, plain = (
        posterior(sde, off, measurement, method=method)(x, t)
        for method in (MomentMatching(iterations=4, data_std=data_std), PiGDM(data_std=data_std))
    )
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)
    assert float((found - off(x, t)).abs().max()) > 0  # there is guidance


def test_a_replaced_covariance_and_too_few_iterations_are_two_facts():
    """A score that is right, at one iteration and at enough; and one that is 1 % too large, at T."""
    measurement, oracle = measured("linear")
    sde, score = SDES["vp"], oracle.score(SDES["vp"])
    x, t = states(sde, oracle)
    few, enough = (
        MomentMatching(iterations=n).solve(posterior(sde, score, measurement).at(x, t), measurement) for n in (1, 5)
    )
    for found in (few, enough):
        assert not found.replaced.any() and not found.stopped.any()
    assert float(few.residual.min()) > 1e-3 and float(enough.residual.max()) < 1e-6
    given = posterior(sde, lambda x, t: 1.01 * score(x, t), measurement, method=MomentMatching(iterations=5))
    wrong = given.method.solve(given.at(x, torch.full_like(t, sde.T)), measurement)
    assert wrong.replaced.all() and not wrong.stopped.any() and float(wrong.residual.max()) < 1e-6
    with torch.no_grad():  # what it says is what is used
        at = given.at(x, t)
        torch.testing.assert_close(given(x, t), at.score + at.pull(given.method.solve(at, measurement).u))


def test_few_iterations_are_an_approximation():
    measurement, oracle = measured("linear")
    check_exact(SDES["vp"], measurement, oracle, MomentMatching(iterations=3))
    with pytest.raises(AssertionError):
        check_exact(SDES["vp"], measurement, oracle, MomentMatching(iterations=1), tolerance=1e-2)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("name", [*OPERATORS])
def test_pseudoinverse_guidance_is_exact_on_plain_gaussians(name, sde):
    """With and without an SVD, and with the noise."""
    measurement, oracle = measured(name)
    plain = Gaussian(oracle.mean, 0.49 * torch.eye(oracle.mean.numel(), dtype=torch.float64))
    check_exact(SDES[sde], measurement, plain, PiGDM(data_std=0.7), tolerance=1e-6)


@pytest.mark.parametrize("sde", SDES)
def test_tweedie_moment_projection_is_exact_for_independent_entries(sde):
    measurement, oracle = measured("mask")
    independent = Gaussian(oracle.mean, torch.linspace(0.1, 2, oracle.mean.numel(), dtype=torch.float64).diag())
    check_exact(SDES[sde], measurement, independent, TMPD())


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("name", ["linear", "blur_line"])
def test_diffusion_posterior_sampling_is_its_gradient(name, sde):
    """Of log N(y; A D(x), n^2), by autograd through everything, and the same without an adjoint."""
    sde, (measurement, oracle) = SDES[sde], measured(name)
    score = oracle.score(sde)
    x, t = states(sde, oracle)
    x.requires_grad_()
    alpha, sigma = sde.alpha(t).unsqueeze(1), sde.sigma(t).unsqueeze(1)
    D = (x + sigma**2 * score(x, t)) / alpha
    log_p = -0.5 * ((measurement.y - measurement.operator(D)) / 0.2).square().sum(dim=1)
    (slope,) = torch.autograd.grad(log_p.sum(), x)
    expected = (score(x, t) + 1.5 * slope).detach()
    method = DPS(strength=1.5)
    found = posterior(sde, score, measurement, method=method)(x.detach(), t)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    plain = Measurement(lambda x: measurement.operator(x), measurement.y, 0.2)
    assert not plain.linear
    torch.testing.assert_close(
        posterior(sde, score, plain, method=method)(x.detach(), t), expected, rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("sde", SDES)
def test_the_published_algorithm_is_its_loop(sde):
    """Ancestral steps, each followed by zeta grad |y - A D|, norms per sample."""
    sde, (measurement, oracle) = SDES[sde], measured("linear")
    score, times, zeta = oracle.score(sde), LogSNR()(sde, 20), 0.3
    x_T = sde.prior_std * random(4, 6, seed=9)
    given = posterior(sde, score, measurement, method=PublishedDPS(zeta=zeta, times=times))
    sampler = PredictorCorrector(predictor=Ancestral(), corrector=None, grid=times, denoise=False)
    found = sampler(sde, given, (4, 6), x_T=x_T, generator=torch.Generator().manual_seed(2)).x
    noise, x = torch.Generator().manual_seed(2), x_T
    for t, s in zip(times[:-1], times[1:], strict=True):
        x = x.detach().requires_grad_()
        value = score(x, t.expand(4))
        norm = (measurement.y - measurement.operator((x + sde.sigma(t) ** 2 * value) / sde.alpha(t))).norm(dim=1)
        (slope,) = torch.autograd.grad(norm.sum(), x)
        a, std = sde.alpha(t) / sde.alpha(s), sde.transition_std(s, t)
        z = torch.randn(4, 6, dtype=torch.float64, generator=noise)
        x = (x + std**2 * value) / a + std * sde.sigma(s) / sde.sigma(t) * z - zeta * slope
    torch.testing.assert_close(found, x.detach(), rtol=1e-7, atol=1e-7)


def test_the_published_algorithm_is_asked_at_its_own_times():
    """At another grid's it took the nearest of its own, and with them another step's length."""
    sde, (measurement, oracle) = SDES["vp"], measured("linear")

    def drawn(told, steps):
        method = PublishedDPS(times=LogSNR()(sde, told))
        sampler = PredictorCorrector(predictor=Ancestral(), corrector=None, grid=LogSNR()(sde, steps))
        given = posterior(sde, oracle.score(sde), measurement, method=method)
        return sampler(sde, given, (4, 6), generator=torch.Generator().manual_seed(2)).x, method

    for told in (20, 40):
        with pytest.raises(UserError, match="expected the sampler's own grid"):
            drawn(told, 30)
    found, method = drawn(30, 30)
    at, x = torch.full((4,), 0.3, dtype=torch.float64), random(4, 6)
    assert bool(found.isfinite().all())
    assert bool(posterior(sde, oracle.score(sde), measurement, method=method)(x, at).isnan().all())


METHODS = {
    "moment_matching": MomentMatching(iterations=4),
    "tmpd": TMPD(),
    "pigdm": PiGDM(),
    "dps": DPS(),
}


def mixture():
    return GaussianMixture(random(3, 6, seed=11), torch.tensor([0.2, 0.4, 0.3]), torch.tensor([0.5, 0.3, 0.2]))


@pytest.mark.parametrize("method", [*METHODS, "published"])
@pytest.mark.parametrize("name", ["linear", "functions"])
def test_batch_mates_and_modes_change_nothing(name, method):
    sde, oracle = SDES["vp"], mixture()
    operator, _ = OPERATORS[name]
    x, t = states(sde, oracle, 5)
    method = METHODS.get(method) or PublishedDPS(times=t.unique().flip(0))
    x[1] *= 50  # a mate that is far out
    y = operator(x * 0.5 + 1)
    score = posterior(sde, oracle.score(sde), Measurement(operator, y, 0.1), method=method)
    together = score(x, t)
    for i in range(5):
        index = torch.tensor([i])
        torch.testing.assert_close(score.take(index)(x[index], t[index]), together[index], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert torch.equal(score(x, t), together)
    with torch.inference_mode():
        assert torch.equal(score(x.clone(), t.clone()), together)
    followed = score(x.clone().requires_grad_(), t)
    assert followed.requires_grad and not together.requires_grad
    torch.testing.assert_close(followed.detach(), together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["linear", "mask", "masks", "blur"])
def test_what_is_made_in_inference_mode_can_be_differentiated(name, method):
    """Operator, measurement and score made there: the same log-likelihood as made outside, also of samples taken there."""
    sde, event = SDES["vp"], {"blur": (1, 1, 6)}.get(name, (6,))
    seen = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]])
    make = {
        "linear": lambda: Linear(random(3, 6).clone()),
        "mask": lambda: Mask(seen[0].clone()),
        "masks": lambda: Masks(seen.clone()),
        "blur": lambda: Blur(random(1, 3).clone()),
    }[name]
    once = Method(Adams(steps=3))

    def found():
        operator, oracle = make(), law(event)
        x = random(2, *event, seed=3)
        std = torch.full(operator(x).shape[1:], 0.3, dtype=torch.float64)
        given = posterior(sde, oracle.score(sde), Measurement(operator, operator(x), std), method=METHODS[method])
        both = torch.tensor([1, 0])
        one = log_likelihood(sde, given, x, method=once, divergence=Exact()).log_prob
        return one, log_likelihood(sde, given.take(both), x[both], method=once, divergence=Exact()).log_prob

    plain = found()
    with torch.inference_mode():
        for a, b in zip(found(), plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["function", "adjoint"])
def test_a_users_operator_of_inference_tensors_is_told_from_one_that_leaves_torch(kind):
    sde, oracle = SDES["vp"], law((6,))
    with torch.inference_mode():
        A = random(3, 6).clone()
    operator = {"function": lambda x: x @ A.T, "adjoint": LinearMap(lambda x: x @ A.T, lambda y: y @ A)}[kind]
    given = posterior(sde, oracle.score(sde), Measurement(operator, random(1, 3), 0.3), method=DPS())
    with pytest.raises(UserError, match="holds tensors made under torch.inference_mode"):
        log_likelihood(sde, given, random(2, 6), method=Method(Adams(steps=3)), divergence=Exact())


def test_samples_do_not_depend_on_their_batch_mates():
    sde, oracle = SDES["vp"], mixture()
    operator, _ = OPERATORS["linear"]
    measurement = Measurement(operator, random(4, 3, seed=12), 0.3)
    score = posterior(sde, oracle.score(sde), measurement)
    sampler = DPMSolver(order=2, stochastic=True, steps=20)
    together = sampler(sde, score, (4, 6), generator=SampleStreams(1), dtype=torch.float64).x
    for i in range(4):
        index = torch.tensor([i])
        alone = sampler(sde, score.take(index), (1, 6), generator=SampleStreams(1, index), dtype=torch.float64).x
        assert float((alone - together[index]).abs().max()) < 1e-6


class Told(Gaussian):
    """A Gaussian whose score is given."""

    def score(self, sde):
        return self.given


@pytest.mark.parametrize("name", SDES)
def test_samples_have_the_posteriors_law(name):
    """Exactly, with no Monte Carlo: on a Gaussian every step is affine. 100 steps of second order leave less than 1 %."""
    sde, (measurement, oracle) = SDES[name], measured("downsample_line", std=0.3)
    exact = exact_posterior(oracle, measurement)
    told = Told(exact.mean, exact.cov)
    object.__setattr__(told, "given", posterior(sde, oracle.score(sde), measurement))
    sampler = DPMSolver(order=2, stochastic=True, steps=100, denoise=False)
    found = exact_law(sampler, sde, told, 100)
    alpha, sigma = float(sde.alpha(sde.t_end)), float(sde.sigma(sde.t_end))
    truth = (alpha * exact.mean, alpha**2 * exact.cov + sigma**2 * torch.eye(6, dtype=torch.float64))
    assert law_error(found, truth) < 0.01


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_flow_has_the_posteriors_density(name):
    sde, (measurement, oracle) = SDES[name], measured("downsample_line", std=0.3)
    exact = exact_posterior(oracle, measurement)
    x = exact.sample(2, generator=torch.Generator().manual_seed(0))
    score = posterior(sde, oracle.score(sde), measurement)
    method = Method(Dopri5(rtol=1e-5, atol=1e-5))
    prior = lambda z: exact.log_prob(sde, z, sde.T)
    found = log_likelihood(sde, score, x, method=method, divergence=Exact(), prior=prior)
    torch.testing.assert_close(found.log_prob, exact.log_prob(sde, x, sde.t_min), atol=2e-3, rtol=0)


def test_the_referee_knows_the_truth_and_an_error():
    """The posterior of a mixture against importance weights, and the errors of exact draws and of wrong ones."""
    prior = GaussianMixture(
        torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([[0.4, 0.6], [0.5, 0.3]]), torch.tensor([0.7, 0.3])
    )
    measurement = Measurement(Linear(torch.tensor([[1.0, 1.0]])), torch.tensor([[0.4]]), 0.5)
    exact = exact_posterior(prior, measurement)
    x = prior.sample(200_000, generator=torch.Generator().manual_seed(0))
    w = measurement.log_likelihood(x).softmax(dim=0)
    error = float(1 / w.square().sum()) ** -0.5  # of a mean, in standard deviations
    mean = w @ x
    assert float(((mean - exact.mean) / exact.cov.diagonal().sqrt()).abs().max()) < 4 * error
    torch.testing.assert_close(torch.einsum("n,ni,nj->ij", w, x - mean, x - mean), exact.cov, atol=8 * error, rtol=0)
    sde = SDES["vp"]
    draws = exact.marginal_sample(sde, 20_000, sde.t_end, generator=torch.Generator().manual_seed(1))
    right = posterior_errors(exact, sde, draws, sde.t_end)
    assert right.mean.value < 4 * right.floor[0] and right.covariance.value < 3 * right.floor[1]
    assert right.weight.value < 4 * right.weight.stderr
    shifted = posterior_errors(exact, sde, draws + 0.1 * exact.cov.diagonal().sqrt(), sde.t_end)
    assert abs(shifted.mean.value - 0.1) < 0.04 and shifted.mean.value > 4 * shifted.mean.stderr
    wide = posterior_errors(exact, sde, draws.mean(dim=0) + 1.05 * (draws - draws.mean(dim=0)), sde.t_end)
    assert wide.covariance.value == pytest.approx(0.1025, abs=0.04)


def test_a_correlated_mixture_is_the_mixture_and_the_gaussian():
    plain = mixture()
    same = CorrelatedMixture(plain.means, torch.diag_embed(plain.stds.square()), plain.weights)
    one = law((4,))
    single = CorrelatedMixture(one.mean.unsqueeze(0), one.cov.unsqueeze(0), torch.ones(1))
    for a, b, D in ((plain, same, 6), (one, single, 4)):
        x, t = random(5, D), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
        torch.testing.assert_close(a.log_prob(SDES["vp"], x, t), b.log_prob(SDES["vp"], x, t))
        torch.testing.assert_close(a.score(SDES["vp"])(x, t), b.score(SDES["vp"])(x, t))
    x = same.sample(40_000, generator=torch.Generator().manual_seed(0))
    assert float((x.mean(dim=0) - same.mean).abs().max()) < 0.02
    assert float((x.T.cov() - same.cov).abs().max()) < 0.03


def constant(x, t):
    return -x.detach()


def of_numpy(x):
    return torch.from_numpy(x.detach().numpy()[:, :3].copy())


Y = random(1, 3)
LINEAR = Measurement(Linear(random(3, 6)), Y, 0.1)
NOISELESS = Measurement(Linear(random(3, 6)), Y, 0.0)
NONLINEAR = Measurement(lambda x: x[:, :3].square(), Y, 0.1)
SCORE = law((6,)).score(SDES["vp"])


@pytest.mark.parametrize(
    ("measurement", "method", "says"),
    [
        (NOISELESS, DPS(), "divides by it"),
        (NOISELESS, TMPD(), "divides by it"),
        (NONLINEAR, MomentMatching(), "DPS"),
        (NONLINEAR, PiGDM(), "DPS"),
        (NONLINEAR, TMPD(), "DPS"),
        (NONLINEAR, PublishedDPS(times=(1.0, 0.1)), "DPS"),
        (LINEAR, "dps", "method"),
    ],
)
def test_methods_refuse_what_they_cannot_take(measurement, method, says):
    with pytest.raises(UserError, match=says):
        posterior(SDES["vp"], SCORE, measurement, method=method)


@pytest.mark.parametrize(
    ("score", "measurement", "method", "shape", "says"),
    [
        (constant, LINEAR, MomentMatching(), (2, 6), "autograd"),
        (SCORE, Measurement(of_numpy, Y, 0.1), DPS(), (2, 6), "autograd"),
        (SCORE, Measurement(lambda x: torch.from_numpy(x.numpy()), Y, 0.1), DPS(), (2, 6), "leaves torch"),
        (SCORE, Measurement(lambda x: x[:, :3].round(), Y, 0.1), DPS(), (2, 6), "derivative is 0"),
        (SCORE, Measurement(lambda x: x[:, :2], Y, 0.1), DPS(), (2, 6), "same shape"),
        (SCORE, LINEAR, MomentMatching(), (2, 5), "that shape"),
        (SCORE, Measurement(LINEAR.operator, random(3, 3), 0.1), PiGDM(), (2, 6), "take"),
    ],
)
def test_calls_refuse_what_does_not_fit(score, measurement, method, shape, says):
    with pytest.raises(UserError, match=says):
        posterior(SDES["vp"], score, measurement, method=method)(random(*shape), torch.tensor(0.5))


class Detached(torch.nn.Module):
    """Depends on x as a network does, and hides it from autograd: parameters alone are followed."""

    def __init__(self):
        super().__init__()
        self.of_score = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.matrix = torch.nn.Parameter(random(3, 6))

    def forward(self, x, t=None):
        return x.detach() @ self.matrix.T if t is None else -self.of_score * x.detach()


@pytest.mark.parametrize("method", METHODS)
def test_a_score_of_which_autograd_sees_parameters_only_is_refused(method):
    with pytest.raises(UserError, match="autograd cannot follow to x"):
        posterior(SDES["vp"], Detached(), LINEAR, method=METHODS[method])(random(2, 6), torch.tensor(0.5))


@pytest.mark.parametrize(
    ("operator", "says"),
    [
        (lambda x: torch.round(2 * x[:, :3]) / 2, "derivative is 0"),
        (Detached(), "without detach"),
        (lambda x: x[:, :3].detach(), "without detach"),
    ],
    ids=["rounds", "module_detaches", "detaches"],
)
def test_an_operator_whose_derivative_says_nothing_is_refused(operator, says):
    given = posterior(SDES["vp"], SCORE, Measurement(operator, Y, 0.1), method=DPS())
    with pytest.raises(UserError, match=says):
        given(random(2, 6), torch.tensor(0.5))


def test_an_operator_is_looked_at_once_and_may_be_flat_somewhere():
    asked = []

    def operator(x):
        asked.append(1)
        return (x[:, :3] - 1).clamp(min=0)

    given = posterior(SDES["vp"], lambda x, t: -x, Measurement(operator, Y, 0.1), method=DPS())
    for _ in range(3):  # D is 0 there, where the operator is flat
        given.take(torch.arange(2))(torch.zeros(2, 6, dtype=torch.float64), torch.tensor(0.5))
    assert len(asked) == 3 + 2 + 1  # the derivative, of x and of x with noise; and a sample without its mates


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (lambda x: (x - x.mean(dim=0))[:, :3], "batch has others"),
        (lambda x: x[:1, :3], "as many samples"),
    ],
)
def test_an_operator_without_an_adjoint_takes_each_sample_alone(operator, words):
    sde, y = SDES["vp"], torch.zeros(1, 3, dtype=torch.float64)
    given = posterior(sde, lambda x, t: -x, Measurement(operator, y, 0.1), method=DPS())
    with pytest.raises(UserError, match=words):
        given(random(4, 6), torch.tensor(0.5))
    with pytest.raises(UserError, match=words):
        TwistedSMC(measurement=Measurement(operator, y, 0.1), particles=4, steps=3)(sde, lambda x, t: -x, (4, 6))
    # one that is no number somewhere is told from one that mixes
    roots = posterior(sde, lambda x, t: -x, Measurement(lambda x: x[:, :3].sqrt(), y, 0.1), method=DPS())
    assert roots(random(4, 6), torch.tensor(0.5)).shape == (4, 6)


def test_the_referee_refuses_what_the_law_rules_out():
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    oracle = Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(UserError, match="rules out"):
        exact_posterior(oracle, Measurement(Linear(A), torch.tensor([[1.0, 2.0]], dtype=torch.float64), 0.0))
    with pytest.raises(UserError, match="a law of 3 numbers and a measurement of 2"):
        exact_posterior(Gaussian(torch.zeros(3), torch.eye(3)), Measurement(Linear(A), torch.zeros(1, 2), 0.1))
    # the same row twice says what it says once
    twice = exact_posterior(oracle, Measurement(Linear(A), torch.ones(1, 2, dtype=torch.float64), 0.0))
    once = exact_posterior(oracle, Measurement(Linear(A[:1]), torch.ones(1, 1, dtype=torch.float64), 0.0))
    torch.testing.assert_close(twice.mean, once.mean)
    torch.testing.assert_close(twice.cov, once.cov, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "std",
    [(0.3, 0.3, 0.3, 1e6), (1e-9, 0.1, 1.0, 1e8), (1e-4, 0.0, 1.0, 1e4), (0.0, 0.0, 1e-6, 1e6), (0.0, 1e3, 1e-3, 0.0)],
)
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_the_referee_hears_every_entry_whatever_its_noise(std, size):
    """Against (1) in 60 digits; the rows of the matrix and their noises in units of their own change nothing."""
    mp = pytest.importorskip("mpmath")
    A, y, n = random(4, 5, seed=1), random(1, 4, seed=2), torch.tensor(std, dtype=torch.float64)
    oracle, unit = law((5,)), torch.tensor([1.0, 1.0, size, 1.0], dtype=torch.float64)
    found = exact_posterior(oracle, Measurement(Linear(A * unit.unsqueeze(1)), y * unit, n * unit))
    with mp.workdps(60):
        a, c, m, seen, s2 = (mp.matrix(v.tolist()) for v in (A, oracle.cov, oracle.mean, y[0], n))
        S = a * c * a.T + mp.diag([v**2 for v in s2])
        gain = c * a.T * S**-1
        mean, cov = m + gain * (seen - a * m), c - gain * a * c
        mean, cov = (torch.tensor(v.tolist(), dtype=torch.float64) for v in (mean, cov))
    torch.testing.assert_close(found.mean, mean.squeeze(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.cov, cov, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "operator", [Mask(torch.ones(2)), Linear(torch.eye(2, dtype=torch.float64))], ids=["mask", "matrix"]
)
def test_the_referee_keeps_variances_and_weights_of_accurate_entries(operator):
    prior = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))
    y, std = (torch.tensor([v], dtype=torch.float64) for v in ((0.125, 0.1), (1e-9, 1e8)))
    found = exact_posterior(prior, Measurement(operator, y, std[0]))
    torch.testing.assert_close(found.means[:, 0], torch.full((2,), 0.125, dtype=torch.float64))
    expected = torch.diag(torch.tensor([1e-18, 0.25], dtype=torch.float64)).expand(2, 2, 2)
    torch.testing.assert_close(found.covs, expected, rtol=1e-6, atol=0)
    # the two densities of y_0 are N(0.125; -2, 0.25) and N(0.125; 2, 0.25)
    assert float(found.weights[1]) == pytest.approx(1 / (1 + math.exp(-2 * 2 * 0.125 / 0.25)), rel=1e-9)
    single = exact_posterior(prior, Measurement(Mask(torch.ones(2)), y.float(), torch.tensor([0.3, 3e7])))
    assert float(single.covs[0, 0, 0]) == pytest.approx(0.25 * 0.09 / 0.34, rel=1e-6)


def test_a_mode_without_width_is_ruled_out_alone():
    """Two modes on lines: a measurement across them leaves the one that it meets."""
    flat = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    prior = CorrelatedMixture(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), flat.expand(2, 2, 2), torch.tensor([0.5, 0.5]))
    seen = lambda y: Measurement(Mask([0, 1]), torch.tensor([[0.0, y]]), 0.0)
    assert exact_posterior(prior, seen(1.0)).weights.tolist() == [0.0, 1.0]
    with pytest.raises(UserError, match="rules out"):
        exact_posterior(prior, seen(0.5))


def test_the_referee_takes_functions_in_single_precision_and_a_mask_of_one_sample():
    oracle, A, y = law((2,)), torch.tensor([[1.0, 0.5]]), torch.tensor([[1.0]])
    functions = Measurement(LinearMap(lambda x: x @ A.T, lambda y: y @ A), y, 0.3)
    matrix = Measurement(Linear(A), y, 0.3)
    torch.testing.assert_close(exact_posterior(oracle, functions).cov, exact_posterior(oracle, matrix).cov)
    seen, y = torch.tensor([[True, False]]), torch.tensor([[0.7, 0.0]])
    own, same = (exact_posterior(oracle, Measurement(of, y, 0.3)) for of in (Masks(seen), Mask(seen[0])))
    torch.testing.assert_close(own.mean, same.mean)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MomentMatching(iterations=0),
        lambda: DPS(strength=0),
        lambda: PiGDM(data_std=-1),
        lambda: PublishedDPS(zeta=0, times=(1.0, 0.1)),
        lambda: PublishedDPS(times=(0.1, 1.0)),
        lambda: PublishedDPS(times="vp"),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(UserError):
        make()


def test_without_noise_moment_matching_and_pseudoinverse_meet_the_measurement():
    """std = 0 divides nothing there; samples end on y."""
    sde, oracle = SDES["vp"], law((6,))
    measurement = Measurement(Mask(torch.tensor([1, 1, 0, 0, 1, 0])), random(1, 6, seed=20), 0.0)
    for method in (MomentMatching(iterations=6), PiGDM()):
        score = posterior(sde, oracle.score(sde), measurement, method=method)
        x = DPMSolver(steps=40)(sde, score, (8, 6), generator=SampleStreams(0), dtype=torch.float64).x
        assert float(measurement.residual(x).abs().max()) < 0.05


def test_two_functions_are_an_operator():
    measurement = Measurement(LinearMap(lambda x: 2 * x, lambda y: 2 * y), random(1, 6), 0.5)
    check_exact(SDES["ve"], measurement, law((6,)), MomentMatching(iterations=8))
