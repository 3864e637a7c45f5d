"""The energy's change from one noise level to the next: its target against exact densities, and what is fitted to it."""

import itertools
import math

import pytest
import torch
from oracles import SDES
from training_cases import options, points, tiny_model

import models
from evaluation.plane import Plane
from models.energy import SmoothPotential
from numerics import UserError, expand_as
from sde_lib import VESDE
from sde_lib.analytic import GaussianMixture
from training import DSM, DualScoreMatching, LogNormal, posterior_noise, train
from training.streams import StepStreams

LAW = GaussianMixture(
    means=torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), stds=torch.tensor([0.3, 0.4]), weights=torch.tensor([0.3, 0.7])
)
STEP = 1e-4  # of the clock, for central differences


def times_of(sde, log_kappa):
    return sde.time_of_log_snr(-2 * log_kappa)


def slope_of(sde, energy, x, t):
    """d/dl of `energy(x, t)` - D log alpha at a fixed x / alpha, by central differences."""
    y, l = x / expand_as(sde.alpha(t), x), -sde.log_snr(t) / 2
    ends = []
    for shift in (STEP, -STEP):
        at = times_of(sde, l + shift)
        alpha = sde.alpha(at)
        ends.append(energy(y * expand_as(alpha, y), at) - x[0].numel() * alpha.log())
    return (ends[0] - ends[1]) / (2 * STEP)


def exact_slope(sde, x, t):
    return slope_of(sde, lambda x, t: -LAW.log_prob(sde, x, t), x, t)


@pytest.mark.parametrize("name", SDES)
def test_the_targets_mean_is_the_energys_change(name):
    """Against functions of x, over batches at several noise levels, in standard errors; one sum of five, z below 4.4."""
    sde, found = SDES[name], []
    for i in range(60):
        g = torch.Generator().manual_seed(i)
        x_0 = LAW.sample(64, generator=g)
        t = times_of(sde, torch.linspace(math.log(0.1), math.log(1.5), 64, dtype=torch.float64))
        x = sde.perturb(x_0, t, torch.randn(x_0.shape, generator=g, dtype=torch.float64))
        off = 2 - posterior_noise(sde, x, t, x_0).square - exact_slope(sde, x, t)
        w = x / expand_as(sde.alpha(t), x)
        features = torch.stack(
            [torch.ones(64, dtype=torch.float64), w[:, 0], w[:, 0].square(), w[:, 0].sin(), w[:, 1].square()]
        )
        found.append((features * off).mean(dim=1))
    found = torch.stack(found)
    z = found.mean(dim=0) / (found.std(dim=0) / math.sqrt(len(found)))
    assert float(z.abs().max()) < 4.4
    assert float(found.std()) < 1.0  # or it says nothing


def test_the_square_is_unbiased_whatever_the_size_of_the_batch():
    """Of three points all batches of two and three are counted, as in the test of the mean of eps."""
    sde, t = SDES["vp"], torch.full((1,), 0.4, dtype=torch.float64)
    support = torch.tensor([[-1.0, 0.2], [0.4, 1.0], [0.9, -0.8]], dtype=torch.float64)
    p, x = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), torch.tensor([[0.3, 0.1]], dtype=torch.float64)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    square = (x - alpha * support).square().sum(1) / sigma**2
    k = p * (-square / 2).exp()
    for n in (2, 3):
        numerator, denominator = 0.0, 0.0
        for batch in itertools.product(range(3), repeat=n):
            weight = p[list(batch)].prod() * (-square[batch[0]] / 2).exp()
            numerator += weight * posterior_noise(sde, x, t, support[list(batch)]).square[0]
            denominator += weight
        torch.testing.assert_close(numerator / denominator, (k * square).sum() / k.sum(), rtol=1e-9, atol=0)


