"""The likelihood of a noise level against laws whose noisy density is known."""

import math

import pytest
import torch
from oracles import SDES

from likelihood import Exact, Hutchinson, estimate_noise_level
from numerics import SampleStreams, UserError
from sde_lib import VPSDE
from sde_lib.analytic import Gaussian, GaussianMixture

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
MEANS = torch.tensor([[1.0, 0.0, -0.5, 0.2, 0.0, 0.0], [-1.0, 0.5, 0.5, 0.0, 0.3, -0.4]], dtype=torch.float64)
STDS, WEIGHTS = torch.tensor([0.2, 0.4]), torch.tensor([0.6, 0.4])
TRUE = 0.5


def noisy(n):
    generator = torch.Generator().manual_seed(0)
    x = GaussianMixture(MEANS, STDS, WEIGHTS).sample(n, generator=generator).double()
    return x + TRUE * torch.randn(n, 6, generator=generator, dtype=torch.float64)


def exact_log_prob(y, n):
    """Of y = x_0 + n z, `(B,)`, by hand."""
    variance = STDS.double() ** 2 + n**2
    square = (y.unsqueeze(1) - MEANS).square().sum(2)
    return (WEIGHTS.double().log() - 0.5 * square / variance - 3 * (2 * math.pi * variance).log()).logsumexp(1)


@each_sde
def test_the_likelihood_of_a_level_is_the_noisy_density(sde):
    y, law = noisy(40), GaussianMixture(MEANS, STDS, WEIGHTS)
    found = estimate_noise_level(
        sde, law.score(sde), y, generator=SampleStreams(0), low=0.1, high=1.5, points=60, divergence=Exact()
    )
    exact = torch.stack([exact_log_prob(y, float(n)) for n in found.levels], 1)
    torch.testing.assert_close(found.log_likelihood, exact - exact[:, :1], rtol=0, atol=0.02)
    fine = torch.logspace(-1, math.log10(1.5), 2000, dtype=torch.float64)
    table = torch.stack([exact_log_prob(y, float(n)) for n in fine], 1)
    assert abs(found.joint / float(fine[table.sum(0).argmax()]) - 1) < 2e-3
    each = fine[table.argmax(1)]
    one_peak = (each > 0.12) & (each < 1.4)
    torch.testing.assert_close(found.each[one_peak], each[one_peak], rtol=0.02, atol=0)
    # the error bar is the curvature's
    total, k = table.sum(0), int(table.sum(0).argmax())
    step = float(fine[1].log() - fine[0].log())
    curvature = -float(total[k + 20] - 2 * total[k] + total[k - 20]) / (20 * step) ** 2
    assert found.joint_stderr / found.joint * math.sqrt(curvature) == pytest.approx(1, abs=0.1)
    assert abs(found.joint - TRUE) < 3 * found.joint_stderr


def test_probes_are_enough_and_the_default_grid_too():
    y, law, sde = noisy(300), GaussianMixture(MEANS, STDS, WEIGHTS), VPSDE()
    found = estimate_noise_level(sde, law.score(sde), y, generator=SampleStreams(1), divergence=Hutchinson(probes=2))
    assert abs(found.joint - TRUE) < 3 * found.joint_stderr and found.joint_stderr < 0.02
    assert len(found.levels) == 24
    again = estimate_noise_level(sde, law.score(sde), y, generator=SampleStreams(1), divergence=Hutchinson(probes=2))
    assert found.joint == again.joint


def test_refuses_and_warns():
    sde = VPSDE()
    law = Gaussian(torch.zeros(2), torch.eye(2))
    y = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    for bad in ({"low": 0.5, "high": 0.2}, {"low": 1e-9}, {"high": 1e9}):
        with pytest.raises(UserError, match="expected .* <= low < high"):
            estimate_noise_level(sde, law.score(sde), y, generator=SampleStreams(0), **bad)
    with pytest.raises(UserError, match="points=2"):
        estimate_noise_level(sde, law.score(sde), y, generator=SampleStreams(0), points=2)
    with pytest.warns(UserWarning, match="at the end of"):  # less spread than the data alone
        estimate_noise_level(sde, law.score(sde), 0.01 * y, generator=SampleStreams(0), low=0.1, high=1.0)
