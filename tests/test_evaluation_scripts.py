"""evaluate.py and leaderboard.py, as a user calls them: what they write, what they replace, what they refuse or leave out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_experiments_presets import QUICK

import data
import evaluation
from evaluation import evaluate_samples
from experiments import bounds, compare, evaluate, leaderboard, ood, vp
from workflow import load_run

pytestmark = pytest.mark.usefixtures("loose_pilots")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Classifiers of these tests are kept for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "vp"
    vp.main([f"--workdir={folder}", *QUICK, "--config.model.channels=8", "--config.model.class_conditional=True"])
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "vp"))


def call(run: Path, *arguments: object) -> None:
    evaluate.main(["--run", str(run), "--steps", "1", "--n", "24", "--features", "pixels", *map(str, arguments)])


def evaluated(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())["evaluation"]


def test_evaluate_writes_numbers_pictures_and_a_section(run: Path) -> None:
    before = (run / "report.md").read_text()
    call(run)
    ((name, entry),) = evaluated(run).items()
    assert name == "DPMSolver(steps=1) in pixels"
    assert {"FD[pixels]", "precision[pixels]"} <= entry["measures"].keys()
    assert (entry["samples"], entry["split"], entry["nfe"]) == (24, "test", 2)
    near = entry["nearest"]
    assert near["space"] == "grey values" and len(near["samples"]) == len(near["held_out"]) == len(near["levels"])
    # By hand: the nearest of all training images to the held-out ones.
    digits = data.create("digits")
    test, train = (digits.split(part).x.flatten(1).double() for part in ("test", "train"))
    usual = torch.cdist(test, train).min(dim=1).values
    assert near["held_out"][3] == pytest.approx(float(usual.median()), rel=1e-9)
    text = (run / "report.md").read_text()
    assert text.startswith(before.rstrip("\n"))
    assert text.count("## Samples measured: ") == 1 and "FD[pixels]" in text and "of all 1,500 training data" in text
    for kind in ("evaluation", "nearest"):
        (picture,) = (run / "samples").glob(f"{kind}-dpm_solver-*.png")
        assert f"(samples/{picture.name})" in text
        with Image.open(picture) as image:
            assert len(np.unique(np.asarray(image))) > 5


def test_evaluate_again_replaces_its_own_entry_and_section_only(run: Path) -> None:
    call(run)
    with (run / "report.md").open("a") as file:
        file.write("\n## Of another tool\n\nkept\n")
    call(run, "--n", 30)
    call(run, "--sampler", "ddim", "--option", "eta=0.5")
    assert {name: entry["samples"] for name, entry in evaluated(run).items()} == {
        "DPMSolver(steps=1) in pixels": 30,
        "DDIM(steps=1, eta=0.5) in pixels": 24,
    }
    text = (run / "report.md").read_text()
    assert text.count("## Samples measured: DPMSolver") == text.count("## Samples measured: DDIM") == 1
    assert "30 samples against" in text and "kept" in text


def test_evaluate_one_class_and_another_split(run: Path) -> None:
    call(run, "--label", 3, "--split", "test")
    (entry,) = evaluated(run).values()
    labels = data.create("digits").split("test").labels
    assert entry["label"] == 3 and entry["held_out"] == int((labels == 3).sum())
    call(run, "--split", "validation")
    assert {e["split"] for e in evaluated(run).values()} == {"test", "validation"}


def test_evaluate_one_class_of_the_validation_samples(run: Path) -> None:
    call(run, "--label", 3, "--split", "validation")
    (entry,) = evaluated(run).values()
    labels = data.create("digits").split("validation").labels
    assert entry["split"] == "validation" and entry["held_out"] == int((labels == 3).sum())


def test_compare_judges_a_class_by_its_own_data(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples drawn of class 3 are beside the test images of class 3, whose distance to the others of it is the floor."""
    monkeypatch.setattr("workflow.tools.compare.default_features", lambda _: evaluation.Pixels(levels=17))
    seen: list[data.Dataset] = []
    quality = evaluation.dataset_quality
    monkeypatch.setattr(
        "workflow.tools.compare.dataset_quality",
        lambda of, *rest, **more: seen.append(of) or quality(of, *rest, **more),
    )
    compare.main(
        ["--run", str(run), "--label", "3", "--samplers", "ddim", "--nfe", "2", "--n", "24", "--measures", "SW"]
    )
    found = json.loads((run / "compare.json").read_text())
    threes = load_run(run).of_class(3)
    test = threes.dataset.split("test")
    assert set(test.labels.tolist()) == {3} and found["label"] == 3
    held_out, measures = found["held_out"], {"features": evaluation.Pixels(levels=17), "measures": ("SW",)}
    (floor,) = evaluate_samples(test.x, threes.dataset, **measures).measures
    assert held_out["samples"] == held_out["held_out"] == len(test)
    assert held_out["reference"] == int((data.create("digits").split("train").labels == 3).sum())
    assert held_out["measures"]["SW[pixels]"]["score"]["value"] == pytest.approx(floor.score.value)
    (judged,) = seen  # what the samples are beside
    assert judged.fingerprint == threes.dataset.fingerprint
    text = (run / "compare.md").read_text()
    assert "of class 3" in text.splitlines()[0] and "held-out data of class 3:" in text


