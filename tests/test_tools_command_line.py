"""What all tools share on the command line: paths, --quiet, values left open; samples as 8-bit files; networks that choose how
they are told the time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_experiments import QUICK, called, refused

import models
from data import from_tensor
from experiments import bounds, compare, evaluate, export, leaderboard, nll, ood, sample, vp
from models import DiscreteIndex, LogSNR, Sigma
from numerics import UserError
from sde_lib import VESDE
from training import TrainingOptions, UsageError
from workflow import Protocol, command_line, eight_bit, load_run, resolve, systems
from workflow.configuration import config_for
from workflow.main import TOOLS, tool

pytestmark = pytest.mark.usefixtures("loose_pilots")

FEW = ["--limit", "3", "--steps", "3", "--batch_size", "3"]


def set_up(name, *flags):
    return command_line.parse_system(systems.create(name), [*flags]).config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vp"
    called(vp.main, f"--workdir={folder}", *QUICK, "--quiet")
    return folder


def parsers_kept(monkeypatch):
    """A list that every tool's parser joins when it parses, and what parses."""
    seen = []
    parse = command_line.Parser.parse_args

    def keep(self, *more):
        seen.append(self)
        return parse(self, *more)

    monkeypatch.setattr(command_line.Parser, "parse_args", keep)
    return seen, parse


# -- paths ----------------------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder_in_every_path_option(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen, parse = parsers_kept(monkeypatch)
    for name in TOOLS:
        called(tool(name), "--no_such_option", check=False)
        options = [a for a in seen[-1]._actions if a.type is Path]
        assert options, name
        needed = [f"--{a.dest}=~/r" for a in seen[-1]._actions if a.required and a.option_strings]
        for option in options:
            if option.option_strings:
                args = parse(seen[-1], [*needed, f"{option.option_strings[0]}=~/x"])
                assert getattr(args, option.dest) == tmp_path / "x"
            else:
                assert getattr(parse(seen[-1], [*needed, "~/x"]), option.dest) == [tmp_path / "x"]
    asked = command_line.parse_system(systems.create("vp"), ["--workdir=~/x", "--init_from=~/y"])
    assert (asked.workdir, asked.init_from) == (tmp_path / "x", tmp_path / "y")


# -- --quiet --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quiet_leaves_results_alone_and_nothing_else(run, tmp_path):
    """On stderr nothing at all; on stdout what was measured and where it is."""
    done = called(vp.main, f"--workdir={tmp_path / 'vp'}", *QUICK, "--quiet")
    assert done.stderr == "" and "memory about" not in done.stdout and "steps of" not in done.stdout
    assert "bits/dim" in done.stdout
    done = called(vp.main, f"--workdir={tmp_path / 'dry'}", *QUICK, "--quiet", "--dry_run")
    assert done.stderr == "" and "training, 4 steps" not in done.stdout and "minutes" in done.stdout
    for main, more in (
        (sample.main, ["--run", run, "--n", 2, "--steps", 2]),
        (nll.main, ["--run", run, *FEW]),
        (evaluate.main, ["--run", run, "--n", 60, "--steps", 2, "--features", "pixels"]),
        (compare.main, ["--run", run, "--n", 60, "--nfe", "3", "--samplers", "ddim", "--measures", "SW"]),
        (bounds.main, ["--run", run, "--limit", 2, "--K", 1, "--steps", 2, "--draws", 2, "--levels", 3, "--probes", 1]),
        (ood.main, ["--run", run, *FEW]),
        (export.main, ["--run", run, "--to", tmp_path / "out"]),
        (leaderboard.main, [run]),
    ):
        done = called(main, *more, "--quiet")
        assert done.stderr == "" and done.stdout.strip(), main


