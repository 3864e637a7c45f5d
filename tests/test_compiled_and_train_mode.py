"""After train(compile=True) everything works; what cannot be compiled says so. A network left in train mode is named."""

from __future__ import annotations

import functools
import shutil
import time
import warnings

import pytest
import torch
from torch import nn
from training_cases import DropoutMLP, options, points, tiny_model

import models
from likelihood import Exact, Hutchinson, elbo, fast, log_likelihood
from models import ScoreModel
from numerics import UserError
from samplers import DDIM, AdaptiveSDE, AnnealedLangevin, PredictorCorrector, ProbabilityFlow
from sde_lib import VPSDE
from training import Callback, ExactScoreMatching, SlicedScoreMatching, UsageError, load_weights, train

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for torch.compile")


class Looks(Callback):
    """Does what a compiled network cannot, wherever a callback may."""

    def __init__(self):
        self.seen = []

    def look(self, state):
        with state.averaged() as model:
            found = log_likelihood(model.sde, model, torch.zeros(2, 2), divergence=Exact(), method=few(model))
        self.seen.append(bool(found.log_prob.isfinite().all()))

    def on_step(self, state):
        if state.step == 1:
            self.look(state)

    def on_eval(self, state):
        self.look(state)

    def on_checkpoint(self, state, path):
        self.look(state)

    def on_end(self, state, result):
        self.look(state)


def few(model):
    return fast(model.sde, model, torch.randn(8, 2), steps=4)


@needs_compiler
@pytest.mark.slow
def test_after_compiled_training_the_network_is_the_plain_one(tmp_path):
    torch.compiler.reset()
    looks, model = Looks(), tiny_model()
    called = []
    plain = type(model.net).forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(
            model,
            points(),
            None,
            options(steps=2, compile=True, eval_every=1),
            folder=tmp_path / "run",
            callbacks=[looks],
        )
    assert looks.seen and all(looks.seen)
    assert (
        "forward" not in vars(model.net) and type(model.net).forward is plain and model.net._compiled_call_impl is None
    )
    model.eval()
    x = torch.randn(4, 2)
    for divergence in (Hutchinson(probes=2), Hutchinson(probes=1), Exact()):
        found = log_likelihood(model.sde, model, x, divergence=divergence, method=few(model))
        assert bool(found.log_prob.isfinite().all())
        called.append(found)
    model.save_pretrained(tmp_path / "pretrained")
    again = ScoreModel.from_pretrained(tmp_path / "pretrained")
    t = torch.tensor(0.5)
    assert torch.equal(again(x, t), model(x, t))
    result.load_averages(model)
    loaded = tiny_model(seed=3)
    load_weights(loaded, tmp_path / "run")
    assert torch.equal(loaded(x, t), model(x, t))
    assert bool(DDIM(steps=3)(model.sde, model, (4, 2)).x.isfinite().all())
    train(loaded, points(), None, options(steps=3), folder=tmp_path / "run", resume=True)  # goes on without


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_that_fails_leaves_the_network_plain():
    model = tiny_model()

    class Stop(Callback):
        def on_step(self, state):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(model, points(), None, options(steps=2, compile=True), callbacks=[Stop()])
    assert "forward" not in vars(model.net)


@pytest.mark.parametrize(
    ("model", "objective", "named"),
    [
        (lambda: models.EnergyModel(models.MLP(dim=2, width=8, depth=1), VPSDE()), None, "the network Conservative"),
        (tiny_model, ExactScoreMatching(), "the objective ExactScoreMatching"),
        (tiny_model, SlicedScoreMatching(), "the objective SlicedScoreMatching"),
    ],
)
def test_what_takes_derivatives_says_that_it_cannot_be_compiled(tmp_path, model, objective, named):
    with pytest.raises(UsageError, match=f"compile=True for {named}") as refused:
        train(model(), points(), None, options(compile=True), objective=objective, folder=tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
    assert train(model(), points(), None, options(steps=1), objective=objective).steps == 1


# -- left in train mode ---------------------------------------------------------------------------------------------------


class Batchwise(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))

    def forward(self, x, label, class_label=None):
        return self.body(torch.cat([x, label.unsqueeze(1)], dim=1))


class PlainScore(nn.Module):
    """A score of its own, without any of our classes."""

    def __init__(self, p):
        super().__init__()
        self.net = DropoutMLP(2, p)

    def forward(self, x, t):
        return -self.net(x, t.to(x.dtype))


