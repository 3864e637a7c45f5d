r"""JEM: a classifier that is an energy (Grathwohl et al. 2020, arXiv:1912.03263).

    p(y | x) = softmax f(x)_y,        p(x) = exp(-E(x) / T) / Z,        E(x) = -log sum_y exp(f(x)_y)

Trained by -log p(y | x) + [E(x) - E(x')] + c [E(x)^2 + E(x')^2], with x' from chains x <- x - a grad E(x) + s z that go on in a
replay buffer and begin anew with a stated probability (`training.joint_energy`). Step and noise are chosen apart, so this is no
Langevin chain of temperature 1: its temperature is s^2 / (2 a). Grey values are kept in the data's box by reflection.

The run draws from the buffer, and by long chains from noise, with and without a class. It trains the same network as a plain
classifier, and puts side by side accuracy and calibration, accuracy under an attack, and how well each tells other data from
the data's own. `--preset=energy` (`config.model.class_conditional=False`) trains the energy alone, without labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from data import Dataset
from data.transforms import Transform
from evaluation import Calibration, Estimate, Panel, save_grid, save_plot
from models import ClassifierEnergy
from numerics import Catalogue, SampleStreams, UserError, argument_help, require_count
from sde_lib import SDE, VESDE
from training import Callback, CheckpointFolder, CrossEntropy, EnergyWatch, JointEnergy, TrainState
from training.checkpoint import CHECKPOINTS
from workflow import energy_classifier
from workflow.beside import seeded, train_beside
from workflow.curves import curve, read_metrics
from workflow.defaults import base_config
from workflow.draw import Drawn, Samples, draw_by
from workflow.energy_classifier import Study
from workflow.report import table
from workflow.sections import fields_section, section
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

_LOOK = 10  # steps between two looks at whether the energies have parted
_PER_CLASS = 12


@dataclass(frozen=True, kw_only=True)
class Network:
    """The classifier's sizes.

    Args:
        width: channels of the first block, twice as many after a halving; of an MLP's layers.
        depth: residual blocks at each resolution; layers of an MLP.
    """

    width: int = 24
    depth: int = 1

    def __post_init__(self) -> None:
        for name in ("width", "depth"):
            require_count(getattr(self, name), name)


NETWORKS: Catalogue[Network] = Catalogue("network", {"classifier_energy": Network})
OBJECTIVES: Catalogue[Any] = Catalogue("objective", {"joint_energy": JointEnergy}, derived=("box",))
_STUDY: Catalogue[Study] = Catalogue("study", {"study": Study})


class JEM(System):
    """A classifier that is an energy, beside the plain one."""

    name = "jem"
    about = (
        "A classifier as an energy (Grathwohl et al. 2020, arXiv:1912.03263; Du and Mordatch 2019, arXiv:1903.08689): samples, "
        "accuracy, calibration, other data and attacks, beside the plain classifier; or an energy alone, without labels."
    )
    help = {f"study.{name}": text for name, text in argument_help(Study).items()}
    no_score = (
        "its samples come from its own chains (experiments/jem.py, sample.py --sampler own); the system energy has an energy "
        "that is a score"
    )
    no_likelihood = "exp(-E) is not normalised, and short chains do not fit it to the likelihood"

    def get_config(self) -> ConfigDict:
        """The digits' settings."""
        config = base_config("jem")
        config.model = section(NETWORKS, "classifier_energy")
        config.model.class_conditional = True
        config.training.objective = section(OBJECTIVES, "joint_energy")
        # an energy is told the class always
        config.training.label_dropout = 0.0
        config.training.update({"steps": 1200, "batch_size": 64, "learning_rate": 2e-3, "eval_every": 50})
        config.training.ema = (0.99,)
        config.sampling = ConfigDict({"n": config.sampling.get_ref("n")})
        config.baselines = False
        config.study = fields_section(Study)
        return config

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """The digits, with labels and without."""
        return {"digits": {}, "energy": {"model.class_conditional": False}}

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the classifier and its objective, and without an SDE."""
        everything = {**super().catalogues, "model": NETWORKS, "training.objective": OBJECTIVES}
        gone = ("sde", "model.parametrization", "model.conditioning", "sampling.sampler", "sampling.second")
        return {path: catalogue for path, catalogue in everything.items() if path not in gone}

    def sde(self, config: Config) -> SDE:
        """Some SDE, which training asks of every model; nothing depends on it."""
        return VESDE()

    def model(
        self, config: Config, sde: SDE, dataset: Dataset, transform: Transform, data_std: float
    ) -> ClassifierEnergy:
        """The classifier; an energy with one output where it has no classes.

        Raises:
            UserError: classes of data that have none.
        """
        sizes: Network = NETWORKS.make({k: v for k, v in config["model"].items() if k != "class_conditional"})
        classes = dataset.num_classes if config["model"]["class_conditional"] else None
        if classes is not None and (classes < 2 or dataset.split("train").labels is None):
            raise UserError(
                f"got {dataset.name}, which has no labels of two classes or more, for a classifier; expected labelled data: "
                "--preset=energy trains an energy without labels"
            )
        return seeded(
            config["seed"],
            lambda: ClassifierEnergy(dataset.event_shape, classes, sde, width=sizes.width, depth=sizes.depth),
        )

    def objective(self, config: Config) -> JointEnergy:
        """The joint energy; `settled` puts grey values into their box."""
        made: JointEnergy = OBJECTIVES.make(config["training"]["objective"])
        return made

    def study(self, config: Config) -> Study:
        """What is measured."""
        made: Study = _STUDY.create("study", **config["study"])
        return made

    def check(self, config: Config) -> None:
        """The study's values, a reference that says bits/dim, and labels that stay."""
        energy_classifier.require_scored(self.study(config).reference)
        if config["training"]["label_dropout"]:
            raise UserError(
                f"got config.training.label_dropout={config['training']['label_dropout']}; expected 0: a classifier learns "
                "from labels, and its energy needs none"
            )

    def settled(self, setup: Setup) -> Setup:
        """With the chains of grey values in the data's box."""
        assert isinstance(setup.objective, JointEnergy)
        if setup.options.batch_size > setup.objective.buffer:
            raise UserError(
                f"got config.training.objective.buffer={setup.objective.buffer} for batches of {setup.options.batch_size}; "
                "expected as many chains or more"
            )
        return replace(setup, objective=replace(setup.objective, box=energy_classifier.box_of(setup)))

    def callbacks(self, setup: Setup, folder: RunFolder) -> Sequence[Callback]:
        """A look at the energies, and the held-out accuracy."""
        watch = EnergyWatch(_objective(setup), _LOOK)
        return (watch, HeldOut(setup)) if setup.validation and _model(setup).num_classes else (watch,)

    def draw(self, run: TrainedRun) -> Mapping[str, Drawn]:
        """Chains from noise, and states of the buffer, in the order of the classes that the model gives them."""
        setup, objective = run.setup, _objective(run.setup)

        def buffer() -> Samples:
            return Samples(
                x=_buffer(run)[: setup.n],
                nfe=objective.length,
                sampler=f"{objective.length} steps an update, {_about(objective)}, restart={objective.restart:g}",
            )

        def by_class(made: Samples) -> Samples:
            order = (
                energy_classifier.logits_of(_model(setup), made.x.to(setup.device)).argmax(dim=1).argsort(stable=True)
            )
            return replace(made, x=made.x[order.cpu()])

        return draw_by(
            run, {"chains": lambda: by_class(self.samples(run, setup.n)), "buffer": lambda: by_class(buffer())}
        )

    def samples(self, run: TrainedRun, n: int, *, first: int = 0, seed: int | None = None) -> Samples:
        """The ends of `n` chains from noise, none begun anew."""
        setup, objective, length = run.setup, _objective(run.setup), self.study(run.setup.config).chain_length
        shape = (n, *setup.dataset.event_shape)
        streams = SampleStreams(setup.options.seed if seed is None else seed, torch.arange(first, first + n))
        x = energy_classifier.fresh_chains(
            _model(setup), objective.langevin, shape, length, generator=streams, device=setup.device
        )
        return Samples(x=x.cpu(), nfe=length, sampler=f"{length} steps from noise, {_about(objective)}, no restarts")

    def rehearsal(self, setup: Setup) -> Setup:
        """With a study of seconds."""
        return replace(setup, config={**setup.config, "study": energy_classifier.shortened(self.study(setup.config))})

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of the network on an image, roughly; of the reference's larger network as ten."""
        study = self.study(setup.config)
        attack = 2 * study.images * study.attack_steps * (1 + len(study.epsilons))
        flow = 5 * study.images * study.flow_steps * 30
        plain = 3 * setup.options.steps * setup.options.batch_size
        return float(attack + flow + plain + 3 * 10 * _PER_CLASS * study.chain_length + 20_000)

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The plain classifier, and everything side by side: into results.json, report.md, pictures and the terminal."""
        setup, study, own = run.setup, self.study(run.setup.config), _model(run.setup)
        lines = _stability(setup, folder)
        panels = [_energies(folder)]
        models: dict[str, ClassifierEnergy] = {}
        entry: dict[str, Any] = {"temperature": _objective(setup).langevin.temperature}
        if own.num_classes:
            fresh = setup.system.model(setup.config, own.sde, setup.dataset, setup.transform, 1.0)
            assert isinstance(fresh, ClassifierEnergy)
            plain = train_beside(setup, fresh, CrossEntropy(), steps=setup.options.steps)
            models = {"jem": own, "plain": plain}
            calibrated = energy_classifier.calibrations(setup, models)
            entry["classification"] = {name: c.to_dict() for name, c in calibrated.items()}
            under = energy_classifier.attacked(setup, study, models)
            entry["attack"] = {
                name: [{"epsilon": e, **a.to_dict()} for e, a in zip((0.0, *study.epsilons), of, strict=True)]
                for name, of in under.items()
            }
            lines += _classification(calibrated) + _attack(study, under)
            panels = [_reliability(calibrated), _attack_panel(study, under), *panels]
            lines += self._classes(run, folder)
        told, said = energy_classifier.outside(setup, study, own, models)
        entry["outside"] = {by: {kind: e.to_dict() for kind, e in of.items()} for by, of in told.items()}
        lines += _outside(study, told) + ([said, ""] if said else [])
        folder.update_results({"jem": entry})
        save_plot(folder.path / "jem.png", panels)
        folder.add_section("The classifier as an energy", [*lines, "![side by side](jem.png)"])
        print("\n" + "\n".join(line for line in lines if not line.startswith("![")))

    def _classes(self, run: TrainedRun, folder: RunFolder) -> list[str]:
        """Chains of exp(-E(x, y)) for every class, a row each."""
        setup, model, objective = run.setup, _model(run.setup), _objective(run.setup)
        classes, shape, study = int(model.num_classes or 0), setup.dataset.event_shape, self.study(run.setup.config)
        if len(shape) != 3:
            return []
        labels = torch.arange(classes, device=setup.device).repeat_interleave(_PER_CLASS)
        x = energy_classifier.fresh_chains(
            model,
            objective.langevin,
            (len(labels), *shape),
            study.chain_length,
            generator=SampleStreams(setup.options.seed + 1, torch.arange(len(labels))),
            device=setup.device,
            labels=labels,
            name="chains of each class",
        )
        images = setup.transform.to_unit(x[:, : 3 if shape[0] >= 3 else 1]).cpu()
        save_grid(folder.path / "samples" / "classes.png", images, _PER_CLASS, scale=max(1, round(32 / shape[-1])))
        said = f"Chains of exp(-E(x, y)), {study.chain_length} steps from noise, a row a class:"
        return [said, "", "![by class](samples/classes.png)", ""]


class HeldOut(Callback):
    """Accuracy and log-loss of the averaged weights on held-out data, in nats.

    Args:
        setup: of the run.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def on_eval(self, state: TrainState) -> Mapping[str, float] | None:
        setup = self.setup
        part = setup.held_out.take(slice(0, setup.validation))
        assert part.labels is not None
        with state.averaged() as model:
            assert isinstance(model, ClassifierEnergy)
            logits = energy_classifier.logits_of(model, energy_classifier.clean(setup, part.x))
        labels = part.labels.to(logits.device)
        return {
            "accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
            "log_loss": float(nn.functional.cross_entropy(logits, labels)),
        }


