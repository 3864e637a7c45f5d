"""The batch's mean as the target of denoising: unbiased to rounding where all batches can be counted, and less variable."""

import itertools
import math

import pytest
import torch
from oracles import SDES
from training_cases import options, points, tiny_model

from numerics import UserError
from sde_lib import VESDE
from sde_lib.analytic import EmpiricalDistribution, GaussianMixture
from training import DSM, LikelihoodWeighting, LossHistory, StableTarget, stable_noise, train
from training.streams import StepStreams

LAW = GaussianMixture(
    means=torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), stds=torch.tensor([0.3, 0.4]), weights=torch.tensor([0.3, 0.7])
)
VE = VESDE(sigma_min=0.01, sigma_max=10.0)


def time_of(sde, sigma):
    """When sigma / alpha is `sigma`."""
    return float(sde.time_of_log_snr(torch.tensor(-2 * math.log(sigma), dtype=torch.float64)))


def drawn(objective, sde, x_0, step=0):
    return objective.draw(sde, x_0.shape, StepStreams(0, step), dtype=x_0.dtype)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", SDES)
def test_the_target_is_unbiased_whatever_the_size_of_the_batch(name, n):
    """Of three points with unequal weights all n^3 batches are counted, each as often as it occurs with the noised point x:
    weight prod p(x^i) times the density of x given x^1, the point that it came from."""
    sde, t = SDES[name], torch.full((1,), 0.4, dtype=torch.float64)
    support = torch.tensor([[-1.0, 0.2], [0.4, 1.0], [0.9, -0.8]], dtype=torch.float64)
    p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    x = torch.tensor([[0.3, 0.1]], dtype=torch.float64)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    numerator, denominator = torch.zeros(2, dtype=torch.float64), 0.0
    for batch in itertools.product(range(3), repeat=n):
        weight = p[list(batch)].prod() * (-(x - alpha * support[batch[0]]).square().sum() / (2 * sigma**2)).exp()
        numerator += weight * stable_noise(sde, x, t, support[list(batch)])[0]
        denominator += weight
    k = p * (-(x - alpha * support).square().sum(1) / (2 * sigma**2)).exp()
    truth = (x[0] - alpha * (k @ support) / k.sum()) / sigma
    torch.testing.assert_close(numerator / denominator, truth, rtol=1e-9, atol=1e-12)


def test_the_target_is_the_score_of_the_batch():
    batch = LAW.sample(50, generator=torch.Generator().manual_seed(0))
    t = torch.full((20,), time_of(VE, 0.3), dtype=torch.float64)
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    score = EmpiricalDistribution(batch).score(VE)(x, t)
    torch.testing.assert_close(stable_noise(VE, x, t, batch), -0.3 * score, rtol=1e-6, atol=1e-9)


