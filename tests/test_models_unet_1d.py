"""The U-Net over sequences: every place counts and keeps its place, any length, and it learns a law that is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import data
import models
from experiments import nll, sample, vp
from likelihood import log_likelihood
from models import ScoreModel, UNet1d, for_data
from numerics import UserError
from sde_lib import VPSDE
from training import TrainingOptions, train

pytestmark = pytest.mark.usefixtures("loose_pilots")

LABEL = torch.tensor([0.3, -1.0])


def moved(net: torch.nn.Module) -> torch.nn.Module:
    """With weights that are not zero anywhere."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.double().eval()


@pytest.mark.parametrize("length", [8, 9, 31, 64])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 2)])
def test_every_place_counts_and_keeps_its_place(length: int, multipliers: tuple[int, ...]) -> None:
    net = moved(UNet1d(in_channels=2, length=length, channels=8, multipliers=multipliers))
    x = torch.randn(2, 2, length, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: net(z, LABEL.double())[0].sum(dim=0), x)[:, 0]
    assert net(x, LABEL.double()).shape == x.shape
    assert bool((jacobian.abs().sum(dim=1) > 0).all())  # (L, L): every place depends on every other
    if length >= 31:  # in shorter ones everything is near
        strength, near = jacobian.abs().sum(dim=1), length // 4
        assert strength[0, :near].mean() > 2 * strength[0, -near:].mean()
        assert strength[-1, -near:].mean() > 2 * strength[-1, :near].mean()


def test_samples_do_not_see_each_other() -> None:
    net = moved(UNet1d(channels=8, num_classes=3))
    x, classes = torch.randn(2, 1, 17, dtype=torch.float64), torch.tensor([0, 2])
    both = net(x, LABEL.double(), classes)
    for i in range(2):
        torch.testing.assert_close(net(x[i : i + 1], LABEL[i : i + 1].double(), classes[i : i + 1]), both[i : i + 1])
    assert not torch.equal(net(x, LABEL.double(), torch.tensor([1, 2]))[0], both[0])
    assert not torch.equal(net(x, LABEL.double().flip(0), classes), both)


def test_auto_chooses_it_for_sequences() -> None:
    assert isinstance(for_data("auto", (3, 16), channels=8, width=32), UNet1d)
    assert type(for_data("auto", (3, 7))).__name__ == "MLP"
    described = models.networks.describe(for_data("auto", (3, 16), 4, channels=8))
    assert described["name"] == "unet_1d" and described["options"]["num_classes"] == 4
    long = for_data("unet_1d", (1, 16_000), channels=8)
    assert isinstance(long.attention, torch.nn.Identity)
    assert isinstance(for_data("unet_1d", (1, 16_000), channels=8, multipliers=(1,) * 6).attention, torch.nn.Module)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"kernel": 4}, "got kernel=4; expected an odd"), ({"heads": 3}, "heads=3"), ({"channels": 0}, "channels=0")],
)
def test_what_does_not_fit_is_refused(options: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        UNet1d(**options)
    with pytest.raises(UserError, match=r"expected sequences \(B, 1, L\)"):
        UNet1d()(torch.zeros(2, 3, 8), LABEL)


def waves(n: int, length: int = 16) -> torch.Tensor:
    """A Gaussian process (n, 1, length): smooth noise, x_i = 0.8 x_(i-1) + 0.6 z_i, stationary with variance 1."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(n, generator=generator)]
    for _ in range(length - 1):
        x.append(0.8 * x[-1] + 0.6 * torch.randn(n, generator=generator))
    return torch.stack(x, dim=1).unsqueeze(1)


@pytest.mark.slow
def test_it_learns_a_gaussian_process() -> None:
    """The negative log-density comes near to the entropy, L/2 log(2 pi e) + (L - 1) log 0.6: to a fifth of what places that
    are taken for independent lack."""
    dataset = data.from_tensor(waves(4000))
    sde, transform = VPSDE(), dataset.transform()
    torch.manual_seed(0)
    model = ScoreModel(for_data("auto", (1, 16), channels=16), sde, models.Preconditioned(data_std=1.0), data_std=1.0)
    options = TrainingOptions(steps=250, batch_size=128, learning_rate=4e-3, warmup=20, ema=(0.97,), progress=False)
    train(model, dataset.split("train"), transform, options)
    x = transform(dataset.split("test").x[:100])
    nats = -(log_likelihood(sde, model.eval(), x).log_prob + 16 * transform.log_det)
    entropy = 8 * math.log(2 * math.pi * math.e) + 15 * math.log(0.6)
    independent = 8 * math.log(2 * math.pi * math.e)
    stderr = float(nats.std()) / 10
    assert entropy - 3 * stderr < float(nats.mean()) < entropy + 0.2 * (independent - entropy)


def test_sequences_run_from_the_command_line(tmp_path) -> None:
    np.save(
        tmp_path / "waves.npy",
        100 + 5 * waves(60, 24).repeat(1, 2, 1).numpy() + np.random.RandomState(0).randn(60, 2, 24),
    )
    flags = {
        "training.steps": 3, "training.warmup": 1, "training.batch_size": 8, "training.log_every": 1, "training.eval_every": 3,
        "training.validation": 4, "sampling.steps": 2, "sampling.second_steps": 2, "sampling.n": 4, "likelihood.steps": 2,
        "likelihood.limit": 4, "likelihood.probes": 1, "model.channels": 8, "data.name": "arrays",
        "data.root": tmp_path / "waves.npy", "baselines": False,
    }  # fmt: skip
    run = tmp_path / "run"
    vp.main([f"--workdir={run}", *(f"--config.{name}={value}" for name, value in flags.items())])
    results = json.loads((run / "results.json").read_text())
    assert math.isfinite(results["bits_per_dim"]["mean"])
    sample.main(["--run", str(run), "--sampler", "dpm_solver", "--steps", "2", "--n", "3"])
    nll.main(["--run", str(run), "--steps", "2", "--limit", "2"])
