r"""CNF: one network as a flow, trained by maximum likelihood (FFJORD), by score matching and by flow matching.

    dx/dt = v(x, t),       log p(x) = log N(z; 0, I) + integral of tr(dv/dx) dt

(Chen et al. 2018, arXiv:1806.07366; Grathwohl et al. 2019, arXiv:1810.01367). The velocity is the probability flow's of a score
model on the straight path x_t = (1 - t) x_0 + t eps, so that three trainings have one network, one sampler and one likelihood:

    maximum likelihood    -log p(x) itself, differentiated through the integration's steps, or by its adjoint
    score matching        |eps - eps_hat|^2 at random times             no integration in training
    flow matching         |(eps - x_0) - v|^2 at random times           (Lipman et al. 2023, arXiv:2210.02747, equation (23))

Only the last two tie the flow to a law of noised data: the first's network is the score of nothing, and its SDE view means
nothing; so it draws by the flow alone. Afterwards the other two are trained, and all three scored on the test points by one
adaptive solver with the exact trace (in the plane): nats, evaluations, training time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from ml_collections import ConfigDict

import data
import samplers
import training
from likelihood import Divergence, Exact, Hutchinson, Method, log_likelihood
from models import ScoreModel
from numerics import (
    Catalogue,
    Dopri5,
    SampleStreams,
    UserError,
    argument_help,
    require_count,
    require_positive,
)
from sde_lib import SDE, StraightSDE, WhitenedFlow
from training import DSM, FlowMatching, MaximumLikelihood, Objective, Simple, StratifiedTime, TrainingOptions
from workflow import progress
from workflow.defaults import base_config
from workflow.fresh import fresh
from workflow.pictures import draw_samples, save_samples
from workflow.presets import Changes
from workflow.report import table
from workflow.sections import fields_section, section, set_value
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What the two other trainings are given, and how all three are scored.

    Args:
        steps: updates of each.
        batch_size, learning_rate: of each.
        points: test points that are scored, for each of the three.
        tolerance: of the adaptive solver that scores; another than that of the training.

    Raises:
        UserError: a number that is not positive.
    """

    steps: int = 3000
    batch_size: int = 512
    learning_rate: float = 2e-3
    points: int = 1000
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "points"):
            require_count(getattr(self, name), f"config.beside.{name}")
        for name in ("learning_rate", "tolerance"):
            require_positive(getattr(self, name), f"config.beside.{name}")


_SDES: Catalogue[SDE] = Catalogue("SDE", {"straight": StraightSDE})
_OBJECTIVES: Catalogue[Objective] = Catalogue("objective", {"maximum_likelihood": MaximumLikelihood})
_BESIDE: Catalogue[Beside] = Catalogue("beside", {"beside": Beside})
_IMAGES: Changes = {
    "data.name": "digits",
    "model.name": "mlp",
    # of 256 an update takes two and a half times as long, and half an hour is to be enough
    "model.width": 128,
    # sines of single grey levels are steps to the solver: of the field that they make it took three times as long
    "model.grey_level_features": (),
    "training.objective.probes": 1,
    "training.steps": 2000,
    "training.batch_size": 128,
    "training.learning_rate": 2e-3,
    "training.warmup": 50,
    "training.ema": (0.995,),
    "beside.steps": 4000,
    "beside.batch_size": 128,
    "beside.points": 100,
    "likelihood.limit": 100,
}
OTHERS: Mapping[str, Objective] = {
    "score matching": DSM(times=StratifiedTime(), weighting=Simple()),
    "flow matching": DSM(times=StratifiedTime(), weighting=FlowMatching()),
}


