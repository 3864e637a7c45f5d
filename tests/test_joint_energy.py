"""A classifier as an energy: identities, chains and buffer, the gradient of contrastive divergence against quadrature."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import data
from data import DataError
from evaluation import ProjectedGradient, auroc, calibration, share
from experiments import jem
from models import ClassifierEnergy, energy_of
from models.classifier_energy import Residual
from numerics import SampleStreams, TemperedLangevin, UserError
from sde_lib import VESDE
from training import CrossEntropy, EnergyWatch, JointEnergy, NonFiniteError, TrainingOptions, train
from training.streams import StepStreams
from workflow import energy_classifier, systems
from workflow.configuration import config_for
from workflow.setup import resolve

SDE = VESDE()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def classifier(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ClassifierEnergy(options.pop("shape", (1, 8, 8)), options.pop("classes", 10), SDE, width=8, **options)


class TestTheModel:
    def test_joint_identities(self):
        """log p(x, y) = log p(x) + log p(y | x), and a number added to all logits moves the energy alone."""
        model, x = classifier(), torch.randn(6, 1, 8, 8, generator=generator())
        logits, y = model.logits(x), torch.arange(6)
        torch.testing.assert_close(-model.energy(x, y), -model.energy(x) + logits.log_softmax(1)[torch.arange(6), y])
        every = torch.stack([-model.energy(x, torch.full((6,), k)) for k in range(10)], dim=1)
        torch.testing.assert_close(every.exp().sum(1).log(), -model.energy(x))
        torch.testing.assert_close(energy_of(logits + 3.0), energy_of(logits) - 3.0)

    def test_without_classes_the_energy_is_minus_the_output(self):
        model, x = classifier(classes=None), torch.randn(3, 1, 8, 8, generator=generator())
        assert model.num_classes is None and model.logits(x).shape == (3, 1)
        torch.testing.assert_close(model.energy(x), -model.logits(x)[:, 0])

    def test_an_energy_does_not_depend_on_its_batch_mates_or_the_mode(self):
        """No batch normalisation, no dropout: samples follow the gradient of one sample's energy."""
        model, x = classifier(), torch.randn(7, 1, 8, 8, generator=generator())
        alone = torch.cat([model.train().energy(x[i : i + 1]) for i in range(7)])
        torch.testing.assert_close(model.train().energy(x), alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.eval().energy(x), alone, rtol=1e-5, atol=1e-6)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm | nn.ReLU | nn.MaxPool2d) for m in model.modules())

    def test_the_gradient_is_smooth(self):
        """Of a network of ReLUs the gradient is constant between kinks; here every part has a second derivative."""
        block, model = Residual(4).double(), classifier().double()
        for f, shape in (
            (lambda x: block(x).sum((1, 2, 3)), (4, 4, 4, 4)),
            (lambda x: model.logits(x)[:, 0], (4, 1, 8, 8)),
        ):
            x = torch.randn(shape, generator=generator(), dtype=torch.float64).requires_grad_()
            v = torch.randn(shape, generator=generator(1), dtype=torch.float64)
            (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
            (product,) = torch.autograd.grad((slope * v).sum(), x)
            assert float(product.abs().flatten(1).amax(1).min()) > 1e-6

    def test_other_shapes_and_refusals(self):
        assert classifier(shape=(2,), classes=3).logits(torch.zeros(5, 2)).shape == (5, 3)
        assert classifier(shape=(3, 28, 28)).logits(torch.zeros(2, 3, 28, 28)).shape == (2, 10)
        with pytest.raises(UserError, match="num_classes=1"):
            classifier(classes=1)
        with pytest.raises(UserError, match=r"expected \(B, 1, 8, 8\)"):
            classifier().logits(torch.zeros(2, 64))


class TestChains:
    def test_the_temperature_is_that_of_step_and_noise(self):
        """On E = x^2 / 2 the stationary variance is s^2 / (1 - (1 - a)^2) = T / (1 - a / 2): exp(-E / T), up to O(a)."""
        langevin, n = TemperedLangevin(step=0.1, noise=0.2), 20_000
        assert langevin.temperature == pytest.approx(0.2)
        z = torch.randn(n, 80, 1, generator=generator())
        x = langevin.run(lambda x: x.square().sum(1) / 2, torch.zeros(n, 1), z)
        assert float(x.var()) == pytest.approx(0.2 / 0.95, rel=4 * math.sqrt(2 / n))
        assert TemperedLangevin(step=1.0, noise=0.01).temperature == pytest.approx(5e-5)  # the published ones

    def test_reflection_keeps_the_law_of_the_box(self):
        """exp(-2 x) on [0, 1] has the mean 1 / 2 - 1 / (e^2 - 1), which clamping would pull to 0."""
        langevin, n = TemperedLangevin(step=5e-4, noise=math.sqrt(1e-3), box=(0.0, 1.0)), 4000
        start = torch.rand(n, 1, generator=generator())
        x = langevin.run(lambda x: 2 * x.sum(1), start, torch.randn(n, 1000, 1, generator=generator(1)))
        exact = 0.5 - 1 / math.expm1(2.0)
        assert float(x.mean()) == pytest.approx(exact, abs=4 * float(x.std()) / math.sqrt(n))
        assert 0 <= float(x.min()) < float(x.max()) <= 1
        far = langevin.inside(torch.tensor([[-0.25], [1.25], [2.5], [-3.1]]))
        torch.testing.assert_close(far, torch.tensor([[0.25], [0.75], [0.5], [0.9]]))

    def test_refusals(self):
        for options, words in (
            ({"step": 0.0, "noise": 1.0}, "step"),
            ({"step": 1.0, "noise": -1.0}, "noise"),
            ({"step": 1.0, "noise": 1.0, "box": (1.0, 1.0)}, "low < high"),
        ):
            with pytest.raises(UserError, match=words):
                TemperedLangevin(**options)

    @pytest.mark.parametrize(
        ("step", "steps", "energy", "words"),
        [
            (3.0, 300, lambda x: x.square().sum(1), r"step=3, with which the chains diverge .* less than .* = 1$"),
            (3.0, 50, lambda x: x.square().sum(1), r"step=3, with which the chains diverge .* less than .* = 1$"),
            (0.5, 300, lambda x: -x.square().sum(1), "left for infinity .*expected an energy that grows outwards"),
            (0.5, 30, lambda x: -x.square().sum(1), "left for infinity .*expected an energy that grows outwards"),
            (0.1, 3, lambda x: x.detach().square().sum(1), "no gradient in x"),
            (0.1, 3, lambda x: torch.zeros(len(x)), "no gradient in x"),
        ],
    )
    def test_chains_that_leave_are_refused(self, step, steps, energy, words):
        z = torch.randn(3, steps, 2, generator=generator())
        with pytest.raises(UserError, match=words):
            TemperedLangevin(step=step, noise=0.1).run(energy, torch.ones(3, 2), z)

    def test_what_is_no_state_is_refused(self):
        chains = TemperedLangevin(step=0.1, noise=0.1)
        for x, z in (
            (torch.ones(3, 2).long(), torch.randn(3, 4, 2)),
            (torch.ones(3, 2), torch.randn(3, 4, 3)),
            (torch.ones(3, 2), torch.randn(3, 2)),
        ):
            with pytest.raises(UserError, match=r"expected real floating-point numbers \(B, \*\) with \(B, K, \*\)"):
                chains.run(lambda x: x.square().sum(1), x, z)

    def test_a_run_that_looks_for_itself_is_not_stopped(self):
        """Training's, whose buffer begins such chains anew."""
        z = torch.randn(3, 300, 2, generator=generator())
        x = TemperedLangevin(step=3.0, noise=0.1).run(lambda x: x.square().sum(1), torch.ones(3, 2), z, checked=False)
        assert not bool(x.isfinite().all())

    def test_sampling_from_noise_stops_too(self):
        """In blocks of ten steps, each of which grows by less than what one run is stopped for."""
        model = classifier(shape=(2,))
        model.energy = lambda x, labels=None: 1.1 * x.square().sum(1) / 2
        with pytest.raises(UserError, match=r"step=2, with which the chains diverge .* = 1\.82$"):
            energy_classifier.fresh_chains(
                model,
                TemperedLangevin(step=2.0, noise=0.1),
                (4, 2),
                100,
                generator=SampleStreams(0),
                device=torch.device("cpu"),
            )


class TestLabels:
    def test_an_energy_takes_one_class_for_each_or_for_all(self):
        model, x = classifier(shape=(2,), classes=3), torch.randn(6, 2, generator=generator())
        labels = [0, 1, 2, 0, 1, 2]
        expected = -model.logits(x)[torch.arange(6), torch.tensor(labels)]
        for given in (labels, np.array(labels), torch.tensor(labels, dtype=torch.uint8), torch.tensor(labels)):
            torch.testing.assert_close(model.energy(x, given), expected)
        torch.testing.assert_close(model.energy(x, 1), -model.logits(x)[:, 1])
        assert model.energy(x[:0]).shape == (0,)

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            (torch.tensor([0, 1, 2]), r"shape \(3,\) for 6 samples"),
            (torch.tensor([0, 1, -1, 0, 1, 2]), "the label -1; expected classes 0 to 2"),
            ([0, 1, 7, 0, 1, 2], "the label 7; expected classes 0 to 2"),
            (torch.zeros(6), "integers"),
            ("cat", "integers"),
        ],
    )
    def test_labels_that_are_no_classes_are_refused(self, labels, words):
        model, x = classifier(shape=(2,), classes=3), torch.randn(6, 2, generator=generator())
        with pytest.raises(UserError, match=words):
            model.energy(x, labels)
        if isinstance(labels, torch.Tensor):
            objective = JointEnergy(buffer=10)
            draws = objective.draw(model.sde, (6, 2), StepStreams(0, 1, torch.device("cpu")))
            for one, made in ((objective, draws), (CrossEntropy(), {})):
                with pytest.raises(UserError, match=words):
                    one.loss(model, x, made, labels)

    def test_an_energy_without_classes_has_no_labels(self):
        with pytest.raises(UserError, match="no classes"):
            classifier(shape=(2,), classes=None).energy(torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64))


