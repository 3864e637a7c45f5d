"""Discrete, variational, sliced and exact losses: each against the identity that links it to the others."""

import math

import numpy
import pytest
import torch
from oracles import SDES, gaussian
from torch import nn
from training_cases import OracleModel, options, points, tiny_model

import models
from data import from_tensor
from numerics import UserError
from sde_lib import VESDE, KernelSDE, TableVESDE, TableVPSDE
from sde_lib.analytic import Gaussian
from training import (
    DSM,
    SMLD,
    VLB,
    DDPMSimple,
    DiscreteTime,
    ExactScoreMatching,
    FiniteDifferenceScoreMatching,
    FlowMatching,
    Hybrid,
    LikelihoodWeighting,
    ScoreError,
    Simple,
    SlicedScoreMatching,
    UsageError,
    VelocityPrediction,
    cosine_betas,
    dsm_loss,
    geometric_sigmas,
    linear_betas,
    train,
)
from training.streams import StepStreams

LINEAR = KernelSDE(alpha_fn=lambda t: 1 - t, sigma_fn=lambda t: t, T=0.999, t_min=1e-3, terminal_std=1.0)


def drawn(objective, sde, x_0, step=0):
    return objective.draw(sde, x_0.shape, StepStreams(0, step), dtype=x_0.dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- velocities -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SDES, "linear"])
def test_velocity_losses_are_weightings_of_the_noise_error(name):
    """By the velocities themselves: alpha' x_0 + sigma' eps against the model's flow, alpha eps - sigma x_0 against its v."""
    sde = LINEAR if name == "linear" else SDES[name]
    law = gaussian()
    model = tiny_model(sde, wild=True).double()
    x_0 = law.sample(50, generator=generator())
    eps = torch.randn(x_0.shape, generator=generator(1), dtype=torch.float64)
    t = torch.linspace(0.01, 0.98, 50, dtype=torch.float64, requires_grad=True)
    slopes = []
    for c in (sde.alpha(t), sde.sigma(t)):
        slopes.append(torch.autograd.grad(c.sum(), t)[0] if c.requires_grad else torch.zeros_like(t))
    alpha_slope, sigma_slope = slopes
    t = t.detach()
    x_t = sde.perturb(x_0, t, eps)
    target = alpha_slope.unsqueeze(1) * x_0 + sigma_slope.unsqueeze(1) * eps
    direct = (target - sde.flow(model, x_t, t)).square().mean(dim=1)
    torch.testing.assert_close(dsm_loss(model, x_0, t, eps, weighting=FlowMatching()), direct, rtol=1e-6, atol=1e-9)
    v = sde.alpha(t).unsqueeze(1) * eps - sde.sigma(t).unsqueeze(1) * x_0
    direct = (v - model.velocity(x_t, t)).square().mean(dim=1)
    torch.testing.assert_close(
        dsm_loss(model, x_0, t, eps, weighting=VelocityPrediction()), direct, rtol=1e-6, atol=1e-9
    )


# -- the discrete chains --------------------------------------------------------------------------------------------------


def test_tables_are_the_papers():
    betas = linear_betas()
    assert len(betas) == 1000 and betas[0] == 1e-4 and betas[-1] == pytest.approx(0.02)
    assert math.exp(sum(math.log1p(-b) for b in linear_betas(steps=100))) == pytest.approx(4e-5, rel=0.6)
    cosine = torch.tensor(cosine_betas(steps=1000), dtype=torch.float64)
    abar = (1 - cosine).cumprod(0)
    i = torch.arange(1, 1000, dtype=torch.float64)
    f = lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()  # noqa: E731
    torch.testing.assert_close(abar[:-1], f(i / 1000) / f(torch.zeros(1, dtype=torch.float64)), rtol=1e-9, atol=0)
    assert float(cosine.max()) == 0.999
    sigmas = geometric_sigmas(levels=10)
    assert (
        sigmas[0] == 1.0
        and sigmas[-1] == pytest.approx(0.01)
        and sigmas[4] / sigmas[5] == pytest.approx(sigmas[0] / sigmas[1])
    )
    for bad in (
        lambda: linear_betas(steps=1),
        lambda: linear_betas(steps=10),
        lambda: geometric_sigmas(largest=0.01, smallest=1.0),
    ):
        with pytest.raises(UserError):
            bad()


