r"""What can be asked of a classifier that is an energy, beside the plain classifier of the same network.

accuracy, calibration   on test data, at the centres of their bins
outside data            AUROC of telling other data from test data, by E(x), by |grad E(x)| (a mode's neighbourhood has mass
                        where the density changes little; Grathwohl et al. 2020), by the largest probability,
                        and by the bits/dim of a score model
attack                  accuracy under projected gradient descent, see `evaluation.attack`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation import Calibration, Estimate, ProjectedGradient, auroc, calibration
from evaluation.calibration import share
from likelihood import UniformDequantizer, fast
from models import ClassifierEnergy
from numerics import SampleStreams, TemperedLangevin, UserError, normal, point, require_count, require_range, uniform
from workflow import configuration, progress
from workflow.outside import bits_of_images, outside_of
from workflow.setup import Setup
from workflow.trained_run import TrainedRun, load_run

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is measured after the training.

    Args:
        chain_length: steps of each chain that is drawn from noise, without restarts.
        images: test data that are scored, and other data of each kind.
        epsilons: of the attack, in model units.
        attack_steps: of it.
        reference: a run or a pretrained folder whose bits/dim of the same images stand beside; empty for none.
        flow_steps: of its flow.

    Raises:
        UserError: a number out of its range.
    """

    chain_length: int = 500
    images: int = 297
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    attack_steps: int = 20
    reference: str = "pretrained/vp_digits"
    flow_steps: int = 24

    def __post_init__(self) -> None:
        for name, least in (("chain_length", 1), ("images", 2), ("attack_steps", 1), ("flow_steps", 2)):
            require_count(getattr(self, name), f"config.study.{name}", least)
        for epsilon in self.epsilons:
            require_range(epsilon, "one of config.study.epsilons", 0)


def shortened(study: Study) -> dict[str, Any]:
    """The values of a study of seconds."""
    return {
        **asdict(study),
        "chain_length": min(5, study.chain_length),
        "images": min(20, study.images),
        "epsilons": study.epsilons[:1],
        "attack_steps": min(2, study.attack_steps),
        "flow_steps": min(4, study.flow_steps),
    }


def clean(setup: Setup, x: Tensor) -> Tensor:
    """Stored data `(n, *)` in model units, at the centres of their bins."""
    return setup.transform.centres(x.to(setup.device)).to(torch.float32)


def box_of(setup: Setup) -> tuple[float, float] | None:
    """Where grey values are in model units; None for data without."""
    if setup.dataset.levels is None:
        return None
    return float(setup.config["data"]["low"]), float(setup.config["data"]["high"])


def _parts(x: Tensor) -> list[Tensor]:
    return [x[i : i + _BATCH] for i in range(0, len(x), _BATCH)]


@torch.no_grad()
def logits_of(model: ClassifierEnergy, x: Tensor) -> Tensor:
    """f `(n, K)` of x `(n, *)` in model units."""
    return torch.cat([model.logits(part) for part in _parts(x)])


def fresh_chains(
    model: ClassifierEnergy,
    langevin: TemperedLangevin,
    shape: tuple[int, ...],
    length: int,
    *,
    generator: SampleStreams,
    device: torch.device,
    labels: Tensor | None = None,
    name: str = "chains",
) -> Tensor:
    """The ends `(n, *)` of `n` chains of `length` steps from noise (uniform in the box, or N(0, I)), none begun anew.

    Args:
        labels: classes `(n,)`, for chains of exp(-E(x, y)); None for those of exp(-E(x)).
        generator: of the chains' noise.

    Raises:
        UserError: chains that have left for infinity.
    """
    if langevin.box is None:
        x = normal(shape, generator, device=device, dtype=torch.float32)
    else:
        low, high = langevin.box
        x = low + (high - low) * uniform(shape, generator, device=device, dtype=torch.float32)
    start, block = x, 10  # of noise at a time

    def energy(at: Tensor) -> Tensor:
        return model.energy(at, labels)

    with progress.bar(total=length, name=name, unit="step") as bar:
        for first in range(0, length, block):
            steps = min(block, length - first)
            z = normal((shape[0], steps, *shape[1:]), generator, device=device, dtype=torch.float32)
            x = langevin.run(energy, x, z, checked=False)
            bar.update(steps)
    langevin.require_near(energy, start, x, length)
    return x


def calibrations(setup: Setup, models: Mapping[str, ClassifierEnergy]) -> dict[str, Calibration]:
    """Of each classifier on the test data, by name."""
    test = setup.dataset.split("test")
    assert test.labels is not None
    return {name: calibration(logits_of(model, clean(setup, test.x)), test.labels) for name, model in models.items()}


