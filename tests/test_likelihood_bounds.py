"""The variational bounds against exact scores: equal to the truth, above it, and term by term in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import SDES

from data.transforms import Rescale
from likelihood import GaussianChain, elbo
from likelihood.bounds import Bins, DiscretizedGaussian
from likelihood.step_draws import StepDraws
from numerics import SampleStreams
from sde_lib import VESDE, VPSDE
from sde_lib.analytic import EmpiricalDistribution, Gaussian, GaussianMixture

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())

D = 6
LAW = Gaussian(torch.linspace(-0.6, 0.6, D), torch.linspace(0.1, 1.2, D))
STD = 0.8


def data(n: int) -> torch.Tensor:
    return LAW.sample(n, generator=torch.Generator().manual_seed(0))


def denoising_error(sde, t, x_0, factor=1.0):
    """E |x_0 - x_0-hat(x_t)|^2 given x_0, `(B,)`, for the exact score times `factor`: both are linear in x_t."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    variance = alpha**2 * LAW.cov + sigma**2
    # x_0-hat = (x + factor sigma^2 score) / alpha
    gain = (1 - factor * sigma**2 / variance) / alpha
    shift = factor * sigma**2 / variance * LAW.mean
    mean = x_0 - gain * alpha * x_0 - shift
    return (mean.square() + (gain * sigma).square()).sum(dim=1)


def prior_term(sde, x_0):
    alpha, sigma, p = float(sde.alpha(sde.T)), float(sde.sigma(sde.T)), sde.prior_std
    p_law = torch.distributions.Normal(torch.zeros_like(x_0), p)
    q_law = torch.distributions.Normal(alpha * x_0, torch.full_like(x_0, sigma))
    return torch.distributions.kl_divergence(q_law, p_law).sum(dim=1)


def reconstruction_term(sde, t, x_0, factor=1.0):
    s = float(sde.sigma(t) / sde.alpha(t))
    return denoising_error(sde, t, x_0, factor) / (2 * s**2) + D * math.log(s * math.sqrt(2 * math.pi))


def chain_term(sde, t_min, steps, x_0, factor=1.0):
    """The sum of KL(q(x_s | x_t, x_0) || q(x_s | x_t, x_0-hat)) from the kernels alone, without (2) of the module."""
    times = torch.linspace(t_min, sde.T, steps + 1, dtype=torch.float64)
    total = torch.zeros(len(x_0), dtype=torch.float64)
    for s, t in zip(times[:-1], times[1:]):
        between = sde.transition_std(s, t).square()  # of x_t given x_s
        # the law of x_s given x_t and x_0, by Bayes' rule: precisions add
        precision = 1 / sde.sigma(s).square() + (sde.alpha(t) / sde.alpha(s)).square() / between
        weight_of_x_0 = sde.alpha(s) / sde.sigma(s).square() / precision
        total += 0.5 * precision * weight_of_x_0.square() * denoising_error(sde, t, x_0, factor)
    return total


def integral_term(sde, t_min, x_0, factor=1.0):
    """The integral over log-SNR, by the trapezium rule on a fine grid."""
    l = torch.linspace(float(sde.log_snr(sde.T)), float(sde.log_snr(t_min)), 4001, dtype=torch.float64)
    values = torch.stack([math.exp(v) * denoising_error(sde, sde.time_of_log_snr(v), x_0, factor) for v in l.tolist()])
    return 0.5 * torch.trapezoid(values, l, dim=0)


def within(found, expected, stderr):
    """No bias over the images, and stated errors that are the errors."""
    error = found - expected
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(len(error))
    assert 0.8 < float(error.square().mean().sqrt() / stderr.square().mean().sqrt()) < 1.2


@each_sde
@pytest.mark.parametrize("factor", [1.0, 0.7])
@pytest.mark.parametrize("data_std", [None, STD])
class TestTermsInClosedForm:
    """A linear-Gaussian chain: every term is known, for the right score and for a wrong one."""

    def found(self, sde, factor, **options):
        score = LAW.score(sde)
        x_0 = data(200)
        return x_0, elbo(sde, lambda x, t: factor * score(x, t), x_0, generator=SampleStreams(3), **options)

    def test_continuous(self, sde, factor, data_std):
        t_min = 1e-3
        x_0, bound = self.found(sde, factor, draws=64, reconstructions=16, t_min=t_min, data_std=data_std)
        assert torch.allclose(bound.prior, prior_term(sde, x_0), rtol=1e-9)
        within(bound.reconstruction, reconstruction_term(sde, t_min, x_0, factor), bound.reconstruction_stderr)
        within(bound.diffusion, integral_term(sde, t_min, x_0, factor), bound.diffusion_stderr)
        assert bound.nfe == 64 + 16

    def test_chain(self, sde, factor, data_std):
        t_min, steps = 1e-2, 20
        x_0, bound = self.found(sde, factor, draws=80, steps=steps, t_min=t_min, data_std=data_std)
        within(bound.diffusion, chain_term(sde, t_min, steps, x_0, factor), bound.diffusion_stderr)


