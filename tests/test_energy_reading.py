"""What is read from energies, against laws in closed form; the untrained energy is a Gaussian, so all of it is known there."""

import json
import math
from pathlib import Path

import pytest
import torch

import models
from evaluation import Plane
from experiments import energy
from models import EnergyModel
from numerics import UserError
from sde_lib import VESDE
from workflow import energy_reading
from workflow.configuration import config_for
from workflow.energy_reading import Read, Reading
from workflow.plane import Truth
from workflow.run_folder import RunFolder
from workflow.setup import resolve
from workflow.systems import energy as energy_system
from workflow.trained_run import TrainedRun

PLANE = Plane(half=6.0, n=200)
SIGMA = 0.5
S_2 = 1 + SIGMA**2  # the variance of the untrained energy at that noise


def gaussian(variance, mean=0.0):
    return PLANE.law(lambda x: -(x - mean).square().sum(1) / (2 * variance))


def untrained(normalised=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.MLP(dim=2, width=8, depth=1)
    model = EnergyModel(net, VESDE(sigma_min=0.01, sigma_max=10.0), data_std=1.0, normalised=normalised)
    return model.eval().requires_grad_(False)


def read():
    return Read.of(untrained(), SIGMA, PLANE)


def test_an_untrained_energy_is_read_as_the_gaussian_that_it_is():
    """log Z = log 2 pi s^2, by quadrature and by importance sampling, and the flow's log-densities are the energy's."""
    found = read()
    assert found.law.log_z == pytest.approx(math.log(2 * math.pi * S_2), abs=1e-5)
    assert energy_reading.differences(found.law, gaussian(S_2))["nats"] < 1e-4
    plan = Reading(sigma=SIGMA, chains=200, levels=60)
    law = gaussian(0.6)
    truth = Truth(
        law=law,
        score=law.field(lambda x: -x / 0.6),
        log_density=lambda x: -x.square().sum(1) / 1.2 - math.log(2 * math.pi * 0.6),
    )
    exact = 0.6**0.5 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    z = energy_reading.normalisers(plan, found, truth, exact, seed=0)
    assert z["ais_lower_bound"] < z["quadrature"] + 3 * z["ais_stderr"]
    assert z["ais_log_mean_weight"] == pytest.approx(z["quadrature"], abs=5 * z["ais_stderr"])
    coarse, fine = z["bracket_of_the_data"].values()
    assert coarse["contains_truth"] and fine["contains_truth"]
    assert fine["upper"] - fine["lower"] < coarse["upper"] - coarse["lower"]
    points = S_2**0.5 * torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    flow = energy_reading.by_the_flow(plan, found, points)
    # the flow's prior N(0, sigma_max^2 I) leaves out the data's variance, 1 % of it
    assert flow["std_of_difference"] < 0.02 and abs(flow["nats_by_flow"] - flow["nats_by_energy"]) < 0.02


def test_an_energy_that_importance_sampling_refuses_is_read_on():
    """One that looks bounded on the grid; the bracket of the data does not ask it."""
    found = read()
    found.model.energy = lambda x, t: x.square().sum(1) / 2 - 1e3 * (x.norm(dim=1) - PLANE.half).relu().square()
    law = gaussian(1.0)
    truth = Truth(
        law=law,
        score=law.field(lambda x: -x),
        log_density=lambda x: -x.square().sum(1) / 2 - math.log(2 * math.pi),
    )
    exact = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    z = energy_reading.normalisers(Reading(sigma=SIGMA, chains=50, levels=20), found, truth, exact, seed=0)
    assert z["ais_lower_bound"] is None and "not bounded below" in z["reason"]
    assert all(b["contains_truth"] for b in z["bracket_of_the_data"].values())
    said = energy_system._normaliser(z)
    assert "importance sampling none: got an energy that is not bounded below" in said and "\n" not in said


def test_differences_are_read_at_every_level():
    """On the untrained energy, a Gaussian at every noise, they are next to nothing at all of them."""
    law = gaussian(1.0)
    truth = Truth(law=law, score=law.field(lambda x: -x), log_density=lambda x: -x.square().sum(1) / 2)
    found = energy_reading.differences_at(Reading(sigmas=(0.2, 0.5)), untrained(), truth)
    assert list(found) == ["0.2", "0.5"] and all(at["nats"] < 1e-3 and at["of"] > 0.9 for at in found.values())


def test_differences_of_a_tempered_law_are_off_by_its_exponent():
    law = gaussian(0.5)
    tempered = PLANE.law(lambda x: -0.9 * x.square().sum(1) / 1.0)
    found = energy_reading.differences(tempered, law)
    assert found["relative"] == pytest.approx(0.1, rel=1e-3) and found["of"] == pytest.approx(1.0, rel=1e-3)
    shifted = PLANE.law(lambda x: -x.square().sum(1) / 1.0 + 7.0)  # a constant is no difference
    assert energy_reading.differences(shifted, law)["relative"] < 1e-9


def test_compositions_of_gaussians_are_gaussians():
    """Product: precisions add. Negation: they subtract. Sum: half the mass at each."""
    a, b = gaussian(0.5, 0.6), gaussian(0.5, -0.6)
    make = energy_reading.compositions(0.5)
    of = energy_reading.GridLaw.of
    assert of(PLANE, make["product"](a, b)).kl(gaussian(0.25)) < 1e-9
    wide, narrow = gaussian(1.5), gaussian(0.5)
    assert of(PLANE, make["negation"](narrow, wide)).kl(gaussian(1 / (1 / 0.5 - 0.5 / 1.5))) < 1e-9
    both = of(PLANE, make["sum"](a, b))
    half = (PLANE.points.sum(dim=1) > 0).reshape(PLANE.n, PLANE.n)
    assert float(both.mass[half].sum()) == pytest.approx(0.5, abs=0.02)
    assert float(both.mass.sum()) == pytest.approx(1.0, abs=1e-9) and both.log_z == pytest.approx(math.log(2), abs=1e-6)
    same = energy_reading.composed(0.5, (a, b), (a, b))
    assert set(same) == {"product", "sum", "negation"} and all(
        c["kl"] == 0 and c["relative"] == 0 for c in same.values()
    )


@pytest.mark.parametrize("m", [1.5, 2.5, 3.5])
def test_a_product_may_be_where_neither_law_is(m):
    """N((-m, -m), I / 4) and N((m, m), I / 4) have the product N(0, I / 8), of no density to speak of in either."""
    a, b = gaussian(0.25, -m), gaussian(0.25, m)
    product = energy_reading.composed(0.0, (a, b), (a, b))["product"]["laws"][0]
    assert gaussian(0.125).kl(product) < 1e-9


def test_chains_are_measured_against_the_law():
    """MALA ends at the law's energy, a long SGLD above it by 1 / (1 - h^2 / 4 v) - 1 nats; a longer one is stopped."""
    found = read()
    plan = Reading(sigma=SIGMA, chains=3000, length=40, steps=(1.0, 2.5))
    rows, x = energy_reading.chains(plan, found.law, energy_reading.log_density(found.model, found.t), seed=0)
    sgld, mala, stopped, last = rows
    assert abs(mala["energy_off"]) < 4 * mala["energy_stderr"] and 0.5 < mala["acceptance"] < 1
    expected = 1 / (1 - 1 / (4 * S_2)) - 1  # E has mean 1 in two dimensions
    assert sgld["energy_off"] == pytest.approx(expected, abs=4 * sgld["energy_stderr"])
    assert sgld["energy_off"] > 4 * sgld["energy_stderr"]
    assert "diverges" in stopped["diverged"] and "acceptance" in last and x.shape == (3000, 2)
    floor = energy_reading.floor(found.law, 3000)
    assert mala["total_variation"] == pytest.approx(floor, rel=0.3)
    assert energy_reading.total_variation(found.law, torch.zeros(3000, 2)) > 0.9


def test_refusals():
    for changes, words in (
        ({"data.name": "digits"}, "points in the plane"),
        ({"second.name": "digits"}, "config.second.name"),
        ({"second.name": "checkerboard"}, "config.second: got a density whose integral"),
        (
            {"second.radius": 40.0, "second.layout": "ring"},
            "config.second: got gaussians with points as far out as .* up to",
        ),
        ({"second.train": 8000}, "config.second with 8,000 points .*batch_size=8192"),
        ({"model.class_conditional": True}, "class_conditional=True"),
        ({"energy.gamma": 2.0}, "gamma"),
        ({"energy.steps": ()}, "one step or more"),
        ({"energy.sigmas": (0.1, 3.0)}, "config.energy.sigmas"),
        ({"energy.sigmas": (0.1, 0.02)}, "the noise level 0.02 for energy"),
        ({"energy.sigmas": ()}, "one noise level or more"),
        ({"energy.sigmas": (0.2, 0.2)}, "each once"),
        ({"energy.sigma": 20.0}, "config.energy.sigma=20.0"),
        ({"energy.sigma": 1.0}, "config.energy.sigma=1.0"),
        ({"sde.sigma_max": 0.15}, "the noise level 0.2 of config.energy"),
        ({"model.parametrization": "noise"}, "preconditioned"),
    ):
        with pytest.raises(UserError, match=words):
            few = {f"{part}.train": 20_000 for part in ("data", "second") if f"{part}.name" not in changes}
            resolve(config_for("energy", changes={**few, **changes}))
    with pytest.raises(UserError, match="the noise level 100.0 of config.energy"):
        Read.of(untrained(), 100.0, PLANE)


def test_a_second_energy_without_averages_has_its_last_weights_and_is_not_trained_again(tmp_path):
    changes = {
        "data.train": 3000,
        "second.train": 2000,
        "training.ema": (),
        "training.steps": 2,
        "training.batch_size": 64,
    }
    setup = resolve(config_for("energy", changes={**changes, "training.warmup": 1}))
    run = TrainedRun(folder=RunFolder(Path("nowhere")), setup=setup, step=2, fingerprint="")
    second = setup.system._second(run, RunFolder(tmp_path))
    assert not second.training and bool((next(second.parameters()) != next(setup.model.parameters())).any())
    checkpoint = max(tmp_path.glob("second-*/checkpoints/*"))
    written = checkpoint.stat().st_mtime_ns
    again = setup.system._second(run, RunFolder(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), second.parameters(), strict=True))
    assert max(tmp_path.glob("second-*/checkpoints/*")).stat().st_mtime_ns == written


