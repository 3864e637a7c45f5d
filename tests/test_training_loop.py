"""The loop: what it computes, that it resumes bit for bit, and what makes it stop."""

import json
import math
import os
import signal
import time
import warnings

import pytest
import torch
from oracles import SDES, gaussian
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import digest, in_child, options, points, tiny_model

import data
from data import DataError, Rescale, Split, from_tensor
from training import (
    DSM,
    EMA,
    Adaptive,
    Callback,
    CheckpointError,
    CheckpointFolder,
    ImportanceTime,
    Interrupted,
    LikelihoodWeighting,
    LockedError,
    NonFiniteError,
    PowerEMA,
    RunLock,
    TrainingOptions,
    UsageError,
    load_weights,
    reconstruct,
    train,
)
from training.batches import Batches
from training.configuration import check_same
from training.posthoc_ema import combination, gamma_of, sigma_rel_of
from training.streams import BatchOrder, StepStreams, mix, preserved_global_rng, seed_dropout


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, state):
        if state.step == self.step:
            self.action(state)


def terminate(number=signal.SIGTERM):
    return lambda state: os.kill(os.getpid(), number)


# -- what it computes -----------------------------------------------------------------------------------------------------


def test_it_learns_a_gaussian():
    """The loss falls to within 3 % of that of the exact score, which is known in closed form."""
    law, sde = gaussian(), SDES["vp"]
    split = Split(law.sample(4000, generator=torch.Generator().manual_seed(0)).float(), None, torch.arange(4000))
    model = tiny_model(sde)
    result = train(
        model, split, None, options(steps=400, batch_size=256, learning_rate=1e-2, schedule="cosine", log_every=100)
    )
    t = torch.linspace(sde.t_min, sde.T, 20_001, dtype=torch.float64)
    snr = sde.log_snr(t).exp().unsqueeze(1) * torch.linalg.eigvalsh(law.cov)
    best = float(torch.trapezoid((snr / (1 + snr)).mean(dim=1), t))
    assert result.losses[-1][1] < 1.03 * best < result.losses[0][1]
    assert result.steps == 400 and result.finished


def test_a_batch_in_parts_is_the_same_batch():
    runs = []
    for accumulate in (1, 3):
        model = tiny_model()
        result = train(model, points(), None, options(accumulate=accumulate, batch_size=16))
        runs.append((torch.cat([p.flatten() for p in model.parameters()]), result.losses))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-5)
    assert [value for _, value in runs[0][1]] == pytest.approx([value for _, value in runs[1][1]], abs=1e-6)


def test_clipping_and_the_schedule_are_adams_own():
    """One update by hand, with torch's clip_grad_norm_ and an unfused Adam."""
    split, o = points(), options(steps=1, warmup=4, learning_rate=0.02, clip=0.01, ema=())
    ours, theirs = tiny_model(), tiny_model()
    train(ours, split, None, o)
    objective = DSM()
    x_0 = split.x[BatchOrder(64, 16, 0)(0)]
    draws = objective.draw(theirs.sde, x_0.shape, StepStreams(0, 0))
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.02 / 4, foreach=False)
    objective.loss(theirs, x_0, draws, None).mean().backward()
    assert float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)) > 0.01
    optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_short_gradient_is_not_stretched():
    short, free = tiny_model(wild=True), tiny_model(wild=True)
    # plain momentum-free Adam forgets the scale of a gradient, so look at a large eps, where it does not
    train(short, points(), None, options(steps=1, clip=1e6, adam_eps=1e3, learning_rate=10.0))
    train(free, points(), None, options(steps=1, clip=None, adam_eps=1e3, learning_rate=10.0))
    assert all(torch.equal(a, b) for a, b in zip(short.parameters(), free.parameters(), strict=True))