@each_sde
class TestExactScore:
    def test_continuous_bound_is_the_truth(self, sde):
        x_0 = data(400)
        truth = -LAW.log_prob(sde, x_0, 0.0 if float(sde.sigma(0.0)) == 0 else sde.t_min)
        bound = elbo(sde, LAW.score(sde), x_0, draws=128, reconstructions=16, data_std=STD, generator=SampleStreams(0))
        error = bound.nats - truth
        assert abs(float(error.mean())) < 4 * float(error.std()) / 20
        assert float(error.std()) < 1.2 * float(bound.stderr.square().mean().sqrt())
        assert float(bound.stderr.mean()) / (D * math.log(2)) < 0.25  # it says something

    def test_chain_lies_above_and_falls_with_the_steps(self, sde):
        """In closed form for the fall; by the code under test for its own value."""
        x_0, t_min = data(400), 1e-3
        truth = float(-LAW.log_prob(sde, x_0, t_min if float(sde.sigma(0.0)) else 0.0).mean())
        ends = prior_term(sde, x_0) + reconstruction_term(sde, t_min, x_0)
        exact = [float((ends + chain_term(sde, t_min, n, x_0)).mean()) for n in (10, 40, 160, 640)]
        assert exact[0] > exact[1] > exact[2] > exact[3] > truth
        for n, value in zip((10, 40, 160), exact):
            bound = elbo(
                sde, LAW.score(sde), x_0, steps=n, draws=160, t_min=t_min, data_std=STD, generator=SampleStreams(1)
            )
            stderr = float(bound.nats.sub(ends + chain_term(sde, t_min, n, x_0)).std()) / 20
            assert abs(float(bound.nats.mean()) - value) < 4 * stderr
            assert float(bound.nats.mean()) > truth - 4 * stderr

    def test_a_wrong_score_costs(self, sde):
        """The same noise for both: the difference is sure."""
        x_0, right = data(400), LAW.score(sde)
        for wrong in (lambda x, t: 0.7 * right(x, t), lambda x, t: right(x, t) - 0.5 / sde.sigma(t).unsqueeze(1)):
            for options in (dict(), dict(steps=64, t_min=1e-3)):
                values = [
                    elbo(sde, score, x_0, draws=64, generator=SampleStreams(2), **options).nats
                    for score in (right, wrong)
                ]
                more = values[1] - values[0]
                assert float(more.mean()) > 4 * float(more.std()) / 20

    def test_the_length_of_the_noise_taken_out_leaves_less_error(self, sde):
        x_0 = data(100)
        plain, reduced = (
            elbo(sde, LAW.score(sde), x_0, draws=32, data_std=s, generator=SampleStreams(0)).stderr for s in (None, STD)
        )
        assert float(reduced.square().mean()) < 0.5 * float(plain.square().mean())


