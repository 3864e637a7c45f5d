r"""Text: a score of pictures that reads captions, asked for captions that it was never trained on.

    s(x, t) = s(x, t | "") + scale (s(x, t | caption) - s(x, t | ""))

A U-Net of a VP SDE is told captions as GLIDE is (Nichol et al. 2022, arXiv:2112.10741): a small transformer reads the words,
every pixel attends to them at the coarser levels, and their mean joins the noise level. One caption in five is empty in
training, so that guidance without a classifier has both of its scores. The pictures are glyphs in twelve faces, such as "bold
italic serif 3", and one combination of words in ten is held out. A classifier of each attribute says whether samples show what
was asked for, of captions that were trained on and of those that were not. Likelihoods with and without captions say what one
is worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

import data
import models
from data import Dataset, Split
from data.glyphs import attributes, glyphs
from data.transforms import Transform
from evaluation import Estimate, save_captioned, save_grid, train_attribute_classifier
from numerics import UserError, require_count
from sde_lib import SDE
from workflow.caption_sweep import ALL, CaptionPoint, Judge, save_sweep, sweep
from workflow.caption_worth import Worth, caption_worth
from workflow.guidance_scales import GuidanceStudy
from workflow.guided_system import GuidedSystem, shown
from workflow.report import table
from workflow.sections import set_value
from workflow.system import Config

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

KINDS = {"captions trained on": "test", "captions never trained on": "combinations"}
"""Kinds of captions, and the split of real pictures of each."""
_REAL = 2
"""Real pictures of a caption that variety is measured against."""


@dataclass(frozen=True, kw_only=True)
class TextStudy(GuidanceStudy):
    """What is measured beside samples without a caption and bits/dim.

    Args:
        captions: of each kind, trained on and held out; None for as many as are held out.
        each: samples of each caption at each scale.
        shown: the scale of the contact sheets of samples by caption, one of `scales`.
        judge_steps: updates of the classifier of the attributes.
        images: pictures of each kind whose captions' worth is measured; 0 for none.
    """

    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0)
    captions: int | None = None
    each: int = 4
    shown: float = 2.0
    judge_steps: int = 600
    images: int = 32
    flow_steps: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shown not in self.scales:
            raise UserError(f"got shown={self.shown!r}; expected one of scales={self.scales!r}")
        if self.captions is not None:
            require_count(self.captions, "captions", 2)
        require_count(self.each, "each", 2)
        require_count(self.judge_steps, "judge_steps")

    def classes(self, split: Split, wanted: int) -> Tensor:
        """That many of the split's classes, evenly spaced; all where there are not so many."""
        assert split.labels is not None
        found: Tensor = torch.unique(split.labels)
        n = min(wanted, len(found))
        return found[torch.linspace(0, len(found) - 1, n).round().long()]

    def count(self, setup: Setup) -> int:
        """Captions of each kind."""
        held_out = setup.dataset.split("combinations").labels
        assert held_out is not None
        return min(self.captions or len(held_out), len(torch.unique(held_out)))


