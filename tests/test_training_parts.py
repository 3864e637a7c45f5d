"""The parts of the loop: what it asks of a model, precisions, triggers, a checkpoint folder handed in, averages handed back."""

import contextlib
import itertools
import math
import signal
import warnings

import pytest
import torch
from torch import nn
from training_cases import digest, options, points, tiny_model

import models
from sde_lib import VPSDE
from training import (
    Callback,
    CheckpointFolder,
    Interrupted,
    LockedError,
    RunLock,
    UsageError,
    Validation,
    as_trainable,
    load_weights,
    train,
)
from training.distributed import Group
from training.precision import PRECISIONS, BatchLoss
from training.triggers import Triggers
from training.update import FiniteGuard, make_optimizer

# -- what training asks of a model ----------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A user's own module: an SDE and a predicted noise, and nothing else."""

    def __init__(self, sde=None):
        super().__init__()
        self.sde = sde or VPSDE()
        self.layer = nn.Linear(3, 2)

    def noise(self, x, t):
        return self.layer(torch.cat([x, t.to(x.dtype).expand(len(x)).unsqueeze(1)], dim=1))


def test_score_models_answer_everything_themselves():
    plain, conditional = tiny_model(), tiny_model(num_classes=3)
    energy = models.EnergyModel(models.MLP(dim=2, width=8, depth=1, num_classes=5), VPSDE(), data_std=0.7)
    for model, classes in ((plain, None), (conditional, 3), (energy, 5)):
        asked = as_trainable(model)
        assert asked is model
        assert asked.network is model.net and asked.num_classes == classes and asked.learned_variance is False
    assert as_trainable(plain).data_std == 1.0 and as_trainable(energy).data_std == 0.7


def test_a_module_of_ones_own_is_completed():
    model = Bare()
    asked = as_trainable(model)
    assert asked.sde is model.sde and asked.network is model
    assert asked.num_classes is None and asked.data_std is None and asked.learned_variance is False
    x, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.5)
    torch.testing.assert_close(
        asked.condition(None)(x, t), -model.noise(x, t) / float(model.sde.sigma(0.5)), rtol=1e-6, atol=0
    )
    with pytest.raises(UsageError, match="noise_and_variance"):
        asked.noise_and_variance(x, t)
    model.net = models.MLP(dim=2, width=8, depth=1, num_classes=4)
    assert as_trainable(model).network is model.net and as_trainable(model).num_classes == 4


def test_a_module_of_ones_own_trains_and_is_validated():
    model, seen = Bare(), []

    class Watch(Validation):
        def on_eval(self, state):
            seen.append(super().on_eval(state)["metric"])

    before = model.layer.weight.detach().clone()
    result = train(
        model, points(), None, options(eval_every=10, compile=False), callbacks=[Watch(points(seed=1), None, draws=2)]
    )
    assert result.steps == 10 and not torch.equal(before, model.layer.weight) and math.isfinite(seen[0])
    with pytest.raises(UsageError, match="checkpoint_activations"):
        train(Bare(), points(), None, options(checkpoint_activations=True))


def test_a_model_without_noise_is_refused_by_name():
    with pytest.raises(UsageError, match=r"class Linear without \.sde and \.noise"):
        train(nn.Linear(2, 2), points(), None, options())


# -- precisions -----------------------------------------------------------------------------------------------------------


def step_with(name, gradient, *, clip=None, loss=1.0, sticky=True, times=1):
    """The weights, norms and refusals after `times` steps of SGD-like Adam on given gradients."""
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    # a large epsilon makes Adam's first step proportional to the gradient
    optimizer = make_optimizer([w], options(adam_eps=1e3, learning_rate=1e3, betas=(0.0, 0.0)), fused=True)
    precision, guard = PRECISIONS[name](torch.device("cpu")), FiniteGuard(torch.device("cpu"), sticky=sticky)
    seen = []
    for number in range(1, times + 1):
        precision.backward((w * torch.tensor(gradient)).sum(), guard)
        one = torch.tensor([0.5])
        found = BatchLoss(number=number, mean=torch.tensor(loss), t=one, losses=one)
        norm, refused = precision.step(optimizer, guard, found, clip=clip)
        optimizer.zero_grad()
        seen.append((float(norm), float(refused)))
    return (w.detach() - torch.tensor([3.0, 4.0])), seen, precision


@pytest.mark.parametrize("name", PRECISIONS)
def test_every_precision_steps_clips_and_refuses(name):
    moved, seen, _ = step_with(name, [0.3, 0.4])
    torch.testing.assert_close(moved, torch.tensor([-0.3, -0.4]), rtol=2e-3, atol=0)
    assert seen == [(pytest.approx(0.5), 0.0)]
    moved, seen, _ = step_with(name, [0.3, 0.4], clip=0.05)
    torch.testing.assert_close(moved, torch.tensor([-0.03, -0.04]), rtol=2e-3, atol=0)
    assert seen == [(pytest.approx(0.5), 0.0)]  # the norm before clipping
    assert step_with(name, [0.3, 0.4], loss=math.nan, times=2)[1][1][1] == 1.0  # once refused, always refused
    if name != "fp16":
        moved, seen, _ = step_with(name, [math.inf, 0.4])
        assert not moved.any() and seen[0][1] == 1.0


