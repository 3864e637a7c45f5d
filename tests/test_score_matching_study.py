"""The four ways of score matching: their moments by brute force, denoising's bias in closed form, the system."""

import json

import pytest
import torch
from torch import nn

import models
from data import Split, Standardize
from evaluation import Plane
from experiments import score_matching
from numerics import UserError
from training import DSM, DiscreteTime, ScoreError, as_trainable
from training.batches import Batches
from training.streams import StepStreams
from workflow import plane, score_matching_study, systems
from workflow.configuration import config_for
from workflow.plane import Truth
from workflow.score_matching_study import SMALL, Study, Timeless, gaussian_bias, gradient_moments, one_level
from workflow.setup import load_data, resolve

VARIANCE = 0.5


def gaussian_truth(half=5.0, n=300):
    law = Plane(half=half, n=n).law(lambda x: -x.square().sum(1) / (2 * VARIANCE))
    return Truth(law=law, score=law.field(lambda x: -x / VARIANCE), log_density=None)


def normal_points(n, seed=0):
    x = VARIANCE**0.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return Split(x, None, torch.arange(n))


class Linear(nn.Module):
    """s(x) = a x: one weight."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x, label):
        return self.a * x


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_denoisings_bias_is_the_closed_form(sigma):
    truth = gaussian_truth()
    _, score = truth.law.blurred(sigma)
    assert truth.law.fisher(score, truth.score) == pytest.approx(gaussian_bias(VARIANCE, sigma, 2), rel=1e-5)
    assert truth.information == pytest.approx(2 / VARIANCE, rel=1e-6)


def test_moments_of_a_gradient_are_those_of_single_samples():
    """Written out: the gradient of |a y + eps / sigma|^2 / 2 in a, y = x + sigma eps, over many single samples."""
    sigma, a, n = 0.3, -1.2, 2_000_000
    model = Timeless(Linear(a), one_level(sigma))
    objective = DSM(times=DiscreteTime(levels=1), weighting=ScoreError())
    batches = Batches(normal_points(100_000), None, batch_size=250, seed=3)
    squared, variance = gradient_moments(model, objective, batches, 400)
    g = torch.Generator().manual_seed(1)
    x, eps = VARIANCE**0.5 * torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g)
    y = x + sigma * eps
    single = ((a * y + eps / sigma) * y).sum(dim=1)
    assert variance == pytest.approx(float(single.var()), rel=4.5 * (2 / 400) ** 0.5)
    assert squared**0.5 == pytest.approx(abs(float(single.mean())), abs=4 * (variance / 100_000) ** 0.5)
    assert float(single.mean()) == pytest.approx(2 * (a * (VARIANCE + sigma**2) + 1), abs=0.01)


def test_all_four_have_one_gradient_and_denoising_the_largest_variance():
    """At one weight: the mean gradient of three is 2 (a v + 1); the smaller sigma, the more variance."""
    a, v, n = -1.2, VARIANCE, 100
    batches = Batches(normal_points(100_000), None, batch_size=1000, seed=3)
    plan = Study(sigmas=(0.05, 0.1))
    found = {}
    for name, (sigma, objective) in plan.methods.items():
        found[name] = gradient_moments(Timeless(Linear(a), one_level(sigma)), objective, batches, n)
    expected = abs(2 * (a * v + 1))
    for name in ("exact", "sliced", "finite difference"):
        squared, variance = found[name]
        assert squared**0.5 == pytest.approx(expected, abs=4 * (variance / (n * 1000)) ** 0.5 + 1e-3), name
    variances = {name: value for name, (_, value) in found.items()}
    assert variances["exact"] == pytest.approx(
        variances["sliced"], rel=1e-3
    )  # one weight: every direction has its slope
    assert variances["denoising, 0.05"] / variances["denoising, 0.1"] == pytest.approx(4, rel=0.5)
    assert variances["denoising, 0.1"] > 10 * variances["exact"]


def curved(dtype):
    """A score of the study's kind and size, up to 13 where the data are, with the weights of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = models.MLP(dim=2, width=32, depth=2)
        for p in net.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return Timeless(net, one_level(SMALL)).to(dtype)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-6), (torch.float32, 3e-3)])
