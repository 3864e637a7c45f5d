"""Chains against the laws that they leave alone: exactness with the test, the Langevin chain's own law without, refusals."""

import math

import pytest
import torch
from oracles import FAMILY_WISE, mixture, whitened_moments_p

from numerics import Hamiltonian, UserError, largest_curvature, point, run_chain
from sde_lib import VESDE
from sde_lib.analytic import Gaussian

SDE = VESDE(sigma_min=1e-4, sigma_max=10.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def log_density(law):
    return lambda x: law.log_prob(SDE, x, torch.zeros(len(x), dtype=torch.float64))


def quadratic(variance):
    return lambda x: -x.square().sum(dim=1) / (2 * variance)


@pytest.mark.parametrize("leapfrog", [1, 5])
@pytest.mark.parametrize(
    "law", [Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]])), mixture()]
)
def test_an_adjusted_chain_leaves_the_law_alone(law, leapfrog):
    """From exact samples, with steps so long that many ends are refused: no bias at any step."""
    x = law.sample(4000, generator=generator())
    kernel = Hamiltonian(step=0.5, leapfrog=leapfrog)
    found = run_chain(kernel, log_density(law), x, 20, generator=generator(1))
    assert 0.3 < found.acceptance < 0.95 and found.evaluations == 1 + 20 * leapfrog
    assert whitened_moments_p(law, SDE, 0.0, found.x) > FAMILY_WISE / 4


def test_it_forgets_where_it_began():
    law = Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]]))
    found = run_chain(
        Hamiltonian(step=0.4, leapfrog=4),
        log_density(law),
        torch.full((3000, 2), 3.0).double(),
        40,
        generator=generator(1),
    )
    assert whitened_moments_p(law, SDE, 0.0, found.x) > FAMILY_WISE


@pytest.mark.parametrize("step", [0.5, 1.0, 1.4])
def test_langevin_has_its_own_law(step):
    """On N(0, v) the variance is v / (1 - h^2 / (4 v)), the fixed point of (1 - h^2 / (2 v))^2 V + h^2."""
    v, n = 0.7, 100_000
    x = math.sqrt(v) * torch.randn(n, 1, generator=generator(), dtype=torch.float64)
    found = run_chain(Hamiltonian(step=step, adjust=False), quadratic(v), x, 60, generator=generator(1))
    expected = v / (1 - step**2 / (4 * v))
    assert float(found.x.var()) == pytest.approx(expected, rel=4.5 * math.sqrt(2 / n))
    assert abs(expected / v - 1) > 0.05 and found.acceptance == 1


def test_the_gradient_is_the_densitys():
    law = mixture()
    x = law.sample(50, generator=generator())
    at = point(log_density(law), x)
    torch.testing.assert_close(at.slope, law.score(SDE)(x, torch.zeros(50, dtype=torch.float64)), rtol=1e-6, atol=1e-8)


class TestRefusals:
    def test_a_step_that_diverges_is_stopped_with_the_one_that_is_stable(self):
        v = 0.25
        assert largest_curvature(quadratic(v), torch.randn(5, 3, generator=generator())) == pytest.approx(
            1 / v, rel=1e-4
        )
        with pytest.raises(UserError, match=r"step=1\.1, with which Langevin diverges .*less than .* = 1[;,. ]"):
            run_chain(Hamiltonian(step=1.1, adjust=False), quadratic(v), torch.ones(4, 3), 1000, generator=generator())
        found = run_chain(
            Hamiltonian(step=0.95, adjust=False), quadratic(v), torch.ones(4, 3), 1000, generator=generator()
        )
        assert bool(found.x.isfinite().all())

    def test_an_energy_without_a_bottom_is_said(self):
        with pytest.raises(UserError, match="not bounded below"):
            run_chain(
                Hamiltonian(step=0.3, adjust=False),
                lambda x: x.square().sum(dim=1) / 2,
                torch.ones(4, 2),
                2000,
                generator=generator(),
            )

    @pytest.mark.parametrize("adjust", [False, True])
    @pytest.mark.parametrize("log_f", [lambda x: 1e9 * x.relu().sum(dim=1), lambda x: 1e9 * x.sum(dim=1)])
    def test_an_energy_without_curvature_or_bottom_is_said(self, log_f, adjust):
        """Of which no step is too large, and whose slope has no derivative."""
        x = torch.randn(16, 2, generator=generator())
        assert largest_curvature(log_f, x) == 0
        with pytest.raises(UserError, match="not bounded below") as caught:
            run_chain(Hamiltonian(step=0.1, adjust=adjust), log_f, x, 300, generator=generator())
        assert "inf" not in str(caught.value).replace("infinity", "") and "nan" not in str(caught.value)

    @pytest.mark.parametrize(
        ("log_f", "step"),
        [
            (lambda x: x.square().sum(dim=1) / 2, 0.3),
            (lambda x: x.pow(4).sum(dim=1) / 4, 0.1),
            (lambda x: -x.square().sum(dim=1) / 2 + 0.05 * x.pow(4).sum(dim=1), 0.3),
        ],
    )
    def test_an_adjusted_chain_that_halts_on_its_way_to_infinity_is_said(self, log_f, step):
        """It stays finite, and would else report an acceptance alone."""
        with pytest.raises(UserError, match=r"not bounded below: after \d+ steps .* have halted") as caught:
            run_chain(Hamiltonian(step=step), log_f, torch.ones(8, 2), 1000, generator=generator())
        assert "\n" not in str(caught.value)

    def test_an_adjusted_chain_that_halts_at_a_mode_is_not(self):
        """From a flat tail into a well too narrow for the step: hardly anything is accepted there, and the law has a bottom."""

        def log_f(x):
            return torch.logaddexp(-x.square().sum(dim=1) / 8, 20 - x.square().sum(dim=1) / (2 * 0.15**2))

        found = run_chain(Hamiltonian(step=1.0), log_f, torch.full((30, 2), 3.0), 1000, generator=generator())
        near = found.x.norm(dim=1) < 0.6
        assert bool(near.all()) and found.acceptance < 0.2  # all have halted in it
        found = run_chain(Hamiltonian(step=8.0), quadratic(1.0), torch.ones(4, 2), 500, generator=generator())
        assert found.acceptance < 0.02

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: Hamiltonian(step=0.0), "step"),
            (lambda: Hamiltonian(step=0.1, leapfrog=0), "leapfrog"),
            (lambda: run_chain(Hamiltonian(step=0.1), lambda x: x, torch.ones(4, 2), 3), r"expected \(4,\)"),
            (lambda: run_chain(Hamiltonian(step=0.1), quadratic(1.0), torch.ones(4, 2).long(), 3), r"x\.float\(\)"),
            (lambda: run_chain(Hamiltonian(step=0.1), quadratic(1.0), torch.ones(0, 2), 3), "one chain or more"),
            (lambda: run_chain(Hamiltonian(step=0.1), lambda x: x.detach().sum(1), torch.ones(4, 2), 3), "no gradient"),
            (
                lambda: run_chain(Hamiltonian(step=0.1), lambda x: x.sum(1) * math.inf, torch.ones(4, 2), 3),
                "not finite",
            ),
        ],
    )
    def test_other_mistakes(self, make, words):
        with pytest.raises(UserError, match=words):
            make()
