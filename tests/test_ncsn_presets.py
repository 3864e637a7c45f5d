"""NCSN as published, and its kind of network on the digits: every level finds its own weights."""

import json

import pytest
import torch

import models
from experiments import ncsn
from numerics import UserError
from samplers import AnnealedLangevin
from sde_lib import noise_levels
from workflow import systems
from workflow.configuration import config_for
from workflow.setup import resolve

SYSTEM = systems.create("ncsn")


def test_cifar10_is_the_published_one():
    """Ten levels from 1 to 0.01, 100 steps of each at 2e-5, no denoising, no averages: Song and Ermon 2019 and their code."""
    config = config_for("ncsn", "cifar10")
    ladder, published = SYSTEM.ladder(config), AnnealedLangevin.ncsn()
    assert (ladder.levels, ladder.sigma_max, ladder.sigma_min) == (10, 1.0, 0.01)
    drawn_by = SYSTEM.sampler(config, config["sampling"]["sampler"])
    for name in ("levels", "steps", "step_size", "denoise"):
        assert getattr(drawn_by, name) == getattr(published, name)
    training = config["training"]
    assert (training["ema"], training["clip"], training["learning_rate"]) == ((), None, 1e-3)
    assert (training["steps"], training["batch_size"], training["flip"]) == (200_000, 128, True)
    own = {k: v for k, v in config["model"].items() if k in models.options("ncsn")}
    with torch.device("meta"):
        net = models.create(config["model"]["name"], **own)
    assert sum(p.numel() for p in net.parameters()) == models.presets.PRESETS["ncsn_cifar10"].parameters
    assert net.conditional and not net.centered and net.options["sigmas"] == SYSTEM.sde(config).sigmas[::-1]
    # what the second paper's rule would have chosen there
    assert noise_levels.number_of_levels(50.0, 0.01, 3 * 32 * 32, mass=0.5) == 219


def test_each_level_of_the_digits_ladder_has_weights_of_its_own():
    config = config_for("ncsn", "conditional")
    model, sde = resolve(config).model.eval(), SYSTEM.sde(config)
    L = config["sde"]["levels"]
    t = torch.arange(L - 1, -1, -1, dtype=torch.float64) / (L - 1)
    assert model.conditioning(sde, t).tolist() == list(range(L))
    torch.testing.assert_close(model.net.sigmas, sde.sigma(t), rtol=1e-9, atol=0)
    assert model.net.output_norm.gamma.shape[0] == L
    x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(L, -1, -1, -1)
    before = model(x, t)
    with torch.no_grad():
        model.net.output_norm.gamma[7] *= 2
    changed = (model(x, t) != before).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [7]


def test_its_output_is_the_score():
    model = resolve(config_for("ncsn", "conditional")).model.eval()
    x, t = (
        torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    torch.testing.assert_close(model(x, t), model.net(x, torch.tensor([0.0, 22.0])))


def test_a_network_that_is_told_other_levels_than_it_has_is_refused():
    for changes, told in (
        ({"model.conditioning.levels": 10}, "'discrete_index' of 10 levels"),
        ({"model.conditioning": "log_snr"}, "'log_snr' of no levels"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            SYSTEM.check(config_for("ncsn", "conditional", changes=changes))
        assert "config.model.conditioning.levels=23" in str(caught.value)


def test_a_network_of_other_levels_than_the_ladders_is_refused():
    for preset in ("conditional", "cifar10"):
        with pytest.raises(UserError, match=r"sde\.levels=12") as caught:
            SYSTEM.check(config_for("ncsn", preset, changes={"sde.levels": 12}))
        assert "\n" not in str(caught.value)
        SYSTEM.check(config_for("ncsn", preset))
    SYSTEM.check(config_for("ncsn"))


@pytest.mark.slow
def test_the_conditional_network_goes_through(tmp_path):
    assert ncsn.main(["--preset=conditional", "--dry_run", "--quiet", f"--workdir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["bits_per_dim"]["kind"] == "exact" and results["sampling"]["sampler"].startswith("AnnealedLangevin")