# -- values left open -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOOLS)
def test_no_tool_takes_a_negative_number_of_anything(name, run, monkeypatch):
    """Nor a batch of no samples; a class is the network's matter."""
    seen, _ = parsers_kept(monkeypatch)
    called(tool(name), "--no_such_option", check=False)
    needed = [f"--{a.dest}={run}" for a in seen[-1]._actions if a.required and a.option_strings]
    whole = [a.dest for a in seen[-1]._actions if _reads_integers(a) and a.dest != "label"]
    for option, value in [(option, -5) for option in whole] + [("batch_size", 0)] * ("batch_size" in whole):
        refused(called(tool(name), *needed, f"--{option}={value}", check=False), 2, str(value))


def _reads_integers(action: argparse.Action) -> bool:
    try:
        return action.type is not None and isinstance(action.type("64"), int)
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        return False


@pytest.mark.parametrize("name", ["sample", "evaluate"])
def test_an_option_of_the_sampler_is_given_once(name):
    def complaint(*given):
        return called(tool(name), "--run=nowhere", *given, check=False)

    refused(
        complaint("--steps", 4, "--option", "steps=5"), 2, "got --steps 4 and --option steps=5; expected one of them"
    )
    refused(complaint("--option", "order=2", "--option", "order=3"), 2, "got --option order twice")
    refused(complaint("--option", "steps=5", "--option", "grid=karras", "--option", "grid.rho=3"), 2, "nowhere")


@pytest.mark.parametrize("text", ["none", "None", "NONE"])
def test_none_leaves_a_value_open_wherever_none_is_its_default(text):
    for flag, name in (("clip", "clip"), ("max_seconds", "max_seconds")):
        assert set_up("vp", f"--config.training.{flag}={text}")["training"][name] is None
    for name in ("steps", "probes", "batch_size", "t_min"):
        assert set_up("vp", f"--config.likelihood.{name}={text}")["likelihood"][name] is None
    assert resolve(set_up("vp", f"--config.training.clip={text}")).options.clip is None
    for name in ("sample", "evaluate"):
        refused(called(tool(name), "--run=nowhere", "--steps", text, "--label", text, check=False), 2, "nowhere")
    assert TrainingOptions(steps=1, clip=None).clip is None


@pytest.mark.parametrize(
    ("told", "left"),
    [
        ({"precision": 0.02}, {"tolerance": None, "steps": None, "limit": 0}),
        ({"precision": 0.02, "limit": 100, "tolerance": 0.1}, {"tolerance": 0.1, "steps": None, "limit": 100}),
        ({"precision": 0.02, "steps": 16}, {"tolerance": None, "steps": 16, "limit": 0}),
        ({"tolerance": 0.01}, {"tolerance": 0.01, "steps": None, "limit": 200}),
        ({"solver": "accurate"}, {"tolerance": None, "steps": None, "limit": 200}),
        ({"solver": "fast"}, {"tolerance": 1e-3, "steps": 48, "limit": 200}),
        ({"precision": "None"}, {"tolerance": 1e-3, "steps": 48, "limit": 200}),
    ],
    ids=lambda values: ",".join(values),
)
def test_no_default_hides_what_a_user_asks_of_the_likelihood(told, left):
    """The preset has steps, a tolerance and a limit of its own; what follows from what was told is not theirs to say."""
    flags = [f"--config.likelihood.{name}={value}" for name, value in told.items()]
    written = {f"likelihood.{name}": None if value == "None" else value for name, value in told.items()}
    for config in (
        set_up("classes", "--preset=fashion_mnist", *flags),
        config_for("classes", "fashion_mnist", written),
    ):
        assert {name: config["likelihood"][name] for name in left} == left


def test_the_steps_of_a_configurations_survey_are_for_a_fifth_of_its_precision():
    for preset in ("digits", "fashion_mnist"):
        section = set_up("vp", f"--preset={preset}", "--config.likelihood.precision=0.02")["likelihood"]
        protocol = Protocol(**section).for_samples(64, 17)
        assert protocol.tolerance == pytest.approx(0.004) and protocol.follows_precision
    adaptive = "--config.likelihood.solver=accurate"
    assert resolve(set_up("vp", adaptive)).protocol.tolerance == 1e-5
    with pytest.raises(
        UserError, match=r"^config.likelihood: got tolerance=0.004 with solver='accurate'.*such as 1e-05$"
    ):
        resolve(set_up("vp", adaptive, "--config.likelihood.tolerance=0.004"))