def test_l_simple_is_ddpms():
    """Written out with DDPM's own alpha-bar, index by index."""
    betas = linear_betas(steps=100, first=1e-3, last=0.1)
    sde = TableVPSDE(betas=betas)
    model = tiny_model(sde, wild=True).double()
    objective = DDPMSimple(times=DiscreteTime(levels=100), per_dimension=False)
    x_0 = gaussian().sample(400, generator=generator())
    draws = drawn(objective, sde, x_0)
    index = (draws["t"] * 100).round().long()
    assert index.bincount(minlength=101).tolist() == [0] + [4] * 100  # stratified: each index equally often
    abar = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)[index - 1].unsqueeze(1)
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * draws["eps"]
    direct = (draws["eps"] - model.noise(x_t, index / 100)).square().sum(dim=1)
    torch.testing.assert_close(objective.loss(model, x_0, draws, None), direct, rtol=1e-5, atol=1e-8)


def test_the_smld_loss_is_ncsns():
    """Half sigma^2 |s + (x - x_0) / sigma^2|^2, summed over dimensions, at every sigma of the ladder, the smallest included."""
    sigmas = geometric_sigmas(largest=5.0, smallest=0.05, levels=10)
    sde = TableVESDE(sigmas=sigmas)
    model = tiny_model(sde, wild=True).double()
    objective = SMLD(times=DiscreteTime(levels=10, zero=True), per_dimension=False)
    x_0 = gaussian().sample(100, generator=generator())
    draws = drawn(objective, sde, x_0)
    index = (draws["t"] * 9).round().long()
    assert index.bincount().tolist() == [10] * 10
    sigma = torch.tensor(sigmas[::-1], dtype=torch.float64)[index].unsqueeze(1)
    x = x_0 + sigma * draws["eps"]
    direct = 0.5 * sigma.squeeze(1).square() * (model(x, index / 9) + (x - x_0) / sigma.square()).square().sum(dim=1)
    torch.testing.assert_close(objective.loss(model, x_0, draws, None), direct, rtol=1e-6, atol=1e-9)


# -- the bound ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["posterior", "transition"])
def test_the_terms_of_the_bound_are_divergences_of_gaussians(variance):
    """Against torch.distributions, with DDPM's formulas for the posterior, equations (6) and (7)."""
    from torch.distributions import Normal, kl_divergence

    N = 20
    betas = torch.tensor(linear_betas(steps=N, first=0.01, last=0.3), dtype=torch.float64)
    abar = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    small, large = betas * (1 - before) / (1 - abar), betas
    small[0] = small[1]
    sde = TableVPSDE(betas=tuple(betas.tolist()))
    model = tiny_model(sde, wild=True).double()
    x_0 = gaussian().sample(N, generator=generator())
    objective = VLB(steps=N, variance=variance)
    draws = drawn(objective, sde, x_0)
    i = (draws["t"] * N).round().long() - 1
    assert i.tolist() == list(range(N))
    column = lambda c: c[i].unsqueeze(1)  # noqa: E731
    x_t = column(abar.sqrt()) * x_0 + column((1 - abar).sqrt()) * draws["eps"]
    x_0_hat = model.denoised(x_t, draws["t"])
    mean = lambda x: (  # noqa: E731
        column(before.sqrt() * betas / (1 - abar)) * x + column((1 - betas).sqrt() * (1 - before) / (1 - abar)) * x_t
    )
    p = Normal(mean(x_0_hat), column(small if variance == "posterior" else large).sqrt())
    terms = kl_divergence(Normal(mean(x_0), column(small).sqrt()), p).mean(dim=1)
    terms[0] = -p.log_prob(x_0).mean(dim=1)[0]
    last = kl_divergence(
        Normal(abar[-1].sqrt() * x_0, (1 - abar[-1]).sqrt()), Normal(torch.zeros(1, dtype=torch.float64), 1.0)
    ).mean(dim=1)
    torch.testing.assert_close(objective.loss(model, x_0, draws, None), N * terms + last, rtol=2e-4, atol=1e-7)
    if variance == "posterior":  # the weighted noise error, equation (12) there
        snr = abar / (1 - abar)
        error = dsm_loss(model, x_0, draws["t"], draws["eps"], weighting=Simple())
        torch.testing.assert_close(terms[1:], (0.5 * (snr[:-1] / snr[1:] - 1) * error[1:]), rtol=2e-4, atol=1e-9)


