"""Weightings, time sampling and the denoising loss, against closed forms."""

import math

import pytest
import torch
from oracles import SDES, gaussian
from training_cases import OracleModel, tiny_model

from sde_lib import KernelSDE, TableVPSDE
from sde_lib.analytic import Gaussian
from training import (
    DSM,
    ELBO,
    Adaptive,
    EDMWeighting,
    ImportanceTime,
    LikelihoodWeighting,
    LogNormal,
    MinSNR,
    Simple,
    SoftMinSNR,
    StratifiedTime,
    TabulatedTime,
    UniformLogSNR,
    UniformTime,
    UsageError,
    dsm_loss,
)
from training.streams import StepStreams

COSINE = KernelSDE(alpha_fn=lambda t: torch.cos(1.55 * t), sigma_fn=lambda t: torch.sin(1.55 * t), t_min=1e-4)
TABLE = TableVPSDE(betas=tuple(torch.linspace(1e-4, 0.02, 100).tolist()))
ALL = {**SDES, "cosine": COSINE, "table": TABLE}
SAMPLERS = {
    "uniform": UniformTime(),
    "stratified": StratifiedTime(),
    "importance": ImportanceTime(),
    "tabulated": TabulatedTime(),
    "tabulated_simple": TabulatedTime(weighting=Simple(), nodes=64),
    "log_snr": UniformLogSNR(),
    "log_normal": LogNormal(mean=-1.0, std=4.0, corrected=True),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def times(sde, n=257):
    return torch.linspace(sde.t_min, sde.T, n, dtype=torch.float64)


def integral(f, sde, n=20_001):
    """The mean of f over [t_min, T], in the clock log_snr, where nothing is steep."""
    first, last = (float(sde.log_snr(t)) for t in (sde.t_min, sde.T))
    t = sde.time_of_log_snr(torch.linspace(first, last, n, dtype=torch.float64)).clamp(sde.t_min, sde.T)
    return float(torch.trapezoid(f(t), t)) / (sde.T - sde.t_min)


# -- weightings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_likelihood_weighting_is_the_slope_of_log_snr(name):
    sde = ALL[name]
    t = times(sde)[1:-1].requires_grad_()
    (slope,) = torch.autograd.grad(sde.log_snr(t).sum(), t)
    torch.testing.assert_close(LikelihoodWeighting()(sde, t.detach()), -slope, rtol=1e-8, atol=0)


def test_its_integral_in_closed_form():
    """2 log sinh(B/2) for sub-VP, log(exp(B) - 1) for VP, linear in t for VE."""
    for name, closed in (
        ("sub_vp", lambda B: 2 * torch.sinh(B / 2).log()),
        ("vp", lambda B: torch.expm1(B).log()),
    ):
        sde = SDES[name]
        ends = torch.tensor([sde.t_min, sde.T], dtype=torch.float64)
        low, high = closed(sde.beta.integral(ends))
        mean = integral(lambda t, sde=sde: LikelihoodWeighting()(sde, t), sde) * (sde.T - sde.t_min)
        assert mean == pytest.approx(float(high - low), rel=1e-6)
    constant = LikelihoodWeighting()(SDES["ve"], times(SDES["ve"]))
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))


@pytest.mark.parametrize("name", SDES)
def test_weightings_in_terms_of_the_signal_to_noise_ratio(name):
    sde = SDES[name]
    t = times(sde)[1:]
    snr = (sde.alpha(t) / sde.sigma(t)).square()
    kappa2 = 1 / snr
    assert bool((Simple()(sde, t) == 1).all())
    # on the error of x_0, which is kappa^2 times that of eps, the published forms
    torch.testing.assert_close(MinSNR(gamma=5.0)(sde, t), snr.clamp(max=5.0) * kappa2)
    torch.testing.assert_close(SoftMinSNR(gamma=4.0)(sde, t), kappa2 / (kappa2 + 1 / 4.0))
    torch.testing.assert_close(EDMWeighting(data_std=0.5)(sde, t), kappa2 * (kappa2 + 0.25) / (kappa2 * 0.25))
    torch.testing.assert_close(ELBO()(sde, t), LikelihoodWeighting()(sde, t) * (sde.T - sde.t_min) / 2)