def test_energies_that_cannot_be_read_are_said_to_be(tmp_path, monkeypatch):
    """The run ends as it should, with its training and samples."""
    changes = {"data.train": 2000, "second.train": 2000, "training.steps": 2, "training.batch_size": 64}
    setup = resolve(config_for("energy", changes={**changes, "training.warmup": 1}))
    run = TrainedRun(folder=RunFolder(tmp_path), setup=setup, step=2, fingerprint="")

    def wide(*_):
        raise UserError("got a law with 8e-05 of its largest density at the edges")

    monkeypatch.setattr(Read, "of", wide)
    with pytest.warns(UserWarning, match="the energies are not read: got a law with 8e-05"):
        setup.system.finish(run, RunFolder(tmp_path))
    found = json.loads((tmp_path / "results.json").read_text())["energy"]
    assert found == {
        "sigma": setup.system.plan(setup.config).sigma,
        "unbounded": "got a law with 8e-05 of its largest density at the edges",
    }
    assert "Not read at sigma" in (tmp_path / "report.md").read_text()


def test_the_model_is_an_energy_whose_score_is_its_gradient():
    model = resolve(config_for("energy", changes={"data.train": 20_000, "second.train": 20_000})).model
    assert isinstance(model, EnergyModel)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (slope,) = torch.autograd.grad(model.energy(x, torch.tensor(0.4)).sum(), x)
    torch.testing.assert_close(model(x, torch.tensor(0.4)), -slope, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_system_goes_through(tmp_path):
    assert energy.main(["--dry_run", "--quiet", f"--workdir={tmp_path}"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["energy"]
    assert found["log_z"]["ais_lower_bound"] < found["log_z"]["quadrature"]
    assert set(found["compositions"]) == {"product", "sum", "negation"}
    assert (tmp_path / "energy.png").exists() and (tmp_path / "compositions.png").exists()
    by_objective = found["objectives"]
    assert set(by_objective) == {"denoising", "stable target", "sliced", "exact", "dual"}
    assert all(e["milliseconds"] > 0 and ("differences_at" in e or "unbounded" in e) for e in by_objective.values())
    assert (tmp_path / "objectives.png").exists() and "| stable target |" in (tmp_path / "report.md").read_text()


def test_the_objectives_that_are_compared_have_one_minimiser():
    """On data of one Gaussian their gradients agree in the mean: at the true energy each is 0 within its error."""
    from sde_lib.analytic import Gaussian
    from training import LogNormal, StableTarget
    from training.streams import StepStreams
    from workflow import energy_objectives

    model = untrained(normalised=True).requires_grad_(True)  # the energy of N(0, I) at every noise
    law = Gaussian(torch.zeros(2), torch.eye(2))
    for objective in energy_objectives.by_name(StableTarget(times=LogNormal(mean=-0.5, std=0.7))).values():
        found = []
        for i in range(40):
            x_0 = law.sample(64, generator=torch.Generator().manual_seed(i)).float()
            draws = objective.draw(model.sde, x_0.shape, StepStreams(0, i))
            loss = (objective.loss(model, x_0, draws, None) * draws["weight"]).mean()
            found.append(torch.autograd.grad(loss, model.net.net.output.weight)[0].flatten())
        found = torch.stack(found).double()
        z = found.mean(dim=0) / (found.std(dim=0) / math.sqrt(len(found))).clamp(min=1e-12)
        assert float(z.abs().max()) < 4.0


def test_objectives_without_times_are_not_compared():
    with pytest.raises(UserError, match="no law of times"):
        resolve(config_for("energy", changes={"training.objective": "maximum_likelihood"}))