class Quartic(nn.Module):
    """E = a x^2 / 2 + b x^4 / 4, whose expectations quadrature knows."""

    def __init__(self, a, b):
        super().__init__()
        self.sde, self.num_classes = SDE, None
        self.theta = nn.Parameter(torch.tensor([a, b]))

    def features(self, x):
        return torch.cat([x.square() / 2, x.pow(4) / 4], dim=1)

    def logits(self, x):
        return -(self.features(x) @ self.theta).unsqueeze(1)

    def energy(self, x, labels=None):
        return energy_of(self.logits(x), labels)


def test_the_gradient_of_contrastive_divergence_is_the_likelihoods():
    """With chains at their law, the gradient of E(x) - E(x') is E_data[grad E] - E_model[grad E], by quadrature."""
    n, model = 20_000, Quartic(0.5, 1.0)
    # T = 1: noise^2 = 2 step
    objective = JointEnergy(length=150, step=0.01, noise=math.sqrt(0.02), buffer=n, restart=0.0, penalty=0.0)
    assert objective.langevin.temperature == pytest.approx(1.0)
    x_0 = 1.2 * torch.randn(n, 1, generator=generator())
    draws = objective.draw(SDE, x_0.shape, StepStreams(0, 0))
    objective.loss(model, x_0, draws, None).mean().backward()
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64).unsqueeze(1)
    density = (-model.double().energy(grid)).exp().detach()
    density /= density.sum()
    features = model.features(grid)
    exact = model.features(x_0.double()).mean(0) - density @ features
    spread = (density @ features.square() - (density @ features).square()).sqrt() / math.sqrt(n)
    off = (model.theta.grad - exact).abs()
    assert bool((off < 4.5 * spread + 0.01 * density @ features).all()), (off, spread)
    assert bool((exact.abs() > 20 * spread).all())  # the difference is no accident


