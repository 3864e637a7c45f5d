"""What scores made from scores, surveys and chains must not get wrong in silence: each input was seen to go wrong before."""

from __future__ import annotations

import math

import pytest
import torch

from data.transforms import Rescale, Standardize
from guidance import TMPD, MomentMatching, PiGDM, classifier_free, classifier_guidance, posterior
from likelihood import (
    AnnealedImportance,
    Exact,
    GeometricPath,
    attribute_direction,
    bits_per_dim,
    log_likelihood,
    survey,
)
from likelihood.steps import fast_on
from models import MLP, ScoreModel
from numerics import Hamiltonian, SampleStreams, UserError, run_chain
from samplers import DDIM, Ancestral, LogSNR, PredictorCorrector, TwistedSMC, sdedit
from sde_lib import VESDE, VPSDE, Mask, Measurement
from sde_lib.analytic import EmpiricalDistribution, Gaussian, GaussianMixture

SDE = VPSDE()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_posterior_compares_its_measurement_in_the_states_own_digits(dtype):
    law = Gaussian(torch.zeros(4), torch.ones(4))
    seen = Measurement(Mask(torch.tensor([True, True, False, False])), torch.tensor([[0.5019, 0.5019, 0.0, 0.0]]), 1e-2)
    sampler = PredictorCorrector(predictor=Ancestral(), corrector=None, grid=LogSNR(t_end=1e-5), steps=60)
    found = [
        sampler(
            SDE, posterior(SDE, law.score(SDE), seen, method=PiGDM()), (200, 4), dtype=d, generator=SampleStreams(0)
        ).x
        for d in (torch.float32, dtype)
    ]
    assert found[1].dtype == torch.float32
    assert float((found[0] - found[1])[:, :2].abs().max()) < 2e-3  # a fifth of the noise
    for method in (MomentMatching(), TMPD()):
        with pytest.raises(UserError, match=f"got dtype={dtype} for {type(method).__name__}"):
            sampler(SDE, posterior(SDE, law.score(SDE), seen, method=method), (2, 4), dtype=dtype)


class TwoConstants:
    """Images of one grey each: 0.5 of the class, 0.1 of any."""

    sde = SDE

    def condition(self, labels):
        value = 0.1 if labels is None else 0.5
        return EmpiricalDistribution(torch.full((1, 16), value)).score(SDE)


@pytest.mark.parametrize("t", [0.9, 0.5, 0.05, 1e-3])
def test_images_of_equal_pixels_are_not_rescaled(t):
    x = SDE.perturb(torch.full((3, 16), 0.5), t, torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))
    guided = classifier_free(TwoConstants(), 0, 3.0, rescale=0.7).denoised(x, torch.tensor(t))
    assert torch.allclose(guided, torch.full_like(guided, 1.3), atol=0.02 / (1 - t) ** 2)


def test_a_twisted_sampler_ends_in_the_posteriors_mean():
    seen = Measurement(Mask(torch.tensor([True, False])), torch.tensor([[0.5, 0.0]]), 1e-3)
    law = Gaussian(torch.zeros(2), torch.eye(2))
    x = TwistedSMC(measurement=seen, particles=4, steps=200)(
        SDE, law.score(SDE), (100, 2), generator=SampleStreams(0)
    ).x
    assert float((x[:, 0] - 0.5).abs().max()) < 4e-3  # four of the noise's deviations; 0.03 before
    assert float(x[:, 1].std()) == pytest.approx(1.0, abs=0.25)


def test_directions_that_depend_on_each_other_take_away_their_span_alone():
    latents = torch.tensor([[1.0, 2.0, 0.5, 3.0, 1.0], [0.0, 1.0, 2.0, 1.0, -1.0]])
    has, a = torch.tensor([True, False]), torch.tensor([1.0, 2.0, 0.0, 3.0, 1.0])
    alone = attribute_direction(latents, has, orthogonal_to=[a])
    for others in ([a, 2 * a], [a, torch.zeros(5)], [a, a, -a]):
        assert torch.allclose(attribute_direction(latents, has, orthogonal_to=others), alone, atol=1e-6)
    assert torch.equal(
        attribute_direction(latents, has, orthogonal_to=[torch.zeros(5)]), attribute_direction(latents, has)
    )
    with pytest.raises(UserError, match="not finite"):
        attribute_direction(latents * torch.nan, has)


