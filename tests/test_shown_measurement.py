"""A network that is shown the measurement: its loss is least at the posterior's score, and it looks at what it is shown."""

from __future__ import annotations

import json

import pytest
import torch
from test_experiments import called, refused
from test_measurements import random
from test_posterior import law

from guidance import Downsample, LinearMap, Measurement, MomentMatching, posterior
from models import MLP, ScoreModel, for_data
from numerics import UserError
from samplers import DPMSolver
from sde_lib import VPSDE
from training.streams import StepStreams
from workflow.shown_measurement import ShownDSM, ShownModel, back_projected
from workflow.tools import restore as restore_tool

SHAPE, SDE = (1, 4, 4), VPSDE()


class Exact:
    """What answers `given` with the exact posterior's score under a noise, plus a little of some direction."""

    sde = SDE

    def __init__(self, std, step=0.0, direction=None, blind=False):
        self.std, self.step, self.direction, self.blind = std, step, direction, blind

    def given(self, shown):
        self.shown, oracle = shown, law(SHAPE)
        y = Downsample(2)(shown)  # A A^+ y
        method = MomentMatching(iterations=6)
        self.score = oracle.score(SDE)
        if not self.blind:
            self.score = posterior(SDE, self.score, Measurement(Downsample(2), y, self.std), method=method)
        return self

    def noise(self, x, t):
        eps = -SDE.sigma(t).reshape(-1, 1, 1, 1) * self.score(x, t)
        return eps + self.step * {"seen": self.shown, "state": x, "itself": eps}[self.direction]


def slopes(direction, std=0.3, **options):
    """Of the loss along the direction, mean and standard error, where measurements have noise 0.3."""
    measured = Measurement(Downsample(2), random(1, 1, 2, 2), 0.3)
    objective = ShownDSM(measured=measured)
    x_0 = law(SHAPE).sample(4000, generator=torch.Generator().manual_seed(1))
    draws = objective.draw(SDE, x_0.shape, StepStreams(0, 0), dtype=torch.float64)
    up, down = (objective.loss(Exact(std, h, direction, **options), x_0, draws, None) for h in (0.5, -0.5))
    found = up - down
    return float(found.mean()), float(found.std()) / len(found) ** 0.5


@pytest.mark.parametrize("direction", ["seen", "state", "itself"])
def test_the_exact_posterior_is_where_the_loss_is_stationary(direction):
    mean, error = slopes(direction)
    assert abs(mean) < 3.5 * error


def test_other_scores_are_not():
    for options in ({"blind": True}, {"std": 0.9}):
        mean, error = slopes("seen", **options)
        assert abs(mean) > 6 * error


def small():
    """An untrained model whose output depends on everything."""
    net = for_data("ncsnpp", (1, 8, 8), channels=8, multipliers=(1,), blocks=1, init_scale=1.0)
    return ShownModel.beside(ScoreModel(net, SDE, data_std=0.5), seed=0).eval()


def test_permuting_what_is_shown_permutes_the_samples():
    model, shown = small().double(), random(3, 1, 8, 8)
    sampler, x_T = DPMSolver(steps=4), random(1, 1, 8, 8, seed=2).expand(3, 1, 8, 8)
    draw = lambda score, n=3: sampler(SDE, score, (n, 1, 8, 8), x_T=x_T[:n]).x
    found = draw(model.given(shown))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(draw(model.given(shown[order])), found[order], atol=1e-8, rtol=1e-8)
    assert min(float((found[i] - found[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2))) > 0.01
    index = torch.tensor([1])
    torch.testing.assert_close(draw(model.given(shown).take(index), 1), found[index], atol=1e-8, rtol=1e-8)


def test_the_seed_gives_the_weights():
    one, same = small(), small()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))


def test_what_is_refused():
    with pytest.raises(UserError, match="take"):
        small().given(torch.zeros(2, 1, 8, 8))(torch.zeros(3, 1, 8, 8), torch.tensor(0.5))
    with pytest.raises(UserError, match="sr3_steps"):
        ShownModel.beside(ScoreModel(MLP(2, width=8), SDE), seed=0)
    functions = Measurement(LinearMap(lambda x: 2 * x, lambda y: 2 * y), torch.zeros(1, 3), 0.1)
    with pytest.raises(UserError, match="singular values"):
        back_projected(functions)


def test_any_run_gets_a_row_of_its_own(tmp_path):
    asked = ("--images", 2, "--samples", 2, "--steps", 3, "--quiet", "--methods", "DDNM", "--sr3_steps", 2)
    names = ("--problems", "super-resolution,denoising")
    called(restore_tool.main, "--run", "pretrained/vp_digits", *asked, *names, f"--workdir={tmp_path}")
    rows = json.loads((tmp_path / "results.json").read_text())["inverse"]["rows"]
    assert [(r["problem"], r["method"]) for r in rows] == [
        ("super-resolution", "DDNM"),
        ("super-resolution", "SR3"),
        ("denoising", "DDNM"),
    ]
    assert rows[1]["nfe"] == 4
    assert "likelihood says" not in (tmp_path / "report.md").read_text()  # no level was unknown
    refused(called(restore_tool.main, "--run", "pretrained/vp_digits", "--sr3_steps", -1, check=False), 2, "sr3_steps")
