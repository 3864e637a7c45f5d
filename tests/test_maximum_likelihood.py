"""Maximum likelihood through a flow: its value against closed forms and the likelihood's own, its gradient, the system."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from oracles import gaussian
from torch import nn
from training_cases import OracleModel, tiny_model

import samplers
from experiments import cnf
from likelihood import Exact, Method, log_likelihood
from numerics import Dopri5, UserError
from sde_lib import StraightSDE
from training import MaximumLikelihood
from training.streams import StepStreams
from workflow.configuration import config_for
from workflow.flow_only import fitting, require_score
from workflow.setup import resolve

SDE = StraightSDE(T=0.999, t_min=1e-3, t_end=1e-3)
TIGHT = {"tolerance": 1e-7}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Whose flow is dx/dt = a x + b: everything has a closed form."""

    def __init__(self, a=0.4, b=(0.3, -0.2)):
        super().__init__()
        self.sde = SDE
        self.a, self.b = nn.Parameter(torch.tensor(a).double()), nn.Parameter(torch.tensor(b).double())

    def noise(self, x, t, class_label=None):
        of_noise = SDE.g(t).square() / (2 * SDE.sigma(t))
        return ((self.a - SDE.f(t)).unsqueeze(1) * x + self.b) / of_noise.unsqueeze(1)


@pytest.mark.parametrize("solver", [{"solver": "dopri5", **TIGHT}, {"solver": "rk4", "adjoint": False, "steps": 40}])
def test_a_linear_flow_has_its_closed_form(solver):
    """x_T = e^{a s} x + b (e^{a s} - 1) / a; trace 2 a s; K = integral of |a x + b|^2 / 2; J = a^2 s."""
    model, x = Linear(), gaussian().sample(20, generator=generator())
    a, b, s = float(model.a.detach()), model.b.detach(), SDE.T - SDE.t_min
    found = MaximumLikelihood(**solver).up(model, x)
    z = math.exp(a * s) * x + b * (math.exp(a * s) - 1) / a
    torch.testing.assert_close(found.log_prob, SDE.prior_log_prob(z) + 2 * a * s, rtol=1e-6, atol=1e-6)
    start = (a * x + b).square().sum(1)  # |v|^2 grows as e^{2 a t}
    torch.testing.assert_close(found.kinetic, start * (math.exp(2 * a * s) - 1) / (2 * a) / 2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.jacobian, torch.full((20,), a**2 * s).double(), rtol=1e-6, atol=1e-6)
    penalised = MaximumLikelihood(**solver, kinetic=0.3, jacobian=0.7).loss(model, x, {}, None)
    torch.testing.assert_close(penalised, -found.log_prob / 2 + 0.3 * found.kinetic + 0.7 * found.jacobian)


@pytest.mark.parametrize("solver", [{"solver": "dopri5", **TIGHT}, {"solver": "rk4", "adjoint": False, "steps": 40}])
@pytest.mark.parametrize("probes", [0, 3])
def test_the_value_is_the_same_in_every_mode(solver, probes):
    model, x = Linear(), gaussian().sample(5, generator=generator())
    v = torch.randn(5, probes, 2, generator=generator(), dtype=torch.float64).sign() if probes else None
    expected = MaximumLikelihood(**solver).up(model, x, v)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = MaximumLikelihood(**solver).up(model, x.clone(), None if v is None else v.clone())
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert not found.log_prob.requires_grad and expected.log_prob.requires_grad
    with pytest.raises(UserError, match="one sample or more"):
        MaximumLikelihood(**solver).up(model, x[:0])


def test_the_flow_of_an_exact_score_has_the_datas_density():
    """And the likelihood's own code, which integrates another state in another clock, says the same."""
    law = gaussian()
    x = law.sample(20, generator=generator())
    model = OracleModel(law, SDE)
    found = MaximumLikelihood(**TIGHT).up(model, x).log_prob
    exact = law.log_prob(SDE, x, SDE.t_min)
    assert float((found - exact).abs().max()) < 0.01  # what the prior N(0, T^2 I) misses of the law at T
    same = log_likelihood(SDE, law.score(SDE), x, method=Method(Dopri5(rtol=1e-8, atol=1e-8)), divergence=Exact())
    torch.testing.assert_close(found, same.log_prob, rtol=0, atol=1e-4)


