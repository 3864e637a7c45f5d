"""Variational diffusion models: the schedule, its losses, what they teach, and the learned forward process."""

import math

import pytest
import torch
from torch import nn

from models import MLP, NOISE, Preconditioned, ScoreModel
from models.learned_forward import LearnedForward, PixelEncoder
from models.schedule import FixedSchedule, MonotoneSchedule
from models.vdm import VDM
from numerics import UserError, expand_as
from sde_lib import ScheduledVPSDE
from training import LearnedForwardLoss, VDMLoss
from training.streams import StepStreams

S = 0.6
LOW, HIGH = -6.0, 4.0


def bent(seed=0):
    schedule = MonotoneSchedule(gamma_min=LOW, gamma_max=HIGH, units=16)
    generator = torch.Generator().manual_seed(seed)
    for p in schedule.parameters():
        p.data += 2 * torch.randn(p.shape, generator=generator)
    return schedule


class Exact(nn.Module):
    """The network that predicts the noise of data N(0, S^2) from x and log_snr / 10."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor), dtype=torch.float64))

    def forward(self, x, label):
        l = expand_as(label.double() * 10, x)
        alpha2, sigma2 = l.sigmoid(), (-l).sigmoid()
        return self.factor * sigma2.sqrt() * x / (alpha2 * S**2 + sigma2)


def exact(schedule):
    return VDM(Exact(), schedule, NOISE)


def integral(low=LOW, high=HIGH):
    """1/2 integral of alpha^2 S^2 / (alpha^2 S^2 + sigma^2) over gamma, a dimension: alpha^2/sigma^2 = exp(-gamma)."""
    softplus = lambda v: math.log1p(math.exp(v))  # noqa: E731
    return 0.5 * (softplus(-low + 2 * math.log(S)) - softplus(-high + 2 * math.log(S)))


class TestSchedule:
    @pytest.mark.parametrize("seed", range(5))
    def test_it_rises_and_its_ends_stay_whatever_the_weights(self, seed):
        schedule, t = bent(seed), torch.linspace(0, 1, 400, dtype=torch.float64)
        gamma = schedule(t)
        assert bool((gamma.diff() > 0).all())
        torch.testing.assert_close(gamma[[0, -1]], torch.tensor([LOW, HIGH], dtype=torch.float64), rtol=0, atol=1e-12)

    def test_the_slope_is_the_derivative(self):
        schedule, t = bent(), torch.linspace(0, 1, 50, dtype=torch.float64, requires_grad=True)
        (by_autograd,) = torch.autograd.grad(schedule(t).sum(), t)
        torch.testing.assert_close(schedule.slope(t), by_autograd)

    def test_a_fresh_one_is_nearly_linear(self):
        t = torch.linspace(0, 1, 100, dtype=torch.float64)
        linear = FixedSchedule()(t)
        assert float((MonotoneSchedule()(t) - linear).detach().abs().max()) < 0.3

    @pytest.mark.parametrize("make", [MonotoneSchedule, FixedSchedule])
    def test_one_that_falls_is_refused(self, make):
        with pytest.raises(UserError, match="expected one that rises"):
            make(gamma_min=5.0, gamma_max=-13.3)

    def test_the_sde_keeps_the_contracts(self):
        sde, t = ScheduledVPSDE(schedule=bent()), torch.linspace(0.01, 0.99, 60, dtype=torch.float64)
        u = t.clone().requires_grad_()
        (slope,) = torch.autograd.grad(sde.alpha(u).log().sum(), u, retain_graph=True)
        torch.testing.assert_close(sde.f(t), slope)
        (slope,) = torch.autograd.grad(sde.sigma(u).square().sum(), u)
        torch.testing.assert_close(2 * sde.f(t) * sde.sigma(t).square() + sde.g(t).square(), slope)
        torch.testing.assert_close(sde.alpha(t).square() + sde.sigma(t).square(), torch.ones_like(t))

    def test_nothing_of_the_schedule_is_remembered(self):
        schedule = bent()
        sde, t = ScheduledVPSDE(schedule=schedule), torch.linspace(0.001, 0.999, 60, dtype=torch.float64)
        for seed in (0, 1):
            for p in schedule.parameters():
                p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(sde.time_of_log_snr(sde.log_snr(t)), t, rtol=1e-9, atol=1e-9)


class TestLosses:
    def losses(self, model, objective, n=20_000, seed=0):
        x_0 = S * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        draws = objective.draw(model.sde, x_0.shape, StepStreams(seed, 0), dtype=torch.float64)
        return objective.loss(model, x_0, draws, None)

    def test_the_continuous_loss_does_not_depend_on_the_schedule(self):
        """Three schedules with the same ends, one value, which is the closed form."""
        spreads = []
        for schedule in (
            FixedSchedule(gamma_min=LOW, gamma_max=HIGH),
            FixedSchedule(gamma_min=LOW, gamma_max=HIGH, power=4.0),
            bent(),
        ):
            loss = self.losses(exact_of(schedule), VDMLoss()).detach()
            assert abs(float(loss.mean()) - integral()) < 4 * float(loss.std()) / math.sqrt(len(loss))
            spreads.append(float(loss.std()))
        assert max(spreads) > 1.1 * min(spreads)  # but its variance does

    def test_the_discrete_loss_is_the_sum_over_steps_and_falls_to_the_continuous_one(self):
        values = []
        for steps in (5, 50):
            schedule = bent()
            loss = self.losses(exact_of(schedule), VDMLoss(steps=steps)).detach()
            t = torch.arange(steps + 1, dtype=torch.float64) / steps
            gamma = schedule(t)
            share = (S**2 * (-gamma[1:]).exp()) / (S**2 * (-gamma[1:]).exp() + 1)
            value = float((torch.expm1(gamma.diff()) * share).sum().detach()) / 2
            assert abs(float(loss.mean()) - value) < 4 * float(loss.std()) / math.sqrt(len(loss))
            values.append(value)
        assert values[0] > values[1] > integral()

    @pytest.mark.parametrize("steps", [0, 8])
    def test_one_backward_pass_teaches_the_schedule_a_small_variance_and_the_network_a_small_loss(self, steps):
        model = exact_of(bent())
        objective = VDMLoss(steps=steps)
        x_0 = S * torch.randn(64, 2, dtype=torch.float64)
        draws = objective.draw(model.sde, x_0.shape, StepStreams(0, 0), dtype=torch.float64)
        own, net = list(model.schedule.parameters()), list(model.net.parameters())
        objective.loss(model, x_0, draws, None).mean().backward()
        plain = VDMLoss(steps=steps, schedule="bound")
        loss = plain.loss(model, x_0, draws, None)
        of_square = torch.autograd.grad(loss.square().mean(), own, retain_graph=True)
        of_loss = torch.autograd.grad(loss.mean(), net)
        for p, expected in [*zip(own, of_square, strict=True), *zip(net, of_loss, strict=True)]:
            torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-9)

    def test_a_taught_schedule_lowers_the_variance_and_leaves_the_mean(self):
        model = exact_of(MonotoneSchedule(gamma_min=LOW, gamma_max=HIGH, units=16))
        before = self.losses(model, VDMLoss(), seed=1).detach()
        optimizer = torch.optim.Adam(model.schedule.parameters(), lr=0.05)
        for step in range(100):
            optimizer.zero_grad()
            self.losses(model, VDMLoss(), n=256, seed=2 + step).mean().backward()
            optimizer.step()
        after = self.losses(model, VDMLoss(), seed=1).detach()
        assert float(after.var()) < 0.9 * float(before.var())
        stderr = math.hypot(float(after.std()), float(before.std())) / math.sqrt(len(after))
        assert abs(float(after.mean() - before.mean())) < 4 * stderr

    def test_a_single_step_is_refused(self):
        with pytest.raises(UserError, match="steps"):
            VDMLoss(steps=1)
        with pytest.raises(UserError, match="schedule"):
            VDMLoss(schedule="other")


def exact_of(schedule):
    """The exact model under any schedule; a fixed one is no module."""
    if isinstance(schedule, nn.Module):
        return VDM(Exact(), schedule, NOISE)
    model = VDM(Exact(), MonotoneSchedule(gamma_min=LOW, gamma_max=HIGH), NOISE)
    del model.schedule
    model.schedule = schedule
    model.sde = ScheduledVPSDE(schedule=schedule)
    return model


class Linear(nn.Module):
    """A(x) = a x and B(x) = b."""

    def __init__(self, a=0.0, b=0.0):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a * x, torch.full_like(x, self.b)


class Guess(nn.Module):
    """E[x | z] of data N(0, S^2) under (1) with A = a x, B = b, as a denoiser."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b
        self.sde = ScheduledVPSDE(schedule=FixedSchedule(gamma_min=LOW, gamma_max=HIGH))
        self.net, self.data_std, self.data_range = nn.Identity(), S, (-1.0, 1.0)

    def coefficients(self, gamma):
        alpha2, sigma2 = (-gamma).sigmoid(), gamma.sigmoid()
        return alpha2.sqrt() * (1 + sigma2 * self.a), sigma2.sqrt() * (alpha2 * sigma2 * self.b).exp()

    def denoised(self, z, t):
        m, s = (expand_as(c, z) for c in self.coefficients(-self.sde.log_snr(t)))
        return m * S**2 / (m**2 * S**2 + s**2) * z


