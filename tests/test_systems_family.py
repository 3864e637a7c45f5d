"""DDPM's additions, improved DDPM, DDIM and EDM: each against its paper's lines and an oracle, and each slip of public code."""

import copy
import json
import math
import shlex
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_experiments import refused, script

import data
import samplers
from evaluation import Estimate
from evaluation.pictures import shown_channels
from experiments import ddim, ddpm, edm, iddpm, jem, latent, vdm
from likelihood import GaussianChain
from numerics import SampleStreams, UserError
from samplers import DDIM, ClipDenoised, DDPMIndices, HeunEDM
from samplers.corrections import CorrectedScore
from sde_lib import VESDE, TableVPSDE, linear_betas, with_terminal_snr
from sde_lib.analytic import Gaussian, GaussianMixture
from training import DSM, EDMWeighting, Hybrid, LogNormal, LossHistory
from workflow import command_line, process_pictures, resolve, systems
from workflow.beside import train_beside
from workflow.configuration import config_for
from workflow.process_pictures import compare_means
from workflow.run_folder import RunFolder
from workflow.sampler_table import Cell, SamplerTable
from workflow.setup import asks_learned_variance
from workflow.sub_run import sub_run
from workflow.systems.edm import ABLATION
from workflow.systems.latent import _difference

SCRIPTS = {"ddpm": ddpm, "iddpm": iddpm, "ddim": ddim, "edm": edm, "jem": jem, "latent": latent, "vdm": vdm}
LAW = Gaussian(torch.tensor([0.3, -0.6]), torch.tensor([0.49, 0.2]))


def chain_sde(N=1000):
    return systems.create("ddpm").sde(config_for("ddpm", changes={"sde.steps": N}))


class TestImprovedDDPM:
    def test_its_table_is_the_cosine(self):
        config = config_for("iddpm")
        sde, i = systems.create("iddpm").sde(config), torch.arange(1, 1000, dtype=torch.float64)
        f = lambda u: torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        torch.testing.assert_close(sde.alpha(i / 1000).square(), f(i / 1000) / f(0 * i[:1]), rtol=1e-9, atol=0)
        assert float(1 - (sde.alpha(1.0) / sde.alpha(0.999)) ** 2) == pytest.approx(0.999)
        assert sde.t_min == sde.t_end == 1e-3

    def test_its_loss_is_the_hybrid_over_its_own_steps(self):
        system = systems.create("iddpm")
        made = system.objective(config_for("iddpm", changes={"sde.steps": 50}))
        assert isinstance(made, Hybrid) and made.vlb_weight == 0.001 and made.variance == "learned"
        assert made.steps == made.times.levels == 50
        vlb = {"training.objective": "vlb", "training.objective.times": "loss_history"}
        made = system.objective(config_for("iddpm", changes=vlb))
        assert type(made.times) is LossHistory and made.times.levels == 1000 and made.variance == "learned"

    def test_network_and_sampler_have_the_variance(self):
        made = resolve(config_for("iddpm", changes={"model.channels": 8}))
        assert made.model.learned_variance and made.samplers["ancestral"].predictor.variance == "learned"
        assert (
            made.samplers["ancestral"].corrections == (ClipDenoised(low=-1.0, high=1.0),)
            and made.samplers["ancestral"].evaluations == 100
        )
        x = torch.randn(3, 1, 8, 8)
        score, place = made.model.score_and_variance(x, torch.full((3,), 0.5))
        assert score.shape == place.shape == x.shape and bool((place == 0.5).all())  # the last layer starts at 0
        moons = resolve(config_for("iddpm", changes={"data.name": "moons", "model.width": 16}))
        assert moons.samplers["ancestral"].corrections == () and moons.model.learned_variance

    def test_a_clipped_mean_keeps_the_variance_and_bounds_the_last_term(self):
        """alpha(T) = 5e-5: an eps-hat that is off by 0.1 costs 5 nats in the last step, and next to nothing where the mean is
        clipped."""
        sde = systems.create("iddpm").sde(config_for("iddpm"))

        class Off:
            def __call__(self, x, t):
                return self.score_and_variance(x, t)[0]

            def score_and_variance(self, x, t):
                return -(x + 0.1) / sde.sigma(t).unsqueeze(1).to(x.dtype), torch.full_like(x, 0.25)

        chain = GaussianChain(sde=sde, times=torch.arange(1, 1001) / 1000, variance="learned")
        x_0, last = torch.full((50, 1), 0.5), torch.full((50,), 999)
        clipped = CorrectedScore(sde, Off(), (ClipDenoised(),))
        raw = chain.divergence(Off(), x_0, last, torch.Generator().manual_seed(0))
        kept = chain.divergence(clipped, x_0, last, torch.Generator().manual_seed(0))
        own = chain.divergence(lambda_exact(sde), x_0, last, torch.Generator().manual_seed(0))
        assert float(raw.mean()) > 4 and float((kept - own).abs().max()) < 1e-4
        torch.testing.assert_close(clipped.score_and_variance(x_0, torch.ones(50))[1], torch.full_like(x_0, 0.25))
        with pytest.raises(UserError, match="score_and_variance"):
            CorrectedScore(sde, LAW.score(sde), (ClipDenoised(),)).score_and_variance(x_0, torch.ones(50))


