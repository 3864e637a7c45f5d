"""Annealed importance sampling against normalisers that are known, from both sides."""

import math

import pytest
import torch
from oracles import mixture

from likelihood import AnnealedImportance, DiffusionPath, GeometricPath
from numerics import Hamiltonian, UserError
from sde_lib import VESDE

SDE = VESDE(sigma_min=0.01, sigma_max=10.0)
OFFSET = 1.7  # added to an energy, taken off log Z
N = 400


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def energy(law, offset=OFFSET):
    """Minus the exact log-density, with an offset that depends on t."""
    return lambda x, t: -law.log_prob(SDE, x, t) + offset * (1 + t.to(torch.float64))


T_0 = 0.05


def geometric(law):
    def target(x):
        return law.log_prob(SDE, x, T_0) - OFFSET

    return GeometricPath(target=target, shape=(2,), std=1.5)


def diffusion(law):
    return DiffusionPath(sde=SDE, energy=energy(law), shape=(2,), t=T_0, width=0.4)


PATHS = {"geometric": (geometric, -OFFSET), "diffusion": (diffusion, -OFFSET * (1 + T_0))}


def exact_samples(law, n, seed):
    return law.marginal_sample(SDE, n, T_0, generator=generator(seed))


def test_a_target_of_another_shape_is_refused():
    annealed = AnnealedImportance(levels=4)
    for target, shape in (
        (lambda x: -x.square(), r"\(5, 2\)"),
        (lambda x: -x.square().sum(1, keepdim=True), r"\(5, 1\)"),
    ):
        with pytest.raises(UserError, match=rf"got a target of shape {shape} for x of shape \(5, 2\); expected \(5,\)"):
            annealed.forward(GeometricPath(target=target, shape=(2,)), 5)


def test_of_one_chain_nothing_is_said():
    law = mixture()
    found = AnnealedImportance(levels=10).bracket(geometric(law), exact_samples(law, 1, 1), generator=generator(2))
    with pytest.raises(UserError, match="got a bracket of one chain"):
        found.contains(-OFFSET)


@pytest.mark.parametrize("name", PATHS)
def test_the_bracket_holds_log_z_and_closes(name):
    """Four times the levels: each side comes nearer, the bracket still holds, and the weights stay unbiased."""
    law, (make, log_z) = mixture(), PATHS[name]
    gaps = []
    for levels in (10, 40, 160):
        annealed = AnnealedImportance(levels=levels, kernel=Hamiltonian(step=0.5, leapfrog=3))
        found = annealed.bracket(make(law), exact_samples(law, N, 1), generator=generator(2))
        assert found.contains(log_z)
        assert (
            found.lower.bound < log_z + 3.5 * found.lower.stderr
            and found.upper.bound > log_z - 3.5 * found.upper.stderr
        )
        gaps.append(found.gap)
    assert gaps[0] > 2 * gaps[1] and gaps[1] > 3 * gaps[2] and gaps[2] < 0.5
    assert found.lower.log_z == pytest.approx(log_z, abs=4 * found.lower.stderr)


def test_few_levels_are_a_lower_bound_and_the_weights_unbiased():
    """E log w is below log Z by much more than its error, while log E w is at it: what makes bits/dim optimistic."""
    law = mixture()
    found = AnnealedImportance(levels=3, kernel=Hamiltonian(step=0.5)).forward(
        geometric(law), 20_000, generator=generator(), dtype=torch.float64
    )
    assert found.bound < -OFFSET - 20 * found.stderr
    w = (found.log_w + OFFSET).exp()
    assert abs(float(w.mean()) - 1) < 4 * float(w.std()) / math.sqrt(len(w))
    assert 0 < found.effective < 20_000 and found.evaluations == 1 + 3 + 2


def test_a_constant_added_to_the_energy_is_taken_off():
    law = mixture()
    annealed = AnnealedImportance(levels=5)
    values = [
        annealed.forward(
            DiffusionPath(sde=SDE, energy=energy(law, c), shape=(2,), t=T_0, width=0.4),
            50,
            generator=generator(),
            dtype=torch.float64,
        ).bound
        for c in (0.0, 2.0)
    ]
    assert values[0] - values[1] == pytest.approx(2.0 * (1 + T_0), abs=1e-9)


