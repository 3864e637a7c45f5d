"""The classes system: its parts against exact laws, what it refuses, and a rehearsal of the whole."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_experiments import called, refused
from test_guidance import Classes

from data import from_tensor
from data.transforms import Standardize
from experiments import classes, sample
from guidance import classifier_free
from numerics import SampleStreams, UserError, batch_time
from samplers import DDIM
from sde_lib import VPSDE, WhitenedFlow
from sde_lib.analytic import GaussianMixture
from training.streams import StepStreams
from workflow import systems
from workflow.class_likelihood import bits_by_class, bits_of_classes, class_shares
from workflow.configuration import config_for
from workflow.guidance_sweep import floors, judge_of, sweep
from workflow.pictures import draw_samples
from workflow.run_folder import RunFolder
from workflow.setup import resolve
from workflow.systems.classes import Study


def oracle_run(folder, variances=(0.25, 0.25, 0.25), n=400):
    """What the stages ask of a run, with the exact scores of three Gaussian classes in the plane."""
    sde, shares = VPSDE(), torch.tensor([0.5, 0.3, 0.2])
    model = Classes(sde, variances=variances, spread=0.7)
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(shares, n, replacement=True, generator=generator)
    x = model.means[labels] + model.variances[labels].sqrt() * torch.randn(
        n, 2, generator=generator, dtype=torch.float64
    )
    dataset = from_tensor(x.float(), labels, name="three", test_size=n // 2, validation=0, continuous=True)
    return SimpleNamespace(
        sde=sde,
        model=model,
        dataset=dataset,
        transform=Standardize(),
        device=torch.device("cpu"),
        flow=WhitenedFlow(data_std=1.0),
        folder=RunFolder(folder),
        fingerprint="exact",
        pilot=lambda: dataset.split("train").x[:8],
        setup=SimpleNamespace(
            options=SimpleNamespace(seed=0),
            noun="point",
            sde=sde,
            dataset=dataset,
            device=torch.device("cpu"),
            samplers={},
        ),
    )


def test_classes_by_likelihood_are_bayes_rule(tmp_path):
    run = oracle_run(tmp_path, (0.1, 0.2, 0.3))
    found = bits_by_class(run, n=24, steps=32)
    test = run.dataset.split("test")
    assert found.bits.shape == (24, 3) and torch.equal(found.labels, test.labels[:24])
    law = GaussianMixture(run.model.means, run.model.variances.expand(3, 2).sqrt(), found.prior)
    x = test.x[:24].double()
    exact = law.responsibilities(run.sde, x, batch_time(run.sde.t_min, x)).log()
    likely = exact > -12
    torch.testing.assert_close(found.log_posterior[likely], exact[likely], atol=0.02, rtol=0.01)
    assert torch.equal(found.log_posterior.argmax(1), exact.argmax(1))
    again = bits_by_class(run, n=24, steps=32)  # from the parts
    torch.testing.assert_close(again.bits, found.bits, rtol=0, atol=0)


def test_shares_of_classes():
    split = from_tensor(torch.randn(40, 2), torch.tensor([0] * 30 + [2] * 10), test_size=1, validation=0).split("train")
    shares = class_shares(split, 3)
    assert math.isclose(float(shares.sum()), 1, rel_tol=1e-9) and float(shares[1]) > 0
    assert abs(float(shares[0]) - 0.75) < 0.03


def test_a_sweep_over_exact_scores_gains_class_and_loses_variety(tmp_path):
    """The guided law is N(m_0 + w (m_k - m_0), v), so at scale 3 the classes are told apart and the middle is empty."""
    run = oracle_run(tmp_path)
    run.setup.samplers = {"ddim": DDIM(steps=12)}
    judge = judge_of(run.dataset)
    assert judge.name == "the nearest training sample" and judge.accuracy.value > 0.7

    def guided(labels, scale):
        return classifier_free(run.model, labels, scale)

    low, high = sweep(run, judge, guided, (0.0, 3.0), classes=3, n=150, name="exact")
    assert low.scale == 0 and high.scale == 3 and low.nfe == high.nfe == 13
    assert abs(low.accuracy.value - 1 / 3) < 4 * low.accuracy.stderr  # nothing is asked for
    assert high.accuracy.value > 0.9 and [e.value > 0.8 for e in high.by_class] == [True] * 3
    assert high.measures["FD"].value > low.measures["FD"].value
    for k in range(3):
        mean = high.x[torch.arange(150) % 3 == k].double().mean(0)
        assert float((mean - run.model.guided_mean(torch.tensor([k]), 3.0)).abs().max()) < 0.05 + 4 * 0.5 / math.sqrt(
            50
        )
    assert json.dumps(high.to_dict())
    assert set(floors(run, judge)) == {"class_accuracy", "FD", "precision", "recall", "coverage"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": ()}, "scales"),
        ({"scales": (2.0, 1.0)}, "rising"),
        ({"scales": ("a",)}, "scales"),
        ({"scales": (1.0, math.nan)}, "scales"),
        ({"scales": (1.0, math.inf)}, "scales"),
        ({"scales": 2.0}, "scales=2.0"),
        ({"interval": (3.0, -3.0)}, "low < high"),
        ({"interval": 3.0}, "low < high"),
        ({"samples": 3}, "samples=3"),
        ({"rescale": 2.0}, "rescale=2"),
        ({"images": -1}, "images=-1"),
        ({"images": 1}, "images=1"),
        ({"classifier_steps": 0}, "classifier_steps=0"),
    ],
)
def test_a_study_that_does_not_fit(options, words):
    with pytest.raises(UserError, match=words):
        Study(**options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.class_conditional": False}, "class_conditional=False"),
        ({"training.label_dropout": 0.0}, "label_dropout=0"),
        ({"training.label_dropout": 1.0}, "label_dropout=1"),
        ({"classes.scales": (3.0, 1.0)}, "rising"),
        ({"classes.interval": (1.0, 1.0)}, "low < high"),
    ],
)
def test_a_configuration_that_does_not_fit(changes, words):
    with pytest.raises(UserError, match=words):
        resolve(config_for("classes", changes=changes))


def test_labels_are_hidden_by_default_wherever_there_are_classes():
    from training import TrainingOptions

    assert TrainingOptions(steps=1).label_dropout == 0.1
    config = config_for("classes")
    assert config["training"]["label_dropout"] == 0.1 and config["model"]["class_conditional"]
    assert systems.create("classes").study(config) == Study()


class TwoClasses:
    """The exact noise of two Gaussian classes around m and -m in the first coordinate, with the spectrum of pictures."""

    def __init__(self, sde, m, variances):
        self.sde, self.m, self.variances = sde, m, variances

    def noise(self, x, t, labels=None):
        alpha, sigma = self.sde.alpha(t).unsqueeze(1), self.sde.sigma(t).unsqueeze(1)
        v = alpha**2 * self.variances + sigma**2
        mean = torch.zeros_like(x)
        told = 2.0 * labels - 1 if labels is not None else torch.tanh(self.m * (alpha * x / v)[:, 0])
        mean[:, 0] = self.m * told
        return sigma * (x - alpha * mean) / v


def test_the_pictures_preset_weighs_the_noise_at_which_a_class_is_decided():
    """Two classes 20 apart, as those of pictures are, are told apart at log-SNR -5 or so, where the plain loss is next to
    nothing: of an exact model's loss the class is 0.02 % then, and nothing would teach it. (With the weight it is 3.4 %.)"""
    sde, D, n = VPSDE(), 784, 600
    variances = 1 / torch.arange(1, D + 1).double()
    variances *= 0.7**2 / variances.mean()
    model, generator = TwoClasses(sde, 10.0, variances), torch.Generator().manual_seed(0)
    labels = torch.randint(2, (n,), generator=generator)
    x = variances.sqrt() * torch.randn(n, D, generator=generator, dtype=torch.float64)
    x[:, 0] += model.m * (2.0 * labels - 1)
    config = config_for("classes", preset="fashion_mnist", changes={"training.objective.weighting.data_std": 0.7})
    plain = config_for("classes", preset="fashion_mnist", changes={"training.objective.weighting": "simple"})
    shares = []
    for c in (config, plain):
        objective = systems.create("classes").objective(c)
        draws = objective.draw(sde, (n, D), StepStreams(0, 0), dtype=torch.float64)
        told, untold = (objective.loss(model, x, draws, k) * draws["weight"] for k in (labels, None))
        shares.append(float((untold - told).mean() / untold.mean()))
    assert shares[0] > 0.01 > 0.001 > shares[1] > 0


