"""Guidance against laws whose guided scores and guided densities are known."""

import math

import pytest
import torch
from oracles import SDES

import guidance
import samplers
from guidance import ClassifierFree, classifier_free, classifier_guidance
from likelihood import Exact, Method, log_likelihood
from models import MLP, NoiseClassifier, ScoreModel, UnderAnotherSDE
from numerics import Dopri5, SampleStreams, UserError, expand_as, take
from samplers import DDIM, AdaptiveSDE, DPMSolver, PredictorCorrector, ProbabilityFlow
from sde_lib import VESDE, VPSDE, CountedScore, SubVPSDE
from sde_lib.analytic import GaussianMixture

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


class Normal:
    """The score of N(m_i, v_i I) for sample i (or one for all), counting its calls."""

    def __init__(self, sde, mean, variance, calls=None):
        self.sde, self.mean, self.variance = sde, mean, variance
        self.calls = [] if calls is None else calls

    def __call__(self, x, t):
        self.calls.append(len(x))
        a, s = (expand_as(c, x) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        v = self.variance.to(x.dtype)
        return (a * self.mean.to(x.dtype) - x) / (a**2 * v + s**2)

    def take(self, index):
        cut = (c[index] if c.shape[0] > 1 else c for c in (self.mean, self.variance))
        return Normal(self.sde, *cut, self.calls)


class Classes:
    """Gaussian classes, and a Gaussian (not their mixture) where no class is given: all guided scores are known."""

    def __init__(self, sde, variances=(0.25, 0.25, 0.25), variance=0.25, spread=1.0):
        self.sde, self.num_classes = sde, 3
        self.means = spread * torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        self.variances = torch.tensor(variances, dtype=torch.float64).unsqueeze(1)
        self.mean = spread * torch.tensor([[0.3, -0.2]], dtype=torch.float64)
        self.variance = torch.tensor([[variance]], dtype=torch.float64)
        self.with_class, self.without = [], []

    def condition(self, labels):
        if labels is None:
            return Normal(self.sde, self.mean, self.variance, self.without)
        labels = torch.as_tensor(labels).reshape(-1)
        return Normal(self.sde, self.means[labels], self.variances[labels], self.with_class)

    def guided_mean(self, labels, scale):
        return self.mean + scale * (self.means[labels] - self.mean)


def points(sde, B, t=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 2, generator=generator, dtype=torch.float64)
    t = sde.t_min + (sde.T - sde.t_min) * torch.rand(B, generator=generator, dtype=torch.float64) if t is None else t
    return x, t


LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


class TestClassifierFree:
    @each_sde
    def test_is_the_way_from_one_score_to_the_other_and_its_ends_cost_one_evaluation(self, sde):
        model = Classes(sde, variances=(0.1, 0.3, 0.6), variance=0.9)
        x, t = points(sde, 6)
        s_0, s_c = model.condition(None)(x, t), model.condition(LABELS)(x, t)
        for scale, value, evaluations in ((0, s_0, (0, 1)), (1, s_c, (1, 0)), (2.5, 2.5 * s_c - 1.5 * s_0, (1, 1))):
            model.with_class.clear(), model.without.clear()
            found = classifier_free(model, LABELS, scale)(x, t)
            assert (len(model.with_class), len(model.without)) == evaluations
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
        one = classifier_free(model, 1, 3.0)(x, t)
        torch.testing.assert_close(one, 3 * model.condition(1)(x, t) - 2 * s_0, rtol=1e-12, atol=1e-12)

    @each_sde
    def test_outside_the_interval_a_sample_is_only_given_its_class(self, sde):
        model = Classes(sde)
        low, high = (float(sde.log_snr(t)) for t in (0.7 * sde.T, 0.3 * sde.T))
        x, t = points(sde, 6)
        inside = (t >= 0.3 * sde.T) & (t <= 0.7 * sde.T)
        assert 0 < int(inside.sum()) < 6
        guided = classifier_free(model, LABELS, 4.0, interval=(low, high))
        s_0, s_c = model.condition(None)(x, t), model.condition(LABELS)(x, t)
        expected = torch.where(inside.unsqueeze(1), s_0 + 4 * (s_c - s_0), s_c)
        model.with_class.clear(), model.without.clear()
        torch.testing.assert_close(guided(x, t), expected, rtol=1e-10, atol=1e-12)
        assert sum(model.with_class) == 6 and sum(model.without) == int(inside.sum())  # by samples, as they need it
        model.with_class.clear(), model.without.clear()
        far = torch.tensor(0.9 * sde.T, dtype=torch.float64)
        torch.testing.assert_close(guided(x, far), model.condition(LABELS)(x, far.expand(6)))
        assert not model.without
        none = classifier_free(model, LABELS, 0.0, interval=(low, high))  # the scale holds within, at 0 too
        torch.testing.assert_close(none(x, t), torch.where(inside.unsqueeze(1), s_0, s_c), rtol=1e-10, atol=1e-12)

    @each_sde
    def test_rescaling_brings_the_denoised_spread_to_that_of_the_class(self, sde):
        model = Classes(sde, variances=(0.1, 0.3, 0.6), variance=0.9)
        x, t = points(sde, 6)

        def spread(score):
            return guidance.ClassifierFree(sde, score, score, 1.0).denoised(x, t).std(dim=1)

        plain, conditional = (classifier_free(model, LABELS, w) for w in (3.0, 1.0))
        for rescale in (1.0, 0.4):
            found = spread(classifier_free(model, LABELS, 3.0, rescale=rescale))
            # what guidance made smaller stays
            wanted = rescale * torch.minimum(spread(conditional), spread(plain)) + (1 - rescale) * spread(plain)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
        assert bool((spread(conditional) < spread(plain)).any())
        # without guidance there is nothing to take back, at one evaluation
        for scale, score, calls in ((0.0, model.condition(None), (0, 1)), (1.0, model.condition(LABELS), (1, 0))):
            model.with_class.clear(), model.without.clear()
            found = classifier_free(model, LABELS, scale, rescale=1.0)(x, t)
            assert (len(model.with_class), len(model.without)) == calls
            torch.testing.assert_close(found, score(x, t), rtol=1e-12, atol=1e-12)

    @each_sde
    @pytest.mark.parametrize("sampler", [DDIM(steps=60), DPMSolver(order=2, stochastic=True, steps=60)], ids=repr)
    def test_rescaled_points_stay_where_the_data_are(self, sde, sampler):
        """A denoised point of two nearly equal numbers has next to no deviation: its ratio threw points to 1,159."""
        model = Classes(sde, variances=(0.3, 0.3, 0.3), variance=0.9)
        labels = torch.arange(3000) % 3
        drawn = [
            sampler(
                sde,
                classifier_free(model, labels, 2.0, rescale=rescale),
                (3000, 2),
                generator=torch.Generator().manual_seed(0),
                dtype=torch.float64,
            ).x.abs()
            for rescale in (0.0, 1.0)
        ]
        assert float(drawn[1].max()) < 1.5 * float(drawn[0].max())

    def test_an_empty_batch_stays_empty(self):
        sde = VPSDE()
        for options in ({"rescale": 0.5}, {}):
            guided = classifier_free(Classes(sde), LABELS[:0], 2.0, **options)
            assert guided(torch.zeros(0, 2), torch.zeros(0)).shape == (0, 2)

    @pytest.mark.parametrize("options", [{}, {"interval": (-2.0, 2.0)}, {"rescale": 0.5}], ids=str)
    def test_samples_are_taken_along_with_their_labels(self, options):
        sde = VPSDE()
        x, t = points(sde, 6)
        guided = classifier_free(Classes(sde), LABELS, 2.0, **options)
        index = torch.tensor([4, 1, 1, 3])
        torch.testing.assert_close(guided.take(index)(x[index], t[index]), guided(x, t)[index])

    @each_sde
    def test_the_guided_flow_has_the_density_that_it_is_said_to_have(self, sde):
        """With one centre and two variances the guided flow is linear: in kappa, y is multiplied by
        (v_0 + kappa^2)^((1 - w)/2) (v_c + kappa^2)^(w/2), so the law at t_min is a Gaussian; with one variance it is that
        of a shifted Gaussian."""
        w, D = 2.5, 2
        model = Classes(sde, variances=(0.1, 0.3, 0.6), variance=0.9, spread=0.0)
        alpha, sigma = sde.alpha(torch.tensor([sde.t_min, sde.T])), sde.sigma(torch.tensor([sde.t_min, sde.T]))
        kappa2 = (sigma / alpha).square()
        v_0, v_c = model.variance[0, 0], model.variances[LABELS, 0]
        growth = ((v_0 + kappa2).log() * (1 - w) / 2).unsqueeze(1) + (v_c + kappa2.unsqueeze(1)).log() * w / 2
        std = float(sde.prior_std) * alpha[0] / alpha[1] * (growth[0] - growth[1]).exp()
        x = std.unsqueeze(1) * torch.randn(6, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        exact = -0.5 * (x / std.unsqueeze(1)).square().sum(1) - D * (std.log() + 0.5 * math.log(2 * math.pi))
        method = Method(Dopri5(rtol=1e-7, atol=1e-7))
        found = log_likelihood(sde, classifier_free(model, LABELS, w), x, method=method, divergence=Exact())
        torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=5e-5)

        model = Classes(sde)
        m, v = alpha[0] * model.guided_mean(LABELS, w), alpha[0] ** 2 * 0.25 + sigma[0] ** 2

        def prior(z):  # the guided score is that of N(m, v): its own marginal at T, for no mismatch
            V = alpha[1] ** 2 * 0.25 + sigma[1] ** 2
            centred = z - alpha[1] * model.guided_mean(LABELS, w)
            return -0.5 * centred.square().sum(1) / V - D / 2 * (2 * math.pi * V).log()

        x = m + v.sqrt() * torch.randn(6, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        exact = -0.5 * (x - m).square().sum(1) / v - D / 2 * (2 * math.pi * v).log()
        guided = classifier_free(model, LABELS, w)
        found = log_likelihood(sde, guided, x, method=method, divergence=Exact(), prior=prior)
        torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=5e-5)

    @pytest.mark.parametrize("name", [n for n in samplers.available() if n not in ("torchsde", "ald")])
    def test_every_sampler_draws_from_the_guided_law(self, name):
        """One variance: the guided score is that of N(m_0 + w (m_c - m_0), v), whose samples are known by mean and spread."""
        sde, n = VPSDE(), 600
        model, labels = Classes(sde), torch.arange(n) % 3
        sampler = samplers.create(name)
        if isinstance(getattr(sampler, "steps", None), int) and sampler.steps > 100:
            sampler = samplers.create(name, steps=100)
        x = sampler(sde, classifier_free(model, labels, 2.0), (n, 2), generator=SampleStreams(0)).x.double()
        off = x - model.guided_mean(labels, 2.0)
        # 400 draws of a 3 by 2 table of means, each 0.25 / 200 in variance; a step bias of a tenth of the standard deviation
        for k in range(3):
            assert float(off[labels == k].mean(dim=0).abs().max()) < 0.05 + 4 * 0.5 / math.sqrt(n / 3)
        assert abs(float(off.std()) - 0.5) < 0.08

    def test_results_count_calls_of_the_guided_score(self):
        model = Classes(VPSDE())
        result = DDIM(steps=10)(model.sde, classifier_free(model, 0, 3.0), (4, 2), generator=SampleStreams(0))
        assert result.nfe == 11 and len(model.with_class) == len(model.without) == 11

    def test_a_network_and_another_sde(self):
        model = ScoreModel(MLP(2, num_classes=3, width=16, depth=1), VPSDE()).eval()
        torch.nn.init.normal_(model.net.output.weight, generator=torch.Generator().manual_seed(0))
        x, t = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 0.9, 6)
        guided = classifier_free(model, LABELS, 3.0)
        expected = 3 * model.score(x, t, LABELS) - 2 * model.score(x, t)
        torch.testing.assert_close(guided(x, t), expected)
        torch.testing.assert_close(guided.noise(x, t), 3 * model.noise(x, t, LABELS) - 2 * model.noise(x, t))
        other = VESDE(sigma_min=0.05, sigma_max=50.0)
        seen, t = UnderAnotherSDE(guided, other), torch.full((6,), 0.3, dtype=torch.float64)
        s_c, s_0 = model.condition(LABELS).under(other)(x, t), model.under(other)(x, t)
        torch.testing.assert_close(seen(x, t), s_0 + 3 * (s_c - s_0), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("made", "words"),
        [
            (lambda m: classifier_free(m, None, 2.0), "labels=None"),
            (lambda m: classifier_free(m, 1, math.nan), "scale=nan"),
            (lambda m: classifier_free(m, 1, "2"), "scale='2'"),
            (lambda m: classifier_free(m, 1, 2.0, interval=(2, -2)), "log-SNR"),
            (lambda m: classifier_free(m, 1, 2.0, interval=(1,)), "low < high"),
            (lambda m: classifier_free(m, 1, 2.0, interval=3.0), "low < high"),
            (lambda m: classifier_free(m, 1, 2.0, interval=(math.nan, 1.0)), "low < high"),
            (lambda m: classifier_free(m, 1, 2.0, interval="01"), "low < high"),
            (lambda m: classifier_free(lambda x, t: -x, 1, 2.0), "no condition"),
            (lambda m: classifier_free(network(3), torch.tensor([True, False]), 2.0), "integers"),
            (lambda m: classifier_free(m, 1, 2.0, rescale=1.5), "rescale=1.5"),
            (lambda m: classifier_free(m, 1, True), "scale=True"),
            (lambda m: classifier_free(m, 1, 2.0, rescale=True), "rescale=True"),
            (lambda m: classifier_free(m, 1, 2.0, rescale=1.0)(torch.zeros(2, 1), torch.tensor(0.5)), "one number"),
            (lambda m: classifier_free(network(3), [0, 3], 2.0), "classes 0 to 2"),
            (lambda m: classifier_free(network(3), -1, 2.0), "classes 0 to 2"),
            (lambda m: classifier_free(network(3), 0.5, 2.0), "integers"),
            (lambda m: classifier_free(network(3), torch.zeros(2, dtype=torch.int64, device="meta"), 2.0), "no values"),
            (lambda m: classifier_free(network(3), torch.zeros(2, dtype=torch.complex64), 2.0), "integers"),
            (lambda m: classifier_free(network(3), [0] * 999 + [7], 2.0), "the label 7; expected classes 0 to 2"),
            (lambda m: classifier_free(network(None), 0, 2.0), "no classes"),
            (lambda m: classifier_free(network(3), [0, 1], 2.0)(torch.zeros(3, 2), torch.tensor(0.5)), r"\(3,\)"),
        ],
    )
    def test_refuses(self, made, words):
        with pytest.raises(UserError, match=words):
            made(Classes(VPSDE()))