def test_learning_rates():
    o = TrainingOptions(steps=100, warmup=10, learning_rate=1.0, schedule="cosine", final_rate=0.1)
    assert o.rate(0) == pytest.approx(0.1) and o.rate(9) == pytest.approx(1.0)
    assert o.rate(55) == pytest.approx(0.55) and o.rate(100) == pytest.approx(0.1)
    assert TrainingOptions(steps=5, warmup=0).rate(3) == 2e-4


def test_batches_are_permutations_and_functions_of_the_step():
    order = BatchOrder(10, 4, seed=3)
    drawn = torch.cat([order(step) for step in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert torch.equal(BatchOrder(10, 4, seed=3)(4), order(4)) and torch.equal(order(0), drawn[:4])
    assert not torch.equal(BatchOrder(10, 10, seed=4)(0), BatchOrder(10, 10, seed=3)(0))
    assert len({mix(0, "noise", s) for s in range(1000)} | {mix(0, "time", s) for s in range(1000)}) == 2000


def test_grey_values_are_dequantised_freshly_and_mirrored():
    x = torch.arange(4, dtype=torch.uint8).reshape(1, 1, 1, 4).repeat(2000, 1, 1, 1)
    split = Split(x, None, torch.arange(2000))
    batches = Batches(split, Rescale(levels=4, low=0.0, high=4.0), batch_size=2000, seed=0, flip=True)
    first, again, second = batches(0).x_0, batches(0).x_0, batches(1).x_0
    assert torch.equal(first, again) and not torch.equal(first, second)
    mirrored = first[:, 0, 0, 0] > 3
    assert abs(int(mirrored.sum()) - 1000) < 4 * math.sqrt(500)
    upright = torch.where(mirrored.reshape(-1, 1, 1, 1), first.flip(-1), first)
    u = upright - x
    assert float(u.min()) >= 0 and float(u.max()) <= 1
    assert abs(float(u.mean()) - 0.5) < 4 / math.sqrt(12 * u.numel())
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.05)
    still = Batches(split, Rescale(levels=4, low=0.0, high=4.0), batch_size=2000, seed=0, dequantize=False)(0).x_0
    assert torch.equal(still, x + 0.5)


def test_labels_are_hidden_at_the_stated_rate():
    labels = torch.arange(64) % 3
    model = tiny_model(num_classes=3)
    batches = Batches(points(labels=labels), None, batch_size=64, seed=0, label_dropout=0.25, num_classes=3)
    seen = torch.cat([batches(s).labels for s in range(50)])
    hidden = float((seen == 3).double().mean())
    assert abs(hidden - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(seen))
    assert train(model, points(labels=labels), None, options(label_dropout=0.25)).steps == 10


def test_nothing_in_a_step_waits_for_the_device(tmp_path):
    """Reading a tensor's value on the host is the operation `_local_scalar_dense`; it happens at log steps only."""

    class Reads(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.at = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (
                torch.ops.aten._local_scalar_dense,
                torch.ops.aten.nonzero,
                torch.ops.aten.equal,
            ):
                self.at.append(str(function))
            return function(*args, **(kwargs or {}))

    def reads(steps, log_every):
        with Reads() as mode:
            o = options(steps=steps, log_every=log_every, ema=(0.9, 0.99), nonfinite="skip")
            train(
                tiny_model(), points(), None, o, objective=DSM(weighting=LikelihoodWeighting(), times=ImportanceTime())
            )
        return len(mode.at)

    reads(1, 1)  # what is looked up once and kept
    assert reads(20, 20) == reads(40, 40)  # none depends on the number of steps
    assert reads(20, 10) == reads(20, 20) + 2  # and a look costs two


# -- averages -------------------------------------------------------------------------------------------------------------


def test_averages_have_their_warm_up_and_stay_float32():
    w = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    ema = EMA([("w", w)], (0.9999, 0.5))
    w.data.fill_(1.0)
    slow = fast = 0.0
    for n in range(1, 5):
        ema.update()
        slow += (1 - min(0.9999, (1 + n) / (10 + n))) * (1 - slow)
        fast += (1 - min(0.5, (1 + n) / (10 + n))) * (1 - fast)
    assert ema.weights()["w"].dtype == torch.float32
    assert float(ema.weights(0.9999)["w"][0]) == pytest.approx(slow, rel=1e-5)
    assert float(ema.weights(0.5)["w"][0]) == pytest.approx(fast, rel=1e-5)
    constant = EMA([("w", w)], (0.9999,), warmup=False)
    w.data.fill_(2.0)
    constant.update()
    assert float(constant.weights()["w"][0]) == pytest.approx(1.0001, abs=1e-6)  # in bfloat16 this would still be 1
    with pytest.raises(CheckpointError, match="0.9999"):
        constant.load_state_dict(ema.state_dict())


def test_any_power_average_is_reconstructed_from_two():
    assert sigma_rel_of(gamma_of(0.07)) == pytest.approx(0.07, rel=1e-9)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01) and gamma_of(0.10) == pytest.approx(
        6.94, abs=0.01
    )  # section 3.1
    generator = torch.Generator().manual_seed(0)
    w = torch.zeros(50, dtype=torch.float64)
    stored, wanted = PowerEMA([("w", w)], (0.05, 0.10)), PowerEMA([("w", w)], (0.02, 0.07, 0.15, 0.2))
    contents = []
    for n in range(1, 2049):
        w += torch.randn(50, generator=generator, dtype=torch.float64) / math.sqrt(2048)  # a random walk to order 1
        stored.update()
        wanted.update()
        if n % 64 == 0:
            weights = {k: {"w": v["w"].clone()} for k, v in stored.state_dict()["weights"].items()}
            contents.append({"step": n, "power_ema": {"weights": weights}})
    errors = {}
    for width in wanted.decays:
        rebuilt = reconstruct(contents, width)["w"]
        errors[width] = float((rebuilt - wanted.weights(width)["w"]).norm() / (w - wanted.weights(width)["w"]).norm())
    print("relative error of reconstructed averages:", {k: f"{v:.1e}" for k, v in errors.items()})
    assert errors[0.07] < 0.01 and errors[0.15] < 0.02 and errors[0.2] < 0.05 and errors[0.02] < 0.3
    assert float(combination([(0.05, 100), (0.1, 100)], 0.05, 100)[0]) == pytest.approx(1.0)


def test_averaged_weights_are_lent_and_given_back():
    model, seen = tiny_model(), {}

    def look(state):
        before = [p.clone() for p in model.parameters()]
        with state.averaged() as averaged:
            assert not averaged.training
            for (name, p), average in zip(model.named_parameters(), state.ema.weights().values(), strict=True):
                assert torch.equal(p, average), name
        assert model.training and all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        seen["looked"] = any(not torch.equal(p, a) for p, a in zip(before, state.ema.weights().values(), strict=True))

    train(model, points(), None, options(), callbacks=[At(5, look)])
    assert seen["looked"]


# -- resuming -------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "fp32": ({}, {}, None),
    "bf16": ({"precision": "bf16"}, {}, None),
    "fp16": ({"precision": "fp16"}, {}, None),
    "accumulate": ({"accumulate": 3}, {}, None),
    "dropout": ({"accumulate": 2}, {"dropout": 0.5}, None),
    "averages": ({"ema": (0.9, 0.999), "power_ema": (0.05, 0.1)}, {}, None),
    "adaptive": ({}, {}, lambda: DSM(weighting=LikelihoodWeighting(), times=Adaptive())),
    "importance": (
        {"optimizer": "adamw", "weight_decay": 0.1},
        {},
        lambda: DSM(weighting=LikelihoodWeighting(), times=ImportanceTime()),
    ),
}


