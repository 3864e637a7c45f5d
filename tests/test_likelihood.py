"""Log-densities and bits/dim against closed forms."""

import math
import warnings

import pytest
import torch
from oracles import SDES

from data.transforms import Rescale
from likelihood import (
    BitsPerDim,
    Coloured,
    Exact,
    Hutchinson,
    Method,
    UniformDequantizer,
    accurate,
    bits_per_dim,
    companion_error,
    encode,
    fast,
    log_likelihood,
    pilot_grid,
)
from numerics import RK4, Adams, Dopri5, SampleStreams, SciPy, Status, TorchDiffEq
from sde_lib import VESDE, VPSDE, CountedScore, PlainFlow, WhitenedFlow
from sde_lib.analytic import Gaussian, GaussianMixture

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
TIGHT = Method(Dopri5(rtol=1e-7, atol=1e-7))
MANY_AT_ONCE = Exact(rows=512)  # the score of a closed form is of few operations: twice as fast in 64 dimensions


def oracle(name, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if name == "gaussian":
        A = torch.randn(D, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
        return Gaussian(torch.linspace(-0.5, 0.5, D), 0.5 * A @ A.T + 0.05 * torch.eye(D))
    means = 0.7 * torch.randn(3, D, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.2, 0.3, 0.5]))


def setting(sde, name, D, n, seed=1):
    law = oracle(name, D)
    x = law.marginal_sample(sde, n, sde.t_min, generator=torch.Generator().manual_seed(seed))
    return law, law.score(sde), x, (lambda z: law.log_prob(sde, z, sde.T)), law.log_prob(sde, x, sde.t_min)