@pytest.mark.slow
def test_bounds_and_ood_score_the_images_of_the_class_that_they_give(run: Path) -> None:
    threes = load_run(run).of_class(3).dataset.split("test")
    few = ("--run", str(run), "--label", "3", "--quiet")
    bounds.main([*few, *["--limit", "0", "--K", "1", "--steps", "2", "--draws", "1", "--levels", "2", "--probes", "1"]])
    stated = json.loads((run / "results.json").read_text())["bounds"]
    assert stated["images"] == len(threes) and stated["label"] == 3
    assert f"{len(threes)} images of class 3, given that class, of the split 'test'" in (run / "bounds.md").read_text()
    ood.main([*few, "--steps", "2"])
    values = np.load(run / "ood_noise_class_3.npz")
    assert {len(values[name]) for name in ("test", "flipped", "noise")} == {len(threes)}
    assert json.loads((run / "results.json").read_text())["ood/noise_class_3"]["test"]["images"] == len(threes)


def test_evaluate_with_the_classifier_and_with_an_inception_file(run: Path, tmp_path: Path) -> None:
    call(run, "--features", "classifier")
    (entry,) = evaluated(run).values()
    assert entry["features"].startswith("clf-digits-")
    (tmp_path / "x.pt").write_bytes(b"no network")
    with pytest.raises(data.DataError, match="not a TorchScript file"):
        call(run, "--features", "inception", "--inception", tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--n", 0], "--n: got '0'"),
        (["--n", -3], "--n: got '-3'"),
        (["--n", 9], ">= 10"),
        (["--batch_size", 0], "--batch_size: got '0'"),
        (["--split", "tset"], "tset"),
        (["--split", "train"], "held-out"),
        (["--label", 57], "label"),
        (["--features", "inception"], "--inception FILE"),
        (["--inception", "x.pt"], "--inception FILE"),
        (["--option", "steps"], "NAME=VALUE"),
    ],
)
def test_evaluate_refuses_before_it_samples(run: Path, arguments: list, match: str, monkeypatch) -> None:
    monkeypatch.setattr("workflow.tools.evaluate.draw_in_chunks", lambda *_, **__: pytest.fail("sampled"))
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=match):
        call(run, *arguments)
    assert sorted(run.rglob("*")) == before


def results(**changes: object) -> dict:
    bits = {
        "mean": 2.5,
        "stderr": 0.02,
        "split": "test",
        "images": 100,
        "protocol": {"data": "abcdef0123", "split": "test"},
    }
    return {"bits_per_dim": bits, "training": {"steps": 10, "seconds": 3.0, "parameters": 1234}, **changes}


def measured(
    value: float, features: str = "clf-digits-1a2b", fingerprint: str = "abcdef0123", short: str = "FD"
) -> dict:
    name = f"{short}[{features}]"
    both = {"score": {"value": value, "stderr": 0.04}, "floor": {"value": 0.7, "stderr": 0.1}}
    return {
        "dataset": "digits",
        "fingerprint": fingerprint,
        "split": "test",
        "sampler": f"S({value})",
        "nfe": 20,
        "measures": {name: both, f"SW[{features}]": both},
    }


