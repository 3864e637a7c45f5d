"""Test samples that are in train: found, named, said in the run's report, and left out where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DataError
from experiments import vp

GENERATOR = torch.Generator().manual_seed(0)


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 4, 5), generator=GENERATOR, dtype=torch.uint8)


def test_duplicates_are_those_of_a_comparison_of_every_pair() -> None:
    for x in (
        images(300),
        torch.randn(300, 3, generator=GENERATOR),
        torch.randn(300, 2, 7, generator=GENERATOR).double(),
    ):
        test = torch.cat([x[[5, 5, 250]], x[:4] * 0 + x[7:8], x[10:12].flip(-1)])
        train = torch.cat([x, x[5:6]])
        found = data.from_tensor(train, test=test).duplicates()
        equal = (test.unsqueeze(1) == train.unsqueeze(0)).flatten(2).all(dim=2)
        assert found.rows.tolist() == equal.any(dim=1).nonzero().squeeze(1).tolist() == list(range(7))
        assert found.firsts.tolist() == equal[found.rows].int().argmax(dim=1).tolist() == [5, 5, 250, 7, 7, 7, 7]
        assert found.others.tolist() == equal.any(dim=0).nonzero().squeeze(1).tolist() == [5, 7, 250, 300]
        assert found.ids.tolist() == (found.rows + len(train)).tolist()
        assert len(set(found.fingerprints)) == 3 and found.fingerprints[0] == found.fingerprints[1]


def test_samples_that_differ_in_the_highest_bits_are_told_apart() -> None:
    """Sums of products with odd weights see two flipped highest bits cancel."""
    x = torch.zeros(4, 2, dtype=torch.float64)
    x[1] = -x[1]  # the sign bits alone
    x[2, 0] = 1.0
    assert len(data.from_tensor(x[[0, 2]], test=x[[1]], validation=0).duplicates()) == 0


def test_one_message_counts_and_names_them() -> None:
    x = images(50)
    found = data.from_tensor(x, test=torch.cat([x[[3]], images(5)]), validation=0).duplicates()
    assert str(found) == f"1 of 6 samples of test are also in train (test 50 = train 3 [{found.fingerprints[0]}])"
    assert str(data.create("digits").duplicates()) == "no sample of test is also in train"
    with pytest.raises(DataError, match="without a split 'dev'"):
        data.create("digits").duplicates("dev")


def test_they_are_left_out_of_train() -> None:
    x = images(50)
    dataset = data.from_tensor(x, torch.arange(50), test=x[[3, 8]], test_labels=torch.tensor([3, 8]), validation=4)
    cleaned = dataset.without_duplicates()
    assert cleaned.split("train").labels.tolist() == [i for i in range(50) if i not in (3, 8)]
    assert len(cleaned.duplicates()) == 0 and len(cleaned.split("fit")) == 44
    assert cleaned.notes == ("2 training samples are left out, since they are in test",)
    assert cleaned.without_duplicates() is cleaned
    with pytest.raises(DataError, match="all in test"):
        data.from_tensor(x, test=x).without_duplicates()


QUICK = [
    *(
        "training.steps=1",
        "training.warmup=1",
        "training.batch_size=2",
        "training.log_every=1",
        "training.validation=2",
    ),
    *("sampling.steps=1", "sampling.second_steps=1", "sampling.n=2", "likelihood.steps=2", "likelihood.limit=1"),
    *("likelihood.probes=1", "likelihood.draws=1", "model.channels=8", "baselines=False"),
]


@pytest.mark.slow
def test_a_run_says_which_files_are_in_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(20):
        picture = Image.fromarray(images(1)[0, 0].repeat(2, 2).numpy())
        for part in ("train", "test"):
            if part == "train" or i in (4, 9) or i > 15:
                path = tmp_path / "in" / part / f"{part}_{i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                (picture if i < 16 or part == "train" else Image.fromarray(np.full((8, 10), i, np.uint8))).save(path)
    (tmp_path / "in" / ".DS_Store").write_bytes(b"x")
    flags = ["data.name=image_folder", f"data.root={tmp_path / 'in'}", "data.size=(8,10)", "data.channels=1", *QUICK]
    arguments = [f"--config.{flag}" for flag in flags]
    vp.main([*arguments, f"--workdir={tmp_path / 'run'}"])
    said = capsys.readouterr().out
    pair = f"{Path('test') / 'test_04.png'} = {Path('train') / 'train_04.png'} ["
    assert "in: 2 of 6 samples of test are also in train" in said and pair in said
    assert "in: 1 hidden file is passed over" in said
    notes = json.loads((tmp_path / "run" / "results.json").read_text())["data"]["notes"]
    assert [pair in note for note in notes] == [False, True]
    assert pair in (tmp_path / "run" / "report.md").read_text()
    vp.main([*arguments, "--config.data.drop_duplicates=True", f"--workdir={tmp_path / 'other'}"])
    assert "in: 2 training samples are left out, since they are in test" in capsys.readouterr().out