def test_annealed_importance_keeps_its_chains_in_float32():
    law = Gaussian(torch.zeros(16), 0.25 * torch.ones(16))
    path = GeometricPath(target=lambda x: -2 * x.square().flatten(1).sum(dim=1), shape=(16,))
    sampler = AnnealedImportance(levels=50)
    low = sampler.forward(path, 64, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    same = sampler.forward(path, 64, generator=torch.Generator().manual_seed(0))
    assert abs(low.bound - same.bound) < 1e-4
    truth = 8 * math.log(2 * math.pi * 0.25)
    assert truth - 2 < same.bound < truth + 4 * same.stderr
    x = law.sample(64, generator=torch.Generator().manual_seed(1))
    assert sampler.backward(path, x.to(torch.bfloat16)).log_w.isfinite().all()


class TestInferenceMode:
    def test_labels_made_in_it(self):
        model = ScoreModel(MLP(2, num_classes=3, width=8, depth=1), SDE).eval()
        law = Gaussian(torch.zeros(2), torch.eye(2))

        def classifier(x, t):
            return (x @ torch.tensor([[1.0, -1.0], [0.5, 0.0]])) * (2 - t.unsqueeze(1).to(x.dtype))

        x = torch.zeros(3, 2)
        with torch.inference_mode():
            inside = [
                DDIM(steps=5)(SDE, classifier_guidance(SDE, law.score(SDE), classifier, 1, 1.5), (3, 2), x_T=x + 1).x,
                log_likelihood(
                    SDE, model.condition([0, 1, 2]), x, method=fast_on(None, steps=8), divergence=Exact()
                ).log_prob,
                log_likelihood(
                    SDE,
                    Gaussian(torch.zeros(2), torch.eye(2)).score(SDE),
                    x,
                    method=fast_on(None, steps=8),
                    divergence=Exact(),
                ).log_prob,
            ]
        outside = [
            DDIM(steps=5)(SDE, classifier_guidance(SDE, law.score(SDE), classifier, 1, 1.5), (3, 2), x_T=x + 1).x,
            log_likelihood(
                SDE, model.condition([0, 1, 2]), x, method=fast_on(None, steps=8), divergence=Exact()
            ).log_prob,
            log_likelihood(SDE, law.score(SDE), x, method=fast_on(None, steps=8), divergence=Exact()).log_prob,
        ]
        for a, b in zip(inside, outside, strict=True):
            assert torch.allclose(a, b, rtol=1e-6)

    def test_chains_run_in_it(self):
        def run():
            start = torch.ones(5, 3)
            kernel = Hamiltonian(step=0.3)
            return run_chain(
                kernel, lambda x: -x.square().sum(dim=1) / 2, start, 20, generator=SampleStreams(0, torch.arange(5))
            ).x

        with torch.inference_mode():
            inside = run()
        assert torch.equal(inside, run())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_type(dtype):
    model = ScoreModel(MLP(2, num_classes=3, width=8, depth=1), SDE).eval()
    x, t = torch.ones(2, 2), torch.tensor(0.5)
    assert torch.equal(model.condition(torch.tensor([0, 2], dtype=dtype))(x, t), model.condition([0, 2])(x, t))


def test_sixteen_bits_in_their_own_type():
    images = torch.randint(0, 65_536, (3, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    law = Gaussian(torch.zeros(1, 2, 2), 0.3 * torch.ones(4))
    wide, own = (
        bits_per_dim(
            SDE, law.score(SDE), x, Rescale(levels=65_536), method=fast_on(None, steps=16), divergence=Exact(), companions=0,
            generator=SampleStreams(0, torch.arange(3)),
        ).per_image
        for x in (images.to(torch.int32), images.to(torch.uint16))
    )  # fmt: skip
    assert torch.equal(wide, own)


def test_an_edit_of_half_precision_is_noised_in_float32():
    sde, law = VESDE(sigma_max=1e5), Gaussian(torch.zeros(2), torch.eye(2))
    made = sdedit(DDIM(steps=40), sde, law.score(sde), torch.ones(4, 2, dtype=torch.float16), t_start=1.0)
    assert made.x.isfinite().all() and made.x.dtype == torch.float32


def test_an_edit_of_what_is_no_number_names_its_cause():
    x = torch.ones(4, 2)
    x[1, 0] = math.nan
    with pytest.raises(UserError, match="got x with values that are not finite"):
        sdedit(DDIM(steps=4), SDE, Gaussian(torch.zeros(2), torch.eye(2)).score(SDE), x, t_start=0.5)


class TestSurvey:
    def test_the_solvers_bias_is_stated(self):
        means = 0.6 * torch.stack([torch.ones(1, 4, 4), -torch.ones(1, 4, 4)])
        law = GaussianMixture(means=means, stds=torch.full((2,), 0.02), weights=torch.ones(2) / 2)
        x = law.sample(120, generator=torch.Generator().manual_seed(0)).float()
        truth = -law.log_prob(SDE, x, SDE.t_min).double().mean() / (16 * math.log(2))
        for steps in (6, 12, 96):
            found = survey(
                SDE, law.score(SDE), x, Standardize(), method=fast_on(None, steps=steps, data_std=0.6), precision=0.5,
                divergence=Exact(),
            )  # fmt: skip
            assert abs(found.mean - float(truth)) <= 2 * found.solver + 4 * found.stderr + 1e-3
            if steps == 6:
                assert found.solver > 0.1 and "solver" in str(found) and found.asdict()["solver_error"] == found.solver

    def test_constant_images_have_a_mean(self):
        images = torch.full((80, 1, 4, 4), 7, dtype=torch.uint8)
        law = Gaussian(torch.zeros(1, 4, 4), 0.3 * torch.ones(16))
        found = survey(
            SDE, law.score(SDE), images, Rescale(levels=17), method=fast_on(None, steps=24), divergence=Exact()
        )
        full = bits_per_dim(
            SDE,
            law.score(SDE),
            images,
            Rescale(levels=17),
            method=fast_on(None, steps=24),
            divergence=Exact(),
            companions=0,
        )
        assert abs(found.mean - full.mean) < 5 * math.hypot(found.stderr, full.stderr) + 1e-3