def write(folder: Path, found: object, config: object = None) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(found))
    (folder / "config.json").write_text(json.dumps({"data": {"name": "digits"}} if config is None else config))
    return folder


def test_leaderboard_shows_scores_beside_floors_and_ranks_within_a_data_set(tmp_path: Path, capsys) -> None:
    two = {"a": measured(1.23), "b": measured(9.0, "inception-77aa", short="FID")}
    write(tmp_path / "good", results(evaluation=two))
    better = results()
    better["bits_per_dim"]["mean"] = 2.1
    write(tmp_path / "better", better)
    other = results(evaluation={"a": measured(5.0, fingerprint="99999999ff")})
    other["bits_per_dim"]["protocol"]["data"] = "99999999ff"
    write(tmp_path / "other", other)
    (tmp_path / "empty").mkdir()
    assert leaderboard.main([str(f) for f in sorted(tmp_path.iterdir())]) == 0
    first, second = re.split(r"\n\n(?=digits)", capsys.readouterr().out)
    assert first.startswith("digits (fingerprint 99999999), test:") and "other" in first and "good" not in first
    assert second.startswith("digits (fingerprint abcdef01), test:")
    rows = [line for line in second.splitlines() if line.startswith("| ")]
    assert "FD[clf-digits-1a2b]" in rows[0] and "FID[inception-77aa]" in rows[0] and "SW" not in rows[0]
    assert [row.split("|")[1].strip().rsplit("/", 1)[-1] for row in rows[1:]] == ["better", "good", "good"]
    assert "2.500 ± 0.020" in rows[2] and "1.230 ± 0.040 (floor 0.70 ± 0.10)" in rows[2]
    assert "9.000 ± 0.040 (floor" in rows[3] and "S(9.0)" in rows[3]


@pytest.mark.parametrize(
    ("found", "config", "shown"),
    [
        ([1, 2], None, False),
        (results(), {}, False),
        (results(), {"data": None}, False),
        (results(), [3], False),
        ({"bits_per_dim": None, "training": [1], "evaluation": "x"}, None, True),
        ({"bits_per_dim": {"mean": 2.0}}, None, True),
        (
            {
                "bits_per_dim": {"mean": None, "stderr": None, "protocol": 5},
                "evaluation": {"a": None, "b": {"measures": 7}},
            },
            None,
            True,
        ),
        (results(evaluation={"a": {"measures": {"FD[x]": {"score": None}, "FD[y]": None}}}), None, True),
        (
            results(evaluation={"measures": {"FD[x]": {"score": {"value": 1.0}}}}),
            None,
            True,
        ),  # as it was written before
    ],
)
def test_an_odd_folder_does_not_take_the_table_along(tmp_path: Path, capsys, found, config, shown: bool) -> None:
    whole, odd = write(tmp_path / "whole", results()), write(tmp_path / "odd", found, config)
    leaderboard.main([str(whole), str(odd)])
    output = capsys.readouterr()
    assert "2.500 ± 0.020" in output.out
    assert (str(odd) in output.out) == shown
    assert output.err.count("\n") == (0 if shown else 1)
    assert ("odd is left out: " in output.err) != shown


def test_leaderboard_of_files_that_are_no_json_and_of_nothing(tmp_path: Path, capsys) -> None:
    whole, odd = write(tmp_path / "whole", results()), write(tmp_path / "odd", {})
    (odd / "results.json").write_bytes(b'{"a": "\xff')
    leaderboard.main([str(whole), str(odd), str(tmp_path / "none")])
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="none with results"):
        leaderboard.main([str(odd)])


def test_pretrained_folders_are_in_the_table_and_can_be_evaluated(tmp_path: Path, capsys) -> None:
    shipped = Path(evaluation.__file__).resolve().parents[1] / "pretrained" / "vp_digits"
    leaderboard.main([str(shipped)])
    assert "1.740 ± 0.013" in capsys.readouterr().out
    copy = Path(shutil.copytree(shipped, tmp_path / "p"))
    call(copy)
    capsys.readouterr()
    leaderboard.main([str(copy)])
    shown = capsys.readouterr().out
    assert "1.740 ± 0.013" in shown and "FD[pixels]" in shown
    assert "## Samples measured: DPMSolver" in (copy / "report.md").read_text()
