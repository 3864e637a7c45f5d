"""The hierarchical VAE: its bound against exact laws and an independent estimate; each slip of the published sketch."""

import math

import pytest
import torch
from torch.distributions import Normal

from models.ddgm import DDGM, GreyGaussian, OwnSteps, SharedSteps, Steps, UnitGaussian, normal_kl, normal_log_prob
from numerics import UserError
from sde_lib import linear_betas
from training import NegativeELBO, OneStepELBO
from training.streams import StepStreams

BETAS = (0.6, 0.5, 0.4, 0.3, 0.2)


class LearnedGaussian(UnitGaussian):
    """N(mean, exp(log_std)^2), for exact decoders."""

    def log_prob(self, x, mean, log_std):
        return normal_log_prob(x, mean, 2 * log_std)


class Stationary(Steps):
    """The exact reverse of the chain on data that are N(0, 1): z_{i-1} given z_i is N(sqrt(1 - beta_i) z_i, beta_i)."""

    def __init__(self, betas, off=0.0):
        super().__init__()
        self.betas, self.off, self.calls = torch.tensor(betas, dtype=torch.float64), off, []

    def reverse(self, i, z):
        self.calls.append((i, z))
        beta = self.betas[torch.as_tensor(i).expand(len(z)) - 1].unsqueeze(1)
        return (1 - beta).sqrt() * z + self.off, beta.log().expand_as(z)

    def decode(self, z):
        beta = self.betas[0]
        return (1 - beta).sqrt() * z, (beta.log() / 2).expand_as(z)


def drawn(n, dim=3, steps=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64), torch.randn(
        n, steps, dim, generator=generator, dtype=torch.float64
    )


def wild(steps=5, dim=3, std=0.4):
    """A model far from any truth, in float64, with a decoder of learned variance."""
    net = OwnSteps(dim=dim, steps=steps, width=16).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return DDGM(net, BETAS[:steps], UnitGaussian())


