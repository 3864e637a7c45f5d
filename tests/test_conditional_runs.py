"""A class-conditional run, afterwards: scored and drawn with a class, and without one that it was never trained without."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from test_experiments import QUICK, called, refused
from training_cases import options, points, tiny_model

from experiments import bounds, compare, export, nll, sample, tune, vp
from likelihood import log_likelihood
from models import ScoreModel
from numerics import UserError
from samplers import DDIM, PredictorCorrector
from sde_lib import VPSDE
from training import CheckpointError, initialize_from, load_weights, train
from workflow import Protocol, load_run

pytestmark = pytest.mark.usefixtures("loose_pilots")

NEVER = "trained with classes only"
LABELS = torch.arange(64) % 3


def trained(label_dropout, **more):
    """A conditional model after two steps."""
    model = tiny_model(num_classes=3)
    result = train(model, points(labels=LABELS), None, options(steps=2, label_dropout=label_dropout), **more)
    return model.eval(), result


@pytest.mark.parametrize(
    "use",
    [
        lambda m: DDIM(steps=2)(m.sde, m, (4, 2)),
        lambda m: PredictorCorrector(steps=2)(m.sde, m, (4, 2)),
        lambda m: DDIM(steps=2)(m.sde, m.condition(None), (4, 2)),
        lambda m: log_likelihood(m.sde, m, torch.zeros(2, 2)),
        lambda m: m.noise(torch.zeros(2, 2), torch.tensor(0.5)),
        lambda m: m.denoised(torch.zeros(2, 2), torch.tensor(0.5)),
        lambda m: m.under(VPSDE(beta_max=19.0))(torch.zeros(2, 2), torch.tensor(0.5)),
    ],
    ids=["ddim", "pc", "no class", "likelihood", "noise", "denoised", "another SDE"],
)
def test_a_model_that_never_did_without_a_class_says_so_wherever_it_is_used_without(use):
    model, _ = trained(0.0)
    with pytest.warns(UserWarning, match=NEVER) as said:
        use(model)
    assert "model.condition(labels)" in str(said[0].message) and "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDIM(steps=2)(model.sde, model.condition(1), (4, 2))
        learned, _ = trained(0.25)
        use(learned)
        use(tiny_model().eval())  # no classes
        use(tiny_model(num_classes=3).eval())  # not trained: nothing is known


def test_it_is_remembered_in_the_card_in_checkpoints_and_by_what_begins_with_its_weights(tmp_path):
    for dropout in (0.0, 0.25):
        place = tmp_path / str(dropout)
        model, _ = trained(dropout, folder=place / "run")
        assert model.learned_without_class is (dropout > 0)
        model.save_pretrained(place / "pretrained")
        assert json.loads((place / "pretrained" / "card.json").read_text())["learned_without_class"] is (dropout > 0)
        assert ScoreModel.from_pretrained(place / "pretrained").learned_without_class is (dropout > 0)
        loaded = tiny_model(num_classes=3)
        load_weights(loaded, place / "run")
        assert loaded.learned_without_class is (dropout > 0)
        for source in ("run", "pretrained"):
            begun = tiny_model(num_classes=3)
            initialize_from(begun, place / source)
            assert begun.learned_without_class is (dropout > 0)
        again = tiny_model(num_classes=3)
        train(
            again, points(labels=LABELS), None, options(steps=3, label_dropout=0.0), folder=place / "run", resume=True
        )
        assert again.learned_without_class is (dropout > 0)  # what was learned stays
    plain = tiny_model()
    train(plain, points(), None, options(steps=1))
    assert plain.learned_without_class is None


@pytest.mark.parametrize("source", ["run", "pretrained", "run/checkpoints/step_00000002.pt"])
def test_a_model_with_classes_may_begin_from_one_without(source, tmp_path):
    plain = tiny_model()
    train(plain, points(), None, options(steps=2, ema=(0.9,)), folder=tmp_path / "run")
    load_weights(plain, tmp_path / "run")
    plain.save_pretrained(tmp_path / "pretrained")
    begun = tiny_model(num_classes=3)
    before = {k: v.clone() for k, v in begun.state_dict().items()}
    initialize_from(begun, tmp_path / source)
    after, stored = begun.state_dict(), plain.state_dict()
    (table,) = set(after) - set(stored)
    assert torch.equal(after[table], before[table]) and not torch.equal(after[table], torch.zeros_like(after[table]))
    assert all(torch.equal(after[k], stored[k]) for k in stored)
    assert any(not torch.equal(before[k], stored[k]) for k in stored)
    # what continues, or samples, a run is the very model; and classes of one kind are not those of another
    with pytest.raises(CheckpointError, match="expected the same network"):
        load_weights(tiny_model(num_classes=3), tmp_path / "run")
    begun.save_pretrained(tmp_path / "three")
    for other in (tiny_model(num_classes=4), tiny_model()):
        with pytest.raises(CheckpointError):
            initialize_from(other, tmp_path / "three")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "conditional"
    changes = (
        "--config.model.class_conditional=True",
        "--config.training.label_dropout=0.0",
        "--config.training.learning_rate=0.05",
    )
    done = called(vp.main, f"--workdir={folder}", *QUICK, *changes)
    assert NEVER in done.stderr
    return folder


@pytest.mark.slow
def test_nll_gives_each_image_its_own_class_or_all_of_them_one(run):
    few = ("--run", run, "--limit", 20, "--solver", "accurate", "--tolerance", 1e-3, "--draws", 1, "--probes", 1)

    def per_image(label):
        done = called(nll.main, *few, "--label", label)
        assert (NEVER in done.stderr) is (label == "none")
        (entry,) = (
            e
            for name, e in json.loads((run / "results.json").read_text()).items()
            if name.startswith("nll/") and e["protocol"]["label"] == str(label)
        )
        parts = sorted((run / entry["parts"]).glob("part_*.npz"))
        return np.concatenate([np.load(part)["estimates"].reshape(-1) for part in parts])

    own, none, three = per_image("own"), per_image("none"), per_image(3)
    labels = load_run(run).dataset.split("test").labels[:20].numpy()
    assert 1 < (labels == 3).sum() < 19
    assert np.allclose(own[labels == 3], three[labels == 3], atol=1e-4)
    assert (np.abs(own - three)[labels != 3] > 1e-4).all()
    assert (np.abs(own - none) > 1e-4).all()


@pytest.mark.slow
def test_a_class_that_is_not_there_is_refused(run, tmp_path):
    refused(called(nll.main, "--run", run, "--label", "12", check=False), 2, "12", "classes 0 to 9")
    refused(called(nll.main, "--run", run, "--label", "mine", check=False), 2, "label='mine'", "own, none")
    refused(called(sample.main, "--run", run, "--label", "10", check=False), 2, "classes 0 to 9")
    refused(called(bounds.main, "--run", run, "--label", "10", check=False), 2, "classes 0 to 9")
    refused(called(compare.main, "--run", run, "--label", "-1", check=False), 2, "classes 0 to 9")


@pytest.mark.slow
def test_sampling_and_exports_say_it_too(run, tmp_path):
    draw = ("--n", 2, "--steps", 2)
    assert NEVER in called(sample.main, "--run", run, *draw).stderr
    assert NEVER not in called(sample.main, "--run", run, *draw, "--label", 3).stderr
    called(export.main, "--run", run, "--to", tmp_path / "model")
    assert NEVER in called(sample.main, "--run", tmp_path / "model", *draw).stderr


@pytest.mark.slow
def test_a_sampler_tuned_to_a_class_is_drawn_from_by_the_line_that_tuning_prints(run):
    draw = ("--run", run, "--sampler", "tuned", "--n", 2, "--steps", 2, "--quiet")
    said = called(sample.main, *draw, "--label", 3, check=False)
    refused(said, 2, "no sampler was tuned", f"tune.py --run {run} --label 3 --nfe 2")
    few = ("--n", 8, "--rounds", 1, "--tolerance", 1e-2, "--quiet")
    out = called(tune.main, "--run", run, "--label", 3, "--nfe", 2, *few).stdout
    program, *printed = out.splitlines()[-1].removeprefix("draw with: ").split()
    assert program == "sample.py" and called(sample.main, *printed, "--n", 2, "--quiet").stdout
    other = called(sample.main, *draw, "--label", 4, check=False)
    refused(other, 2, "another class", f"tune.py --run {run} --label 4 --nfe 2")
    refused(called(sample.main, *draw, check=False), 2, "another class", f"tune.py --run {run} --nfe 2")
    guided = called(sample.main, *draw, "--label", 3, "--guidance", 2, check=False)
    refused(guided, 2, "--guidance", "take another sampler")
    assert "tune.py" not in guided.stderr


def test_labels_of_a_protocol():
    assert Protocol(label="OWN").label == "own" and Protocol(label=3).label == "3"
    with pytest.raises(UserError, match="own, none"):
        Protocol(label="-1")
