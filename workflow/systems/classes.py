r"""Class-conditional scores: guidance, and classification by likelihood.

    s(x, t) = s_0 + scale (s_c - s_0)                     classifier-free guidance    (Ho and Salimans 2022, arXiv:2207.12598)
    s(x, t) = s_0 + scale grad log p(y | x_t)             classifier guidance   (Dhariwal and Nichol 2021, arXiv:2105.05233)
    p(k | x) = p(x | k) p(k) / sum_j p(x | j) p(j)        classification by the flow's exact likelihood

One network of a VP SDE is trained with the classes, each hidden one time in ten, so it is the score with a class and without.
The bits/dim of the run are those of each image given its own class. Afterwards a classifier of noisy images is trained, for
the second line; both kinds of guidance are swept over their scales and judged by a third party (`workflow.guidance_sweep`);
every test image is scored under every class, which costs so many bits of it and says which class it is of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

import sde_lib
from data import Dataset
from data.transforms import Transform
from evaluation import Calibration, calibration, save_grid
from guidance import classifier_free, classifier_guidance
from models import NoiseClassifier
from numerics import Catalogue, UserError, argument_help, batch_time, require_count, require_range
from samplers import SAMPLERS
from sde_lib import SDE, Score
from training import LogNormal, TrainingOptions, train_noise_classifier
from workflow import presets, progress
from workflow.class_likelihood import bits_by_class, bits_of_classes
from workflow.defaults import base_config
from workflow.guidance_sweep import Judge, SweepPoint, floors, judge_of, save_trade_off, sweep
from workflow.report import table
from workflow.sections import fields_section, section
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

KINDS = ("classifier-free", "classifier")


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured beside samples without a class and bits/dim.

    Args:
        scales: of both kinds of guidance, rising.
        samples: at each scale; None for about as many as there are test data, up to 2,000.
        interval: log-SNR (low, high) in which classifier-free guidance guides; None for everywhere.
        rescale: how much of the denoised mean's excess standard deviation classifier-free guidance takes back, in [0, 1].
        classifier_steps: updates of the classifier of noisy data.
        classifier_width: of its first blocks.
        images: test data that are classified by likelihood; 0 for none.
        flow_steps: of the flow, for it.
    """

    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    samples: int | None = None
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    classifier_steps: int = 400
    classifier_width: int = 32
    images: int = 100
    flow_steps: int = 24

    def __post_init__(self) -> None:
        if (
            not self.scales
            or not all(isinstance(s, int | float) for s in self.scales)
            or list(self.scales) != sorted(set(self.scales))
        ):
            raise UserError(f"got scales={self.scales!r}; expected different numbers, rising, such as (0.0, 1.0, 3.0)")
        if self.samples is not None:
            require_count(self.samples, "samples", 10)
        require_range(self.rescale, "rescale", 0, 1)
        for name, least in (("classifier_steps", 1), ("classifier_width", 8), ("images", 0), ("flow_steps", 2)):
            require_count(getattr(self, name), name, least)

    def count(self, setup: Setup) -> int:
        """Samples at each scale: a whole number of times the classes."""
        classes = int(setup.score_model.num_classes or 1)
        wanted = min(len(setup.dataset.split("test")), 2000) if self.samples is None else self.samples
        return -(-wanted // classes) * classes


_STUDY: Catalogue[Study] = Catalogue("study", {"study": Study})


class Classes(System):
    """A class-conditional score, and what classes are good for."""

    name = "classes"
    about = (
        "A class-conditional score (Ho and Salimans 2022, arXiv:2207.12598; Dhariwal and Nichol 2021, arXiv:2105.05233): "
        "classifier-free and classifier guidance, what they gain and cost, bits by class, classification by likelihood."
    )
    help = {f"classes.{name}": text for name, text in argument_help(Study).items()}

    def get_config(self) -> ConfigDict:
        """The digits' settings, with classes, on VP."""
        config = base_config("classes")
        config.sde = section(sde_lib.SDES, "vp")
        config.model.class_conditional = True
        # fewer than an unconditional run, so that the rest has time
        config.training.steps = 1200
        # guidance is drawn without noise of its own, so that a scale's effect is seen on one noise
        config.sampling.sampler = section(SAMPLERS, "ddim", steps=40)
        # bits/dim of each image given its class
        config.likelihood.label = "own"
        config.classes = fields_section(Study)
        return config

    @property
    def presets(self) -> Mapping[str, presets.Changes]:
        """Those of a score of images."""
        return presets.of(self.name)

    def model(self, config: Config, sde: SDE, dataset: Dataset, transform: Transform, data_std: float) -> nn.Module:
        """A score with classes, of which the data must have two at least."""
        if dataset.num_classes < 2:
            raise UserError(
                f"got {dataset.name} of {dataset.num_classes} classes; expected labelled data of at least 2"
            )
        return super().model(config, sde, dataset, transform, data_std)

    def study(self, config: Config) -> Study:
        """What is measured."""
        made: Study = _STUDY.create("study", **config["classes"])
        return made

    def check(self, config: Config) -> None:
        """A study, and a model that can be guided."""
        self.study(config)
        if not config["model"]["class_conditional"]:
            raise UserError("got config.model.class_conditional=False for the system classes; expected True: use vp")
        if not config["training"]["label_dropout"] > 0:
            raise UserError(
                "got config.training.label_dropout=0 for the system classes; expected a number > 0, such as 0.1: guidance "
                "needs the score without a class too"
            )

    def rehearsal(self, setup: Setup) -> Setup:
        """Two scales, few samples and images, and a classifier that has learned nothing."""
        study = self.study(setup.config)
        few: dict[str, Any] = {
            "scales": tuple(study.scales[-2:]),
            "samples": 20,
            "classifier_steps": min(4, study.classifier_steps),
            "images": min(4, study.images),
            "flow_steps": min(4, study.flow_steps),
        }
        return replace(setup, config={**setup.config, "classes": {**setup.config["classes"], **few}})

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of the network on one image; a trace costs two more, an update of the small classifier about one."""
        study, calls = self.study(setup.config), next(iter(setup.samplers.values())).evaluations or 100
        drawn = 2 * study.count(setup) * calls * 2 * len(study.scales)
        scored = study.images * int(setup.score_model.num_classes or 1) * study.flow_steps * 3
        fixed = 20_000  # the judge, the measures and the pilot run, whatever is drawn
        return float(fixed + drawn + scored + study.classifier_steps * setup.options.batch_size)

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """Trains the classifier of noisy data, sweeps both kinds of guidance, and classifies by likelihood."""
        begun, setup = time.perf_counter(), run.setup
        study, classes = self.study(setup.config), int(run.model.num_classes or 1)
        names = [str(name) for name in setup.dataset.classes] or [str(k) for k in range(classes)]
        judge = judge_of(setup.dataset)
        classifier = _trained(run, study, folder.path / "classifier.safetensors")
        guided: dict[str, Callable[[Tensor, float], Score]] = {
            KINDS[0]: lambda labels, scale: classifier_free(
                run.model, labels, scale, interval=study.interval, rescale=study.rescale
            ),
            KINDS[1]: lambda labels, scale: classifier_guidance(
                run.sde, run.model.condition(None), classifier, labels, scale
            ),
        }
        sweeps: dict[str, list[SweepPoint]] = {}
        for kind, make in guided.items():
            made = sweep(run, judge, make, study.scales, classes=classes, n=study.count(setup), name=kind)
            sweeps[kind] = made
        floor = floors(run, judge)
        pictures = _pictures(run, folder.path / "samples", sweeps, classes)
        save_trade_off(folder.path / "samples" / "trade_off.png", sweeps, floor)
        scored = folder.results()["bits_per_dim"]
        labels = setup.dataset.split(scored["split"]).labels
        assert labels is not None
        costs = bits_of_classes(folder.path / scored["parts"], labels, classes)
        found = _classified(run, study, classifier, judge)
        results: dict[str, Any] = {
            "judge": {"name": judge.name, "accuracy": judge.accuracy.to_dict()},
            "held_out": {key: e.to_dict() for key, e in floor.items()},
            "guidance": {kind: [p.to_dict() for p in points] for kind, points in sweeps.items()},
            "bits_per_class": {
                name: {"samples": n, "mean": mean, "stderr": error, "label": scored["protocol"]["label"]}
                for name, (n, mean, error) in zip(names, costs, strict=True)
            },
            "classification": {name: c.to_dict() for name, c in found.items()},
            "seconds": time.perf_counter() - begun,
        }
        folder.update_results({"classes": results})
        lines = _lines(sweeps, floor, judge, names, costs, found, study, pictures)
        folder.add_section("Classes", lines)
        print("\n" + "\n".join(line for line in lines if not line.startswith("![")))


def _trained(run: TrainedRun, study: Study, file: Path) -> NoiseClassifier:
    """The classifier of noisy data, trained on what the model was trained on; also written to `file`."""
    from safetensors.torch import save_file

    setup, classes = run.setup, int(run.model.num_classes or 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.options.seed)
        classifier = NoiseClassifier(
            setup.dataset.event_shape,
            classes,
            run.sde,
            data_std=run.model.data_std or 1.0,
            width=study.classifier_width,
        ).to(run.device)
    options = TrainingOptions(
        steps=study.classifier_steps,
        batch_size=setup.options.batch_size,
        learning_rate=2e-3,
        warmup=min(50, study.classifier_steps),
        schedule="cosine",
        betas=(0.9, 0.99),
        weight_decay=0.05,
        ema=(0.98,),
        dequantize=setup.options.dequantize,
        flip=setup.options.flip,
        log_every=10,
        seed=setup.options.seed,
    )
    with progress.bar(total=study.classifier_steps, name="classifier of noisy data", unit="step") as bar:

        def show(step: int, loss: Tensor) -> None:
            bar.update(step - bar.n)
            bar.set_postfix_str(f"loss {float(loss):.3f}")

        train_noise_classifier(
            classifier,
            run.sde,
            setup.training_data,
            setup.transform,
            options,
            times=getattr(setup.objective, "times", LogNormal()),
            num_classes=classes,
            on_step=show,
        )
    save_file({name: value.contiguous() for name, value in classifier.state_dict().items()}, file)
    return classifier


def _classified(run: TrainedRun, study: Study, classifier: NoiseClassifier, judge: Judge) -> dict[str, Calibration]:
    """Three ways of telling the class of test data, on the same ones: likelihood, the noisy classifier at t_min, the judge."""
    if study.images == 0:
        return {}
    by_class = bits_by_class(run, n=study.images, steps=study.flow_steps)
    x = run.dataset.split("test").x[: len(by_class.labels)]
    with torch.no_grad():
        clean = run.transform.centres(x.to(run.device)).to(torch.float32)
        logits = classifier(clean, batch_time(run.sde.t_min, clean)).cpu()
    found = {
        "likelihood": calibration(by_class.log_posterior, by_class.labels),
        "classifier of noisy data, at t_min": calibration(logits, by_class.labels),
    }
    if judge.log_probs is not None:
        found[f"independent classifier, {judge.name}"] = calibration(judge.log_probs(x), by_class.labels)
    return found


def _pictures(
    run: TrainedRun, folder: Path, sweeps: Mapping[str, list[SweepPoint]], classes: int
) -> list[tuple[str, str]]:
    """Contact sheets of images, with captions: for each kind, a row a scale and two columns a class, from the same noise."""
    shape = run.dataset.event_shape
    if run.dataset.levels is None or len(shape) != 3:
        return []
    columns, made = min(2 * classes, 40), []
    for kind, points in sweeps.items():
        rows = torch.cat([p.x[:columns] for p in points])[:, : 3 if shape[0] >= 3 else 1]
        width = min(columns, len(points[0].x))
        name = f"sweep_{kind.replace('-', '_')}.png"
        save_grid(folder / name, run.transform.to_unit(rows), width, scale=max(1, round(32 / shape[-1])))
        scales = ", ".join(f"{p.scale:g}" for p in points)
        made.append(
            (f"{kind}: scales {scales} from the top, the classes in turn, one noise a column", f"samples/{name}")
        )
    return made


def _lines(
    sweeps: Mapping[str, list[SweepPoint]],
    floor: Mapping[str, Any],
    judge: Judge,
    names: list[str],
    costs: list[tuple[int, float, float]],
    found: Mapping[str, Calibration],
    study: Study,
    pictures: list[tuple[str, str]],
) -> list[str]:
    """The section of report.md."""
    keys = ("FD", "precision", "recall", "coverage")
    rows = [
        [kind, f"{p.scale:g}", str(p.accuracy), *(str(p.measures[key]) for key in keys), str(p.nfe)]
        for kind, points in sweeps.items()
        for p in points
    ]
    rows.append(["held-out data", "", str(floor["class_accuracy"]), *(str(floor[key]) for key in keys), ""])
    n = len(next(iter(sweeps.values()))[0].x)
    lines = [
        f"{n:,} samples at each scale, from the same noise; class accuracy and features by {judge.name}, which guidance never "
        "sees. A call of a guided score is up to two evaluations of the network.",
        "",
        *table(("guidance", "scale", "class accuracy", *keys, "calls"), rows),
        "![trade-off](samples/trade_off.png)",
        "",
    ]
    for caption, file in pictures:
        lines += [f"{caption}:", "", f"![{caption}]({file})", ""]
    lines += ["Bits/dim by class:", ""]
    lines += table(
        ("class", "test data", "bits/dim"),
        [[name, str(n), f"{mean:.3f} ± {error:.3f}"] for name, (n, mean, error) in zip(names, costs, strict=True)],
    )
    if found:
        lines += [f"The class of {study.images:,} test data, told by:", ""]
        head = ("", "accuracy", "log-loss (nats)", "Brier", "ECE", "ECE if calibrated")
        values = [
            [name, *(str(getattr(c, key)) for key in ("accuracy", "log_loss", "brier", "ece", "floor"))]
            for name, c in found.items()
        ]
        lines += table(head, values)
    return lines


get_config = Classes().get_config