def resumed_digests(tmp_path, variant, sde, stop, steps=10):
    changes, network, objective = VARIANTS[variant]
    o = options(steps=steps, checkpoint_every=4, **changes)
    split = points()
    build = objective or DSM

    def run(folder, **kwargs):
        return train(
            tiny_model(SDES[sde], **network), split, None, o, objective=build(), folder=tmp_path / folder, **kwargs
        )

    run("whole")
    with pytest.raises(Interrupted):
        run("parts", callbacks=[At(stop, terminate())])
    assert digest(tmp_path / "parts")[1] == stop
    run("parts", resume=True)
    return digest(tmp_path / "whole"), digest(tmp_path / "parts")


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_exact(tmp_path, variant):
    whole, parts = resumed_digests(tmp_path, variant, "vp", 5)
    assert whole == parts and whole[1] == 10


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 5, 9])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sde", SDES)
def test_resuming_is_exact_everywhere(tmp_path, variant, sde, stop):
    whole, parts = resumed_digests(tmp_path, variant, sde, stop)
    assert whole == parts and whole[1] == 10


def test_parts_of_a_batch_have_their_own_dropout():
    masks = []
    for key in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)):
        with preserved_global_rng():
            seed_dropout(*key)
            masks.append(torch.rand(8))
    assert torch.equal(masks[0], masks[4])
    assert len({tuple(m.tolist()) for m in masks}) == 4


