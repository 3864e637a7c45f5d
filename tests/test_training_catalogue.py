"""Objectives, weightings and times by name: all of them train, all of their fields can be given."""

import inspect
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn
from training_cases import options, points, tiny_model

import models
import training
from numerics import UserError
from sde_lib import VESDE, VPSDE, TableVESDE, TableVPSDE, geometric_sigmas, linear_betas
from training import (
    DSM,
    OBJECTIVES,
    TIMES,
    VLB,
    WEIGHTINGS,
    DDPMSimple,
    DiscreteTime,
    Hybrid,
    ImportanceTime,
    MinSNR,
    Objective,
    Reflow,
    Simple,
    StratifiedTime,
    TabulatedTime,
    TimeSampler,
    TrainingOptions,
    UsageError,
    Weighting,
    options_help,
    train,
)


class TwoHeads(nn.Module):
    """A network of twice the channels, whose second half is the variance's place between its bounds."""

    learned_variance = True

    def __init__(self):
        super().__init__()
        self.net = models.MLP(dim=2, width=16, depth=1)
        self.second = nn.Parameter(torch.zeros(()))

    def forward(self, x, label, class_label=None):
        first = self.net(x, label)
        return torch.cat([first, self.second.expand_as(first)], dim=1)


def model_for(name):
    if name == "smld":
        return tiny_model(TableVESDE(sigmas=geometric_sigmas()), wild=True)
    if name == "hybrid":
        return models.ScoreModel(TwoHeads(), TableVPSDE(betas=linear_betas()))
    if name == "dual":
        return models.EnergyModel(models.MLP(dim=2, width=16, depth=1), VPSDE(), data_std=1.0, normalised=True)
    return tiny_model(VPSDE(), wild=True)


def one_step(objective, model):
    """The loss of an update that changed the weights."""
    before = [p.detach().clone() for p in model.parameters()]
    result = train(model, points(), None, options(steps=1, log_every=1), objective=objective)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return result.losses[-1][1]


@pytest.mark.parametrize("name", training.available())
def test_every_objective_trains_with_its_defaults(name):
    assert math.isfinite(one_step(training.create(name), model_for(name)))


@pytest.mark.parametrize("name", WEIGHTINGS.available())
def test_every_weighting_trains_with_its_defaults(name):
    loss = one_step(training.create("dsm", weighting=name), model_for("dsm"))
    simple = one_step(training.create("dsm"), model_for("dsm"))
    assert math.isfinite(loss) and (name == "simple") == (loss == simple)


@pytest.mark.parametrize("name", TIMES.available())
def test_every_time_sampler_trains_with_its_defaults(name):
    assert math.isfinite(one_step(training.create("dsm", times=name), model_for("dsm")))


def concrete(base):
    """The classes that derive from `base` and can be made, of this package."""
    found, stack = set(), [base]
    while stack:
        kind = stack.pop()
        stack += kind.__subclasses__()
        if kind.__module__.startswith("training.") and not inspect.isabstract(kind):
            found.add(kind)
    return found


@pytest.mark.parametrize(
    ("catalogue", "base"), [(OBJECTIVES, Objective), (WEIGHTINGS, Weighting), (TIMES, TimeSampler)]
)
def test_every_class_has_a_name_and_every_field_is_an_option(catalogue, base):
    # objectives of other models than a noise predictor, and of pairs that a flow has joined, belong to their systems
    special = {kind for kind in concrete(base) if "noise" not in getattr(kind, "needs", ("noise",))} | {Reflow}
    assert concrete(base) - special == set(catalogue.entries.values())
    for name, kind in catalogue.entries.items():
        assert set(catalogue.options(name)) == {f.name for f in fields(kind) if f.init}
        assert catalogue.describe(catalogue.create(name))["name"] == name


def test_parts_are_made_by_name_with_their_options():
    made = training.create(
        "dsm",
        t_min=0.01,
        weighting={"name": "min_snr", "gamma": 3.0},
        times={"name": "tabulated", "weighting": "simple"},
    )
    assert made == DSM(t_min=0.01, weighting=MinSNR(gamma=3.0), times=TabulatedTime(weighting=Simple()))
    assert training.create(**OBJECTIVES.describe(made)) == made
    assert training.create("dsm", times=ImportanceTime()) == DSM(times=ImportanceTime())
    assert training.options("dsm")["weighting"].part is WEIGHTINGS
    assert TIMES.options("tabulated")["weighting"].part is WEIGHTINGS
    discrete = training.create("vlb", steps=20, times={"name": "discrete", "stratified": False})
    assert discrete.times == DiscreteTime(levels=20, stratified=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: training.create("dms"), ("'dms'", "did you mean 'dsm'")),
        (lambda: training.create("dsm", weihgting="simple"), ("'weihgting'", "did you mean 'weighting'")),
        (lambda: training.create("dsm", weighting="min_sn"), ("'min_sn'", "did you mean 'min_snr'")),
        (lambda: training.create("dsm", weighting={"name": "min_snr", "gamma": -1}), ("gamma=-1", "> 0")),
        (lambda: training.create("dsm", weighting="none"), ("weighting=None", "Simple()")),
        (lambda: training.create("sliced", weighting="none"), ("weighting=None", "Simple()")),
        (lambda: TabulatedTime(weighting=None), ("weighting=None", "Simple()")),
        (lambda: training.create("ddpm_simple", times="none"), ("times=None", "StratifiedTime()")),
        (lambda: DSM(t_min=-1.0), ("t_min=-1.0", ">= 0")),
        (lambda: DDPMSimple(t_min=0.1), ("t_min=0.1", "leave it out")),
        (lambda: DSM(times=DiscreteTime(), t_min=0.1), ("t_min=0.1", "leave it out")),
        (lambda: VLB(times=StratifiedTime()), ("StratifiedTime", "leave times out")),
        (lambda: Hybrid(times=DiscreteTime(zero=True)), ("zero=True", "leave times out")),
        (lambda: VLB(variance="learnt"), ("variance='learnt'", "'learned'")),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_bound_is_refused_where_data_are_noisy_at_zero():
    with pytest.raises(UsageError, match="sigma"):
        one_step(training.create("vlb"), tiny_model(VESDE()))


def test_every_training_option_has_a_help_text_of_its_own():
    texts = options_help()
    assert list(texts) == [f.name for f in fields(TrainingOptions)]
    assert len(set(texts.values())) == len(texts)
    for name, text in texts.items():
        assert 15 < len(text) < 200 and "\n" not in text and not text.endswith("."), name
    assert "as DDPM's discretised decoder needs" in texts["dequantize"]  # the second line of a text belongs to it


# -- docs/training.md -----------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "training.md").read_text()


def test_the_page_lists_what_there_is():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE, re.MULTILINE)
    known = [(n, kind.__name__) for c in (OBJECTIVES, WEIGHTINGS, TIMES) for n, kind in c.entries.items()]
    assert rows == known


def test_the_page_shows_how_to_train(capsys):
    program = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    torch.manual_seed(0)
    names = {}
    exec(program, names)
    losses = dict(names["result"].losses)
    assert list(losses) == [10, 20, 30] and losses[30] < losses[10]
    average = names["result"].averages[0.9]
    assert all(torch.equal(p, average[name]) for name, p in names["model"].named_parameters())