def lambda_exact(sde):
    """The noise at T is the state, with the same place of the variance."""
    pair = lambda x, t: (-x / sde.sigma(t).unsqueeze(1).to(x.dtype), torch.full_like(x, 0.25))
    return SimpleNamespace(score_and_variance=pair)


class TestLossHistory:
    def test_steps_follow_the_root_of_the_mean_square_and_the_weights_undo_it(self):
        sde, times = chain_sde(8), LossHistory(levels=8, history=3)
        grid = torch.arange(1, 9, dtype=torch.float64) / 8
        u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
        for k in range(3):  # even until every step has its three
            torch.testing.assert_close(times.probabilities(), torch.full((8,), 1 / 8, dtype=torch.float64))
            times.observe(sde, grid, (k + 1.0) * grid * 8, 0.0)
        p = 0.999 * grid / grid.sum() + 0.001 / 8
        torch.testing.assert_close(times.probabilities(), p)
        drawn = (times.quantile(sde, u, 0.0) * 8).round().long()
        assert float((drawn.bincount(minlength=9)[1:] / 999 - p).abs().max()) < 2e-3
        weight = times.weight(sde, grid, 0.0)
        torch.testing.assert_close((p * weight * grid).sum(), grid.mean())
        # the oldest loss leaves, whatever is not finite is not kept, and a step counts a batch's losses one after the other
        times.observe(sde, grid[[0, 0, 1, 2]], torch.tensor([9.0, 8.0, math.nan, math.inf]), 0.0)
        assert sorted(times.losses[0].tolist()) == [3.0, 8.0, 9.0]
        assert sorted(times.losses[1].tolist()) == [2.0, 4.0, 6.0]

    def test_it_goes_on_from_a_checkpoint(self):
        sde, times = chain_sde(4), LossHistory(levels=4, history=2)
        times.observe(sde, torch.tensor([0.25, 0.5, 0.5, 0.5]), torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.0)
        again = LossHistory(levels=4, history=2)
        again.load_state_dict({name: value.clone() for name, value in times.state_dict().items()})
        assert torch.equal(again.losses, times.losses) and torch.equal(again.counts, times.counts)
        with pytest.raises(UserError, match="losses and counts of 5"):
            LossHistory(levels=5).load_state_dict(times.state_dict())
        for bad in ({"history": 0}, {"floor": 1.0}):
            with pytest.raises(UserError):
                LossHistory(**bad)


