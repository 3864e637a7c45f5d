"""Right, or refused: autograd modes, low precision, the corners of what is legal, and priors that do not hide the data."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracles import SDES

import samplers
from data.transforms import Rescale, Standardize
from likelihood import (
    Exact,
    Method,
    accurate,
    bits_per_dim,
    companion_error,
    decode,
    elbo,
    encode,
    fast,
    log_likelihood,
)
from likelihood.draw_places import COMPANIONS
from likelihood.methods import fast_on
from models import MLP, NCSNpp, ScoreModel
from models.conditioning import DiscreteIndex
from numerics import Adams, SampleStreams, UserError, expand_as
from samplers import EulerMaruyama, PredictorCorrector
from sde_lib import (
    SDE,
    VESDE,
    VPSDE,
    KernelSDE,
    SubVPSDE,
    TableVESDE,
    TableVPSDE,
    cosine_betas,
    geometric_sigmas,
    linear_betas,
    prior_mismatch,
)
from sde_lib.analytic import Gaussian, GaussianMixture

COSINE = KernelSDE(alpha_fn=lambda t: torch.cos(1.57 * t), sigma_fn=lambda t: torch.sin(1.57 * t))
FROM_LESS = {
    "linear betas": TableVPSDE(betas=linear_betas()),
    "cosine betas": TableVPSDE(betas=cosine_betas()),
    "sigmas": TableVESDE(sigmas=geometric_sigmas(largest=50.0, smallest=0.01, levels=200)),
    "few sigmas": TableVESDE(sigmas=(0.01, 0.5, 10.0)),
    "kernel": COSINE,
}
each_from_less = pytest.mark.parametrize("sde", FROM_LESS.values(), ids=FROM_LESS.keys())
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
NARROW = Gaussian(torch.full((8,), 0.5), torch.full((8,), 0.01))


class TestModes:
    @each_from_less
    def test_coefficients_are_the_same_in_every_mode(self, sde):
        t = torch.linspace(0, sde.T, 11, dtype=torch.float64)
        outside = (sde.f(t), sde.g(t), sde.log_snr(t))
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                for a, b in zip(outside, (sde.f(t.clone()), sde.g(t.clone()), sde.log_snr(t.clone()))):
                    assert torch.equal(a, b)
        assert bool(outside[0].isfinite().all() & outside[1].isfinite().all())
        assert bool((outside[1][1:] > 0).all())

    def test_the_limit_at_0_is_finite(self):
        assert float(FROM_LESS["linear betas"].g(0.0)) == pytest.approx(0.3, abs=1e-3)

    def test_samples_under_inference_mode_are_those_of_no_grad(self):
        sde = FROM_LESS["linear betas"]

        def drawn():
            sampler = PredictorCorrector(predictor=EulerMaruyama(), steps=200)
            return sampler(sde, NARROW.score(sde), (500, 8), generator=torch.Generator().manual_seed(0)).x

        with torch.inference_mode():
            x = drawn()
        assert torch.equal(x, drawn())
        # pure noise, of standard deviation 1, where f and g were read as 0
        assert float(x.std()) == pytest.approx(0.1, abs=0.02)

    @each_sde
    def test_densities_latents_and_bounds(self, sde):
        model = ScoreModel(MLP(dim=8, width=8, depth=1), sde).eval()
        torch.nn.init.normal_(model.net.output.weight, std=0.1)

        def numbers():
            x = NARROW.sample(4, generator=torch.Generator().manual_seed(0)).float()
            return (
                log_likelihood(sde, model, x, divergence=Exact()).log_prob,
                encode(sde, model, x).x,
                decode(sde, model, x).x,
                elbo(sde, model, x, draws=8, generator=SampleStreams(0)).nats,
            )

        outside = [v.detach() for v in numbers()]
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                inside = numbers()
            for a, b in zip(outside, inside):
                assert torch.equal(a, b)
        with torch.autocast("cpu", torch.bfloat16):
            inside = numbers()
        for a, b in zip(outside, inside):
            assert torch.equal(a, b)

    def test_a_graph_cannot_be_kept_there(self):
        with torch.inference_mode(), pytest.raises(UserError, match="inference_mode"):
            log_likelihood(VPSDE(), NARROW.score(VPSDE()), torch.zeros(1, 8), create_graph=True)

    @pytest.mark.parametrize("of", ["alpha", "sigma"])
    def test_a_function_that_autograd_cannot_follow_is_refused(self, of):
        table = torch.linspace(0, 1, 1001, dtype=torch.float64)

        def looked_up(function):
            return lambda t: function(table)[(t.detach() * 1000).round().long().clamp(0, 1000)]

        functions = {"alpha": lambda t: torch.cos(1.5 * t), "sigma": lambda t: torch.sin(1.5 * t)}
        functions[of] = looked_up(functions[of])
        sde = KernelSDE(alpha_fn=functions["alpha"], sigma_fn=functions["sigma"], t_min=1e-3)
        for ask in (sde.f, sde.g):
            with pytest.raises(UserError, match="derivative by autograd"):
                ask(0.5)

    def test_a_constant_is_followed(self):
        sde = KernelSDE(alpha_fn=torch.ones_like, sigma_fn=lambda t: 0.01 * 5000**t, t_end=1e-5)
        t = torch.linspace(0, 1, 5, dtype=torch.float64)
        torch.testing.assert_close(sde.g(t), VESDE().g(t), rtol=1e-6, atol=0)
        assert torch.equal(sde.f(t), torch.zeros_like(t))


class TestPrecision:
    @each_sde
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_samples_the_law_that_float32_does(self, sde, dtype):
        law = NARROW
        found = PredictorCorrector(steps=300)(
            sde, law.score(sde), (500, 8), dtype=dtype, generator=torch.Generator().manual_seed(0)
        )
        assert found.x.dtype == torch.float32
        assert float(found.x.mean()) == pytest.approx(0.5, abs=0.01)
        # in bfloat16 throughout: 0.158 under VE
        assert float(found.x.std()) == pytest.approx(0.1, abs=0.01)

    def test_the_score_is_given_what_was_asked_for(self):
        seen = []

        def score(x, t):
            seen.append(x.dtype)
            return -x

        start = torch.zeros(3, 2, dtype=torch.float64)
        found = samplers.DDIM(steps=2)(VPSDE(), score, (3, 2), dtype=torch.bfloat16, x_T=start)
        assert set(seen) == {torch.bfloat16} and found.x.dtype == torch.float64

    @pytest.mark.parametrize("embedding", ["smooth", "positional", "fourier"])
    def test_a_network_in_bfloat16_is_told_the_same_times(self, embedding):
        torch.manual_seed(0)
        net = NCSNpp(
            image_size=8,
            in_channels=1,
            channels=8,
            multipliers=(1,),
            blocks=1,
            attention_resolutions=(),
            embedding=embedding,
        )
        label = torch.tensor([514.0, 0.37])
        whole = net.embedding.features(label)
        half = net.to(torch.bfloat16).embedding.features(label)
        torch.testing.assert_close(half.float(), whole, atol=1e-6, rtol=0)

    def test_labels_are_not_rounded(self):
        seen = []

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

            def forward(self, x, label):
                seen.append(label)
                return x * self.weight

        model = ScoreModel(Net(), VPSDE(), conditioning=DiscreteIndex(levels=1000))
        model(torch.zeros(1, 2), torch.tensor([0.515]))
        assert float(seen[0]) == 514.0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
    def test_bits_per_dim_refuse_less_than_float32(self, dtype):
        grey = torch.full((2, 8), 200, dtype=torch.uint8)
        with pytest.raises(UserError, match=f"dtype={dtype}"):
            bits_per_dim(VPSDE(), NARROW.score(VPSDE()), grey, Rescale(levels=256), dtype=dtype)

    def test_densities_refuse_less_than_float32(self):
        sde = VPSDE()
        with pytest.raises(UserError, match="bfloat16"):
            log_likelihood(sde, NARROW.score(sde), torch.zeros(2, 8, dtype=torch.bfloat16))
        model = ScoreModel(MLP(dim=8, width=8, depth=1), sde).eval().to(torch.bfloat16)
        with pytest.raises(UserError, match="weights are torch.bfloat16"):
            log_likelihood(sde, model, torch.zeros(2, 8))
        with pytest.raises(UserError, match="weights are torch.bfloat16"):
            log_likelihood(sde, model.condition(None), torch.zeros(2, 8))

    @each_sde
    def test_a_bound_of_bfloat16_data_is_computed_in_float32(self, sde):
        x = NARROW.sample(20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        coarse, fine = (
            elbo(sde, NARROW.score(sde), v, draws=64, t_min=1e-2, generator=SampleStreams(0)) for v in (x, x.float())
        )
        assert float((coarse.nats - fine.nats).abs().max()) < 4 * float(fine.stderr.max())


CORNERS: dict[str, SDE] = {
    "vp t_end=0": VPSDE(t_end=0.0),
    "vp beta_max=2000": VPSDE(beta_max=2000.0),
    "vp beta_min=0": VPSDE(beta_min=0.0),
    "vp beta_max=1": VPSDE(beta_max=1.0),
    "vp T=1000": VPSDE(T=1000.0),
    "sub_vp t_end=0": SubVPSDE(t_end=0.0),
    "sub_vp beta_max=2000": SubVPSDE(beta_max=2000.0),
    "sub_vp beta_min=0": SubVPSDE(beta_min=0.0),
    "sub_vp T=1000": SubVPSDE(T=1000.0),
    "ve t_end=0": VESDE(t_end=0.0),
    "ve sigma_max=1e4": VESDE(sigma_max=1e4),
    "ve T=1000": VESDE(T=1000.0),
    "table t_end=0": TableVPSDE(betas=linear_betas(), t_end=0.0),
    "kernel t_end=0": KernelSDE(alpha_fn=COSINE.alpha_fn, sigma_fn=COSINE.sigma_fn, t_end=0.0),
}
each_corner = pytest.mark.parametrize("sde", CORNERS.values(), ids=CORNERS.keys())


class TestCorners:
    @each_corner
    def test_coefficients_are_finite(self, sde):
        t = torch.linspace(0, sde.T, 101, dtype=torch.float64)
        for values in (sde.alpha(t), sde.sigma(t), sde.f(t), sde.g(t), sde.log_snr(t[1:])):
            assert bool(values.isfinite().all())
        assert bool((sde.log_snr(t).diff() < 0).all())

    @pytest.mark.parametrize(
        "sde", [*CORNERS.values(), *FROM_LESS.values(), *SDES.values()], ids=[*CORNERS, *FROM_LESS, *SDES]
    )
    def test_times_come_back_from_their_log_snr(self, sde):
        t = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sde.T
        torch.testing.assert_close(sde.time_of_log_snr(sde.log_snr(t)), t, rtol=1e-9, atol=1e-12 * sde.T)
        assert float(sde.time_of_log_snr(1e4)) == 0
        assert float(sde.time_of_log_snr(-1e6)) == sde.T

    @each_corner
    @pytest.mark.parametrize("name", [n for n in samplers.available() if n != "torchsde"])
    def test_samplers_are_right(self, sde, name):
        """From the exact marginal at T, within what the step's bias and the denoising can do to N(0.5, 0.1^2)."""
        law = Gaussian(torch.full((2,), 0.5), torch.full((2,), 0.01))
        made = samplers.create(name)
        if isinstance(getattr(made, "steps", None), int) and name != "ald":
            made = samplers.create(name, steps=100 if made.steps > 100 else 2 * made.steps)
        generator = torch.Generator().manual_seed(0)
        alpha, sigma = float(sde.alpha(sde.T)), float(sde.sigma(sde.T))
        start = alpha * law.sample(300, generator=generator) + sigma * torch.randn(300, 2, generator=generator)
        found = made(sde, law.score(sde), (300, 2), x_T=start.float(), generator=generator)
        assert float(found.x.mean()) == pytest.approx(0.5, abs=0.05)
        assert 0.03 < float(found.x.std()) < 0.25

    @pytest.mark.parametrize("name", [n for n in samplers.available() if n != "torchsde"])
    @each_sde
    def test_one_step_one_sample_one_dimension(self, sde, name):
        law = Gaussian(torch.tensor([0.5]), torch.tensor([0.01]))
        options = {} if samplers.create(name).evaluations is None or name == "ald" else {"steps": 1}
        found = samplers.create(name, **options)(
            sde, law.score(sde), (1, 1), generator=torch.Generator().manual_seed(0)
        )
        assert found.x.shape == (1, 1) and bool(found.x.isfinite().all())

    @each_corner
    def test_densities_are_right(self, sde):
        law = Gaussian(torch.full((2,), 0.5), torch.full((2,), 0.01))
        x = law.sample(5, generator=torch.Generator().manual_seed(0))
        t = sde.t_min
        found = log_likelihood(
            sde,
            law.score(sde),
            x,
            divergence=Exact(),
            method=accurate(tolerance=1e-7),
            prior=lambda z: law.log_prob(sde, z, sde.T),
        )
        torch.testing.assert_close(found.log_prob, law.log_prob(sde, x, t).double(), atol=1e-3, rtol=0)

    def test_constant_data(self):
        x = torch.full((6, 3), 0.25)
        law = Gaussian(torch.full((3,), 0.25), torch.full((3,), 1e-6))
        found = log_likelihood(VPSDE(), law.score(VPSDE()), x, divergence=Exact())
        assert bool(found.log_prob.isfinite().all())
        with pytest.raises(UserError, match="data_std"):
            fast(VPSDE(), law.score(VPSDE()), x)