def _model(setup: Setup) -> ClassifierEnergy:
    model = setup.model
    assert isinstance(model, ClassifierEnergy)
    return model


def _objective(setup: Setup) -> JointEnergy:
    objective = setup.objective
    assert isinstance(objective, JointEnergy)
    return objective


def _about(objective: JointEnergy) -> str:
    return f"step={objective.step:g}, noise={objective.noise:g}"


def _buffer(run: TrainedRun) -> Tensor:
    """The chains' states, from the run's newest checkpoint."""
    found = CheckpointFolder(run.folder.path / CHECKPOINTS).read()
    if found is None or "buffer" not in found.content["objective"]:
        raise UserError(f"got {run.folder}, whose checkpoint has no replay buffer; expected a run of the system jem")
    kept: Tensor = found.content["objective"]["buffer"]
    return kept


def _stability(setup: Setup, folder: RunFolder) -> list[str]:
    """How the training was kept stable, and how far the energies were apart."""
    o, rows = _objective(setup), read_metrics(folder.path)
    steps, data = curve(rows, "eval/energy_data")
    _, chains = curve(rows, "eval/energy_chains")
    apart = max((abs(a - b) for a, b in zip(data, chains, strict=False)), default=float("nan"))
    anew = f"one in {1 / o.restart:.3g} begins anew from noise" if o.restart else "none begins anew"
    return [
        f"Chains of {o.length} steps at each update, x - {o.step:g} grad E + {o.noise:g} z, from a buffer of {o.buffer:,}, of "
        f"which {anew}; penalty {o.penalty:g} on squared energies. Step and noise are chosen apart: the chains' temperature is "
        f"{o.langevin.temperature:.3g}, not 1. At {len(steps)} looks the mean energies of data and chains were at most "
        f"{apart:.3g} apart (beyond {o.limit:g} the run stops).",
        "",
    ]


