"""Around the loop: validation, plans, fine-tuning, prefetching, compiling, saving memory."""

import math
import os
import signal
import sys

import pytest
import torch
from oracles import gaussian
from training_cases import OracleModel, options, points, tiny_model

import models
from data import Rescale, Split, from_tensor
from sde_lib import VPSDE
from training import (
    Callback,
    CheckpointError,
    CheckpointFolder,
    Interrupted,
    UsageError,
    Validation,
    initialize_from,
    plan,
    train,
)
from training.batches import Batches
from training.prefetch import Prefetch


class Lent:
    """What an evaluation sees of a state."""

    def __init__(self, model):
        self.model, self.interruption = model, type("Quiet", (), {"requested": None})()

    def averaged(self):
        import contextlib

        return contextlib.nullcontext(self.model)


def test_validation_reports_the_bound_and_judges_checkpoints(tmp_path):
    """With the exact noise it is the entropy of the held-out points; it is the same every time."""
    law, sde = gaussian(), VPSDE()
    x = law.sample(400, generator=torch.Generator().manual_seed(0))
    model = OracleModel(law, sde)
    model.weight = torch.nn.Parameter(torch.zeros(()))
    validation = Validation(Split(x.float(), None, torch.arange(400)), None, n=400, draws=32)
    values = validation.on_eval(Lent(model))
    exact = -float(law.log_prob(sde, x, 0.0).mean()) / 2
    assert values["nats_per_dim_bound"] == pytest.approx(exact, abs=0.1)
    assert validation.on_eval(Lent(model)) == values
    train(
        tiny_model(),
        points(),
        None,
        options(eval_every=5),
        folder=tmp_path,
        callbacks=[Validation(points(seed=1), None)],
    )
    assert CheckpointFolder(tmp_path / "checkpoints").best_step() == 10