class TestDDIM:
    @pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0])
    def test_its_steps_are_the_papers(self, eta):
        """Equations (12) and (16), index by index of the chain, for ten evaluations."""
        config = config_for("ddim")
        system, sde = systems.create("ddim"), systems.create("ddim").sde(config)
        score = LAW.score(sde)
        found = system.walk(config, 10, eta)(
            sde, score, (5, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        assert found.nfe == 10
        noise = torch.Generator().manual_seed(0)
        abar = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])
        rows = np.round(np.linspace(1000, 1, 10)).astype(int)
        x = torch.randn(5, 2, generator=noise, dtype=torch.float64)
        for t, s in zip(rows, [*rows[1:], 0]):
            eps = -math.sqrt(1 - abar[t]) * score(x, torch.full((5,), t / 1000, dtype=torch.float64))
            x_0 = (x - math.sqrt(1 - abar[t]) * eps) / math.sqrt(abar[t])
            w = eta * math.sqrt((1 - abar[s]) / (1 - abar[t])) * math.sqrt(1 - abar[t] / abar[s])
            x = math.sqrt(abar[s]) * x_0 + math.sqrt(max(1 - abar[s] - w**2, 0)) * eps
            if w > 0:
                x = x + w * torch.randn(5, 2, generator=noise, dtype=torch.float64)
        torch.testing.assert_close(found.x, x, rtol=1e-9, atol=1e-9)

    def test_eta_1_is_ddpm(self):
        """With the posterior's variance, from the same noise, over the same rows."""
        config = config_for("ddim")
        system, sde = systems.create("ddim"), systems.create("ddim").sde(config)
        walk = {**config_for("ddpm")["sampling"]["sampler"], "steps": 19, "spacing": "linspace"}
        ancestral = systems.create("ddpm").sampler(config_for("ddpm"), walk)
        one, two = (
            s(sde, LAW.score(sde), (6, 2), generator=SampleStreams(0, range(6)), dtype=torch.float64)
            for s in (ancestral, system.walk(config, 20, 1.0))
        )
        torch.testing.assert_close(one.x, two.x, rtol=1e-9, atol=1e-9)

    def test_encoding_is_first_order_and_ends_at_the_flows_latent(self):
        """The flow of a Gaussian keeps its whitened coordinates, so its latent is a closed form: the loop's error falls as
        1/N, and so does the round trip's. An index in a time's place would not come near it."""
        sde = chain_sde()
        x = LAW.marginal_sample(sde, 50, sde.t_end, generator=torch.Generator().manual_seed(1))
        kept, errors, trips = LAW.whiten(sde, x, sde.t_end), [], []
        for steps in (124, 249, 499):
            loop = DDIM(steps=steps, grid=DDPMIndices(spacing="linspace"), denoise=False)
            z = loop.encode(sde, LAW.score(sde), x)
            errors.append(float((LAW.whiten(sde, z, sde.T) - kept).abs().max()))
            back = loop(sde, LAW.score(sde), tuple(x.shape), x_T=z).x
            trips.append(float((back - x).square().mean().sqrt()))
        assert errors[-1] < 0.1, errors
        for found in (errors, trips):
            assert all(1.6 < a / b < 2.4 for a, b in zip(found, found[1:])), found
        with pytest.raises(UserError, match="eta=0.5"):
            DDIM(eta=0.5).encode(sde, LAW.score(sde), x)

    def test_the_first_step_of_encoding_asks_at_the_time_that_it_leaves(self):
        sde, seen = chain_sde(), []

        def score(x, t):
            seen.append(float(t[0]))
            return LAW.score(sde)(x, t)

        x = torch.zeros(2, 2, dtype=torch.float64)
        z = DDIM(grid=[1.0, 0.5, 0.1], denoise=False).encode(sde, score, x)
        assert seen == pytest.approx([0.1, 0.5]) and z.shape == x.shape


