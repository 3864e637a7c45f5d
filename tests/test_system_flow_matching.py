"""Flow matching: the straight path as a member of the family, its velocity as a score, reflow, straightness."""

import math
from types import SimpleNamespace

import pytest
import torch
from oracles import FAMILY_WISE, gaussian, mixture, whitened_moments_p
from torch import nn
from training_cases import OracleModel

import samplers
import training
from evaluation import straightness
from likelihood import Exact, accurate, log_likelihood
from models import DIFFERENCE, ScoreModel
from numerics import SampleStreams, UserError, expand_as
from samplers import DDIM
from sde_lib import KernelSDE, StraightSDE
from sde_lib.analytic import Gaussian
from training import DSM, FlowMatching, Reflow, joined
from training.streams import StepStreams
from workflow import systems
from workflow.configuration import config_for
from workflow.device import use_threads
from workflow.systems.flow_matching import _suited, reflow_folder

STRAIGHT = StraightSDE()
GENERIC = KernelSDE(alpha_fn=lambda t: 1 - t, sigma_fn=lambda t: t, T=STRAIGHT.T, terminal_std=1.0)


class Output(nn.Module):
    """A network that says anything, the same for the same point and label."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x, label):
        return torch.tanh(self.layer(torch.cat([x, label.unsqueeze(1).to(x.dtype)], dim=1)))


class TestPath:
    def test_closed_forms_are_those_of_the_kernel(self):
        t = torch.linspace(1e-4, 0.999, 200, dtype=torch.float64)
        for name in ("alpha", "sigma", "f", "g", "log_snr"):
            torch.testing.assert_close(getattr(STRAIGHT, name)(t), getattr(GENERIC, name)(t), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(STRAIGHT.time_of_log_snr(STRAIGHT.log_snr(t)), t, rtol=1e-12, atol=0)

    def test_the_flow_is_the_velocity_noise_minus_data(self):
        """E[eps - x_0 | x_t] of the oracle, and not its opposite: data are at t = 0."""
        law, t = gaussian(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        x = law.sample(3, generator=torch.Generator().manual_seed(0))
        score = law.score(STRAIGHT)
        eps = -t.unsqueeze(1) * score(x, t)
        x_0 = (x - t.unsqueeze(1) * eps) / (1 - t.unsqueeze(1))
        torch.testing.assert_close(STRAIGHT.flow(score, x, t), eps - x_0)

    def test_the_velocity_as_a_score_is_the_published_formula(self):
        """score = -(x + (1 - t) v) / t, where v is what the network says."""
        net = Output()
        model = ScoreModel(net, STRAIGHT, DIFFERENCE)
        x, t = torch.randn(7, 2, dtype=torch.float64), torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
        v = model.output(x, t) if hasattr(model, "output") else model.evaluate(x, t).output
        expected = -(x + (1 - t).unsqueeze(1) * v) / t.unsqueeze(1)
        torch.testing.assert_close(model(x, t), expected)
        torch.testing.assert_close(STRAIGHT.flow(model, x, t), v)

    def test_t_of_one_is_refused(self):
        with pytest.raises(UserError, match="expected T < 1"):
            StraightSDE(T=1.0)


class TestObjective:
    def test_the_loss_is_the_velocitys_squared_error(self):
        model = ScoreModel(Output(), STRAIGHT, DIFFERENCE)
        x_0 = torch.randn(64, 2, dtype=torch.float64)
        objective = DSM(weighting=FlowMatching())
        draws = objective.draw(STRAIGHT, x_0.shape, StepStreams(0, 0), dtype=torch.float64)
        t, eps = expand_as(draws["t"], x_0), draws["eps"]
        v = model.evaluate((1 - t) * x_0 + t * eps, draws["t"]).output
        direct = (eps - x_0 - v).square().mean(dim=1)
        torch.testing.assert_close(objective.loss(model, x_0, draws, None), direct, rtol=1e-6, atol=1e-9)

    def test_the_systems_objective_is_that_one_at_uniform_times(self):
        config = config_for("flow_matching")
        objective = systems.create("flow_matching").objective(config)
        assert objective == DSM(weighting=FlowMatching(), times=training.StratifiedTime())

    def test_reflow_keeps_the_pairs_together(self):
        """Its loss is that of the given noise; with other noise, of the same law, it is another."""
        model = ScoreModel(Output(), STRAIGHT, DIFFERENCE)
        x_0, eps = torch.randn(8, 2, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
        objective = Reflow()
        draws = objective.draw(STRAIGHT, (8, 4), StepStreams(0, 0))
        assert set(draws) == {"t", "weight"}
        t = expand_as(draws["t"], x_0)
        v = model.evaluate((1 - t) * x_0 + t * eps, draws["t"]).output
        found = objective.loss(model, joined(x_0, eps), draws, None)
        torch.testing.assert_close(found, (eps - x_0 - v).square().mean(dim=1), rtol=1e-6, atol=1e-9)
        with pytest.raises(UserError, match="no pairs|expected pairs"):
            objective.loss(model, torch.zeros(2, 3), draws, None)
        with pytest.raises(UserError, match="one shape"):
            joined(x_0, eps[:4])


class TestLikelihood:
    @pytest.mark.parametrize("law", [gaussian(), mixture()], ids=["gaussian", "mixture"])
    def test_log_density_meets_the_oracle(self, law):
        """To 1e-5 nats; T is where the prior's own mismatch is below that."""
        sde = StraightSDE(T=1 - 1e-7)
        x = law.sample(16, generator=torch.Generator().manual_seed(0))
        found = log_likelihood(sde, law.score(sde), x, method=accurate(tolerance=1e-8), divergence=Exact())
        assert bool(found.converged.all())
        torch.testing.assert_close(found.log_prob, law.log_prob(sde, x, sde.t_min), rtol=0, atol=1e-5)

    def test_at_the_default_T_the_prior_costs_what_the_docstring_says(self):
        law, sde = gaussian(), STRAIGHT
        x = law.sample(16, generator=torch.Generator().manual_seed(0))
        found = log_likelihood(sde, law.score(sde), x, method=accurate(tolerance=1e-8), divergence=Exact())
        torch.testing.assert_close(found.log_prob, law.log_prob(sde, x, sde.t_min), rtol=0, atol=1e-4)