class TestTheBuffer:
    def test_chains_begin_anew_at_the_stated_rate_and_else_go_on(self):
        objective = JointEnergy(buffer=400, restart=0.2, box=(-1.0, 1.0), length=1)
        anew, shape = 0, (100, 1, 2, 2)
        for step in range(40):
            draws = objective.draw(SDE, shape, StepStreams(0, step))
            before = objective.chains.states.clone()
            assert len(draws["place"].unique()) == 100  # no chain twice
            starts = objective.chains.starts(draws)
            same = (starts == before[draws["place"]]).flatten(1).all(1)
            assert bool((same == ~draws["restart"]).all())
            anew += int(draws["restart"].sum())
        assert anew / 4000 == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / 4000))
        fresh = draws["fresh"].flatten()
        assert (
            float(fresh.min()) > -1
            and float(fresh.max()) < 1
            and float(fresh.std()) == pytest.approx(3**-0.5, rel=0.15)
        )

    def test_what_is_only_looked_at_moves_no_chain(self):
        model, objective = classifier(), JointEnergy(buffer=50, box=(-1.0, 1.0), length=2)
        x, streams = torch.zeros(8, 1, 8, 8), StepStreams(0, 0)
        draws = objective.draw(SDE, x.shape, streams)
        before = objective.chains.states.clone()
        objective.loss(model, x, draws, torch.zeros(8, dtype=torch.int64))
        assert torch.equal(objective.chains.states, before)  # no update has been made of it
        draws = objective.draw(SDE, x.shape, StepStreams(0, 1))
        objective.loss(model, x, draws, torch.zeros(8, dtype=torch.int64))
        objective.observe(SDE, draws["t"], torch.zeros(8))
        changed = (objective.chains.states != before).flatten(1).any(1)
        assert set(changed.nonzero().flatten().tolist()) == set(draws["place"].tolist())

    def test_chains_that_are_not_finite_begin_anew(self):
        objective = JointEnergy(buffer=10, box=(-1.0, 1.0))
        draws = objective.draw(SDE, (4, 2), StepStreams(0, 0))
        x = torch.full((4, 2), torch.nan)
        x[0] = 0.5
        objective.chains.put(draws, x)
        objective.chains.commit()
        kept = objective.chains.states[draws["place"]]
        assert bool(kept.isfinite().all()) and torch.equal(kept[0], x[0]) and torch.equal(kept[1:], draws["fresh"][1:])

    def test_chains_take_no_part_in_the_gradient(self):
        """The negative samples are held fixed: the loss's gradient is that of E at them, not through the steps to them."""
        model, objective = classifier(), JointEnergy(buffer=8, length=3, box=(-1.0, 1.0), penalty=0.0, class_weight=0.0)
        x = torch.rand(8, 1, 8, 8, generator=generator())
        draws = objective.draw(SDE, x.shape, StepStreams(0, 0))
        objective.loss(model, x, draws, None).sum().backward()
        found = model.output.weight.grad.clone()
        model.zero_grad()
        ends = objective.langevin.run(model.energy, objective.chains.starts(draws), draws["z"])
        (model.energy(x) - model.energy(ends.detach())).sum().backward()
        torch.testing.assert_close(found, model.output.weight.grad, rtol=1e-4, atol=1e-6)

    def test_a_resumed_run_has_the_same_chains(self, tmp_path):
        digits = data.create("digits")
        end = {}
        for name, stops in (("whole", (4,)), ("resumed", (2, 4))):
            for i, steps in enumerate(stops):
                model, objective = classifier(), JointEnergy(buffer=40, length=2, box=(-1.0, 1.0))
                options = TrainingOptions(
                    steps=steps, batch_size=16, warmup=1, label_dropout=0.0, progress=False, tensorboard=False
                )
                train(
                    model, digits.split("train"), digits.transform(), options, objective=objective,
                    folder=tmp_path / name, resume=i > 0,
                )  # fmt: skip
            end[name] = (objective.chains.states, next(model.parameters()).detach())
        for a, b in zip(*end.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    @pytest.mark.parametrize("size", [24, 60])
    def test_a_resumed_run_of_another_buffer_cuts_it_or_fills_it_up(self, tmp_path, size):
        """The first chains go on; those that are more begin in the box."""
        digits, before = data.create("digits"), None
        for steps, buffer in ((2, 40), (2, size), (4, size)):
            model, objective = classifier(), JointEnergy(buffer=buffer, length=2, box=(-1.0, 1.0))
            options = TrainingOptions(
                steps=steps, batch_size=16, warmup=1, label_dropout=0.0, progress=False, tensorboard=False
            )
            train(
                model, digits.split("train"), digits.transform(), options, objective=objective, folder=tmp_path,
                resume=before is not None,
            )  # fmt: skip
            before = objective.chains.states.clone() if steps == 2 else before
        states = objective.state_dict()["buffer"]
        assert len(states) == size and bool((states.abs() <= 1).all())
        both = min(size, 40)
        moved = int((states[:both] != before[:both]).flatten(1).any(dim=1).sum())
        assert moved <= 2 * 16 and (size > 40 or moved > 0)
        anew = states[both:]
        assert len({float(x) for x in anew[:, 0, 0, 0]}) == len(anew)

    def test_what_a_checkpoint_is_given_stays_as_it_was(self):
        objective = JointEnergy(buffer=8, box=(-1.0, 1.0))
        draws = objective.draw(SDE, (8, 2), StepStreams(0, 0))
        given = objective.state_dict()["buffer"]
        was = given.clone()
        objective.chains.put(draws, torch.zeros(8, 2))
        objective.chains.commit()
        assert torch.equal(given, was) and not torch.equal(objective.chains.states, was)

    def test_a_second_training_takes_nothing_from_the_first(self):
        digits, objective = data.create("digits"), JointEnergy(buffer=40, length=2, box=(-1.0, 1.0))
        options = TrainingOptions(
            steps=2, batch_size=16, warmup=1, label_dropout=0.0, progress=False, tensorboard=False
        )
        ends = []
        for _ in range(2):
            model = classifier()
            train(model, digits.split("train"), digits.transform(), options, objective=objective)
            ends.append((objective.chains.states, next(model.parameters()).detach()))
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_a_batch_larger_than_the_buffer(self):
        with pytest.raises(UserError, match="buffer=4 for batches of 8"):
            JointEnergy(buffer=4).draw(SDE, (8, 2), StepStreams(0, 0))


def test_the_loss_is_its_parts():
    model, x, y = classifier(), torch.rand(8, 1, 8, 8, generator=generator()), torch.arange(8)
    parts = {"penalty": 0.3, "class_weight": 0.5, "weight": 2.0}
    objective = JointEnergy(buffer=8, length=2, box=(-1.0, 1.0), **parts)
    draws = objective.draw(SDE, x.shape, StepStreams(0, 0))
    found = objective.loss(model, x, draws, y)
    ends = objective.langevin.run(model.energy, objective.chains.starts(draws), draws["z"])
    of_data, of_chains = model.energy(x), model.energy(ends)
    cross = CrossEntropy().loss(model, x, CrossEntropy().draw(SDE, x.shape, StepStreams(0, 0)), y)
    torch.testing.assert_close(cross, -model.logits(x).log_softmax(1)[torch.arange(8), y])
    expected = 0.5 * cross + 2 * (of_data - of_chains) + 0.3 * (of_data.square() + of_chains.square())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_divergence_is_said_in_one_line():
    """Without a penalty and with a large rate the energies part within a few steps, and the run stops."""
    digits, model = data.create("digits"), classifier()
    objective = JointEnergy(buffer=64, length=2, penalty=0.0, limit=20.0, box=(-1.0, 1.0))
    options = TrainingOptions(
        steps=60, batch_size=32, learning_rate=0.05, warmup=1, clip=None, label_dropout=0.0, progress=False
    )
    with pytest.raises(
        NonFiniteError, match=r"the energy diverges.*limit=20: raise penalty, length or restart"
    ) as caught:
        train(model, digits.split("train"), digits.transform(), options, objective=objective,
              callbacks=[EnergyWatch(objective, 5)])  # fmt: skip
    assert "\n" not in str(caught.value) and caught.value.step % 5 == 0


class TestMeasures:
    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            ([0, -1, 2], "labels from -1 to 2; expected classes 0 to 2"),
            ([0, 1, 3], "labels from 0 to 3"),
            ([0.0, 1.7, 2.0], "float32; expected integers"),
            ([True, False, True], "bool; expected integers"),
        ],
    )
    def test_labels_that_are_no_classes_are_refused(self, labels, words):
        with pytest.raises(DataError, match=words):
            calibration(torch.zeros(3, 3), torch.tensor(labels))

    def test_what_cannot_be_calibrated_is_refused(self):
        labels = torch.zeros(4, dtype=torch.int64)
        for bins in (0, 2.5, True):
            with pytest.raises(UserError, match="bins"):
                calibration(torch.zeros(4, 2), labels, bins=bins)
        for dtype in (torch.complex64, torch.int64):
            with pytest.raises(DataError, match="expected real floating-point"):
                calibration(torch.zeros(4, 2, dtype=dtype), labels)

    def test_a_share_of_nothing_is_refused(self):
        with pytest.raises(DataError, match="no samples"):
            share(torch.zeros(0))

    def test_ece_by_hand(self):
        """Two bins: confidences 0.6, 0.6 with one right, 0.9, 0.9 with both: (2 |0.5 - 0.6| + 2 |1 - 0.9|) / 4."""
        p = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.1, 0.9]])
        found = calibration(p.log(), torch.tensor([0, 1, 0, 1]), bins=2)
        assert found.ece.value == pytest.approx(0.1, abs=1e-6)
        assert found.confidence == pytest.approx((0.6, 0.9)) and found.frequency == pytest.approx((0.5, 1.0))

    @pytest.mark.parametrize("n", [100, 297])
    def test_samples_of_equal_confidence_have_no_order(self, n):
        """Right 80 % of the time and says 80 %, of one class or of two: calibrated, sorted by class and shuffled."""
        labels = (torch.arange(n) >= round(0.8 * n)).long()
        logs = torch.tensor([[0.8, 0.2]]).log().repeat(n, 1)
        turned = torch.arange(n) % 3 == 0  # as sure of the other class, but for rounding
        both = torch.where(turned.unsqueeze(1), logs.flip(1), logs)
        order = torch.randperm(n, generator=generator())
        for p, y in ((logs, labels), (both, torch.where(turned, 1 - labels, labels))):
            for found in (calibration(p, y), calibration(p[order], y[order])):
                assert found.ece.value == pytest.approx(abs(round(0.8 * n) / n - 0.8), abs=1e-6)
                assert found.frequency == pytest.approx((round(0.8 * n) / n,) * 10)
                assert found.floor.value == pytest.approx(math.sqrt(0.8 * 0.2 / n * 2 / math.pi), rel=0.2)

    def test_ties_with_others_in_their_bin(self):
        """Confidences 0.6 three times and 0.9, in two bins; of the three one is right, wherever it stands."""
        p = torch.tensor([[0.6, 0.4]] * 3 + [[0.9, 0.1]])
        for right in range(3):
            labels = torch.ones(4, dtype=torch.int64)
            labels[[right, 3]] = 0
            ece = calibration(p.log(), labels, bins=2).ece.value
            expected = (2 * abs(1 / 3 - 0.6) + abs(1 / 3 + 1 - 0.6 - 0.9)) / 4
            assert ece == pytest.approx(expected, abs=1e-6)

    def test_lists_and_arrays_will_do(self):
        logs, labels = [[0.1, 0.9], [0.7, 0.3], [0.2, 0.8]], [1, 0, 0]
        expected = calibration(torch.tensor(logs), torch.tensor(labels))
        for made in (calibration(logs, labels), calibration(np.array(logs, np.float32), np.array(labels))):
            assert made == expected
        assert auroc([0, 1, 3], np.array([2.0, 4.0])) == auroc(torch.tensor([0.0, 1, 3]), torch.tensor([2.0, 4.0]))
        for bad, words in (
            (lambda: calibration(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64, device="meta")), "meta"),
            (lambda: calibration(torch.zeros(3, 0), labels), "K >= 1"),
            (lambda: calibration(torch.zeros(3, 2), ["a", "b", "c"]), "list"),
            (lambda: auroc("ab", [1.0, 2.0]), "str"),
        ):
            with pytest.raises(DataError, match=words):
                bad()

    def test_the_floor_draws_nothing_that_the_data_were_made_from(self):
        """Points from a small seed, whose first coordinate is the confidence: the floor is that of the same points in another
        order, and so is its spread."""
        x = data.create("moons").split("test").x
        p = 0.5 + 0.1 * x[:, 0].double().sigmoid()
        logs = torch.stack([p.log(), (1 - p).log()], dim=1)
        labels = torch.zeros(len(x), dtype=torch.int64)
        order = torch.randperm(len(x), generator=generator(5))
        as_it_is, other = (calibration(part, labels).floor for part in (logs, logs[order]))
        assert as_it_is.stderr < 1.3 * other.stderr
        assert abs(as_it_is.value - other.value) < 4 * other.stderr / math.sqrt(200 / 2)

    def test_auroc_of_shifted_normals(self):
        n, shift = 4000, 1.0
        rest, found = torch.randn(n, generator=generator()), shift + torch.randn(n, generator=generator(1))
        result = auroc(rest, found)
        exact = 0.5 * (1 + math.erf(shift / 2))
        assert result.value == pytest.approx(exact, abs=4 * result.stderr) and result.stderr < 0.01
        pairs = (
            (torch.randn(60, generator=generator(i)), torch.randn(60, generator=generator(500 + i))) for i in range(300)
        )
        spread = torch.tensor([auroc(*pair).value for pair in pairs]).std()
        one = auroc(torch.randn(60, generator=generator(9)), torch.randn(60, generator=generator(10))).stderr
        assert one == pytest.approx(float(spread), rel=0.2)

    def test_auroc_counts_ties_half_and_knows_its_ends(self):
        assert auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])).value == pytest.approx(0.875)
        apart = auroc(torch.arange(10.0), torch.arange(10.0) + 20)
        assert apart.value == 1.0 and 0 < apart.stderr < 0.1
        with pytest.raises(ValueError, match="NaN"):
            auroc(torch.tensor([0.0, math.nan]), torch.tensor([1.0, 2.0]))

    def test_an_attack_stays_in_its_ball_and_in_the_box(self):
        model, x = classifier(), 2 * torch.rand(6, 1, 8, 8, generator=generator()) - 1
        near = ProjectedGradient(steps=4, box=(-1.0, 1.0))(
            model.logits, x, torch.arange(6), 0.3, generator=generator(1)
        )
        assert float((near - x).abs().max()) <= 0.3 + 1e-6 and float(near.abs().max()) <= 1.0
        before, after = (
            nn.functional.cross_entropy(model.logits(v), torch.arange(6), reduction="none") for v in (x, near)
        )
        assert bool((after >= before).all()) and float((after - before).detach().max()) > 1e-3

    def test_an_attack_finds_the_corner_of_a_linear_classifier(self):
        """The worst change of all within epsilon is -epsilon sign w, which moves the logit by epsilon |w|_1."""
        w = torch.tensor([[1.0, -2.0, 0.5]])

        def logits(x):
            margin = x @ w.T
            return torch.cat([margin, -margin], dim=1)

        x = torch.tensor([[1.0, 0.2, 0.3], [0.1, -1.0, 0.4]])
        near = ProjectedGradient(steps=30)(logits, x, torch.zeros(2, dtype=torch.int64), 0.2, generator=generator())
        torch.testing.assert_close(near, x - 0.2 * w.sign())
        assert torch.equal(ProjectedGradient()(logits, x, torch.zeros(2, dtype=torch.int64), 0.0), x)

    @pytest.mark.parametrize("box", [(1.0, -1.0), (0.0, math.nan), (0.0, math.inf), (0.0,), 1.0, "ab"])
    def test_a_box_that_is_none_is_refused(self, box):
        for make in (ProjectedGradient, lambda box: TemperedLangevin(step=0.1, noise=0.1, box=box)):
            with pytest.raises(UserError, match="expected .low, high., finite, low < high"):
                make(box=box)

    @pytest.mark.parametrize(
        ("x", "labels", "words"),
        [
            (torch.full((3, 4), 1.7), torch.zeros(3).long(), "for the box"),
            (torch.full((3, 4), math.nan), torch.zeros(3).long(), "for the box"),
            (torch.zeros(3, 4).long(), torch.zeros(3).long(), "floating-point"),
            (torch.zeros(3, 4), torch.zeros(2).long(), "expected one for each"),
            (torch.zeros(3, 4), torch.tensor(1), "expected one for each"),
            (torch.zeros(3, 4), torch.zeros(3), "expected integers"),
            (torch.zeros(3, 4), torch.full((3,), -100), "the label -100; expected classes 0 to 3"),
            (torch.zeros(3, 4), torch.full((3,), 4), "the label 4; expected classes 0 to 3"),
        ],
    )
    def test_what_an_attack_cannot_take_is_refused(self, x, labels, words):
        with pytest.raises(UserError, match=words):
            ProjectedGradient(box=(-1.0, 1.0))(lambda x: x, x, labels, 0.1)
        with pytest.raises(UserError, match=r"expected \(B, K\)"):
            ProjectedGradient()(lambda x: x.sum(1), torch.zeros(3, 4), torch.zeros(3).long(), 0.1)

    def test_an_attack_keeps_a_mistaken_point_though_another_has_the_larger_loss(self):
        """Of many classes none of which is likely, the loss is large where the true one is still the likeliest."""
        rule = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 10))
        with torch.no_grad():
            for p in rule.parameters():
                p.copy_(0.6 * torch.randn(p.shape, generator=generator(3)))
        x = torch.randn(2000, 2, generator=generator(1))
        labels = rule(x).argmax(dim=1)
        seen = torch.zeros(2000, dtype=torch.bool)

        def logits(at):
            found = rule(at)
            seen.logical_or_(found.argmax(dim=1) != labels)
            return found

        near = ProjectedGradient(steps=10)(logits, x, labels, 0.5, generator=generator(2))
        assert torch.equal(rule(near).argmax(dim=1) != labels, seen) and 100 < int(seen.sum()) < 1900


