"""Latents and back, interpolation, temperature, and samples with their densities, against exact laws."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES, mixture

from likelihood import (
    Exact,
    Hutchinson,
    Method,
    decode,
    encode,
    interpolate,
    log_likelihood,
    pilot_grid,
    round_trip,
    sample_with_log_prob,
)
from likelihood.latent import slerp
from numerics import Adams, Dopri5, SampleStreams, UserError
from sde_lib.analytic import Gaussian

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
TIGHT = Method(Dopri5(rtol=1e-8, atol=1e-8))


def law(D: int = 3) -> Gaussian:
    A = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / math.sqrt(D)
    return Gaussian(torch.linspace(-0.5, 0.5, D), A @ A.T + 0.1 * torch.eye(D))


@each_sde
class TestEncodeAndDecode:
    def test_the_latent_is_that_of_the_closed_form(self, sde):
        """Diagonal Gaussian: the flow keeps every coordinate's whitened value, (x - alpha m) / std."""
        diagonal = Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([0.2, 1.5]))
        x = diagonal.marginal_sample(sde, 5, sde.t_min, generator=torch.Generator().manual_seed(0))
        found = encode(sde, diagonal.score(sde), x, method=TIGHT)

        def law_at(t):
            return sde.alpha(t) * diagonal.mean, (sde.alpha(t) ** 2 * diagonal.cov + sde.sigma(t) ** 2).sqrt()

        (m_0, s_0), (m_T, s_T) = law_at(sde.t_min), law_at(sde.T)
        assert torch.allclose(found.x, m_T + s_T * (x - m_0) / s_0, rtol=1e-5, atol=1e-5)
        assert bool(found.converged.all()) and found.nfe == int(found.evaluations.max())

    def test_round_trip_error_is_reported_and_small(self, sde):
        x = mixture().marginal_sample(sde, 8, sde.t_min, generator=torch.Generator().manual_seed(0))
        errors = {}
        for tolerance in (1e-4, 1e-8):
            found = round_trip(sde, mixture().score(sde), x, method=Method(Dopri5(rtol=tolerance, atol=tolerance)))
            assert torch.allclose(found.error, (found.x - x).square().mean(dim=1).sqrt())
            errors[tolerance] = float(found.error.max())
        assert errors[1e-8] < 1e-5 < errors[1e-4] < 1e-1

    def test_fixed_grids_go_both_ways(self, sde):
        x = mixture().marginal_sample(sde, 8, sde.t_min, generator=torch.Generator().manual_seed(0))
        score = mixture().score(sde)
        grid = pilot_grid(sde, score, x)
        there = encode(sde, score, x, method=Method(Adams(steps=120, points=4), grid=grid))
        exact = encode(sde, score, x, method=TIGHT)
        assert torch.allclose(there.x, exact.x, atol=2e-3 * sde.prior_std)
        back = decode(sde, score, exact.x, method=Method(Adams(steps=120, points=4), grid=grid))
        assert torch.allclose(back.x, x, atol=1e-2)
        assert there.nfe == back.nfe == 120 + 1 + 3

    def test_a_latent_does_not_depend_on_its_batch_mates(self, sde):
        x = mixture().marginal_sample(sde, 4, sde.t_min, generator=torch.Generator().manual_seed(0))
        score = mixture().score(sde)
        together = encode(sde, score, torch.cat([x, 30 + 0 * x[:1]])).x[:4]
        assert torch.allclose(together, encode(sde, score, x[:4]).x, rtol=1e-9)

    def test_interpolation_meets_its_ends(self, sde):
        x = mixture().marginal_sample(sde, 6, sde.t_min, generator=torch.Generator().manual_seed(0))
        found = interpolate(sde, mixture().score(sde), x[:3], x[3:], [0.0, 0.3, 1.0], method=TIGHT)
        assert found.x.shape == (3, 3, 2) and bool(found.converged.all())
        assert torch.allclose(found.x[0], x[:3], atol=1e-4) and torch.allclose(found.x[2], x[3:], atol=1e-4)
        assert float(found.round_trip_error.max()) < 1e-5
        assert torch.allclose(found.latent[1], slerp(found.latent[0], found.latent[2], 0.3), rtol=1e-6)