@pytest.mark.parametrize("clip", [0, -1.0, float("nan"), "none", True])
def test_what_a_refused_clip_is_told_to_be_is_accepted(clip):
    with pytest.raises(UsageError, match=r"expected a number > 0, or None$"):
        TrainingOptions(steps=1, clip=clip)
    assert TrainingOptions(steps=1, clip=float("inf")).clip == float("inf")


@pytest.mark.slow
def test_memory_is_saved_from_the_command_line(tmp_path):
    """Parts of a batch, activations computed again, both at once: the losses of a plain run."""

    def losses(name, *flags):
        folder = tmp_path / name
        called(vp.main, f"--workdir={folder}", *QUICK, *flags, "--quiet")
        return [
            json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
        ]

    plain = losses("plain")
    for flags in (
        ["--config.training.accumulate=4"],
        ["--config.training.checkpoint_activations=True"],
        [
            "--config.training.accumulate=2",
            "--config.training.checkpoint_activations=True",
            "--config.training.clip=none",
        ],
    ):
        assert np.allclose(losses("-".join(f.rsplit(".", 1)[1] for f in flags), *flags), plain, rtol=0.02)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_drawn(run, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    before = sorted(run.rglob("*"))
    for option in ("--out", "--gif"):
        for name, words in (
            ("x", "names no format"),
            ("x.qqq", "names no format"),
            ("folder.png", "where a file cannot be"),
            ("file/x.png", "where a file cannot be"),
        ):
            refused(
                called(sample.main, "--run", run, "--n", 2, "--steps", 2, option, tmp_path / name, check=False),
                3,
                words,
            )
    refused(called(ood.main, "--run", run, "--limit", 1, "--steps", 2, check=False), 3, "two or more")
    assert sorted(run.rglob("*")) == before and not (tmp_path / "x").exists()


# -- samples as 8-bit files -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_as_files_and_as_an_array_that_any_tool_reads(run):
    before = set((run / "samples").glob("*"))
    done = called(sample.main, "--run", run, "--n", 5, "--steps", 3, "--batch_size", 2, "--save", "png")
    folder, parts = sorted(
        (p for p in set((run / "samples").glob("*")) - before if p.is_dir()), key=lambda p: len(p.name)
    )[::-1]
    assert folder.name == f"{parts.name}-png"
    assert str(folder) in done.stdout
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    with np.load(folder.with_suffix(".npz"), allow_pickle=False) as stored:
        pictures, units = stored["arr_0"], str(stored["units"])
    assert pictures.dtype == np.uint8 and pictures.shape == (5, 8, 8, 1) and "0 to 255" in units
    for file, picture in zip(files, pictures, strict=True):
        with Image.open(file) as opened:
            assert opened.mode == "L" and opened.format == "PNG"
            assert np.array_equal(np.asarray(opened), picture[..., 0])
    stored = [np.load(part, allow_pickle=False) for part in sorted(parts.glob("part_*.npz"))]
    assert all("model units" in str(part["units"]) for part in stored)
    x = torch.from_numpy(np.concatenate([part["x"] for part in stored]))
    grey = load_run(run).transform.to_data(x).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pictures, np.round(grey * (255 / 16)).astype(np.uint8))


@pytest.mark.parametrize(("levels", "channels"), [(256, 3), (256, 1), (2, 1), (256, 4), (17, 2)])
def test_bytes_are_grey_values_stretched_to_255(levels, channels, tmp_path):
    """Pictures of the data themselves come back: exactly with 256 levels."""
    grey = torch.randint(0, levels, (4, channels, 5, 6), dtype=torch.uint8)
    dataset = from_tensor(grey, levels=levels)
    eight_bit.check(dataset)
    run = argparse.Namespace(dataset=dataset, transform=dataset.transform())
    folder = eight_bit.save(dataset.transform().centres(grey), run, tmp_path / "mine-1234")
    expected = (grey.double() * 255 / (levels - 1)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.load(folder.with_suffix(".npz"))["arr_0"], expected)
    with Image.open(folder / "000003.png") as opened:
        assert np.array_equal(np.asarray(opened).reshape(5, 6, channels), expected[3])
        assert opened.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]


