"""A chain's bound with fixed and learned variances: its terms, its total against true densities, and its bars."""

import math

import pytest
import torch
from torch import nn

import models
from data import create
from likelihood import GaussianChain, elbo
from likelihood.bounds import DiscretizedGaussian
from numerics import SampleStreams, UserError, expand_as
from samplers import DDPMIndices
from sde_lib import VPSDE, TableVPSDE
from sde_lib.analytic import Gaussian
from training import VLB, cosine_betas, linear_betas
from workflow.bound_levels import levels_of

N = 40
BETAS = linear_betas(steps=N, first=2e-3, last=0.4)
SDE = TableVPSDE(betas=BETAS, t_min=1 / N, t_end=1 / N)
ROWS = torch.arange(1, N + 1, dtype=torch.float64) / N
LAW = Gaussian(torch.tensor([0.3, -0.6]), torch.full((2,), 0.49))


def chain(variance="posterior", times=ROWS, sde=SDE):
    return GaussianChain(sde=sde, times=times, variance=variance)


class Exact:
    """The score of `LAW` with the place w at which the chain's variance is that of x_s given x_t, which is a normal law's."""

    def __init__(self, times=ROWS, shift=0.0):
        self.times, self.score, self.shift = times, LAW.score(SDE), shift
        self.places = torch.tensor([self._place(k) for k in range(len(times))], dtype=torch.float64)

    def __call__(self, x, t):
        return self.score(x, t) + self.shift

    def score_and_variance(self, x, t):
        index = (t.unsqueeze(1) - self.times).abs().argmin(dim=1)
        place = self.places[index]
        return self(x, t), expand_as(place, x.double()).expand(x.shape)

    def _place(self, k):
        s2 = 0.49
        alpha, sigma = (float(v) for v in (SDE.alpha(self.times[k]), SDE.sigma(self.times[k])))
        left = s2 * sigma**2 / (alpha**2 * s2 + sigma**2)  # variance of x_0 given x_t
        if k == 0:
            kappa2 = (sigma / alpha) ** 2
            v, r = _transition(self.times[0], self.times[1])
            small = v * r
            # log left = w log kappa^2 + (1 - w) log beta~ of the next step
            return (math.log(left) - math.log(small)) / (math.log(kappa2) - math.log(small))
        v, r = _transition(self.times[k - 1], self.times[k])
        alpha_s = float(SDE.alpha(self.times[k - 1]))
        true = v * r + (alpha_s * v / sigma**2) ** 2 * left
        return (math.log(true) - math.log(v * r)) / -math.log(r)


def _transition(s, t):
    """v, and beta~ / v."""
    return float(SDE.transition_std(s, t)) ** 2, float(SDE.sigma(s) / SDE.sigma(t)) ** 2


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_each_term_is_the_divergence_of_two_normal_laws(place):
    """Against torch.distributions, with DDPM's own equations (6) and (7) for q and (15) of its successor for v."""
    from torch.distributions import Normal, kl_divergence

    class Score(Exact):
        def score_and_variance(self, x, t):
            return self(x, t), torch.full_like(x, place, dtype=torch.float64)

    x_0 = LAW.sample(N - 1, generator=torch.Generator().manual_seed(0))
    i = torch.arange(1, N)  # rows i + 1 to i, counted from 1
    score = Score(shift=0.2)
    found = chain("learned").divergence(score, x_0, i, torch.Generator().manual_seed(1))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    beta = torch.tensor(BETAS, dtype=torch.float64)
    abar = (1 - beta).cumprod(0)
    now, before, b = (v.unsqueeze(1) for v in (abar[1:], abar[:-1], beta[1:]))
    x_t = now.sqrt() * x_0 + (1 - now).sqrt() * eps
    x_hat = (x_t + (1 - now) * score(x_t, ROWS[1:])) / now.sqrt()
    tilde = (1 - before) / (1 - now) * b

    def mean(x):
        return (before.sqrt() * b * x + (1 - b).sqrt() * (1 - before) * x_t) / (1 - now)

    v = torch.exp(place * b.log() + (1 - place) * tilde.log())
    direct = kl_divergence(Normal(mean(x_0), tilde.sqrt()), Normal(mean(x_hat), v.sqrt())).sum(dim=1)
    torch.testing.assert_close(found, direct, rtol=1e-7, atol=1e-10)
    for other in ("posterior", "transition"):
        if place == float(other == "transition"):
            again = chain(other).divergence(score, x_0, i, torch.Generator().manual_seed(1))
            torch.testing.assert_close(again, found)