def test_float32_is_enough_at_small_noise():
    batch = LAW.sample(200, generator=torch.Generator().manual_seed(0))
    t = torch.full((200,), time_of(VE, 0.011), dtype=torch.float64)
    x = VE.perturb(batch, t, torch.randn(200, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    found = stable_noise(VE, x.float(), t, batch.float())
    torch.testing.assert_close(
        found.double(), stable_noise(VE, x.float().double(), t, batch.float().double()), rtol=1e-3, atol=1e-3
    )


def test_its_error_falls_with_the_batch_and_is_below_that_of_one_noise():
    """The mean square of target - truth falls as 1 / n, and its mean is 0 against functions of x."""
    sigma, n = 0.5, 64
    errors = {}
    for size in (n, 16 * n):
        found, alone = [], []
        for i in range(40):
            g = torch.Generator().manual_seed(i)
            x_0 = LAW.sample(size, generator=g)
            eps = torch.randn(x_0.shape, generator=g, dtype=torch.float64)
            t = torch.full((size,), time_of(VE, sigma), dtype=torch.float64)
            x = VE.perturb(x_0, t, eps)
            truth = -sigma * LAW.score(VE)(x, t)
            off = stable_noise(VE, x[:n], t[:n], x_0) - truth[:n]
            found.append(
                torch.stack([off.square().mean(), (off * x[:n]).mean(), (off * x[:n].sin()).mean(), off.mean()])
            )
            alone.append((eps - truth).square().mean())
        found = torch.stack(found)
        errors[size] = float(found[:, 0].mean())
        mean, stderr = found[:, 1:].mean(dim=0), found[:, 1:].std(dim=0) / math.sqrt(len(found))
        assert bool((mean.abs() < 3.5 * stderr).all())
        assert errors[size] < 0.15 * float(torch.stack(alone).mean())
    assert 8 < errors[n] / errors[16 * n] < 32


def gradients(objective, model, batches):
    found = []
    for i in range(batches):
        x_0 = LAW.sample(64, generator=torch.Generator().manual_seed(i)).float()
        draws = drawn(objective, model.sde, x_0, i)
        loss = (objective.loss(model, x_0, draws, None) * draws["weight"]).mean()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(found).double()


@pytest.mark.parametrize("every", [1, 4])
def test_its_gradient_has_the_mean_of_denoisings(every):
    """Along fixed directions, on other batches of noise, within standard errors; and at one point in four as at all."""
    model = tiny_model(VE, wild=True)
    stable = gradients(StableTarget(weighting=LikelihoodWeighting(), every=every), model, 200)
    plain = gradients(DSM(weighting=LikelihoodWeighting()), model, 200)
    along = torch.randn(stable.shape[1], 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = stable @ along, plain @ along
    stderr = (a.var(dim=0) / len(a) + b.var(dim=0) / len(b)).sqrt()
    assert bool(((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * stderr).all())
    assert float(a.mean(dim=0).abs().max()) > 8 * float(stderr.max())  # so a factor would be seen


def test_every_leaves_the_other_points_out():
    model = tiny_model(VE, wild=True)
    objective, x_0 = StableTarget(every=4), LAW.sample(10, generator=torch.Generator().manual_seed(0)).float()
    draws = drawn(objective, VE, x_0)
    assert all(len(value) == 10 for value in draws.values())
    loss = objective.loss(model, x_0, draws, None)
    assert loss.nonzero().flatten().tolist() == [0, 4, 8]


def test_points_are_compared_with_those_of_their_class():
    """As if each class were a batch of its own; a label that was dropped is a class of its own too."""
    batch = LAW.sample(30, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    t = torch.full((30,), time_of(VE, 0.5), dtype=torch.float64)
    x = VE.perturb(batch, t, torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    found = stable_noise(VE, x, t, batch, same=labels.unsqueeze(1) == labels)
    for c in range(3):
        rows = labels == c
        torch.testing.assert_close(found[rows], stable_noise(VE, x[rows], t[rows], batch[rows]))


def test_the_loss_compares_within_classes_and_tells_the_class():
    class Told(torch.nn.Module):
        sde = VE

        def noise(self, x, t, class_label):
            return x * class_label.unsqueeze(1)

    x_0, labels = LAW.sample(12, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    objective = StableTarget(every=2)
    draws = drawn(objective, VE, x_0)
    t, eps = draws["t"][::2], draws["eps"][::2]
    x, asked = VE.perturb(x_0[::2], t, eps), labels[::2]
    target = torch.stack([stable_noise(VE, x[i : i + 1], t[i : i + 1], x_0[labels == asked[i]])[0] for i in range(6)])
    expected = 2 * (target - x * asked.unsqueeze(1)).square().mean(dim=1)
    torch.testing.assert_close(objective.loss(Told(), x_0, draws, labels)[::2], expected)


def test_it_trains_a_part_at_a_time():
    model = tiny_model(VE, wild=True)
    result = train(
        model,
        points(),
        None,
        options(steps=2, log_every=1, accumulate=2, precision="bf16"),
        objective=StableTarget(every=3),
    )
    assert math.isfinite(result.losses[-1][1])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="every=0"):
        StableTarget(every=0)
    with pytest.raises(UserError, match="learns from the losses"):
        StableTarget(every=2, times=LossHistory())
    with pytest.raises(UserError, match="weighting"):
        StableTarget(weighting="simple")
