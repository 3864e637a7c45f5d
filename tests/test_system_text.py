"""The text system: its measures against known laws, what it refuses, and a rehearsal of the whole."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_experiments import called, refused
from test_system_classes import oracle_run

from data import DataError
from data.glyphs import attributes, captions
from evaluation import save_captioned, train_attribute_classifier
from experiments import sample, text
from guidance import classifier_free
from numerics import UserError, batch_time
from samplers import DDIM
from sde_lib.analytic import GaussianMixture
from workflow.caption_sweep import ALL, Judge, sweep, variety
from workflow.caption_worth import caption_worth
from workflow.configuration import config_for
from workflow.setup import resolve
from workflow.systems.text import TextStudy


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bars(n, seed=0):
    """Pictures (n, 1, 8, 8) of one bar: upright or flat, at one of three places, dim or bright; and these attributes."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        name: torch.randint(count, (n,), generator=generator)
        for name, count in (("flat", 2), ("place", 3), ("bright", 2))
    }
    x = torch.zeros(n, 1, 8, 8)
    for i in range(n):
        at = 1 + 2 * int(parts["place"][i])
        x[i, 0, :, at : at + 2] = 150 + 100 * int(parts["bright"][i])
        if parts["flat"][i]:
            x[i] = x[i].mT.clone()
    return (x + 20 * torch.rand(x.shape, generator=generator)).clamp(max=255).to(torch.uint8), parts


class TestAttributeClassifier:
    def test_sees_each_attribute_and_the_seed_decides(self):
        x, parts = bars(300)
        judge = train_attribute_classifier(x, parts, steps=40)
        again, other = (train_attribute_classifier(x, parts, steps=2, seed=s) for s in (0, 1))
        once = train_attribute_classifier(x, parts, steps=2)
        new, wanted = bars(200, seed=1)
        right = judge.right(new, wanted)
        assert all(float(ok.double().mean()) > 0.95 for ok in right.values())
        wrong = {**wanted, "flat": 1 - wanted["flat"]}
        assert float(judge.right(new, wrong)["flat"].double().mean()) < 0.05
        assert torch.equal(judge.right(new, wrong)["place"], right["place"])
        weights = [torch.cat([p.flatten() for p in made.network.parameters()]) for made in (once, again, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])

    def test_refuses(self):
        x, parts = bars(20)
        with pytest.raises(DataError, match="no attributes"):
            train_attribute_classifier(x, {})
        with pytest.raises(DataError, match="attribute flat"):
            train_attribute_classifier(x, {"flat": parts["flat"][:5]})
        with pytest.raises(DataError, match="torch.bool"):
            train_attribute_classifier(x, {"flat": parts["flat"].bool()})
        with pytest.raises(DataError, match="no images"):
            train_attribute_classifier(x[:0], {"flat": parts["flat"][:0]})
        judge = train_attribute_classifier(x, parts, steps=1)
        for wanted in ({"flat": parts["flat"]}, {**parts, "place": parts["place"][:3]}):
            with pytest.raises(DataError, match="of the attribute place|of the attribute bright"):
                judge.right(x, wanted)


def test_variety_is_the_ratio_of_variances():
    K, S = 60, 5
    centres, spread = draws(K, 1, 1, 3, 3), 1 + 0.3 * draws(K, 1, 1, 1, 1, seed=1).abs()
    real = centres + spread * draws(K, 4, 1, 3, 3, seed=2)
    alike = variety(centres + spread * draws(K, S, 1, 3, 3, seed=3), real)
    assert abs(alike.value - 1) < 3 * alike.stderr and alike.stderr < 0.1
    narrow = variety(
        0.5 * centres + 0.5 * spread * draws(K, S, 1, 3, 3, seed=4), real
    )  # captions' own centres do not count
    assert abs(narrow.value - 0.25) < 3 * narrow.stderr
    # its error is that of other draws
    values = [
        variety(spread * draws(K, S, 1, 3, 3, seed=s), spread * draws(K, 4, 1, 3, 3, seed=s + 1)).value
        for s in range(10, 90, 2)
    ]
    assert 0.6 < alike.stderr / float(torch.tensor(values).std()) < 1.6
    with pytest.raises(UserError, match="1 samples"):
        variety(real[:, :1], real)


