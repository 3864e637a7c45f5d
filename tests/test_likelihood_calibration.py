"""Are the stated errors the errors? Probes' bars over many repetitions, and the solvers' promises in 2 to 3,072 dimensions."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES

from likelihood import Coloured, Exact, Hutchinson, Method, accurate, fast, log_likelihood, pilot_grid
from numerics import Adams, Dopri5, SampleStreams
from sde_lib import WhitenedFlow
from sde_lib.analytic import Gaussian, GaussianMixture

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())

REPETITIONS, IMAGES = 400, 8


def correlated(D: int, shape: tuple[int, ...] | None = None, seed: int = 0) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(D, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
    mean = torch.linspace(-0.5, 0.5, D, dtype=torch.float64)
    return Gaussian(mean.reshape(shape or (D,)), 0.5 * A @ A.T + 0.05 * torch.eye(D, dtype=torch.float64))


def check_calibration(error: torch.Tensor, stderr: torch.Tensor) -> None:
    """`error` and `stderr` `(R, B)`: R repetitions of the values of B images."""
    R, B = error.shape
    assert R >= 400
    ratio = float(error.square().mean().sqrt() / stderr.square().mean().sqrt())
    assert 0.9 < ratio < 1.1, ratio
    # the mean error is zero: a chi-square over the images, at 4 standard deviations of it
    z = error.mean(dim=0) / (error.std(dim=0) / math.sqrt(R))
    assert float(z.square().sum()) < B + 4 * math.sqrt(2 * B), z
    # batch mates: the correlations of two images over the repetitions have standard deviation 1 / sqrt(R)
    i, j = torch.triu_indices(B, B, offset=1)
    pairs = error.T.corrcoef()[i, j] * math.sqrt(R)
    assert float(pairs.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / len(pairs)))
    assert float(pairs.abs().max()) < 4.5


@each_sde
@pytest.mark.parametrize(
    ("divergence", "solver"),
    [
        (Hutchinson(probes=8), Adams(steps=48, points=4)),  # fresh ones
        (Hutchinson(probes=8, fresh=False), Adams(steps=48, points=4)),
        (Coloured(sets=8, spacing=2), Adams(steps=48, points=4)),
    ],
    ids=["fresh", "fixed", "coloured"],
)
def test_bars_are_calibrated(sde, divergence, solver):
    """400 repetitions of 8 images side by side, each with streams of its own."""
    law = correlated(16, (1, 4, 4))
    x = law.marginal_sample(sde, IMAGES, sde.t_min, generator=torch.Generator().manual_seed(1))
    options = dict(
        method=Method(
            solver,
            flow=WhitenedFlow(data_std=0.7),
            grid=pilot_grid(sde, law.score(sde), law.sample(8, generator=torch.Generator().manual_seed(2))),
        ),
        prior=lambda z: law.log_prob(sde, z, sde.T),
    )
    found = log_likelihood(
        sde,
        law.score(sde),
        x.repeat(REPETITIONS, 1, 1, 1),
        divergence=divergence,
        generator=SampleStreams(5),
        **options,
    )
    error = found.log_prob - law.log_prob(sde, x, sde.t_min).repeat(REPETITIONS)
    check_calibration(error.reshape(REPETITIONS, IMAGES), found.probe_stderr.reshape(REPETITIONS, IMAGES))


@pytest.mark.slow
@each_sde
def test_bars_of_the_adaptive_solver_are_calibrated_over_separate_calls(sde):
    """One fixed set of probes a path, drawn from one generator call after call: what a user would do."""
    law = correlated(16)
    x = law.marginal_sample(sde, IMAGES, sde.t_min, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    runs = [
        log_likelihood(
            sde,
            law.score(sde),
            x,
            divergence=Hutchinson(probes=8),
            method=Method(Dopri5(rtol=1e-5, atol=1e-5), flow=WhitenedFlow(data_std=0.7)),
            prior=lambda z: law.log_prob(sde, z, sde.T),
            generator=generator,
        )
        for _ in range(REPETITIONS)
    ]
    error = torch.stack([r.log_prob for r in runs]) - law.log_prob(sde, x, sde.t_min)
    check_calibration(error, torch.stack([r.probe_stderr for r in runs]))


def test_shared_probes_would_be_noticed():
    """The check itself: errors that batch mates share, and bars that are too small by a fifth, are refused."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(400, 8, generator=generator, dtype=torch.float64)
    check_calibration(own, torch.ones(400, 8, dtype=torch.float64))
    with pytest.raises(AssertionError):
        check_calibration(0.8 * own + 0.6 * own[:, :1].roll(1, 0), torch.ones(400, 8, dtype=torch.float64))
    with pytest.raises(AssertionError):
        check_calibration(own, 0.8 * torch.ones(400, 8, dtype=torch.float64))
    with pytest.raises(AssertionError):
        check_calibration(own + 0.3, torch.ones(400, 8, dtype=torch.float64))


def in_bits(error: torch.Tensor, D: int) -> float:
    return float(error.abs().max()) / (D * math.log(2))