class CNF(System):
    """A continuous normalizing flow, beside the same network trained as a probability flow."""

    name = "cnf"
    about = (
        "CNF / FFJORD (Grathwohl et al. 2019, arXiv:1810.01367): a flow trained by maximum likelihood through the ODE, beside "
        "the same network trained by score matching and by flow matching, scored by one likelihood."
    )
    help = {f"beside.{name}": text for name, text in argument_help(Beside).items()}

    def get_config(self) -> ConfigDict:
        """Two moons, a small network, torchdiffeq's dopri5 with the exact trace, differentiated through its steps."""
        config = base_config("cnf")
        set_value(config.data, "name", "moons", data.DATASETS)
        config.sde = section(_SDES, "straight", T=0.999, t_min=1e-3, t_end=1e-3)
        config.model.width, config.model.depth = 64, 3
        # an adaptive solver, if a coarse one: four steps of rk4 an update are no dearer, but the flow learned to deceive them;
        # the adjoint's gradients are right with states kept on the way, and take two to six times as long as these
        config.training.objective = section(
            _OBJECTIVES, "maximum_likelihood", adjoint=False, tolerance=1e-2, kinetic=0.005, jacobian=0.005
        )
        config.training.steps, config.training.batch_size = 450, 256
        config.training.learning_rate, config.training.warmup, config.training.eval_every = 5e-3, 20, 0
        config.training.ema = (0.98,)
        # the bound that validates is of a reversed SDE, which the flow's network knows nothing of
        config.training.validation = 0
        set_value(config.sampling, "sampler", {"name": "dpm_solver", "steps": 60}, _SAMPLING)
        set_value(config.sampling, "second", "ddim", _SAMPLING)
        config.sampling.second.steps = 200
        # Tweedie's mean is one of the score
        config.sampling.sampler.denoise = config.sampling.second.denoise = False
        config.likelihood.limit = 1000
        config.beside = fields_section(Beside, steps=1500, points=500)
        return config

    @property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        """The moons, by the name that every system's own settings have; and images, the digits with random traces."""
        return {"digits": {}, "images": _IMAGES}

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the straight path alone, and maximum likelihood alone."""
        return {**super().catalogues, "sde": _SDES, "training.objective": _OBJECTIVES}

    def beside(self, config: Config) -> Beside:
        """The other trainings, from the section `beside`."""
        made: Beside = _BESIDE.create("beside", **config["beside"])
        return made

    def check(self, config: Config) -> None:
        """The other trainings' values, no classes, and no validation by the SDE's bound."""
        self.beside(config)
        if config["model"]["class_conditional"]:
            raise UserError(
                "got config.model.class_conditional=True for cnf, whose three trainings are compared without classes; expected "
                "False"
            )
        if config["training"]["validation"]:
            raise UserError(
                f"got config.training.validation={config['training']['validation']} for a flow trained by likelihood, whose "
                "bound by the reversed SDE means nothing; expected 0"
            )

    def rehearsal(self, setup: Setup) -> Setup:
        """With other trainings of seconds."""
        beside = replace(self.beside(setup.config), steps=10, points=50)
        return replace(setup, config={**setup.config, "beside": asdict(beside)})

    def effort(self, setup: Setup, images: int) -> float:
        """Updates of the other trainings and points scored, in hundredths of a second of this machine's."""
        beside = self.beside(setup.config)
        return 2.0 * beside.steps + beside.points

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """Trains the same network twice more, and puts the three beside each other."""
        beside, setup = self.beside(run.setup.config), run.setup
        own = folder.results()["training"]
        rows = {"maximum likelihood": scored(run, run.model, beside, seconds=own["cpu_seconds"], steps=own["steps"])}
        with progress.bar(total=len(OTHERS), name="the other trainings", unit="network") as bar:
            for name, objective in OTHERS.items():
                model, seconds = self._other(run, beside, objective)
                rows[name] = scored(run, model, beside, seconds=seconds, steps=beside.steps)
                x, _ = draw_samples(setup, model, next(iter(setup.samplers.values())), setup.n, shown=False)
                save_samples(folder.path / "samples" / f"{name.replace(' ', '_')}.png", x, setup)
                bar.update(1)
        truth = None
        if run.dataset.log_prob is not None:
            test = run.dataset.split("test").x[: beside.points]
            truth = -float(run.dataset.log_prob(test).mean())
        folder.update_results({"cnf": {"trainings": rows, "truth_nats": truth, **asdict(beside)}})
        lines = _lines(rows, truth)
        pictures = [f"![{name}](samples/{name.replace(' ', '_')}.png)" for name in OTHERS]
        folder.add_section("One network, three trainings", [*lines, *pictures])
        print("\n" + "\n".join(lines))

    def _other(self, run: TrainedRun, beside: Beside, objective: Objective) -> tuple[ScoreModel, float]:
        """The run's network, trained anew by `objective`, with averaged weights; and the processor seconds that took."""
        setup = run.setup
        model = fresh(run)
        options = TrainingOptions(
            steps=beside.steps,
            batch_size=min(beside.batch_size, len(setup.training_data)),
            seed=setup.options.seed,
            learning_rate=beside.learning_rate,
            warmup=min(100, beside.steps),
            schedule="cosine",
            betas=(0.9, 0.99),
            ema=(0.999,),
            progress=False,
            tensorboard=False,
        )
        result = training.train(model, setup.training_data, run.transform, options, objective=objective)
        result.load_averages(model)
        return cast(ScoreModel, model.eval().requires_grad_(False)), result.cpu_seconds


