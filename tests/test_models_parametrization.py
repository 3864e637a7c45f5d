"""Parametrisations against x = alpha x_0 + sigma eps, v = alpha eps - sigma x_0, score = -eps / sigma."""

import math

import pytest
import torch

from models import DATA, NOISE, SCORE, VELOCITY, Preconditioned
from numerics import expand_as
from sde_lib import VESDE, VPSDE, SubVPSDE

ALL = [NOISE, DATA, VELOCITY, SCORE, Preconditioned(data_std=0.7)]
SDES = [VPSDE(), VESDE(), SubVPSDE()]


@pytest.fixture
def sample():
    g = torch.Generator().manual_seed(0)
    x_0 = torch.randn(6, 2, 3, generator=g, dtype=torch.float64)
    eps = torch.randn(6, 2, 3, generator=g, dtype=torch.float64)
    return x_0, eps, torch.tensor([1e-3, 0.1, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("parametrization", ALL, ids=lambda p: type(p).__name__)
def test_the_target_stands_for_the_noise_and_the_data_that_it_was_made_from(parametrization, sde, sample):
    x_0, eps, t = sample
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    x = sde.perturb(x_0, t, eps)
    target = parametrization.target(x_0, eps, alpha, sigma)
    torch.testing.assert_close(parametrization.noise(target, x, alpha, sigma), eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parametrization.data(target, x, alpha, sigma), x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_each_target_is_its_definition(sde, sample):
    x_0, eps, t = sample
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    a, s = expand_as(alpha, x_0), expand_as(sigma, x_0)
    assert torch.equal(NOISE.target(x_0, eps, alpha, sigma), eps)
    assert torch.equal(DATA.target(x_0, eps, alpha, sigma), x_0)
    torch.testing.assert_close(VELOCITY.target(x_0, eps, alpha, sigma), a * eps - s * x_0)
    torch.testing.assert_close(SCORE.target(x_0, eps, alpha, sigma), -eps / s)


@pytest.mark.parametrize("output_of", ALL, ids=lambda p: type(p).__name__)
def test_any_output_gives_noise_and_data_that_add_up_to_x(output_of, sample):
    """alpha x_0 + sigma eps = x holds for what a wrong network says, too: there is one hub."""
    x, output, t = sample
    sde = SubVPSDE()
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    eps, x_0 = output_of.noise(output, x, alpha, sigma), output_of.data(output, x, alpha, sigma)
    torch.testing.assert_close(expand_as(alpha, x) * x_0 + expand_as(sigma, x) * eps, x)


def test_preconditioning_is_edms_table_1_on_the_variance_exploding_path(sample):
    """Karras et al. 2022, table 1: c_skip, c_out, c_in at alpha = 1."""
    x, F, _ = sample
    sigma = torch.tensor([0.002, 0.05, 0.5, 1.0, 20.0, 80.0], dtype=torch.float64)
    alpha, sd = torch.ones_like(sigma), 0.5
    p = Preconditioned(data_std=sd)
    total = sigma**2 + sd**2
    c_skip, c_out, c_in = sd**2 / total, sigma * sd / total.sqrt(), 1 / total.sqrt()
    torch.testing.assert_close(p.data(F, x, alpha, sigma), expand_as(c_skip, x) * x + expand_as(c_out, x) * F)
    torch.testing.assert_close(p.scale_input(x, alpha, sigma), expand_as(c_in, x) * x)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_preconditioned_input_and_target_have_variance_one_at_every_time(sde):
    g = torch.Generator().manual_seed(1)
    sd, n = 0.3, 200_000
    p = Preconditioned(data_std=sd)
    x_0, eps = sd * torch.randn(n, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    for time in (1e-4, 0.2, 1.0):
        t = torch.full((n,), time, dtype=torch.float64)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        seen = p.scale_input(alpha * x_0 + sigma * eps, alpha, sigma)
        for y in (seen, p.target(x_0, eps, alpha, sigma)):
            assert abs(float(y.var()) - 1) < 4 * math.sqrt(2 / n)


def test_a_silent_preconditioned_network_is_the_score_of_a_gaussian(sample):
    x, _, t = sample
    sde, sd = SubVPSDE(), 0.6
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    eps = Preconditioned(data_std=sd).noise(torch.zeros_like(x), x, alpha, sigma)
    exact = -x / expand_as(alpha**2 * sd**2 + sigma**2, x)
    torch.testing.assert_close(-eps / expand_as(sigma, x), exact)


@pytest.mark.parametrize("parametrization", [DATA, VELOCITY, Preconditioned()], ids=lambda p: type(p).__name__)
def test_data_loses_no_digits_at_a_vanishing_signal(parametrization):
    """At alpha = 1e-6 in float32, x_0 through eps would be off by 0.1; directly it is exact to rounding."""
    g = torch.Generator().manual_seed(2)
    x_0, eps = torch.rand(8, 5, generator=g), torch.randn(8, 5, generator=g)
    alpha = torch.full((8,), 1e-6, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    x = 1e-6 * x_0 + eps
    target = parametrization.target(x_0, eps, alpha, sigma)
    torch.testing.assert_close(parametrization.data(target, x, alpha, sigma), x_0, rtol=0, atol=2e-5)


def test_a_nonsensical_data_std_is_refused():
    with pytest.raises(ValueError, match="data_std=0"):
        Preconditioned(data_std=0)