def test_dropout_is_a_function_of_the_step_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    finals = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        model = tiny_model(dropout=0.5)
        train(model, points(), None, options())
        finals.append((torch.cat([p.flatten() for p in model.parameters()]), torch.rand(3)))
    assert torch.equal(finals[0][0], finals[1][0])
    assert torch.equal(finals[0][1], expected)


def test_a_longer_run_goes_on_from_a_shorter_one_and_metrics_have_no_gaps(tmp_path):
    split = points()
    train(tiny_model(), split, None, options(steps=20), folder=tmp_path / "whole")
    train(tiny_model(), split, None, options(steps=10), folder=tmp_path / "parts")
    (tmp_path / "parts" / "metrics.jsonl").open("a").write('{"step": 15, "loss": 9}\n{"step": 12, "lo')
    result = train(tiny_model(), split, None, options(steps=20), folder=tmp_path / "parts", resume=True)
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    lines = [
        [json.loads(line) for line in (tmp_path / f / "metrics.jsonl").read_text().splitlines()]
        for f in ("whole", "parts")
    ]
    assert [(v["step"], v["loss"]) for v in lines[0]] == [(v["step"], v["loss"]) for v in lines[1]]
    assert [s for s, _ in result.losses] == [5, 10, 15, 20]
    again = train(tiny_model(), split, None, options(steps=20), folder=tmp_path / "parts", resume=True)
    assert again.steps == 20 and again.losses == result.losses
    with pytest.raises(UsageError, match="steps=5"):
        train(tiny_model(), split, None, options(steps=5), folder=tmp_path / "parts", resume=True)


@pytest.mark.parametrize(
    ("stage", "nth"), [("writing", 3), ("file in place", 1), ("manifest in place", 2), ("pruning", 1)]
)
def test_a_run_that_crashes_in_a_save_resumes_to_the_same_weights(tmp_path, stage, nth):
    split, o = points(), options(checkpoint_every=2, keep=1)
    train(tiny_model(), split, None, o, folder=tmp_path / "whole")

    def crash():
        left = {"n": nth}

        def at(name):
            left["n"] -= name == stage
            if not left["n"]:
                os._exit(9)

        checkpoints = CheckpointFolder(tmp_path / "parts" / "checkpoints", keep=1, stage=at)
        train(tiny_model(), split, None, o, folder=tmp_path / "parts", checkpoints=checkpoints)

    assert in_child(crash) == 9

    def again():
        train(tiny_model(), split, None, o, folder=tmp_path / "parts", resume=True)

    assert in_child(again) == 0
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")


