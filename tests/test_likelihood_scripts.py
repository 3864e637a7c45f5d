"""The table of bounds and the out-of-distribution histograms, on a run of four steps of training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_experiments import QUICK, refused, script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vp"
    script("vp", f"--workdir={folder}", *QUICK)
    return folder


def test_bounds_writes_every_row(run):
    script("bounds", "--run", run, "--limit", 3, "--K", 2, "--steps", 4, "--draws", 4, "--probes", 2)
    rows = json.loads((run / "results.json").read_text())["bounds"]["rows"]
    assert len(rows) == 7 and all(np.isfinite(r["mean"]) for r in rows)
    for one, many in ((0, 1), (2, 3)):  # Jensen
        assert rows[many]["mean"] <= rows[one]["mean"]
    assert (run / "bounds.md").read_text().count("\n| ") == 8


def test_ood_draws_both_histograms(run):
    done = script("ood", "--run", run, "--limit", 3, "--steps", 4)
    assert "noise:" in done.stdout and "flipped:" in done.stdout
    with np.load(run / "ood_noise.npz") as values:
        assert {"test", "flipped", "noise"} == set(values.files) and values["test"].shape == (3,)
    assert (run / "ood_noise.png").stat().st_size > 1000
    refused(script("ood", "--run", run, "--other", "moons", check=False), 3, "moons")