class TestBound:
    def test_with_the_exact_reverse_every_draw_of_the_sampled_form_is_the_log_density(self):
        """p(x, z) / q(z | x) is then p(x), whatever z: a single wrong index, sign or factor shows."""
        model = DDGM(Stationary(BETAS), BETAS, LearnedGaussian())
        x, eps = drawn(50)
        found = model.terms(x, eps, estimator="sampled").sum(dim=1)
        torch.testing.assert_close(found, -Normal(0.0, 1.0).log_prob(x).sum(dim=1), rtol=1e-12, atol=1e-10)

    def test_the_closed_form_has_that_mean(self):
        model = DDGM(Stationary(BETAS), BETAS, LearnedGaussian())
        x, eps = drawn(40_000)
        x[:] = torch.tensor([0.3, -1.0, 2.0])
        found = model.terms(x, eps, estimator="closed_form").sum(dim=1)
        truth = float(-Normal(0.0, 1.0).log_prob(x[0]).sum())
        assert abs(float(found.mean()) - truth) < 4 * float(found.std()) / math.sqrt(len(x))

    def test_it_is_a_bound_and_not_tight_for_a_wrong_reverse(self):
        x, eps = drawn(20_000)
        truth = -Normal(0.0, 1.0).log_prob(x).sum(dim=1)
        for estimator in ("sampled", "closed_form"):
            gap = DDGM(Stationary(BETAS, off=0.3), BETAS, LearnedGaussian()).terms(x, eps, estimator=estimator)
            gap = gap.sum(dim=1) - truth
            # each of four steps costs off^2 / (2 beta) a dimension
            expected = 3 * sum(0.3**2 / (2 * b) for b in BETAS[1:])
            assert abs(float(gap.mean()) - expected) < 4 * float(gap.std()) / math.sqrt(len(gap))

    def test_both_forms_agree_with_an_estimate_of_their_own(self):
        """log q - log p of whole chains, by torch.distributions and a loop that shares nothing with the model."""
        model, n = wild(), 40_000
        x = torch.tensor([[0.5, -0.2, 0.9]], dtype=torch.float64).expand(n, 3)
        generator = torch.Generator().manual_seed(5)
        z, total = x, 0.0
        path = []
        for beta in BETAS:
            q = Normal(math.sqrt(1 - beta) * z, math.sqrt(beta))
            z = q.mean + q.stddev * torch.randn(n, 3, generator=generator, dtype=torch.float64)
            total = total + q.log_prob(z).sum(dim=1)
            path.append(z)
        total = total - Normal(0.0, 1.0).log_prob(path[-1]).sum(dim=1)
        for k in range(4, 0, -1):
            mean, log_var = model.net.reverse(k + 1, path[k])
            total = total - Normal(mean, (log_var / 2).exp()).log_prob(path[k - 1]).sum(dim=1)
        total = (total - Normal(model.net.decode(path[0])[0], 1.0).log_prob(x).sum(dim=1)).detach()
        _, eps = drawn(n, seed=9)
        spread = {}
        for estimator in ("sampled", "closed_form"):
            found = model.terms(x, eps, estimator=estimator).sum(dim=1).detach()
            stderr = math.hypot(float(found.std()), float(total.std())) / math.sqrt(n)
            assert abs(float(found.mean() - total.mean())) < 4 * stderr
            spread[estimator] = float(found.std())
        assert spread["closed_form"] < spread["sampled"]

    def test_the_divergence_of_neighbours_on_one_chain_is_another_number(self):
        """KL(q(z_i | z_{i-1}) || p(z_i | z_{i+1})) with z_{i+1} drawn from z_i is off even for the exact model."""
        model = DDGM(Stationary(BETAS), BETAS, LearnedGaussian())
        x, eps = drawn(20_000)
        zs = model.chain(x, eps)
        wrong = -model.decoder.log_prob(x, *model.net.decode(zs[1]))
        for i in range(1, 5):
            beta = torch.tensor(BETAS[i - 1], dtype=torch.float64)
            wrong = wrong + normal_kl((1 - beta).sqrt() * zs[i - 1], beta.log(), *model.net.reverse(i + 1, zs[i + 1]))
        gap = wrong.sum(dim=1) - model.terms(x, eps, estimator="sampled")[:, :5].sum(dim=1)
        assert abs(float(gap.mean())) > 20 * float(gap.std()) / math.sqrt(len(gap))

    def test_one_step_at_a_time_has_the_same_mean(self):
        """Also where the network is shared, and exactly (3)'s mean for the x that it says."""
        betas = linear_betas(steps=12, first=0.05, last=0.5)
        net = SharedSteps(dim=3, betas=betas, width=16).double()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.4)
        model, n = DDGM(net, betas, UnitGaussian()), 24_000
        x = torch.tensor([[0.5, -0.2, 0.9]], dtype=torch.float64).expand(n, 3)
        whole = model.terms(x, drawn(n, steps=12)[1]).sum(dim=1).detach()
        objective = OneStepELBO(steps=12, first=0.3)
        draws = objective.draw(model.sde, (n, 3), StepStreams(0, 0), dtype=torch.float64)
        share = torch.bincount(draws["i"])[1:] / n
        torch.testing.assert_close(share, torch.tensor([0.3] + 11 * [0.7 / 11]), rtol=0.01, atol=0)
        one = objective.loss(model, x, draws, None).detach() * 3 * draws["weight"]
        stderr = math.hypot(float(whole.std()), float(one.std())) / math.sqrt(n)
        assert abs(float(whole.mean() - one.mean())) < 4 * stderr

    def test_the_objective_is_the_bound_by_dimension(self):
        model = wild()
        x, _ = drawn(16)
        for estimator in ("sampled", "closed_form"):
            objective = NegativeELBO(steps=5, estimator=estimator)
            draws = objective.draw(model.sde, x.shape, StepStreams(0, 0), dtype=torch.float64)
            expected = model.terms(x, draws["eps"], estimator=estimator).sum(dim=1) / 3
            torch.testing.assert_close(objective.loss(model, x, draws, None), expected)


