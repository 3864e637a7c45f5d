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

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from data import Dataset
from data.transforms import Transform
from evaluation import Calibration, Estimate, calibration, save_grid
from guidance import classifier_guidance
from models import NoiseClassifier
from numerics import UserError, batch_time, require_count
from sde_lib import SDE
from training import LogNormal, TrainingOptions, train_noise_classifier
from workflow import presets, progress
from workflow.class_likelihood import bits_by_class, bits_of_classes
from workflow.guidance_scales import GuidanceStudy, Guided
from workflow.guidance_sweep import Judge, SweepPoint, floors, judge_of, save_trade_off, sweep
from workflow.guided_system import GuidedSystem, shown
from workflow.report import table
from workflow.system import Config

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

KINDS = ("classifier-free", "classifier")


@dataclass(frozen=True, kw_only=True)
class Study(GuidanceStudy):
    """What is measured beside samples without a class and bits/dim.

    Args:
        samples: at each scale; None for about as many as there are test data, up to 2,000.
        classifier_steps: updates of the classifier of noisy data.
        classifier_width: of its first blocks.
    """

    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    samples: int | None = None
    classifier_steps: int = 400
    classifier_width: int = 32
    images: int = 100
    flow_steps: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples is not None:
            require_count(self.samples, "samples", 10)
        require_count(self.classifier_steps, "classifier_steps")
        require_count(self.classifier_width, "classifier_width", 8)

    def count(self, setup: Setup) -> int:
        """Samples at each scale: a whole number of times the classes."""
        classes = int(setup.score_model.num_classes or 1)
        wanted = min(len(setup.dataset.split("test")), 2000) if self.samples is None else self.samples
        return -(-wanted // classes) * classes


class Classes(GuidedSystem[Study]):
    """A class-conditional score, and what classes are good for."""

    name = "classes"
    about = (
        "A class-conditional score (Ho and Salimans 2022, arXiv:2207.12598; Dhariwal and Nichol 2021, arXiv:2105.05233): "
        "classifier-free and classifier guidance, what they gain and cost, bits by class, classification by likelihood."
    )
    kind, heading, hidden, unlabelled = Study, "Classes", 0.1, "without a class"

    def get_config(self) -> ConfigDict:
        """The digits' settings, with classes, on VP."""
        config = self.guided_config()
        # fewer than an unconditional run, so that the rest has time
        config.training.steps = 1200
        config.sampling.sampler.steps = 40
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

    def check(self, config: Config) -> None:
        """A study, and a model that can be guided."""
        if not config["model"]["class_conditional"]:
            raise UserError("got config.model.class_conditional=False for the system classes; expected True: use vp")
        super().check(config)

    def few(self, study: Study, setup: Setup) -> Mapping[str, Any]:
        """Two scales, few samples and images, and a classifier that has learned nothing."""
        return {
            "scales": tuple(study.scales[-2:]),
            "samples": 20,
            "classifier_steps": min(4, study.classifier_steps),
            "images": min(4, study.images),
            "flow_steps": min(4, study.flow_steps),
        }

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of the network on one image; a trace costs two more, an update of the small classifier about one."""
        study, calls = self.study(setup.config), next(iter(setup.samplers.values())).evaluations or 100
        drawn = 2 * study.count(setup) * calls * 2 * len(study.scales)
        scored = study.images * int(setup.score_model.num_classes or 1) * study.flow_steps * 3
        fixed = 20_000  # the judge, the measures and the pilot run, whatever is drawn
        return float(fixed + drawn + scored + study.classifier_steps * setup.options.batch_size)

    def measure(self, run: TrainedRun, folder: RunFolder, study: Study) -> tuple[dict[str, Any], list[str]]:
        """Trains the classifier of noisy data, sweeps both kinds of guidance, and classifies by likelihood."""
        setup, classes = run.setup, int(run.model.num_classes or 1)
        names = [str(name) for name in setup.dataset.classes] or [str(k) for k in range(classes)]
        judge = judge_of(setup.dataset)
        classifier = _trained(run, study, folder.path / "classifier.safetensors")
        guided: dict[str, Guided] = {
            KINDS[0]: study.classifier_free(run),
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
        }
        images = min(study.images, len(run.dataset.split("test")))  # it may have fewer
        return results, _lines(sweeps, floor, judge, names, costs, found, images, pictures)


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
    images: int,
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
    lines += [*shown(pictures), "Bits/dim by class:", ""]
    lines += table(
        ("class", "test data", "bits/dim"),
        # a survey may have scored a class's data nowhere, or once
        [
            [name, str(n), str(Estimate(value=mean, stderr=error)) if n else ""]
            for name, (n, mean, error) in zip(names, costs, strict=True)
        ],
    )
    if found:
        lines += [f"The class of {images:,} test data, told by:", ""]
        head = ("", "accuracy", "log-loss (nats)", "Brier", "ECE", "ECE if calibrated")
        values = [
            [name, *(str(getattr(c, key)) for key in ("accuracy", "log_loss", "brier", "ece", "floor"))]
            for name, c in found.items()
        ]
        lines += table(head, values)
    return lines


get_config = Classes().get_config
