"""Samplers of posteriors that change steps: their laws where these are known, and what is refused."""

from __future__ import annotations

import pytest
import torch
from oracles import SDES, exact_law
from test_measurements import OPERATORS, WITH_SVD, random
from test_posterior import Detached, law
from test_samplers_laws import gaussian_p

from evaluation import exact_posterior, posterior_errors
from guidance import Blur, Linear, LinearMap, Mask, Masks, Measurement, MomentMatching, PiGDM, posterior
from numerics import SampleStreams, UserError
from samplers import DDIM, DDNM, LogSNR, RePaint, Replacement, TwistedSMC
from sde_lib import VESDE
from sde_lib.analytic import EmpiricalDistribution, Gaussian, GaussianMixture

SEEN = Mask(torch.tensor([True, False, True]))


def independent():
    """A Gaussian of independent entries, of which a measurement of some says nothing of the others."""
    return Gaussian(torch.tensor([0.5, -1.0, 0.2]), torch.tensor([0.5, 1.0, 2.0]))


def at_end(sde, exact):
    """Mean and covariance of x at t_end."""
    alpha, sigma = float(sde.alpha(sde.t_end)), float(sde.sigma(sde.t_end))
    return alpha * exact.mean, alpha**2 * exact.cov + sigma**2 * torch.eye(len(exact.mean), dtype=torch.float64)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize(
    "kind",
    [
        lambda m: Replacement(measurement=m, steps=300, grid=LogSNR(), denoise=False),
        lambda m: RePaint(measurement=m, steps=120, resamplings=3, jump=2, grid=LogSNR(), denoise=False),
        lambda m: RePaint(measurement=m, steps=120, resamplings=3, jump=7, grid=LogSNR(), denoise=False),
    ],
    ids=["replacement", "repaint", "repaint_jump"],
)
def test_replacing_is_exact_for_independent_entries(kind, name):
    """The measured entries have their posterior, noise included, and the others keep the prior: RePaint's way back has the
    right noise. Ancestral steps so few leave a bias of up to 7 % of the variance."""
    sde, oracle = SDES[name], independent()
    std = torch.tensor([0.4, 1.0, 0.1], dtype=torch.float64)
    measurement = Measurement(SEEN, torch.tensor([[1.2, 0.0, -0.5]], dtype=torch.float64), std)
    exact = exact_posterior(oracle, measurement)
    x = kind(measurement)(sde, oracle.score(sde), (4000, 3), generator=torch.Generator().manual_seed(0)).x.double()
    mean, cov = at_end(sde, exact)
    sd = cov.diagonal().sqrt()
    assert float(((x.mean(dim=0) - mean) / sd).abs().max()) < 0.08
    assert float((x.T.cov() / sd.outer(sd) - torch.eye(3)).abs().max()) < 0.15


