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


@each_sde
@pytest.mark.parametrize("level", [0.4, 0.1])
def test_the_default_grid_finds_what_is_likeliest(sde, level):
    """Of N(0, 0.09 I) with noise, where it is known: n^2 = mean y^2 - 0.09, with error v / n sqrt(1 / 2 N D)."""
    generator, width = torch.Generator().manual_seed(0), 0.3
    y = math.hypot(width, level) * torch.randn(2000, 4, generator=generator, dtype=torch.float64)
    law = Gaussian(torch.zeros(4, dtype=torch.float64), width**2 * torch.eye(4, dtype=torch.float64))
    found = estimate_noise_level(sde, law.score(sde), y, generator=SampleStreams(0), divergence=Exact())
    likeliest = math.sqrt(float(y.square().mean()) - width**2)
    assert found.joint == pytest.approx(likeliest, rel=2e-3)
    assert found.joint_stderr == pytest.approx(
        (width**2 + likeliest**2) / likeliest / math.sqrt(2 * y.numel()), rel=0.05
    )
    finer = estimate_noise_level(sde, law.score(sde), y, generator=SampleStreams(0), divergence=Exact(), points=200)
    assert found.joint_stderr == pytest.approx(finer.joint_stderr, rel=0.05)


def test_probes_are_enough_and_the_default_grid_too():
    y, law, sde = noisy(300), GaussianMixture(MEANS, STDS, WEIGHTS), VPSDE()
    found = estimate_noise_level(sde, law.score(sde), y, generator=SampleStreams(1), divergence=Hutchinson(probes=2))
    assert abs(found.joint - TRUE) < 3 * found.joint_stderr and found.joint_stderr < 0.02
    assert len(found.levels) == 24
    again = estimate_noise_level(sde, law.score(sde), y, generator=SampleStreams(1), divergence=Hutchinson(probes=2))
    assert found.joint == again.joint


class Dropped(torch.nn.Module):
    """A law's score, through dropout."""

    def __init__(self, score):
        super().__init__()
        self.score, self.drop = score, torch.nn.Dropout(0.2)
        self.weight = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def forward(self, x, t):
        return self.drop(self.score(x, t)) + 0 * self.weight * x


def test_it_is_asked_for_as_a_likelihood_is():
    """Data and networks that `log_likelihood` refuses are refused here too; what was a traceback says what to do."""
    sde, law, y = VPSDE(), GaussianMixture(MEANS, STDS, WEIGHTS), noisy(6)
    ask = lambda y, score=law.score(sde), sde=sde, **more: estimate_noise_level(
        sde, score, y, generator=SampleStreams(0), **more
    )
    missing = y.clone()
    missing[3, 0] = math.nan
    unknown = lambda x, t: torch.where(x[:, :1] > 0, math.nan, law.score(sde)(x, t))
    refused = [
        ("not finite .the first at 3", lambda: ask(missing)),
        ("score that is not finite for", lambda: ask(y, unknown)),
        ("train mode with Dropout", lambda: ask(y, Dropped(law.score(sde)).train())),
        ("float16 for a log-density", lambda: ask(y.half())),
        ("bfloat16 for a log-density", lambda: ask(y.float(), Dropped(law.score(sde)).eval().bfloat16())),
        ("x of shape", lambda: ask(y[:, 0])),
        ("x of shape", lambda: ask(y[:0])),
        ("torch.int64", lambda: ask(y.round().long())),
        ("low=0.0", lambda: ask(y, low=0.0, sde=VPSDE(t_min=0.0))),
        ("low=0", lambda: ask(y, low=0)),
        ("high=nan", lambda: ask(y, high=math.nan)),
    ]
    for says, call in refused:
        with pytest.raises(UserError, match=says):
            call()
    assert ask(y, Dropped(law.score(sde)).eval()).joint == pytest.approx(ask(y).joint, rel=1e-6)


def test_the_same_numbers_in_every_autograd_mode():
    sde, law = VPSDE(), GaussianMixture(MEANS, STDS, WEIGHTS)
    ask = lambda y: estimate_noise_level(sde, law.score(sde), y, generator=SampleStreams(0)).each
    plain = ask(noisy(6))
    with torch.inference_mode():
        assert torch.equal(ask(noisy(6)), plain)
    with torch.no_grad():
        assert torch.equal(ask(noisy(6)), plain)
    followed = ask(noisy(6).requires_grad_())
    assert torch.equal(followed, plain) and not followed.requires_grad


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