def network(num_classes):
    return ScoreModel(MLP(2, num_classes=num_classes, width=8, depth=1), VPSDE()).eval()


LAW = GaussianMixture(
    torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]), torch.tensor([0.5, 0.3, 0.7]), torch.tensor([0.5, 0.3, 0.2])
)


def posterior(sde):
    """The exact classifier of the mixture's components: the log of their responsibilities."""
    return lambda x, t: LAW.responsibilities(sde, x, t).log()


def component(sde, labels):
    return Normal(sde, LAW.means[labels], LAW.stds[labels, :1].square())


class Detached(torch.nn.Module):
    """A classifier of which autograd follows the parameters, and not x."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3).double()

    def forward(self, x, t):
        return self.layer(torch.cat([x.detach(), t.unsqueeze(1)], dim=1).double())


class TestClassifierGuidance:
    def test_a_classifier_of_other_noise_is_refused(self):
        """Its t would say another level than is there."""
        taught = NoiseClassifier((2,), 3, VPSDE(), data_std=1.0, width=8).eval()
        classifier_guidance(VPSDE(), LAW.score(VPSDE()), taught, 0, 2.0)
        for sde in (VESDE(), SubVPSDE(), VPSDE(beta_max=10.0)):
            with pytest.raises(UserError, match="has another (alpha|sigma) at the same time; expected one SDE"):
                classifier_guidance(sde, LAW.score(sde), taught, 0, 2.0)

    @each_sde
    def test_at_scale_one_it_is_bayes_rule_and_otherwise_so_many_times_the_gradient(self, sde):
        x, t = points(sde, 6)
        s_0, s_c = LAW.score(sde)(x, t), component(sde, LABELS)(x, t)
        for scale in (0.0, 1.0, 3.0):
            guided = classifier_guidance(sde, LAW.score(sde), posterior(sde), LABELS, scale)
            torch.testing.assert_close(guided(x, t), s_0 + scale * (s_c - s_0), rtol=1e-6, atol=1e-8)
        one = classifier_guidance(sde, LAW.score(sde), posterior(sde), 2, 1.0)
        torch.testing.assert_close(one(x, t), component(sde, torch.tensor([2]))(x, t), rtol=1e-6, atol=1e-8)

    def test_gradients_are_per_sample(self):
        sde = VPSDE()
        x, t = points(sde, 6)
        guided = classifier_guidance(sde, LAW.score(sde), posterior(sde), LABELS, 5.0)
        together = guided(x, t)
        for i in range(6):
            index = torch.tensor([i])
            torch.testing.assert_close(guided.take(index)(x[index], t[index]), together[index], rtol=1e-12, atol=1e-12)

    def test_says_the_same_in_every_autograd_mode_and_dtype(self):
        sde = VPSDE()
        x, t = points(sde, 6)
        guided = classifier_guidance(sde, LAW.score(sde), posterior(sde), LABELS, 2.0)
        plain = guided(x, t)
        with torch.no_grad():
            torch.testing.assert_close(guided(x, t), plain.detach(), rtol=0, atol=0)
            assert not guided(x, t).requires_grad
        with torch.inference_mode():
            made_here = x.clone() + 0
            torch.testing.assert_close(guided(made_here, t + 0).clone(), plain.detach(), rtol=0, atol=0)
        assert guided(x.float(), t).dtype == torch.float32
        with torch.inference_mode():
            DDIM(steps=3)(sde, guided, (6, 2), generator=SampleStreams(0))

    def test_a_classifier_that_mixes_its_batch_is_refused(self):
        sde = VPSDE()
        x, t = points(sde, 6)
        mixing = lambda x, t: posterior(sde)(x - x.mean(dim=0), t)
        with pytest.raises(UserError, match="a sample are others where the batch has another"):
            classifier_guidance(sde, LAW.score(sde), mixing, LABELS, 2.0)(x, t)

    @each_sde
    def test_its_density_at_scale_one_is_that_of_the_class(self, sde):
        """The trace takes the classifier's second derivatives, and the flow of Bayes' rule ends in the class's own law."""
        model = component(sde, LABELS)
        a, s = sde.alpha(torch.tensor([sde.t_min, sde.T])), sde.sigma(torch.tensor([sde.t_min, sde.T]))

        def log_normal(x, i):
            v = a[i] ** 2 * model.variance + s[i] ** 2
            return (-0.5 * (x - a[i] * model.mean).square() / v - 0.5 * (2 * math.pi * v).log()).sum(1)

        noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        x = a[0] * model.mean + (a[0] ** 2 * model.variance + s[0] ** 2).sqrt() * noise
        guided = classifier_guidance(sde, LAW.score(sde), posterior(sde), LABELS, 1.0)
        method = Method(Dopri5(rtol=1e-7, atol=1e-7))
        options = {"method": method, "divergence": Exact(), "prior": lambda z: log_normal(z, 1)}
        found = log_likelihood(sde, guided, x, **options)
        torch.testing.assert_close(found.log_prob, log_normal(x, 0), rtol=0, atol=2e-4)

    @pytest.mark.parametrize("sampler", [ProbabilityFlow(), AdaptiveSDE(), PredictorCorrector(steps=100)], ids=str)
    def test_samplers_whose_samples_leave_or_stay(self, sampler):
        sde, n = VPSDE(), 600
        labels = torch.arange(n) % 3
        guided = classifier_guidance(sde, LAW.score(sde), posterior(sde), labels, 1.0)
        x = sampler(sde, guided, (n, 2), generator=SampleStreams(0)).x.double()
        for k in range(3):
            off = (x[labels == k] - LAW.means[k]) / LAW.stds[k]
            assert float(off.mean(dim=0).abs().max()) < 0.1 + 4 / math.sqrt(n / 3)
            assert abs(float(off.std()) - 1) < 0.15

    def test_an_untouched_score_costs_no_classifier(self):
        asked = []

        def classifier(x, t):
            asked.append(1)
            return posterior(VPSDE())(x, t)

        x, t = points(VPSDE(), 6)
        counted = CountedScore(LAW.score(VPSDE()))
        classifier_guidance(VPSDE(), counted, classifier, LABELS, 0.0)(x, t)
        assert not asked and counted.nfe == 1
        guided = classifier_guidance(VPSDE(), counted, classifier, LABELS, 2.0)
        for _ in range(3):
            take(guided, torch.arange(2))(x[:2], t[:2])
        assert len(asked) == 3 + 3  # the look, once

    @pytest.mark.parametrize(
        ("classifier", "labels", "scale", "words"),
        [
            (lambda x: x, LABELS, 1.0, "cannot be called"),
            (torch.nn.Linear(2, 3), LABELS, 1.0, "told the noise level"),
            (lambda x, t: x @ torch.eye(2, 3, dtype=x.dtype), LABELS, 1.0, "same at t = "),
            # the noise shifts all logits alike, which says nothing of the classes
            (lambda x, t: x @ torch.eye(2, 3, dtype=x.dtype) + t.unsqueeze(1), LABELS, 1.0, "same at t = "),
            (lambda x, t: x @ torch.eye(2, 3, dtype=x.dtype) * math.nan, LABELS, 1.0, "not finite"),
            (lambda x, t: [[0.0, 1.0, 2.0]] * len(x), LABELS, 1.0, "logits as list"),
            (None, LABELS, 1.0, "cannot be called"),
            (posterior(VPSDE()), [0, 1, 2, 3, 0, 1], 1.0, "classes 0 to 2"),
            (posterior(VPSDE()), [0, -1], 1.0, "label -1"),
            (posterior(VPSDE()), [0.5], 1.0, "integers"),
            (posterior(VPSDE()), torch.zeros(6, dtype=torch.complex64), 1.0, "integers"),
            (posterior(VPSDE()), torch.zeros(2, 2, dtype=torch.long), 1.0, "integers"),
            (posterior(VPSDE()), [0, 1], 1.0, "2 labels for 6 samples"),
            (posterior(VPSDE()), LABELS, math.inf, "scale=inf"),
            (lambda x, t: posterior(VPSDE())(x, t).detach(), LABELS, 1.0, "differentiable"),
            (Detached(), LABELS, 1.0, "differentiable"),
            (lambda x, t: posterior(VPSDE())(x, t)[:, 0], LABELS, 1.0, "logits of shape"),
        ],
    )
    def test_refuses(self, classifier, labels, scale, words):
        x, t = points(VPSDE(), 6)
        with pytest.raises(UserError, match=words):
            classifier_guidance(VPSDE(), LAW.score(VPSDE()), classifier, labels, scale)(x, t)

    def test_what_is_seen_when_it_is_made_and_what_at_the_first_call(self):
        with pytest.raises(UserError, match="cannot be called"):
            classifier_guidance(VPSDE(), LAW.score(VPSDE()), lambda x: x, LABELS, 1.0)
        classifier_guidance(VPSDE(), LAW.score(VPSDE()), lambda x, t: x, LABELS, 1.0)


def test_guided_scores_can_be_stacked():
    """A guided score is a score: guidance of guidance, with both kinds of labels taken along."""
    sde = VPSDE()
    x, t = points(sde, 6)
    inner = ClassifierFree(sde, component(sde, LABELS), LAW.score(sde), 2.0)
    outer = classifier_guidance(sde, inner, posterior(sde), LABELS.flip(0), 1.5)
    index = torch.tensor([5, 0])
    torch.testing.assert_close(outer.take(index)(x[index], t[index]), outer(x, t)[index])
