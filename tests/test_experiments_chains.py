"""DDPM and NCSN as they were: their tables against their SDE views, their algorithms against the papers' lines, the scripts."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_experiments import QUICK, refused, script

import data
from experiments import ddpm, ncsn
from numerics import SampleStreams
from samplers import DDPMIndices, DPMSolver
from sde_lib import TableVESDE, TableVPSDE
from sde_lib.analytic import Gaussian
from workflow import chain_bound, command_line, systems
from workflow.chain_levels import chain_of
from workflow.configuration import config_for
from workflow.systems.ddpm import Algorithm2

pytestmark = pytest.mark.usefixtures("loose_pilots")

SCRIPTS = {"ddpm": ddpm, "ncsn": ncsn}
SMOKE = {
    "ddpm": [*QUICK, "--config.bound.draws=4", "--config.bound.level_draws=0"],
    "ncsn": [*QUICK, "--config.sde.levels=3"],
}
DDPM, NCSN = systems.create("ddpm"), systems.create("ncsn")


# the score of N(0.3, 0.7^2) under DDPM's chain; any function of (x, t) would do
toy_score = Gaussian(torch.full((4,), 0.3), torch.full((4,), 0.49)).score(DDPM.sde(config_for("ddpm")))


class TestTables:
    def test_the_sde_view_is_ddpms_chain_at_its_steps(self):
        """alpha_i^2 is the running product of 1 - beta, and one step of the kernel is (sqrt(1 - beta_i), sqrt(beta_i))."""
        sde = DDPM.sde(config_for("ddpm"))
        betas = np.linspace(1e-4, 0.02, 1000)
        abar = np.cumprod(1 - betas)
        t = torch.arange(1, 1001, dtype=torch.float64) / 1000
        np.testing.assert_allclose(sde.alpha(t).numpy(), np.sqrt(abar), rtol=1e-12)
        np.testing.assert_allclose(sde.sigma(t).numpy(), np.sqrt(1 - abar), rtol=1e-10)
        s = t - 1 / 1000
        np.testing.assert_allclose((sde.alpha(t) / sde.alpha(s)).numpy(), np.sqrt(1 - betas), rtol=1e-12)
        np.testing.assert_allclose(sde.transition_std(s[1:], t[1:]).numpy(), np.sqrt(betas[1:]), rtol=1e-9)
        assert isinstance(sde, TableVPSDE) and sde.t_min == sde.t_end == 1 / 1000

    def test_the_sde_view_is_ncsns_ladder_at_its_levels(self):
        config = config_for("ncsn")
        sde, L = NCSN.sde(config), config["sde"]["levels"]
        sigmas = np.geomspace(10.0, 0.01, L)
        t = torch.arange(L - 1, -1, -1, dtype=torch.float64) / (L - 1)
        np.testing.assert_allclose(sde.sigma(t).numpy(), sigmas, rtol=1e-12)
        assert bool((sde.alpha(t) == 1).all()) and isinstance(sde, TableVESDE) and sde.t_end == 0

    @pytest.mark.parametrize(("system", "first", "rows"), [(DDPM, 1, 1000), (NCSN, 0, 23)])
    def test_training_looks_at_the_rows_and_at_all_of_them(self, system, first, rows):
        config = config_for(system.name)
        objective, sde = system.objective(config), system.sde(config)
        t, weight = objective.times(sde, 20 * rows, torch.Generator().manual_seed(0))
        i = t * (rows if first else rows - 1)
        torch.testing.assert_close(i, i.round(), rtol=0, atol=1e-9)
        assert i.round().long().unique().tolist() == list(range(first, rows + first))
        assert bool((weight == 1).all())

    def test_the_second_papers_rules_chose_the_ladder(self):
        """Song and Ermon 2020: sigma_max about the largest distance of two images; half of a level's shell in the next."""
        ladder = NCSN.ladder(config_for("ncsn"))
        digits = data.create("digits")
        x = digits.transform().centres(digits.split("train").x).flatten(1)
        assert torch.cdist(x, x).max() <= ladder.sigma_max <= 1.25 * torch.cdist(x, x).max()

        def overlap(L):
            gamma = (ladder.sigma_max / ladder.sigma_min) ** (1 / (L - 1))
            phi = torch.special.ndtr
            shift = math.sqrt(2 * x.shape[1]) * (gamma - 1)
            return float(phi(torch.tensor(shift + 3 * gamma)) - phi(torch.tensor(shift - 3 * gamma)))

        best = min(range(2, 60), key=lambda L: abs(overlap(L) - 0.5))
        assert ladder.levels == best