def test_the_decoders_variance_is_clipped_to_the_second_rows():
    """beta~_1 is 0: at w = 0 the decoder has beta~_2's, at w = 1 its own noise's (and no logarithm of 0 anywhere)."""

    class Score(Exact):
        place = 0.0

        def score_and_variance(self, x, t):
            return torch.zeros_like(x), torch.full_like(x, self.place)

    score, x_0 = Score(), torch.zeros(20_000, 1, dtype=torch.float64)
    abar = (1 - torch.tensor(BETAS, dtype=torch.float64)).cumprod(0)
    kappa2 = float((1 - abar[0]) / abar[0])
    tilde = float((1 - abar[0]) / (1 - abar[1]) * BETAS[1])
    for place, variance in ((0.0, tilde), (1.0, kappa2)):
        score.place = place
        found = chain("learned").reconstruction(score, x_0, generator=torch.Generator().manual_seed(0))
        # x_0-hat = kappa eps, so -log N(0; kappa eps, v) has the mean (log(2 pi v) + kappa^2 / v) / 2
        expected = 0.5 * (math.log(2 * math.pi * variance) + kappa2 / variance)
        assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(len(found))
        assert 0 < variance < 2 * BETAS[0]


def test_the_bound_of_an_exact_chain_is_the_density():
    """With x_s given x_t as it truly is, at every step and in the decoder, the bound is -log p(x_0) image by image; 60
    images, each within 4.5 of its own standard errors, and the mean within 4."""
    x_0 = LAW.sample(60, generator=torch.Generator().manual_seed(3))
    found = chain("learned").bound(
        Exact(), x_0, draws=400, reconstructions=64, data_std=0.7, generator=SampleStreams(0, range(60))
    )
    truth = -LAW.log_prob(SDE, x_0, torch.tensor(0.0, dtype=torch.float64))
    z = (found.nats - truth) / found.stderr
    assert float(z.abs().max()) < 4.5, z
    mean = float((found.nats - truth).mean()) / (float(found.stderr.square().sum().sqrt()) / 60)
    assert abs(mean) < 4
    assert float(found.stderr.mean()) < 0.25  # or this says little


@pytest.mark.parametrize("variance", ["posterior", "transition", "learned"])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_bound_is_a_bound(variance, shift):
    """Over the data, no less than the entropy (within 4 standard errors), whatever the score; and more for a wrong one."""
    x_0 = LAW.sample(400, generator=torch.Generator().manual_seed(4))
    few = torch.tensor([1, 4, 10, 20, 30, 40], dtype=torch.float64) / N
    score = Exact(times=few, shift=shift)
    found = chain(variance, times=few).bound(
        score, x_0, draws=16, reconstructions=4, data_std=0.7, generator=SampleStreams(0, range(400))
    )
    excess = found.nats + LAW.log_prob(SDE, x_0, torch.tensor(0.0, dtype=torch.float64))
    error = float(excess.std()) / 20
    assert float(excess.mean()) > -4 * error
    if variance == "posterior" or shift:
        assert float(excess.mean()) > 4 * error, "five steps with the smaller variance are not exact"
    elif variance == "learned":
        assert abs(float(excess.mean())) < 4 * error


@pytest.mark.parametrize("grey", [False, True])
def test_the_fixed_variances_bound_is_elbos(grey):
    """Two programs for one number: (2) of `likelihood.bounds` over equal steps, and this one with the posterior's variance."""
    digits = create("digits")
    transform, x = digits.transform(-1.0, 1.0), digits.split("test").x[:100].flatten(1)[:, 20:24]
    x_0 = transform.centres(x)
    law = Gaussian(torch.zeros(4), torch.full((4,), 0.5))
    data, decoder = (x, DiscretizedGaussian(transform=transform)) if grey else (None, None)
    one = elbo(
        SDE, law.score(SDE), x_0, data=data, decoder=decoder, steps=N - 1, draws=64, t_min=1 / N, data_std=0.7,
        reconstructions=16, generator=SampleStreams(0, range(100)),
    )  # fmt: skip
    two = chain().bound(
        law.score(SDE), x_0, data=data, transform=transform if grey else None, draws=64, data_std=0.7,
        reconstructions=16, generator=SampleStreams(1, range(100)),
    )  # fmt: skip
    for part in ("diffusion", "reconstruction"):
        a, b = getattr(one, part), getattr(two, part)
        error = torch.hypot(getattr(one, f"{part}_stderr"), getattr(two, f"{part}_stderr"))
        assert abs(float((a - b).sum() / error.square().sum().sqrt())) < 4, part
    torch.testing.assert_close(one.prior, two.prior)