class TestSamplers:
    def test_ddim_without_noise_is_eulers_method_on_the_velocity(self):
        law = mixture()
        score, n = law.score(STRAIGHT), 20
        x_T = torch.randn(5, 2, dtype=torch.float64)
        found = DDIM(steps=n, denoise=False)(STRAIGHT, score, (5, 2), x_T=x_T).x
        x = x_T
        times = torch.linspace(STRAIGHT.T, STRAIGHT.t_end, n + 1, dtype=torch.float64)
        for t, s in zip(times[:-1], times[1:], strict=True):
            x = x + (s - t) * STRAIGHT.flow(score, x, t.expand(5))
        torch.testing.assert_close(found, x, rtol=1e-7, atol=1e-7)

    SOME = (
        "ancestral",
        "pc",
        "euler_maruyama",
        "reverse_diffusion",
        "dpm_solver",
        "unipc",
        "heun",
        "deis",
        "ode",
        "ddim",
        "seeds",
    )

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SOME)
    def test_every_sampler_draws_the_law(self, name):
        law, options = gaussian(), {} if name in ("ode",) else {"steps": 500}
        sampler = _suited(name, samplers.create(name, denoise=False, **options))
        x = sampler(STRAIGHT, law.score(STRAIGHT), (2000, 2), generator=SampleStreams(0), dtype=torch.float64).x
        t_end = float(STRAIGHT.t_end)
        assert whitened_moments_p(law, STRAIGHT, t_end, x) > FAMILY_WISE / len(self.SOME)