class TestLearnedForward:
    def test_the_drift_is_that_of_the_path_by_differentiation(self):
        """(2): the velocity of m + s eps at fixed eps by autograd, minus g^2/2 times the score of q(z | x)."""
        encoder = PixelEncoder(dim=3, width=8).double()
        for p in encoder.parameters():
            nn.init.normal_(p, std=0.5)
        model = LearnedForward(Guess(0.0, 0.0), encoder, gamma_min=LOW, gamma_max=HIGH)
        x, eps = torch.randn(1, 3, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
        for gamma in (-5.0, -1.0, 0.5, 3.0):
            at = torch.tensor([gamma], dtype=torch.float64)
            velocity = torch.autograd.functional.jvp(lambda g: model.noised(x, g, eps), at, torch.ones_like(at))[1]
            z = model.noised(x, at, eps)
            mean, log_std = model.marginal(x, at)
            score = -(z - mean) * (-2 * log_std).exp()
            expected = velocity - at.sigmoid() / 2 * score
            torch.testing.assert_close(model.drift(z, x, at), expected)

    def test_without_a_learned_part_it_is_the_plain_bound(self):
        model = LearnedForward(Guess(0.0, 0.0), Linear(), gamma_min=LOW, gamma_max=HIGH)
        x, eps = torch.randn(50, 2, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
        gamma = torch.linspace(LOW, HIGH, 50, dtype=torch.float64)
        z = model.noised(x, gamma, eps)
        x_hat = model.denoiser.denoised(z, model.sde.time_of_log_snr(-gamma))
        plain = 0.5 * (-gamma).exp() * (x - x_hat).square().sum(dim=1)
        torch.testing.assert_close(model.diffusion(x, gamma, eps), plain, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (0.8, 0.0), (-0.7, 0.9), (0.5, -1.0)])
    def test_with_the_exact_guess_the_bound_is_tight(self, a, b):
        """The integral is then the information that the path takes away: I(x; z_0) - I(x; z_1)."""
        guess, n = Guess(a, b), 40_000
        model = LearnedForward(guess, Linear(a, b), gamma_min=LOW, gamma_max=HIGH)
        generator = torch.Generator().manual_seed(0)
        x = S * torch.randn(n, 1, generator=generator, dtype=torch.float64)
        objective = LearnedForwardLoss()
        draws = objective.draw(model.sde, x.shape, StepStreams(0, 0), dtype=torch.float64)
        found = objective.loss(model, x, draws, None) - model.prior(x)

        def information(gamma):
            m, s = guess.coefficients(torch.tensor(gamma, dtype=torch.float64))
            return 0.5 * math.log1p(float(m**2 * S**2 / s**2))

        expected = information(LOW) - information(HIGH)
        assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(n)

    def test_with_another_guess_it_is_larger(self):
        models = [
            LearnedForward(g, Linear(0.8, 0.5), gamma_min=LOW, gamma_max=HIGH) for g in (Guess(0, 0), Guess(0.8, 0.5))
        ]
        x = S * torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        objective = LearnedForwardLoss()
        draws = objective.draw(models[0].sde, x.shape, StepStreams(0, 0), dtype=torch.float64)
        other, exact = (objective.loss(model, x, draws, None) for model in models)
        excess = other - exact  # with the same draws
        assert float(excess.mean()) > 4 * float(excess.std()) / 200

    def test_the_priors_term_is_the_divergence(self):
        model = LearnedForward(Guess(0.4, 0.3), Linear(0.4, 0.3), gamma_min=LOW, gamma_max=HIGH)
        x = torch.randn(5, 2, dtype=torch.float64)
        m, s = (float(c) for c in Guess(0.4, 0.3).coefficients(torch.tensor(HIGH, dtype=torch.float64)))
        q = torch.distributions.Normal(m * x, s)
        expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
        torch.testing.assert_close(model.prior(x), expected)

    @pytest.mark.slow
    def test_samples_have_the_datas_law(self):
        model = LearnedForward(Guess(0.5, -0.4), Linear(0.5, -0.4), gamma_min=LOW, gamma_max=HIGH)
        x = model.sample((20_000, 1), steps=300, generator=torch.Generator().manual_seed(0)).double()
        # the guess at gamma_min, whose variance is a little less than the data's
        m, s = (float(c) for c in Guess(0.5, -0.4).coefficients(torch.tensor(LOW, dtype=torch.float64)))
        expected = S**4 * m**2 / (m**2 * S**2 + s**2)
        assert abs(float(x.var()) / expected - 1) < 4 * math.sqrt(2 / len(x)) + 0.02

    def test_ends_that_do_not_rise_are_refused(self):
        with pytest.raises(UserError, match="gamma_min < gamma_max"):
            LearnedForward(Guess(0, 0), Linear(), gamma_min=1.0, gamma_max=0.0)


def test_a_trained_model_moves_with_its_schedule():
    """The SDE of a copy, and of a model given other weights, follows the copy's own schedule."""
    import copy

    model = VDM(MLP(dim=2, width=8, depth=1), bent(0), Preconditioned(data_std=S))
    other = copy.deepcopy(model)
    other.schedule.load_state_dict(bent(1).state_dict())
    t = torch.tensor([0.3], dtype=torch.float64)
    assert float(other.sde.log_snr(t)) != float(model.sde.log_snr(t))
    assert isinstance(model, ScoreModel) and any("schedule" in name for name, _ in model.named_parameters())