@pytest.mark.slow
def test_kill_9_at_random_times(tmp_path):
    """30 kills of a run that saves at every step; then one that is left alone must end where an undisturbed one does."""
    import random

    split, o = points(), options(steps=400, checkpoint_every=1, keep=2)
    train(tiny_model(), split, None, options(steps=400), folder=tmp_path / "whole")
    rng = random.Random(0)
    work = lambda: train(tiny_model(), split, None, o, folder=tmp_path / "parts", resume=True)  # noqa: E731
    progress = []
    for _ in range(30):
        assert in_child(work, kill_after=rng.uniform(0.05, 0.5)) in (-signal.SIGKILL, 0)
        found = CheckpointFolder(tmp_path / "parts" / "checkpoints").read()
        progress.append(found.step if found else 0)
    assert progress == sorted(progress) and progress[-1] > 30
    assert in_child(work) == 0
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")


# -- stopping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_signals_save_and_leave(tmp_path, number, code):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="step 3") as caught:
        train(tiny_model(), points(), None, options(), folder=tmp_path, callbacks=[At(3, terminate(number))])
    assert caught.value.exit_code == code
    assert digest(tmp_path)[1] == 3 and not (tmp_path / "run.lock").exists()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_leaves_at_once(tmp_path):
    def twice(state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), points(), None, options(), folder=tmp_path, callbacks=[At(3, twice)])
    assert not CheckpointFolder(tmp_path / "checkpoints").exists()


def test_the_time_budget_stops_and_saves(tmp_path):
    result = train(tiny_model(), points(), None, options(steps=100_000, max_seconds=0.2), folder=tmp_path)
    assert not result.finished and 0 < result.steps < 100_000 and result.seconds < 2
    assert digest(tmp_path)[1] == result.steps


def test_the_processor_time_budget_stops_saves_and_anneals(tmp_path):
    """Waiting is not counted, a resumed run goes on from what was spent, and the rate ends with the budget."""

    class Waits(Callback):
        def on_step(self, state):
            time.sleep(0.01)

    o = options(steps=100_000, cpu_seconds=0.3, schedule="cosine", warmup=0, checkpoint_every=5)
    result = train(tiny_model(), points(), None, o, folder=tmp_path, callbacks=[Waits()])
    assert not result.finished and 0 < result.steps < 100_000
    assert 0.3 <= result.cpu_seconds < 0.6 and result.seconds > result.cpu_seconds
    found = CheckpointFolder(tmp_path / "checkpoints").read()
    assert found.step == result.steps and found.content["cpu_seconds"] == pytest.approx(result.cpu_seconds, abs=0.1)
    assert found.content["learning_rate"] <= 0.01 * o.learning_rate
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the rate is the one that the budget gives, so there is no jump to warn of
        again = train(tiny_model(), points(), None, o, folder=tmp_path, resume=True)
    assert again.steps == result.steps and again.cpu_seconds >= found.content["cpu_seconds"]


class Poisoned(DSM):
    """A loss that is not finite, or whose gradient alone is not, at one update."""

    def draw(self, sde, shape, streams, *, dtype=torch.float32):
        draws = super().draw(sde, shape, streams, dtype=dtype)
        bad = streams.step + 1 in self.at
        draws["eps"][3 % shape[0]] = self.value if bad else draws["eps"][3 % shape[0]]
        return draws