def test_the_bound_of_the_exact_score_comes_down_to_the_entropy():
    """The excess of N steps is positive and falls like 1/N. Expectations are exact: quadratic terms, Gauss's quadrature."""
    variance = 0.5
    law = Gaussian(torch.zeros(1), torch.tensor([variance]))
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    nodes, weights = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(6))
    excess = []
    for N in (8, 16, 32):
        sde = TableVPSDE(betas=cosine_betas(steps=N))
        t, x_0, eps = (
            a.flatten() for a in torch.meshgrid((torch.arange(N) + 1.0).double() / N, nodes, nodes, indexing="ij")
        )
        mass = (weights[:, None] * weights / (2 * math.pi)).repeat(N, 1, 1).flatten() / N
        draws = {"t": t, "eps": eps.unsqueeze(1), "weight": torch.ones_like(t)}
        objective = VLB(steps=N, variance="transition")
        loss = objective.loss(OracleModel(law, sde), x_0.unsqueeze(1) * variance**0.5, draws, None)
        excess.append(float((mass * loss).sum()) - entropy)
    print("excess of the bound over the entropy in 8, 16, 32 steps:", excess)
    assert excess[2] > 0
    assert 1.6 < excess[0] / excess[1] < 2.4 and 1.6 < excess[1] / excess[2] < 2.4


def test_the_discretised_decoder_gives_each_grey_value_its_mass():
    """Over all grey values the masses add up to one, and wide bins of a sharp Gaussian have all of it."""
    levels = 8
    centres = (torch.arange(levels, dtype=torch.float64) + 0.5) * 2 / levels - 1
    objective = VLB(steps=4, bin_width=2 / levels)
    for mean, sd in ((0.3, 0.4), (-2.0, 0.05), (5.0, 0.5), (0.1, 1e-3)):
        log_v = torch.full((levels,), 2 * math.log(sd), dtype=torch.float64)
        mass = objective._log_decoder(centres, centres - mean, log_v).exp()
        assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)
    assert int(mass.argmax()) == 4


class TwoHeads(nn.Module):
    """Twice the channels: a small network for the noise, and a constant for the variance."""

    learned_variance = True

    def __init__(self, second):
        super().__init__()
        self.net = models.MLP(dim=2, width=16, depth=1)
        self.second = nn.Parameter(torch.tensor(float(second)))

    def forward(self, x, label, class_label=None):
        return torch.cat([self.net(x, label), self.second.expand_as(x)], dim=1)


def two_heads(sde, second):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.ScoreModel(TwoHeads(second), sde, models.Preconditioned(data_std=1.0))


@pytest.mark.parametrize(("second", "variance"), [(-1.0, "posterior"), (1.0, "transition")])
def test_learned_variances_lie_between_the_two(second, variance):
    sde = TableVPSDE(betas=linear_betas(steps=50, first=0.01, last=0.2))
    x_0 = gaussian().sample(100, generator=generator()).float()
    model = two_heads(sde, second)
    draws = drawn(VLB(steps=50), sde, x_0)
    learned = VLB(steps=50, variance="learned").loss(model, x_0, draws, None)
    torch.testing.assert_close(
        learned, VLB(steps=50, variance=variance).loss(model, x_0, draws, None), rtol=1e-4, atol=1e-4
    )


