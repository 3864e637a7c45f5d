"""The scripts, as a user calls them: run, resume, sample, score, and what they refuse."""

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from experiments import export, nll, sample, ve, vp
from workflow import command_line

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    "--config.training.steps=4",
    "--config.training.warmup=1",
    "--config.training.batch_size=16",
    "--config.training.log_every=1",
    "--config.training.checkpoint_every=2",
    "--config.training.eval_every=2",
    "--config.model.channels=8",
    "--config.model.width=16",
    "--config.sampling.steps=2",
    "--config.sampling.second_steps=2",
    "--config.sampling.n=3",
    "--config.likelihood.steps=3",
    "--config.likelihood.limit=5",
    "--config.likelihood.batch_size=3",
    "--config.baselines=False",
]


def process(name, *arguments, check=True, timeout=120):
    """The script in a process of its own, which imports everything anew: that takes longer than a short run."""
    done = subprocess.run(
        [sys.executable, f"experiments/{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, done.stderr[-2000:]
    return done


def refused(done, code, *words):
    """One line, that code."""
    assert done.returncode == code, (done.returncode, done.stderr)
    (line,) = done.stderr.strip().splitlines()
    for word in words:
        assert word in line, line


def called(main, *arguments, check=True):
    """As `process`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        command_line.run(main, [*map(str, arguments)])
    done = subprocess.CompletedProcess(arguments, left.value.code, out.getvalue(), err.getvalue())
    assert not check or done.returncode == 0, done.stderr
    return done


def script(name, *arguments, check=True):
    """As `called`, for a script by its name, whose command line the run folder shows."""
    with mock.patch.object(sys, "argv", [f"experiments/{name}.py", *map(str, arguments)]):
        return called(importlib.import_module(f"experiments.{name}").main, *arguments, check=check)


def interrupted(name, *arguments, when, number=signal.SIGINT):
    """The script's process, stopped by a signal once `when()` is true, and its lines on stderr."""
    process = subprocess.Popen(
        [sys.executable, f"experiments/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        assert when() and process.poll() is None
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in stderr
    return process, stderr.strip().splitlines()


def truncate_checkpoints(run):
    for file in (run / "checkpoints").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:1000])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vp"
    process("vp", f"--workdir={folder}", *QUICK)
    return folder


class TestRunFolder:
    def test_holds_what_is_promised(self, run):
        results = json.loads((run / "results.json").read_text())
        assert {"mean", "stderr"} <= results["bits_per_dim"].keys()
        assert results["bits_per_dim"]["images"] == 5
        assert results["training"]["steps"] == 4 and results["training"]["seconds"] > 0
        assert {"sampler", "nfe", "seconds"} <= results["sampling"].keys()
        assert json.loads((run / "config.json").read_text())["training"]["steps"] == 4
        assert (run / "samples" / "pc.png").stat().st_size > 100
        assert list((run / "tensorboard").glob("events*")) or list(run.rglob("events.out.tfevents*"))
        assert (run / "report.md").read_text().count("bits/dim") >= 2
        newest = torch.load(run / "checkpoints" / "step_00000004.pt", weights_only=True)
        assert newest["config"]["system"] == "vp"

    def test_is_not_overwritten(self, run):
        before = {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()}
        refused(called(vp.main, f"--workdir={run}", *QUICK, check=False), 2, "--resume")
        assert before == {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()}

    def test_resumes_a_finished_run_without_training_again(self, run):
        before = json.loads((run / "results.json").read_text())
        script("vp", f"--workdir={run}", "--resume", *QUICK)
        after = json.loads((run / "results.json").read_text())
        assert after["bits_per_dim"]["mean"] == before["bits_per_dim"]["mean"]
        assert after["training"]["steps"] == 4

    def test_another_configuration_is_refused_on_resume_unless_allowed(self, run):
        changed = [*QUICK, "--config.sampling.n=2"]
        done = called(vp.main, f"--workdir={run}", "--resume", *changed, check=False)
        refused(done, 2, "sampling.n=2, which was 3", "--allow_change=sampling.n")
        wrong = script("vp", f"--workdir={run}", *QUICK, "--resume", "--allow_change=sampling.m", check=False)
        refused(wrong, 2, "--allow_change=sampling.m", "did you mean sampling.n?")


class TestTools:
    @pytest.mark.parametrize("sampler", ["ddim", "pc", "ode"])
    def test_sample_with_any_sampler(self, run, sampler, tmp_path):
        options = [] if sampler == "ode" else ["--steps", 2]
        done = script("sample", "--run", run, "--sampler", sampler, "--n", 3, "--out", tmp_path / "x.png", *options)
        assert "3 samples" in done.stdout and (tmp_path / "x.png").exists()

    @pytest.mark.slow
    def test_nll_counts_every_image_and_goes_on_where_it_stopped(self, run):
        arguments = ["--run", run, "--limit", 7, "--steps", 3, "--batch_size", 3, "--draws", 1]
        first = script("nll", *arguments).stdout.splitlines()[-1]
        assert "7 images" in first
        (parts,) = {f.parent for f in run.glob("nll/test-*/part_00002.npz")}
        values = [np.load(f)["estimates"] for f in sorted(parts.glob("part_*.npz"))]
        assert [len(v) for v in values] == [3, 3, 1]
        (parts / "part_00001.npz").unlink()  # as if it had been killed there
        assert script("nll", *arguments).stdout.splitlines()[-1] == first
        again = [np.load(f)["estimates"] for f in sorted(parts.glob("part_*.npz"))]
        assert all(np.array_equal(a, b) for a, b in zip(values, again))

    @pytest.mark.slow
    def test_nll_shared_by_two_processes_gives_the_same_numbers(self, run):
        arguments = ["--run", str(run), "--limit", "7", "--steps", "2", "--batch_size", "2", "--draws", "1"]
        for rank in ("1", "0"):
            environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
            done = subprocess.run(
                [sys.executable, "experiments/nll.py", *arguments],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=environment,
            )
            assert done.returncode == 0, done.stderr
        assert "7 images" in done.stdout  # the last to finish finds all parts
        newest = max(run.glob("nll/test-*"), key=lambda f: f.stat().st_mtime)
        together = [np.load(f)["estimates"] for f in sorted(newest.glob("part_*.npz"))]
        for part in newest.glob("part_*.npz"):
            part.unlink()
        script("nll", *arguments)
        assert all(
            np.array_equal(a, np.load(f)["estimates"]) for a, f in zip(together, sorted(newest.glob("part_*.npz")))
        )

    @pytest.mark.slow
    def test_samples_shared_by_two_processes_are_those_of_one(self, run):
        """Written once each, and the same; the second call finds every part there."""
        arguments = ["--run", str(run), "--sampler", "euler_maruyama", "--steps", "3", "--n", "7", "--batch_size", "2"]

        def draw(**environment):
            done = subprocess.run(
                [sys.executable, "experiments/sample.py", *arguments],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env={**os.environ, **environment},
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        draw(RANK="1", WORLD_SIZE="2")
        assert "7 samples" in draw(RANK="0", WORLD_SIZE="2")
        (folder,) = (f for f in run.glob("samples/euler_maruyama-*") if f.is_dir())
        files = sorted(folder.glob("part_*.npz"))
        together = [np.load(f)["x"] for f in files]
        assert [len(x) for x in together] == [2, 2, 2, 1]
        before = [f.stat().st_mtime_ns for f in files]
        draw()
        assert before == [f.stat().st_mtime_ns for f in files]
        for f in files[1:3]:
            f.unlink()
        draw()
        assert all(np.array_equal(a, np.load(f)["x"]) for a, f in zip(together, files))


class TestRefusals:
    def test_a_wrong_key_is_named_with_what_was_meant(self, tmp_path):
        done = process("vp", f"--workdir={tmp_path / 'new'}", "--config.training.step=3", check=False)
        refused(done, 2, "config.training.step", "training.steps")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("flag", "words"),
        [
            ("--config.training.steps=many", ("steps", "many", "int")),
            ("--config.training.steps=0", ("config.training: got steps=0", "expected")),
            ("--config.sde.beta_min=-1.0", ("beta_min=-1.0",)),
            ("--config.data.name=digit", ("digit", "digits")),
            ("--config.model.parametrization=x", ("preconditioned",)),
            ("--config.sampling.sampler=pcc", ("pcc", "ddim")),
            ("--config.training.weighting=none", ("weighting=None", "LikelihoodWeighting")),
            ("--config.likelihood.split=tset", ("tset", "test")),
            ("--config.sampling.n=0", ("n=0",)),
            ("--config.sampling.second=pc", ("two different samplers",)),
            ("--config.model.channels=0", ("config.model: got channels=0", "integers >= 1")),
            ("--config.model.multipliers=(0,)", ("config.model: got multipliers=(0,)", "integers >= 1")),
            ("--config.model.multipliers=('a',)", ("config.model: got multipliers=('a',)",)),
            ("--config.model.fourier_features=('a',)", ("config.model: got fourier_features=('a',)", "finite")),
            ("--config.model.dropout=2.0", ("config.model: got dropout=2.0", "[0, 1)")),
            ("--config.training.ema=nope", ("config.training: got ema=('nope',)", "numbers in [0, 1)")),
            ("--config.training.betas=('a', 'b')", ("config.training: got betas=('a', 'b')",)),
            ("--config.training.batch_size=100000", ("batch_size=100000", "1500")),
            ("--config.data.low=2.0", ("config.data: got low=2.0, high=1.0",)),
            ("--config.data.high=inf", ("config.data", "high=inf", "finite")),
            ("--config.sde.name=ve", ("config.sde", "the SDE 've'", "expected one of vp")),
            ("--config.sampling.steps=-1", ("config.sampling: got steps=-1",)),
            ("--config.likelihood.draws=0", ("config.likelihood: got draws=0",)),
            ("--config.device=cuda:77", ("cuda:77", "cpu")),
            ("stray", ("stray", "--flag=value")),
        ],
    )
    def test_wrong_values_leave_no_folder_behind(self, tmp_path, flag, words):
        done = called(vp.main, f"--workdir={tmp_path / 'new'}", flag, check=False)
        refused(done, 2, *words)
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("main", "flags"),
        [
            (vp.main, ["--workdir="]),
            (vp.main, ["--init_from= "]),
            (sample.main, ["--run="]),
            (sample.main, ["--run=x", "--out="]),
            (sample.main, ["--run=x", "--gif="]),
            (export.main, ["--run=x", "--to="]),
        ],
    )
    def test_an_empty_path_is_not_the_current_folder(self, main, flags, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        refused(called(main, *flags, check=False), 2, flags[-1].split("=")[0], "expected a")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("text", ["{}", "[]", "3", "{", '{"data": {"name": "digits"}}'])
    def test_a_configuration_of_no_run_is_refused(self, text, tmp_path):
        (tmp_path / "config.json").write_text(text)
        refused(
            called(sample.main, "--run", tmp_path, check=False),
            2,
            "config.json",
            "expected a file that an experiment wrote",
        )

    def test_help_shows_every_value_with_its_default(self):
        shown = called(ve.main, "--help").stdout
        for flag in (
            "--config.sde.sigma_max=10.0",
            "--config.training.learning_rate=0.002",
            "--workdir=runs/ve",
            "--resume",
            "exit codes: 0 done; 1 a bug",
            "None leaves a value open",
        ):
            assert flag in shown
        for run, tool in ((script, "sample"), (process, "nll")):
            shown = " ".join(run(tool, "--help").stdout.split())
            assert "--seed" in shown and "exit codes: 0 done; 1 a bug" in shown

    def test_tools_refuse_what_is_no_run(self, tmp_path, run):
        refused(called(nll.main, "--run", tmp_path / "none", check=False), 2, "config.json")
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text((run / "config.json").read_text())
        refused(called(nll.main, "--run", tmp_path / "empty", check=False), 2, "no checkpoint")
        refused(called(sample.main, "--run", run, "--sampler", "ddmi", check=False), 2, "ddmi", "ddim")
        refused(called(sample.main, "--run", run, "--n", "0", check=False), 2, "--n: got '0'")
        refused(called(nll.main, "--run", run, "--split", "tset", check=False), 2, "tset", "test")
        refused(called(nll.main, "--run", run, "--solver", "rk", check=False), 2, "accurate")

    def test_a_truncated_checkpoint_is_noticed(self, tmp_path, run):
        broken = tmp_path / "broken"
        shutil.copytree(run, broken)
        truncate_checkpoints(broken)
        refused(script("sample", "--run", broken, "--steps", 2, check=False), 2, "checkpoint", "cut short")
        before = {f: f.read_bytes() for f in broken.rglob("*") if f.is_file()}
        flags = [f"--workdir={broken}", *QUICK, "--config.threads=2"]
        refused(called(vp.main, *flags, "--resume", check=False), 5, "checkpoint", "cut short")
        assert before == {f: f.read_bytes() for f in broken.rglob("*") if f.is_file()}

    def test_an_older_checkpoint_is_a_warning_of_one_line(self, tmp_path, run):
        folder = tmp_path / "vp"
        shutil.copytree(run, folder)
        newest = folder / "checkpoints" / "step_00000004.pt"
        newest.write_bytes(newest.read_bytes()[:1000])
        done = called(export.main, "--run", folder, "--to", tmp_path / "to")
        (line,) = done.stderr.splitlines()
        assert ": warning: " in line and "cut short" in line and "the checkpoint of step 2 is used" in line

    def test_a_folder_in_which_no_run_came_to_a_checkpoint_can_be_begun_anew(self, tmp_path, run):
        folder, points = tmp_path / "vp", [*QUICK, "--config.data.name=moons"]
        folder.mkdir()
        for name in ("config.json", "metrics.jsonl"):
            shutil.copy(run / name, folder)
        called(vp.main, f"--workdir={folder}", *points)
        assert json.loads((folder / "config.json").read_text())["data"]["name"] == "moons"
        assert json.loads((folder / "results.json").read_text())["training"]["steps"] == 4
        shutil.rmtree(folder / "checkpoints")  # its results are still of value
        refused(called(vp.main, f"--workdir={folder}", *points, check=False), 2, "holds a run", "--resume")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ve", "sub_vp"])
@pytest.mark.parametrize("data", ["digits", "moons"])
def test_the_other_sdes_and_points_run(name, data, tmp_path):
    folder = tmp_path / name
    process(name, f"--workdir={folder}", f"--config.data.name={data}", *QUICK)
    done = script("sample", "--run", folder, "--sampler", "pc", "--steps", 2, "--n", 3)
    assert "3 samples" in done.stdout
    noun = "images" if data == "digits" else "points"
    assert f"5 {noun}" in script("nll", "--run", folder, "--limit", 5, "--steps", 3).stdout


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    folder = tmp_path / "vp"
    long = [f for f in QUICK if "steps=4" not in f] + ["--config.training.steps=100000"]
    process, lines = interrupted(
        "vp", f"--workdir={folder}", *long, when=lambda: list((folder / "checkpoints").glob("*.json"))
    )
    assert process.returncode == 130
    assert "resume" in lines[-1] and "SIGINT: stopping as soon as it is safe (again: at once)" in lines
    saved = max(int(f.stem[5:]) for f in (folder / "checkpoints").glob("step_*.json"))
    assert saved > 0
    shorter = [f for f in QUICK if "steps=4" not in f] + [f"--config.training.steps={saved + 1}"]
    script("vp", f"--workdir={folder}", "--resume", "--allow_change=training.steps", *shorter)
    assert json.loads((folder / "results.json").read_text())["training"]["steps"] == saved + 1


def test_ctrl_c_stops_sampling_within_a_step(run):
    """One chunk of a million steps; the parts' folder is there before the first."""
    arguments = ["--run", run, "--sampler", "reverse_diffusion", "--steps", 1_000_000, "--n", 2]
    begun = lambda: list(run.glob("samples/reverse_diffusion-*/index.json"))
    assert not begun()
    process, lines = interrupted("sample", *arguments, when=begun)
    assert process.returncode == 130
    assert any(line.startswith("SIGINT: stopping") for line in lines)
    assert "0 of 2 done" in lines[-1] and "the same command continues" in lines[-1]


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        pytest.param("likelihood", signal.SIGTERM, marks=pytest.mark.slow),
        ("sampling", signal.SIGINT),
        pytest.param("likelihood", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("sampling", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_after_the_training_says_how_to_go_on(tmp_path, stage, number):
    folder = tmp_path / "vp"
    flags = [f"--workdir={folder}", *QUICK, "--config.data.name=moons", "--config.training.eval_every=0"]
    if stage == "sampling":
        flags.append("--config.sampling.steps=1000000")
        begun = lambda: "training" in json.loads((folder / "results.json").read_text())
    else:
        flags += ["--config.likelihood.steps=100000", "--config.likelihood.batch_size=1"]
        begun = lambda: list(folder.glob("nll/*/index.json"))
    process, lines = interrupted(
        "vp", *flags, when=lambda: (folder / "results.json").exists() and begun(), number=number
    )
    assert process.returncode == 128 + number
    assert "the training is saved" in lines[-1] and "--resume continues" in lines[-1]


def test_ctrl_c_while_a_script_is_imported_ends_it_quietly(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = subprocess.run(
        [sys.executable, "experiments/vp.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path):
    folder = tmp_path / "vp"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "experiments/vp.py", f"--workdir={folder}", *QUICK],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((folder / "results.json").read_text())
    assert results["training"]["steps"] == 4 and results["bits_per_dim"]["images"] == 5
    script("vp", f"--workdir={folder}", "--resume", *QUICK)  # what two have trained, one goes on with