def test_the_square_is_that_of_its_class():
    x_0, labels = LAW.sample(30, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    t = times_of(SDES["ve"], torch.full((30,), math.log(0.5), dtype=torch.float64))
    x = SDES["ve"].perturb(x_0, t, torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    found = posterior_noise(SDES["ve"], x, t, x_0, same=labels.unsqueeze(1) == labels).square
    for c in range(3):
        rows = labels == c
        torch.testing.assert_close(found[rows], posterior_noise(SDES["ve"], x[rows], t[rows], x_0[rows]).square)


def energy_model(sde, *, smooth, classes=None, wild=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.MLP(dim=4, width=16, depth=2, num_classes=classes)
        model = models.EnergyModel(net, sde, data_std=0.8, smooth=smooth, normalised=True).double()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3 if wild else 0.0)
    return model


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("name", SDES)
def test_one_pass_gives_the_noise_and_the_energys_own_change(name, smooth):
    sde = SDES[name]
    model = energy_model(sde, smooth=smooth, classes=3)
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(12, 1, 2, 2, generator=g, dtype=torch.float64), torch.arange(12) % 3
    t = times_of(sde, torch.linspace(math.log(0.1), math.log(3.0), 12, dtype=torch.float64))
    found = model.noise_and_slope(x, t, labels)
    torch.testing.assert_close(found.noise, model.noise(x, t, labels))
    expected = slope_of(sde, lambda x, t: model.energy(x, t, labels), x, t)
    torch.testing.assert_close(found.slope, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model.noise_and_slope(x, t, labels).slope, found.slope)


@pytest.mark.parametrize("smooth", [False, True])
def test_a_silent_energy_is_the_log_density_of_its_gaussian(smooth):
    sde = SDES["sub_vp"]
    model, t = energy_model(sde, smooth=smooth, wild=False), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = (sde.alpha(t).square() * 0.64 + sde.sigma(t).square()).sqrt().unsqueeze(1)
    expected = -torch.distributions.Normal(torch.zeros(()), s).log_prob(x).sum(dim=1)
    torch.testing.assert_close(model.energy(x, t), expected)


def test_the_smooth_potentials_output_is_what_its_names_say():
    """Noise and data are those that the target stands for, and the gradient's factor is the energy's."""
    p, g = SmoothPotential(data_std=0.7), torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    alpha, sigma = torch.linspace(0.2, 1, 5, dtype=torch.float64), torch.linspace(2, 0.01, 5, dtype=torch.float64)
    x = alpha.unsqueeze(1) * x_0 + sigma.unsqueeze(1) * eps
    output = p.target(x_0, eps, alpha, sigma)
    torch.testing.assert_close(p.noise(output, x, alpha, sigma), eps)
    torch.testing.assert_close(p.data(output, x, alpha, sigma), x_0)
    model = energy_model(SDES["vp"], smooth=True)
    x, t = x[:, :1].repeat(1, 4).requires_grad_(), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    (slope,) = torch.autograd.grad(model.energy(x, t).sum(), x)
    torch.testing.assert_close(model(x, t), -slope)


class Shifted(torch.nn.Module):
    """The exact energy's noise and slope, off by parameters times functions of x; the squares' means change with the noise."""

    def __init__(self, sde, off=0.0):
        super().__init__()
        self.sde, self.data_std, self.exact = sde, 1.0, LAW.score(sde)
        self.of_noise = torch.nn.Parameter(torch.full((2,), off, dtype=torch.float64))
        self.of_slope = torch.nn.Parameter(torch.full((4,), off, dtype=torch.float64))

    def noise_and_slope(self, x, t, class_label=None):
        w = x / expand_as(self.sde.alpha(t), x)
        features = torch.stack([torch.ones_like(w[:, 0]), w[:, 0], w[:, 0].square(), w[:, 1].square()], dim=1)
        noise = -expand_as(self.sde.sigma(t), x) * self.exact(x, t) + self.of_noise
        return noise, exact_slope(self.sde, x, t) + features @ self.of_slope


def gradients(model, objective, batches=60):
    found = []
    for i in range(batches):
        x_0 = LAW.sample(64, generator=torch.Generator().manual_seed(i))
        draws = objective.draw(model.sde, x_0.shape, StepStreams(0, i), dtype=torch.float64)
        loss = (objective.loss(model, x_0, draws, None) * draws["weight"]).mean()
        found.append(torch.cat(torch.autograd.grad(loss, [model.of_noise, model.of_slope])))
    found = torch.stack(found)
    return found.mean(dim=0) / (found.std(dim=0) / math.sqrt(len(found)))


@pytest.mark.parametrize("name", SDES)
def test_the_loss_is_least_at_the_exact_energy(name):
    """Each derivative is 0 there within its error (six of them, z below 4.5), and is not beside it."""
    objective = DualScoreMatching(times=LogNormal(mean=-0.8, std=0.8), every=2, dual=1.0)
    assert float(gradients(Shifted(SDES[name]), objective).abs().max()) < 4.5
    assert float(gradients(Shifted(SDES[name], off=0.5), objective, batches=20)[:3].min()) > 5


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"got dual=-1\.0"):
        DualScoreMatching(dual=-1.0)
    bare = models.EnergyModel(models.MLP(dim=2, width=8, depth=1), VESDE())
    with pytest.raises(UserError, match="normalised=True"):
        bare.noise_and_slope(torch.zeros(1, 2), torch.tensor(0.5))
    with pytest.raises(UserError, match=r"without \.noise_and_slope"):
        train(tiny_model(), points(), None, options(steps=1), objective=DualScoreMatching())
    with pytest.raises(UserError, match="compile=True"):
        train(
            energy_model(VESDE(), smooth=True),
            points(dim=4),
            None,
            options(compile=True),
            objective=DualScoreMatching(),
        )


@pytest.mark.slow
def test_it_learns_the_weights_of_separated_modes_and_log_z():
    """At sigma = 0.15 with five standard deviations between two modes; denoising's energy has no log Z of 0."""
    law = GaussianMixture(
        means=torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), stds=torch.tensor([0.25, 0.25]), weights=torch.tensor([0.2, 0.8])
    )
    split = points(4096)
    split.x.copy_(law.sample(4096, generator=torch.Generator().manual_seed(0)).float())
    share = float((split.x[:, 0] > 0).double().mean())
    sde, plane = VESDE(sigma_min=0.01, sigma_max=10.0), Plane(half=4.0, n=160)
    t = times_of(sde, torch.tensor(math.log(0.15), dtype=torch.float64))
    found = {}
    times = LogNormal(mean=-0.8, std=1.2)
    for name, objective in {"dual": DualScoreMatching(times=times, every=8), "denoising": DSM(times=times)}.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = models.MLP(dim=2, width=48, depth=2)
        conditioning = models.CONDITIONINGS.create("log_snr", center=2.0, scale=4.0)
        model = models.EnergyModel(net, sde, data_std=0.8, conditioning=conditioning, smooth=True, normalised=True)
        o = options(steps=500, batch_size=1024, learning_rate=5e-3, warmup=20, schedule="cosine", ema=(0.98,))
        train(model, split, None, o, objective=objective).load_averages(model)
        law_of = plane.law(lambda x, m=model: -m.energy(x.float(), t).double())
        found[name] = float(law_of.mass[plane.axis > 0].sum()), law_of.log_z
    assert found["dual"][0] == pytest.approx(share, abs=0.02)
    assert abs(found["dual"][1]) < 0.05 < abs(found["denoising"][1])