class TestSlerp:
    def test_keeps_to_the_great_circle(self):
        a = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
        b = torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64)
        for w in (0.0, 0.2, 0.5, 1.0):
            expected = 2 * torch.tensor([[math.cos(w * math.pi / 2), math.sin(w * math.pi / 2), 0.0]]).double()
            assert torch.allclose(slerp(a, b, w), expected, atol=1e-6)

    def test_parallel_and_zero_latents_take_the_straight_line(self):
        a = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
        b = torch.tensor([[3.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
        assert torch.allclose(slerp(a, b, 0.5), torch.tensor([[2.0, 2.0], [0.0, 0.0]], dtype=torch.float64))

    def test_a_great_circle_is_between_two_of_one_shape(self):
        a, b = torch.randn(1, 4), torch.randn(2, 4)
        for other in (b, a[:, :3]):
            with pytest.raises(UserError, match="got latents of shapes"):
                slerp(a, other, 0.5)
        for weight in (math.nan, "half", True):
            with pytest.raises(UserError, match="weight"):
                slerp(a, a, weight)


@each_sde
class TestSampleWithLogProb:
    def test_agrees_with_the_likelihood_of_the_samples(self, sde):
        score = mixture().score(sde)
        found = sample_with_log_prob(
            sde, score, (16, 2), divergence=Exact(), method=TIGHT, generator=SampleStreams(0), dtype=torch.float64
        )
        again = log_likelihood(sde, score, found.x, divergence=Exact(), method=TIGHT)
        assert torch.allclose(found.log_prob, again.log_prob, atol=1e-4)
        assert torch.allclose(found.likelihood.latent, again.latent, rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.sampling_log_prob, found.log_prob, rtol=1e-12)
        # and the truth, but for the prior's mismatch at T
        assert ((found.log_prob - mixture().log_prob(sde, found.x, sde.t_min)).abs() < 0.1).all()
        assert found.likelihood.nbe == 2 * found.likelihood.nfe

    def test_on_a_fixed_grid_with_fresh_probes_within_its_bars(self, sde):
        gaussian = law(16)
        score = gaussian.score(sde)
        grid = pilot_grid(sde, score, gaussian.sample(8, generator=torch.Generator().manual_seed(0)))
        found = sample_with_log_prob(
            sde,
            score,
            (128, 16),
            divergence=Hutchinson(probes=8),
            method=Method(Adams(steps=64, points=4), grid=grid),
            generator=SampleStreams(0),
            dtype=torch.float64,
        )
        exact = log_likelihood(
            sde, score, found.x, divergence=Exact(), method=Method(Adams(steps=128, points=4), grid=grid)
        )
        error = found.log_prob - exact.log_prob
        assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(128)
        assert float(error.square().mean().sqrt() / found.likelihood.probe_stderr.square().mean().sqrt()) < 1.2

    def test_temperature_scales_the_latents_and_both_densities_are_right(self, sde):
        """On a Gaussian the law of tempered samples is known: its standard deviation is scaled by the temperature."""
        tau, std = 0.5, math.sqrt(0.3)
        gaussian = Gaussian(torch.zeros(2), torch.full((2,), std**2))
        n = 400
        found = sample_with_log_prob(
            sde,
            gaussian.score(sde),
            (n, 2),
            temperature=tau,
            divergence=Exact(),
            method=TIGHT,
            generator=SampleStreams(0),
            dtype=torch.float64,
        )
        spread = tau * math.sqrt(float(sde.alpha(sde.t_min)) ** 2 * std**2 + float(sde.sigma(sde.t_min)) ** 2)
        assert float(found.x.std()) == pytest.approx(spread, rel=4 / math.sqrt(4 * n))
        tempered = torch.distributions.Normal(0.0, spread).log_prob(found.x).sum(dim=1)
        # the price of the prior for the marginal at T is the largest for VE: 2e-4
        assert torch.allclose(found.sampling_log_prob, tempered, atol=5e-3)
        assert torch.allclose(found.log_prob, gaussian.log_prob(sde, found.x, sde.t_min), atol=5e-3)
        z = found.likelihood.latent
        assert torch.allclose(
            decode(sde, gaussian.score(sde), z / tau, temperature=tau, method=TIGHT).x, found.x, atol=1e-5
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, f: decode(s, f, torch.zeros(1, 2), temperature=0.0), "temperature=0.0"),
        (lambda s, f: sample_with_log_prob(s, f, (2, 2), x_T=torch.zeros(1, 2)), r"x_T of shape \(1, 2\)"),
        (lambda s, f: interpolate(s, f, torch.zeros(1, 2), torch.zeros(2, 2), [0.5]), r"x_b of \(2, 2\)"),
        (lambda s, f: interpolate(s, f, torch.zeros(1, 2), torch.zeros(1, 2), []), "got weights"),
        (lambda s, f: interpolate(s, f, torch.zeros(1, 2), torch.zeros(1, 2), [0.0, math.nan]), "finite numbers"),
        (lambda s, f: sample_with_log_prob(s, f, (2, 2), divergence=Hutchinson(fresh=True)), "fresh probes"),
        (lambda s, f: encode(s, f, torch.full((1, 2), math.nan)), "not finite"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    sde = SDES["vp"]
    with pytest.raises(ValueError, match=message) as error:
        make(sde, mixture().score(sde))
    assert "\n" not in str(error.value)


def test_a_sample_that_fails_costs_only_itself():
    sde, score = SDES["vp"], mixture().score(SDES["vp"])

    def broken(x, t):
        return torch.where(((t > 0.3) & (x[:, 0] > 0.5)).unsqueeze(1), math.nan, score(x, t))

    x = torch.tensor([[-1.0, 0.5], [2.0, 2.0]], dtype=torch.float64)
    found = round_trip(sde, broken, x)
    assert found.converged.tolist() == [True, False]
    assert float(found.error[0]) < 1e-2 and math.isnan(float(found.error[1]))