def poisoned(value, *at):
    objective = Poisoned()
    object.__setattr__(objective, "value", value)
    object.__setattr__(objective, "at", at)
    return objective


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, value, precision):
    """Found at the next look, at step 10, but the weights are still those of step 6."""
    healthy, model = tiny_model(), tiny_model()
    train(healthy, points(), None, options(steps=6, precision=precision, log_every=10))
    o = options(steps=20, log_every=10, precision=precision)
    with pytest.raises(NonFiniteError, match="step 7") as caught:
        train(model, points(), None, o, objective=poisoned(value, 7), folder=tmp_path)
    assert caught.value.exit_code == 4 and caught.value.step == 7 and not math.isfinite(caught.value.loss)
    draws = poisoned(value, 7).draw(model.sde, (16, 2), StepStreams(0, 6))
    assert caught.value.t == pytest.approx(float(draws["t"][3]))
    for a, b in zip(healthy.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not CheckpointFolder(tmp_path / "checkpoints").exists()


def test_poisoned_weights_and_data_stop_the_run():
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = math.nan
    with pytest.raises(NonFiniteError, match="step 1:"):
        train(model, points(), None, options())
    split = points(16)
    split.x[3, 1] = math.inf
    with pytest.raises(NonFiniteError, match="step 1:"):
        train(tiny_model(), split, None, options())


def test_skipping_tolerates_a_stated_number():
    model = tiny_model()
    result = train(
        model, points(), None, options(steps=20, nonfinite="skip", max_skips=2), objective=poisoned(math.nan, 4, 9)
    )
    assert result.steps == 20 and all(math.isfinite(v) for _, v in result.losses)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with pytest.raises(NonFiniteError, match="max_skips=2"):
        train(
            tiny_model(),
            points(),
            None,
            options(steps=20, nonfinite="skip", max_skips=2),
            objective=poisoned(math.nan, 4, 9, 11),
        )


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": -1.0},
        {"learning_rate": math.nan},
        {"precision": "fp8"},
        {"ema": (1.0,)},
        {"ema": (0.9, 0.9)},
        {"clip": 0.0},
        {"optimizer": "sgd"},
        {"accumulate": 100},
        {"steps": 2.5},
        {"max_seconds": 0},
        {"cpu_seconds": -1.0},
        {"steps": True},
        {"warmup": "3"},
        {"learning_rate": "a"},
        {"label_dropout": "a"},
        {"weight_decay": None},
        {"betas": ("a", 0.9)},
        {"clip": "a"},
        {"ema": "nope"},
        {"ema": (0.9, None)},
        {"power_ema": ("a",)},
    ],
)
def test_options_out_of_range_are_refused(change):
    with pytest.raises(UsageError, match=next(iter(change))) as caught:
        options(**change)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_data_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UsageError, match="batch_size=16 for 5"):
        train(tiny_model(), points(5), None, options(), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="labels") as caught:
        train(tiny_model(num_classes=3), points(), None, options())
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match="label 7"):
        train(tiny_model(num_classes=3), points(labels=torch.full((64,), 7)), None, options())
    digits = data.create("digits")
    with pytest.raises(DataError, match="uint8"):
        train(tiny_model(), digits.split("train"), None, options())
    with pytest.raises(DataError, match="images"):
        train(tiny_model(), points(), None, options(flip=True))


def test_a_run_folder_with_checkpoints_is_not_overwritten(tmp_path):
    """And a callback hears of a run only when it has been accepted."""
    begun = []

    class Watch(Callback):
        def on_start(self, state):
            begun.append(state.step)

    train(tiny_model(), points(), None, options(), folder=tmp_path, callbacks=[Watch()])
    before = digest(tmp_path)
    with pytest.raises(UsageError, match="resume"):
        train(tiny_model(), points(), None, options(), folder=tmp_path, callbacks=[Watch()])
    with pytest.raises(CheckpointError, match="seed=1"):
        train(tiny_model(), points(), None, options(seed=1), folder=tmp_path, resume=True, callbacks=[Watch()])
    assert digest(tmp_path) == before
    train(tiny_model(), points(), None, options(steps=12), folder=tmp_path, resume=True, callbacks=[Watch()])
    assert begun == [0, 10]


