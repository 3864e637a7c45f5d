"""The VAE's bound against linear-Gaussian models and exact scores; its priors; what its encoder is taught."""

import math

import pytest
import torch
from torch.distributions import Normal

from likelihood import elbo
from models import MLP, VAE, MixturePrior, Preconditioned, ScoreModel, ScorePrior, StandardPrior
from models.ddgm import UnitGaussian, normal_log_prob
from models.vae import latent_sde
from numerics import UserError
from sde_lib.analytic import GaussianMixture
from training import LatentELBO
from training.streams import StepStreams

W, R = 0.8, 0.5


class LearnedGaussian(UnitGaussian):
    """N(mean, exp(log_std)^2)."""

    def log_prob(self, x, mean, log_std):
        return normal_log_prob(x, mean, 2 * log_std)


class LinearVAE(VAE):
    """p(z) = N(0, 1), p(x | z) = N(W z, R^2) and its exact posterior, or one that is `off`."""

    def __init__(self, prior=None, off=0.0):
        super().__init__(dim=1, latent=1, decoder=LearnedGaussian(), prior=prior or StandardPrior())
        self.off = off

    def encode(self, x):
        precision = 1 + W**2 / R**2
        mean = W / R**2 / precision * x.flatten(1) + self.off
        return mean, torch.full_like(mean, -math.log(precision))

    def decode(self, z, shape):
        return (W * z).reshape(len(z), *shape), torch.full((len(z), *shape), math.log(R), dtype=z.dtype)


def exact_score():
    """The score of N(0, I) under the latents' SDE: a network that says nothing, preconditioned."""
    return ScoreModel(MLP(1, width=8, depth=1), latent_sde(), Preconditioned(data_std=1.0)).eval()