class TestRefusals:
    def test_an_unbounded_energy(self):
        path = DiffusionPath(
            sde=SDE, energy=lambda x, t: torch.where(x[:, 0] > 5, torch.inf, 0.0) + x.sum(1) * 0, shape=(2,), t=T_0
        )
        with pytest.raises(UserError, match="not finite"):
            AnnealedImportance(levels=5).forward(path, 100, generator=generator())

    @pytest.mark.parametrize(
        "log_f", [lambda x: x.pow(4).sum(1), lambda x: x.pow(2).sum(1), lambda x: x.sum(1), lambda x: 0 * x.sum(1)]
    )
    def test_an_energy_that_falls_outwards(self, log_f):
        """Its chains halt or drift, and the weights of so many levels are finite: their mean is no bound of anything."""
        annealed = AnnealedImportance(levels=30, kernel=Hamiltonian(step=0.4, leapfrog=2))
        with pytest.raises(UserError, match="not bounded below"):
            annealed.forward(GeometricPath(target=log_f, shape=(2,)), 50, generator=generator())

    def test_a_mode_that_the_chains_have_not_reached_is_a_bottom(self):
        """Twenty standard deviations away, after two levels: the bound is bad, and a bound."""
        path = GeometricPath(target=lambda x: -(x - 20).square().sum(1) / 2, shape=(2,))
        found = AnnealedImportance(levels=2).forward(path, 50, generator=generator())
        assert found.bound < math.log(2 * math.pi) - 20

    @pytest.mark.parametrize("mean", [200.0, 1e5])
    def test_however_far_away_it_is(self, mean):
        path = GeometricPath(target=lambda x: -(x - mean).square().sum(1) / 2, shape=(2,))
        annealed = AnnealedImportance(levels=5, kernel=Hamiltonian(step=0.05, leapfrog=1))
        assert annealed.forward(path, 50, generator=generator()).bound < math.log(2 * math.pi) - 20

    def test_samples_may_be_numbers(self):
        """Of shape (): N(0.3, 0.5^2), whose log Z is known."""
        path = GeometricPath(target=lambda x: -(x - 0.3).square() / (2 * 0.25), shape=())
        annealed = AnnealedImportance(levels=80)
        exact = 0.3 + 0.5 * torch.randn(N, generator=generator(1))
        found = annealed.bracket(path, exact, generator=generator(2))
        assert found.contains(math.log(0.5 * math.sqrt(2 * math.pi))) and found.gap < 0.1

    @pytest.mark.parametrize(
        "x", [torch.zeros(400, 3), torch.zeros(0, 2), torch.zeros(9, 2).long(), torch.zeros(9, 2) + 0j, torch.zeros(2)]
    )
    def test_samples_that_are_none_of_the_paths(self, x):
        annealed, path = AnnealedImportance(levels=2), geometric(mixture())
        for run in (annealed.backward, annealed.bracket):
            with pytest.raises(UserError, match=r"got samples of shape .* expected one or more, \(N, 2\)"):
                run(path, x, generator=generator())

    def test_one_chain_has_an_error_that_is_not_known(self, recwarn):
        found = AnnealedImportance(levels=2).forward(geometric(mixture()), 1, generator=generator())
        assert math.isnan(found.stderr) and not recwarn.list

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: AnnealedImportance(levels=1), "levels"),
            (lambda: AnnealedImportance(kernel=Hamiltonian(step=0.1, adjust=False)), "adjust=True"),
            (lambda: GeometricPath(target=lambda x: x.sum(1), shape=(2,), std=0.0), "std"),
            (lambda: DiffusionPath(sde=SDE, energy=lambda x, t: x.sum(1), shape=(2,), t=2.0), "a time in"),
            (lambda: DiffusionPath(sde=SDE, energy=lambda x, t: x.sum(1), shape=(2,), t=0.1, width=-1.0), "width"),
        ],
    )
    def test_other_mistakes(self, make, words):
        with pytest.raises(UserError, match=words):
            make()
