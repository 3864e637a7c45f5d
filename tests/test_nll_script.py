"""The bits/dim of a whole split on the command line: shared out, interrupted, damaged, and what it says of itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_experiments import QUICK, ROOT, called, refused, script

from experiments import nll, vp
from workflow import Protocol, load_run
from workflow.survey import score_run

pytestmark = pytest.mark.slow
FEW = ["--limit", "7", "--steps", "3", "--batch_size", "3", "--draws", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vp"
    script("vp", f"--workdir={folder}", *QUICK)
    return folder


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "points"
    called(vp.main, f"--workdir={folder}", *QUICK, "--config.data.name=swiss_roll", "--quiet")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "vp")
    shutil.rmtree(tmp_path / "vp" / "nll")
    return tmp_path / "vp"


def parts(run) -> Path:
    (folder,) = run.glob("nll/test-*")
    return folder


def values(run):
    return [np.load(f)["estimates"] for f in sorted(parts(run).glob("part_*.npz"))]


def test_torchrun_shares_the_work_with_the_same_numbers(run, tmp_path):
    """The command as it is documented, with its `--`."""
    called(nll.main, "--run", run, *FEW)
    alone = values(run)
    shutil.rmtree(run / "nll")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--"]
    done = subprocess.run(
        [*launcher, "experiments/nll.py", "--run", str(run), *FEW],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "7 images" in done.stdout and "parts written to" in done.stdout
    assert all(np.array_equal(a, b) for a, b in zip(alone, values(run), strict=True))


def test_results_state_the_protocol(run):
    called(nll.main, "--run", run, *FEW, "--dequantizer", "truncated_normal", "--spacing", "2", "--probes", "1")
    results = json.loads((run / "results.json").read_text())
    entry = results[f"nll/{parts(run).name}"]
    protocol = entry["protocol"]
    expected = {"split": "test", "solver": "fast", "steps": 3, "draws": 2, "seed": 0, "images": 7, "levels": 17}
    assert {k: protocol[k] for k in expected} == expected
    assert protocol["dequantization"] == "truncated_normal" and protocol["t_min_used"] > 1e-5
    assert "Coloured(spacing=2" in protocol["divergence_object"] and "Adams(steps=3" in protocol["solver_object"]
    assert {"model", "data", "sde", "flow"} <= set(protocol)
    assert set(entry["versions"]) == {"toolkit", "python", "torch", "numpy"}
    assert entry["grid_sha256"] == hashlib.sha256((parts(run) / "grid.json").read_bytes()).hexdigest()
    assert entry["images"] == 7 and entry["text"].count("±") == 1


def test_a_signal_is_obeyed_within_a_chunk(run):
    """One chunk that would take minutes; what was done before stays, and the message says how to continue."""
    command = [sys.executable, "experiments/nll.py", "--run", str(run), "--limit", "100", "--steps", "100000"]
    process = subprocess.Popen(
        [*command, "--batch_size", "100"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while not list(run.glob("nll/test-*/grid.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "the same command continues" in stderr.splitlines()[-1]


def complaint(run) -> str:
    """The last line on stderr, after the progress bars, of a call that is refused."""
    done = called(nll.main, "--run", run, *FEW, check=False)
    assert done.returncode == 2
    return done.stderr.splitlines()[-1]


def test_damaged_files_are_named(run):
    called(nll.main, "--run", run, *FEW)
    part = parts(run) / "part_00001.npz"
    part.write_bytes(b"")
    line = complaint(run)
    assert str(part) in line and "delete it" in line
    part.unlink()
    grid = parts(run) / "grid.json"
    text = grid.read_text()
    grid.write_text("{")
    line = complaint(run)
    assert str(grid) in line and "delete it" in line
    for wrong in ({"knots": ["a", 2.0], "density": [1.0]}, {"passes": "many"}):
        grid.write_text(json.dumps({**json.loads(text), **wrong}))
        line = complaint(run)
        assert str(grid) in line and "delete" in line and "makes it again" in line, line
    grid.write_text(text)
    called(nll.main, "--run", run, *FEW)


def test_wrong_options_are_refused(run):
    for option, value in (("--tolerance", "0"), ("--dequantizer", "normal"), ("--spacing", "-1"), ("--steps", "0")):
        refused(called(nll.main, "--run", run, option, value, check=False), 2, option.removeprefix("--"), "expected")
    coloured = called(nll.main, "--run", run, "--probes", 0, "--spacing", 3, check=False)
    refused(coloured, 2, "got --spacing 3 with --probes 0")
    for unused in (("--tolerance", "0.01"), ("--solver", "accurate")):
        refused(called(nll.main, "--run", run, "--steps", "8", *unused, check=False), 2, "--steps 8", "expected")


@pytest.mark.parametrize(
    "option", [("--spacing", 2), ("--draws", 3), ("--dequantizer", "truncated_normal")], ids=lambda o: o[0]
)
def test_what_changes_nothing_for_points_is_refused(option, points, monkeypatch):
    monkeypatch.setattr("workflow.tools.nll.score_split", lambda *_: pytest.fail("scored"))
    refused(called(nll.main, "--run", points, *option, check=False), 2, f"got {option[0]} {option[1]} for swiss_roll")


class TestTolerance:
    def test_the_choice_of_steps_is_kept(self, run):
        """With the parts: a process that comes later takes the steps that are written there, and makes no pilot run."""
        wish = ["--limit", "7", "--batch_size", "4", "--draws", "1", "--tolerance", "0.1"]
        called(nll.main, "--run", run, *wish)
        grid = parts(run) / "grid.json"
        table = json.loads(grid.read_text())
        entry = json.loads((run / "results.json").read_text())[f"nll/{parts(run).name}"]
        assert entry["protocol"]["steps"] is None and entry["protocol"]["tolerance"] == 0.1
        assert entry["chosen"] == {k: table[k] for k in ("steps", "tolerance", "error", "reached", "passes")}
        assert table["reached"] and table["error"] <= 0.06 and entry["nfe"] >= table["steps"] + 1
        before = values(run)
        (parts(run) / "part_00001.npz").unlink()
        called(nll.main, "--run", run, *wish)
        assert all(np.array_equal(a, b) for a, b in zip(before, values(run), strict=True))
        grid.write_text(json.dumps({**table, "steps": 5, "refinement": None}))
        for part in parts(run).glob("part_*.npz"):
            part.unlink()
        called(nll.main, "--run", run, *wish)
        entry = json.loads((run / "results.json").read_text())[f"nll/{parts(run).name}"]
        assert entry["nfe"] == 6 and entry["refined"] == 0
        grid.write_text(json.dumps({"knots": table["knots"], "density": table["density"]}))
        (parts(run) / "part_00000.npz").unlink()
        done = called(nll.main, "--run", run, *wish, check=False)
        assert done.returncode == 2 and str(grid) in done.stderr.splitlines()[-1]

    def test_an_earlier_runs_tolerance_was_of_other_solvers(self, run):
        from workflow.configuration import restored

        stored = json.loads((run / "config.json").read_text())
        stored["likelihood"].pop("refine")
        stored["likelihood"]["tolerance"] = 1e-5
        assert restored(stored, run)["likelihood"]["tolerance"] == 4e-3  # today's default, not the old value
        stored["likelihood"]["solver"] = "accurate"
        assert restored(stored, run)["likelihood"]["tolerance"] == 1e-5


class TestSurvey:
    WISH = ("--limit", "100", "--batch_size", "40", "--steps", "3", "--precision", "1.0")

    def entry(self, run):
        (folder,) = run.glob("nll/test-survey-*")
        return json.loads((run / "results.json").read_text())[f"nll/{folder.name}"], folder

    def test_it_is_planned_taken_up_again_and_kept(self, run):
        plan = called(nll.main, "--run", run, *self.WISH, "--plan").stdout
        assert "survey: 64 of 100 images exactly" in plan and "minutes" in plan
        assert "each value: 3 steps, asked for; 1 probe; 1 draw of uniform noise" in plan
        (planned,) = re.findall(r"([\d,]+) network passes in all", plan)
        # with the pilot that was kept
        assert "minutes; all images" in called(nll.main, "--run", run, *self.WISH, "--plan").stdout
        assert "results.json" not in plan and not any(
            k.startswith("nll/test-survey") for k in json.loads((run / "results.json").read_text())
        )
        out = called(nll.main, "--run", run, *self.WISH).stdout
        entry, folder = self.entry(run)
        assert {"images": 100, "images_scored": 64}.items() <= entry["survey"].items() and "64 of 100 images" in out
        assert {"estimate_stderr", "r2", "evaluations"} <= entry["survey"].keys()
        assert entry["survey"]["evaluations"] == int(planned.replace(",", ""))
        assert {"mean", "stderr", "seconds", "split", "protocol", "text"} <= entry.keys() and entry["kind"] == "exact"
        assert 0 < entry["survey"]["estimate_stderr"] <= entry["stderr"]
        assert entry["grid_sha256"] == hashlib.sha256((folder / "grid.json").read_bytes()).hexdigest()
        assert entry["protocol"]["steps"] == 3 and entry["protocol"]["tolerance"] is None
        kept = np.load(folder / "survey.npz")
        assert kept["predictions"].shape == (100,) and len(kept["scored_ids"]) == 64 == len(kept["scored"])
        assert kept["predictions"].mean() == pytest.approx(entry["mean"], abs=0.2)
        for part in folder.glob("*/part_00001.npz"):
            part.unlink()
        called(nll.main, "--run", run, *self.WISH)
        assert self.entry(run)[0]["mean"] == entry["mean"]

    def test_parts_in_the_place_of_others_are_named(self, run):
        """Of another kind, or of other images: no traceback, and no wrong mean."""
        called(nll.main, "--run", run, *self.WISH)
        _, folder = self.entry(run)
        kinds = {kind: next(folder.glob(f"{kind}-*/part_00000.npz")) for kind in ("values", "predictors", "repeats")}
        for kind, part in kinds.items():
            before = part.read_bytes()
            for other in (kinds["predictors" if kind == "values" else "values"], part.with_name("part_00001.npz")):
                if other.exists():
                    part.write_bytes(other.read_bytes())
                    refused(
                        called(nll.main, "--run", run, *self.WISH, "--quiet", check=False), 2, str(part), "delete it"
                    )
            part.write_bytes(before)
        called(nll.main, "--run", run, *self.WISH, "--quiet")

    def test_processes_share_it_with_the_same_numbers(self, run):
        called(nll.main, "--run", run, *self.WISH)
        alone, folder = self.entry(run)
        shutil.rmtree(folder)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--"]
        done = subprocess.run(
            [*launcher, "experiments/nll.py", "--run", str(run), *self.WISH],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert self.entry(run)[0]["mean"] == alone["mean"]

    def test_its_steps_are_for_a_fifth_of_the_precision_unless_told(self):
        assert Protocol(precision=0.02).for_samples(64, 17).tolerance == pytest.approx(0.004)
        assert Protocol(precision=0.02, tolerance=0.1).for_samples(64, 17).tolerance == 0.1
        assert Protocol(precision=0.02, solver="accurate").for_samples(64, 17).tolerance == 1e-5
        assert Protocol().for_samples(64, 17).tolerance == 1e-3
        for wished in (None, 0.02):  # fixed steps keep no tolerance
            assert Protocol(precision=wished, steps=16).for_samples(64, 17).tolerance is None

    def test_the_steps_that_were_chosen_are_planned_and_stated(self, run):
        wish = ("--limit", "40", "--precision", "1.0", "--tolerance", "0.2", "--batch_size", "40", "--quiet")
        plan = called(nll.main, "--run", run, *wish, "--plan").stdout
        called(nll.main, "--run", run, *wish)
        entry, folder = self.entry(run)
        table = json.loads((folder / "grid.json").read_text())
        assert entry["chosen"] == {k: table[k] for k in ("steps", "tolerance", "error", "reached", "passes")}
        assert entry["protocol"]["steps"] is None and entry["chosen"]["tolerance"] == 0.2
        half = entry["survey"]["correction"]["half_the_steps"]
        n = entry["chosen"]["steps"]
        steps = f"{n // 2} steps in the survey and {n} of all images" if half else f"{n} steps"
        assert f"each value: {steps}, chosen for 0.2 bits/dim; 1 probe; 1 draw of uniform noise" in plan

    def test_a_configurations_few_images_are_solved_adaptively(self, run, monkeypatch):
        """As the command line's: where nothing but the precision was told, to choose steps would take more."""
        monkeypatch.setattr("workflow.score.choose_steps", lambda *_, **__: pytest.fail("steps were chosen"))
        loaded = load_run(run)
        decided = Protocol(precision=0.5, limit=8).for_samples(64, 17)  # as a Setup holds it
        found = score_run(replace(loaded, setup=replace(loaded.setup, protocol=decided)))
        assert (found.protocol["solver"], found.protocol["tolerance"]) == ("accurate", 1e-5)
        assert json.loads((run / "results.json").read_text())["bits_per_dim"]["survey"]["images"] == 8

    def test_what_cannot_be_had_is_refused(self, run):
        refused(
            called(nll.main, "--run", run, *self.WISH[:-1], "1e-9", "--quiet", check=False),
            2,
            "precision=1e-09",
            "expected",
        )
        refused(called(nll.main, "--run", run, "--plan", "--quiet", check=False), 2, "--plan", "--precision")