class TestStraightness:
    def test_of_a_gaussian_is_the_closed_form(self):
        """x_t = x_T c(t) / c(T), c^2 = alpha^2 s^2 + sigma^2: an integral over t times E x_T^2."""
        s, n = 0.3, 4000
        law = Gaussian(torch.zeros(2), torch.full((2,), s**2))
        t = torch.linspace(STRAIGHT.t_end, STRAIGHT.T, 20001, dtype=torch.float64)
        c = ((1 - t) ** 2 * s**2 + t**2).sqrt()
        slope = (-(1 - t) * s**2 + t) / c
        span = float(t[-1] - t[0])
        S = float(torch.trapezoid((slope - (c[-1] - c[0]) / span).square(), t)) / span
        found = straightness(STRAIGHT, law.score(STRAIGHT), (n, 2), generator=torch.Generator().manual_seed(0))
        assert abs(found.value - S) < 4 * found.stderr + 1e-3 * S
        assert math.isclose(found.stderr, S / math.sqrt(n), rel_tol=0.2)

    def test_of_one_point_is_nothing(self):
        """All paths to one point are straight, at constant speed."""
        from sde_lib.analytic import EmpiricalDistribution

        score = EmpiricalDistribution(torch.tensor([[0.4, -0.2]])).score(STRAIGHT)
        found = straightness(STRAIGHT, score, (16, 2), generator=torch.Generator().manual_seed(0))
        assert found.value < 1e-5


def test_reflow_straightens_the_oracles_paths():
    """Pairs of a Gaussian's flow are linear in the noise, so the best velocity for them is exact and straight: S = 0."""
    s = 0.3
    law = Gaussian(torch.zeros(2), torch.full((2,), s**2))
    eps = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_0 = samplers.ProbabilityFlow(denoise=True)(STRAIGHT, law.score(STRAIGHT), (64, 2), x_T=eps).x

    class Joined(nn.Module):
        sde = STRAIGHT

        def noise(self, x, t, class_label=None):
            # x_t = ((1 - t) s + t) eps where x_0 = s eps
            return x / expand_as((1 - t) * s + t, x)

    loss = Reflow().loss(Joined(), joined(x_0, eps), {"t": torch.linspace(0.01, 0.99, 64, dtype=torch.float64)}, None)
    assert float(loss.max()) < 1e-5
    independent = Reflow().loss(
        Joined(), joined(x_0, eps.flip(0)), {"t": torch.linspace(0.01, 0.99, 64, dtype=torch.float64)}, None
    )
    assert float(independent.mean()) > 0.1


def test_the_oracle_model_gets_the_papers_least_loss():
    """E |eps - x_0 - v|^2 of the exact velocity is the mean conditional variance, by quadrature over t."""
    s = 0.5
    law = Gaussian(torch.zeros(2), torch.full((2,), s**2))
    model = OracleModel(law, STRAIGHT)
    t = torch.linspace(STRAIGHT.t_min, STRAIGHT.T, 20001, dtype=torch.float64)
    variance = (1 - t) ** 2 * s**2 + t**2
    # eps - x_0 given x_t: 1 + s^2 - (t - (1 - t) s^2)^2 / variance
    least = float(torch.trapezoid(1 + s**2 - (t - (1 - t) * s**2) ** 2 / variance, t)) / float(t[-1] - t[0])
    objective = DSM(weighting=FlowMatching())
    x_0 = law.sample(20_000, generator=torch.Generator().manual_seed(1))
    draws = objective.draw(STRAIGHT, x_0.shape, StepStreams(0, 0), dtype=torch.float64)
    loss = objective.loss(model, x_0, draws, None)
    assert abs(float(loss.mean()) - least) < 4 * float(loss.std()) / math.sqrt(len(loss))


def test_a_round_of_reflow_is_kept_by_what_it_goes_on_from(tmp_path):
    """A longer run, or other pairs, have another round: the first was read again once, beside the new weights."""

    def place(fingerprint, **own):
        reflow = {"pairs": 100, "evaluations": 10, "steps": 20, **own}
        run = SimpleNamespace(fingerprint=fingerprint, setup=SimpleNamespace(config={"reflow": reflow}))
        return reflow_folder(run, tmp_path)

    assert place("a" * 32) == place("a" * 32)
    assert len({place("a" * 32), place("b" * 32), place("a" * 32, pairs=200), place("a" * 32, steps=30)}) == 4


def test_threads_are_no_more_than_the_environment_says(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert use_threads(2) == 1 and use_threads(0) == 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
        assert use_threads(2) == 2 and use_threads(0) == 2 and use_threads(8) == 3
    finally:
        torch.set_num_threads(before)