def test_validation_of_uniform_bytes_is_their_number_of_bits():
    """Any density has at least log2(levels) bits/dim on uniform grey values; a network that knows nothing has more."""
    x = torch.randint(0, 4, (64, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = from_tensor(x, levels=4)
    model = models.ScoreModel(models.MLP(dim=16, width=8, depth=1), VPSDE(), models.Preconditioned(data_std=0.58))
    values = Validation(dataset.split("train"), dataset.transform(), draws=64).on_eval(Lent(model))
    # the untrained network is a Gaussian of the data's scale: log2(sd sqrt(2 pi e)) - log2 of a bin's width
    gaussian_bits = math.log2(0.58 * math.sqrt(2 * math.pi * math.e) / 0.5)
    assert 2.0 < values["bits_per_dim_bound"] == pytest.approx(gaussian_bits, abs=0.1)


def test_validation_of_grey_values_is_of_grey_values():
    """Not dequantised, as VDM trains: where every pixel is one of two levels far apart, the bound is their entropy. The same
    network by a density of dequantised values would pay for saying where in the bin a value is."""
    x = 3 * torch.randint(0, 2, (256, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = from_tensor(x, levels=4)
    transform, split = dataset.transform(), dataset.split("train")
    low, high = (float(transform.centres(torch.tensor([v], dtype=torch.uint8))) for v in (0, 3))

    class Two(torch.nn.Module):
        """The exact score of two points with equal weights, pixel by pixel."""

        def __init__(self):
            super().__init__()
            self.sde, self.data_std, self.num_classes = VPSDE(t_min=1e-4), 1.0, None
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            alpha, sigma = (v(t).reshape(-1, 1, 1, 1).to(x) for v in (self.sde.alpha, self.sde.sigma))
            points = torch.stack([alpha * low, alpha * high], dim=-1)
            weights = (-0.5 * ((x.unsqueeze(-1) - points) / sigma.unsqueeze(-1)).square()).softmax(dim=-1)
            return ((weights * points).sum(dim=-1) - x) / sigma.square()

        def noise(self, x, t, class_label=None):
            return -self.sde.sigma(t).reshape(-1, 1, 1, 1).to(x) * self(x, t)

    values = Validation(split, transform, draws=64, dequantize=False).on_eval(Lent(Two()))
    # zero and three are equally likely in truth, the data's share aside
    assert values["bits_per_dim_bound"] == pytest.approx(1.0, abs=0.03)


def test_an_evaluation_gives_way_to_a_signal(tmp_path):
    class Slow(Callback):
        def on_eval(self, state):
            os.kill(os.getpid(), signal.SIGTERM)
            assert Validation(points(), None).on_eval(state) is None

    with pytest.raises(Interrupted, match="step 6"):
        train(tiny_model(), points(), None, options(eval_every=5), folder=tmp_path, callbacks=[Slow()])


def test_a_plan_is_the_size_of_what_is_written(tmp_path):
    model, split = tiny_model(wild=True), points()
    before = [p.clone() for p in model.parameters()]
    o = options(steps=40, ema=(0.9, 0.99), checkpoint_every=10, keep=2)
    expected = plan(model, split, None, o)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    result = train(model, split, None, o, folder=tmp_path)
    tensors = result.checkpoint.stat().st_size
    assert expected.checkpoint < tensors < expected.checkpoint + 60_000  # names and headers
    assert expected.parameters == sum(p.numel() for p in model.parameters())
    assert expected.seconds == pytest.approx(40 / expected.steps_per_second) and expected.memory > 10**7
    assert "parameters" in str(expected)


def test_a_run_starts_from_another_ones_weights(tmp_path):
    model = tiny_model(wild=True)
    train(model, points(), None, options(ema=()), folder=tmp_path / "run")
    model.save_pretrained(tmp_path / "pretrained")
    for source in ("run", "pretrained"):
        other = tiny_model(seed=1)
        initialize_from(other, tmp_path / source)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        with pytest.raises(CheckpointError, match="expected"):
            initialize_from(tiny_model(dim=3), tmp_path / source)
    with pytest.raises(UsageError, match="no checkpoint"):
        initialize_from(model, tmp_path / "nothing")


def test_prefetched_batches_are_the_same_and_errors_come_through():
    class Ahead(Batches):
        fail = None

        def stored(self, step):
            if step == self.fail:
                raise RuntimeError("a bad disk")
            return super().stored(step)

    grey = Split((points().x.reshape(64, 1, 1, 2) * 20 + 128).clamp(0, 255).to(torch.uint8), None, torch.arange(64))
    batches = Ahead(grey, Rescale(), batch_size=16, seed=0)
    prefetch = Prefetch(batches, 3, 9)
    prefetch.ahead = True
    with prefetch:
        for step in range(3, 9):
            assert torch.equal(prefetch.next().x_0, batches(step).x_0)
    batches.fail = 5
    prefetch = Prefetch(batches, 4, 9)
    prefetch.ahead = True
    with prefetch:
        prefetch.next()
        with pytest.raises(RuntimeError, match="bad disk"):
            prefetch.next()


def test_recomputed_activations_change_nothing_but_memory():
    results = []
    for flag in (False, True):
        model = tiny_model(wild=True)
        losses = train(model, points(), None, options(checkpoint_activations=flag)).losses
        results.append((losses, [p.clone() for p in model.parameters()]))
        assert model.net.checkpoint_activations is flag
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    with pytest.raises(UsageError, match="checkpoint_activations"):
        train(tiny_model(dropout=0.5), points(), None, options(checkpoint_activations=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_network_runs_in_the_precision_asked_for(precision):
    """The loss and the weights stay float32; losses differ from float32's by rounding."""
    seen, losses = set(), {}
    for p in ("fp32", precision):
        model = tiny_model(wild=True)
        model.net.output.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
        losses[p] = train(model, points(), None, options(precision=p)).losses
        assert next(model.parameters()).dtype == torch.float32
    assert seen == {torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert losses[precision] != losses["fp32"]
    assert losses[precision][-1][1] == pytest.approx(losses["fp32"][-1][1], rel=0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")
def test_a_compiled_network_learns_the_same():
    from shutil import which

    if not (which("c++") or which("g++")):
        pytest.skip("no C++ compiler for torch.compile")
    losses = []
    for flag in (False, True):
        model = tiny_model(wild=True)
        losses.append(train(model, points(), None, options(compile=flag)).losses)
        assert set(model.state_dict()) == set(tiny_model().state_dict())
    assert [v for _, v in losses[0]] == pytest.approx([v for _, v in losses[1]], rel=1e-4)
