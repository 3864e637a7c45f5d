"""The workflow: a configuration is resolved once, every option is a flag, a system is one object, and bugs are bugs."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from torch import nn

import data
import models
import samplers
import sde_lib
import training
from numerics import Catalogue, UserError, argument_help
from sde_lib import KernelSDE
from training import Objective, TrainingOptions
from workflow import command_line, configuration, experiment, main, systems
from workflow.command_line import parse_system
from workflow.defaults import base_config
from workflow.draw import Drawn, report_drawn
from workflow.pictures import save_samples
from workflow.protocol import Protocol
from workflow.run_folder import RunFolder
from workflow.sections import leaves, section
from workflow.setup import resolve
from workflow.system import System
from workflow.systems.vp import VP
from workflow.tools import arguments as shared

pytestmark = pytest.mark.usefixtures("loose_pilots")

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "--config.model.channels=8",
    "--config.model.width=16",
    "--config.training.steps=2",
    "--config.training.warmup=1",
]


def parsed(*flags, system=None):
    return parse_system(system or VP(), list(flags)).config


def set_up(*flags, system=None):
    return resolve(parsed(*flags, system=system))


def refusal(*flags, system=None):
    with pytest.raises(UserError) as caught:
        set_up(*flags, system=system)
    return str(caught.value)


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return value / 2 if isinstance(value, float) and value else value + 1


class TestEveryOptionIsAFlag:
    CATALOGUES = {
        "data": data.DATASETS,
        "sde": sde_lib.SDES,
        "network": models.NETWORKS,
        "parametrization": models.PARAMETRIZATIONS,
        "conditioning": models.CONDITIONINGS,
        "objective": training.OBJECTIVES,
        "sampler": samplers.SAMPLERS,
    }

    @pytest.mark.parametrize("kind", CATALOGUES)
    def test_sections_show_every_field(self, kind):
        """All fields of all classes, so that fields and flags cannot drift apart; what follows from the data is left out."""
        catalogue = self.CATALOGUES[kind]
        for name, entry in catalogue.entries.items():
            shown = section(catalogue, name)
            missing = {o for o in catalogue.options(name) if o not in shown} - set(catalogue.derived)
            assert not missing, (name, missing)
            if is_dataclass(entry):
                own = {f.name for f in fields(entry) if f.init}
                assert own <= set(shown) | set(catalogue.derived), (name, own)

    @pytest.mark.parametrize(("kind", "part"), [(TrainingOptions, "training"), (Protocol, "likelihood")])
    def test_dataclasses_of_options_are_shown_whole(self, kind, part):
        config = VP().get_config()
        assert {f.name for f in fields(kind)} - {"seed", "progress"} <= set(config[part])

    def test_help_lists_every_leaf_with_its_default(self, capsys):
        with pytest.raises(SystemExit):
            parse_system(VP(), ["--help"])
        shown = capsys.readouterr().out
        for path, value in leaves(VP().get_config()):
            assert f"--config.{path}={value}" in shown, path

    def test_help_shows_what_is_chosen(self, capsys):
        with pytest.raises(SystemExit):
            parse_system(VP(), ["--config.sampling.sampler=ddim", "--help"])
        assert "--config.sampling.sampler.eta=0.0" in capsys.readouterr().out

    @pytest.mark.parametrize("field", [f.name for f in fields(TrainingOptions) if f.name not in ("seed", "progress")])
    def test_every_training_option_reaches_the_training(self, field):
        other = {
            "optimizer": "adamw", "schedule": "constant", "precision": "bf16", "nonfinite": "skip", "parallel": "fsdp",
            "betas": (0.8, 0.9), "ema": (0.5, 0.6), "power_ema": (0.1,), "clip": None, "max_seconds": 3.0, "accumulate": 2,
            "label_dropout": 0.1, "batch_size": 64, "cpu_seconds": 3.0,
        }  # fmt: skip
        value = other[field] if field in other else changed(VP().get_config().training[field])
        made = set_up(f"--config.training.{field}={value}", *(f for f in TINY[2:] if f"training.{field}=" not in f))
        expected = 0.0 if field == "label_dropout" else value  # a network without classes hides none
        assert getattr(made.options, field) == expected

    @pytest.mark.parametrize("name", training.WEIGHTINGS.available())
    def test_every_weighting(self, name):
        assert (
            type(set_up(f"--config.training.weighting={name}").objective.weighting) is training.WEIGHTINGS.entries[name]
        )

    @pytest.mark.parametrize("name", training.TIMES.available())
    def test_every_law_of_times(self, name):
        assert type(set_up(f"--config.training.times={name}").objective.times) is training.TIMES.entries[name]

    def test_options_of_parts_of_parts(self):
        made = set_up(
            "--config.training.objective.weighting=min_snr",
            "--config.training.objective.weighting.gamma=3.5",
            "--config.sampling.second=heun",
            "--config.sampling.second.grid=karras",
            "--config.sampling.second.grid.rho=3.0",
            "--config.sampling.sampler.corrector=none",
        )
        assert made.objective.weighting == training.MinSNR(gamma=3.5)
        assert made.samplers["heun"].grid == samplers.Karras(rho=3.0) and made.samplers["pc"].corrector is None

    def test_none_leaves_a_value_open(self):
        assert set_up("--config.training.clip=none").options.clip is None
        assert set_up("--config.training.clip=0.5").options.clip == 0.5

    def test_naming_another_class_keeps_what_was_chosen(self):
        config = parsed("--config.sampling.sampler=ddim")
        assert config["sampling"]["sampler"]["steps"] == 250  # chosen in the defaults, where DDIM has 1,000

    @pytest.mark.parametrize("name", ["mlp", "unet", "ncsnpp", "adm", "dit", "ncsnv2", "ncsn"])
    def test_every_network_trains_on_digits(self, name, tmp_path):
        own = {
            "ncsnpp": ["channels=16", "multipliers=(1,)", "blocks=1"],
            "adm": ["channels=32", "head_channels=16", "multipliers=(1,)", "blocks=1"],
            "dit": ["patch=2", "width=32", "depth=1", "heads=2"],
            "mlp": ["width=16"],
            "unet": ["channels=8"],
            "ncsnv2": ["channels=8"],
            "ncsn": ["channels=8"],
        }[name]
        levels = {"ncsn": 10, "ncsnv2": 232}.get(name)  # these look an index up, and refuse other labels
        options = [f"--config.model.{o}" for o in own if o.split("=")[0] in models.options(name)]
        if levels:
            conditioning = "--config.model.conditioning"
            options += [
                f"{conditioning}=discrete_index",
                f"{conditioning}.levels={levels}",
                f"{conditioning}.reverse=True",
            ]
        made = set_up(f"--config.model.name={name}", *options, "--config.training.batch_size=4", *TINY[2:])
        result = training.train(
            made.model,
            made.training_data,
            made.transform,
            replace(made.options, progress=False),
            objective=made.objective,
        )
        assert np.isfinite([loss for _, loss in result.losses]).all()

    def test_rectangular_images_and_columns(self, tmp_path):
        np.save(tmp_path / "oblong.npy", np.random.RandomState(0).randint(0, 255, (40, 8, 16), np.uint8))
        made = set_up("--config.data.name=arrays", f"--config.data.root={tmp_path / 'oblong.npy'}", *TINY)
        assert made.model(torch.zeros(2, 1, 8, 16), torch.full((2,), 0.5)).shape == (2, 1, 8, 16)
        columns = np.random.RandomState(0).randn(400, 2) * (1000, 1) + (5000, 3)
        np.save(tmp_path / "columns.npy", columns.astype(np.float32))
        flags = ["--config.data.name=arrays", f"--config.data.root={tmp_path / 'columns.npy'}", *TINY]
        made = set_up("--config.data.scaling=columns", *flags)
        x = made.transform(made.training_data.x)
        assert torch.allclose(x.std(dim=0, correction=0), torch.ones(2), atol=0.2)


class TestRefusals:
    @pytest.mark.parametrize(
        ("flag", "words"),
        [
            ("--config.training.stps=3", ("config.training.stps", "training.steps")),
            ("--config.sampling.sampler=ddmi", ("ddmi", "ddim")),
            ("--config.sampling.sampler.ete=1", ("sampling.sampler.ete",)),
            ("--config.training.weighting=simpel", ("simpel", "simple", "likelihood")),
            ("--config.model.name=unett", ("unett", "unet")),
            ("--config.model.heads=many", ("heads", "many", "int")),
            ("--config.data.low=2.0", ("config.data", "low")),
            ("--config.training.clip=many", ("config.training", "clip='many'")),
            ("--config.likelihood.probes=-1", ("config.likelihood", "probes=-1")),
        ],
    )
    def test_name_the_value_and_what_fits(self, flag, words):
        text = refusal(flag)
        assert all(w in text for w in words), text
        assert "\n" not in text

    @pytest.mark.parametrize("kind", ["sampler", "objective", "sde", "conditioning"])
    def test_an_unknown_option_from_python(self, kind):
        catalogue = TestEveryOptionIsAFlag.CATALOGUES[kind]
        name = catalogue.available()[0]
        known = list(catalogue.options(name))
        with pytest.raises(
            UserError, match=rf"'{known[0]}x'.*did you mean '{known[0]}'.*expected some of .*{known[-1]}"
        ):
            catalogue.create(name, **{f"{known[0]}x": 1})


class TestBugsAreBugs:
    @pytest.mark.parametrize("error", [AttributeError, TypeError, KeyError, RuntimeError, ValueError])
    def test_a_planted_error_keeps_its_traceback(self, error, monkeypatch, tmp_path):
        def planted(*args, **options):
            raise error("planted")

        monkeypatch.setattr("workflow.score_model.models.for_data", planted)
        with pytest.raises(error, match="planted"):
            command_line.run(lambda a: experiment.main("vp", a), [f"--workdir={tmp_path / 'x'}"])

    def test_a_users_mistake_is_one_line_and_its_place_is_shown_on_request(self, capsys):
        run = lambda a: experiment.main("vp", a)
        with pytest.raises(SystemExit) as left:
            command_line.run(run, ["--config.training.steps=0"])
        assert left.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
        with pytest.raises(UserError, match="steps=0"):
            command_line.run(run, ["--config.training.steps=0", "--traceback"])

    def test_nothing_catches_type_errors_or_reads_messages(self):
        for folder in ("workflow", "samplers", "likelihood", "sde_lib", "numerics", "training"):
            for file in (ROOT / folder).rglob("*.py"):
                text = file.read_text()
                assert "except TypeError" not in text and "in str(error)" not in text.replace(
                    "match[1] in str(error)", ""
                )


class TestStoredConfigurations:
    @pytest.mark.parametrize("folder", sorted((ROOT / "pretrained").iterdir()), ids=lambda f: f.name)
    def test_pretrained_cards_are_read(self, folder):
        config = configuration.of_run(folder)
        card = json.loads((folder / "card.json").read_text())["config"]
        assert config["system"] == card.get("system", card.get("name"))
        assert config["training"]["steps"] == card["training"]["steps"]

    def test_a_stored_configuration_makes_the_network_that_was_trained(self):
        """A pretrained card says what it was configured with, in the form of version 0.1, and what came of it."""
        folder = ROOT / "pretrained" / "vp_digits"
        card = json.loads((folder / "card.json").read_text())
        made = resolve(configuration.of_run(folder)).model
        options = json.loads(json.dumps(made.net.options))
        assert {k: v for k, v in options.items() if k in card["network"]["options"]} == card["network"]["options"]
        assert len(options["fourier_features"]) == 2
        assert configuration.of_run(folder)["data"]["scaling"] == "joint"
        assert json.loads(json.dumps(sde_lib.describe(made.sde))) == card["sde"]
        assert models.PARAMETRIZATIONS.describe(made.parametrization) == card["parametrization"]
        assert models.CONDITIONINGS.describe(made.conditioning) == card["conditioning"]

    def test_a_configuration_comes_back_as_it_was(self, tmp_path):
        config = parsed(
            "--config.sampling.sampler=ddim", "--config.training.clip=none", "--config.model.multipliers=(1, 2)"
        )
        RunFolder(tmp_path).write_json("config.json", config)
        assert configuration.of_run(tmp_path) == config

    def test_an_option_that_is_gone_is_named(self, tmp_path):
        config = json.loads(json.dumps(parsed()))
        config["training"]["lerning_rate"] = 3
        RunFolder(tmp_path).write_json("config.json", config)
        with pytest.raises(UserError, match=r"config.json.*'lerning_rate'.*did you mean 'learning_rate'.*remove"):
            configuration.of_run(tmp_path)

    def test_an_option_that_has_come_since_gets_its_default(self, tmp_path):
        config = json.loads(json.dumps(parsed()))
        del config["training"]["keep_every"]
        RunFolder(tmp_path).write_json("config.json", config)
        assert configuration.of_run(tmp_path)["training"]["keep_every"] == 0


class TestReport:
    def test_sections_replace_themselves(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.write_report(["# run", "", "text"], {"A": ["one"], "B": ["two"]}, keep=True)
        folder.add_section("C", ["three"])
        folder.add_section("A", ["four", "", "| a |", "|---|"])
        text = (tmp_path / "report.md").read_text()
        assert re.findall(r"(?m)^## (.*)$", text) == ["A", "B", "C"] and "one" not in text and "four" in text
        folder.write_report(["# run again"], {"B": ["five"]}, keep=True)
        text = (tmp_path / "report.md").read_text()
        assert re.findall(r"(?m)^#+ (.*)$", text) == ["run again", "B", "A", "C"] and "two" not in text
        folder.write_report(["# run"], {"B": ["six"]}, keep=False)
        assert re.findall(r"(?m)^## (.*)$", (tmp_path / "report.md").read_text()) == ["B"]

    def test_results_change_entry_by_entry_and_stay_json(self, tmp_path):
        folder = RunFolder(tmp_path)
        folder.update_results({"a": {"mean": float("nan")}, "b": 1})
        assert folder.update_results({"b": 2}) == {"a": {"mean": None}, "b": 2}
        assert json.loads((tmp_path / "results.json").read_text()) == {"a": {"mean": None}, "b": 2}


# -- a system in one file: what docs/extending.md shows ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trigonometric:
    """alpha = cos(c t), sigma = sin(c t)."""

    c: float = 1.57

    @property
    def sde(self):
        return KernelSDE(alpha_fn=lambda t: torch.cos(self.c * t), sigma_fn=lambda t: torch.sin(self.c * t))


class Toy(System):
    """A score of the trigonometric SDE."""

    name = "toy"
    about = "A toy: alpha = cos, sigma = sin."

    def get_config(self):
        config = base_config("toy")
        config.sde = section(self.catalogues["sde"], "trigonometric")
        return config

    @property
    def catalogues(self):
        return {**super().catalogues, "sde": Catalogue("sde", {"trigonometric": Trigonometric})}

    def sde(self, config):
        return self.catalogues["sde"].make(config["sde"]).sde

    def finish(self, run, folder):
        folder.update_results({"toy": {"parameters": sum(p.numel() for p in run.model.parameters())}})
        folder.add_section("Toy", ["A section of its own."])


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(systems.SYSTEMS.entries, "toy", Toy)


STAGES = [
    "--config.sde.c=1.5", "--config.data.name=moons", "--config.training.steps=3", "--config.training.warmup=1",
    "--config.training.batch_size=16", "--config.training.eval_every=2", "--config.training.checkpoint_every=2",
    "--config.model.width=16", "--config.sampling.steps=2", "--config.sampling.second_steps=2", "--config.sampling.n=20",
    "--config.likelihood.steps=4", "--config.likelihood.limit=20", "--quiet",
]  # fmt: skip


def test_a_toy_system_goes_through_every_stage(toy, tmp_path):
    folder = tmp_path / "toy"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main.main(["toy", f"--workdir={folder}", *STAGES]) == 0
        results = json.loads((folder / "results.json").read_text())
        assert results["toy"]["parameters"] > 0 and results["training"]["steps"] == 3
        assert np.isfinite(results["bits_per_dim"]["mean"]) and results["bits_per_dim"]["kind"] == "exact"
        assert json.loads((folder / "config.json").read_text())["system"] == "toy"
        assert "## Toy" in (folder / "report.md").read_text()
        assert main.main(["toy", f"--workdir={folder}", "--resume", *STAGES]) == 0
        assert (folder / "report.md").read_text().count("## Toy") == 1
        assert (
            main.main(["sample", "--run", str(folder), "--sampler", "ddim", "--steps", "3", "--n", "5", "--quiet"]) == 0
        )
        assert main.main(["nll", "--run", str(folder), "--limit", "5", "--steps", "4", "--quiet"]) == 0
        with pytest.raises(UserError, match="KernelSDE, which has no name"):
            main.main(["export", "--run", str(folder), "--to", str(tmp_path / "out"), "--quiet"])
        assert main.main(["toy", f"--workdir={tmp_path / 'dry'}", "--dry_run", *STAGES]) == 0
    assert "every stage went through" in out.getvalue()


class Column(nn.Module):
    """A Gaussian fitted by maximum likelihood: no score, no sampler of an SDE."""

    def __init__(self, sde, dim):
        super().__init__()
        self.sde, self.mean, self.log_std = sde, nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def log_prob(self, x):
        return torch.distributions.Normal(self.mean, self.log_std.exp()).log_prob(x).sum(1)


@dataclass(frozen=True, kw_only=True)
class MaximumLikelihood(Objective):
    """-log p."""

    needs: ClassVar[tuple[str, ...]] = ("log_prob",)

    def draw(self, sde, shape, streams, *, dtype=torch.float32):
        return {"t": torch.ones(shape[0]), "weight": torch.ones(shape[0])}

    def loss(self, model, x_0, draws, labels):
        return -model.log_prob(x_0)


class Fitted(System):
    """A system whose model is no score."""

    name = "fitted"
    about = "A Gaussian."
    no_score = "it draws its own samples, in samples/"
    no_likelihood = ""

    def get_config(self):
        config = base_config("fitted")
        config.sde = section(self.catalogues["sde"], "vp")
        del config.sampling["sampler"], config.sampling["second"]
        return config

    def model(self, config, sde, dataset, transform, data_std):
        return Column(sde, dataset.dim)

    def objective(self, config):
        return MaximumLikelihood()

    def draw(self, run):
        picture = run.folder.path / "samples" / "own.png"
        model, generator = run.setup.model, torch.Generator().manual_seed(0)
        x = model.mean + model.log_std.exp() * torch.randn(run.setup.n, run.dataset.dim, generator=generator)
        save_samples(picture, x.detach(), run.setup)
        drawn = {"own": Drawn(sampler="own", nfe=1, seconds=0.0, samples=len(x), picture="samples/own.png")}
        report_drawn(run.folder, drawn)
        return drawn

    def score(self, run):
        nats = -run.setup.model.log_prob(run.transform(run.dataset.split("test").x.float())).mean()
        entry = {"mean": float(nats), "stderr": 0.1, "kind": "bound", "unit": "nats", "reason": "", "split": "test"}
        run.folder.update_results({"bits_per_dim": {**entry, "seconds": 0.0, "text": f"{float(nats):.2f} nats"}})


WITHOUT_SAMPLERS = [a for a in STAGES if not any(w in a for w in ("sde.c", "sampling.s", "model.width"))]


def test_a_system_without_a_score_goes_through_every_stage(monkeypatch, tmp_path):
    monkeypatch.setitem(systems.SYSTEMS.entries, "fitted", Fitted)
    folder, tools = (
        tmp_path / "run",
        [["sample", "--n", "2"], ["nll"], ["export", "--to", str(tmp_path / "e")]],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        assert main.main(["fitted", f"--workdir={folder}", *WITHOUT_SAMPLERS]) == 0
        results = json.loads((folder / "results.json").read_text())
        assert results["bits_per_dim"]["kind"] == "bound" and results["sampling"]["sampler"] == "own"
        text = (folder / "report.md").read_text()
        assert "(fitted, a bound)" in text and "nats of the test set, per point" in text
        assert main.main(["fitted", f"--workdir={tmp_path / 'dry'}", "--dry_run", *WITHOUT_SAMPLERS]) == 0
        before = sorted(folder.rglob("*"))
        for tool in tools:
            with pytest.raises(UserError, match="a run of fitted, which has no score: it draws its own samples"):
                main.main([tool[0], "--run", str(folder), "--quiet", *tool[1:]])
        with pytest.raises(UserError, match="--label 1 for a run of fitted, whose own way of drawing takes no class"):
            main.main(["sample", "--run", str(folder), "--quiet", "--sampler", "own", "--label", "1"])
        assert sorted(folder.rglob("*")) == before  # a refused command writes nothing
        Fitted.no_likelihood = "nothing is normalised"
        assert main.main(["fitted", f"--workdir={folder}", "--resume", *WITHOUT_SAMPLERS]) == 0
        with pytest.raises(UserError, match="which has no likelihood: nothing is normalised"):
            main.main(["nll", "--run", str(folder), "--quiet"])


def test_a_system_without_a_likelihood_says_why(monkeypatch, tmp_path):
    class Silent(Toy):
        no_likelihood = "its density is not normalised"

    monkeypatch.setitem(systems.SYSTEMS.entries, "toy", Silent)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main.main(["toy", f"--workdir={tmp_path}", *STAGES]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["bits_per_dim"]
    assert found["kind"] == "none" and found["mean"] is None and found["reason"] == Silent.no_likelihood
    assert (
        "no bits/dim: its density is not normalised" in out.getvalue()
        and "none" in (tmp_path / "report.md").read_text()
    )


def test_nothing_outside_a_system_asks_which_one_it_is():
    names = set(systems.available())
    for file in (ROOT / "workflow").rglob("*.py"):
        if "systems" in file.parts:
            continue
        text = file.read_text()
        assert not re.search(r"isinstance\([^)]*(VP|VE|DDPM|NCSN)\b", text), file
        assert not re.search(r"(system|name) *(==|in) *[\"'(]*(" + "|".join(names) + r")\b", text), file


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"sampling.sampler": "ode"},
        {"model.name": "ncsnpp"},
        {"data.name": "gaussians"},
        {"sampling.sampler": "heun"},
    ],
    ids=str,
)
def test_every_value_has_a_help_text(chosen):
    """Its own, its base's, or that of the class which it is "as in"."""
    system = systems.create("vp")
    config = system.get_config()
    configuration.change(config, system, chosen)
    texts = configuration.help_texts(system, config)
    assert not [name for name, _ in leaves(config) if not texts.get(name) or texts[name].startswith("as in")]