class TestPriorMismatch:
    def test_it_is_stated_and_right(self):
        """Data of mean 300 and standard deviation 100 under VP: 3.4 bits/dim off, once in silence."""
        sde, law = VPSDE(), Gaussian(torch.full((4,), 300.0), torch.full((4,), 1e4))
        x = law.sample(400, generator=torch.Generator().manual_seed(0))
        found = log_likelihood(
            sde, law.score(sde), x, divergence=Exact(), method=accurate(tolerance=1e-5, data_std=100.0)
        )
        off = float((law.log_prob(sde, x, sde.t_min) - found.log_prob).mean()) / 4
        stated = float(found.prior_mismatch.mean()) / 4
        assert off > 1 and off < stated < 1.2 * off
        given = log_likelihood(
            sde, law.score(sde), x[:3], divergence=Exact(), prior=lambda z: law.log_prob(sde, z, sde.T)
        )
        assert bool(given.prior_mismatch.isnan().all())

    @pytest.mark.parametrize("sde", [VESDE(sigma_max=1.0), VPSDE(beta_max=1.0)], ids=["ve", "vp"])
    def test_sampling_and_scoring_say_so(self, sde):
        law = Gaussian(torch.full((2,), 2.0), torch.ones(2))
        with pytest.warns(UserWarning, match="the noise at T does not hide"):
            samplers.create("dpm_solver")(sde, law.score(sde), (200, 2), generator=torch.Generator().manual_seed(0))
        x = law.sample(20, generator=torch.Generator().manual_seed(0))
        scored = bits_per_dim(sde, law.score(sde), x, Standardize(), divergence=Exact())
        assert "does not hide these data" in str(scored) and scored.asdict()["prior_mismatch"] > 0.1

    def test_a_score_that_is_wrong_at_T_is_told_from_data_that_show(self):
        """Where alpha(T) is 5e-5 no data show; a clipped mean is in range, whatever the score says."""
        sde = TableVPSDE(betas=cosine_betas(steps=1000), t_min=1e-3, t_end=1e-3)

        def score(x, t):
            return -0.5 * x / expand_as(sde.sigma(t), x).square()

        def draw(**options):
            samplers.create("ddim", steps=3, **options)(sde, score, (50, 2), generator=torch.Generator().manual_seed(0))

        with pytest.warns(UserWarning, match=r"denoised mean at T, 1e\+04, the score has not learned"):
            draw()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(clip=True)

    @each_sde
    def test_usual_data_are_hidden(self, sde):
        law = Gaussian(torch.full((2,), 0.5), torch.ones(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            samplers.create("dpm_solver")(sde, law.score(sde), (200, 2), generator=torch.Generator().manual_seed(0))
        x = law.sample(20, generator=torch.Generator().manual_seed(0))
        scored = bits_per_dim(sde, law.score(sde), x, Standardize(), divergence=Exact())
        assert "hide" not in str(scored)
        assert float(prior_mismatch(sde, x).mean()) / 2 < 1e-3


class TestStatedErrors:
    def check(self, law, sde, steps, n):
        score = law.score(sde)
        generator = torch.Generator().manual_seed(3)
        x, pilot = law.sample(n, generator=generator), law.sample(16, generator=generator)
        grid = fast(sde, score, pilot, steps=steps)  # its grid alone counts
        from likelihood import Hutchinson

        def value(method):
            same_probe = SampleStreams(0, draw=COMPANIONS)
            return log_likelihood(
                sde, score, x, method=method, divergence=Hutchinson(fresh=False), generator=same_probe
            ).log_prob

        method = fast_on(grid.grid, steps=steps, data_std=grid.flow.data_std)
        true = (value(method) - value(accurate(tolerance=1e-7, data_std=grid.flow.data_std))).abs()
        stated = companion_error(sde, score, x, method=method, generator=SampleStreams(0))
        assert float((2 * stated >= true).double().mean()) >= 0.95
        assert 1 < float((stated / true).median()) < 5

    @each_sde
    @pytest.mark.parametrize("steps", [32, 48])
    def test_twice_the_stated_error_covers_the_true_one(self, sde, steps):
        generator = torch.Generator().manual_seed(3)
        law = GaussianMixture(
            means=torch.randn(6, 64, generator=generator), stds=torch.full((6,), 0.3), weights=torch.full((6,), 1 / 6)
        )
        self.check(law, sde, steps, 200)

    def test_it_is_twice_the_larger_of_two_differences(self):
        sde, x = VPSDE(), NARROW.sample(40, generator=torch.Generator().manual_seed(0))
        from likelihood import Hutchinson

        def value(steps):
            return log_likelihood(
                sde,
                NARROW.score(sde),
                x,
                method=Method(Adams(steps=steps, points=3)),
                divergence=Hutchinson(fresh=False),
                generator=SampleStreams(0, draw=COMPANIONS),
            ).log_prob

        first, second = ((value(12) - value(steps)).abs() for steps in (18, 36))
        method = Method(Adams(steps=12, points=3))
        stated = companion_error(sde, NARROW.score(sde), x, method=method, generator=SampleStreams(0))
        assert torch.allclose(stated, 2 * torch.maximum(first, second), rtol=1e-12)
        assert bool((first > second).any()) and bool((second > first).any())


def test_whole_numbers_among_the_parameters_are_no_coarse_weights():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = torch.nn.Parameter(torch.tensor([1]), requires_grad=False)

        def forward(self, x, t):
            return -x

    found = log_likelihood(VPSDE(), Counting(), torch.zeros(2, 3), method=Method(Adams(steps=4)))
    assert bool(found.converged.all())