class Text(GuidedSystem[TextStudy]):
    """A score that reads captions, judged on combinations of words that it was never trained on."""

    name = "text"
    about = (
        "A score that reads captions (Nichol et al. 2022, arXiv:2112.10741): glyphs by caption, combinations of words never "
        "trained on, guidance, and what a caption is worth in bits."
    )
    kind, heading, hidden, unlabelled = TextStudy, "Captions", 0.2, "of the empty caption"

    def get_config(self) -> ConfigDict:
        """Glyphs on VP, with captions."""
        config = self.guided_config()
        set_value(config.data, "name", "glyphs", data.DATASETS)
        set_value(config.model, "name", "captioned_unet", models.NETWORKS)
        config.model.update(
            {
                "channels": 16,
                # few channels at the size where they are dear; 32 in place of 64 at the smallest size take a third of the
                # operations away, and of 0.52 right samples of captions never trained on leave 0.42
                "multipliers": (1, 2, 4),
            }
        )
        # many small updates: captions take longer to learn than glyphs
        config.training.update({"steps": 2400, "batch_size": 32, "eval_every": 1200})
        config.training.ema = (0.998,)
        # more of the high noise, at which captions say something
        config.training.objective.times.update({"mean": -0.7, "std": 1.5})
        # what is not training takes a third of the run
        config.sampling.sampler.steps = 16
        config.likelihood.update({"limit": 60, "steps": 40, "draws": 1, "probes": 1})
        # a mixture of Gaussians in 256 dimensions would take minutes
        config.baselines = False
        return config

    def check(self, config: Config) -> None:
        """Two pictures of each test caption at least, whose variety the samples' is compared with."""
        super().check(config)
        if config["data"].get("tests", _REAL) < _REAL:
            raise UserError(
                f"got config.data.tests={config['data']['tests']}; expected at least {_REAL} pictures of a caption, with "
                "whose variety that of samples is compared"
            )

    def model(self, config: Config, sde: SDE, dataset: Dataset, transform: Transform, data_std: float) -> nn.Module:
        """A score that reads captions, of which the data must hold some out."""
        if dataset.name != "glyphs":
            raise UserError(
                f"got the data {dataset.name} for the system text; expected glyphs, whose captions name attributes: use classes"
            )
        made = super().model(config, sde, dataset, transform, data_std)
        assert isinstance(made, models.ScoreModel)
        made.reading([dataset.classes[0]])  # refused here, if the network reads no captions
        # the same numbers up to rounding, and updates some 6 % cheaper on a CPU
        made.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return made

    def few(self, study: TextStudy, setup: Setup) -> Mapping[str, Any]:
        """Few captions, samples and pictures, and a judge that has learned little."""
        return {
            "captions": min(6, study.count(setup)),
            "each": 2,
            "judge_steps": min(10, study.judge_steps),
            "images": min(4, study.images),
            "flow_steps": min(4, study.flow_steps),
        }

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of the network on one picture; a trace costs two more, an update of the judge about ten."""
        study, calls = self.study(setup.config), next(iter(setup.samplers.values())).evaluations or 100
        evaluations = sum(1 if scale in (0, 1) else 2 for scale in study.scales)
        drawn = len(KINDS) * study.count(setup) * study.each * calls * evaluations
        scored = len(KINDS) * 2 * study.images * study.flow_steps * 3
        fixed = 2_000  # the judge's glyphs and the pictures, whatever is drawn
        return float(fixed + drawn + scored + study.judge_steps * 10)

    def measure(self, run: TrainedRun, folder: RunFolder, study: TextStudy) -> tuple[dict[str, Any], list[str]]:
        """Trains the judge, sweeps the guidance on both kinds of captions, and measures what captions are worth."""
        judge = judge_of(run, study.judge_steps)
        sweeps: dict[str, list[CaptionPoint]] = {}
        floor: dict[str, dict[str, Estimate]] = {}
        pictures = folder.path / "samples"
        sheets = []
        for kind, name in KINDS.items():
            split = run.dataset.split(name)
            assert split.labels is not None
            floor[kind] = judge.accuracy(split.x, split.labels)
            labels = study.classes(split, study.count(run.setup))
            real = _real(split, labels)
            sweeps[kind] = sweep(
                run, judge, study.classifier_free(run), labels, study.scales, each=study.each, real=real, name=kind
            )
            sheets += _sheets(run, study, pictures, kind, sweeps[kind], labels, real)
        save_sweep(pictures / "attributes.png", sweeps, floor)
        worth = {}
        if study.images:
            for kind, name in KINDS.items():
                worth[kind] = caption_worth(run, name, n=study.images, steps=study.flow_steps)
        trained = len(torch.unique(run.setup.training_data.labels))
        results = {
            "real": {kind: {name: e.to_dict() for name, e in found.items()} for kind, found in floor.items()},
            "guidance": {kind: [p.to_dict() for p in points] for kind, points in sweeps.items()},
            "worth": {kind: found.to_dict() for kind, found in worth.items()},
            "entropy_of_captions": math.log2(trained),
        }
        return results, _lines(sweeps, floor, worth, trained, sheets)


def judge_of(run: TrainedRun, steps: int) -> Judge:
    """A classifier of the glyphs' attributes, trained on glyphs of its own, which have nearly all combinations."""
    options = run.setup.config["data"]
    own = glyphs(per_combination=20, tests=1, held_out=1, validation=0, seed=options["seed"] + 1).split("train")
    assert own.labels is not None
    classifier = train_attribute_classifier(own.x, attributes(own.labels), steps=steps, seed=run.setup.options.seed)
    return Judge(classifier=classifier, attributes=attributes)