class TestEDM:
    def test_the_preconditioning_is_table_1s(self):
        """With sd of these data, and log(sigma)/4 as the label; F = 0 leaves c_skip x."""
        made = resolve(config_for("edm", changes={"model.channels": 8}))
        sd = made.model.parametrization.data_std
        x = made.transform.centres(made.dataset.split("train").x).double()
        assert sd == pytest.approx(float(x.std()), abs=1e-3) and sd != 0.5
        assert made.objective.weighting == EDMWeighting(data_std=sd)
        sde, t = made.sde, torch.linspace(0, 1, 7, dtype=torch.float64)
        sigma = sde.sigma(t)
        assert (
            isinstance(sde, VESDE) and float(sigma[0]) == pytest.approx(0.002) and float(sigma[-1]) == pytest.approx(80)
        )
        torch.testing.assert_close(made.model.conditioning(sde, t), sigma.log() / 4)
        y, F = torch.randn(7, 1, 8, 8), torch.randn(7, 1, 8, 8)
        s = sigma.reshape(-1, 1, 1, 1).float()
        total = (s**2 + sd**2).sqrt()
        one = torch.ones_like(sigma)
        p = made.model.parametrization
        torch.testing.assert_close(
            p.data(F, y, one, sigma), sd**2 / total**2 * y + s * sd / total * F, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(p.scale_input(y, one, sigma), y / total, rtol=1e-5, atol=1e-5)

    def test_the_loss_is_the_papers_and_that_of_the_networks_own_output(self):
        """lambda(sigma) |D - x_0|^2 = |F - target|^2 at every sigma, lambda = (sigma^2 + sd^2) / (sigma sd)^2."""
        made = resolve(config_for("edm", changes={"model.channels": 8}))
        sde, sd, p = made.sde, made.model.parametrization.data_std, made.model.parametrization
        assert isinstance(made.objective, DSM) and made.objective.times == LogNormal(mean=-1.2, std=1.2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for q in made.model.net.parameters():
                torch.nn.init.normal_(q, std=0.05)
        t, weight = made.objective.times(sde, 4096, torch.Generator().manual_seed(0), sde.t_min)
        log_sigma = sde.sigma(t).log()
        assert bool((weight == 1).all())
        assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.01) and float(log_sigma.std()) == pytest.approx(
            1.2, abs=0.01
        )
        few = t[torch.linspace(0, 4095, 16).long()]
        x_0, eps = torch.rand(16, 1, 8, 8) * 2 - 1, torch.randn(16, 1, 8, 8)
        draws = {"t": few, "weight": weight[:16], "eps": eps}
        found = made.objective.loss(made.model.eval(), x_0, draws, None).double()
        x, sigma = sde.perturb(x_0, few, eps), sde.sigma(few)
        D = made.model.denoised(x, few)
        lam = (sigma**2 + sd**2) / (sigma * sd) ** 2
        torch.testing.assert_close(
            found, lam * (D - x_0).double().square().flatten(1).mean(dim=1), rtol=1e-3, atol=1e-4
        )
        F, target = made.model.output(x, few), p.target(x_0, eps, torch.ones_like(sigma), sigma)
        torch.testing.assert_close(found, (F - target).double().square().flatten(1).mean(dim=1), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("churn", [0.0, 10.0, 1e9])
    def test_the_sampler_is_algorithm_2(self, churn):
        """18 sigmas and 0, gamma at most sqrt(2) - 1, Heun's correction at every step but the last, which is Euler's."""
        config = config_for("edm", changes={"sampling.sampler.churn": churn, "sampling.sampler.churn_min": 0.05})
        system = systems.create("edm")
        sde = system.sde(config)
        sampler = replace(system.sampler(config, config["sampling"]["sampler"]))
        assert isinstance(sampler, HeunEDM) and sampler.evaluations == 35
        score = LAW.score(sde)
        found = sampler(sde, score, (4, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert found.nfe == 35

        noise, N, rho = torch.Generator().manual_seed(0), 18, 7
        i = np.arange(N)
        sigmas = [*(80 ** (1 / rho) + i / (N - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho, 0.0]

        def slope(x, sigma):
            t = sde.time_of_log_snr(torch.full((4,), -2 * math.log(sigma), dtype=torch.float64))
            return -sigma * score(x, t)

        x = 80 * torch.randn(4, 2, generator=noise, dtype=torch.float64)
        for now, then in zip(sigmas[:-1], sigmas[1:]):
            gamma = min(churn / (N - 1), math.sqrt(2) - 1) if now >= 0.05 else 0.0
            hat = min(now + gamma * now, 80.0)
            if hat > now:
                z = torch.randn(4, 2, generator=noise, dtype=torch.float64)
                x = x + math.sqrt(hat**2 - now**2) * z
            d = slope(x, hat)
            guess = x + (then - hat) * d
            x = guess if then == 0 else x + (then - hat) * 0.5 * (d + slope(guess, then))
        torch.testing.assert_close(found.x, x, rtol=1e-6, atol=1e-6)

    def test_what_is_scored_is_blurred_by_sigma_min(self):
        """The slip: quoting the flow's density at sigma_min as the data's. It is that of N(m, C + sigma_min^2 I)."""
        from likelihood import Exact, accurate, log_likelihood

        config = config_for("edm", changes={"sde.sigma_min": 0.3})
        sde = systems.create("edm").sde(config)
        x = LAW.sample(20, generator=torch.Generator().manual_seed(0))
        found = log_likelihood(
            sde, LAW.score(sde), x, method=accurate(tolerance=1e-8, t_min=1e-9), divergence=Exact(),
            prior=lambda z: LAW.log_prob(sde, z, sde.T),
        )  # fmt: skip
        blurred = Gaussian(LAW.mean, LAW.cov + 0.09)
        truth = blurred.log_prob(VESDE(sigma_min=1e-9), x, torch.zeros(20))
        torch.testing.assert_close(found.log_prob, truth, rtol=0, atol=1e-6)
        assert float((found.log_prob - LAW.log_prob(VESDE(sigma_min=1e-9), x, torch.zeros(20))).abs().max()) > 0.05

    def test_every_design_of_the_ablation_makes_its_objects(self):
        for design in ABLATION:
            made = resolve(config_for(design.system, changes={**design.changes, "model.channels": 8}))
            assert made.samplers["heun"] == HeunEDM(steps=17), design.name
        assert len({d.folder for d in ABLATION}) == len({d.name for d in ABLATION}) == len(ABLATION)

    def test_the_switch_is_short_for_a_value(self, capsys):
        asked = command_line.parse_system(systems.create("edm"), ["--ablation"])
        assert asked.config["ablation"]["run"] is True
        assert command_line.parse_system(systems.create("edm"), []).config["ablation"]["run"] is False
        with pytest.raises(SystemExit):
            command_line.parse_system(systems.create("edm"), ["--help"])
        assert "--ablation  short for --config.ablation.run=True" in capsys.readouterr().out
        with pytest.raises(UserError, match="ablation"):
            command_line.parse_system(systems.create("vp"), ["--ablation"])


def test_no_signal_at_T_keeps_the_first_row():
    """Lin et al. 2023, algorithm 1: sqrt(abar) shifted and scaled."""
    betas = linear_betas(steps=100)
    own, made = (TableVPSDE(betas=b) for b in (betas, with_terminal_snr(betas, 1e-8)))
    assert float(made.alpha(0.01)) == pytest.approx(float(own.alpha(0.01)), rel=1e-12)
    assert float(made.log_snr(1.0).exp()) == pytest.approx(1e-8, rel=1e-6)
    t = torch.arange(1, 101, dtype=torch.float64) / 100
    a, b = own.alpha(t), made.alpha(t)
    line = (b[50] - b[-1]) / (b[0] - b[-1])
    assert float(line) == pytest.approx(float((a[50] - a[-1]) / (a[0] - a[-1])), rel=1e-9)
    for bad in (0.0, -1.0, 1e9):
        with pytest.raises(UserError, match="snr"):
            with_terminal_snr(betas, bad)


class TestProcessPictures:
    def test_the_law_on_a_grid_is_the_datas(self):
        """A mixture of known Gaussians: score and density of its noised marginals, against the closed form."""
        dataset = data.create("gaussians", train=4000, test=100, validation=100)
        transform = dataset.transform()
        found = process_pictures.law_on_grid(dataset, transform, cells=100)
        sde, t = chain_sde(), torch.full((60,), 0.2, dtype=torch.float64)
        x = found.marginal_sample(sde, 60, 0.2, generator=torch.Generator().manual_seed(0))
        # the density in data units, noised by quadrature of another kind: many draws of x_0
        draws = transform(dataset.split("train").x).double()
        empirical = GaussianMixture(draws, torch.full((len(draws),), 1e-3), torch.ones(len(draws)))
        exact, rough = found.score(sde)(x, t), empirical.score(sde)(x, t)
        error = (exact - rough).norm(dim=1) * float(sde.sigma(0.2))
        assert float(error.mean()) < 0.06, error.mean()  # 4,000 draws of the law
        mean, spread = found.weights @ found.means, draws.mean(dim=0)
        assert float((mean - spread).abs().max()) < 5 * float(draws.std()) / math.sqrt(4000)

    def test_the_mean_of_a_reverse_step_is_bayes_rule(self):
        """For Gaussian data E[x_s | x_t] is linear in x_t: regression of x_s on x_t."""
        sde, s, t = chain_sde(), 0.3, 0.4
        x = torch.linspace(-2, 2, 10, dtype=torch.float64).unsqueeze(1).expand(10, 2).clone()
        found = process_pictures.reverse_mean(sde, LAW.score(sde), x, t, s)
        a_s, a_t, v_s, v_t = (float(f) for f in (sde.alpha(s), sde.alpha(t), sde.sigma(s) ** 2, sde.sigma(t) ** 2))
        var_s, var_t = a_s**2 * LAW.cov + v_s, a_t**2 * LAW.cov + v_t
        expected = a_s * LAW.mean + a_t / a_s * var_s / var_t * (x - a_t * LAW.mean)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_paths_are_paths_and_the_pictures_are_written(self, tmp_path):
        """Both ways of an exact score: the ends have the laws that they should, and a particle moves a little at a time."""
        from PIL import Image

        dataset = data.create("gaussians", train=4000, test=1500, validation=100)
        transform, sde = dataset.transform(), chain_sde(200)
        law = process_pictures.law_on_grid(dataset, transform, cells=40)
        run = SimpleNamespace(
            sde=sde, transform=transform, dataset=dataset, score=process_pictures.in_parts(law.score(sde)),
            setup=SimpleNamespace(options=SimpleNamespace(seed=0)), device=torch.device("cpu"),
        )  # fmt: skip
        times = process_pictures.moments(sde, 200)
        forward, n = process_pictures.forward_path(run, times), process_pictures._POINTS
        assert forward.shape == (len(times), n, 2) and float(times[0]) == sde.t_min and float(times[-1]) == sde.T
        of_data = float(transform(dataset.split("test").x).var())
        assert abs(float(forward[-1].var()) - 1) < 0.1 and abs(float(forward[0].var()) - of_data) < 0.1
        moved = forward.diff(dim=0).square().mean(dim=(1, 2)).sqrt()
        assert float(moved.max()) < 0.5  # draws of each marginal by themselves would move by 1.4
        found = process_pictures.compare_means(run, law, rows=200, points=30)
        assert max(f["rms"] for f in found) < 1e-4  # of the law against itself, in float32
        process_pictures.save_means(tmp_path / "means.png", found)
        few = forward[:3, :30]
        process_pictures.save_process(tmp_path / "process.gif", few, few.flip(0), times[:3])
        with Image.open(tmp_path / "process.gif") as picture:
            assert picture.n_frames == 3
        assert (tmp_path / "means.png").stat().st_size > 5000


def test_a_table_of_samplers_shows_what_it_holds(tmp_path):
    cells = {
        (row, n): Cell(quality=Estimate(value=v, stderr=0.1 * v), nfe=n, seconds=1.0, sampler="S()")
        for row, n, v in (("a", 10, 8.0), ("a", 100, 1.25), ("b", 100, 3e5))
    }
    made = SamplerTable(
        title="t", measure="FD", samples=20, floor=Estimate(value=0.7, stderr=0.1), head="evaluations", cells=cells
    )
    assert made.rows == ["a", "b"] and made.columns == [10, 100]
    text = "\n".join(made.lines())
    assert (
        "| a | 8.00 ± 0.80 | 1.25 ± 0.12 |" in text and "| b |  |" in text and "held-out data score 0.70 ± 0.10" in text
    )
    assert [c["value"] for c in made.asdict()["cells"]] == [8.0, 1.25, 3e5]
    made.save(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 3000


@pytest.mark.parametrize(
    ("name", "flag", "words"),
    [
        ("ddpm", "--config.sampling.variance=learned", ("learned", "iddpm")),
        ("ddpm", "--config.sampling.second=ancestral --config.sampling.second.variance=learned --config.sampling.sampler=ddim",
         ("learned", "iddpm")),
        ("ddpm", "--config.sampling.sampler=none", ("sampler='none'", "sampling.second=none")),
        ("edm", "--config.sweep.churn_max=-1.0", ("churn_max=-1.0", "churn_min < churn_max")),
        ("iddpm", "--config.sde.steps=4000 --config.few_steps.evaluations=(10,4000)", ("4000", "at most 1000", "beside=none")),
        ("jem", "--config.training.label_dropout=0.5", ("label_dropout=0.5", "expected 0")),
        ("jem", "--config.training.objective.buffer=10", ("buffer=10 for batches of", "or more")),
        ("latent", "--config.latent_sampler=none", ("latent_sampler='none'", "expected a sampler")),
        ("latent", "--config.latent_sampler=ancestral --config.latent_sampler.variance=learned", ("learned", "posterior")),
        ("vdm", "--config.model.conditioning=time", ("conditioning='time'", "log_snr")),
        ("ddpm", "--config.sde.steps=1", ("steps=1", ">= 2")),
        ("ddpm", "--config.sde.beta_first=0.5", ("0.5", "first <= last")),
        ("ddpm", "--config.bound.level_draws=2", ("level_draws=2", ">= 4")),
        ("iddpm", "--config.sde.steps=1", ("steps=1", ">= 2")),
        ("iddpm", "--config.sde.s=-0.5", ("s=-0.5", "0.008")),
        ("iddpm", "--config.sde.largest=1.0", ("largest=1.0", "0.999")),
        ("iddpm", "--config.model.learned_variance=False", ("learned_variance=False", "ddpm")),
        ("iddpm", "--config.few_steps.evaluations=(10,2000)", ("2000", "at most 1000")),
        ("iddpm", "--config.few_steps.beside=vp", ("beside='vp'", "ddpm")),
        ("ddim", "--config.sweep.eta=(0.0,1.5)", ("1.5", "[0, 1]")),
        ("ddim", "--config.sde.steps=500", ("train_steps=1000", "grid.train_steps=500")),
        ("ddim", "--config.sweep.all=5000", ("5000", "at most 1000")),
        ("ddim", "--config.encoding.evaluations=(1000,)", ("1000", "at most 999")),
        ("edm", "--config.sweep.churn=(-1.0,)", ("churn=-1.0", ">= 0")),
        ("edm", "--config.sde.sigma_min=100.0", ("sigma_min=100.0", "sigma_min < sigma_max")),
        ("edm", "--config.sampling.sampler.churn=-3.0", ("churn=-3.0",)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, capsys, name, flag, words):
    with pytest.raises(SystemExit) as left:
        command_line.run(SCRIPTS[name].main, [f"--workdir={tmp_path / 'new'}", *shlex.split(flag)])
    refused(SimpleNamespace(returncode=left.value.code, stderr=capsys.readouterr().err), 2, *words)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "entry", "pictures"),
    [
        ("ddpm", "bound_levels", ("bound_levels.png",)),
        ("iddpm", "few_steps", ("few_steps_samples.png", "few_steps_bound.png")),
        ("ddim", "ddim_sweep", ("ddim_sweep.png", "interpolation.png")),
        ("edm", "churn_sweep", ("churn_sweep.png",)),
    ],
)
def test_a_dry_run_goes_through_and_leaves_what_is_promised(tmp_path, name, entry, pictures):
    folder = tmp_path / name
    script(
        name,
        f"--workdir={folder}",
        "--dry_run",
        "--quiet",
        "--config.model.channels=8",
        "--config.training.batch_size=16",
    )
    results, report = json.loads((folder / "results.json").read_text()), (folder / "report.md").read_text()
    assert entry in results and results["bits_per_dim"]["kind"] == "exact" and results["sampling"]["nfe"] >= 4
    for picture in pictures:
        assert (folder / picture).stat().st_size > 300 and f"({picture})" in report
    if name == "iddpm":
        assert results["vlb"]["kind"] == "bound" and results["vlb"]["variance"] == "learned"
        assert {c["row"] for c in results["few_steps"]["samples"]["cells"]} >= {"iddpm, learned", "ddpm, posterior"}
        assert (folder / "ddpm" / "config.json").is_file()  # a run folder of its own


@pytest.mark.slow
def test_points_in_the_plane_get_the_process(tmp_path):
    folder = tmp_path / "roll"
    script(
        "ddpm", f"--workdir={folder}", "--dry_run", "--quiet", "--config.data.name=swiss_roll", "--config.model.width=16",
        "--config.sde.steps=60", "--config.sde.beta_last=0.2", "--config.sampling.sampler.steps=59",
    )  # fmt: skip
    report = (folder / "report.md").read_text()
    for picture in ("process.gif", "reverse_means.png", "bound_levels.png"):
        assert (folder / picture).stat().st_size > 300 and f"({picture})" in report
    assert len(json.loads((folder / "results.json").read_text())["reverse_means"]) == 4


def test_a_run_that_goes_on_takes_its_second_system_along(tmp_path):
    """What changed in the run was allowed there; what is the second system's own is not."""

    def beside(steps, rows=1000):
        changes = {"training.steps": steps, "model.channels": 8, "training.batch_size": 8, "training.warmup": 1}
        run = SimpleNamespace(
            setup=resolve(config_for("iddpm", changes=changes)), device="cpu", folder=RunFolder(tmp_path)
        )
        return sub_run(run, "ddpm", "ddpm", {"sde.steps": rows})

    beside(2)
    assert beside(3).folder.results()["training"]["steps"] == 3
    with pytest.raises(UserError, match=r"sde.steps=1100, which was 1000"):
        beside(4, rows=1100)


def test_iddpm_teaches_the_bound_that_it_is_scored_by():
    """Trained on grey values as they are, the last term is the mass of a bin."""
    assert resolve(config_for("iddpm")).objective.bin_width is None
    setup = resolve(config_for("iddpm", changes={"training.dequantize": False}))
    assert setup.objective.bin_width == pytest.approx(2 / 17) and (setup.objective.low, setup.objective.high) == (-1, 1)


def test_a_predictor_can_ask_for_a_learned_variance():
    pc = samplers.create("pc", predictor={"name": "ancestral", "variance": "learned"})
    assert asks_learned_variance(pc) and not asks_learned_variance(samplers.create("pc"))


def test_a_second_sampler_is_the_systems_own_or_none():
    setup = resolve(config_for("ddpm", changes={"sampling.sampler": "dpm_solver", "sampling.second": "ancestral"}))
    assert setup.samplers["ancestral"].evaluations == resolve(config_for("ddpm")).samplers["ancestral"].evaluations
    assert list(resolve(config_for("vp", changes={"sampling.second": "none"})).samplers) == ["pc"]
    second = resolve(config_for("ncsn", changes={"sampling.sampler": "ddim", "sampling.second": "ald"})).samplers["ald"]
    assert second.levels == 23 and second.step_size is not None


def test_ddpm_trains_longer_on_points_unless_told():
    chosen = {
        name: resolve(config_for("ddpm", changes={"data": name})).options.steps for name in ("digits", "swiss_roll")
    }
    assert chosen == {"digits": 1500, "swiss_roll": 5000}
    assert resolve(config_for("ddpm", changes={"data": "swiss_roll", "training.steps": 7})).options.steps == 7


def test_every_sampler_of_iddpm_clips_images_and_keeps_what_was_chosen():
    """At the cosine table's end alpha is 5e-5: an unclipped first step of any method leaves the images' range for good."""
    made = resolve(config_for("iddpm"))
    assert {name: s.corrections for name, s in made.samplers.items()} == dict.fromkeys(
        ("ancestral", "dpm_solver"), (ClipDenoised(low=-1.0, high=1.0),)
    )
    points = resolve(config_for("iddpm", changes={"data": "swiss_roll"}))
    assert all(s.corrections == () for s in points.samplers.values())


@pytest.mark.parametrize("rows", [2, 4, 10, 20])
def test_reverse_means_of_a_chain_of_few_rows(rows):
    """Steps from a row to an earlier one, each once; with the exact score in the network's place nothing differs."""
    sde = TableVPSDE(betas=tuple(torch.linspace(0.05, 0.5, rows).tolist()))
    law = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.tensor([0.3, 0.2]), torch.tensor([0.4, 0.6]))
    run = SimpleNamespace(
        sde=sde, score=law.score(sde), device="cpu", setup=SimpleNamespace(options=SimpleNamespace(seed=0))
    )
    found = compare_means(run, law, rows=rows, points=20)
    steps = [(round(one["t"] * rows / sde.T), round(one["s"] * rows / sde.T)) for one in found]
    assert len(set(steps)) == len(steps) and all(1 <= s < t <= rows for t, s in steps)
    assert max(one["rms"] for one in found) < 1e-3


def test_training_beside_a_run_without_averages_keeps_the_last_weights():
    setup = resolve(
        config_for("ddpm", changes={"data": "moons", "training.ema": (), "training.steps": 2, "model.width": 8})
    )
    made = train_beside(setup, copy.deepcopy(setup.model), DSM(), steps=2)
    assert not made.training and not all(
        torch.equal(a, b) for a, b in zip(made.parameters(), setup.model.parameters(), strict=True)
    )


def test_a_direction_that_all_share_is_none():
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    for has in (torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)):
        assert torch.equal(_difference(z, has), torch.zeros(3))
    assert torch.allclose(_difference(z, z[:, 0] > 0), z[z[:, 0] > 0].mean(0) - z[z[:, 0] <= 0].mean(0))


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_pictures_show_one_channel_or_three(channels, shown):
    assert shown_channels(torch.zeros(2, channels, 4, 4)).shape == (2, shown, 4, 4)