def _classification(found: Mapping[str, Calibration]) -> list[str]:
    head = ("test data", "accuracy", "log-loss (nats)", "Brier", "ECE", "ECE if calibrated")
    rows = [
        [name, *(str(getattr(c, key)) for key in ("accuracy", "log_loss", "brier", "ece", "floor"))]
        for name, c in found.items()
    ]
    return table(head, rows)


def _attack(study: Study, found: Mapping[str, list[Estimate]]) -> list[str]:
    head = ("accuracy, attack within", "0", *(f"{e:g}" for e in study.epsilons))
    return table(head, [[name, *map(str, of)] for name, of in found.items()])


def _outside(study: Study, found: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    if not found:
        return []
    kinds = next(iter(found.values())).keys()
    rows = [[by, *(str(of[kind]) for kind in kinds)] for by, of in found.items()]
    said = "AUROC of telling other images from test images by a number that is larger for them:"
    return [said, "", *table(("told by", *kinds), rows)]


def _reliability(found: Mapping[str, Calibration]) -> Panel:
    lines: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        f"{name}, ECE {c.ece.value:.3f}": (c.confidence, c.frequency) for name, c in found.items()
    }
    lowest = min(min(*c.confidence, *c.frequency) for c in found.values())
    lines["calibrated"] = ((lowest, 1.0), (lowest, 1.0))
    return Panel(title="reliability, ten bins of equal numbers", x="confidence", y="share that is right", lines=lines)


def _attack_panel(study: Study, found: Mapping[str, list[Estimate]]) -> Panel:
    return Panel(
        title=f"attack of {study.attack_steps} steps",
        x="epsilon, largest change of a pixel in model units",
        y="accuracy",
        lines={name: ((0.0, *study.epsilons), [a.value for a in of]) for name, of in found.items()},
    )


def _energies(folder: RunFolder) -> Panel:
    rows = read_metrics(folder.path)
    lines = {name: curve(rows, f"eval/energy_{name}") for name in ("data", "chains")}
    return Panel(title="mean energies of a batch", x="step", y="E", lines=lines)


get_config = JEM().get_config