def test_a_run_folder_of_another_experiment_is_refused(tmp_path):
    config = {"sde": {"name": "vp", "beta_max": 20.0}, "seed": 0}
    train(tiny_model(), points(), None, options(), folder=tmp_path, config=config, data_fingerprint="abc")

    def go_on(model=None, o=None, **changes):
        kwargs = {"config": config, "data_fingerprint": "abc", **changes}
        return train(model or tiny_model(), points(), None, o or options(), folder=tmp_path, resume=True, **kwargs)

    with pytest.raises(UsageError, match="sde.beta_max=10.0, which was 20.0"):
        go_on(config={"sde": {"name": "vp", "beta_max": 10.0}, "seed": 0})
    assert go_on(config={"sde": {"name": "vp", "beta_max": 10.0}, "seed": 0}, allow_change=["sde.beta_max"]).steps == 10
    with pytest.raises(CheckpointError, match="same network"):
        go_on(model=tiny_model(dropout=0.5))
    with pytest.raises(CheckpointError, match=r"expected \(16, 3\)"):
        go_on(model=tiny_model(dim=3))
    with pytest.raises(CheckpointError, match="seed=1"):
        go_on(o=options(seed=1))
    with pytest.raises(CheckpointError, match="EMA decays"):
        go_on(o=options(ema=(0.5,)))
    with pytest.raises(CheckpointError, match="data"):
        go_on(data_fingerprint="xyz")
    assert go_on().steps == 10


def test_configurations_are_compared_by_dotted_names():
    check_same({"a": {"b": [1, 2]}}, {"a": {"b": (1, 2)}})
    check_same({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 4}}, ["a"])
    with pytest.raises(UsageError) as caught:
        check_same({"a": {"b": 1}, "c": 3}, {"c": 2, "d": 4})
    for words in ("(no a.b, which was 1; c=2, which was 3; d=4, which was not there)", "--allow_change=a.b,c,d"):
        assert words in str(caught.value)


def test_two_processes_do_not_share_a_run_folder(tmp_path):
    with RunLock(tmp_path):
        assert in_child(lambda: train(tiny_model(), points(), None, options(), folder=tmp_path)) == 5
    with pytest.raises(LockedError), RunLock(tmp_path):
        train(tiny_model(), points(), None, options(), folder=tmp_path)


def test_weights_of_a_run_are_loaded_by_kind(tmp_path):
    model = tiny_model()
    train(model, points(), None, options(ema=(0.5, 0.9)), folder=tmp_path)
    raw, first, second = tiny_model(seed=1), tiny_model(seed=2), tiny_model(seed=3)
    assert load_weights(raw, tmp_path, weights="raw") == 10
    assert all(torch.equal(a, b) for a, b in zip(raw.parameters(), model.parameters(), strict=True))
    load_weights(first, tmp_path)
    load_weights(second, tmp_path, decay=0.9)
    content = CheckpointFolder(tmp_path / "checkpoints").read().content
    for name, p in first.named_parameters():
        assert torch.equal(p, content["ema"]["weights"]["0.5"][name])
    for name, p in second.named_parameters():
        assert torch.equal(p, content["ema"]["weights"]["0.9"][name])
    with pytest.raises(UsageError, match="0.5, 0.9"):
        load_weights(first, tmp_path, decay=0.7)
    with pytest.raises(UsageError, match="no checkpoint"):
        load_weights(first, tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="names|shape"):
        load_weights(tiny_model(dim=3), tmp_path)


def test_digits_train_end_to_end(tmp_path):
    digits = from_tensor(data.create("digits").split("train").x[:200], levels=17)
    model = tiny_model(dim=64)
    seen = []

    class Watch(Callback):
        def on_eval(self, state):
            seen.append(state.step)
            return {"metric": 1 / state.step}

        def on_checkpoint(self, state, path):
            seen.append(path.name)

        def on_end(self, state, result):
            seen.append(result.steps)

    o = options(steps=12, eval_every=6, checkpoint_every=6, tensorboard=True)
    train(model, digits.split("train"), digits.transform(), o, folder=tmp_path, callbacks=[Watch()])
    assert seen == [6, "step_00000006.pt", 12, "step_00000012.pt", 12]
    assert CheckpointFolder(tmp_path / "checkpoints").best_step() == 12
    assert list(tmp_path.glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "gradient_norm", "learning_rate", "images_per_second"} <= set(lines[0])
    assert any(k.startswith("loss_at_noise/") for k in lines[0])