def test_finite_differences_have_the_sliced_gradient(dtype, rounding):
    """On the same points and directions, at the study's h and in its precision: the gradient's error falls as h^2 to rounding,
    so what two trainings differ by is not the objective."""
    x = normal_points(256).x.to(dtype)
    model = curved(dtype)

    def gradient(objective):
        draws = objective.draw(model.sde, x.shape, StepStreams(0, 0), dtype=dtype)
        loss = objective.loss(as_trainable(model), x, draws, None).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()

    sliced = gradient(Study().methods["sliced"][1])

    def error(h):
        found = gradient(Study(difference=h).methods["finite difference"][1])
        return float((found - sliced).norm() / sliced.norm())

    assert error(1e-3) < rounding
    if dtype == torch.float64:
        assert error(0.02) / error(0.01) == pytest.approx(4, rel=0.1) and error(0.02) > 1e-5


@pytest.mark.slow
def test_the_four_fit_a_gaussian():
    """E_p |s - grad log p|^2 of the trained: next to nothing without noise, the theory's bias with it; losses at their best."""
    truth = gaussian_truth()
    plan = Study(steps=400, width=16, depth=1, batch_size=256, sigmas=(0.5,), batches=10, repeats=2)
    transform = Standardize()
    found = score_matching_study.study(plan, normal_points(20_000), transform, truth, torch.device("cpu"))
    for name in ("exact", "sliced", "finite difference"):
        assert found[name].error < 0.05 * truth.information, name
        assert found[name].loss == pytest.approx(-1 / VARIANCE, abs=0.3)
        assert found[name].best == pytest.approx(-1 / VARIANCE, rel=1e-6) and found[name].bias == 0
        one, other = found[name].fisher  # two trainings, from other weights
        assert one != other and found[name].error == pytest.approx((one + other) / 2)
    denoising = found["denoising, 0.5"]
    bias = gaussian_bias(VARIANCE, 0.5, 2)
    assert denoising.bias == pytest.approx(bias, rel=1e-5) and denoising.error == pytest.approx(bias, rel=0.2)
    assert denoising.own_fisher < 0.1 * bias
    assert denoising.loss == pytest.approx(denoising.best, rel=0.1)


def test_fewer_points_than_a_batch_are_one_batch():
    plan = Study(steps=2, batch_size=64, width=8, depth=1, sigmas=(0.5,), batches=3)
    truth = gaussian_truth(n=100)
    found = score_matching_study.study(plan, normal_points(40), Standardize(), truth, torch.device("cpu"))
    assert len(found) == 4 and all(f.variance > 0 for f in found.values())


def test_the_truth_of_a_data_set_is_its_density_in_model_units():
    dataset, transform = load_data(config_for("score_matching", changes={"data.name": "moons"})["data"])
    truth = plane.truth(dataset, transform, n=300)
    assert abs(truth.law.log_z) < 1e-6  # the change of units is right, or the integral would not be 1
    x = dataset.split("test").x
    y = transform.centres(x).double()
    i = ((y + truth.plane.half) / truth.plane.spacing).round().long()
    near = truth.law.log_p[i[:, 0], i[:, 1]]
    exact = dataset.log_prob(x) - 2 * transform.log_det
    assert float((near - exact).abs().median()) < 0.1


def test_what_does_not_fit_is_refused():
    for changes, words in (
        ({"data.name": "digits"}, "points in the plane with a known one"),
        ({"study.sigmas": ()}, "one or more noise levels"),
        ({"study.sigmas": (0.1, 0.1)}, "each once"),
        ({"study.sigmas": (0.1, 0.1000001)}, "each once"),
        ({"study.steps": 0}, "config.study.steps"),
        ({"study.sigmas": (0.0001,)}, "the noise level 0.0001 for score_matching"),
        ({"data.name": "checkerboard"}, "without jumps"),
    ):
        with pytest.raises(UserError, match=words):
            resolve(config_for("score_matching", changes=changes))


@pytest.mark.slow
def test_the_system_goes_through(tmp_path):
    assert score_matching.main(["--dry_run", "--quiet", f"--workdir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    found = results["score_matching"]["methods"]
    assert set(found) == {"exact", "sliced", "finite difference", "denoising, 0.16", "denoising, 0.32"}
    assert found["denoising, 0.32"]["bias"] > found["denoising, 0.16"]["bias"] > found["exact"]["bias"] == 0
    assert (tmp_path / "score_matching.png").stat().st_size > 10_000
    assert "Four ways" in (tmp_path / "report.md").read_text() and SMALL < 0.01
    assert "score_matching" in systems.available()