class TestAlgorithms:
    @pytest.mark.parametrize("variance", ["posterior", "transition"])
    def test_ancestral_sampling_is_algorithm_2(self, variance):
        """x_{i-1} = (x_i - beta_i / sqrt(1 - abar_i) eps) / sqrt(1 - beta_i) + sigma_i z, and no noise at the end."""
        config = config_for("ddpm", changes={"sampling.sampler.variance": variance})
        sde, N = DDPM.sde(config), 1000
        sampler = DDPM.sampler(config, config["sampling"]["sampler"])
        found = sampler(sde, toy_score, (5, 4), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        assert found.nfe == N

        noise = torch.Generator().manual_seed(3)
        betas = torch.linspace(1e-4, 0.02, N, dtype=torch.float64)
        abar = (1 - betas).cumprod(0)
        x = torch.randn(5, 4, generator=noise, dtype=torch.float64)
        for i in range(N - 1, -1, -1):
            t = torch.full((5,), (i + 1) / N, dtype=torch.float64)
            eps = -(1 - abar[i]).sqrt() * toy_score(x, t)
            x = (x - betas[i] / (1 - abar[i]).sqrt() * eps) / (1 - betas[i]).sqrt()
            if i > 0:
                posterior = (1 - abar[i - 1]) / (1 - abar[i]) * betas[i]
                z = torch.randn(5, 4, generator=noise, dtype=torch.float64)
                x = x + (posterior if variance == "posterior" else betas[i]).sqrt() * z
        torch.testing.assert_close(found.x, x, rtol=1e-9, atol=1e-9)

    def test_annealed_langevin_is_algorithm_1(self):
        """a_i = e sigma_i^2 / sigma_L^2;  x <- x + a_i / 2 score + sqrt(a_i) z, K times a level; then one denoising."""
        config = config_for("ncsn", changes={"sampling.steps": 3})
        sde, L, e = NCSN.sde(config), config["sde"]["levels"], config["sampling"]["sampler"]["step_size"]
        score = Gaussian(torch.full((4,), 0.3), torch.full((4,), 0.49)).score(sde)
        sampler = NCSN.sampler(config, config["sampling"]["sampler"])
        found = sampler(sde, score, (5, 4), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        assert found.nfe == 3 * L + 1

        noise = torch.Generator().manual_seed(3)
        sigmas = torch.from_numpy(np.geomspace(10.0, 0.01, L))
        x = 10.0 * torch.randn(5, 4, generator=noise, dtype=torch.float64)
        for i, sigma in enumerate(sigmas):
            a, t = e * (sigma / sigmas[-1]) ** 2, torch.full((5,), 1 - i / (L - 1), dtype=torch.float64)
            for _ in range(3):
                s = score(x, t)
                x = x + a / 2 * s + a.sqrt() * torch.randn(5, 4, generator=noise, dtype=torch.float64)
        x = x + sigmas[-1] ** 2 * score(x, torch.zeros(5, dtype=torch.float64))
        torch.testing.assert_close(found.x, x, rtol=1e-8, atol=1e-8)

    def test_other_samplers_are_the_sde_views(self):
        config = config_for("ddpm")
        assert DDPM.sampler(config, config["sampling"]["second"]) == DPMSolver(steps=20)


class Predictor:
    """A score that predicts x_0 as half of x / alpha: wrong, but every term of its bound is a closed form."""

    data_std = None

    def __init__(self, sde):
        self.sde = sde

    def __call__(self, x, t):
        alpha, sigma = (v.reshape(-1, 1) for v in (self.sde.alpha(t), self.sde.sigma(t)))
        return (alpha * 0.5 * x / alpha - x) / sigma**2


@pytest.mark.parametrize("reading", chain_bound.READINGS)
def test_the_bound_is_ddpms(reading):
    """Term by term against equations (5) to (8) and (13) for x_0-hat = x_i / (2 alpha_i), in closed form or by quadrature.

    The images' own Monte Carlo errors say how far the mean of 400 equal images may be from it: 5 of them.
    """
    N, B = 20, 400
    config = config_for("ddpm", changes={"sde.steps": N, "sde.beta_first": 2e-3, "sde.beta_last": 0.3})
    sde, transform = DDPM.sde(config), data.create("digits").transform(-1.0, 1.0)
    levels = torch.tensor([0, 3, 16], dtype=torch.uint8)
    run = SimpleNamespace(sde=sde, transform=transform, model=Predictor(sde), score=Predictor(sde))
    streams = SampleStreams(0, range(B))
    found = chain_bound.bound(run, levels.expand(B, 3), reading, steps=N - 1, draws=N - 1, generator=streams)
    assert found.nfe == N - 1 + 4

    betas = np.linspace(2e-3, 0.3, N)
    abar = np.cumprod(1 - betas)
    w = 2 / 17
    c = (levels.numpy() + 0.5) * w - 1
    second = c**2 + (w**2 / 12 if reading != "grey values" else 0)  # E x_0^2
    prior = 0.5 * (abar[-1] * second + (1 - abar[-1]) - 1 - np.log(1 - abar[-1]))
    diffusion = 0.0
    for i in range(1, N):  # the step from i + 1 to i: 1 / (2 beta~) |mu~ - mu|^2, beta~ and mu~ of equation (7)
        tilde = (1 - abar[i - 1]) / (1 - abar[i]) * betas[i]
        weight = np.sqrt(abar[i - 1]) * betas[i] / (1 - abar[i])
        error = (second + (1 - abar[i]) / abar[i]) / 4  # E |x_0 - (x_0 + s eps) / 2|^2
        diffusion = diffusion + weight**2 * error / (2 * tilde)
    s = np.sqrt(betas[0] / (1 - betas[0]))
    if reading == "grey values":
        from scipy.stats import norm

        nodes, weights = np.polynomial.hermite_e.hermegauss(80)
        mean = (c[:, None] + s * nodes) / 2  # x_0-hat for every noise of x_1
        above = np.where(levels.numpy()[:, None] == 16, np.inf, (c[:, None] + w / 2 - mean) / s)
        below = np.where(levels.numpy()[:, None] == 0, -np.inf, (c[:, None] - w / 2 - mean) / s)
        sign = np.where(below > 0, -1.0, 1.0)
        low, high = np.where(sign > 0, below, -above), np.where(sign > 0, above, -below)
        log_mass = norm.logcdf(high) + np.log1p(-np.exp(norm.logcdf(low) - norm.logcdf(high)))
        reconstruction = -(log_mass * weights).sum(axis=1) / weights.sum()
    else:
        reconstruction = 0.5 * (second + s**2) / 4 / s**2 + np.log(s * np.sqrt(2 * np.pi)) - np.log(w)
    expected = np.array([np.mean(v) for v in (prior, diffusion, reconstruction)]) / np.log(2)
    error = found.terms.std(dim=0).numpy() / math.sqrt(B)
    assert abs(found.terms[:, 0].mean() - expected[0]) < 5 * error[0] + 1e-7
    for k in (1, 2):
        assert abs(float(found.terms[:, k].mean()) - expected[k]) < 5 * error[k], (k, found.terms.mean(dim=0), expected)
        assert error[k] < 0.02 * expected[k] + 0.02  # or the line above would say little
    assert float(found.per_image.mean()) == pytest.approx(found.asdict()["mean"])
    assert sum(found.asdict()["terms"].values()) == pytest.approx(found.asdict()["mean"])


@pytest.fixture(scope="module", params=["ddpm", pytest.param("ncsn", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    done = script(request.param, f"--workdir={folder}", *SMOKE[request.param])
    return request.param, folder, done


class TestScripts:
    def test_the_run_folder_holds_what_is_promised(self, run):
        name, folder, done = run
        results = json.loads((folder / "results.json").read_text())
        assert results["bits_per_dim"]["images"] == 5 and np.isfinite(results["bits_per_dim"]["mean"])
        own = "ancestral" if name == "ddpm" else "ald"
        assert results["sampling"]["all"].keys() == {own, "dpm_solver"}
        assert results["sampling"]["nfe"] == (2 + 1 if name == "ddpm" else 2 * 3 + 1)
        for picture in (own, "dpm_solver"):
            assert (folder / "samples" / f"{picture}.png").stat().st_size > 100
        assert ("vlb" in results) == (name == "ddpm")
        if name == "ddpm":
            bound = results["vlb"]
            for reading in chain_bound.READINGS:
                assert bound[reading]["images"] == 5
                assert sum(bound[reading]["terms"].values()) == pytest.approx(bound[reading]["mean"])
                for text in ((folder / "report.md").read_text(), done.stdout):
                    assert bound[reading]["text"] in text
            assert bound["mean"] == bound["dequantised images"]["mean"]  # as it was trained

    @pytest.mark.slow
    def test_resume_goes_on_and_changes_nothing(self, run):
        name, folder, _ = run
        before = json.loads((folder / "results.json").read_text())
        script(name, f"--workdir={folder}", "--resume", *SMOKE[name])
        after = json.loads((folder / "results.json").read_text())
        assert after["training"]["steps"] == 4
        for key in ("bits_per_dim", "vlb"):
            assert after.get(key, {}).get("mean") == before.get(key, {}).get("mean")
        assert (folder / "report.md").read_text().count("One network, two models") == (name == "ddpm")

    @pytest.mark.slow
    def test_the_tools_take_it_as_any_run(self, run):
        name, folder, _ = run
        done = script("sample", "--run", folder, "--sampler", "pc", "--steps", 2, "--n", 3)
        assert "3 samples" in done.stdout
        done = script("nll", "--run", folder, "--limit", 5, "--steps", 3, "--batch_size", 3)
        assert f"{json.loads((folder / 'results.json').read_text())['bits_per_dim']['mean']:.3f} " in done.stdout
        script("evaluate", "--run", folder, "--n", 32, "--steps", 2)
        assert "evaluation" in json.loads((folder / "results.json").read_text())

    @pytest.mark.parametrize(
        ("name", "flag", "words"),
        [
            ("ddpm", "--config.sampling.steps=1000", ("1000", "999")),
            ("ddpm", "--config.sampling.variance=learnt", ("learnt", "posterior")),
            ("ddpm", "--config.sde.beta_last=1.5", ("1.5", "betas")),
            ("ddpm", "--config.sde.steps=0", ("steps=0", "expected an integer >= 2")),
            ("ddpm", "--config.likelihood.bound_draws=1", ("bound.draws=1", ">= 2")),
            ("ddpm", "--config.training.weighting=simple", ("config.training.weighting",)),
            ("ncsn", "--config.sde.levels=1", ("levels=1", "expected an integer >= 2")),
            ("ncsn", "--config.sde.sigma_min=20.0", ("sigma_min=20", "expected sigma_min < sigma_max")),
            ("ncsn", "--config.sampling.steps=0", ("steps=0",)),
            ("ncsn", "--config.sampling.step_size=-1.0", ("step_size=-1.0",)),
        ],
    )
    def test_wrong_values_leave_no_folder_behind(self, tmp_path, capsys, name, flag, words):
        with pytest.raises(SystemExit) as left:
            command_line.run(SCRIPTS[name].main, [f"--workdir={tmp_path / 'new'}", flag])
        refused(SimpleNamespace(returncode=left.value.code, stderr=capsys.readouterr().err), 2, *words)
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "ncsn"])
def test_points_run(name, tmp_path):
    script(name, f"--workdir={tmp_path / name}", "--config.data.name=moons", *SMOKE[name])
    results = json.loads((tmp_path / name / "results.json").read_text())
    assert np.isfinite(results["bits_per_dim"]["mean"])
    if name == "ddpm":
        assert results["vlb"]["mean"] == results["vlb"]["dequantised images"]["mean"]


@pytest.mark.parametrize("steps", [2000, 4000])
@pytest.mark.parametrize("name", ["ddpm", "iddpm"])
def test_a_chain_with_next_to_no_signal_is_walked_over_its_own_rows(name, steps):
    """However small alpha_T is: every row is met, from the last one to the first, and the bound's chain is of the same rows."""
    system, config = systems.create(name), config_for(name, changes={"sde.steps": steps})
    sde, chain = system.sde(config), system.chain(config)
    assert sde.t_start < sde.T  # where other grids would begin
    walked = DDPMIndices(train_steps=steps)(sde, steps - 1) * steps / sde.T
    assert torch.allclose(walked, torch.arange(steps, 0, -1, dtype=torch.float64), atol=1e-6)
    whole = Algorithm2(steps=steps - 1).on(chain)
    times = whole.grid(sde, whole.steps) * steps / sde.T
    assert torch.allclose(times, times.round(), atol=1e-6) and float(times[0]) == pytest.approx(steps)
    run = SimpleNamespace(sde=sde)
    bound = chain_of(run, rows=steps, evaluations=steps, variance="posterior")
    assert bound.steps == steps - 1 and float(bound.times[-1]) == sde.T