@pytest.mark.parametrize("kind", [Replacement, RePaint, DDNM])
@pytest.mark.parametrize("n", [0.0, 1e-5, 1e-3, 1e-2])
def test_what_is_measured_finely_keeps_its_own_noise(kind, n):
    """A measurement much finer than the noise that the chain ends at: the sample is off by n, not by kappa."""
    sde, oracle = VESDE(sigma_min=0.1), Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    measurement = Measurement(Mask(torch.tensor([True, False])), torch.tensor([[0.3, 0.0]]), n)
    sampler = kind(measurement=measurement, steps=20)
    x = sampler(sde, oracle.score(sde), (4000, 2), generator=torch.Generator().manual_seed(0)).x.double()
    assert float(x[:, 0].mean()) == pytest.approx(0.3, abs=4 * n / 4000**0.5 + 1e-6)
    assert float(x[:, 0].std()) == pytest.approx(n, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("kind", [Replacement, RePaint, DDNM])
@pytest.mark.parametrize(
    ("n", "steps"), [(1e-3, 10), (1e-3, 20), (1e-3, 50), (1e-2, 10), (1e-2, 20), (0.1, 10), (0.1, 3), (0.1, 1)]
)
def test_few_steps_hear_an_accurate_measurement(kind, n, steps, name):
    """Between the last time with more noise than y has and the end nothing is put in: 600 times the noise it was at 0.001. What
    is left is an accuracy between those of two times in the midst of a grid, which is heard as the coarser."""
    sde, oracle = SDES[name], Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    measurement = Measurement(Mask(torch.tensor([True, False])), torch.tensor([[0.7, 0.0]]), n)
    sampler = kind(measurement=measurement, steps=steps)
    x = sampler(sde, oracle.score(sde), (2000, 2), generator=torch.Generator().manual_seed(0)).x.double()
    assert float((x[:, 0] - 0.7).square().mean().sqrt()) < 1.3 * n


@pytest.mark.parametrize("kind", [Replacement, lambda **o: DDNM(data_std=0.5, **o)])
def test_what_is_mostly_noise_is_left_to_the_score(kind):
    """Of data that are smaller than the noise of y a last step from T has heard nothing, and y would be no guess."""
    sde, oracle = SDES["vp"], Gaussian(torch.zeros(2), 0.25 * torch.eye(2))
    measurement = Measurement(Mask(torch.tensor([True, False])), torch.tensor([[3.0, 0.0]]), 1.2)
    x = kind(measurement=measurement, steps=1)(
        sde, oracle.score(sde), (500, 2), generator=torch.Generator().manual_seed(0)
    ).x
    assert float(x.mean(dim=0)[0]) < 0.5


def test_resampling_brings_a_correlated_sample_together() -> None:
    """What is not seen of two entries, 0.9 correlated, given the other without noise: replacement alone leaves its mean far
    off."""
    sde, oracle = SDES["vp"], Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    measurement = Measurement(Mask(torch.tensor([True, False])), torch.tensor([[1.5, 0.0]]), 0.0)
    errors = []
    for resamplings in (1, 8):
        sampler = RePaint(measurement=measurement, steps=60, resamplings=resamplings, jump=5, grid=LogSNR())
        x = sampler(sde, oracle.score(sde), (2000, 2), generator=torch.Generator().manual_seed(0)).x
        assert float((x[:, 0] - 1.5).abs().max()) < 1e-6  # the truth pasted last
        errors.append(abs(float(x[:, 1].mean()) - 1.35) / 0.19**0.5)
    assert errors[1] < 0.5 * errors[0]


def test_repaint_once_is_replacement_and_costs_are_counted() -> None:
    sde, (operator, event) = SDES["vp"], OPERATORS["downsample"]
    score = law(event).score(sde)
    measurement = Measurement(operator, operator(random(2, *event)), 0.1)
    shape = (2, *event)
    one = Replacement(measurement=measurement, steps=20)(sde, score, shape, generator=SampleStreams(0))
    same = RePaint(measurement=measurement, steps=20, resamplings=1, jump=3)(
        sde, score, shape, generator=SampleStreams(0)
    )
    assert torch.equal(one.x, same.x) and one.nfe == same.nfe == 21
    sampler = RePaint(measurement=measurement, steps=20, resamplings=4, jump=3)
    result = sampler(sde, score, shape, generator=SampleStreams(0), keep_path=True)
    assert result.nfe == sampler.evaluations == 81
    assert len(result.times) == len(result.path) == 8 and float(result.times[-1]) == sde.t_end
    assert sampler.within(41).steps == 10


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["linear", "linear_without_full_rank", "mask", "blur"])
def test_ddnm_without_noise_is_ddim_with_the_null_space_mean(name, eta):
    """Against D' = A^+ y + (I - A^+ A) D by the pseudoinverse of the matrix."""
    operator, event = OPERATORS[name]
    D = torch.Size(event).numel()
    A = operator(torch.eye(D, dtype=torch.float64).reshape(D, *event)).flatten(1).T
    pinv = torch.linalg.pinv(A, rtol=1e-9)
    sde, oracle = SDES["sub_vp"], law(event)
    score, y = oracle.score(sde), operator(random(2, *event, seed=8))

    def consistent(x, t):
        alpha, sigma = sde.alpha(t).unsqueeze(1), sde.sigma(t).unsqueeze(1)
        mean = (x.flatten(1) + sigma**2 * score(x, t).flatten(1)) / alpha
        return mean + (y.flatten(1) - mean @ A.T) @ pinv.T, mean, alpha, sigma

    sampler = DDNM(measurement=Measurement(operator, y, 0.0), steps=15, eta=eta)
    x_T = random(2, *event, seed=9)
    found = sampler(sde, score, x_T.shape, x_T=x_T, generator=torch.Generator().manual_seed(0)).x
    times = DDIM(steps=15)._times(sde)
    noise, x = torch.Generator().manual_seed(0), x_T
    for t, s in zip(times[:-1], times[1:], strict=True):
        corrected, mean, alpha, sigma = consistent(x, t.expand(2))
        eps = (x.flatten(1) - alpha * mean) / sigma
        ratio = (sde.sigma(s) / sde.alpha(s)) / (sde.sigma(t) / sde.alpha(t))
        w = eta * sde.sigma(s) * (1 - ratio**2).sqrt()
        z = torch.randn(x.shape, dtype=torch.float64, generator=noise).flatten(1)
        x = sde.alpha(s) * corrected + (sde.sigma(s) ** 2 - w**2).sqrt() * eps + w * z
        x = x.reshape(x_T.shape)
    torch.testing.assert_close(found.flatten(1), consistent(x, times[-1].expand(2))[0], atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(operator(found), y, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", ["linear", "grey"])
def test_ddnm_never_adds_more_noise_than_the_step_has(name) -> None:
    """Where the data are one point p, a step from alpha p + sigma eps leads to such a state if and only if y's noise takes
    the place of fresh noise. (Later steps bring the same noise again.)"""
    operator, event = OPERATORS[name]
    sde, point = SDES["vp"], random(1, *event)
    n, std = 10_000, 0.5
    generator = torch.Generator().manual_seed(0)
    y = operator(point) + std * torch.randn((n, *operator(point).shape[1:]), generator=generator, dtype=torch.float64)
    score = EmpiricalDistribution(point).score(sde)
    D = point.numel()
    for eta, end in ((0.7, 0.3), (1.0, 0.3), (1.0, 0.05)):
        sampler = DDNM(measurement=Measurement(operator, y, std), grid=[0.5, end], eta=eta, denoise=False)
        z = torch.randn((n, *event), generator=generator, dtype=torch.float64)
        x = sampler(sde, score, z.shape, x_T=sde.perturb(point.expand_as(z), 0.5, z), generator=generator).x
        z = ((x - sde.alpha(end) * point) / sde.sigma(end)).flatten(1)
        assert gaussian_p(z, torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)) > 1e-3


@pytest.mark.parametrize("eta", [1.0, 0.7])
@pytest.mark.parametrize("d", [1.0, 2.0])
@pytest.mark.parametrize("spread", [0.2, 0.9, 1.1, 2.0, 100.0])
def test_ddnm_leaves_to_the_score_what_is_mostly_noise(spread, d, eta) -> None:
    """The law of a coordinate of noise n / s = spread d, with no Monte Carlo: for more noise than data it is the law of steps
    without a measurement; for less, its variance over all y is at most that of y'. At any number of steps."""
    sde, oracle = SDES["vp"], Gaussian(torch.zeros(2), d**2 * torch.eye(2))
    operator = Linear(torch.diag(torch.tensor([1.0, 0.1 / (spread * d)], dtype=torch.float64)))
    for steps in (20, 80, 320):
        laws = []
        for y in (0.0, 1.0):  # of the coordinate, so that the second mean is the gain on y'
            measurement = Measurement(operator, operator(torch.tensor([[0.0, y]], dtype=torch.float64)), 0.1)
            sampler = DDNM(measurement=measurement, steps=steps, grid=LogSNR(), denoise=False, data_std=d, eta=eta)
            laws.append(exact_law(sampler, sde, oracle, steps))
        gain, variance = float(laws[1][0][1] - laws[0][0][1]), float(laws[0][1][1, 1])
        if spread > 1:
            free = exact_law(DDIM(eta=eta, steps=steps, grid=LogSNR(), denoise=False), sde, oracle, steps)
            assert gain == 0 and variance == pytest.approx(float(free[1][1, 1]), rel=1e-9)
        else:
            most = 1.01 if eta == 1 else 1.13  # with less room for y's noise the mean goes beyond y' by some percent
            assert gain**2 * (1 + spread**2) + variance / d**2 < most * (1 + spread**2)
            assert 0.9 < gain < most**0.5  # y is taken for true


def two_modes() -> tuple[GaussianMixture, Measurement]:
    """Three modes, one of which the measurement all but rules out and one of which it prefers."""
    means = torch.tensor([[-1.5, 1.0], [1.5, 0.5], [0.5, -1.5]])
    prior = GaussianMixture(means, torch.tensor([0.4, 0.4, 0.3]), torch.tensor([0.5, 0.2, 0.3]))
    return prior, Measurement(Linear(torch.tensor([[1.0, 0.5]])), torch.tensor([[0.4]]), 0.5)


def smc_errors(name, particles, n, steps=100, seed=0):
    prior, measurement = two_modes()
    sde, exact = SDES[name], exact_posterior(prior, measurement)
    sampler = TwistedSMC(measurement=measurement, particles=particles, steps=steps, denoise=False)
    x = sampler(sde, prior.score(sde), (n, 2), generator=torch.Generator().manual_seed(seed)).x
    return posterior_errors(exact, sde, x, sde.t_end)


def test_the_error_of_particles_falls_with_their_number():
    """Of the weights and of the mean; what is left at 60 steps is the chain's own bias."""
    few, many = (smc_errors("vp", particles, 600, steps=60) for particles in (1, 16))
    assert few.weight.value > 6 * few.weight.stderr
    assert many.weight.value < 0.35 * few.weight.value and many.mean.value < 0.5 * few.mean.value


@pytest.mark.slow
@pytest.mark.parametrize("name", SDES)
def test_twisted_particles_have_the_posteriors_law(name):
    found = smc_errors(name, 24, 600, steps=200)
    for part, true in zip(found.weights, found.true_weights, strict=True):
        assert abs(part.value - true) < 3 * part.stderr + 1e-4
    assert found.mean.value < 0.12 and found.covariance.value < 0.2


@pytest.mark.parametrize("kind", ["svd", "adjoint", "function"])
def test_particles_need_no_singular_values(kind):
    """The same law with (2), with the mean of A A^T, and for a function that autograd follows."""
    oracle, A = law((2,)), torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    operator = {
        "svd": Linear(A),
        "adjoint": LinearMap(lambda x: x @ A.to(x).T, lambda y: y @ A.to(y)),
        "function": lambda x: x @ A.to(x).T,
    }[kind]
    measurement = Measurement(operator, torch.tensor([[1.0]], dtype=torch.float64), 0.5)
    exact = exact_posterior(oracle, Measurement(Linear(A), measurement.y, 0.5))
    sde = SDES["vp"]
    few, many = (1, 64) if kind == "function" else (1, 8)  # its psi is poor while x_t is noise
    errors = []
    for particles in (few, many):
        x = TwistedSMC(measurement=measurement, steps=50, particles=particles, denoise=False)(
            sde, oracle.score(sde), (500, 2), generator=torch.Generator().manual_seed(0)
        ).x
        errors.append(posterior_errors(exact, sde, x, sde.t_end))
    assert errors[1].mean.value < (0.45 if kind == "function" else 0.15) < errors[0].mean.value


ALL = {
    "replacement": lambda m: Replacement(measurement=m, steps=12),
    "repaint": lambda m: RePaint(measurement=m, steps=12, resamplings=2, jump=5),
    "ddnm": lambda m: DDNM(measurement=m, steps=12),
    "twisted_smc": lambda m: TwistedSMC(measurement=m, steps=12, particles=4),
}


@pytest.mark.parametrize("kind", ALL)
def test_batch_mates_change_nothing(kind):
    sde, oracle = SDES["vp"], law((6,))
    operator, _ = OPERATORS["linear"]
    sampler = ALL[kind](Measurement(operator, random(4, 3), 0.3))
    together = sampler(sde, oracle.score(sde), (4, 6), generator=SampleStreams(3), dtype=torch.float64)
    assert together.nfe == sampler.evaluations
    for i in range(4):
        index = torch.tensor([i])
        alone = sampler.take(index)(
            sde, oracle.score(sde), (1, 6), generator=SampleStreams(3, index), dtype=torch.float64
        )
        assert float((alone.x - together.x[index]).abs().max()) < 1e-6


@pytest.mark.parametrize("std", [(1e-6, 1.0), (1e-6, 0.3), (0.3, 1e-3), (1.0, 1e6), (1e-8, 1e8)], ids=str)
@pytest.mark.parametrize("kind", [*ALL, "pigdm", "moment_matching"])
def test_a_matrix_of_ones_is_a_mask_of_ones_whatever_the_noises(kind, std):
    """Also in other units: entries 1e6 times as large, and their noise."""
    sde, oracle = SDES["vp"], Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    y, n, unit = torch.tensor([[0.5, 1.5]]), torch.tensor(std), torch.tensor([1.0, 2.0**20])
    mask, matrix, scaled = (
        Measurement(Mask(torch.ones(2)), y, n),
        Measurement(Linear(torch.eye(2)), y, n),
        Measurement(Linear(torch.diag(unit)), y * unit, n * unit),
    )

    def drawn(measurement):
        generator = torch.Generator().manual_seed(0)
        if kind in ALL:
            return ALL[kind](measurement)(sde, oracle.score(sde), (50, 2), generator=generator).x
        method = PiGDM() if kind == "pigdm" else MomentMatching(iterations=2)
        score = posterior(sde, oracle.score(sde), measurement, method=method)
        return DDIM(steps=12)(sde, score, (50, 2), generator=generator).x

    expected = drawn(mask)
    for measurement in (matrix, scaled):
        torch.testing.assert_close(drawn(measurement), expected, rtol=1e-3, atol=1e-3)


class Weighted:
    """Each sample's entries times a number of its own; without singular values."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, x):
        return self.weights.to(x).unsqueeze(1) * x

    adjoint = __call__

    def take(self, index):
        return Weighted(self.weights[index])


def test_an_operator_of_each_samples_own_changes_nothing_for_its_mates():
    sde, oracle = SDES["vp"], law((6,))
    sampler = ALL["twisted_smc"](Measurement(Weighted(torch.tensor([1.0, 3.0, 0.2])), random(3, 6), 0.3))
    together = sampler(sde, oracle.score(sde), (3, 6), generator=SampleStreams(3), dtype=torch.float64).x
    for i in range(3):
        index = torch.tensor([i])
        streams = SampleStreams(3, index)
        alone = sampler.take(index)(sde, oracle.score(sde), (1, 6), generator=streams, dtype=torch.float64).x
        assert float((alone - together[index]).abs().max()) < 1e-6
    # of equal operators, that of one for all
    equal = ALL["twisted_smc"](Measurement(Weighted(torch.full((3,), 2.0)), random(3, 6), 0.3))
    double = lambda x: 2 * x
    shared = ALL["twisted_smc"](Measurement(LinearMap(double, double), random(3, 6), 0.3))
    a, b = (
        s(sde, oracle.score(sde), (3, 6), generator=SampleStreams(3), dtype=torch.float64).x for s in (equal, shared)
    )
    assert float((a - b).abs().max()) < 1e-6


@pytest.mark.parametrize("name", WITH_SVD)
@pytest.mark.parametrize("kind", ALL)
def test_every_operator_in_single_precision_and_inference_mode(kind, name):
    operator, event = OPERATORS[name]
    sde, oracle = SDES["ve"], law(event)
    truth = oracle.sample(3, generator=torch.Generator().manual_seed(0))
    measurement = Measurement(operator, operator(truth), 0.05)
    with torch.inference_mode():
        result = ALL[kind](measurement)(sde, oracle.score(sde), (3, *event), generator=SampleStreams(0))
    assert result.x.dtype == torch.float32 and result.x.shape == truth.shape
    # nearer to y than draws of the prior
    others = oracle.sample(30, generator=torch.Generator().manual_seed(1))
    far = (operator(others).unsqueeze(1) - measurement.y).square().mean()
    assert float(measurement.residual(result.x).square().mean()) < 0.5 * float(far)


MEASUREMENT = Measurement(Linear(random(3, 6)), random(1, 3), 0.1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DDNM(measurement=MEASUREMENT, eta=2.0), "eta"),
        (lambda: DDNM(measurement=MEASUREMENT, eta=0.0), "ignored"),
        (lambda: DDNM(measurement=MEASUREMENT, eta=0.5), "beyond it"),
        (lambda: DDNM(measurement=MEASUREMENT, data_std=0.0), "data_std"),
        (lambda: DDNM(measurement="y"), "measurement"),
        (lambda: DDNM(measurement=Measurement(LinearMap(lambda x: x, lambda y: y), random(1, 3), 0.1)), "singular"),
        (lambda: Replacement(measurement=Measurement(lambda x: x, random(1, 3), 0.1)), "TwistedSMC"),
        (lambda: DDNM(measurement=Measurement(Blur(random(3)), random(1, 3), torch.rand(3) + 0.1)), "one noise"),
        (lambda: Replacement(measurement=MEASUREMENT, predictor="ancestral"), "predictor"),
        (lambda: RePaint(measurement=MEASUREMENT, resamplings=0), "resamplings"),
        (lambda: RePaint(measurement=MEASUREMENT, jump=0), "jump"),
        (lambda: TwistedSMC(measurement=Measurement(Linear(random(3, 6)), random(1, 3), 0.0)), "DDNM"),
        (lambda: TwistedSMC(measurement=MEASUREMENT, particles=0), "particles"),
        (lambda: TwistedSMC(measurement=MEASUREMENT).within(1), "one step"),
    ],
)
def test_options_that_are_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()


@pytest.mark.parametrize(
    ("kind", "shape", "options", "says"),
    [
        ("ddnm", (2, 5), {}, "that shape"),
        ("twisted_smc", (2, 5), {}, "that shape"),
        ("one_mask", (2, 6), {}, "one of each"),
        ("twisted_smc", (2, 6), {"keep_path": True}, "keep_path"),
        ("twisted_smc", (2, 6), {"x_T": torch.zeros(2, 6)}, "x_T"),
    ],
)
def test_calls_that_are_refused(kind, shape, options, says):
    sde = SDES["vp"]
    measurement = Measurement(Masks(torch.ones(1, 6)), random(1, 6), 0.1) if kind == "one_mask" else MEASUREMENT
    with pytest.raises(UserError, match=says):
        ALL.get(kind, ALL["twisted_smc"])(measurement)(sde, law((6,)).score(sde), shape, **options)


@pytest.mark.parametrize(
    ("score", "operator"),
    [
        (lambda x, t: -x.detach(), Linear(random(3, 6))),
        (Detached(), Linear(random(3, 6))),
        (lambda x, t: -x, lambda x: x.detach()[:, :3]),
        (lambda x, t: -x, Detached()),
        (lambda x, t: -x, lambda x: x[:, :3].round()),
    ],
)
def test_particles_refuse_what_autograd_cannot_follow(score, operator):
    sampler = TwistedSMC(measurement=Measurement(operator, random(1, 3), 0.1), steps=2, particles=2)
    with pytest.raises(UserError, match="autograd"):
        sampler(SDES["vp"], score, (2, 6), dtype=torch.float64)
