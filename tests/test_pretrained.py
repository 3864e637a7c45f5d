"""The models that come with the project: they sample, they score, and a trained float32 network keeps batch mates apart."""

import math
from pathlib import Path

import pytest
import torch

import data
from guidance import classifier_free
from likelihood import Hutchinson, Method, log_likelihood
from likelihood.steps import fast_on
from models import ScoreModel
from numerics import Dopri5, SampleStreams, uniform
from samplers import DDIM, DPMSolver
from sde_lib import WhitenedFlow

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
FOLDERS = sorted(folder.parent for folder in PRETRAINED.glob("*/card.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_weighs_at_most_5_mb_and_samples_within_the_data(folder):
    assert sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) <= 5e6
    model = ScoreModel.from_pretrained(folder)
    size = {"digits": 8, "fashion_mnist": 28}[model.card["config"]["data"]["name"]]
    found = DPMSolver(steps=10)(model.sde, model, (2, 1, size, size), generator=SampleStreams(0))
    low, high = model.data_range
    outside = (found.x.clamp(low, high) - found.x).abs()
    assert found.nfe == 11 and float(outside.max()) < 0.3
    assert float(found.x.std()) > 0.25 * (high - low) / 2  # a picture, not a grey plane


def digits() -> tuple[ScoreModel, torch.Tensor, torch.Tensor]:
    """The model, six dequantised test images `(6, 1, 8, 8)`, and their ids."""
    model, dataset = ScoreModel.from_pretrained(PRETRAINED / "vp_digits"), data.create("digits")
    split = dataset.split("test").take(slice(0, 6))
    noise = uniform(split.x.shape, SampleStreams(0, split.ids), device="cpu", dtype=torch.float32)
    return model, dataset.transform()(split.x + noise), split.ids


@pytest.mark.slow
def test_batch_mates_move_a_float32_value_by_less_than_the_stated_error():
    """Permuting, splitting, and adding a far outlier."""
    model, x, ids = digits()
    outlier = 5 * torch.ones_like(x[:1])

    def value(x, ids):
        return log_likelihood(
            model.sde,
            model,
            x,
            divergence=Hutchinson(fresh=False),
            method=Method(Dopri5(rtol=1e-4, atol=1e-4), flow=WhitenedFlow(data_std=model.data_std)),
            generator=SampleStreams(1, ids),
        )

    alone = value(x, ids)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    mixed = value(torch.cat([x[order], outlier]), torch.cat([ids[order], torch.tensor([99_999])]))
    parts = [value(x[:2], ids[:2]), value(x[2:], ids[2:])]
    assert bool(alone.converged.all())
    # float32 rounds otherwise in another batch, and the steps follow: two solutions, each off by its own error
    for other, error in (
        (mixed.log_prob[:6][order.argsort()], mixed.solver_error[:6][order.argsort()]),
        (torch.cat([p.log_prob for p in parts]), torch.cat([p.solver_error for p in parts])),
    ):
        assert bool(((other - alone.log_prob).abs() <= alone.solver_error + error).all())


@pytest.mark.slow
def test_the_stated_error_covers_the_error_made():
    """Against an adaptive solution at a hundredth of the tolerance."""
    model, x, ids = digits()
    found = [
        log_likelihood(
            model.sde,
            model,
            x,
            divergence=Hutchinson(fresh=False),
            method=Method(Dopri5(rtol=tolerance, atol=tolerance), flow=WhitenedFlow(data_std=model.data_std)),
            generator=SampleStreams(1, ids),
        )
        for tolerance in (1e-4, 1e-6)
    ]
    error = (found[0].log_prob - found[1].log_prob).abs()
    assert bool((error <= found[0].solver_error).all())


def test_the_class_conditional_model_knows_what_it_was_asked_for():
    """Samples guided to a class are likeliest under that class, by the flow's likelihood."""
    model = ScoreModel.from_pretrained(PRETRAINED / "classes_fashion_mnist")
    assert model.num_classes == 10 and model.learned_without_class
    asked = torch.tensor([1, 9])  # a trouser, an ankle boot
    x = DDIM(steps=10)(model.sde, classifier_free(model, asked, 2.0), (2, 1, 28, 28), generator=SampleStreams(0)).x
    method = fast_on(None, steps=12, data_std=model.data_std)
    found = [
        log_likelihood(model.sde, model.condition(int(k)), x, method=method, generator=SampleStreams(1)).log_prob
        for k in asked
    ]
    log_probs = torch.stack(found, dim=1)
    assert log_probs.argmax(dim=1).tolist() == [0, 1]
    # nats in model units, two of which are 256 grey levels
    bits = 7 - log_probs.diagonal() / (28 * 28 * math.log(2))
    assert bool(((bits > 1.0) & (bits < 4.5)).all())