# few steps that change the network a lot, so that classes differ
LEARNS = ("--config.model.channels=8", "--config.training.learning_rate=0.05", "--config.training.warmup=1")


@pytest.mark.slow
def test_a_rehearsal_leaves_everything_and_the_run_is_guided(tmp_path):
    folder = tmp_path / "run"
    called(classes.main, "--dry_run", f"--workdir={folder}", "--quiet", *LEARNS)
    results = json.loads((folder / "results.json").read_text())
    own, scored = results["classes"], results["bits_per_dim"]
    assert set(own["guidance"]) == {"classifier-free", "classifier"}
    assert [p["scale"] for p in own["guidance"]["classifier"]] == [4.0, 8.0]
    rows = own["bits_per_class"].values()
    assert sum(r["samples"] for r in rows) == scored["images"] and all(r["label"] == "own" for r in rows)
    total = sum(r["samples"] * r["mean"] for r in rows) / scored["images"]
    assert math.isclose(total, scored["mean"], rel_tol=1e-6)
    assert set(own["classification"]["likelihood"]) >= {"accuracy", "log_loss", "ece", "floor"}
    for name in ("trade_off", "sweep_classifier", "sweep_classifier_free"):
        assert (folder / "samples" / f"{name}.png").stat().st_size > 1000
    assert "## Classes" in (folder / "report.md").read_text() and (folder / "classifier.safetensors").is_file()

    def drawn(*more):
        text = called(sample.main, "--run", folder, "--n", 4, "--steps", 2, "--quiet", *more).stdout
        parts = text.strip().splitlines()[-1].split(", ")[-1]
        import numpy as np

        return torch.from_numpy(np.load(f"{parts}/part_00000.npz")["x"])

    plain, one, four = (drawn("--label", 3, *m) for m in ((), ("--guidance", 1), ("--guidance", 4)))
    none, zero = drawn(), drawn("--label", 3, "--guidance", 0)
    torch.testing.assert_close(one, plain)
    torch.testing.assert_close(zero, none)
    assert float((four - plain).abs().max()) > 1e-3
    refused(called(sample.main, "--run", folder, "--guidance", 2, check=False), 2, "--guidance 2.0", "--label K")
    refused(called(sample.main, "--run", folder, "--guidance", "nan", "--label", 1, check=False), 2, "scale=nan")