class TestDivergence:
    J = torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def linear(self, x):
        return (x.flatten(1) @ self.J.T).reshape(x.shape)

    def x(self, n):
        return torch.randn(n, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    @pytest.mark.parametrize("rows", [None, 1, 12, 10**6])
    def test_exact_is_the_trace_whatever_the_chunk(self, rows):
        value, trace = Exact(rows=rows).trace(self.linear, self.x(5), None)
        assert torch.allclose(value, self.linear(self.x(5)))
        assert torch.allclose(trace, self.J.trace().expand(5, 1))

    @pytest.mark.parametrize(
        ("divergence", "variance"),
        [
            (Hutchinson(probes=2), lambda S: 2 * (S.square().sum() - S.diag().square().sum())),
            (Hutchinson(probes=2, noise="gaussian"), lambda S: 2 * S.square().sum()),
            (Coloured(spacing=3, sets=2), lambda S: torch.zeros(())),
        ],
    )
    def test_estimates_have_the_mean_and_the_variance_of_theory(self, divergence, variance):
        n = 20_000
        x = self.x(n)
        _, trace = divergence.trace(self.linear, x, divergence.draw(x, SampleStreams(3)))
        assert trace.shape == (n, 2)
        expected = float(variance((self.J + self.J.T) / 2))
        error = trace.flatten() - self.J.trace()
        assert abs(float(error.mean())) <= 4 * math.sqrt(expected / (2 * n)) + 1e-12
        # the fourth moments are bounded by those of a Gaussian form: 8 % is more than four standard errors
        assert float(error.square().mean()) == pytest.approx(expected, rel=0.08, abs=1e-12)
        assert abs(float((error[::2] * error[1::2]).mean())) < 0.08 * expected + 1e-12  # independent columns

    def test_coloured_sees_only_pixels_of_one_lattice_together(self):
        x = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
        probes = Coloured(spacing=2, sets=1).draw(x, SampleStreams(0))
        assert probes.shape == (1, 4, 1, 6, 6)
        assert torch.equal(probes.abs().sum(dim=1), torch.ones(1, 1, 6, 6, dtype=torch.float64))
        first = probes[0, 0, 0].nonzero()
        assert bool((first % 2 == 0).all()) and len(first) == 9

    def test_one_forward_pass_serves_value_and_trace(self):
        calls = []

        def function(x):
            calls.append(1)
            return self.linear(x)

        for divergence in (Exact(), Hutchinson(probes=5), Coloured(spacing=2)):
            calls.clear()
            x = self.x(4)
            divergence.trace(function, x, divergence.draw(x, SampleStreams(0)))
            assert len(calls) == 1


@each_sde
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
class TestLogLikelihood:
    @pytest.mark.parametrize("D", [2, 64])
    def test_equals_the_closed_form(self, sde, name, D):
        _, score, x, prior, expected = setting(sde, name, D, n=6)
        found = log_likelihood(sde, score, x, divergence=MANY_AT_ONCE, method=TIGHT, prior=prior)
        assert bool(found.converged.all())
        # a tenth of the promise, 1e-4 nats per dimension
        assert ((found.log_prob - expected).abs() / D).max() < 1e-5
        assert ((found.log_prob - expected).abs() <= found.solver_error.clamp(min=1e-9)).all()
        assert torch.equal(found.probe_stderr, torch.zeros(6, dtype=torch.float64))

    def test_hutchinson_agrees_within_its_error(self, sde, name):
        _, score, x, prior, expected = setting(sde, name, 16, n=64)
        found = log_likelihood(
            sde,
            score,
            x,
            divergence=Hutchinson(probes=8),
            method=Method(Dopri5(rtol=1e-6, atol=1e-6)),
            prior=prior,
            generator=SampleStreams(5),
        )
        z = (found.log_prob - expected) / found.probe_stderr
        # Student's t with 7 degrees of freedom: variance 7/5, and the mean of 64 within four standard errors
        assert abs(float(z.mean())) < 4 * math.sqrt(1.4 / 64)
        assert float((found.log_prob - expected).mean().abs()) < 4 * float(
            found.probe_stderr.square().mean().sqrt() / 8
        )

    def test_batch_mates_change_nothing(self, sde, name):
        """Permuting, splitting, and adding a far outlier."""
        law, score, x, prior, _ = setting(sde, name, 3, n=5)
        outlier = 30 * torch.ones(1, 3, dtype=torch.float64)

        def value(batch, ids, divergence):
            return log_likelihood(
                sde,
                score,
                batch,
                divergence=divergence,
                method=Method(Dopri5(rtol=1e-3, atol=1e-3)),  # whatever the tolerance is
                prior=prior,
                generator=SampleStreams(2, ids),
            ).log_prob

        ids = torch.arange(6)
        for divergence in (Exact(), Hutchinson(probes=2)):
            alone = value(x, ids[:5], divergence)
            order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
            for other in (
                value(x[order], ids[order], divergence)[order.argsort()],
                torch.cat([value(x[:2], ids[:2], divergence), value(x[2:], ids[2:5], divergence)]),
                value(torch.cat([x, outlier]), ids, divergence)[:5],
            ):
                assert torch.allclose(other, alone, rtol=1e-9, atol=0)
        found = log_likelihood(sde, score, torch.cat([x, outlier]), divergence=Exact(), method=TIGHT, prior=prior)
        assert float(found.log_prob[5]) == pytest.approx(float(law.log_prob(sde, outlier, sde.t_min)), rel=1e-5)

    def test_solvers_and_flows_agree(self, sde, name):
        D = 4
        _, score, x, prior, expected = setting(sde, name, D, n=3)
        for solver, flow in (
            (Adams(steps=120, points=4), WhitenedFlow(data_std=0.7)),
            (RK4(steps=50), WhitenedFlow()),
            (Dopri5(rtol=1e-5, atol=1e-5), PlainFlow()),
            (SciPy("RK45", 1e-6), WhitenedFlow()),
            (TorchDiffEq("dopri5", 1e-6), WhitenedFlow()),
        ):
            found = log_likelihood(sde, score, x, divergence=Exact(), method=Method(solver, flow=flow), prior=prior)
            assert ((found.log_prob - expected).abs() / D).max() < 1e-4, solver

    def test_evaluations_are_counted(self, sde, name):
        _, score, x, prior, _ = setting(sde, name, 4, n=3)
        for divergence, products in ((Exact(), 4), (Hutchinson(probes=3), 3)):
            for solver in (Dopri5(), Adams(steps=9), RK4(steps=4)):
                counted = CountedScore(score)
                found = log_likelihood(sde, counted, x, divergence=divergence, method=Method(solver))
                assert found.nfe == counted.nfe
                assert found.nbe == products * counted.nfe
                assert int(found.evaluations.max()) == found.nfe


def test_gaussian_prior_costs_what_the_documentation_says():
    """VE's flow ends on data of mean m, not 0; at the defaults the price stays below 2e-3 nats per dimension in 64-D."""
    costs = {}
    for name, sde in SDES.items():
        _, score, x, prior, expected = setting(sde, "gaussian", 64, n=16)
        found = log_likelihood(sde, score, x, divergence=MANY_AT_ONCE, method=TIGHT)
        costs[name] = float((found.log_prob - expected).abs().mean() / 64)
    assert max(costs.values()) < 2e-3, costs


def test_fresh_probes_on_a_fixed_grid_are_unbiased_and_better():
    sde = SDES["vp"]
    _, score, x, prior, expected = setting(sde, "gaussian", 16, n=256)
    errors = {}
    for fresh in (False, True):
        found = log_likelihood(
            sde,
            score,
            x,
            divergence=Hutchinson(probes=2, fresh=fresh),
            method=Method(Adams(steps=60, points=4)),
            prior=prior,
            generator=SampleStreams(0),
        )
        error = found.log_prob - expected
        assert abs(float(error.mean())) < 4 * float(error.std()) / 16
        errors[fresh] = float(error.square().mean().sqrt())
        ratio = errors[fresh] / float(found.probe_stderr.square().mean().sqrt())
        assert ratio == pytest.approx(1, abs=0.25)  # the stated error is the error
    assert errors[True] < 0.6 * errors[False]


@each_sde
def test_a_pilot_places_the_steps_where_the_flow_is_hard(sde):
    """Two narrow modes: everything happens at one noise level, and equal steps in log-SNR waste most of theirs."""
    law = GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.tensor([0.05, 0.05]), torch.ones(2))
    score, prior = law.score(sde), lambda z: law.log_prob(sde, z, sde.T)
    generator = torch.Generator().manual_seed(0)
    x, others = (law.marginal_sample(sde, n, sde.t_min, generator=generator) for n in (32, 8))
    grid = pilot_grid(sde, score, others)
    expected = law.log_prob(sde, x, sde.t_min)

    def error(grid):
        found = log_likelihood(
            sde, score, x, divergence=Exact(), method=Method(Adams(steps=40, points=4), grid=grid), prior=prior
        )
        return float((found.log_prob - expected).abs().mean())

    assert error(grid) < 0.6 * error(None)
    times = grid(sde, 40)
    assert float(times[0]) == sde.T and float(times[-1]) == sde.t_end
    with pytest.raises(ValueError, match="chooses its own steps"):
        Method(grid=grid)