# -- time sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ALL)
def test_importance_weights_undo_the_density(name, sampler):
    """The weighted mean of f is its mean over time, for several f, by a fine stratified draw."""
    sde, n = ALL[name], 2**15
    kind = SAMPLERS[sampler]
    if not kind.stratified:
        object.__setattr__(kind := type(kind)(), "stratified", True)
    t, weight = kind(sde, n, generator())
    assert t.shape == weight.shape == (n,) and t.dtype == torch.float64
    assert float(t.min()) >= sde.t_min and float(t.max()) <= sde.T
    for f in (torch.ones_like, lambda t: t, lambda t: (3 * t).cos() * t):
        assert float((weight * f(t)).mean()) == pytest.approx(integral(f, sde), rel=4e-3, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_importance_times_make_the_likelihood_weighting_constant(name):
    sde = ALL[name]
    t, weight = ImportanceTime()(sde, 1000, generator())
    product = weight * LikelihoodWeighting()(sde, t)
    span = float(sde.log_snr(sde.t_min) - sde.log_snr(sde.T)) / (sde.T - sde.t_min)
    torch.testing.assert_close(product, torch.full_like(product, span), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_the_table_agrees_with_the_closed_form(name):
    sde = ALL[name]
    u = torch.linspace(0, 1, 999, dtype=torch.float64)
    exact = ImportanceTime().quantile(sde, u, sde.t_min)
    table = TabulatedTime().quantile(sde, u, sde.t_min)
    error = (sde.log_snr(exact) - sde.log_snr(table.clamp(sde.t_min, sde.T))).abs()
    assert float(error.max()) < 1e-3 * float(sde.log_snr(sde.t_min) - sde.log_snr(sde.T))


def test_stratified_draws_fall_one_in_each_part():
    sde = SDES["vp"]
    n = 100
    cells = lambda t: ((t - sde.t_min) / (sde.T - sde.t_min) * n).floor().unique().numel()  # noqa: E731
    assert cells(StratifiedTime()(sde, n, generator())[0]) == n
    steps = StratifiedTime()(sde, n, generator())[0].diff()
    torch.testing.assert_close(steps, torch.full_like(steps, (sde.T - sde.t_min) / n))  # one offset for all
    assert cells(UniformTime()(sde, n, generator())[0]) < 80  # 63.4 expected of independent draws
    first = torch.stack([StratifiedTime()(sde, 4, generator(i))[0] for i in range(4000)])
    scaled = (first[:, 2] - sde.t_min) / (sde.T - sde.t_min) * 4 - 2  # uniform in its own part
    assert abs(float(scaled.mean()) - 0.5) < 4 / math.sqrt(12 * 4000)


def test_log_normal_times_have_a_normal_log_noise_to_signal_ratio():
    from scipy.stats import kstest, truncnorm

    sde = SDES["ve"]
    t, weight = LogNormal(stratified=False)(sde, 20_000, generator())
    assert bool((weight == 1).all())
    low, high = ((-float(sde.log_snr(s)) / 2 + 1.2) / 1.2 for s in (sde.t_min, sde.T))
    assert kstest(-sde.log_snr(t).numpy() / 2, truncnorm(low, high, -1.2, 1.2).cdf).pvalue > 1e-3


def test_adaptive_times_follow_the_second_moment_and_stay_unbiased():
    sde = SDES["vp"]
    sampler = Adaptive(bins=16, floor=0.05)
    size = lambda t: torch.where(t < 0.1, 27.0, 1.0)  # noqa: E731
    for step in range(30):
        t, _ = sampler(sde, 512, generator(step))
        sampler.observe(sde, t, size(t), sde.t_min)
    t, weight = sampler(sde, 2**15, generator(99))
    # proportional to the root of the second moment: 2.7 of 3.6 in t < 0.1, of the part that is not the floor; bins are coarse
    assert 0.6 < float((t < 0.1).double().mean()) < 0.95
    assert float(weight.mean()) == pytest.approx(1.0, rel=4e-3)
    assert float((weight * t).mean()) == pytest.approx(0.5, rel=4e-3)
    spread = (weight * size(t)).std() / (weight * size(t)).mean()
    u, _ = UniformTime()(sde, 2**15, generator(1))
    assert float(spread) < 0.5 * float(size(u).std() / size(u).mean())
    other = Adaptive(bins=16, floor=0.05)
    other.load_state_dict(sampler.state_dict())
    assert torch.equal(other(sde, 64, generator(3))[0], sampler(sde, 64, generator(3))[0])
    with pytest.raises(UsageError, match="of 8 bins"):
        Adaptive(bins=8).load_state_dict(sampler.state_dict())


def test_a_smallest_time_without_noise_is_refused():
    with pytest.raises(UsageError, match="t_min=0"):
        ImportanceTime()(SDES["vp"], 4, generator(), t_min=0.0)


# -- the loss -----------------------------------------------------------------------------------------------------------


def mutual_information(law: Gaussian, sde, t):
    """I(x_0; x_t) in nats."""
    snr = float(sde.log_snr(t).exp())
    return 0.5 * float(torch.log1p(snr * torch.linalg.eigvalsh(law.cov)).sum())


@pytest.mark.parametrize("sampler", ["stratified", "importance", "tabulated", "log_normal"])
@pytest.mark.parametrize("name", SDES)
def test_the_elbo_weighted_loss_plus_its_constants_is_the_entropy(name, sampler):
    """With the exact score the bound is tight: H(x_0) = I(x_0; x_T) + H(x_0 | x_tmin) + the loss (I-MMSE)."""
    sde, law, n = SDES[name], gaussian(), 200_000
    objective = DSM(weighting=ELBO(), times=SAMPLERS[sampler])
    x_0 = law.sample(n, generator=generator(1))
    draws = objective.draw(sde, x_0.shape, StepStreams(0, 0), dtype=torch.float64)
    loss = draws["weight"] * objective.loss(OracleModel(law, sde), x_0, draws, None) * 2  # dimensions
    information = [mutual_information(law, sde, t) for t in (sde.t_min, sde.T)]
    entropy = 0.5 * float(torch.logdet(2 * math.pi * math.e * law.cov))
    remaining = entropy - information[0]  # H(x_0 | x_tmin)
    stderr = float(loss.std()) / math.sqrt(n)
    print(f"{name} {sampler}: standard error of the bound {stderr:.3f} nats")
    assert float(loss.mean()) + information[1] + remaining == pytest.approx(entropy, abs=4 * stderr)
    if sampler in ("importance", "tabulated"):
        assert stderr < 0.1  # uniform times: 0.7 (VP), 1.5 (sub-VP)


@pytest.mark.parametrize("shape", [(2,), (1, 2, 3)])
def test_a_wrong_score_costs_its_squared_error(shape):
    """The excess of the loss over the exact score's is the weighted squared error, whatever the shape of the data."""
    sde, n, D = SDES["vp"], 50_000, math.prod(shape)
    law = Gaussian(torch.zeros(shape), torch.eye(D) * 0.25)
    x_0 = law.sample(n, generator=generator(1))
    eps = torch.randn(x_0.shape, generator=generator(2), dtype=torch.float64)
    t = torch.full((n,), 0.3, dtype=torch.float64)
    weighting = SoftMinSNR()
    exact, wrong = (dsm_loss(OracleModel(law, sde, s), x_0, t, eps, weighting=weighting) for s in (0.0, 0.5))
    assert exact.shape == (n,)
    w = float(weighting(sde, t[:1]))
    alpha2, sigma2 = (float(c.square()) for c in (sde.alpha(0.3), sde.sigma(0.3)))
    assert float(exact.mean()) == pytest.approx(w * 0.25 * alpha2 / (0.25 * alpha2 + sigma2), rel=0.02)
    difference = wrong - exact
    assert abs(float(difference.mean()) - w * 0.25) < 4 * float(difference.std()) / math.sqrt(n)


@pytest.mark.parametrize(("name", "gain"), [("vp", 20.0), ("sub_vp", 50.0), ("ve", 0.8)])
def test_importance_sampling_lowers_the_variance_of_the_likelihood_weighted_gradient(name, gain):
    """The total variance of a network's gradient over batches of 64; VE has nothing to gain (the samplers are one)."""
    sde, law = SDES[name], gaussian()
    model = tiny_model(sde)
    variances = []
    for sampler in (UniformTime(), ImportanceTime(stratified=False)):
        gradients = []
        for step in range(60):
            x_0 = law.sample(64, generator=generator(step)).float()
            eps = torch.randn(x_0.shape, generator=generator(1000 + step))
            t, weight = sampler(sde, 64, generator(2000 + step))
            loss = (weight * dsm_loss(model, x_0, t, eps, weighting=LikelihoodWeighting())).mean()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        variances.append(float(torch.stack(gradients).double().var(dim=0).sum()))
    ratio = variances[0] / variances[1]
    print(f"{name}: variance of the gradient, uniform / importance = {ratio:.1f}")
    assert ratio > gain