class NearestMean:
    """A judge of points in the plane: the class is the nearest mean's."""

    def __init__(self, means):
        self.means = means

    def right(self, x, wanted):
        found = torch.cdist(x.double(), self.means).argmin(dim=1)
        return {"class": found == wanted["class"], "first": (found == 0) == wanted["first"]}


def test_a_sweep_over_exact_scores(tmp_path):
    run = oracle_run(tmp_path)
    run.setup.samplers = {"ddim": DDIM(steps=100)}
    judge = Judge(
        classifier=NearestMean(run.model.means), attributes=lambda labels: {"class": labels, "first": labels == 0}
    )
    labels = torch.tensor([2, 0])
    real = run.model.means[labels].unsqueeze(1) + 0.5 * draws(2, 400, 2)

    def guided(asked, scale):
        return classifier_free(run.model, asked, scale)

    none, own, far = sweep(run, judge, guided, labels, (0.0, 1.0, 3.0), each=60, real=real, name="exact")
    assert own.by_caption.shape == (2, 60, 2) and own.nfe == 101
    for k in range(2):
        mean = own.by_caption[k].double().mean(0)
        assert float((mean - run.model.means[labels[k]]).abs().max()) < 4 * 0.5 / math.sqrt(60)
    assert abs(own.variety.value - 1) < 0.25  # their law is the data's; at every scale they are as wide here
    assert far.accuracy[ALL].value > 0.95 > none.accuracy["class"].value
    assert own.accuracy[ALL].value <= min(own.accuracy["class"].value, own.accuracy["first"].value)
    assert json.dumps(own.to_dict())


def test_what_a_caption_is_worth_is_the_difference_of_exact_densities(tmp_path):
    run = oracle_run(tmp_path, (0.1, 0.2, 0.3))
    found = caption_worth(run, "test", n=120, steps=32)
    test = run.dataset.split("test")
    x, labels = test.x[:120].double(), test.labels[:120]
    t = batch_time(run.sde.t_min, x)

    def log_prob(mean, variance):
        law = GaussianMixture(mean.reshape(1, 2), variance.reshape(1, 1).expand(1, 2).sqrt(), torch.ones(1))
        return law.log_prob(run.sde, x, t)

    of_class = torch.stack([log_prob(*part) for part in zip(run.model.means, run.model.variances, strict=True)])
    given, without = of_class.gather(0, labels.unsqueeze(0))[0], log_prob(run.model.mean, run.model.variance)
    exact = (given - without) / math.log(2)
    assert abs(found.worth.value - float(exact.mean())) < 0.02
    assert abs(found.worth.stderr - float(exact.std()) / math.sqrt(120)) < 0.01
    assert abs(found.given.value + float(given.mean()) / (2 * math.log(2))) < 0.02
    assert (found.images, found.captions) == (120, 3)


def test_strips_have_their_captions(tmp_path):
    x = torch.linspace(0, 1, 3 * 2 * 64).reshape(3, 2, 1, 8, 8)
    save_captioned(tmp_path / "a.png", x, ["bold 3", "a caption much longer than its strip", ""], columns=2)
    save_captioned(tmp_path / "b.png", x, ["bold 4", "a caption much longer than its strip", ""], columns=2)
    a, b = (torch.tensor(list(Image.open(tmp_path / f"{name}.png").tobytes())) for name in "ab")
    assert len(a) == len(b) and 0 < int((a != b).sum()) < 200  # one figure of one caption
    with pytest.raises(DataError, match="2 captions"):
        save_captioned(tmp_path / "c.png", x, ["a", "b"])