def test_the_hybrid_teaches_the_mean_by_l_simple_alone():
    sde = TableVPSDE(betas=linear_betas(steps=50, first=0.01, last=0.2))
    x_0 = gaussian().sample(100, generator=generator()).float()
    model = two_heads(sde, 0.0)
    objective = Hybrid(steps=50)
    draws = drawn(objective, sde, x_0)
    parameters = list(model.net.net.parameters())

    def gradient(of):
        return torch.autograd.grad(
            of.loss(model, x_0, draws, None).mean(), [*parameters, model.net.second], allow_unused=True
        )

    hybrid = gradient(objective)
    simple = gradient(DDPMSimple(times=DiscreteTime(levels=50)))
    bound = gradient(VLB(steps=50, variance="learned"))
    for a, b in zip(hybrid[:-1], simple[:-1], strict=True):
        torch.testing.assert_close(a, b)
    assert not simple[-1]
    torch.testing.assert_close(hybrid[-1], 0.001 * bound[-1])
    train(model, points(), None, options(steps=20), objective=objective)
    assert float(model.net.second.detach()) != 0.0
    with pytest.raises(UsageError, match="learned_variance"):
        objective.loss(tiny_model(sde), x_0, draws, None)


def test_the_bound_refuses_noisy_data_at_zero():
    x_0 = torch.zeros(4, 2)
    with pytest.raises(UsageError, match="sigma"):
        VLB(steps=10).loss(tiny_model(SDES["ve"]), x_0, drawn(VLB(steps=10), SDES["ve"], x_0), None)


# -- score matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_score_matching_without_a_target_is_denoising_minus_a_constant(name):
    """In expectation, loss and gradient: (3) = the denoising loss minus the weighting, for a network far from the truth."""
    sde, n = SDES[name], 40_000
    model = tiny_model(sde, seed=4, wild=True).double()
    x_0 = gaussian().sample(n, generator=generator())
    weighting = LikelihoodWeighting() if name == "ve" else Simple()
    denoising, exact = DSM(weighting=weighting), ExactScoreMatching(weighting=weighting)
    draws = drawn(denoising, sde, x_0)
    a = denoising.loss(model, x_0, draws, None)
    b = exact.loss(model, x_0, draws, None) + weighting(sde, draws["t"])
    for difference in (a - b, (a - b) * draws["t"]):
        assert abs(float(difference.detach().mean())) < 4 * float(difference.detach().std()) / math.sqrt(n)
    p = list(model.parameters())[-1]
    gradients = [torch.autograd.grad(loss.mean(), p)[0] for loss in (a, b)]
    torch.testing.assert_close(gradients[0], gradients[1], atol=0.05, rtol=0.05)


def test_sliced_traces_are_unbiased():
    sde = SDES["vp"]
    model = tiny_model(sde, dim=3, seed=4, wild=True).double()
    x_0 = torch.randn(64, 3, generator=generator(), dtype=torch.float64)
    sliced = SlicedScoreMatching(probes=500)
    draws = drawn(sliced, sde, x_0)
    exact = ExactScoreMatching().loss(model, x_0, draws, None)
    estimate = sliced.loss(model, x_0, draws, None)
    one = SlicedScoreMatching(probes=1)
    many = torch.stack([one.loss(model, x_0, {**draws, "v": draws["v"][:, i : i + 1]}, None) for i in range(40)])
    stderr = many.std(dim=0) / math.sqrt(500)
    assert float(((estimate - exact) / stderr.clamp(min=1e-9)).detach().abs().max()) < 4.5
    assert float(stderr.detach().max()) > 0