class TestErrorBars:
    """64 values of variance 1/4 under VP down to 1e-5: nearly all of the bound is in the first of the steps."""

    LAW = Gaussian(torch.zeros(64), torch.full((64,), 0.25))

    def truth(self, sde, x_0, steps):
        """The chain's bound of one x_0 in closed form, nats."""
        times = torch.linspace(sde.t_min, sde.T, steps + 1, dtype=torch.float64)
        snr = sde.log_snr(times).exp()

        def error(t):  # E |x_0 - x_0-hat|^2
            alpha, variance = sde.alpha(t), sde.sigma(t).square()
            total = 0.25 * alpha**2 + variance
            return (variance / total).square() * x_0.square().sum() + 64 * variance * (0.25 * alpha / total).square()

        s = float(sde.sigma(sde.t_min) / sde.alpha(sde.t_min))
        first = error(times[0]) / (2 * s**2) + 64 * math.log(s * math.sqrt(2 * math.pi))
        alpha, sigma = float(sde.alpha(sde.T)), float(sde.sigma(sde.T))
        prior = 0.5 * (alpha**2 * float(x_0.square().sum()) + 64 * (sigma**2 - 1 - 2 * math.log(sigma)))
        return float((0.5 * (snr[:-1] - snr[1:]) * error(times[1:])).sum() + first) + prior

    def check(self, draws, steps, repetitions):
        sde = VPSDE()
        x_0 = self.LAW.sample(1, generator=torch.Generator().manual_seed(0))
        bound = elbo(
            sde,
            self.LAW.score(sde),
            x_0.expand(repetitions, -1),
            draws=draws,
            steps=steps,
            generator=torch.Generator().manual_seed(1),
        )
        error = bound.nats - self.truth(sde, x_0[0].double(), steps)
        assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(repetitions)
        assert 0.8 < float(error.square().mean().sqrt() / bound.stderr.square().mean().sqrt()) < 1.2
        beyond = float((error.abs() > 4 * bound.stderr).double().mean())
        assert beyond <= (0.08 if draws == 8 else 0.05)

    def test_a_chain_with_fewer_draws_than_steps(self):
        """Drawn all alike, 64 steps of 1,000 had a standard deviation of 12,775 nats and stated 48."""
        self.check(64, 1000, 500)
        self.check(8, 1000, 500)

    @pytest.mark.slow
    @pytest.mark.parametrize("steps", [200, 1000])
    @pytest.mark.parametrize("draws", [8, 16, 64, 1000])
    def test_calibration(self, draws, steps):
        self.check(draws, steps, 2000)

    def test_noise_in_one_stratum_counts_as_much_wherever_it_is(self):
        for first in (True, False):
            terms = torch.zeros(4000, 16, dtype=torch.float64)
            where = slice(0, 2) if first else slice(6, 8)
            terms[:, where] = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            ones = torch.ones_like(terms)
            drawn = StepDraws(
                cells=torch.zeros(4000, 16).long(),
                place=terms,
                factors=ones,
                expected=ones,
                shares=ones[:, :8],
                spread=torch.zeros(4000, dtype=torch.float64),
            )
            mean, stderr, _ = drawn.total(terms)
            assert float(mean.var() / stderr.square().mean()) == pytest.approx(1, abs=0.08)

    def test_the_gaussians_own_sum_needs_no_draw(self):
        """Terms in proportion to what is expected have no variance: their sum is right to rounding, from any draws."""
        l = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
        w = torch.rand(3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for n in (8, 9, 33):
            u = torch.rand(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            drawn = StepDraws.of(u, lengths=l, weights=l.square(), w=w, dimensions=5)
            estimate, stderr, _ = drawn.total(0.3 * 5 * (l.square() * w).gather(1, drawn.cells))
            assert torch.allclose(estimate, 0.3 * 5 * (l.square() * w).sum(dim=1), rtol=1e-12)
            assert torch.allclose(stderr, (drawn.spread / (n * (n // 2 + 1))).sqrt(), rtol=1e-9)

    def test_the_estimate_has_no_bias(self):
        """Terms that are nothing like what is expected, eight draws, 40,000 times."""
        l = torch.ones(20, dtype=torch.float64)
        w = torch.linspace(1, 0.01, 20, dtype=torch.float64).expand(40_000, -1)
        e = torch.linspace(0, 3, 20, dtype=torch.float64).square()
        u = torch.rand(40_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn = StepDraws.of(u, lengths=l, weights=l, w=w, dimensions=5)
        estimate, _, _ = drawn.total(e[drawn.cells])
        assert abs(float(estimate.mean() - e.sum())) < 4 * float(estimate.std()) / 200

    @pytest.mark.parametrize("sde", [VPSDE(), VESDE(sigma_max=1e4)], ids=["vp", "ve"])
    @pytest.mark.parametrize("way", ["continuous", "chain", "GaussianChain"])
    @pytest.mark.parametrize("draws", [8, 16])
    def test_bars_cover_what_few_draws_miss(self, sde, way, draws):
        """A rare group far from the rest, and narrow: nearly all of its bound is in few noises that carry it to the others.

        Without the Gaussian's share of the bar, 42 to 49 % of errors at 8 draws were beyond four bars.
        """
        law = GaussianMixture(
            means=torch.tensor([[-1.0] * 8, [1.0] * 8]), stds=torch.tensor([0.1, 0.1]), weights=torch.tensor([0.9, 0.1])
        )
        score = law.score(sde)
        chain = GaussianChain(sde=sde, times=torch.linspace(1e-3, sde.T, 100, dtype=torch.float64))

        def bounds(n, repetitions, seed):
            x_0, g = torch.ones(repetitions, 8), torch.Generator().manual_seed(seed)
            if way == "GaussianChain":
                return chain.bound(score, x_0, draws=n, reconstructions=1, generator=g)
            steps = 200 if way == "chain" else None
            return elbo(sde, score, x_0, draws=n, steps=steps, reconstructions=1, generator=g)

        truth = bounds(512, 300, 9).diffusion
        found = bounds(draws, 1000, 1)
        error = found.diffusion - truth.mean()
        assert float(truth.std()) / math.sqrt(300) < 0.1 * float(found.diffusion_stderr.square().mean().sqrt())
        assert float((error.abs() > 4 * found.diffusion_stderr).double().mean()) < (0.08 if draws == 8 else 0.05)
        assert 0.2 < float(error.square().mean().sqrt() / found.diffusion_stderr.square().mean().sqrt()) < 1.2

    def test_a_bar_that_rests_on_few_draws_is_named(self):
        """A score that is far off in a tenth of a nat of the log-SNR, which few draws meet."""
        sde, x_0 = VPSDE(), data(50)

        def score(x, t):
            here = (sde.log_snr(t) - 3).abs() < 0.1
            return LAW.score(sde)(x, t) - torch.where(here, 100.0, 0.0).to(x).unsqueeze(1)

        bad, good = (elbo(sde, s, x_0, draws=256, generator=SampleStreams(0)) for s in (score, LAW.score(sde)))
        assert bad.heavy_tailed.double().mean() > 0.9 and not good.heavy_tailed.any()

    def test_below_eight_draws_there_is_no_bar(self):
        for draws in (7, 8, 9):
            bound = elbo(VPSDE(), LAW.score(VPSDE()), data(3), draws=draws, generator=SampleStreams(0))
            assert bool(bound.diffusion_stderr.isfinite().all()) == (draws >= 8)
            assert bound.diffusion.isfinite().all()


class TestGreyLevels:
    TRANSFORM = Rescale(levels=9)

    @pytest.mark.parametrize("x", [-3.0, -1.1, 0.0, 0.37, 0.98, 40.0])
    @pytest.mark.parametrize("s", [0.003, 0.1, 2.0])
    def test_decoders_are_laws_of_the_levels(self, x, s):
        levels = torch.arange(9, dtype=torch.uint8).reshape(9, 1)
        state = torch.full((9, 1), x, dtype=torch.float64)
        for decoder in (Bins(transform=self.TRANSFORM), DiscretizedGaussian(transform=self.TRANSFORM)):
            log_prob = decoder.log_prob(levels, state, state, 0.9, 0.9 * s)
            assert bool((log_prob <= 0).all())
            assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-9)

    def test_discretized_gaussian_is_a_difference_of_cdfs(self):
        levels = torch.arange(9, dtype=torch.uint8).reshape(9, 1)
        state = torch.full((9, 1), 0.21, dtype=torch.float64)
        found = DiscretizedGaussian(transform=self.TRANSFORM).log_prob(levels, state, state, 1.0, 0.3)
        edges = torch.linspace(-1, 1, 10, dtype=torch.float64)
        cdf = torch.distributions.Normal(0.21, 0.3).cdf(edges)
        cdf[0], cdf[-1] = 0, 1
        assert torch.allclose(found.exp(), cdf.diff(), rtol=1e-6)

    def test_far_levels_keep_finite_costs(self):
        state = torch.zeros(1, 1, dtype=torch.float64)
        images = torch.tensor([[7]], dtype=torch.uint8)
        for decoder in (Bins(transform=self.TRANSFORM), DiscretizedGaussian(transform=self.TRANSFORM)):
            assert -1e7 < float(decoder.log_prob(images, state, state, 1.0, 1e-3)) < -1e4

    def test_many_levels_of_many_pixels_take_little_memory(self):
        """Pixels are looked at in parts; far from the ends the levels' sum is the Gaussian integral over their spacing."""
        transform, sigma, alpha = Rescale(levels=65_536), 1e-3, 0.9
        levels = torch.randint(20_000, 45_000, (2, 100), generator=torch.Generator().manual_seed(0))
        z = torch.randn(2, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        state = alpha * transform(levels.double() + 0.5) + sigma * z
        found = Bins(transform=transform).log_prob(levels, state, None, alpha, sigma)
        spacing = alpha * math.exp(transform.log_det)
        expected = -z.square() / 2 - math.log(sigma * math.sqrt(2 * math.pi) / spacing)
        assert torch.allclose(found, expected.sum(dim=1), rtol=1e-9)

    @each_sde
    def test_bins_give_the_exact_probability_of_discrete_data(self, sde):
        """A law on grid points, with its exact score: the bound is -log of the image's probability."""
        images = torch.tensor([[0, 0], [0, 8], [4, 4], [4, 4], [4, 4], [4, 4], [8, 1], [8, 1]], dtype=torch.uint8)
        probability = torch.tensor([1, 1, 4, 4, 4, 4, 2, 2], dtype=torch.float64) / 8
        x_0 = self.TRANSFORM.centres(images).double()
        law = EmpiricalDistribution(x_0)
        n = 300
        bound = elbo(
            sde,
            law.score(sde),
            x_0.repeat(n, 1),
            data=images.repeat(n, 1),
            decoder=Bins(transform=self.TRANSFORM),
            draws=64,
            generator=SampleStreams(0),
        )
        error = bound.nats.reshape(n, 8) + probability.log()
        z = error.mean(dim=0) / (error.std(dim=0) / math.sqrt(n))
        assert float(z.abs().max()) < 4
        # at t_min the levels are far apart against the noise
        assert float(bound.reconstruction.max()) < 1e-6

    def test_discretized_gaussian_bounds_the_mass_of_a_gaussian_law(self):
        """DDPM's whole bound, L_T + sum + L_0, on grey values whose probabilities under the model are known."""
        sde, law = VPSDE(), Gaussian(torch.zeros(2), torch.full((2,), 0.09))
        x = law.sample(300, generator=torch.Generator().manual_seed(0))
        images = self.TRANSFORM.to_images(x)
        edges = torch.linspace(-1, 1, 10, dtype=torch.float64)
        cdf = torch.distributions.Normal(0.0, 0.3).cdf(edges)
        cdf[0], cdf[-1] = 0, 1
        truth = -cdf.diff().log()[images.long()].sum(dim=1)
        bound = elbo(
            sde,
            law.score(sde),
            self.TRANSFORM.centres(images).double(),
            data=images,
            decoder=DiscretizedGaussian(transform=self.TRANSFORM),
            steps=50,
            draws=100,
            t_min=1e-3,
            generator=SampleStreams(0),
        )
        gap = bound.nats - truth
        assert float(gap.mean()) > 4 * float(gap.std()) / math.sqrt(300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, "draws=0"),
        ({"steps": 0}, "steps=0"),
        ({"reconstructions": 0}, "reconstructions=0"),
        ({"data_std": -1.0}, "data_std=-1.0"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        elbo(VPSDE(), LAW.score(VPSDE()), data(2), **options)
    assert "\n" not in str(error.value)


def test_errors_of_single_draws_are_unknown():
    bound = elbo(VPSDE(), LAW.score(VPSDE()), data(2), draws=1, reconstructions=1, generator=SampleStreams(0))
    assert bool(
        bound.stderr.isnan().all() & bound.diffusion_stderr.isnan().all() & bound.reconstruction_stderr.isnan().all()
    )


@pytest.mark.parametrize(
    ("x_0", "options", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), {}, "floating batch"),
        (torch.full((2, 3), math.inf), {}, "not finite"),
        (torch.zeros(2, 3), {"t_min": 0.0}, "t_min=0.0"),
        (torch.zeros(2, 3), {"decoder": Bins(transform=Rescale(levels=4))}, "images of type torch.float32"),
        (
            torch.zeros(2, 3),
            {"decoder": DiscretizedGaussian(transform=Rescale(levels=4)), "data": torch.full((2, 3), 23)},
            "from 23 to 23, .* in 2 images",
        ),
        (
            torch.zeros(2, 3),
            {"decoder": Bins(transform=Rescale(levels=4)), "data": torch.zeros(1, 3, dtype=torch.int64)},
            r"data of shape \(1, 3\)",
        ),
    ],
)
def test_data_that_cannot_be_scored_are_refused(x_0, options, message):
    with pytest.raises(ValueError, match=message) as error:
        elbo(VPSDE(), lambda x, t: -x, x_0, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("decoder", [Bins, DiscretizedGaussian])
def test_sixteen_bits_a_pixel_are_decoded(decoder):
    """uint16, which has no amin, as int64."""
    transform, sde, law = Rescale(levels=65536), VPSDE(), Gaussian(torch.zeros(4), 0.1 * torch.ones(4))
    grey = torch.randint(0, 65536, (3, 4), generator=torch.Generator().manual_seed(0))

    def bound(data):
        x_0, streams = transform.centres(grey).double(), SampleStreams(0)
        return elbo(
            sde, law.score(sde), x_0, data=data, decoder=decoder(transform=transform), draws=8, generator=streams
        ).nats

    assert torch.equal(bound(grey.to(torch.uint16)), bound(grey))
