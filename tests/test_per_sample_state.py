"""A score that knows its samples is taken along wherever a batch is cut, repeated, permuted or left by samples."""

from __future__ import annotations

import pytest
import torch

import samplers
from data.transforms import Rescale, Standardize
from likelihood import (
    Exact,
    Method,
    bits_per_dim,
    companion_error,
    decode,
    elbo,
    encode,
    fast,
    interpolate,
    log_likelihood,
    round_trip,
    sample_with_log_prob,
)
from numerics import Adams, Dopri5, SampleStreams
from sde_lib import VPSDE

D = 3
SDE = VPSDE()


class Own:
    """The score of N(m_i, 0.3^2 I) for sample i, each with its own mean; refuses a batch of another size."""

    def __init__(self, means):
        self.means = means

    def __call__(self, x, t):
        assert len(x) == len(self.means), (len(x), len(self.means))
        alpha, sigma = SDE.alpha(t).unsqueeze(1), SDE.sigma(t).unsqueeze(1)
        means = self.means.reshape(len(x), -1)
        value = (alpha * means - x.flatten(1)) / (alpha**2 * 0.09 + sigma**2)
        return value.reshape(x.shape).to(x.dtype)

    def take(self, index):
        return Own(self.means[index])


def own(B):
    means = torch.linspace(-1, 1, B * D, dtype=torch.float64).reshape(B, D)
    return Own(means), means


each_size = pytest.mark.parametrize("B", [1, 3, 17, 40])


def density(x, means):
    """log N(x; m, (0.09 + small) I) at t_min."""
    a, s = SDE.alpha(SDE.t_min), SDE.sigma(SDE.t_min)
    return torch.distributions.Normal(a * means, (a**2 * 0.09 + s**2).sqrt()).log_prob(x.double()).sum(dim=1)


@each_size
@pytest.mark.parametrize("solver", [Dopri5(rtol=1e-6, atol=1e-6), Adams(steps=48, points=5)], ids=["adaptive", "fixed"])
def test_densities_and_latents(B, solver):
    score, means = own(B)
    x = (means + 0.3 * torch.randn(B, D, generator=torch.Generator().manual_seed(0))).float()
    method = Method(solver)
    found = log_likelihood(SDE, score, x, method=method, divergence=Exact())
    torch.testing.assert_close(found.log_prob, density(x, means), atol=0.06, rtol=0)
    there = encode(SDE, score, x, method=method)
    back = decode(SDE, score, there.x, method=method)
    torch.testing.assert_close(back.x, x, atol=1e-3, rtol=0)
    assert float(round_trip(SDE, score, x, method=method).error.max()) < 1e-3
    if not solver.adaptive:
        assert companion_error(SDE, score, x, method=method).shape == (B,)
    drawn = sample_with_log_prob(SDE, score, (B, D), method=method, divergence=Exact(), generator=SampleStreams(0))
    torch.testing.assert_close(drawn.log_prob, density(drawn.x, means), atol=0.06, rtol=0)


@each_size
def test_interpolation_has_the_samples_of_its_ends(B):
    score, means = own(B)
    a, b = (means + s for s in (-0.2, 0.2))
    found = interpolate(SDE, score, a.float(), b.float(), [0.0, 0.5, 1.0])
    torch.testing.assert_close(found.x[0].double(), a, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.x[2].double(), b, atol=1e-3, rtol=0)
    assert bool(found.converged.all())


@each_size
def test_bits_per_dim_with_companions(B):
    score, means = own(B)
    x = (means + 0.3 * torch.randn(B, D, generator=torch.Generator().manual_seed(0))).float()
    method = fast(SDE, score, x)
    plain = Standardize()
    found = bits_per_dim(SDE, score, x, plain, method=method, companions=16, divergence=Exact())
    nats = -found.per_image * D * torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(nats, density(x, means), atol=0.06, rtol=0)
    assert int(found.companion_error.isfinite().sum()) == min(B, 16)
    grey = (torch.arange(B * D).reshape(B, D) % 8).to(torch.uint8)
    grey_bits = bits_per_dim(SDE, score, grey, Rescale(levels=8), method=method, draws=2)
    assert bool(grey_bits.per_image.isfinite().all())


@each_size
def test_bounds(B):
    score, means = own(B)
    x = (means + 0.3 * torch.randn(B, D, generator=torch.Generator().manual_seed(0))).float()
    bound = elbo(SDE, score, x, draws=200, generator=SampleStreams(0))
    assert float(((bound.nats + density(x, means)) / bound.stderr).abs().max()) < 5


@pytest.mark.parametrize("name", [n for n in samplers.available() if n != "torchsde"])
@each_size
def test_samplers_whose_samples_leave_or_stay(name, B):
    score, means = own(B)
    made = samplers.create(name)
    steps = getattr(made, "steps", 0)
    if isinstance(steps, int) and steps > 60 and name != "ald":
        made = samplers.create(name, steps=60)
    x = made(SDE, score, (B, D), generator=SampleStreams(0)).x.double()
    assert float((x - means).abs().max()) < 5 * 0.3 + 0.2
    if B > 1:
        assert float(torch.corrcoef(torch.stack([x.flatten(), means.flatten()]))[0, 1]) > 0.6