def test_companions_bound_the_error_of_a_grid():
    sde = SDES["vp"]
    _, score, x, prior, _ = setting(sde, "mixture", 8, n=16)
    truth = log_likelihood(sde, score, x, divergence=Hutchinson(fresh=False), method=TIGHT, generator=SampleStreams(0))
    for steps in (24, 48, 96):
        method = Method(Adams(steps=steps, points=3))
        found = log_likelihood(
            sde, score, x, divergence=Hutchinson(fresh=False), method=method, generator=SampleStreams(0)
        )
        error = float((found.log_prob - truth.log_prob).abs().mean())
        stated = float(companion_error(sde, score, x, method=method).mean())
        assert error / 2 < stated < 20 * error


def test_log_prob_is_differentiable():
    """Against the score of the closed form, in x; the same probes, so the derivative of the very number returned."""
    sde = SDES["vp"]
    law, score, x, prior, _ = setting(sde, "mixture", 3, n=4)
    x.requires_grad_()
    found = log_likelihood(sde, law.score(sde), x, divergence=Exact(), method=TIGHT, prior=prior, create_graph=True)
    (slope,) = torch.autograd.grad(found.log_prob.sum(), x)
    assert torch.allclose(slope, score(x.detach(), torch.tensor(sde.t_min)), rtol=1e-4, atol=1e-4)


def test_a_network_that_fails_somewhere_costs_only_its_samples():
    sde = SDES["vp"]
    _, score, x, prior, expected = setting(sde, "gaussian", 3, n=4)

    def broken(x, t):
        hole = ((x[:, 0] > -10) & (t > 0.3) & (t < 0.4) & (x[:, 2] > 0.0)).unsqueeze(1)
        return torch.where(hole, math.nan, score(x, t))

    found = log_likelihood(sde, broken, x, divergence=Exact(), prior=prior)
    lost = found.status != int(Status.DONE)
    assert 0 < int(lost.sum()) < 4
    assert bool(found.log_prob[lost].isnan().all()) and torch.equal(found.converged, ~lost)
    assert found.failed_at[lost].tolist() == pytest.approx([0.3] * int(lost.sum()), abs=0.01)
    assert ((found.log_prob - expected)[~lost].abs() < 1e-3).all()