class TestTheSystem:
    def test_a_classifier_for_data_without_labels_is_refused(self):
        for name in ("swiss_roll",):
            with pytest.raises(UserError, match="no labels of two classes") as caught:
                resolve(config_for("jem", changes={"data.name": name}))
            assert "\n" not in str(caught.value) and "--preset=energy" in str(caught.value)

    def test_the_preset_energy_needs_no_labels(self):
        setup = resolve(config_for("jem", "energy", changes={"data.name": "swiss_roll"}))
        assert setup.model.num_classes is None and setup.objective.box is None
        assert resolve(config_for("jem", "energy")).objective.box == (-1.0, 1.0)

    def test_other_mistakes(self):
        for changes, words in (
            ({"study.images": 1}, "images=1"),
            ({"study.epsilons": (-0.1,)}, "epsilons"),
            ({"training.objective.restart": 2.0}, "restart"),
            ({"training.objective.penalty": -1.0}, "penalty"),
            ({"model.width": 0}, "width"),
        ):
            with pytest.raises(UserError, match=words):
                resolve(config_for("jem", changes=changes))

    def test_a_reference_without_a_likelihood_is_refused_before_the_training(self, tmp_path):
        for name, words in (("jem", "no likelihood: exp"), ("ddgm", "no likelihood|no score")):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config_for(name)))
            with pytest.raises(UserError, match=rf"config\.study\.reference=.*a run of {name}, which has ({words})"):
                resolve(config_for("jem", changes={"study.reference": str(folder)}))
        resolve(config_for("jem", changes={"study.reference": str(tmp_path / "nowhere")}))

    @pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
    def test_a_reference_is_not_asked_of_images_that_it_was_trained_on(self, seed, same, monkeypatch):
        monkeypatch.setattr(
            energy_classifier, "_bits", lambda run, study, kinds, ids: dict.fromkeys(kinds, torch.rand(2))
        )
        setup = resolve(config_for("jem", changes={"data.seed": seed}))
        reference = str(Path(__file__).parents[1] / "pretrained" / "vp_digits")
        study = energy_classifier.Study(images=2, flow_steps=2, reference=reference)
        told, said = energy_classifier.outside(setup, study, setup.model, {})
        assert (f"bits/dim, {reference}" in told) == same
        assert ("has the same test split" if same else "another test split (seed 0, here digits and seed 1)") in said

    def test_it_says_that_it_has_no_likelihood(self):
        system = systems.create("jem")
        assert "not normalised" in system.no_likelihood and system.no_score

    @pytest.mark.slow
    def test_the_system_goes_through(self, tmp_path):
        assert jem.main(["--dry_run", "--quiet", f"--workdir={tmp_path}"]) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        own, scored = results["jem"], results["bits_per_dim"]
        assert scored["kind"] == "none" and "not normalised" in scored["reason"]
        assert set(own["classification"]) == {"jem", "plain"} == set(own["attack"])
        assert {"inverted", "permuted", "flipped", "noise"} == set(own["outside"]["energy E(x)"])
        assert len(own["outside"]) == 5  # energy, gradient, two classifiers, bits/dim
        for name in ("jem.png", "samples/chains.png", "samples/buffer.png", "samples/classes.png"):
            assert (tmp_path / name).stat().st_size > 1000
        report = (tmp_path / "report.md").read_text()
        assert (
            "one in 20 begins anew" in report and "penalty 0.02" in report and "temperature is 0.002, not 1" in report
        )

    @pytest.mark.slow
    def test_the_energy_alone_goes_through(self, tmp_path):
        assert jem.main(["--preset=energy", "--dry_run", "--quiet", f"--workdir={tmp_path}"]) == 0
        own = json.loads((tmp_path / "results.json").read_text())["jem"]
        assert "classification" not in own and set(own["outside"]) >= {"energy E(x)", "abs(grad E(x))"}