def test_samples_keep_their_classes_over_batches(tmp_path):
    run = oracle_run(tmp_path)
    labels, sampler = torch.arange(5003) % 3, DDIM(steps=3)
    x, _ = draw_samples(run.setup, classifier_free(run.model, labels, 2.0), sampler, 5003, shown=False)
    last = classifier_free(run.model, labels[5000:], 2.0)
    again = sampler(run.sde, last, (3, 2), generator=SampleStreams(0, torch.arange(5000, 5003))).x
    torch.testing.assert_close(x[5000:], again)


def test_data_without_classes_to_tell_apart_are_refused():
    with pytest.raises(UserError, match="swiss_roll of 1 classes"):
        resolve(config_for("classes", changes={"data.name": "swiss_roll"}))


def test_a_surveyed_splits_classes_are_told_by_its_sample(tmp_path):
    """Ten images of two classes, of which one suspect and four of the nine others were scored, and one of these failed."""
    ids, labels = np.arange(100, 110), torch.tensor([0, 1] * 5)
    np.savez(
        tmp_path / "survey.npz",
        ids=ids,
        suspect=ids == 100,
        scored_ids=ids[[0, 1, 2, 3, 4]],
        scored=np.array([9.0, 2.0, 3.0, math.nan, 4.0]),
        correction=np.asarray(0.5),
    )
    (n, mean, error), (m, other, unknown) = bits_of_classes(tmp_path, labels, 2)
    w = 9 / 4
    assert (n, m) == (3, 1) and mean == pytest.approx((9.5 + w * 3.5 + w * 4.5) / (1 + 2 * w)) and other == 2.5
    assert error > 0 and math.isnan(unknown)
