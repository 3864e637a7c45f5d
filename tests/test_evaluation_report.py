"""Samples against data: the default measure sees what is wrong with samples, and the report says what is doubtful."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import data
import evaluation
from data import DataError

SIZE = 297


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.create("digits")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classifiers")


@pytest.fixture(scope="module")
def classifier(digits: data.Dataset, cache: Path) -> evaluation.Classifier:
    return evaluation.train_classifier(digits, cache=cache)


def noisy(images: Tensor, std: float) -> Tensor:
    """Gaussian noise, in units of the range of grey values, and rounding back to them."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + 0.5 + 17 * std * noise).floor().clamp(0, 16).to(torch.uint8)


def fitted_gaussian(images: Tensor, n: int) -> Tensor:
    flat = images.flatten(1).double()
    factor = torch.linalg.cholesky(torch.cov(flat.T) + 1e-6 * torch.eye(64, dtype=torch.float64))
    z = torch.randn((n, 64), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (flat.mean(dim=0) + z @ factor.T).round().clamp(0, 16).to(torch.uint8).reshape(n, 1, 8, 8)


def distances(features: evaluation.Features, digits: data.Dataset) -> dict[str, np.ndarray]:
    """FD against the training data of 20 random sets of 200 test images, as they are and spoilt: paired, because every
    set shares its luck (which classes it has) between its versions."""
    test = digits.split("test")
    reference = features.extract(digits.split("train").x).values
    versions = {
        "clean": test.x,
        **{f"noise {std}": noisy(test.x, std) for std in (0.05, 0.1, 0.2)},
        "gaussian": fitted_gaussian(digits.split("train").x, SIZE),
    }
    extracted = {name: features.extract(x).values for name, x in versions.items()}
    found: dict[str, list[float]] = {name: [] for name in (*versions, "without 3")}
    for seed in range(20):
        rows = torch.from_numpy(data.dataset.permutation(SIZE, seed)[:200].copy())
        kept = rows[test.labels[rows] != 3]
        for name, values in extracted.items():
            found[name].append(evaluation.frechet_distance(values[rows], reference).value)
        # Compared at equal size with the clean set, since the bias depends on it.
        spare = torch.from_numpy(data.dataset.permutation(SIZE, seed)[200:].copy())
        filled = torch.cat([kept, spare[test.labels[spare] != 3][: 200 - len(kept)]])
        found["without 3"].append(evaluation.frechet_distance(extracted["clean"][filled], reference).value)
    return {name: np.array(values) for name, values in found.items()}


def test_sanity_table(digits: data.Dataset, classifier: evaluation.Classifier) -> None:
    """Every kind of bad sample is seen by the default measure: in every one of 20 sets it is worse, the mean by at
    least 15 %."""
    table = distances(classifier, digits)
    floor = table["clean"]
    for name, values in table.items():
        print(f"{name:10} {values.mean():6.2f} ± {values.std():.2f}   {values.mean() / floor.mean():.2f} x the floor")
    for name, least in (
        ("noise 0.05", 1.15),
        ("noise 0.1", 2.0),
        ("noise 0.2", 5.0),
        ("without 3", 1.4),
        ("gaussian", 7.0),
    ):
        assert (table[name] > floor).all(), name
        assert table[name].mean() / floor.mean() > least, name
    assert table["noise 0.05"].mean() < table["noise 0.1"].mean() < table["noise 0.2"].mean()
    # Why random features are not the default: what they see of the missing class is a third of it or less.
    blind = distances(evaluation.RandomConvolutions(levels=17), digits)
    seen = blind["without 3"].mean() / blind["clean"].mean() - 1
    assert seen < (table["without 3"].mean() / floor.mean() - 1) / 3


def test_the_ordinary_report_sees_light_noise_and_every_missing_class(
    digits: data.Dataset, classifier: evaluation.Classifier
) -> None:
    """With more than three of the standard errors that the report itself states."""
    test = digits.split("test")

    def errors(samples: Tensor) -> float:
        report = evaluation.evaluate_samples(samples, digits, features=classifier, measures=("FD",))
        return report["FD"].errors_from_floor

    assert errors(noisy(test.x, 0.05)) > 3
    seen = [errors(test.x[test.labels != k]) for k in range(10)]
    assert min(seen) > 3, seen


def test_groups_have_a_common_interval(digits: data.Dataset) -> None:
    """Of equal groups: as wide as one's by the root of their number; and it is printed."""
    pixels = evaluation.Pixels(levels=17)
    x = digits.split("test").x
    one = evaluation.evaluate_samples(noisy(x, 0.1), digits, features=pixels, measures=("KD", "SW"))
    four = evaluation.evaluate_samples(noisy(x, 0.1).repeat(4, 1, 1, 1), digits, features=pixels, measures=("KD", "SW"))
    assert four.group == 297
    low, high = one["KD"].score.interval
    middle = one["KD"].score.value
    assert four["KD"].score.value == pytest.approx(middle)
    assert four["KD"].score.interval == pytest.approx(((middle + low) / 2, (middle + high) / 2))
    assert four["SW"].score.interval is None
    (line,) = (line for line in str(four).splitlines() if line.startswith("KD"))
    assert line.count("[") == line.count("]") == 3  # the features' name, and two intervals
    assert "± nan" not in str(four)


def test_classifier_is_seeded_cached_and_named_by_its_weights(
    digits: data.Dataset, cache: Path, classifier: evaluation.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert classifier.accuracy > 0.95
    assert classifier.name.startswith("clf-digits-")
    assert len(classifier.name) == len("clf-digits-1a2b")
    monkeypatch.setattr("evaluation.classifier._fit", lambda *_: pytest.fail("trained again"))
    again = evaluation.train_classifier(digits, cache=cache)
    assert (again.name, again.accuracy, again.weights_hash) == (
        classifier.name,
        classifier.accuracy,
        classifier.weights_hash,
    )
    x = digits.split("test").x[:50]
    assert torch.equal(again.extract(x).values, classifier.extract(x).values)
    monkeypatch.undo()
    state = torch.get_rng_state()
    short = [evaluation.train_classifier(digits, steps=3, seed=seed, cache=None).weights_hash for seed in (0, 0, 1)]
    assert short[0] == short[1] != short[2]
    assert torch.equal(state, torch.get_rng_state())  # no global randomness is used
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert evaluation.train_classifier(digits, steps=3, cache=None).weights_hash == short[0]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_features_are_standardised_on_the_training_data(
    digits: data.Dataset, classifier: evaluation.Classifier
) -> None:
    values = classifier.extract(digits.split("train").x).values
    assert values.mean(dim=0).abs().max() < 1e-4
    std = values.std(dim=0)
    assert (std <= 1 + 1e-3).all()
    assert std[:32].median() == pytest.approx(0.7, abs=1e-3)
    assert std[32:64].median() == pytest.approx(0.5, abs=1e-3)
    assert std[64:].median() == pytest.approx(1.0, abs=1e-3)


def test_damaged_cached_classifier_is_refused(digits: data.Dataset, tmp_path: Path) -> None:
    evaluation.train_classifier(digits, steps=2, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    other = data.create("digits", seed=5)
    for raw in (b"", whole[:200], whole[:-10], whole.replace(b"fingerprint", b"fingerprimt")):
        path.write_bytes(raw)
        with pytest.raises(DataError, match="delete it"):
            evaluation.train_classifier(digits, steps=2, cache=tmp_path)
    path.write_bytes(whole)
    evaluation.train_classifier(other, steps=2, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # another data set is another file


def test_report_of_held_out_data_is_at_the_floor(digits: data.Dataset, classifier: evaluation.Classifier) -> None:
    report = evaluation.evaluate_samples(digits.split("test").x, digits, features=classifier)
    assert [m.key for m in report.measures] == [
        "FD",
        "KD",
        "MMD",
        "SW",
        "precision",
        "recall",
        "density",
        "coverage",
        "CS",
    ]
    for measure in report.measures:
        assert abs(measure.errors_from_floor) < 1e-6, measure.name
    assert report["FD"].name == f"FD[{classifier.name}]"
    assert report[f"FD[{classifier.name}]"] is report["FD"]
    assert "FID" not in str(report)
    assert (report.samples, report.held_out, report.reference, report.group) == (297, 297, 1500, 297)
    text = str(report)
    assert "±" in text
    assert "held-out data" in text
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.to_dict()["measures"][report["KD"].name]["score"]["interval"][0] < report["KD"].score.value
    with pytest.raises(KeyError, match="expected one of FD"):
        report["FID"]


def test_report_of_bad_samples(digits: data.Dataset, classifier: evaluation.Classifier) -> None:
    bad = evaluation.evaluate_samples(fitted_gaussian(digits.split("train").x, 700), digits, features=classifier)
    assert bad.group == 297
    assert any("106 of 700 samples did not fill a group" in note for note in bad.warnings)
    for key in ("FD", "KD", "MMD", "SW", "precision", "recall", "density", "coverage", "CS"):
        assert bad[key].errors_from_floor > 5, key
    one = evaluation.evaluate_samples(
        fitted_gaussian(digits.split("train").x, 297), digits, features=classifier, measures=("FD",)
    )
    # Two groups: the error of their mean is smaller by about the root of two.
    assert bad["FD"].score.stderr == pytest.approx(one["FD"].score.stderr / math.sqrt(2), rel=0.5)
    test = digits.split("test")
    missing = evaluation.evaluate_samples(test.x[test.labels != 3], digits, features=classifier, measures=("FD",))
    assert any(note.startswith("class 3: 0.") for note in missing.warnings)
    assert not any(note.startswith("class 4") for note in missing.warnings)


def test_memorised_samples_are_flagged(digits: data.Dataset) -> None:
    train = digits.split("train").x
    copies = train[torch.from_numpy(data.dataset.permutation(1500, seed=4)[:300].copy())]
    pixels = evaluation.Pixels(levels=17)
    report = evaluation.evaluate_samples(copies, digits, features=pixels, measures=("SW",))
    assert any("100.0 ± " in note and "look for memorised ones" in note for note in report.warnings)
    assert report.memorisation.samples == (0.0,) * 5
    assert min(report.memorisation.held_out) > 0
    assert report.to_dict()["memorisation"]["share"]["value"] == 1.0
    some = torch.cat([copies[:60], digits.split("test").x[60:]])
    report = evaluation.evaluate_samples(some, digits, features=pixels, measures=("SW",))
    assert any("look for memorised ones" in note for note in report.warnings)
    clean = evaluation.evaluate_samples(digits.split("test").x, digits, features=pixels, measures=("SW",))
    assert clean.warnings == ()
    assert clean.memorisation.samples == clean.memorisation.held_out
    assert clean.memorisation.share.value == pytest.approx(0.05, abs=0.004)
    distance, index = evaluation.nearest(train[:5].flatten(1), train.flatten(1))
    assert distance.tolist() == [0.0] * 5
    assert index.tolist() == [0, 1, 2, 3, 4]


def test_doubtful_numbers_are_flagged(digits: data.Dataset) -> None:
    pixels = evaluation.Pixels(levels=17)
    few = evaluation.evaluate_samples(digits.split("test").x[:40], digits, features=pixels)
    assert any("40 samples for 64 features" in note for note in few.warnings)
    constant = evaluation.evaluate_samples(torch.zeros(60, 1, 8, 8, dtype=torch.uint8), digits, features=pixels)
    assert "all samples are equal" in constant.warnings
    assert constant["FD"].errors_from_floor > 5
    assert constant["coverage"].score.value < 0.1
    doubled = digits.split("test").x[:50].repeat(2, 1, 1, 1)
    assert any(
        "exact copies" in note
        for note in evaluation.evaluate_samples(doubled, digits, features=pixels, measures=("SW",)).warnings
    )


class _Broken(evaluation.Features):
    name = "broken"

    def extract(self, data: Tensor) -> evaluation.Extracted:
        values = data.flatten(1).double()
        values[3] = math.nan
        return evaluation.Extracted(values)


@pytest.mark.parametrize(
    ("samples", "match"),
    [
        (torch.zeros(20, 1, 8, 8), "transform.to_data"),
        (torch.zeros(20, 1, 8, 9, dtype=torch.uint8), r"expected uint8 \(N, 1, 8, 8\)"),
        (torch.zeros(20, 1, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "got 1 samples"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "got 0 samples"),
        (torch.full((20, 1, 8, 8), 17, dtype=torch.uint8), "grey value 17"),
    ],
)
def test_bad_samples_are_refused(digits: data.Dataset, samples: Tensor, match: str) -> None:
    with pytest.raises(DataError, match=match):
        evaluation.evaluate_samples(samples, digits, features=evaluation.Pixels(levels=17))


def test_other_refusals(digits: data.Dataset) -> None:
    x = digits.split("test").x
    with pytest.raises(DataError, match="NaN or infinite for 1 of 297"):
        evaluation.evaluate_samples(x, digits, features=_Broken())
    with pytest.raises(DataError, match="the unknown measure 'FID'"):
        evaluation.evaluate_samples(x, digits, measures=("FID",))
    for most in (1, 1e4):
        with pytest.raises(DataError, match="max_reference"):
            evaluation.evaluate_samples(x, digits, max_reference=most)
    for measures in ((), "FD"):
        with pytest.raises(DataError, match=r"expected some of FD.*\('FD',\)"):
            evaluation.evaluate_samples(x, digits, measures=measures)
    with pytest.raises(DataError, match="samples of class list"):
        evaluation.evaluate_samples(x.tolist(), digits)
    with pytest.raises(DataError, match="the model was trained on"):
        evaluation.evaluate_samples(x, digits, split="train")
    with pytest.raises(DataError, match="without a split 'tset'"):
        evaluation.evaluate_samples(x, digits, split="tset")
    moons = data.create("moons", train=50, test=20, validation=0)
    with pytest.raises(DataError, match="diverged"):
        evaluation.evaluate_samples(torch.full((20, 2), math.nan), moons)
    with pytest.raises(DataError, match="expected labelled images"):
        evaluation.train_classifier(moons)
    with pytest.raises(DataError, match="width=0"):
        evaluation.RandomConvolutions(width=0)


def test_arrays_and_other_splits_are_evaluated_too(digits: data.Dataset) -> None:
    x, pixels = digits.split("validation").x, evaluation.Pixels(levels=17)
    report = evaluation.evaluate_samples(x.numpy(), digits, features=pixels, measures=("SW",), split="validation")
    assert (report.split, report.held_out, report.reference) == ("validation", 200, 1300)  # the rest of train
    assert report["SW"].errors_from_floor == 0


def test_a_measure_without_a_value_does_not_take_the_others_along() -> None:
    """A constant training set has no median distance, which MMD needs for its widths."""
    images = torch.full((40, 1, 4, 4), 7, dtype=torch.uint8)
    moving = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)
    constant = data.from_tensor(images, test=moving, validation=0)
    report = evaluation.evaluate_samples(moving, constant)
    assert math.isnan(report["MMD"].score.value)
    assert all(math.isfinite(m.score.value) for m in report.measures if m.key != "MMD")
    assert [
        note for note in report.warnings if note.startswith("MMD has no value: got a reference half of whose points")
    ]
    json.dumps(report.to_dict(), allow_nan=False)
    str(report)


def test_points_are_compared_in_their_coordinates() -> None:
    moons = data.create("moons", train=2000, test=1000)
    fresh = data.create("moons", train=1000, test=1, validation=0, seed=9).split("train").x
    good = evaluation.evaluate_samples(fresh, moons)
    assert good.features == "coordinates"
    assert all(abs(m.errors_from_floor) < 5 for m in good.measures)
    shifted = evaluation.evaluate_samples(fresh + 0.3, moons)
    assert shifted["FD"].score.value == pytest.approx(2 * 0.09, rel=0.35)
    assert shifted["FD"].errors_from_floor > 3
    assert shifted["precision"].errors_from_floor > 5


class _Stand(torch.nn.Module):
    """The published file's interface, with pixels tiled to 2,048 features."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        flat = x.flatten(1).float()
        features = flat.repeat(1, 1 + 2048 // flat.shape[1])[:, :2048]
        if return_features:
            return features
        return torch.softmax(flat[:, :20] / 100, dim=1)


def stand_in(folder: Path) -> evaluation.Inception:
    with pytest.warns(DeprecationWarning):
        script = torch.jit.script(_Stand())
    script.save(str(folder / "inception.pt"))
    return evaluation.load_inception(folder / "inception.pt", levels=17)


def test_inception_is_a_local_file_and_only_then_the_usual_names_are_used(digits: data.Dataset, tmp_path: Path) -> None:
    features = stand_in(tmp_path)
    report = evaluation.evaluate_samples(
        digits.split("test").x, digits, features=features, measures=("KD", "SW", "CS"), max_reference=300
    )
    assert [m.key for m in report.measures] == ["KID", "SW", "IS"]
    assert report["KID"].name == f"KID[{features.name}]"
    assert 1 <= report["IS"].score.value <= 20
    assert int(features.extract(torch.full((2, 1, 8, 8), 16, dtype=torch.uint8)).values.max()) == 255
    (tmp_path / "not.pt").write_bytes(b"no")
    with pytest.raises(DataError, match="not a TorchScript file"):
        evaluation.load_inception(tmp_path / "not.pt")
    with pytest.raises(DataError, match="does not exist"):
        evaluation.load_inception(tmp_path / "none.pt")


@pytest.mark.slow
def test_frechet_distance_of_2048_features_is_called_fid(digits: data.Dataset, tmp_path: Path) -> None:
    report = evaluation.evaluate_samples(
        digits.split("test").x, digits, features=stand_in(tmp_path), measures=("FD",), max_reference=300
    )
    assert report["FID"].name.startswith("FID[inception-")
    assert any("297 samples for 2048 features" in note for note in report.warnings)


@pytest.mark.slow
def test_ten_thousand_samples_of_28x28_are_one_group() -> None:
    """The measures themselves; the features' network is trained once and cached. (It takes some 30 to 60 seconds of processor
    time, the more the busier the machine: no test's affair.)"""
    images = np.random.RandomState(0).randint(0, 256, (30_000, 1, 28, 28)).astype(np.uint8)
    dataset = data.from_tensor(images[:20_000], labels=np.arange(20_000) % 10, test=images[20_000:], validation=0)
    features = evaluation.train_classifier(dataset, steps=2, cache=None)
    report = evaluation.evaluate_samples(dataset.split("train").x[:10_000], dataset, features=features)
    assert report.group == 10_000
