"""What one sees of a run: its report, its validation, the rehearsal before it, and the weights it begins with."""

import contextlib
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_experiments import QUICK, script
from training_cases import options, points, tiny_model

from data import from_tensor
from experiments import evaluate, export, vp
from models import MLP, ScoreModel
from numerics import UserError
from sde_lib import VPSDE
from training import (
    DSM,
    CheckpointError,
    UniformTime,
    Validation,
    estimate,
    initialize_from,
    load_weights,
    train,
)
from workflow import command_line, configuration, dry_run, report, setup, systems
from workflow.curves import curve, draw_curves, read_metrics, save_curves
from workflow.draw import Drawn
from workflow.run_folder import RunFolder
from workflow.trained_run import load_run
from workflow.versions import versions

pytestmark = pytest.mark.usefixtures("loose_pilots")

SMALL = [*QUICK, "--config.training.validation=6"]
POINTS = [*SMALL, "--config.data.name=moons"]
NO_STEPS = [f for f in SMALL if "training.steps" not in f]


def go(main, *arguments):
    """What a script prints, called in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*map(str, arguments)]) == 0
    return out.getvalue()


def refused(*arguments, code, words):
    """One line, that code, with these words in it."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as left:
        command_line.run(vp.main, [*map(str, arguments)])
    (line,) = err.getvalue().strip().splitlines()
    assert left.value.code == code, line
    assert all(word in line for word in words), line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps that was resumed for two more."""
    folder = tmp_path_factory.mktemp("runs") / "vp"
    script("vp", f"--workdir={folder}", *SMALL)
    more = ["--allow_change=training.steps", "--config.training.steps=6"]
    script("vp", f"--workdir={folder}", "--resume", *NO_STEPS, *more)
    return folder


@pytest.fixture(scope="module")
def pretrained(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    go(export.main, "--run", run, "--to", folder)
    return folder


def weights(folder):
    return dict(load_run(folder).model.named_parameters())


def vp_config():
    return configuration.default_config(systems.create("vp"))


def fresh_model(folder):
    return setup.resolve(configuration.of_run(folder)).model


def same(a, b):
    return all(torch.equal(v, b[name]) for name, v in a.items())


class Lent:
    """What an evaluation sees of a state."""

    def __init__(self, model):
        self.model, self.interruption = model, type("Quiet", (), {"requested": None})()

    def averaged(self):
        return contextlib.nullcontext(self.model)


@pytest.mark.slow
class TestReport:
    def test_says_what_was_done_and_found(self, run):
        text = (run / "report.md").read_text()
        results = json.loads((run / "results.json").read_text())
        bits = results["bits_per_dim"]
        assert f"| this run (vp) | {bits['mean']:.3f} ± {bits['stderr']:.3f} |" in text
        for part in ("dequantization_stderr", "probe_stderr"):
            assert f"| {bits[part]:.3f} |" in text
        assert f"| seed | {results['seed']} |" in text
        assert f"python {sys.version.split()[0]}, torch {torch.__version__}, toolkit {versions()['toolkit']}" in text
        assert "6 steps of 16 in " in text and " minutes" in text

    def test_names_the_commands_of_all_sessions(self, run):
        commands = re.findall(r"^\| command \| `(.*)` \|$", (run / "report.md").read_text(), re.MULTILINE)
        assert len(commands) == 2 and all(c.startswith("python experiments/vp.py --workdir=") for c in commands)
        assert ["--resume" in c for c in commands] == [False, True]

    def test_shows_pictures_that_are_there(self, run):
        text = (run / "report.md").read_text()
        shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
        assert {"curves.png", "samples/pc.png", "samples/dpm_solver.png", "samples/step_00000006.png"} <= set(shown)
        for name in shown:
            with Image.open(run / name) as picture:
                assert np.asarray(picture.convert("L")).std() > 1, name

    def test_tables_end_where_they_end(self, run):
        """A line that follows a table without an empty one would be taken for a row."""
        lines = (run / "report.md").read_text().splitlines()
        for line, after in zip(lines, lines[1:], strict=False):
            assert not line.startswith("|") or after == "" or after.startswith("|"), after

    def test_what_other_tools_added_stays_as_long_as_the_weights(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "vp")
        folder, made = RunFolder(tmp_path / "vp"), setup.resolve(configuration.of_run(run))
        for text in ("first", "second"):
            folder.add_section("9 samples", [text])
            folder.add_section("Else", ["other"])
            report.write(folder, made, keep=True)
        text = (folder.path / "report.md").read_text()
        assert text.count("## 9 samples") == 1 and "second" in text and "first" not in text and "other" in text
        assert text.count("# vp on digits") == 1
        report.write(folder, made, keep=False)
        assert "9 samples" not in (folder.path / "report.md").read_text()

    @pytest.mark.slow
    def test_evaluate_adds_a_section_that_a_resumed_run_keeps(self, tmp_path):
        folder, more = tmp_path / "vp", [f for f in POINTS if "training.steps" not in f]
        go(vp.main, f"--workdir={folder}", *POINTS)
        go(evaluate.main, "--run", folder, "--n", 32, "--steps", 2)
        go(vp.main, f"--workdir={folder}", "--resume", *POINTS)
        assert (folder / "report.md").read_text().count("## Samples measured: ") == 1
        longer = ["--config.training.steps=5", "--allow_change=training.steps"]
        go(vp.main, f"--workdir={folder}", "--resume", *longer, *more)
        assert "## Samples measured" not in (folder / "report.md").read_text()  # they were drawn with other weights


class TestCurves:
    def test_are_read_from_whole_lines_with_finite_values(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"step": 2, "eval/loss": 1.5}\n'
            '{"step": 3, "loss": NaN}\n7\n{"step": 4, "loss": 1.0}\n{"step": 5, "lo'
        )
        rows = read_metrics(tmp_path)
        assert curve(rows, "loss") == ([1, 4], [2.0, 1.0])
        assert curve(rows, "eval/loss") == ([2], [1.5])

    def test_need_metrics(self, tmp_path):
        assert save_curves(tmp_path) is None and not list(tmp_path.iterdir())

    def test_show_what_there_is(self, run):
        rows = read_metrics(run)
        titles = ["loss", "loss by noise level, 1 the least", "validation bound, bits/dim"]
        titles += ["learning rate", "gradient norm", "images/s"]
        panels = draw_curves(rows).axes
        assert [p.get_title() for p in panels] == titles
        training, held_out = panels[0].lines
        assert np.array_equal(training.get_xydata().T, curve(rows, "loss"))
        assert np.array_equal(held_out.get_xydata().T, curve(rows, "eval/loss"))
        drawn = [line for line in panels[1].lines if len(line.get_xdata())]
        assert len(drawn) == 5
        for i, line in enumerate(drawn):
            assert np.array_equal(line.get_xydata().T, curve(rows, f"loss_at_noise/{i + 1}_of_5"))
        assert [len(p.lines) > 0 for p in panels] == [True] * 6
        few = [{k: v for k, v in r.items() if k in ("step", "loss")} for r in rows if "loss" in r]
        assert [p.get_title() for p in draw_curves(few).axes] == ["loss"]


class TestValidation:
    def test_is_in_the_metrics_and_in_tensorboard(self, run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        steps, bound = curve(read_metrics(run), "eval/bits_per_dim_bound")
        assert steps == [2, 4, 6] and all(1 < b < 50 for b in bound)
        assert curve(read_metrics(run), "eval/loss")[0] == steps
        events = EventAccumulator(str(run))
        events.Reload()
        shown = {e.step: e.value for e in events.Scalars("eval/bits_per_dim_bound")}
        assert shown == pytest.approx(dict(zip(steps, bound, strict=True)), rel=1e-6)
        assert {"samples"} <= set(events.Tags()["images"])
        assert {"train/loss", "train/gradient_norm", "train/learning_rate", "eval/loss"} <= set(
            events.Tags()["scalars"]
        )

    def test_changes_no_weight(self):
        alone, watched = tiny_model(wild=True), tiny_model(wild=True)
        train(alone, points(), None, options(eval_every=2))
        callback = Validation(points(seed=1), None, objective=DSM())
        train(watched, points(), None, options(eval_every=2), callbacks=[callback])
        assert same(dict(alone.named_parameters()), dict(watched.named_parameters()))

    def test_loss_is_the_training_loss(self):
        """A network that says 0 for the noise has the loss |eps|^2 / D, whose mean is 1 and whose variance 2 / D."""
        model = ScoreModel(MLP(dim=2, width=8, depth=1), VPSDE())
        for p in model.parameters():
            torch.nn.init.zeros_(p)
        split = from_tensor(torch.randn(4000, 2), validation=0).split("train")
        n = len(split)
        validation = Validation(split, None, objective=DSM(times=UniformTime()), n=n, draws=1)
        with torch.no_grad():
            loss = validation.on_eval(Lent(model))["loss"]
        assert abs(loss - 1) < 4 * (2 / 2 / (4 * n)) ** 0.5
        assert loss != 1 and loss == validation.on_eval(Lent(model.requires_grad_(False)))["loss"]

    def test_loss_is_of_grey_values_where_training_is(self):
        """Black pictures: the network that knows x_0 = centre of the lowest bin errs by the dequantisation alone."""

        class Black(torch.nn.Module):
            sde = VPSDE()

            def noise(self, x, t, class_label=None):
                alpha, sigma = (v(t).reshape(-1, 1, 1, 1).to(x) for v in (self.sde.alpha, self.sde.sigma))
                return (x - alpha * centre) / sigma

            def forward(self, x, t):
                return -self.noise(x, t) / self.sde.sigma(t).reshape(-1, 1, 1, 1).to(x)

        dataset = from_tensor(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), levels=4)
        transform, split = dataset.transform(), dataset.split("train")
        centre = float(transform.centres(split.x).flatten()[0])
        model = Black()
        model.weight = torch.nn.Parameter(torch.zeros(()))
        losses = [
            Validation(split, transform, objective=DSM(), dequantize=d, draws=1).on_eval(Lent(model))["loss"]
            for d in (False, True)
        ]
        assert losses[0] < 1e-6 < 1e-3 < losses[1]

    def test_which_images(self, monkeypatch):
        def splits(**training):
            config = configuration.plain(vp_config())
            resolved = setup.resolve({**config, "training": {**config["training"], **training}})
            return resolved.training_data, resolved.held_out, resolved.seen

        data, held_out, seen = splits()
        ids = set(data.ids.tolist())
        assert (len(data), len(held_out), seen) == (1500, 200, True) and set(held_out.ids.tolist()) <= ids
        data, held_out, seen = splits(split="fit")
        assert (len(data), seen) == (1300, False) and not set(held_out.ids.tolist()) & set(data.ids.tolist())
        with pytest.raises(UserError, match="config.training: got split='test'; expected one of 'train', 'fit'"):
            splits(split="test")
        nothing_aside = from_tensor(torch.randn(50, 2), validation=0)
        monkeypatch.setattr(setup, "load_data", lambda section: (nothing_aside, nothing_aside.transform()))
        with pytest.raises(UserError, match="sets nothing aside"):
            splits(split="fit", validation=8)
        data, held_out, seen = splits(validation=8)
        assert held_out.ids.tolist() == data.ids.tolist()[-8:] and seen


class TestBeginningFromWeights:
    @pytest.mark.parametrize("kind", ["run folder", "checkpoint", "lone file", "pretrained folder"])
    def test_any_kind_of_source_gives_the_same(self, run, pretrained, tmp_path, kind):
        source = {
            "run folder": run,
            "checkpoint": run / "checkpoints" / "step_00000006.pt",
            "lone file": tmp_path / "weights.pt",
            "pretrained folder": pretrained,
        }[kind]
        shutil.copy(run / "checkpoints" / "step_00000006.pt", tmp_path / "weights.pt")
        model = fresh_model(run)
        assert not same(weights(run), dict(model.named_parameters()))
        origin = initialize_from(model, source)
        assert same(weights(run), dict(model.named_parameters()))
        assert origin.step == 6 and origin.config["system"] == "vp"

    def test_an_older_checkpoint_is_itself(self, tmp_path):
        model = tiny_model(wild=True)
        train(model, points(), None, options(checkpoint_every=5, keep=9), folder=tmp_path)
        old, new = tiny_model(seed=1), tiny_model(seed=1)
        assert initialize_from(old, tmp_path / "checkpoints" / "step_00000005.pt").step == 5
        load_weights(new, tmp_path, step=5)
        assert same(dict(old.named_parameters()), dict(new.named_parameters()))
        load_weights(new, tmp_path)
        assert not same(dict(old.named_parameters()), dict(new.named_parameters()))

    def test_a_damaged_file_is_noticed(self, run, tmp_path):
        folder = tmp_path / "checkpoints"
        shutil.copytree(run / "checkpoints", folder)
        file = folder / "step_00000006.pt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="SHA-256"):
            initialize_from(fresh_model(run), file)
        torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="not a checkpoint of format"):
            initialize_from(fresh_model(run), tmp_path / "other.pt")

    def test_a_pretrained_network_that_means_something_else_is_refused(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        other = ScoreModel(tiny_model().net, VPSDE())  # predicts the noise
        with pytest.raises(CheckpointError, match="parametrization"):
            initialize_from(other, tmp_path)

    @pytest.mark.slow
    def test_fine_tunes_on_other_data_of_the_same_shape(self, run, tmp_path):
        """With a learning rate of next to nothing the weights of the end are those of the beginning."""
        np.save(tmp_path / "other.npy", np.random.RandomState(0).randint(0, 255, (64, 8, 8), np.uint8))
        flags = [
            f"--workdir={tmp_path / 'new'}",
            *SMALL,
            "--config.seed=5",
            "--config.training.learning_rate=1e-30",
            "--config.data.name=arrays",
            f"--config.data.root={tmp_path / 'other.npy'}",
        ]
        assert "is ignored" not in go(vp.main, f"--init_from={run}", *flags)
        assert same(weights(run), weights(tmp_path / "new"))
        results = json.loads((tmp_path / "new" / "results.json").read_text())
        assert results["init_from"] == {"path": str(run / "checkpoints" / "step_00000006.pt"), "step": 6}
        assert "| began with |" in (tmp_path / "new" / "report.md").read_text()
        assert "is ignored" in go(vp.main, "--resume", f"--init_from={tmp_path / 'nowhere'}", *flags)
        assert json.loads((tmp_path / "new" / "results.json").read_text())["init_from"] == results["init_from"]

    @pytest.mark.parametrize(
        ("flags", "code", "words"),
        [
            (["--config.model.channels=16"], 5, ("shape", "expected")),
            (["--config.model.parametrization=noise"], 2, ("parametrization", "preconditioned")),
            (["--config.data.name=moons"], 5, ("names", "network")),
        ],
    )
    def test_what_does_not_fit_is_refused_in_one_line(self, run, tmp_path, flags, code, words):
        refused(f"--workdir={tmp_path / 'new'}", f"--init_from={run}", *SMALL, *flags, code=code, words=words)
        assert not (tmp_path / "new").exists()

    def test_nothing_there_is_refused(self, tmp_path):
        refused(f"--workdir={tmp_path / 'n'}", f"--init_from={tmp_path / 'x'}", *SMALL, code=2, words=["no checkpoint"])


class TestBeforeARun:
    def test_an_estimate_is_printed(self, tmp_path):
        shown = go(vp.main, f"--workdir={tmp_path / 'vp'}", *POINTS)
        found = re.search(r"memory about (\S+) GiB; checkpoints of (\S+) MiB, at most (\S+) MiB", shown)
        size = max(f.stat().st_size for f in (tmp_path / "vp" / "checkpoints").glob("*.pt")) / 2**20
        assert 0.05 < float(found[1]) < 4
        assert float(found[2]) - 0.1 < size < float(found[2]) + 0.2 and float(found[3]) >= 3 * float(found[2]) - 0.2

    def test_memory_grows_with_the_batch_by_the_activations(self):
        """A wide MLP has 0.5 MB of weights, which are there once, and saves a few dozen numbers a unit for each sample."""
        model, split = ScoreModel(MLP(dim=2, width=256, depth=1), VPSDE()), points()
        small, large = (estimate(model, split, None, options(batch_size=n)).memory for n in (16, 64))
        one = (large - small) / 48
        assert 4 * 256 < one < 4 * 256 * 30 < 4 * sum(p.numel() for p in model.parameters()) / 4
        split_up = estimate(model, split, None, options(batch_size=64), processes=4).memory
        assert split_up == pytest.approx(small, abs=2**20)

    def test_a_dry_run_goes_through_every_stage_and_keeps_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        flags = [f for f in SMALL if "limit" not in f and "training.steps" not in f and "sampling.n" not in f]
        shown = script("vp", "--dry_run", *flags).stdout
        for stage in ("training, 4", "2 more from the checkpoint", "drawing 64 samples", "scoring 3 images", "report"):
            assert stage in shown, stage
        assert "nothing is kept" in shown and not list(tmp_path.glob("dry_run-*"))
        time, memory, disk = (re.search(rf"  {k}  +.*?([\d.]+)", shown)[1] for k in ("time", "memory", "disk"))
        assert float(time) > 0 and float(memory) > 0.05 and float(disk) > 0

    def test_a_dry_run_keeps_what_it_is_told_to(self, tmp_path):
        folder = tmp_path / "vp"
        shown = go(vp.main, "--dry_run", f"--workdir={folder}", "--resume", *POINTS)
        assert str(folder) in shown
        assert json.loads((folder / "results.json").read_text())["training"]["steps"] == 6
        assert [r["step"] for r in read_metrics(folder) if "loss" in r] == [1, 2, 3, 4, 5, 6]
        refused("--dry_run", f"--workdir={folder}", *POINTS, code=2, words=["--dry_run", "holds a run"])

    def test_a_dry_run_refuses_what_the_run_would(self, tmp_path):
        flags = ["--dry_run", f"--workdir={tmp_path / 'vp'}", *SMALL]
        refused("--config.sampling.second=pc", *flags, code=2, words=["two different samplers"])
        refused("--config.training.split=all", *flags, code=2, words=["'train', 'fit'"])
        refused(f"--init_from={tmp_path}", *flags, code=2, words=["no checkpoint"])
        assert not (tmp_path / "vp").exists()

    def test_expected_times_are_those_of_the_small_run_scaled(self):
        made = setup.resolve(configuration.plain(vp_config()))
        made = replace(made, n=128, protocol=replace(made.protocol, steps=128))
        small = dry_run.shorten(made)
        assert (small.n, *(s.steps for s in small.samplers.values())) == (64, 4, 4)
        assert made.samplers["pc"].steps == 250 and small.options.batch_size == made.options.batch_size
        cost = dry_run.Plan(parameters=1, steps_per_second=2.0, seconds=1100.0, memory=1, checkpoint=1, disk=1)
        drawn = {
            name: Drawn(sampler="", nfe=nfe, seconds=seconds, samples=64, picture="")
            for name, nfe, seconds in (("pc", 9, 0.9), ("dpm_solver", 5, 0.5))
        }
        scored = SimpleNamespace(result=SimpleNamespace(nfe=5), seconds=3.2)
        expected = dry_run.expected_seconds(made, small, cost, drawn, scored, {"baselines": 2.0}, pilot=1.0)
        assert expected == pytest.approx(
            {
                "training": 1100.0,
                "pc": 501 * 0.1 * 2,
                "dpm_solver": 21 * 0.1 * 2,
                "scoring": 1.0 + 2.2 * 5.94 * 129 / 5,
                "the rest": 2.0,
            }
        )

    def test_what_takes_long_is_short(self):
        """An annealed sampler has few steps at each of few levels (it had all 40), and the pilot few attempts."""
        made = setup.resolve(configuration.config_for("ncsn"))
        small = dry_run.shorten(made)
        ald, second = small.samplers.values()
        assert (ald.levels, ald.steps, ald.evaluations, second.evaluations) == (4, 4, 17, 5)
        assert next(iter(made.samplers.values())).evaluations == 23 * 40 + 1
        assert sum(most for _, most in small.pilots) == 40 and sum(most for _, most in made.pilots) == 300

    def test_help_shows_the_flags(self, capsys):
        with pytest.raises(SystemExit):
            vp.main(["--help"])
        shown = capsys.readouterr().out
        for flag in (
            "--init_from=",
            "--dry_run=False",
            "config.training.validation=128",
            "config.training.split=train",
        ):
            assert flag in shown

    def test_a_misspelt_flag_is_named(self):
        refused("--dryrun", code=2, words=["--dryrun", "--dry_run"])
        refused("--init_from=", "--dry_run", code=2, words=["without a value"])


def test_a_dry_run_prices_evaluations_by_the_speed_of_training():
    """A small run's own seconds are mostly of what does not grow: they are not scaled where evaluations are counted."""
    cost = dry_run.Plan(parameters=1, steps_per_second=10.0, seconds=100.0, memory=0, checkpoint=0, disk=0)

    def own(counts: bool) -> float:
        system = SimpleNamespace(
            counts_evaluations=counts, effort=lambda made, images: 192_000.0 if made.n == 64 else 1_920.0
        )
        shared = {"system": system, "samplers": {}, "options": SimpleNamespace(batch_size=64)}
        protocol = SimpleNamespace(split="test", limit=10, solver="fast", steps=32)
        dataset = SimpleNamespace(split=lambda name: range(100))
        whole, small = (SimpleNamespace(n=n, protocol=protocol, dataset=dataset, **shared) for n in (64, 8))
        seconds = {"finish": 5.0, "score": 1.0}
        return dry_run.expected_seconds(whole, small, cost, {}, None, seconds, pilot=0.0)["its own"]

    assert own(True) == pytest.approx(5 - 1 + 100)  # 3 x 64 x 10 evaluations a second
    assert own(False) == pytest.approx(500)


def test_baselines_in_bits_stand_beside_bits_alone():
    """A bound in nats an image is of another density than the baselines' bits/dim."""
    told = SimpleNamespace(name="ddgm")
    for unit, rows in (("bits/dim", 2), ("nats", 1)):
        results = {
            "bits_per_dim": {"mean": 70.0, "stderr": 0.1, "kind": "bound", "unit": unit},
            "baselines": {"one Gaussian": 2.958},
        }
        assert len(report._densities(told, results)) == rows