class TestLargeImages:
    """3,072 dimensions of diagonal covariance: the Jacobian of the score is diagonal, and v^T J v = tr J for any signs v."""

    D = 3072

    def law(self) -> Gaussian:
        # standard deviations from 0.05 to 1, like those of an image's Fourier components
        return Gaussian(torch.linspace(-0.5, 0.5, self.D).reshape(3, 32, 32), torch.logspace(-2.6, 0, self.D))

    def setting(self, sde, n):
        law = self.law()
        x = law.marginal_sample(sde, n, sde.t_min, generator=torch.Generator().manual_seed(0))
        return law, x, law.log_prob(sde, x, sde.t_min), (lambda z: law.log_prob(sde, z, sde.T))

    @each_sde
    def test_a_probe_of_signs_is_the_exact_trace_of_a_diagonal_jacobian(self, sde):
        law, x, _, _ = self.setting(sde, 1)
        score, t = law.score(sde), torch.tensor([0.3], dtype=torch.float64)
        divergence = Hutchinson(probes=3)
        _, trace = divergence.trace(lambda v: score(v, t), x, divergence.draw(x, SampleStreams(0)))
        alpha, sigma = sde.alpha(0.3), sde.sigma(0.3)
        exact = -(1 / (alpha**2 * law.cov + sigma**2)).sum()
        assert torch.allclose(trace, exact.expand(1, 3), rtol=1e-12)

    @each_sde
    def test_accurate_within_1e_5(self, sde):
        law, x, expected, prior = self.setting(sde, 2)
        found = log_likelihood(
            sde,
            law.score(sde),
            x,
            divergence=Hutchinson(),
            method=Method(Dopri5(rtol=1e-7, atol=1e-7)),
            prior=prior,
            generator=SampleStreams(0),
        )
        assert in_bits(found.log_prob - expected, self.D) < 1e-5

    @each_sde
    def test_fast_within_1e_3(self, sde):
        law, x, expected, prior = self.setting(sde, 4)
        pilot = law.sample(8, generator=torch.Generator().manual_seed(9))
        method = fast(sde, law.score(sde), pilot, steps=64)
        found = log_likelihood(sde, law.score(sde), x, prior=prior, generator=SampleStreams(0), method=method)
        assert in_bits(found.log_prob - expected, self.D) < 1e-3
        assert found.nfe == 65  # one evaluation a step


class LowRank:
    """N(0, c I + U diag(v) U^T) in 3,072 dimensions: a covariance that couples all of them, with a score of few operations."""

    D, c = 3072, 0.05

    def __init__(self, rank: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.U = torch.linalg.qr(torch.randn(self.D, rank, generator=generator, dtype=torch.float64))[0]
        self.v = torch.linspace(20.0, 600.0, rank, dtype=torch.float64)

    def variances(self, sde, t):
        """Of x_t: outside the span of U, and along its columns."""
        a = sde.alpha(t).square()
        rest = a * self.c + sde.sigma(t).square()
        return rest, rest.unsqueeze(-1) + a.unsqueeze(-1) * self.v

    def score(self, sde):
        def score(x, t):
            rest, along = self.variances(sde, t)
            y = x.flatten(1)
            z = (y @ self.U) * (1 - rest.unsqueeze(-1) / along)
            return (-(y - z @ self.U.T) / rest.unsqueeze(-1)).reshape(x.shape)

        return score

    def sample(self, sde, n, t, seed):
        generator = torch.Generator().manual_seed(seed)
        rest, along = self.variances(sde, torch.tensor(t, dtype=torch.float64))
        y = torch.randn(n, self.D, generator=generator, dtype=torch.float64)
        z = y @ self.U
        return (y * rest.sqrt() + z * (along.sqrt() - rest.sqrt()) @ self.U.T).reshape(n, 3, 32, 32)

    def log_prob(self, sde, x, t):
        rest, along = self.variances(sde, torch.tensor(t, dtype=torch.float64))
        y = x.flatten(1)
        z = y @ self.U
        square = (y.square().sum(dim=1) - z.square().sum(dim=1)) / rest + (z.square() / along).sum(dim=1)
        log_det = (self.D - len(self.v)) * rest.log() + along.log().sum()
        return -0.5 * (square + log_det + self.D * math.log(2 * math.pi))


@pytest.mark.slow
@each_sde
def test_3072_dimensions_of_a_coupled_covariance_with_the_exact_trace(sde):
    law = LowRank()
    score, prior = law.score(sde), lambda z: law.log_prob(sde, z, sde.T)
    x = law.sample(sde, 1, sde.t_min, seed=0)
    expected = law.log_prob(sde, x, sde.t_min)
    for method, tolerance in (
        (fast(sde, score, law.sample(sde, 8, sde.t_min, seed=1)), 1e-3),
        (accurate(tolerance=1e-7), 1e-5),
    ):
        found = log_likelihood(sde, score, x, divergence=Exact(rows=1024), prior=prior, method=method)
        assert in_bits(found.log_prob - expected, law.D) < tolerance
    # and a probe of random signs is not the trace here
    one = log_likelihood(sde, score, x, divergence=Hutchinson(), prior=prior, generator=SampleStreams(0), method=method)
    assert in_bits(one.log_prob - expected, law.D) > 1e-4


@each_sde
@pytest.mark.parametrize("D", [2, 64])
def test_fast_on_mixtures_within_1e_3(sde, D):
    """The exact trace on a grid that a pilot run on other samples has placed.

    64 steps keep the mean of |error| within 1e-3 and 96 the worst of 32 samples: an image halfway between two modes is
    harder than most.
    """
    generator = torch.Generator().manual_seed(0)
    means = 0.7 * torch.randn(3, D, generator=generator, dtype=torch.float64)
    law = GaussianMixture(means, torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.2, 0.3, 0.5]))
    score = law.score(sde)
    pilot = law.sample(8, generator=generator)
    x = law.marginal_sample(sde, 32, sde.t_min, generator=generator)

    method = fast(sde, score, pilot, steps=64, data_std=0.7)

    def error(steps):
        found = log_likelihood(
            sde,
            score,
            x,
            divergence=Exact(rows=512),
            prior=lambda z: law.log_prob(sde, z, sde.T),
            method=method.with_steps(steps),
        )
        return (found.log_prob - law.log_prob(sde, x, sde.t_min)).abs() / (D * math.log(2))

    assert float(error(64).mean()) < 1e-3
    assert float(error(96).max()) < 1e-3