def test_the_adjoints_gradient_is_that_through_the_steps_and_the_closed_one():
    model, x = Linear(), gaussian().sample(20, generator=generator())
    gradients = []
    for options in ({"adjoint": True}, {"adjoint": False}, {"solver": "rk4", "adjoint": False, "steps": 40}):
        loss = (
            MaximumLikelihood(**{**TIGHT, "kinetic": 0.1, "jacobian": 0.2, **options}).loss(model, x, {}, None).mean()
        )
        gradients.append(torch.autograd.grad(loss, [model.a, model.b]))
    s, a = SDE.T - SDE.t_min, model.a
    z = (a * s).exp() * x + model.b * ((a * s).exp() - 1) / a
    kinetic = (a * x + model.b).square().sum(1) * ((2 * a * s).exp() - 1) / (2 * a) / 2
    square = z.square().sum(1) / (2 * SDE.prior_std**2)
    closed = ((square - 2 * a * s) / 2 + 0.1 * kinetic + 0.2 * a.square() * s).mean()
    expected = torch.autograd.grad(closed, [model.a, model.b])
    for found in gradients:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_one_probe_serves_a_whole_solve_and_is_unbiased():
    model = tiny_model(SDE, dim=2, seed=4, wild=True)
    x = torch.randn(1, 2, generator=generator()).repeat(400, 1)
    objective = MaximumLikelihood(probes=1, solver="rk4", adjoint=False, steps=15)
    draws = objective.draw(SDE, x.shape, StepStreams(0, 0))
    assert draws["v"].shape == (400, 1, 2) and bool((draws["v"].abs() == 1).all())
    with torch.no_grad():
        found = objective.up(model, x, draws["v"])
        exact = MaximumLikelihood(solver="rk4", adjoint=False, steps=15).up(model, x[:1])
    assert len(found.log_prob.unique()) == 2  # two pairs of directions: (1, 1) and (1, -1)
    for one, other in ((found.log_prob, exact.log_prob), (found.jacobian, exact.jacobian)):
        assert abs(float(one.mean() - other)) < 4 * float(one.std()) / 20 + 1e-9


def test_training_by_it_raises_the_likelihood():
    """A scale and a shift of a standard normal are found: the law is N(b', v)."""
    torch.manual_seed(0)
    model, x = Linear(a=0.0001, b=(0.0, 0.0)), 0.5 * gaussian().sample(200, generator=generator())
    objective = MaximumLikelihood(solver="rk4", adjoint=False, steps=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = objective.loss(model, x, {}, None).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    v = float((x - x.mean(0)).square().mean())
    assert (
        losses[-1] == pytest.approx(0.5 * math.log(2 * math.pi * math.e * v), abs=0.03) and losses[0] > losses[-1] + 0.3
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "rk4"}, "expected an adaptive solver such as dopri5, or adjoint=False"),
        ({"solver": "euler"}, "solver"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"probes": -1}, "probes"),
        ({"kinetic": -0.1}, "kinetic"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(UserError, match=words):
        MaximumLikelihood(**options)


def test_the_system_refuses_what_does_not_fit():
    for changes, words in (
        ({"training.objective.solver": "rk4", "training.objective.adjoint": True}, "adjoint=False"),
        ({"training.validation": 16}, "expected 0"),
        ({"model.class_conditional": True}, "compared without classes"),
        ({"beside.points": 0}, "config.beside.points"),
        ({"sampling.sampler": "pc"}, "PredictorCorrector, which adds noise"),
        ({"sampling.second.eta": 0.5}, "DDIM with eta, which adds noise"),
    ):
        with pytest.raises(UserError, match=words):
            resolve(config_for("cnf", changes=changes))


def test_a_flow_alone_is_drawn_by_its_ode_whoever_asks():
    """Tools name any sampler: those that add noise are refused, and the denoised mean at the end is left out."""
    own = resolve(config_for("cnf"))
    run = SimpleNamespace(setup=own, folder="runs/cnf")
    for name in ("ancestral", "pc", "torchsde", "seeds", "adaptive_sde", "euler_maruyama"):
        with pytest.raises(UserError, match="which adds noise"):
            fitting(samplers.create(name), own.objective)
    for name in ("ode", "ddim", "dpm_solver", "unipc", "heun", "deis"):
        assert not fitting(samplers.create(name), own.objective).denoise
    with pytest.raises(UserError, match="no score of noised data; expected a score: nll.py"):
        require_score(run, "nll.py")
    usual = resolve(config_for("vp")).objective
    assert fitting(samplers.create("pc"), usual) == samplers.create("pc")
    with pytest.raises(UserError, match="PredictorCorrector, which adds noise"):
        resolve(config_for("vp", changes={"data.name": "moons", "training.objective": "maximum_likelihood"}))


def test_its_preset_for_images_is_small():
    images = resolve(config_for("cnf", "images"))
    assert images.dataset.event_shape == (1, 8, 8) and images.objective.probes == 1
    assert not images.model.net.fine_input  # no sines of single grey levels, which a solver would follow
    assert sum(p.numel() for p in images.model.parameters()) < 1_000_000


@pytest.mark.slow
def test_images_go_through(tmp_path):
    """Every stage on the digits, where the trace is random and the data's own density is not known."""
    assert cnf.main(["--preset=images", "--dry_run", "--quiet", f"--workdir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["cnf"]
    assert found["truth_nats"] is None and all(r["failed"] == 0 for r in found["trainings"].values())


@pytest.mark.slow
def test_the_system_goes_through(tmp_path):
    assert cnf.main(["--dry_run", "--quiet", f"--workdir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["cnf"]["trainings"]
    assert set(rows) == {"maximum likelihood", "score matching", "flow matching"}
    assert all(r["failed"] == 0 and r["evaluations"] > 6 for r in rows.values())
    # an untrained flow is that of a Gaussian of the data's variance
    assert (
        rows["maximum likelihood"]["nats"] > results["cnf"]["truth_nats"] and results["bits_per_dim"]["kind"] == "exact"
    )
