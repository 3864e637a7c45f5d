"""Noise inside a grey value's bin: it is a law, it stays inside, and the bounds it gives lie below the mass of the bin."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES

from data.transforms import Rescale
from likelihood import BitsPerDim, Exact, Method, TruncatedNormal, Uniform, bits_per_dim
from numerics import Adams, SampleStreams
from sde_lib import VPSDE, WhitenedFlow
from sde_lib.analytic import Gaussian

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
TRANSFORM = Rescale(levels=9, low=-1.0, high=1.0)
WIDTH = 2 / 9


class Midpoints(SampleStreams):
    """In place of uniform numbers, the midpoints of n equal parts of (0, 1), one a sample."""

    def __init__(self, n: int) -> None:
        super().__init__(0)
        self.n = n

    def uniform(self, shape, *, device=None):
        return ((torch.arange(self.n, dtype=torch.float64) + 0.5) / self.n).reshape(shape)


def time_of_noise(sde, relative: float) -> float:
    """The time at which sigma/alpha is that part of a bin's width."""
    return float(sde.time_of_log_snr(-2 * math.log(relative * WIDTH)))


@each_sde
@pytest.mark.parametrize("relative", [0.1, 0.5, 3.0])
class TestTruncatedNormal:
    def draw(self, sde, relative, n, generator, level=4):
        t = time_of_noise(sde, relative)
        images = torch.full((n, 1), level, dtype=torch.uint8)
        x, cost = TruncatedNormal()(images, TRANSFORM, sde, t, generator=generator, dtype=torch.float64)
        u = x.squeeze(1) / sde.alpha(t) - TRANSFORM.centres(images).double().squeeze(1)
        return u, cost - sde.alpha(t).log(), t

    def test_its_density_integrates_to_one_and_is_that_of_its_samples(self, sde, relative):
        n = 4001
        u, minus_log_q, _ = self.draw(sde, relative, n, Midpoints(n))
        q = (-minus_log_q).exp()
        assert bool((u.diff() > 0).all())
        # by the trapezium rule, with the two half steps to the ends
        steps = torch.cat([u.diff(), torch.tensor([WIDTH / 2 - float(u[-1]), float(u[0]) + WIDTH / 2])])
        heights = torch.cat([(q[1:] + q[:-1]) / 2, q[-1:], q[:1]])
        assert float((steps * heights).sum()) == pytest.approx(1, abs=2e-3)
        # between two neighbouring quantiles lies 1/n of the mass (the outermost are too far apart for the trapezium rule)
        masses = (u.diff() * (q[1:] + q[:-1]) / 2)[20:-20]
        assert torch.allclose(masses, torch.full_like(masses, 1 / n), rtol=0.01)

    def test_samples_stay_in_the_bin_and_are_spread_as_a_normal_cut_off(self, sde, relative):
        n = 20_000
        u, _, t = self.draw(sde, relative, n, SampleStreams(0))
        assert float(u.abs().max()) <= WIDTH / 2 * (1 + 1e-9)
        s = float(sde.sigma(t) / sde.alpha(t))
        assert s == pytest.approx(relative * WIDTH, rel=1e-3)
        b = WIDTH / 2 / s
        inside = math.erf(b / math.sqrt(2))
        variance = s**2 * (1 - 2 * b * math.exp(-(b**2) / 2) / (math.sqrt(2 * math.pi) * inside))
        assert abs(float(u.mean())) < 4 * math.sqrt(variance / n)
        assert float(u.square().mean()) == pytest.approx(variance, abs=4 * float(u.square().std()) / math.sqrt(n))


def bin_mass(law: Gaussian, images: torch.Tensor, variance: float) -> torch.Tensor:
    """The log-mass `(B,)` of the images' bins under N(mean, cov + variance I), cov diagonal."""
    normal = torch.distributions.Normal(law.mean, (law.cov + variance).sqrt())
    centres = TRANSFORM.centres(images).double()
    return (normal.cdf(centres + WIDTH / 2) - normal.cdf(centres - WIDTH / 2)).log().sum(dim=1)