def scored(run: TrainedRun, model: ScoreModel, beside: Beside, *, seconds: float, steps: int) -> dict[str, Any]:
    """Minus the mean log-density of test points in the data's own units, and what it took."""
    x = run.transform.centres(run.dataset.split("test").x[: beside.points]).to(run.device, torch.float32)
    few = x[0].numel() <= 16
    divergence: Divergence = Exact() if few else Hutchinson(probes=2)
    begun = time.process_time()
    found = log_likelihood(
        model.sde,
        model,
        x,
        method=Method(
            Dopri5(rtol=beside.tolerance, atol=beside.tolerance), flow=WhitenedFlow(data_std=model.data_std or 1.0)
        ),
        divergence=divergence,
        generator=SampleStreams(run.setup.options.seed),
    )
    nats = -(found.log_prob + x[0].numel() * run.transform.log_det)
    with torch.no_grad():
        kinetic = MaximumLikelihood(adjoint=False).up(model, x[:200]) if few else None
    return {
        "nats": float(nats.mean()),
        "stderr": float(nats.std()) / math.sqrt(len(nats)),
        "evaluations": float(found.evaluations.double().mean()),
        "scoring_seconds": time.process_time() - begun,
        "training_seconds": seconds,
        "training_steps": steps,
        "kinetic": None if kinetic is None else float(kinetic.kinetic.mean()),
        "jacobian": None if kinetic is None else float(kinetic.jacobian.mean()),
        "failed": int((~nats.isfinite()).sum()),
    }


def _lines(rows: Mapping[str, Mapping[str, Any]], truth: float | None) -> list[str]:
    """The table of the report."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    head = ("training", "nats", "evaluations", "training, processor s", "updates", "kinetic", "Jacobian")
    body = [
        (
            name,
            f"{r['nats']:.4f} ± {r['stderr']:.4f}",
            f"{r['evaluations']:.0f}",
            f"{r['training_seconds']:.0f}",
            f"{r['training_steps']:,}",
            shown(r["kinetic"]),
            shown(r["jacobian"]),
        )
        for name, r in rows.items()
    ]
    said = "" if truth is None else f" The data's own density has {truth:.4f} nats there."
    return [f"One network, one likelihood (minus the mean log-density of test samples).{said}", "", *table(head, body)]


_SAMPLING: Catalogue[Any] = Catalogue("sampling", {}, parts={"sampler": samplers.SAMPLERS, "second": samplers.SAMPLERS})

get_config = CNF().get_config