class TwoHeads(nn.Module):
    """A network whose second half is a function of x, as a learned variance is."""

    learned_variance = True

    def __init__(self):
        super().__init__()
        self.net = models.MLP(dim=2, width=16, depth=1, learned_variance=True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for p in self.net.parameters():
                nn.init.normal_(p, std=0.2)

    def forward(self, x, label, class_label=None):
        return self.net(x, label)


def test_the_training_loss_is_the_bounds_term_times_the_number_of_steps():
    """The slip: one L_i stands for a sum of N of them. N times its term plus L_T, for every step, by the other program."""
    model = models.ScoreModel(TwoHeads(), SDE, models.NOISE).double().eval()
    x_0 = LAW.sample(N - 1, generator=torch.Generator().manual_seed(5))
    eps = torch.randn(N - 1, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    loss = VLB(steps=N, variance="learned").loss(model, x_0, {"t": ROWS[1:], "eps": eps}, None)
    term = chain("learned").divergence(model, x_0, torch.arange(1, N), torch.Generator().manual_seed(6))
    alpha2 = float(SDE.alpha(1.0)) ** 2
    prior = 0.5 * (alpha2 * x_0.square().sum(dim=1) + 2 * (-alpha2 - math.log1p(-alpha2)))
    torch.testing.assert_close(loss, (N * term + prior) / 2, rtol=1e-6, atol=1e-9)


def test_a_chain_over_some_rows_has_its_own_variances():
    """Not the betas of the rows that it stops at, but those of its own steps (section 4 of Nichol and Dhariwal)."""
    sde = TableVPSDE(betas=cosine_betas(steps=1000), t_min=1e-3, t_end=1e-3)
    times = DDPMIndices(train_steps=1000, spacing="linspace")(sde, 9).flip(0)
    assert torch.equal((times * 1000).round(), torch.tensor([1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]).double())
    law = Gaussian(torch.zeros(1), torch.ones(1))  # eps-hat = sigma x, so every term is a closed form
    x_0 = torch.full((4000, 1), 0.5, dtype=torch.float64)
    for variance, place in (("posterior", 0.0), ("transition", 1.0)):
        own = GaussianChain(sde=sde, times=times, variance=variance)
        found = own.divergence(law.score(sde), x_0, torch.full((4000,), 3), torch.Generator().manual_seed(0))
        s, t = (float(sde.alpha(v)) ** 2 for v in times[2:4])
        beta, tilde = 1 - t / s, (1 - s) / (1 - t) * (1 - t / s)
        e = place * math.log(beta / tilde)
        # |x_0 - x_0-hat|^2 = |(1 - abar) x_0 - sqrt(abar (1 - abar)) eps|^2
        square = (s / (1 - s) - t / (1 - t)) * (((1 - t) * 0.5) ** 2 + t * (1 - t))
        expected = 0.5 * (e + math.exp(-e) * (1 + square) - 1)
        assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(4000)


def test_the_bars_over_the_levels_are_calibrated():
    """Closed form for every level, 25 times: rms(error / bar) is 1 within 7 % in 16 dimensions, where a draw is nearly
    normal, and the totals within 4 of their bars. (In 2 dimensions, where a term is an exponential law's, 12 draws give
    1.26.)"""
    D, draws, ratios, totals = 16, 12, [], []
    law = Gaussian(torch.full((D,), 0.3), torch.full((D,), 0.49))
    alpha2 = SDE.alpha(ROWS).square()
    shares = alpha2 * 0.49 / (alpha2 * 0.49 + 1 - alpha2)
    gaps = torch.expm1(SDE.log_snr(ROWS)[:-1] - SDE.log_snr(ROWS)[1:])
    truth = 0.5 * gaps * shares[1:] / math.log(2)
    x_0 = law.sample(50_000, generator=torch.Generator().manual_seed(8))
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        found = levels_of(chain(), law.score(SDE), x_0, draws=draws, generator=generator, batch_size=512, shown=False)
        assert found.means.shape == found.bars.shape == (N + 1,)
        ratios.append((found.means[1:-1] - truth) / found.bars[1:-1])
        totals.append((float(found.means[1:-1].sum() - truth.sum())) / float(found.bars[1:-1].square().sum().sqrt()))
    rms = float(torch.stack(ratios).square().mean().sqrt())
    assert 0.93 < rms < 1.07, rms
    assert max(map(abs, totals)) < 4 and abs(sum(totals)) / 5 < 4


def test_refusals():
    times = [1e-3, 0.5, 1.0]
    for bad, words in (
        (lambda: chain(times=torch.tensor([0.5, 0.1, 1.0])), "rising"),
        (lambda: chain(times=torch.tensor([0.0, 0.5, 1.0])), "rising"),
        (lambda: chain(times=torch.tensor([0.1, 0.5])), "T = 1"),
        (lambda: chain(times=torch.tensor([1.0])), "rising"),
        (lambda: GaussianChain(sde=VPSDE(), times=times, variance="learnt"), "'posterior', 'transition', 'learned'"),
        (lambda: chain("learned").bound(LAW.score(SDE), torch.zeros(3, 2)), "score_and_variance"),
        (
            lambda: chain().bound(LAW.score(SDE), torch.zeros(3, 2), data=torch.zeros(3, 2, dtype=torch.uint8)),
            "transform",
        ),
    ):
        with pytest.raises(UserError, match=words) as caught:
            bad()
        assert "\n" not in str(caught.value)