def test_a_gradient_that_overflows_halves_the_scale_and_is_no_error():
    moved, seen, precision = step_with("fp16", [math.inf, 0.4])
    assert not moved.any() and seen[0][1] == 0.0
    assert precision.state_dict()["scale"] == 2.0**15
    other = PRECISIONS["fp16"](torch.device("cpu"))
    other.load_state_dict(precision.state_dict())
    assert other.state_dict()["scale"] == 2.0**15
    other.load_state_dict({})  # of a run in float32
    assert other.state_dict()["scale"] == 2.0**15
    plain = PRECISIONS["fp32"](torch.device("cpu"))
    plain.load_state_dict(precision.state_dict())
    assert plain.state_dict() == {}


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_forward_context_says_the_numbers(name):
    layer = nn.Linear(2, 2)
    with PRECISIONS[name](torch.device("cpu")).forward():
        found = layer(torch.ones(1, 2)).dtype
    assert found == {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


# -- triggers -------------------------------------------------------------------------------------------------------------


def due_steps(what, triggers, steps, seconds=0.0, number=None):
    return [s for s in range(1, steps + 1) if getattr(triggers.due(s, seconds, number), what)]


def test_triggers_say_what_is_due():
    o = options(steps=10, log_every=4, eval_every=5, checkpoint_every=3)
    triggers = Triggers(o, Group())
    assert due_steps("log", triggers, 10) == [4, 8, 10]  # and at the end
    assert due_steps("evaluate", triggers, 10) == [5, 10]
    assert due_steps("save", triggers, 10) == [3, 6, 9]
    assert due_steps("save", Triggers(o, Group(), saves=False), 10) == []
    assert [s for s in range(1, 11) if triggers.due(s, 0.0, None)] == [3, 4, 5, 6, 8, 9, 10]
    odd = Triggers(options(steps=7, log_every=10, eval_every=5), Group())
    assert due_steps("evaluate", odd, 7) == [5, 7] and due_steps("log", odd, 7) == [7]
    assert due_steps("evaluate", Triggers(options(steps=7), Group()), 7) == []


def test_a_signal_and_the_time_end_a_run():
    triggers = Triggers(options(steps=10, log_every=100, max_seconds=2.0), Group())
    assert triggers.due(3, 0.0, 15).signal == 15 and not triggers.due(3, 0.0, 15).late
    late = triggers.due(3, 2.0, None)
    assert late.late and late.log and not triggers.due(3, 1.9, None)
    spent = Triggers(options(steps=10, log_every=100, cpu_seconds=2.0), Group())
    assert spent.due(3, 9.0, None, 2.0).late and not spent.due(3, 9.0, None, 1.9)


def test_a_schedule_goes_by_what_is_used_up_first():
    o = options(steps=100, warmup=0, schedule="cosine", cpu_seconds=10.0, learning_rate=1.0)
    assert o.rate(0, 5.0) == pytest.approx(0.5) and o.rate(50, 0.0) == pytest.approx(0.5)
    assert o.rate(10, 10.0) == pytest.approx(0.0, abs=1e-12) and o.rate(10, 99.0) == pytest.approx(0.0, abs=1e-12)
    assert options(steps=100, warmup=0, schedule="cosine", learning_rate=1.0).rate(50, 99.0) == pytest.approx(0.5)


def test_several_processes_ask_together_and_agree():
    """At every eighth step, the largest of their answers."""

    class Two(Group):
        def maximum(self, value):
            asked.append(value)
            return max(value, 15.0)

    asked = []
    triggers = Triggers(options(steps=20, log_every=100), Two(world=2))
    assert due_steps("signal", triggers, 20) == [8, 16]
    assert triggers.due(16, 0.0, None).signal == 15 and len(asked) == 6


# -- checkpoints and averages ---------------------------------------------------------------------------------------------


def test_a_checkpoint_folder_is_handed_in(tmp_path):
    stages = []
    checkpoints = CheckpointFolder(tmp_path / "mine", keep=1, keep_every=4, stage=stages.append)
    o = options(checkpoint_every=2, keep=3)
    result = train(tiny_model(), points(), None, o, folder=tmp_path / "run", checkpoints=checkpoints)
    assert checkpoints.steps() == [10, 8, 4] and result.checkpoint == checkpoints.path(
        10
    )  # its own rules, not those of `o`
    assert not (tmp_path / "run" / "checkpoints").exists() and (tmp_path / "run" / "metrics.jsonl").exists()
    assert stages.count("before") == 5
    train(tiny_model(), points(), None, o, folder=tmp_path / "run2")
    whole = CheckpointFolder(tmp_path / "run2" / "checkpoints").read().content["model"]
    for name, value in checkpoints.read().content["model"].items():
        assert torch.equal(value, whole[name])


def test_a_checkpoint_folder_needs_no_run_folder(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "mine")
    train(tiny_model(), points(), None, options(), checkpoints=checkpoints)
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"step_00000010.pt", "step_00000010.json"}
    with pytest.raises(UsageError, match="up to step 10"):
        train(tiny_model(), points(), None, options(), checkpoints=checkpoints)
    train(tiny_model(), points(), None, options(steps=20), checkpoints=checkpoints, resume=True)
    train(tiny_model(), points(), None, options(steps=20), folder=tmp_path / "whole")
    assert checkpoints.steps()[0] == 20
    whole = CheckpointFolder(tmp_path / "whole" / "checkpoints").read().content["model"]
    for name, value in checkpoints.read().content["model"].items():
        assert torch.equal(value, whole[name])
    with pytest.raises(LockedError), RunLock(tmp_path / "mine"):
        train(tiny_model(), points(), None, options(), checkpoints=checkpoints, resume=True)


