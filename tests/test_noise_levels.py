"""NCSNv2's rules: their numbers for CIFAR-10, their laws by simulation, and what follows for samples."""

import math

import numpy as np
import pytest
import torch

from numerics import UserError
from sde_lib import noise_levels
from workflow.low_density import low_density
from workflow.sigma_ladder import SigmaLadder

D = 3072


def test_cifar10s_ladder_at_one_half_and_the_papers():
    gamma = noise_levels.ratio(D)
    assert gamma == pytest.approx(1.0398, abs=5e-5)
    assert noise_levels.number_of_levels(50.0, 0.01, D) == 219
    published = (50.0 / 0.01) ** (1 / 231)
    assert noise_levels.overlap(published, D) == pytest.approx(0.567, abs=5e-4)
    assert noise_levels.variance_left(6.2e-6 / 0.01**2, published, 5) == pytest.approx(1.055, abs=1e-3)


def test_the_step_leaves_the_variance_nearest_to_the_levels():
    for gamma, steps in ((1.04, 5), (1.35, 40), (1.5, 100)):
        e = noise_levels.langevin_step(gamma, 0.01, steps)
        best = abs(noise_levels.variance_left(e / 1e-4, gamma, steps) - 1)
        for other in (0.9 * e, 1.1 * e):
            assert abs(noise_levels.variance_left(other / 1e-4, gamma, steps) - 1) > best


def test_the_variance_after_a_level_by_simulation():
    """T steps x + e s + sqrt(2 e) z of the score -x / sigma^2, from N(0, (gamma sigma)^2)."""
    sigma, gamma, steps, n = 0.3, 1.2, 7, 400_000
    e = 0.1 * sigma**2
    g = torch.Generator().manual_seed(0)
    x = gamma * sigma * torch.randn(n, generator=g, dtype=torch.float64)
    for _ in range(steps):
        x = x - e * x / sigma**2 + math.sqrt(2 * e) * torch.randn(n, generator=g, dtype=torch.float64)
    expected = noise_levels.variance_left(0.1, gamma, steps)
    assert float(x.var()) / sigma**2 == pytest.approx(expected, rel=4.5 * math.sqrt(2 / n))


def test_the_overlap_is_the_mass_of_a_shell():
    """Norms of N(0, (gamma sigma)^2 I) within three deviations of the next level's shell, in 200 dimensions."""
    gamma, dims, n = 1.08, 200, 40_000
    r = gamma * torch.randn(n, dims, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    inside = float(((r - math.sqrt(dims)).abs() < 3 / math.sqrt(2)).double().mean())
    # the rule widens the next shell by gamma; the plain mass is near it
    assert inside == pytest.approx(noise_levels.overlap(gamma, dims), abs=0.08)


def test_five_dimensions_are_enough_for_a_ratio():
    assert noise_levels.overlap(noise_levels.ratio(5), 5) == pytest.approx(0.5, abs=1e-6)


def test_the_largest_distance():
    x = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0))
    assert noise_levels.largest_distance(x) == pytest.approx(float(torch.cdist(x, x).max()), rel=1e-6)


@pytest.mark.parametrize("away", [0.0, 300.0, 5000.0, -1e5])
@pytest.mark.parametrize("D", [2, 64])
def test_the_largest_distance_does_not_depend_on_where_the_data_are(away, D):
    x = away + torch.randn(200, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert noise_levels.largest_distance(x) == pytest.approx(float(torch.pdist(x).max()), rel=1e-7)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: noise_levels.ratio(64, mass=1.0), "mass"),
        (lambda: noise_levels.ratio(4), "in 4 dimensions.*expected 5 dimensions or more: give levels itself"),
        (lambda: noise_levels.variance_left(2.0, 1.5, 3), "q=2"),
        (lambda: noise_levels.variance_left(-0.1, 1.5, 3), "q=-0.1"),
        (lambda: noise_levels.variance_left(0.5, 0.0, 3), "gamma"),
        (lambda: noise_levels.variance_left(0.5, 1.5, 0), "steps"),
        (lambda: SigmaLadder(sigma_max=-1.0), "sigma_max=-1.0"),
        (lambda: SigmaLadder(sigma_max=0.01, sigma_min=0.1), "sigma_min < sigma_max"),
        (lambda: noise_levels.ratio(0), "D"),
        (lambda: noise_levels.number_of_levels(0.01, 1.0, 64), "largest > smallest"),
        (lambda: noise_levels.langevin_step(1.0, 0.01, 5), "gamma"),
        (lambda: noise_levels.largest_distance(torch.ones(1, 2)), "two or more"),
        (lambda: noise_levels.largest_distance(torch.ones(9, 2), few=-1), "few=-1"),
        (lambda: noise_levels.largest_distance(torch.ones(9, 2), few=1), "few=1"),
        (lambda: noise_levels.largest_distance(torch.tensor(1.0)), "a tensor of real numbers"),
        (lambda: noise_levels.largest_distance(np.ones((3, 2))), "a tensor of real numbers"),
        (lambda: noise_levels.largest_distance(torch.tensor([[1.0], [2.0], [math.nan]])), "1 of 3 data"),
        (lambda: noise_levels.largest_distance(torch.tensor([[1.0], [2.0], [math.inf]])), "1 of 3 data"),
        (lambda: noise_levels.number_of_levels(math.inf, 0.01, 64), "largest=inf"),
        (lambda: noise_levels.number_of_levels(math.nan, 0.01, 64), "largest=nan"),
        (lambda: noise_levels.langevin_step(math.inf, 0.01, 5), "gamma=inf"),
        (lambda: low_density(0), "n=0"),
        (lambda: low_density(10, steps=0), "steps=0"),
        (lambda: low_density(10, levels=1), "levels=1"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(UserError, match=words):
        make()