@pytest.mark.parametrize("name", systems.available())
def test_every_value_of_every_system_has_a_help_text(name):
    system = systems.create(name)
    config = system.get_config()
    texts = configuration.help_texts(system, config)
    assert not [path for path, _ in leaves(config) if not texts.get(path)]
    assert not {path for path in system.help if not path.endswith(".seed")} - dict(leaves(config)).keys()


def test_scripts_are_short():
    for file in (ROOT / "experiments").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 60, file


class TestTools:
    def test_options_of_a_dataclass_become_flags(self):
        parser = command_line.Parser()
        shared.add_fields(parser, Protocol)
        flags = parser.format_help()
        for f in fields(Protocol):
            assert f"--{f.name}" in flags
        assert all(argument_help(Protocol).get(f.name) for f in fields(Protocol))
        values = vars(parser.parse_args(["--steps", "7", "--probes", "none", "--t_min", "0.01"]))
        assert Protocol(**values) == replace(Protocol(), steps=7, t_min=0.01)

    def test_dotted_options_reach_parts(self):
        options = {}
        for text in ("grid=karras", "grid.rho=3", "eta=0.5"):
            shared.put(options, *shared.option(text))
        assert samplers.create("ddim", **options) == samplers.DDIM(eta=0.5, grid=samplers.Karras(rho=3))
        with pytest.raises(UserError, match="expected grid=NAME first"):
            shared.put({}, "grid.rho", 3)


def test_presets_change_values_that_exist():
    for system in map(systems.create, systems.available()):
        for name in system.presets:
            assert isinstance(configuration.default_config(system, name), ConfigDict)
        with pytest.raises(UserError, match="expected one of digits"):
            configuration.default_config(system, "no_such")


def test_setup_is_frozen():
    assert dataclasses.fields(type(set_up(*TINY))) and set_up(*TINY).__dataclass_params__.frozen