def drawn(n, d=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.randn(n, 3, d, generator=generator, dtype=torch.float64), u[torch.randperm(n, generator=generator)]


def mean_of(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


class TestBound:
    def test_with_the_exact_posterior_it_is_the_log_density(self):
        x = torch.full((20_000, 1), 0.9, dtype=torch.float64)
        parts = LinearVAE().parts(x, *drawn(len(x)))
        mean, stderr = mean_of(sum(parts))
        truth = -float(Normal(0.0, math.hypot(W, R)).log_prob(x[0]))
        assert abs(mean - truth) < 4 * stderr

    def test_with_another_it_is_larger_by_the_divergence(self):
        x, off = torch.full((20_000, 1), 0.9, dtype=torch.float64), 0.4
        mean, stderr = mean_of(sum(LinearVAE(off=off).parts(x, *drawn(len(x)))))
        truth = -float(Normal(0.0, math.hypot(W, R)).log_prob(x[0])) + off**2 / 2 * (1 + W**2 / R**2)
        assert abs(mean - truth) < 4 * stderr

    def test_a_score_as_the_prior_gives_the_same_where_it_is_exact(self):
        """Joint bound = exact log-density for the score of N(0, I), up to the last step's share below a noise of 0.01."""
        x = torch.full((60_000, 1), 0.9, dtype=torch.float64)
        model = LinearVAE(prior=ScorePrior(exact_score()))
        mean, stderr = mean_of(sum(model.parts(x, *drawn(len(x)))).detach())
        truth = -float(Normal(0.0, math.hypot(W, R)).log_prob(x[0]))
        assert abs(mean - truth) < 4 * stderr + 1e-3 and stderr < 0.1

    def test_the_cross_entropys_bound_is_likelihood_elbo(self):
        score = ScoreModel(MLP(2, width=8, depth=1), latent_sde(), Preconditioned(data_std=1.0)).double().eval()
        for p in score.parameters():
            torch.nn.init.normal_(p, std=0.3)
        z = torch.tensor([[0.7, -0.3]], dtype=torch.float64).expand(20_000, 2)
        eps, u = drawn(len(z), 2)
        with torch.no_grad():
            mean, stderr = mean_of(ScorePrior(score).cross_entropy(z, z, z, u, eps[:, 1:]))
        other = elbo(score.sde, score, z[:50], draws=200, data_std=1.0, generator=torch.Generator().manual_seed(3))
        expected, error = mean_of(other.nats)
        assert abs(mean - expected) < 4 * math.hypot(stderr, error)

    def test_the_encoder_is_taught_by_the_true_gradient(self):
        """d CE / dz = z for N(0, I): only the likelihood weighting, and the ends, give that; a simple weighting does not."""
        prior = ScorePrior(exact_score())
        z = torch.full((60_000, 1), 0.8, dtype=torch.float64, requires_grad=True)
        eps, u = drawn(len(z))
        (gradient,) = torch.autograd.grad(prior.cross_entropy(z, z, z, u, eps[:, 1:]).sum(), z)
        mean, stderr = mean_of(gradient)
        assert abs(mean - 0.8) < 4 * stderr + 1e-3 and stderr < 0.1

    def test_the_objective_is_the_bound_by_dimension(self):
        model = LinearVAE(prior=ScorePrior(exact_score()))
        x, objective = torch.randn(8, 1), LatentELBO(latent=1)
        draws = objective.draw(model.sde, x.shape, StepStreams(0, 0))
        torch.testing.assert_close(objective.loss(model, x, draws, None), sum(model.parts(x, draws["eps"], draws["u"])))

    def test_a_deterministic_one_has_only_the_reconstruction(self):
        model = VAE(
            dim=3, latent=2, decoder=UnitGaussian(), prior=StandardPrior(), width=8, deterministic=True
        ).double()
        x = torch.randn(5, 3, dtype=torch.float64)
        eps, u = drawn(5, 2)
        reconstruction, entropy, cross = model.parts(x, eps, u)
        mean = model.decode(model.encode(x)[0], (3,))[0]
        torch.testing.assert_close(reconstruction, -Normal(mean, 1.0).log_prob(x).sum(dim=1))
        assert not bool(entropy.any()) and not bool(cross.any())


class TestPriors:
    def test_the_mixture_is_the_oracles(self):
        prior = MixturePrior(dim=2, components=3).double()
        for p in prior.parameters():
            torch.nn.init.normal_(p, std=0.5)
        law = GaussianMixture(prior.means.detach(), prior.log_stds.detach().exp(), prior.logits.detach().softmax(0))
        z = torch.randn(20, 2, dtype=torch.float64)
        # under VP at t = 0 there is no noise
        torch.testing.assert_close(prior.log_prob(z), law.log_prob(latent_sde(), z, 0.0))

    def test_the_mixtures_samples_have_its_mean(self):
        prior = MixturePrior(dim=1, components=3).double()
        prior.means.data[:] = torch.tensor([[-2.0], [0.0], [3.0]])
        prior.logits.data[:] = torch.tensor([0.5, 0.2, 0.3]).log()
        n = 40_000
        generator = torch.Generator().manual_seed(0)
        eps = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        z = prior.sample(eps, torch.rand(n, generator=generator, dtype=torch.float64)).detach()
        mean, stderr = mean_of(z)
        assert abs(mean - (-1.0 + 0.9)) < 4 * stderr

    def test_the_standard_priors_cross_entropy_is_the_closed_form(self):
        q = Normal(torch.tensor([[0.3, -1.0]]), torch.tensor([[0.5, 2.0]]))
        p = Normal(0.0, 1.0)
        expected = (torch.distributions.kl_divergence(q, p) + q.entropy()).sum(dim=1)
        z = torch.zeros(1, 2)
        found = StandardPrior().cross_entropy(z, q.mean, 2 * q.stddev.log(), z[:, 0], z)
        torch.testing.assert_close(found, expected)


def test_a_latent_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="latent=5 for data of 3 numbers"):
        VAE(dim=3, latent=5, decoder=UnitGaussian(), prior=StandardPrior())
    with pytest.raises(UserError, match="latent"):
        LatentELBO(latent=0)
    with pytest.raises(UserError, match="components"):
        MixturePrior(dim=2, components=0)