def test_finite_differences_near_the_sliced_loss_with_the_square_of_the_step():
    """With the same directions: the error falls by four where the step is halved, and no second derivative is taken."""
    sde = SDES["vp"]
    model = tiny_model(sde, dim=3, seed=4, wild=True).double()
    x_0 = torch.randn(64, 3, generator=generator(), dtype=torch.float64)
    weighting = LikelihoodWeighting()
    draws = drawn(SlicedScoreMatching(probes=3), sde, x_0)
    sliced = SlicedScoreMatching(probes=3, weighting=weighting).loss(model, x_0, draws, None)
    errors = []
    for step in (0.04, 0.02, 0.01):
        objective = FiniteDifferenceScoreMatching(probes=3, step=step, weighting=weighting)
        errors.append(float((objective.loss(model, x_0, draws, None) - sliced).detach().abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    assert not getattr(FiniteDifferenceScoreMatching(), "differentiates", False)
    for bad in ({"step": 0.0}, {"probes": 0}, {"weighting": 1.0}):
        with pytest.raises(UserError):
            FiniteDifferenceScoreMatching(**bad)


def test_finite_differences_keep_labels_with_their_samples():
    """A class shifts what a network says; every neighbour of a sample has that sample's class."""

    class Shifted(nn.Module):
        sde = SDES["vp"]

        def noise(self, x, t, class_label):
            return x * class_label.unsqueeze(1)

    x_0 = torch.randn(6, 2, generator=generator(), dtype=torch.float64)
    labels = torch.arange(6)
    objective = FiniteDifferenceScoreMatching(probes=2, step=1e-3)
    draws = drawn(objective, SDES["vp"], x_0)
    x, sigma = SDES["vp"].perturb(x_0, draws["t"], draws["eps"]), SDES["vp"].sigma(draws["t"])
    expected = (labels.square() * x.square().sum(1) - 2 * sigma * 2 * labels) / 2
    torch.testing.assert_close(objective.loss(Shifted(), x_0, draws, labels), expected, rtol=1e-5, atol=1e-6)


def test_the_scores_own_scale_is_hyvarinens():
    """w = 1 / sigma^2 at the truth: the mean of |s|^2 + 2 tr grad s is minus the Fisher information."""
    law, n = gaussian(), 20_000
    sde = VESDE(sigma_min=1e-4, sigma_max=1e-3)
    objective = ExactScoreMatching(times=DiscreteTime(levels=1), weighting=ScoreError())
    x_0 = law.sample(n, generator=generator())
    loss = objective.loss(OracleModel(law, sde), x_0, drawn(objective, sde, x_0), None)
    information = float(torch.linalg.inv(law.cov).trace())
    assert float(loss.mean()) == pytest.approx(-information / 2, abs=4 * float(loss.std()) / math.sqrt(n))


def test_an_energy_learns_by_exact_score_matching():
    """The score of a Gaussian from points alone; the loss comes near that of the truth."""
    law, sde = gaussian(), SDES["vp"]
    split = points(512)
    split.x.copy_(law.sample(512, generator=generator()).float())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.EnergyModel(models.MLP(dim=2, width=16, depth=1), sde, data_std=1.0)
    o = options(steps=150, batch_size=64, learning_rate=2e-2, warmup=10, schedule="cosine", log_every=50)
    losses = train(model, split, None, o, objective=SlicedScoreMatching()).losses
    snr = sde.log_snr(torch.linspace(sde.t_min, 1, 4001, dtype=torch.float64)).exp().unsqueeze(
        1
    ) * torch.linalg.eigvalsh(law.cov)
    best = float((snr / (1 + snr)).mean()) - 1
    assert losses[-1][1] == pytest.approx(best, abs=0.1) and losses[0][1] > losses[-1][1]


def test_ddpm_on_grey_values_trains_with_the_discretised_bound():
    x = torch.randint(0, 4, (64, 1, 4, 4), generator=generator(), dtype=torch.uint8)
    dataset = from_tensor(x, levels=4)
    sde = TableVPSDE(betas=linear_betas(steps=50, first=0.01, last=0.2))
    model = tiny_model(sde, dim=16)
    o = options(steps=300, batch_size=50, dequantize=False, log_every=50)
    losses = train(model, dataset.split("train"), dataset.transform(), o, objective=VLB(steps=50, bin_width=0.5)).losses
    assert (
        math.log(4) - 0.1 < losses[-1][1] < losses[0][1]
    )  # four equally likely values: log 4, but for memorised points
