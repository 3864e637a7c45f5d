"""Whole settings by name: every preset of every script makes its objects, and the published ones train two steps."""

import math
from dataclasses import replace

import pytest
import torch

from data import from_tensor
from experiments import build, presets, sub_vp, ve, vp
from training import train

SCRIPTS = {"vp": vp, "ve": ve, "sub_vp": sub_vp}
SIZES = {"digits": (1, 8), "fashion_mnist": (1, 28), "cifar10": (3, 32), "cifar10_deep": (3, 32), "image_256": (3, 256)}
PARAMETERS = {
    ("cifar10", "vp"): 61_804_419,
    ("cifar10", "ve"): 62_758_787,
    ("cifar10_deep", "sub_vp"): 106_632_579,
    ("cifar10_deep", "ve"): 107_586_947,
}


def pictures(name: str, n: int = 4):
    """Random images of the preset's size, 256 grey levels (17 for the digits)."""
    channels, size = SIZES[name]
    x = torch.randint(0, 17 if name == "digits" else 256, (n, channels, size, size), dtype=torch.uint8)
    return from_tensor(x, levels=17 if name == "digits" else 256)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_makes_its_objects(name, script):
    config = presets.apply(SCRIPTS[script].get_config(), name)
    dataset = pictures(name)
    with torch.device("meta"):
        net = build.network(config, dataset, 0.5)
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert count == PARAMETERS.get((name, script), count)
    assert build.options(config).steps == config.training.steps
    build.objective(config)
    build.parametrization(config, 0.5)
    if name != "digits" and script == "ve":  # the largest distance between two images in this range is of that order
        size = math.prod(dataset.event_shape) ** 0.5 * (config.data.high - config.data.low)
        assert 0.3 * size < build.sde(config).sigma_max < 1.3 * size


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="fashion_mnist"):
        presets.apply(vp.get_config(), "fashion")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_published_cifar10_settings_train(script):
    """Two steps of two images on random data. Published blocks begin as the identity: most weights wait behind a zero."""
    config = presets.apply(SCRIPTS[script].get_config(), "cifar10")
    dataset = pictures("cifar10")
    model = build.model(config, dataset)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    options = replace(build.options(config), steps=2, batch_size=2, warmup=1, log_every=1, progress=False)
    found = train(
        model, dataset.split("train"), build.transform(config, dataset), options, objective=build.objective(config)
    )
    assert all(math.isfinite(loss) for _, loss in found.losses)
    moved = [not torch.equal(v, before[k]) for k, v in model.net.state_dict().items() if v.is_floating_point()]
    assert sum(moved) > 0.2 * len(moved), (sum(moved), len(moved))