def attacked(setup: Setup, study: Study, models: Mapping[str, ClassifierEnergy]) -> dict[str, list[Estimate]]:
    """Accuracy of each classifier without an attack, and under one at each epsilon."""
    test = setup.dataset.split("test")
    test = test.take(slice(0, study.images))
    assert test.labels is not None
    x, labels = clean(setup, test.x), test.labels.to(setup.device)
    attack = ProjectedGradient(steps=study.attack_steps, box=box_of(setup))
    found = {}
    with progress.bar(total=len(models) * (1 + len(study.epsilons)), name="attack", unit="epsilon") as bar:
        for name, model in models.items():
            rights = []
            for epsilon in (0.0, *study.epsilons):
                generator = SampleStreams(setup.options.seed, test.ids)
                near = attack(model.logits, x, labels, epsilon, generator=generator) if epsilon else x
                rights.append(share(logits_of(model, near).argmax(dim=1) == labels))
                bar.update(1)
            found[name] = rights
    return found


def outside(
    setup: Setup, study: Study, energy: ClassifierEnergy, models: Mapping[str, ClassifierEnergy]
) -> tuple[dict[str, dict[str, Estimate]], str]:
    """AUROC of each kind of other data, by the score that tells them and by kind; and what is to be said of the reference.

    Args:
        energy: whose E and gradient are scores.
        models: classifiers, whose largest probability is one.
    """
    levels = setup.dataset.levels
    if levels is None:
        return {}, ""
    test = setup.dataset.split("test")
    test = test.take(slice(0, study.images))
    kinds = {"test": test.x, **outside_of(test, levels, setup.options.seed)}
    scores: dict[str, dict[str, Tensor]] = {}

    def slope(x: Tensor) -> Tensor:
        parts = [point(lambda at: -energy.energy(at), part).slope.flatten(1).norm(dim=1) for part in _parts(x)]
        return torch.cat(parts)

    for kind, images in kinds.items():
        x = clean(setup, images)
        scores.setdefault("energy E(x)", {})[kind] = -logits_of(energy, x).logsumexp(dim=1)
        scores.setdefault("abs(grad E(x))", {})[kind] = slope(x)
        for name, model in models.items():
            scores.setdefault(f"1 - largest p(y given x), {name}", {})[kind] = (
                -logits_of(model, x).softmax(dim=1).amax(dim=1)
            )
    found = {by: _told(of) for by, of in scores.items()}
    if not study.reference:
        return found, ""
    try:
        run = _reference(setup, study)
        found[f"bits/dim, {study.reference}"] = _told(_bits(run, study, kinds, test.ids))
    except UserError as error:
        return found, f"No bits/dim beside: {error}."
    return found, f"{study.reference} has the same test split, none of which it was trained on."


def _told(of: Mapping[str, Tensor]) -> dict[str, Estimate]:
    """How well a score `(n,)` tells each kind from the test data, which it is larger for."""
    return {kind: auroc(of["test"], values) for kind, values in of.items() if kind != "test"}


def require_scored(reference: str) -> None:
    """Refuses a run of a system without a likelihood as the reference, before anything is trained. A folder that is not there
    is no mistake: the report says so.

    Raises:
        UserError: such a run.
    """
    from workflow import systems  # which import this

    try:
        name = configuration.of_run(Path(reference))["system"] if reference else ""
    except UserError:
        return
    system = systems.create(name) if name else None
    if system is not None and (system.no_likelihood or system.no_score):
        why = f"no likelihood: {system.no_likelihood}" if system.no_likelihood else f"no score: {system.no_score}"
        raise UserError(
            f"got config.study.reference={reference!r}, a run of {name}, which has {why}; expected a run with bits/dim, or '' "
            "for none beside"
        )


def _reference(setup: Setup, study: Study) -> TrainedRun:
    """The run whose bits/dim stand beside.

    Raises:
        UserError: no such run, or one of other data: of images that it was trained on its bits/dim would say nothing.
    """
    if not Path(study.reference).is_dir():
        raise UserError(f"there is no folder {study.reference} here")
    run = load_run(study.reference, device=str(setup.device))
    own, other = setup.dataset, run.dataset
    if (own.event_shape, own.levels) != (other.event_shape, other.levels):
        raise UserError(f"{study.reference} is of {other.name}, with another shape or other levels")
    if not torch.equal(own.split("test").x, other.split("test").x):
        raise UserError(
            f"{study.reference} is of {other.name} with another test split (seed {other.seed}, here {own.name} and seed "
            f"{own.seed}), so it may have been trained on images that are scored here"
        )
    return run


def _bits(run: TrainedRun, study: Study, kinds: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    pilot, _ = UniformDequantizer()(run.pilot(), run.transform, run.sde, run.sde.t_min, generator=SampleStreams(0))
    method = fast(run.sde, run.score, pilot.to(torch.float32), steps=study.flow_steps, data_std=run.flow.data_std)
    return {
        kind: bits_of_images(run, images, ids, method=method, name=kind, probes=1).per_image.cpu()
        for kind, images in kinds.items()
    }