def test_held_out_combinations_are_never_trained_on():
    setup = resolve(config_for("text", changes={"data.per_combination": 1, "data.tests": 2, "data.validation": 20}))
    new = set(setup.dataset.split("combinations").labels.tolist())
    assert len(new) == 43
    for split in (setup.training_data, setup.held_out, setup.dataset.split("train"), setup.dataset.split("test")):
        assert not new & set(split.labels.tolist())
    assert setup.options.label_dropout == 0.2 and setup.protocol.label == "own"
    kernel = next(p for p in setup.model.parameters() if p.ndim == 4 and min(p.shape) > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last)  # which makes updates cheaper
    study, test = setup.system.study(setup.config), setup.dataset.split("test")
    chosen = study.classes(test, study.count(setup))
    assert study == TextStudy() and len(chosen.unique()) == study.count(setup) == 43
    assert len(attributes(chosen)["character"].unique()) > 20
    # the first of a split are of all faces
    assert len(attributes(test.labels[:60])["family"].unique()) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (2.0, 1.0)}, "rising"),
        ({"interval": (1.0, -1.0)}, "low < high"),
        ({"scales": (0.0, 2.0, math.inf)}, "scales"),
        ({"shown": 3.0}, "shown=3"),
        ({"each": 1}, "each=1"),
        ({"captions": 1}, "captions=1"),
        ({"rescale": 2.0}, "rescale=2"),
        ({"judge_steps": 0}, "judge_steps=0"),
        ({"images": -1}, "images=-1"),
    ],
)
def test_a_study_that_does_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        TextStudy(**options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.name": "digits"}, "expected glyphs"),
        ({"model.name": "unet"}, "NCSNpp, which reads none"),
        ({"model.class_conditional": False}, "without class_names"),
        ({"training.label_dropout": 0.0}, "label_dropout=0"),
        ({"data.tests": 1}, "data.tests=1"),
        ({"text.scales": (3.0, 1.0)}, "rising"),
    ],
)
def test_a_configuration_that_does_not_fit(changes, words):
    few = {"data.per_combination": 1, "data.tests": 2, "data.validation": 20}
    with pytest.raises(UserError, match=words):
        resolve(config_for("text", changes={**({} if "data.name" in changes else few), **changes}))


@pytest.mark.slow
def test_a_rehearsal_leaves_everything_and_any_caption_is_drawn(tmp_path):
    folder = tmp_path / "run"
    # few steps that change the network a lot, so that captions differ
    learns = ("--config.training.learning_rate=0.05", "--config.training.warmup=1", "--config.training.ema=(0.1,)")
    called(text.main, "--dry_run", f"--workdir={folder}", "--quiet", *learns)
    own = json.loads((folder / "results.json").read_text())["text"]
    kinds = {"captions trained on", "captions never trained on"}
    assert set(own["guidance"]) == set(own["real"]) == set(own["worth"]) == kinds
    assert [p["scale"] for p in own["guidance"]["captions never trained on"]] == [0.0, 1.0, 2.0, 4.0]
    for name in ("attributes", "captions_test", "captions_combinations", "scales_test", "scales_combinations"):
        assert (folder / "samples" / f"{name}.png").stat().st_size > 500
    assert "## Captions" in (folder / "report.md").read_text()

    def drawn(*more):
        said = called(sample.main, "--run", folder, "--n", 4, "--steps", 2, "--quiet", *more).stdout
        parts = said.strip().splitlines()[-1].split(", ")[-1]
        return torch.from_numpy(np.load(f"{parts}/part_00000.npz")["x"])

    number = captions().index("bold sans 3")
    by_label, by_caption = drawn("--label", number), drawn("--caption", "bold  sans 3")
    # a network of six updates tells captions apart by little, but what is one caption is equal to the last digit
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(by_label, by_caption, **exactly)
    other = drawn("--caption", "sans 3 bold")  # a caption that no class has
    assert float((other - by_caption).abs().max()) > 1e-6
    torch.testing.assert_close(drawn("--caption", "sans 3", "--guidance", 0), drawn(), **exactly)
    torch.testing.assert_close(drawn("--caption", ""), drawn(), **exactly)
    assert float((drawn("--caption", "bold sans 3", "--guidance", 4) - by_caption).abs().max()) > 1e-5
    refused(called(sample.main, "--run", folder, "--caption", "gothic 3", check=False), 2, "'gothic'", "serif, stix")
    refused(called(sample.main, "--run", folder, "--caption", "sans", "--label", 1, check=False), 2, "one of them")