class TestSlips:
    """What the published sketch and its notebook have otherwise."""

    def test_the_chain_starts_from_x_and_each_state_from_the_one_before(self):
        """q's mean is of z_{i-1}, x for i = 1; not of z_i."""
        model = wild()
        x, eps = drawn(4)
        zs = model.chain(x, torch.zeros_like(eps))
        for i, z in enumerate(zs):
            torch.testing.assert_close(z, x * math.sqrt(math.prod(1 - b for b in BETAS[:i])))
        first = model.chain(x, eps)[1]
        torch.testing.assert_close(first, math.sqrt(0.4) * x + math.sqrt(0.6) * eps[:, 0])

    def test_the_kernel_is_the_product_over_its_own_index(self):
        """abar_i multiplies 1 - beta_s for s up to i, and the SDE's kernel is the chain's."""
        model = wild()
        expected = torch.tensor([math.prod(1 - b for b in BETAS[: i + 1]) for i in range(5)], dtype=torch.float64)
        torch.testing.assert_close(model.abar, expected)
        t = torch.arange(1, 6, dtype=torch.float64) / 5
        torch.testing.assert_close(model.sde.alpha(t), expected.sqrt())

    def test_networks_are_asked_in_the_order_of_the_chain_in_both_directions(self):
        """Network i gets z_i in the bound, and the draw of z_i in sampling, from T down to 2: none backwards, none left out."""
        net = Stationary(BETAS)
        model = DDGM(net, BETAS, LearnedGaussian())
        x, eps = drawn(4)
        zs = model.chain(x, eps)
        for estimator in ("sampled", "closed_form"):
            net.calls.clear()
            model.terms(x, eps, estimator=estimator)
            assert [i for i, _ in net.calls] == [2, 3, 4, 5]
            assert all(torch.equal(z, zs[i]) for i, z in net.calls)
        net.calls.clear()
        model.sample((4, 3), generator=torch.Generator().manual_seed(0))
        assert [i for i, _ in net.calls] == [5, 4, 3, 2]

    def test_each_network_is_its_own_and_all_are_parameters(self):
        """A ModuleList, not a list; and the step's network is the one that its gradient reaches."""
        model = wild()
        names = {name.split(".")[2] for name, _ in model.named_parameters() if "bodies" in name}
        assert names == {"0", "1", "2", "3"}
        x, _ = drawn(2)
        mean, log_var = model.net.reverse(4, x)
        (mean.sum() + log_var.sum()).backward()
        reached = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None}
        assert reached == {"2"}

    def test_the_betas_go_with_the_model(self):
        model = wild()
        assert {"beta", "abar"} <= set(dict(model.named_buffers()))
        assert model.to(torch.float32).beta.dtype == torch.float32

    def test_the_decoders_mean_is_a_tanh_in_training_and_in_sampling(self):
        model = wild(std=0.1)
        x, eps = drawn(8)
        z = model.chain(x, eps)[1]
        raw = model.net.decoder(z).chunk(2, dim=1)[0]
        expected = -Normal(raw.tanh(), 1.0).log_prob(x).sum(dim=1)
        torch.testing.assert_close(model.terms(x, eps)[:, 0], expected)
        drawn_x = model.float().sample((500, 3), generator=torch.Generator().manual_seed(0))
        assert float(drawn_x.detach().abs().max()) < 1

    def test_the_last_term_is_log_q_minus_log_p_of_z_T(self):
        """A parenthesis: the prior's own log-density is of z_T alone, q's of z_T given z_{T-1}."""
        model = wild()
        x, eps = drawn(8)
        zs = model.chain(x, eps)
        q = Normal(math.sqrt(1 - BETAS[-1]) * zs[4], math.sqrt(BETAS[-1]))
        expected = (q.log_prob(zs[5]) - Normal(0.0, 1.0).log_prob(zs[5])).sum(dim=1)
        torch.testing.assert_close(model.terms(x, eps, estimator="sampled")[:, -1], expected)

    def test_samples_have_the_models_law(self):
        """Of the exact reverse: z_1 is N(0, 1), so the means are N(0, 1 - beta_1)."""
        model = DDGM(Stationary(BETAS), BETAS, LearnedGaussian())
        n = 20_000
        x = model.sample((n, 1), generator=torch.Generator().manual_seed(0)).double()
        assert abs(float(x.var()) - 0.4) < 4 * 0.4 * math.sqrt(2 / n)

    @pytest.mark.parametrize("betas", [(0.6,), (0.5, 1.0), (0.0, 0.5)])
    def test_one_step_or_no_noise_are_refused(self, betas):
        with pytest.raises(UserError, match="expected two or more, all in"):
            DDGM(OwnSteps(dim=2, steps=2), betas, UnitGaussian())

    def test_other_options_are_refused(self):
        x, eps = drawn(2)
        with pytest.raises(UserError, match="estimator"):
            wild().terms(x, eps, estimator="other")
        with pytest.raises(UserError, match="estimator"):
            NegativeELBO(estimator="other")
        with pytest.raises(UserError, match="steps"):
            NegativeELBO(steps=1)
        with pytest.raises(UserError, match="cannot be mixed"):
            OwnSteps(dim=2, steps=3).reverse(torch.tensor([2, 3]), torch.zeros(2, 2))


class TestDecoders:
    def test_a_grey_values_masses_sum_to_one_and_are_the_gaussians(self):
        width = 0.125
        centres = torch.linspace(-1, 1, 17, dtype=torch.float64)
        decoder = GreyGaussian(bin_width=width, low=-1 - width / 2, high=1 + width / 2)
        mean, log_std = torch.tensor(0.37, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
        p = decoder.log_prob(centres, mean, log_std).exp()
        assert abs(float(p.sum()) - 1) < 1e-9
        law = Normal(mean, log_std.exp())
        torch.testing.assert_close(p[5], law.cdf(centres[5] + width / 2) - law.cdf(centres[5] - width / 2))
        torch.testing.assert_close(p[0], law.cdf(centres[0] + width / 2))

    def test_unit_variance_costs_more_than_uniform_on_17_levels(self):
        """At its best log2(sqrt(2 pi)) - log2(width) = 4.33 bits, where uniform has log2(17) = 4.09."""
        x = torch.zeros(1, dtype=torch.float64)
        best = float(-UnitGaussian().log_prob(x, x, x)) - math.log(0.125)
        assert round(best / math.log(2), 2) == 4.33 and best / math.log(2) > math.log2(17)