def _real(split: Split, labels: Tensor) -> Tensor:
    """The first pictures of each class, `(K, 2, *)`."""
    assert split.labels is not None
    found = [split.x[split.labels == k] for k in labels]
    return torch.stack([x[: min(_REAL, *(len(y) for y in found))] for x in found])


def _sheets(
    run: TrainedRun,
    study: TextStudy,
    folder: Path,
    kind: str,
    points: Sequence[CaptionPoint],
    labels: Tensor,
    real: Tensor,
) -> list[tuple[str, str]]:
    """Contact sheets: samples by caption beside real glyphs, and one noise a column at all scales."""
    which = KINDS[kind]
    at = next(p for p in points if p.scale == study.shown)
    unit = run.transform.to_unit(at.x).reshape(at.by_caption.shape)
    pictures = torch.cat([unit, real / 255], dim=1)
    save_captioned(folder / f"captions_{which}.png", pictures, [run.dataset.classes[int(k)] for k in labels], columns=5)
    columns = min(24, len(labels))
    rows = torch.cat([p.by_caption[:columns, 0] for p in points])
    save_grid(folder / f"scales_{which}.png", run.transform.to_unit(rows), columns, scale=2)
    scales = ", ".join(f"{p.scale:g}" for p in points)
    first = ", ".join(run.dataset.classes[int(k)] for k in labels[:columns])
    return [
        (f"{kind}: {study.each} samples at scale {study.shown:g}, then real glyphs", f"samples/captions_{which}.png"),
        (f"{kind}: scales {scales} from the top, one noise a column: {first}", f"samples/scales_{which}.png"),
    ]


def _lines(
    sweeps: Mapping[str, Sequence[CaptionPoint]],
    floor: Mapping[str, Mapping[str, Estimate]],
    worth: Mapping[str, Worth],
    trained: int,
    sheets: Sequence[tuple[str, str]],
) -> list[str]:
    """The section of report.md."""
    some = next(iter(sweeps.values()))[0]
    names = [name for name in some.accuracy if name != ALL]
    rows = []
    for kind, points in sweeps.items():
        for p in points:
            found = [str(p.accuracy[name]) for name in (*names, ALL)]
            rows.append([kind, f"{p.scale:g}", *found, str(p.variety), str(p.nfe)])
        rows.append([f"{kind}: real glyphs", "", *(str(floor[kind][name]) for name in (*names, ALL)), "1", ""])
    lines = [
        f"{some.each} samples of each of {len(some.by_caption)} captions of each kind, from the same noise at each scale. "
        "Shares of samples that show what the caption says, by a classifier trained on real glyphs only, whose answers to real "
        "glyphs stand beside. Variety is the variance among a caption's samples, in units of real glyphs'. A call of a guided "
        "score is up to two evaluations of the network.",
        "",
        *table(("captions", "scale", *names, ALL, "variety", "calls"), rows),
        "![attributes by scale](samples/attributes.png)",
        "",
    ]
    lines += shown(sheets)
    if worth:
        lines += [
            f"What a caption is worth, from the same noise and probes. {trained} captions that are equally frequent have "
            f"{math.log2(trained):.2f} bits, which is the most that the right densities could show:",
            "",
            *table(
                ("captions", "pictures", "bits/dim with", "without", "worth, bits a picture"),
                [[kind, str(w.images), str(w.given), str(w.without), str(w.worth)] for kind, w in worth.items()],
            ),
        ]
    return lines


get_config = Text().get_config