class Holder:
    """A wrapper as guidance has them."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x, t):
        return self.model(x, t)

    def take(self, index):
        return self


class Ensemble:
    """Several networks, in a list or a table."""

    def __init__(self, nets):
        self.nets = nets

    def __call__(self, x, t):
        nets = self.nets if isinstance(self.nets, list) else self.nets["one"]
        return sum(net(x, t) for net in nets) / len(nets)


USES = {
    "pc": lambda sde, s: PredictorCorrector(steps=2)(sde, s, (4, 2)),
    "ddim": lambda sde, s: DDIM(steps=2)(sde, s, (4, 2)),
    "adaptive": lambda sde, s: AdaptiveSDE()(sde, s, (4, 2)),
    "flow": lambda sde, s: ProbabilityFlow()(sde, s, (4, 2)),
    "annealed": lambda sde, s: AnnealedLangevin(levels=2)(sde, s, (4, 2)),
    "likelihood": lambda sde, s: log_likelihood(sde, s, torch.zeros(4, 2)),
    "fast": lambda sde, s: fast(sde, s, torch.randn(8, 2)),
    "elbo": lambda sde, s: elbo(sde, s, torch.zeros(4, 2), draws=2),
}
WAYS = {
    "model": lambda m: m,
    "a method": lambda m: m.score,
    "labels": lambda m: m.condition(None),
    "another SDE": lambda m: m.under(VPSDE(beta_max=19.0)),
    "a wrapper": Holder,
    "two": lambda m: Holder(Holder(m)),
    "a list": lambda m: Ensemble([tiny_model().eval(), m]),
    "a table": lambda m: Ensemble({"one": (m,)}),
    "partial": lambda m: functools.partial(m.score, class_label=None),
}


@pytest.mark.parametrize("use", USES)
def test_a_network_with_dropout_in_train_mode_is_named_wherever_it_is_used(use):
    model = tiny_model(dropout=0.2)
    begun = time.perf_counter()
    with pytest.raises(
        UserError, match=r"ScoreModel in train mode with Dropout\(p=0\.2\) at work in net\.body\.2"
    ) as refused:
        USES[use](model.sde, model)
    assert time.perf_counter() - begun < 5 and "model.eval()" in str(refused.value) and "\n" not in str(refused.value)
    if use != "fast":  # a rough network may want more steps than it tries
        USES[use](model.sde, model.eval())


@pytest.mark.parametrize("way", WAYS)
def test_it_is_found_behind_wrappers(way):
    model = tiny_model(dropout=0.2)
    for use in ("ddim", "likelihood"):
        with pytest.raises(UserError, match=r"Dropout\(p=0\.2\)"):
            USES[use](VPSDE(), WAYS[way](model))
    DDIM(steps=2)(VPSDE(beta_max=19.0) if way == "another SDE" else VPSDE(), WAYS[way](model.eval()), (2, 2))


def test_a_plain_module_is_looked_at_too():
    score = PlainScore(0.1)
    with pytest.raises(UserError, match=r"PlainScore in train mode with Dropout\(p=0\.1\) at work in net\.body\.2"):
        DDIM(steps=2)(VPSDE(), score, (2, 2))
    DDIM(steps=2)(VPSDE(), score.eval(), (2, 2))


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (lambda: nn.BatchNorm1d(4), "BatchNorm1d, the batch's own statistics"),
        (lambda: nn.SyncBatchNorm(4), "SyncBatchNorm"),
        (lambda: nn.AlphaDropout(0.3), r"AlphaDropout\(p=0\.3\)"),
        (nn.RReLU, "RReLU"),
    ],
)
def test_what_answers_differently_in_train_mode(part, named):
    model = ScoreModel(Batchwise(part()), VPSDE())
    with pytest.raises(UserError, match=named):
        DDIM(steps=2)(model.sde, model, (4, 2))
    DDIM(steps=2)(model.sde, model.eval(), (4, 2))


def test_train_mode_alone_is_no_mistake():
    """Without dropout, with p = 0, with layers whose own mode is eval, without statistics that eval mode would use."""
    frozen = ScoreModel(Batchwise(nn.BatchNorm1d(4)), VPSDE())
    frozen.net.body[1].eval()
    same = ScoreModel(Batchwise(nn.BatchNorm1d(4, track_running_stats=False)), VPSDE())
    for model in (tiny_model(), ScoreModel(Batchwise(nn.Dropout(0.0)), VPSDE()), frozen, same):
        assert model.training
        DDIM(steps=2)(model.sde, model, (4, 2))
