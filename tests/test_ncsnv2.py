"""NCSNv2's ladder and step from the data, and what noise levels are for, on an exact score."""

import json
import math
from dataclasses import replace

import pytest
import torch

import data
from experiments import ncsnv2
from numerics import UserError
from sde_lib import noise_levels
from workflow import systems
from workflow.configuration import config_for
from workflow.low_density import low_density
from workflow.setup import resolve
from workflow.sigma_ladder import SigmaLadder
from workflow.systems.ncsnv2 import RuledLangevin

SYSTEM = systems.create("ncsnv2")


def test_the_ladder_follows_the_data_and_what_is_given_stands():
    digits = data.create("digits")
    x = digits.transform().centres(digits.split("train").x).flatten(1)
    ladder = SYSTEM.ladder(config_for("ncsnv2"))
    assert ladder.sigma_max == pytest.approx(float(torch.cdist(x, x).max()), rel=1e-5)
    gamma = (ladder.sigma_max / 0.01) ** (1 / (ladder.levels - 1))
    assert noise_levels.overlap(gamma, 64) == pytest.approx(0.5, abs=0.02)
    given = SYSTEM.ladder(config_for("ncsnv2", changes={"sde.sigma_max": 50.0, "sde.levels": 232}))
    assert given.levels == 232 and given.sigma_max == 50.0


def test_the_step_is_technique_4s_stretched_unless_given():
    ladder = {"sde.sigma_max": 50.0, "sde.levels": 232}
    config = config_for("ncsnv2", changes={**ladder, "sampling.sampler.stretch": 1.0})
    made = SYSTEM.sampler(config, config["sampling"]["sampler"])
    gamma = (50.0 / 0.01) ** (1 / 231)
    assert made.levels == 232 and made.steps == 5 and made.denoise
    assert made.step_size == 2 * noise_levels.langevin_step(gamma, 0.01, 5)
    own = config_for("ncsnv2", changes=ladder)
    assert SYSTEM.sampler(own, own["sampling"]["sampler"]).step_size == pytest.approx(3.7 * made.step_size)
    given = config_for("ncsnv2", changes={"sampling.sampler.step_size": 1.24e-5})
    assert SYSTEM.sampler(given, given["sampling"]["sampler"]).step_size == 1.24e-5


def test_the_network_is_told_no_noise_level():
    """Technique 3: sigma score is one function of x."""

    model = resolve(config_for("ncsnv2")).model.eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    products = [model.sde.sigma(torch.tensor(t)) * model(x, torch.tensor(t)).double() for t in (0.0, 0.33, 1.0)]
    for other in products[1:]:
        torch.testing.assert_close(other, products[0], rtol=1e-5, atol=1e-6)
    assert float(products[0].abs().max()) > 1e-3


def test_langevin_loses_the_modes_weights_and_annealing_keeps_them(tmp_path):
    found = low_density(1000, steps=1000)
    found.save(tmp_path / "low_density.png")
    assert (tmp_path / "low_density.png").stat().st_size > 10_000
    shares = found.asdict()
    assert abs(shares["langevin"] - 0.5) < 4 * math.sqrt(0.25 / 1000)  # the start's, not the law's
    assert abs(shares["annealed"] - 0.8) < 0.06 and abs(shares["exact"] - 0.8) < 4 * shares["stderr"]


def test_cifar10_is_the_published_one():
    """232 levels where the rule has 219, the paper's step, and the network with its own sigmas."""
    config = config_for("ncsnv2", "cifar10")
    assert (
        config["model"]["name"] == "ncsnv2_cifar10" and len(config["model"]["sigmas"]) == config["sde"]["levels"] == 232
    )
    assert config["model"]["conditioning"] == {"name": "discrete_index", "levels": 232, "reverse": True}
    assert config["sampling"]["sampler"]["step_size"] / 2 == pytest.approx(6.2e-6)
    assert config["training"]["ema"] == (0.999,) and config["training"]["steps"] == 300_000


def test_refusals():
    for changes, words in (
        ({"sde.mass": 1.5}, "mass"),
        ({"sde.levels": 1}, "levels"),
        ({"sde.sigma_min": 1e3}, "largest distance"),
    ):
        with pytest.raises(UserError, match=words):
            SYSTEM.ladder(config_for("ncsnv2", changes=changes))


def test_a_score_of_one_length_falls_behind_in_technique_4s_step():
    """Layers that normalise leave a pull that does not grow with the distance. Of data in one point, 23 levels of 5 such steps
    end within 1.2 of the last level's noise on the exact score, and far outside on one of the same length everywhere; steps
    3.7 times as long end near it on both."""
    ladder = SigmaLadder(levels=23, sigma_max=9.0, sigma_min=0.01)
    g = torch.Generator().manual_seed(0)

    def end(stretch, score):
        sampler = replace(RuledLangevin(stretch=stretch).on(ladder), denoise=False)
        x = sampler(ladder.sde, score, (50, 64), generator=g).x
        return float(x.square().mean().sqrt()) / ladder.sigma_min

    def sigma(x, t):
        return ladder.sde.sigma(t).to(x.dtype).unsqueeze(1)

    def exact(x, t):
        return -x / sigma(x, t).square()

    def of_one_length(x, t):
        return -8 * x / (x.norm(dim=1, keepdim=True) * sigma(x, t))

    assert end(1.0, exact) < 1.2 and end(1.0, of_one_length) > 3
    assert end(3.7, exact) < 1.5 and end(3.7, of_one_length) < 1.6


@pytest.mark.parametrize("name", ["ncsn", "ncsnv2"])
def test_a_step_that_diverges_is_refused_before_the_training(name):
    resolve(config_for(name, changes={"sampling.sampler.step_size": 3.9e-4}))
    with pytest.raises(UserError, match="above which the chain diverges"):
        resolve(config_for(name, changes={"sampling.sampler.step_size": 4e-4}))


@pytest.mark.slow
def test_the_system_goes_through(tmp_path):
    assert ncsnv2.main(["--dry_run", "--quiet", f"--workdir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["low_density"]["truth"] == 0.8 and results["noise_levels"]["mass"] == pytest.approx(0.5, abs=0.02)
    assert results["bits_per_dim"]["kind"] == "exact" and (tmp_path / "low_density.png").exists()