@each_sde
@pytest.mark.parametrize("dequantizer", [Uniform(), TruncatedNormal()], ids=["uniform", "truncated_normal"])
def test_bounds_lie_below_the_mass_of_the_bin_and_close_with_more_draws(sde, dequantizer):
    """On a Gaussian whose density at t_min is known: no flow, nothing but the noise."""
    law = Gaussian(torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.04, 0.02, 0.09]))
    t = time_of_noise(sde, 0.4)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    images = TRANSFORM.to_images(law.sample(20, generator=torch.Generator().manual_seed(0))).clamp(1, 7)
    if isinstance(dequantizer, Uniform):  # its density is that of x_t itself
        normal = torch.distributions.Normal(alpha * law.mean, (alpha**2 * law.cov + sigma**2).sqrt())
        centres = TRANSFORM.centres(images).double()
        truth = (normal.cdf(centres + WIDTH / 2) - normal.cdf(centres - WIDTH / 2)).log().sum(dim=1)
    else:
        truth = bin_mass(law, images, (sigma / alpha) ** 2)
    K = 256
    streams = SampleStreams(1)
    values = []
    for _ in range(K):
        x, cost = dequantizer(images, TRANSFORM, sde, t, generator=streams, dtype=torch.float64)
        values.append(law.log_prob(sde, x, t) + cost)
    values = torch.stack(values, dim=1)  # (B, K)
    gap = truth - values.mean(dim=1)
    stderr = values.std(dim=1) / math.sqrt(K)
    assert bool((gap > -4 * stderr).all())
    assert float(gap.mean()) > 4 * float(stderr.mean()) / math.sqrt(20)  # a bound, not the value
    # the mean of the densities is the mass itself, without a bias
    ratio = (values - truth.unsqueeze(1)).exp()
    z = (ratio.mean(dim=1) - 1) / (ratio.std(dim=1) / math.sqrt(K))
    assert float(z.abs().max()) < 4


class TestImportanceWeighting:
    @pytest.mark.parametrize("dequantizer", [Uniform(), TruncatedNormal()], ids=["uniform", "truncated_normal"])
    def test_decreases_with_K_and_stays_above_the_truth(self, dequantizer):
        """The flow's values with the exact trace, and the mass of the bins in closed form."""
        sde, D, m = VPSDE(), 3, 16
        law = Gaussian(torch.zeros(D), torch.tensor([0.02, 0.02, 0.03]))
        t_min = time_of_noise(sde, 0.4)
        images = TRANSFORM.to_images(law.sample(200, generator=torch.Generator().manual_seed(0))).clamp(1, 7)
        found = bits_per_dim(
            sde,
            law.score(sde),
            images,
            TRANSFORM,
            dequantizer=dequantizer,
            draws=m,
            divergence=Exact(),
            method=Method(Adams(steps=32, points=4), flow=WhitenedFlow(data_std=0.15), t_min=t_min),
            companions=0,
            generator=SampleStreams(0),
            dtype=torch.float64,
        )
        alpha, sigma = float(sde.alpha(t_min)), float(sde.sigma(t_min))
        scaled = isinstance(dequantizer, Uniform)
        mean, std = (
            (alpha if scaled else 1) * law.mean,
            (law.cov + (sigma / alpha) ** 2).sqrt() * (alpha if scaled else 1),
        )
        normal, centres = torch.distributions.Normal(mean, std), TRANSFORM.centres(images).double()
        mass = (normal.cdf(centres + WIDTH / 2) - normal.cdf(centres - WIDTH / 2)).log().sum(dim=1)
        truth = float(-mass.mean() / (D * math.log(2)))
        assert found.dimensions == D
        values = {k: found.importance_weighted(k) for k in (1, 2, 4, 8, 16)}
        assert torch.allclose(values[1], found.per_image, rtol=1e-12)
        means = [float(v.mean()) for v in values.values()]
        # groups of 2k draws hold those of k, so this is no matter of chance (Jensen), image by image
        for k in (1, 2, 4, 8):
            assert bool((values[k] >= values[2 * k] - 1e-12).all())
        assert means[0] - means[-1] > 0.5 * (means[0] - truth)
        spread = float((values[16] + mass / (D * math.log(2))).std()) / math.sqrt(len(images))
        assert means[-1] > truth - 4 * spread

    def test_subtracts_the_log_of_K(self):
        """Equal draws are as good as one; of two draws of which one has no mass, half remains."""
        estimates = torch.tensor([[[3.0], [3.0]], [[2.0], [1e6]]], dtype=torch.float64)
        found = BitsPerDim(
            estimates=estimates,
            solver_error=torch.zeros(2),
            companion_error=torch.full((2,), math.nan),
            exact=True,
            noisy=True,
            dimensions=4,
            nfe=1,
            nbe=1,
            companion_nfe=0,
            status=torch.zeros(2, dtype=torch.int64),
            failed_at=torch.full((2,), math.nan),
            refined=torch.zeros(2, dtype=torch.int64),
            evaluations=torch.zeros(2, dtype=torch.int64),
            prior_mismatch=torch.zeros(2),
        )
        assert found.importance_weighted().tolist() == pytest.approx([3.0, 2.0 + 1 / 4])
        for wrong in (0, 3):
            with pytest.raises(ValueError, match=f"got K={wrong}; expected 1 to 2"):
                found.importance_weighted(wrong)