class TestBitsPerDim:
    @pytest.mark.parametrize("levels", [2, 17, 256])
    @pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
    def test_a_uniform_density_gives_exactly_log2_levels(self, levels, low, high):
        """The constants alone: log p(x) = -D log(high - low)."""
        transform, D = Rescale(levels=levels, low=low, high=high), 64
        log_p_x = -D * math.log(high - low)
        log_p_v = log_p_x + D * transform.log_det
        assert -log_p_v / (D * math.log(2)) == pytest.approx(math.log2(levels), abs=1e-12)

    def test_a_gaussian_over_many_bins_gives_its_entropy(self):
        """Grey values of a Gaussian of 20 bins' width: bits/dim is -E log2 P(k), P(k) the exact mass of the bins.

        What the bound loses by uniform noise is of the order of 1/(24 20^2) = 1e-4 nats.
        """
        sde, levels, D = VPSDE(), 256, 4
        transform = Rescale(levels=levels, low=-1.0, high=1.0)
        std = 20 * 2 / levels
        law = Gaussian(torch.zeros(D), torch.full((D,), std**2))
        x_0 = law.sample(200, generator=torch.Generator().manual_seed(0))
        images = transform.to_images(x_0).to(torch.int64)
        edges = torch.arange(levels + 1, dtype=torch.float64) * (2 / levels) - 1
        mass = torch.distributions.Normal(0.0, torch.tensor(std, dtype=torch.float64)).cdf(edges).diff().log2()
        expected = -mass[images].mean(dim=1)
        found = bits_per_dim(
            sde,
            law.score(sde),
            images,
            transform,
            draws=4,
            divergence=Exact(),
            method=Method(Dopri5(rtol=1e-6, atol=1e-6), flow=WhitenedFlow(data_std=std)),
            generator=SampleStreams(0),
            dtype=torch.float64,
        )
        error = found.per_image - expected
        assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(200) + 2e-4
        assert found.dequantization_stderr > 0 and found.probe_stderr == 0

    @pytest.mark.slow
    def test_errors_of_the_parts_are_those_of_repetition(self):
        sde = VPSDE()
        law = oracle("gaussian", 9)
        transform = Rescale(levels=6, low=-3.0, high=3.0)
        images = transform.to_images(law.sample(12, generator=torch.Generator().manual_seed(0)).reshape(12, 1, 3, 3))
        law = Gaussian(law.mean.reshape(1, 3, 3), law.cov)

        def score_set(seed, **options):
            return bits_per_dim(
                sde,
                law.score(sde),
                images,
                transform,
                method=Method(Adams(steps=16)),
                generator=SampleStreams(seed),
                dtype=torch.float64,
                **options,
            )

        runs = [score_set(seed, draws=3, divergence=Hutchinson(probes=3)) for seed in range(30)]
        spread = torch.tensor([r.mean for r in runs]).std()
        stated = (
            torch.tensor([math.hypot(r.probe_stderr, r.dequantization_stderr) for r in runs]).square().mean().sqrt()
        )
        assert float(spread / stated) == pytest.approx(1, abs=4 / math.sqrt(2 * 30))
        exact = [score_set(seed, draws=3, divergence=Exact()) for seed in range(20)]
        spread = torch.tensor([r.mean for r in exact]).std()
        stated = torch.tensor([r.dequantization_stderr for r in exact]).square().mean().sqrt()
        assert float(spread / stated) == pytest.approx(1, abs=4 / math.sqrt(2 * 20))
        assert math.isnan(score_set(0, draws=1).dequantization_stderr) and math.isnan(score_set(0).probe_stderr)
        assert math.isnan(score_set(0, draws=3).dequantization_stderr)  # one random estimate a draw
        assert str(runs[0]).count("±") == 1 and "12 images; 17+51 evaluations" in str(runs[0])

    def test_an_image_is_scored_alike_in_any_batch(self):
        sde = VPSDE()
        law = Gaussian(torch.zeros(1, 3, 3), 0.3 * torch.ones(9))
        images = torch.randint(0, 17, (7, 1, 3, 3), generator=torch.Generator().manual_seed(0))
        transform = Rescale(levels=17)

        def score_part(ids):
            return bits_per_dim(
                sde,
                law.score(sde),
                images[ids],
                transform,
                draws=2,
                generator=SampleStreams(4, ids),
                dtype=torch.float64,
            ).per_image

        whole = score_part(torch.arange(7))
        part = score_part(torch.tensor([5, 2]))
        assert torch.allclose(part, whole[[5, 2]], rtol=1e-9)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (torch.full((2, 1, 4, 4), 0.3), r"got 0.3, which is none of the 17 grey values k/16; expected"),
            (torch.full((2, 1, 4, 4), 16.5), r"got floats from 16.5 to 16.5 for 17 grey levels; expected 0 to 16"),
            (
                torch.full((2, 1, 4, 4), 17, dtype=torch.uint8),
                r"got grey values from 17 to 17, .* 2 images .*expected 0 ... 16",
            ),
            (torch.full((2, 1, 4, 4), -1, dtype=torch.int32), r"got grey values from -1"),
            (torch.tensor([3, 16, 99, -2]).reshape(4, 1, 1, 1).expand(4, 1, 4, 4), r"in 2 images \(the first: 2, 3\)"),
            (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), r"expected a batch \(B, \*\) of one or more"),
        ],
    )
    def test_images_that_do_not_fit_are_refused(self, images, message):
        law = Gaussian(torch.zeros(1, 4, 4), torch.ones(16))
        with pytest.raises(ValueError, match=message):
            bits_per_dim(VPSDE(), law.score(VPSDE()), images, Rescale(levels=17))

    def test_more_levels_than_the_data_hold_is_said(self):
        law = Gaussian(torch.zeros(1, 2, 2), torch.ones(4))
        images = torch.full((2, 1, 2, 2), 16, dtype=torch.uint8)
        options = dict(method=Method(Adams(steps=4)), companions=0)
        with pytest.warns(UserWarning, match="at most 16 for a transform of 256 levels"):
            bits_per_dim(VPSDE(), law.score(VPSDE()), images, Rescale(levels=256), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bits_per_dim(VPSDE(), law.score(VPSDE()), images, Rescale(levels=17), **options)

    def test_a_failing_network_is_named_and_the_other_images_kept(self):
        sde, transform = VPSDE(), Rescale(levels=17)
        law = Gaussian(torch.zeros(1, 2, 2), 0.3 * torch.ones(4))
        images = torch.randint(0, 17, (6, 1, 2, 2), generator=torch.Generator().manual_seed(0))
        images[4:, 0, 0, 0] = 16  # only these reach the hole
        score = law.score(sde)

        def broken(x, t):
            hole = (x[:, :1, :1, :1] > 0.85) & (t > 0.2).reshape(-1, 1, 1, 1) & (images_at(x) == 1)
            return torch.where(hole, math.nan, score(x, t))

        def images_at(x):  # the corner of the last two images stays the largest along the flow
            return (x[:, :1, :1, :1] == x[:, :1].amax(dim=(2, 3), keepdim=True)).to(torch.int64)

        options = dict(generator=None, divergence=Exact(), dtype=torch.float64)
        streams = lambda: {**options, "generator": SampleStreams(0, torch.arange(6))}
        whole = bits_per_dim(sde, score, images, transform, draws=2, **streams())
        found = bits_per_dim(sde, broken, images, transform, draws=2, **streams())
        lost = ~found.converged
        assert 0 < int(lost.sum()) < 6
        assert torch.allclose(found.per_image[~lost], whole.per_image[~lost], rtol=1e-9)
        assert bool(found.per_image[lost].isnan().any())
        assert found.mean == pytest.approx(float(whole.per_image[~lost].mean()), rel=1e-9)
        assert (found.failed_at[lost] - 0.2).abs().max() < 0.15 and bool(found.failed_at[~lost].isnan().all())
        assert f"{int(lost.sum())} images failed at t = 0.2" in str(found) and "not finite" in str(found)
        assert f"{6 - int(lost.sum())} images;" in str(found)

    def test_companions_count_what_they_cost_and_state_the_error_of_the_first_images(self):
        sde, transform = VPSDE(), Rescale(levels=17)
        law = Gaussian(torch.zeros(1, 2, 2), 0.3 * torch.ones(4))
        images = torch.randint(0, 17, (5, 1, 2, 2), generator=torch.Generator().manual_seed(0))
        counted = CountedScore(law.score(sde))
        found = bits_per_dim(sde, counted, images, transform, draws=2, method=Method(Adams(steps=16)), companions=3)
        assert counted.nfe == 2 * found.nfe + found.companion_nfe and found.companion_nfe > found.nfe
        assert found.companion_error.isfinite().tolist() == [True] * 3 + [False] * 2
        assert bool(found.solver_error.isnan().all())  # fresh probes leave the solver none of its own

    def test_an_own_prior_is_used(self):
        sde, transform = VESDE(sigma_max=5.0), Rescale(levels=17)
        law = Gaussian(torch.full((1, 2, 2), 0.9), 0.3 * torch.ones(4))
        images = torch.randint(0, 17, (5, 1, 2, 2), generator=torch.Generator().manual_seed(0))
        prior = lambda z: law.log_prob(sde, z, sde.T)
        options = dict(method=TIGHT, divergence=Exact(), dtype=torch.float64)
        x, _ = UniformDequantizer()(images, transform, sde, sde.t_min, generator=SampleStreams(0), dtype=torch.float64)
        expected = -(law.log_prob(sde, x, sde.t_min) + 4 * transform.log_det) / (4 * math.log(2))
        streams = lambda: SampleStreams(0)
        ours = bits_per_dim(sde, law.score(sde), images, transform, prior=prior, generator=streams(), **options)
        theirs = bits_per_dim(sde, law.score(sde), images, transform, generator=streams(), **options)
        assert (ours.per_image - expected).abs().max() < 1e-5
        assert (theirs.per_image - expected).abs().max() > 1e-3


class TestErrorBudget:
    """The parts of the standard error, from numbers that are known beforehand."""

    def result(self, estimates, **changes):
        n = len(estimates)
        options = dict(
            estimates=torch.as_tensor(estimates, dtype=torch.float64),
            solver_error=torch.full((n,), 1e-4, dtype=torch.float64),
            companion_error=torch.full((n,), math.nan, dtype=torch.float64),
            exact=False,
            noisy=True,
            dimensions=4,
            nfe=33,
            nbe=66,
            companion_nfe=0,
            status=torch.zeros(n, dtype=torch.int64),
            failed_at=torch.full((n,), math.nan, dtype=torch.float64),
            refined=torch.zeros(n, dtype=torch.int64),
            evaluations=torch.zeros(n, dtype=torch.int64),
            prior_mismatch=torch.zeros(n, dtype=torch.float64),
        )
        return BitsPerDim(**{**options, **changes})

    def random(self, n, m, K, data, noise, probe, seed=0):
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        return 3 + data * draw(n, 1, 1) + noise * draw(n, m, 1) + probe * draw(n, m, K)

    def test_total_and_parts_are_what_was_put_in(self):
        n, m, K, data, noise, probe = 4000, 3, 2, 0.5, 0.3, 0.2
        found = self.result(self.random(n, m, K, data, noise, probe))
        total = math.sqrt((data**2 + noise**2 / m + probe**2 / (m * K)) / n)
        assert found.stderr == pytest.approx(total, rel=0.05)
        assert found.stderr == pytest.approx(float(found.per_image.std()) / math.sqrt(n), rel=1e-12)
        assert found.probe_stderr == pytest.approx(probe / math.sqrt(n * m * K), rel=0.05)
        assert found.dequantization_stderr == pytest.approx(noise / math.sqrt(n * m), rel=0.05)
        assert found.data_stderr == pytest.approx(data / math.sqrt(n), rel=0.05)

    @pytest.mark.parametrize(
        ("m", "K", "exact", "noisy", "unknown"),
        [
            (1, 1, False, True, {"probe", "dequantization", "data"}),
            (1, 2, False, True, {"dequantization", "data"}),
            (2, 1, False, True, {"probe", "dequantization"}),  # both together are known, so the data's part is
            (2, 2, False, True, set()),
            (1, 1, True, True, {"dequantization", "data"}),
            (2, 1, True, True, set()),
            (1, 1, True, False, set()),
            (1, 2, False, False, set()),
            (1, 1, False, False, {"probe", "data"}),
        ],
    )
    def test_what_cannot_be_known_is_not_a_number(self, m, K, exact, noisy, unknown):
        found = self.result(self.random(50, m, K, 0.5, 0.1, 0.1), exact=exact, noisy=noisy)
        for part in ("probe", "dequantization", "data"):
            assert math.isnan(getattr(found, f"{part}_stderr")) == (part in unknown), part
        assert found.stderr > 0
        assert (found.probe_stderr == 0) == exact
        assert (found.dequantization_stderr == 0) == (not noisy)

    def test_it_prints_each_number_in_its_place(self):
        found = self.result(self.random(2500, 2, 2, 0.6, 0.5, 0.4))
        assert str(found) == (
            f"{found.mean:.3f} ± {found.stderr:.3f} bits/dim (probe {found.probe_stderr:.3f}, "
            f"dequantisation {found.dequantization_stderr:.3f}, data {found.data_stderr:.3f}; "
            "solver < 0.001; 2,500 images; 33+66 evaluations)"
        )
        parts = {f"{v:.3f}" for v in (found.probe_stderr, found.dequantization_stderr, found.data_stderr, found.stderr)}
        assert len(parts) == 4  # else a mistaken place would not show

    def test_images_that_failed_are_left_out_of_everything(self):
        estimates = self.random(40, 2, 2, 0.6, 0.5, 0.4)
        good = self.result(estimates)
        bad = torch.cat([estimates, torch.full((2, 2, 2), math.nan, dtype=torch.float64)])
        status = torch.tensor([0] * 40 + [int(Status.NONFINITE), int(Status.MAX_STEPS)])
        found = self.result(bad, status=status, failed_at=torch.tensor([math.nan] * 40 + [0.3, 0.5]))
        for name in ("mean", "stderr", "probe_stderr", "dequantization_stderr", "data_stderr"):
            assert getattr(found, name) == pytest.approx(getattr(good, name), rel=1e-12), name
        assert found.budget.solver == pytest.approx(good.budget.solver, rel=1e-12)
        assert "40 images;" in str(found)
        assert "1 images failed at t = 0.3" in str(found) and "1 images failed at t = 0.5" in str(found)

    def test_a_large_solver_error_is_said(self):
        found = self.result(self.random(40, 2, 2, 0.1, 0.1, 0.1), solver_error=torch.full((40,), 0.2))
        assert "take more steps" in str(found)


def test_by_default_a_fixed_grid_gets_a_fresh_probe_at_every_node():
    sde = SDES["vp"]
    _, score, x, _, _ = setting(sde, "gaussian", 8, n=4)
    value = lambda **options: (
        log_likelihood(
            sde, score, x, divergence=Hutchinson(**options), method=Method(Adams(steps=12)), generator=SampleStreams(0)
        ).log_prob
    )
    assert torch.equal(value(), value(fresh=True)) and not torch.equal(value(), value(fresh=False))


def test_fresh_probes_do_not_pass_for_a_solver_error():
    """Their noise would drown it: unknown, where the exact trace and a fixed probe have a number."""
    sde = SDES["vp"]
    _, score, x, _, _ = setting(sde, "gaussian", 8, n=4)
    error = lambda divergence: (
        log_likelihood(sde, score, x, divergence=divergence, method=Method(Adams(steps=64))).solver_error
    )
    assert bool(error(Hutchinson()).isnan().all())
    assert bool((error(Hutchinson(fresh=False)) > 0).all() & (error(Exact()) > 0).all())


@each_sde
def test_the_stated_error_of_an_outlier_covers_its_error(sde):
    """Far out the prior is steep, and what counts is the state's error, not the trace's."""
    law = Gaussian(torch.zeros(2), torch.tensor([[0.5, 0.3], [0.3, 0.4]]))
    x = torch.tensor([[25.0, 25.0], [0.3, -0.2]], dtype=torch.float64)
    prior = lambda z: law.log_prob(sde, z, sde.T)
    for tolerance in (1e-5, 1e-7):
        found = log_likelihood(
            sde, law.score(sde), x, divergence=Exact(), prior=prior, method=accurate(tolerance=tolerance)
        )
        error = (found.log_prob - law.log_prob(sde, x, sde.t_min)).abs()
        assert bool((found.solver_error > error).all()), (tolerance, error, found.solver_error)
        assert float(found.solver_error[1]) < 2e3 * tolerance


@each_sde
@pytest.mark.parametrize("D", [2, 64])
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_fast_and_accurate_meet_the_closed_form(sde, name, D):
    """1e-3 and 1e-5 bits/dim with the exact trace; the grid's pilot ran on other samples."""
    law, score, x, prior, expected = setting(sde, name, D, n=8)
    pilot = law.marginal_sample(sde, 8, sde.t_min, generator=torch.Generator().manual_seed(7))
    for method, tolerance in (
        (fast(sde, score, pilot, steps=96), 1e-3),
        (accurate(tolerance=1e-7), 1e-5),
    ):
        found = log_likelihood(sde, score, x, divergence=MANY_AT_ONCE, prior=prior, method=method)
        assert bool(found.converged.all())
        assert float((found.log_prob - expected).abs().max()) / (D * math.log(2)) < tolerance


@each_sde
def test_the_known_factor_of_the_flow_is_integrated_exactly(sde):
    """A network that adds a constant c to the Gaussian guess: w moves by c times the change of arctan(kappa/s), in eight steps
    as in any number, by way of the likelihood and of encode."""
    s, c = 0.6, torch.tensor([0.3, -1.2], dtype=torch.float64)

    def score(x, t):
        alpha, sigma = sde.alpha(t).unsqueeze(1), sde.sigma(t).unsqueeze(1)
        kappa = sigma / alpha
        r = torch.hypot(torch.tensor(s, dtype=torch.float64), kappa)
        return -(kappa * x / (alpha * r) + s * c) / (r * sigma)

    flow, x = WhitenedFlow(data_std=s), torch.tensor([[0.5, -0.4]], dtype=torch.float64)
    angle = lambda t: torch.atan(sde.sigma(t) / sde.alpha(t) / s)
    moved = x / flow.scale(sde, sde.t_min) + c * (angle(sde.T) - angle(sde.t_min))
    expected = moved * flow.scale(sde, sde.T)
    options = dict(method=Method(Adams(steps=8, points=5, start="rising"), flow=flow))
    assert torch.allclose(encode(sde, score, x, **options).x, expected, rtol=1e-6)
    found = log_likelihood(sde, score, x, divergence=Exact(), **options)
    assert torch.allclose(found.latent, expected, rtol=1e-6)


def test_a_tolerance_that_cannot_be_met_ends_with_a_status():
    """A score that is rough at 1e-6 cannot be followed to 1e-13; one that is impossible in float64 is refused."""
    sde = SDES["vp"]
    _, score, x, _, _ = setting(sde, "gaussian", 3, n=2)
    rough = CountedScore(lambda x, t: score(x.float(), t).to(x.dtype))
    found = log_likelihood(sde, rough, x, divergence=Exact(), method=accurate(tolerance=1e-13, max_steps=200))
    assert not bool(found.converged.any()) and bool(found.log_prob.isnan().all())
    assert set(found.status.tolist()) <= {int(Status.MAX_STEPS), int(Status.UNDERFLOW)}
    assert rough.nfe < 1300
    with pytest.raises(ValueError, match="float64 has no more digits"):
        accurate(tolerance=1e-17)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hutchinson(probes=0), "probes=0"),
        (lambda: Hutchinson(noise="cauchy"), "rademacher"),
        (lambda: Coloured(spacing=0), "spacing=0"),
        (lambda: log_likelihood(VPSDE(), lambda x, t: -x, torch.zeros(2)), r"expected a floating batch"),
        (lambda: log_likelihood(VPSDE(), lambda x, t: -x, torch.zeros(2, 2), method=Method(t_min=0.0)), "t_min=0.0"),
        (lambda: log_likelihood(VPSDE(), lambda x, t: -x, torch.tensor([[math.nan, 0.0]])), "not finite"),
        (
            lambda: log_likelihood(VPSDE(), lambda x, t: -x, torch.zeros(2, 2), divergence=Hutchinson(fresh=True)),
            "fresh probes with an adaptive solver",
        ),
        (
            lambda: log_likelihood(VPSDE(), lambda x, t: -x, torch.zeros(2, 2), divergence=Coloured()),
            "expected images",
        ),
        (lambda: log_likelihood(VPSDE(), lambda x, t: -x, torch.zeros(2, 2), method="fast"), "expected a Method"),
        (lambda: log_likelihood(VPSDE(), lambda x, t: -x[:, :1], torch.zeros(2, 2)), r"score of shape \(2, 1\)"),
        (lambda: log_likelihood(VPSDE(), lambda x, t: -x.detach(), torch.zeros(2, 2)), "autograd cannot follow"),
        (
            lambda: log_likelihood(VPSDE(), lambda x, t: -x, torch.zeros(3, 2), prior=lambda z: torch.zeros(3, 1)),
            r"from prior \(3, 1\) .*expected a log-density for each sample, \(3,\)",
        ),
        (lambda: log_likelihood(VPSDE(), lambda x, t: -x, torch.zeros(3, 2), prior=lambda z: 0.0), "from prior 0.0"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