@pytest.mark.slow
def test_what_is_no_picture_is_refused_before_anything_is_drawn(tmp_path):
    flags = ["--config.data.name=swiss_roll", "--config.model.depth=1"]
    called(vp.main, f"--workdir={tmp_path}", *QUICK, *flags, "--quiet")
    done = called(sample.main, "--run", tmp_path, "--n", 2, "--save", "png", check=False)
    refused(done, 2, "--save png", "swiss_roll", "expected images")
    assert not [p for p in (tmp_path / "samples").iterdir() if p.is_dir()]


# -- how a network is told the time ---------------------------------------------------------------------------------------

SMALL = "--config.model.channels=8"


@pytest.mark.parametrize(
    ("system", "flags", "expected"),
    [
        ("ve", ["--config.model.name=ncsnv2", SMALL], DiscreteIndex(levels=232, reverse=True)),
        ("ncsn", ["--config.model.name=ncsn", "--config.sde.levels=10", SMALL], DiscreteIndex(levels=10, reverse=True)),
        (
            "ve",
            ["--config.model.name=ncsnv2", SMALL, "--config.model.sigmas=(5.0,1.0,0.1)"],
            DiscreteIndex(levels=3, reverse=True),
        ),
        (
            "ve",
            ["--config.model.sigmas=(5.0,1.0)", "--config.model.name=refinenet", SMALL],
            DiscreteIndex(levels=2, reverse=True),
        ),
        (
            "ve",
            [
                "--config.model.name=ncsnpp",
                "--config.model.embedding=fourier",
                SMALL,
                "--config.model.attention_resolutions=(4,)",
            ],
            Sigma(),
        ),
        ("vp", ["--config.model.embedding=fourier"], Sigma()),
        (
            "vp",
            ["--config.model.name=ncsnv2", SMALL, "--config.model.conditioning.levels=232"],
            DiscreteIndex(levels=232, reverse=True),
        ),
        ("vp", ["--config.model.name=unet", SMALL], LogSNR()),
        ("vp", [], LogSNR()),
    ],
)
def test_a_network_chooses_how_it_is_told_the_time_where_that_is_left_open(system, flags, expected):
    config = set_up(system, *flags)
    assert resolve(config).model.conditioning == expected
    values = {f.removeprefix("--config.").split("=", 1)[0]: f.split("=", 1)[1] for f in flags}
    if set(values) == {"model.name", "model.channels"}:
        made = config_for(system, changes={**values, "model.channels": 8})
        assert made["model"]["conditioning"] == config["model"]["conditioning"]


def test_a_choice_is_kept_and_a_wrong_one_refused():
    config = set_up("ve", "--config.model.name=ncsnpp_cifar10", "--config.model.conditioning=log_sigma")
    assert config["model"]["conditioning"]["name"] == "log_sigma"
    assert set_up("ve", "--preset=cifar10")["model"]["conditioning"]["name"] == "sigma"
    done = called(vp.main, "--config.model.name=ncsnv2", "--config.model.conditioning=log_snr", SMALL, check=False)
    refused(done, 2, "DiscreteIndex(levels=232, reverse=True)")


def test_a_model_in_python_is_told_what_its_network_needs():
    made = models.ScoreModel(models.NCSN(channels=4), VESDE())
    assert made.conditioning == DiscreteIndex(levels=10, reverse=True)
    assert models.ScoreModel(models.MLP(dim=2, embedding="fourier"), VESDE()).conditioning == Sigma()
    assert models.ScoreModel(models.MLP(dim=2), VESDE()).conditioning == LogSNR()
    assert models.needed_conditioning("ncsnpp_celeba64") == DiscreteIndex(levels=1000, reverse=True)
    assert models.needed_conditioning("ncsnpp_cifar10") == Sigma()
    assert models.needed_conditioning("auto") is None