def test_averages_are_handed_back(tmp_path):
    model = tiny_model()
    result = train(model, points(), None, options(ema=(0.5, 0.9)), folder=tmp_path)
    assert list(result.averages) == [0.5, 0.9]
    last = [p.detach().clone() for p in model.parameters()]
    for decay in (None, 0.5, 0.9):
        ours, theirs = tiny_model(seed=1), tiny_model(seed=2)
        result.load_averages(ours, decay)
        load_weights(theirs, tmp_path, decay=decay)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), last, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), last, strict=True))
    result.load_averages(model)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), last, strict=True))
    with pytest.raises(UsageError, match=r"decay=0\.7; expected one of 0\.5, 0\.9"):
        result.load_averages(model, 0.7)
    with pytest.raises(UsageError, match="parameters, such as"):
        result.load_averages(tiny_model(dim=3))
    without = train(tiny_model(), points(), None, options(ema=()))
    with pytest.raises(UsageError, match="without averages"):
        without.load_averages(model)


def test_averages_without_a_folder_are_the_recursion():
    """By hand, with the weights after every update."""
    model, seen = tiny_model(), []

    class Keep(Callback):
        def on_step(self, state):
            seen.append([p.detach().clone() for p in state.model.parameters()])

    start = [p.detach().clone() for p in model.parameters()]
    result = train(model, points(), None, options(ema=(0.8,), ema_warmup=False), callbacks=[Keep()])
    for weights in seen:
        start = [0.8 * a + 0.2 * w for a, w in zip(start, weights, strict=True)]
    for a, b in zip(result.averages[0.8].values(), start, strict=True):
        torch.testing.assert_close(a, b)


# -- resuming -------------------------------------------------------------------------------------------------------------


class Stop(Callback):
    """Ends a run as a signal does."""

    def __init__(self, step):
        self.step = step

    def on_step(self, state):
        if state.step == self.step:
            state.interruption.requested = signal.SIGTERM


@pytest.mark.parametrize(
    ("first", "then", "jumps"),
    [
        ({"schedule": "cosine"}, {"schedule": "cosine", "steps": 30}, True),
        ({}, {"learning_rate": 5e-3, "steps": 30}, True),
        ({}, {"steps": 30}, False),
        ({}, {"learning_rate": 5e-3}, False),  # it has ended
        ({"schedule": "cosine", "steps": 10_000}, {"schedule": "cosine", "steps": 10_100}, False),  # by a hair
    ],
)
def test_a_rate_that_jumps_on_resume_is_said(tmp_path, first, then, jumps):
    with pytest.raises(Interrupted):
        train(tiny_model(), points(), None, options(**first), folder=tmp_path, callbacks=[Stop(10)])
    was, now = options(**first).rate(9), options(**then).rate(9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(Interrupted):
            train(tiny_model(), points(), None, options(**then), folder=tmp_path, resume=True, callbacks=[Stop(12)])
    said = [str(w.message) for w in caught if "learning rate" in str(w.message)]
    assert len(said) == jumps
    if jumps:
        assert f"{was:.3g}" in said[0] and f"{now:.3g}" in said[0] and "step 10" in said[0]


def test_a_checkpoint_from_before_the_rate_was_kept_resumes(tmp_path):
    train(tiny_model(), points(), None, options(), folder=tmp_path)
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    content = dict(checkpoints.read().content)
    assert content.pop("learning_rate") == options().rate(9)
    checkpoints.save(content, 10)
    assert train(tiny_model(), points(), None, options(steps=12), folder=tmp_path, resume=True).steps == 12
    assert digest(tmp_path)[1] == 12


# -- processes ------------------------------------------------------------------------------------------------------------


def test_work_of_the_main_process_is_not_done_by_others():
    done, calls = [], itertools.count()

    class Quiet(Group):
        def broadcast_error(self, error):
            next(calls)
            if error is not None:
                raise error

    Quiet(rank=1, world=2).on_main(lambda: done.append(1))
    assert not done
    Quiet(rank=0, world=2).on_main(lambda: done.append(0))
    assert done == [0] and next(calls) == 2  # both have met
    with pytest.raises(ZeroDivisionError):
        Quiet().everywhere(lambda: 1 / 0)
    assert Quiet().everywhere(lambda: 7) == 7
