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


def test_states_may_be_numbers():
    """x `(B,)`, of which a sample has no axes."""
    kernel = Hamiltonian(step=1.0, adjust=False)
    found = run_chain(kernel, lambda x: -x.square() / 2, torch.zeros(20_000), 40, generator=generator())
    assert found.x.shape == (20_000,)
    assert float(found.x.var()) == pytest.approx(4 / 3, rel=4.5 * math.sqrt(2 / 20_000))


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

    @pytest.mark.parametrize(
        ("step", "steps"), [(2.0, 300), (2.01, 300), (2.01, 3), (2.005, 1000), (3.0, 1), (3.0, 8), (2.05, 100)]
    )
    def test_a_step_that_diverges_is_stopped_however_short_the_chain(self, step, steps):
        """Also while it is near: after 300 steps of 2.01 the states have a standard deviation of 4,000."""
        x = torch.randn(200, 2, generator=generator())
        with pytest.raises(UserError, match=r"with which Langevin diverges .*less than .* = 2[;,. ]"):
            run_chain(Hamiltonian(step=step, adjust=False), quadratic(1.0), x, steps, generator=generator(1))

    @pytest.mark.parametrize(("step", "steps"), [(0.1001, 300), (0.105, 5), (0.11, 50)])
    def test_it_is_stopped_in_one_direction_while_another_comes_nearer(self, step, steps):
        """Where log f rises on the whole: from 100 standard deviations along the wide one."""
        s = torch.tensor([1.0, 0.05])
        x = torch.tensor([[100.0, 0.0]]).repeat(50, 1)
        with pytest.raises(UserError, match=r"diverges .*less than .* = 0\.1[;,. ]"):
            run_chain(
                Hamiltonian(step=step, adjust=False),
                lambda x: -(x / s).square().sum(dim=1) / 2,
                x,
                steps,
                generator=generator(1),
            )

    @pytest.mark.parametrize("begin", [0.0, 0.3])
    @pytest.mark.parametrize(("step", "steps"), [(0.9, 300), (1.2, 300), (1.2, 3), (1.5, 4)])
    def test_a_bounded_energy_is_not_blamed_for_a_step(self, begin, step, steps):
        """x^4 / 4, which has no curvature where the chains begin."""
        with pytest.raises(UserError, match="with which Langevin diverges") as caught:
            run_chain(
                Hamiltonian(step=step, adjust=False),
                lambda x: -x.pow(4).sum(dim=1) / 4,
                torch.full((100, 2), begin),
                steps,
                generator=generator(8),
            )
        stable = float(str(caught.value).split(" = ")[1].split(",")[0])
        assert 0.1 < stable < 0.95
        run_chain(  # which is one
            Hamiltonian(step=stable, adjust=False),
            lambda x: -x.pow(4).sum(dim=1) / 4,
            torch.full((100, 2), begin),
            300,
            generator=generator(8),
        )

    @pytest.mark.parametrize(("step", "steps"), [(1.99, 300), (1.95, 1), (1.95, 3), (1.95, 8), (1.0, 100), (0.1, 30)])
    @pytest.mark.parametrize("begin", [0.0, 1.0, 1e4])
    def test_a_stable_step_is_not_stopped(self, step, steps, begin):
        """On its way to its own law, from the mode and from 10,000 standard deviations away."""
        x = torch.full((500, 2), begin)
        found = run_chain(Hamiltonian(step=step, adjust=False), quadratic(1.0), x, steps, generator=generator(1))
        r = 1 - step**2 / 2
        variance = step**2 * (1 - r ** (2 * steps)) / (1 - r**2)
        assert float(found.x.var()) == pytest.approx(variance, rel=4.5 * math.sqrt(2 / 1000))

    @pytest.mark.parametrize("step", [0.01, 0.05, 0.1, 0.2])
    @pytest.mark.parametrize("nu", [1.0, 3.0, 10.0])
    def test_heavy_tails_are_not_stopped(self, nu, step):
        """Student's t of width 0.05, whose middle throws chains of the longer steps out, and whose tails bring them back."""

        def log_f(x):
            return -(nu + 2) / 2 * (x / 0.05).square().sum(dim=1).div(nu).log1p()

        for begin in (0.0, 5.0):
            x = torch.full((500, 2), begin)
            found = run_chain(Hamiltonian(step=step, adjust=False), log_f, x, 300, generator=generator(1))
            assert float(found.x.abs().max()) < 100

    @pytest.mark.parametrize(
        ("log_f", "begin", "step"),
        [
            (lambda x: -10 * (x.square().sum(dim=1) - 1).square(), 0.0, 0.1),  # on a hilltop of curvature
            (lambda x: -10 * (x.square() - 1).square().sum(dim=1), 0.0, 0.05),
            (lambda x: -10 * (x.square() - 1).square().sum(dim=1), 2.5, 0.02),
            (lambda x: -x.pow(4).sum(dim=1) / 4, 0.0, 0.4),
            (lambda x: -x.pow(4).sum(dim=1) / 4, 100.0, 0.01),
            (lambda x: -(1e-6 + x.square()).sqrt().sum(dim=1), 0.0, 0.5),  # of curvature 1,000 at the mode
            (lambda x: torch.logaddexp(-(x - 2).square().sum(1) / 0.5, -(x + 2).square().sum(1) / 0.02), 0.0, 0.1),
            (lambda x: torch.logaddexp(-x.square().sum(1) / 2, 6 - x.square().sum(1) * 200), 1.0, 0.11),
        ],
    )
    @pytest.mark.parametrize("steps", [1, 7, 300])
    def test_curvature_in_some_places_is_not_divergence(self, log_f, begin, step, steps):
        x = torch.full((2000, 2), begin) + 0.01 * torch.randn(2000, 2, generator=generator())
        found = run_chain(Hamiltonian(step=step, adjust=False), log_f, x, steps, generator=generator(1))
        assert float(found.x.abs().max()) < max(20.0, begin)

    @pytest.mark.parametrize("adjust", [False, True])
    @pytest.mark.parametrize("steps", [5, 300])
    @pytest.mark.parametrize(
        "log_f",
        [lambda x: 3 * x[:, 0], lambda x: 0.05 * x.square().sum(dim=1), lambda x: 0 * x.sum(dim=1)],
    )
    def test_an_energy_that_chains_leave_slowly_is_said(self, log_f, steps, adjust):
        """Nearly everything is accepted, and nothing is far away: linear, a hill, and level."""
        x = torch.randn(200, 2, generator=generator())
        with pytest.raises(UserError, match=r"not bounded below: after \d+ steps .* outwards") as caught:
            run_chain(Hamiltonian(step=0.2, adjust=adjust), log_f, x, steps, generator=generator(1))
        assert "\n" not in str(caught.value)

    def test_a_chain_that_has_not_arrived_is_no_unbounded_energy(self):
        """Three short steps from ten thousand standard deviations away, with the test and without."""
        for adjust in (False, True):
            kernel = Hamiltonian(step=1e-3, adjust=adjust)
            found = run_chain(kernel, quadratic(1.0), torch.full((20, 2), 1e4), 3, generator=generator())
            assert float(found.x.min()) > 9e3

    def test_a_density_may_have_labels_one_for_each_chain(self):
        centre = torch.tensor([-3.0, 3.0]).repeat(1000).unsqueeze(1)
        for adjust in (False, True):
            found = run_chain(
                Hamiltonian(step=0.5, adjust=adjust),
                lambda x: -(x - centre).square().sum(dim=1) / 2,
                torch.zeros(2000, 2),
                100,
                generator=generator(),
            )
            assert float((found.x - centre).mean()) == pytest.approx(0, abs=4.5 / math.sqrt(4000))

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
