r"""An energy: a score that is a gradient, trained by score matching, and what an energy is good for.

    score = -grad E(x, t),     E(x, t) = |x|^2 / (2 s^2) - (alpha data_std / s)^2 <w, N(w, t)> + c(t),    w = x / s

(Salimans and Ho 2021, "Should EBMs model the energy or the score?"; `models.energy`). The objective is dual score matching by
default (Guth et al. 2025), which fits the energy's change from one noise level to the next as well, so that -E is a
log-density; `stable_target`, `dsm`, and `sliced` or `exact` without a target fit the score alone. The run samples and scores as
any score does. Then E is read at one noise level (`workflow.energy_reading`): as a surface beside the truth's, its differences
against log-densities, the true ones and the flow's exact ones, log Z by quadrature and by annealed importance sampling, SGLD
and MALA with what is wrong with them, and compositions with a second energy.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from ml_collections import ConfigDict
from torch import nn

import data
import training
from data import Dataset
from data.transforms import Transform
from evaluation.pictures import save_surfaces
from models import EnergyModel
from numerics import Catalogue, SampleStreams, UserError, argument_help, normal
from sde_lib import SDE, VESDE
from training import train
from workflow import energy_objectives, energy_reading, plane, progress
from workflow.defaults import base_config
from workflow.energy_objectives import Objectives
from workflow.energy_reading import Read, Reading
from workflow.fresh import fresh
from workflow.report import table
from workflow.score_model import score_model
from workflow.sections import fields_section, section, set_value
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

_SDES: Catalogue[VESDE] = Catalogue("SDE", {"ve": VESDE})
_READING: Catalogue[Reading] = Catalogue("energy", {"energy": Reading})
_OBJECTIVES: Catalogue[Objectives] = Catalogue("objectives", {"objectives": Objectives})
_MARGIN = 3.0  # of the grid: an energy may be wider than the data, at the first steps that of a standard normal
_SPAN = 10.0  # nats below the highest that pictures show


class Energy(System):
    """A score that is minus the gradient of an energy, in the plane."""

    name = "energy"
    about = (
        "An energy trained by score matching (Salimans and Ho 2021; Song et al. 2020, arXiv:1905.07088): its surface, its "
        "log-densities, log Z by annealed importance sampling, SGLD and MALA, and compositions, beside the truth."
    )
    help = {
        **{f"energy.{name}": text for name, text in argument_help(Reading).items()},
        **{f"objectives.{name}": text for name, text in argument_help(Objectives).items()},
    }

    def get_config(self) -> ConfigDict:
        """Eight broad Gaussians on a ring, and nine on a grid for the second energy."""
        config = base_config("energy")
        set_value(config.data, "name", "gaussians", data.DATASETS)
        # of 10,000 points the modes' weights are known to 3 %, more than energies are to be off by; of these to 0.2 %
        config.data.std, config.data.train = 0.3, 1_600_000
        config.sde = section(_SDES, "ve", sigma_max=10.0)
        # the noise of denoising's target is what energies are off by: a large batch averages it, of which few points are asked
        times = {"name": "log_normal", "mean": -1.0, "std": 1.5}
        config.training.objective = section(training.OBJECTIVES, "dual", times=times, every=64)
        config.model.width, config.model.depth = 96, 3
        # centred on the noise levels at which the modes part, over which the energy changes most
        config.model.conditioning.center, config.model.conditioning.scale = 2.0, 4.0
        config.training.update({"steps": 4500, "batch_size": 8192, "learning_rate": 3e-3})
        # the same noise at every evaluation costs more than it tells of points in the plane
        config.training.validation = 0
        config.second = section(data.DATASETS, "gaussians", layout="grid", components=9, std=0.3, train=1_600_000)
        config.likelihood.limit = 1000
        config.energy = fields_section(Reading)
        config.objectives = fields_section(Objectives)
        return config

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the VE SDE alone, and the second data set."""
        return {**super().catalogues, "sde": _SDES, "second": data.DATASETS}

    def model(self, config: Config, sde: SDE, dataset: Dataset, transform: Transform, data_std: float) -> nn.Module:
        """The energy on the network of the section `model`."""
        plain = score_model(config, sde, dataset, transform, data_std)
        return EnergyModel(
            plain.net,
            sde,
            data_std=data_std,
            conditioning=plain.conditioning,
            data_range=plain.data_range,
            smooth=True,
            normalised=True,
        )

    def plan(self, config: Config) -> Reading:
        """How the energy is read, from the section `energy`."""
        made: Reading = _READING.create("energy", **config["energy"])
        return made

    def compared(self, config: Config) -> Objectives:
        """How the objectives are compared, from the section `objectives`."""
        made: Objectives = _OBJECTIVES.create("objectives", **config["objectives"])
        return made

    def other(self, config: Config) -> Dataset:
        """The data of the second energy."""
        values = dict(config["second"])
        return data.create(
            values.pop("name"), **{k: v for k, v in values.items() if k in data.options(config["second"]["name"])}
        )

    def check(self, config: Config) -> None:
        """How it is read, at noise levels that the SDE has, and two data sets whose densities are known, on one plane."""
        plan = self.plan(config)
        energy_reading.require_within(self.sde(config), plan.sigma, *plan.sigmas)
        if self.compared(config).steps:
            energy_objectives.by_name(self.objective(config))
        plane.require_plane(config, self.name, (plan.sigma, *plan.sigmas), n=plan.grid, margin=_MARGIN)
        if config["model"]["parametrization"]["name"] != "preconditioned":
            raise UserError(
                f"got config.model.parametrization={config['model']['parametrization']['name']!r} for an energy, which has its "
                "own; expected preconditioned"
            )
        if config["model"]["class_conditional"]:
            raise UserError(
                "got config.model.class_conditional=True for an energy, which is compared with the density of all classes and "
                "with data of others; expected False"
            )
        self._check_second(config, plan)

    def _check_second(self, config: Config, plan: Reading) -> None:
        """Refuses a second data set that cannot be trained on or compared, before the first is trained on."""
        from workflow.setup import load_data  # it imports the systems

        other, batch = self.other(config), config["training"]["batch_size"]
        if other.event_shape != (2,) or other.log_prob is None:
            raise UserError(
                f"got config.second.name={config['second']['name']!r}; expected points in the plane with a known density"
            )
        if len(other.split("train")) < batch:
            raise UserError(
                f"got config.second with {len(other.split('train')):,} points to train on and "
                f"config.training.batch_size={batch}; expected as many or more: raise config.second.train"
            )
        dataset, transform = load_data(config["data"])
        first = plane.truth(dataset, transform, n=plan.grid, margin=_MARGIN)
        try:
            laws = [t.law.blurred(plan.sigma)[0] for t in (first, plane.truth(other, transform, on=first.plane))]
            energy_reading.composed(plan.gamma, (laws[0], laws[1]), (laws[0], laws[1]))
        except UserError as error:
            raise UserError(f"config.second: {error}") from error

    def rehearsal(self, setup: Setup) -> Setup:
        """With a reading of seconds."""
        short = {
            "energy": energy_reading.shortened(self.plan(setup.config)),
            "objectives": {"steps": 20, "batch_size": 32},
        }
        return replace(setup, config={**setup.config, **short})

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of an energy, roughly, and the second training's."""
        plan = self.plan(setup.config)
        chains = plan.chains / 1000 * (2 * len(plan.steps) * plan.length + 4 * plan.levels)
        return chains + 2.0 * setup.options.steps + 5.0 * self.compared(setup.config).steps + 300.0

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """Reads the energy: into results.json, report.md, two pictures and the terminal."""
        plan, seed = self.plan(run.setup.config), run.setup.options.seed
        first = cast(EnergyModel, run.model)
        truths = [plane.truth(run.dataset, run.transform, n=plan.grid, margin=_MARGIN)]
        truths.append(plane.truth(self.other(run.setup.config), run.transform, on=truths[0].plane))
        models = (first, self._second(run, folder))
        try:
            reads = [Read.of(m, plan.sigma, truths[0].plane) for m in models]
        except UserError as error:  # an energy that has not come down at the edges yet
            folder.update_results({"energy": {"sigma": plan.sigma, "unbounded": str(error)}})
            folder.add_section("The energy", [f"Not read at sigma = {plan.sigma:g}: {error}."])
            warnings.warn(f"the energies are not read: {error}", stacklevel=2)
            return
        true = [truth.law.blurred(plan.sigma)[0] for truth in truths]
        test = run.transform.centres(run.dataset.split("test").x).to(torch.float32)
        noised = test[: plan.flow_points]
        noised = noised + plan.sigma * normal(noised.shape, SampleStreams(seed + 2), dtype=torch.float32)
        rows, x = energy_reading.chains(plan, reads[0].law, energy_reading.log_density(first, reads[0].t), seed)
        composed = energy_reading.composed(plan.gamma, (reads[0].law, reads[1].law), (true[0], true[1]))
        entry: dict[str, Any] = {
            "sigma": plan.sigma,
            "differences": energy_reading.differences(reads[0].law, true[0]),
            "differences_at": energy_reading.differences_at(plan, first, truths[0]),
            "log_z": energy_reading.normalisers(plan, reads[0], truths[0], test[: plan.chains], seed),
            "flow": energy_reading.by_the_flow(plan, reads[0], noised.to(run.device)),
            "chains": rows,
            "floor_of_total_variation": energy_reading.floor(reads[0].law, plan.chains),
            "compositions": {n: {k: v for k, v in c.items() if k != "laws"} for n, c in composed.items()},
        }
        folder.update_results({"energy": entry})
        half = truths[0].plane.half
        learned = "-E - log Z, learned; where MALA chains end"
        surfaces = {"log q, true": true[0].log_p, learned: reads[0].law.log_p}
        save_surfaces(folder.path / "energy.png", surfaces, half, points={learned: x}, span=_SPAN, unit="nats")
        pairs = {
            f"{name}, {whose}": c["laws"][i].log_p
            for i, whose in enumerate(("true", "learned"))
            for name, c in composed.items()
        }
        save_surfaces(folder.path / "compositions.png", pairs, half, span=_SPAN, unit="nats")
        lines = _lines(entry, plan)
        pictures = ["![energies](energy.png)", "", "![compositions](compositions.png)"]
        comparison = self.compared(run.setup.config)
        if comparison.steps:
            by_objective, laws = energy_objectives.compared(run, comparison, plan, truths[0])
            folder.update_results({"energy": {**entry, "objectives": by_objective}})
            save_surfaces(
                folder.path / "objectives.png",
                {"true": true[0].log_p, **{name: law.log_p for name, law in laws.items()}},
                half,
                span=_SPAN,
                unit="nats",
            )
            said = (
                f"Each objective, {comparison.steps} updates of {comparison.batch_size} points from the same weights:"
            )
            lines += [said, "", *table(*energy_objectives.rows(by_objective, plan))]
            pictures += ["", "![each objective](objectives.png)"]
        folder.add_section("The energy", [*lines, *pictures])
        print("\n" + "\n".join(lines))

    def _second(self, run: TrainedRun, folder: RunFolder) -> EnergyModel:
        """The second data set's energy: the same network, trained as the first was, in the same units. Its checkpoint stays, so
        that a run that is resumed has it."""
        setup, other = run.setup, self.other(run.setup.config)
        model = fresh(run)
        options = replace(setup.options, progress=not progress.is_silent(), tensorboard=False, eval_every=0)
        result = train(
            model,
            other.split("train"),
            run.transform,
            options,
            objective=setup.objective,
            folder=folder.path / f"second-{other.fingerprint[:8]}",  # of other data it is another one
            resume=True,
            data_fingerprint=other.fingerprint,
        )
        if result.averages:  # with ema=() the last weights stay, as in the first's
            result.load_averages(model)
        return cast(EnergyModel, model.eval().requires_grad_(False))


def _normaliser(z: Mapping[str, Any]) -> str:
    """What is said of log Z."""
    if z["reason"]:
        return f"log Z by quadrature {z['quadrature']:.3f}; by annealed importance sampling none: {z['reason']}."
    return (
        f"log Z by quadrature {z['quadrature']:.3f}, by annealed importance sampling {z['ais_lower_bound']:.3f} ± "
        f"{z['ais_stderr']:.3f}, a lower bound in expectation: log-densities with it are too large by "
        f"{z['quadrature'] - z['ais_lower_bound']:.3f} nats, so nats or bits/dim of held-out points come out too good."
    )


def _lines(entry: Mapping[str, Any], plan: Reading) -> list[str]:
    """The report's words and tables."""
    d, z, f = entry["differences"], entry["log_z"], entry["flow"]
    said = [
        f"Read at sigma = {plan.sigma:g}, on the true law's mass: differences of energies are off by {d['nats']:.3f} nats, "
        f"{100 * d['relative']:.1f} % of the log-density's spread ({d['of']:.2f} nats); KL(true, energy) {d['kl']:.4f} nats.",
        "",
        _normaliser(z),
        "",
        *(
            f"The data's own density, {levels} levels: {b['lower']:.3f} ± {b['lower_stderr']:.3f} <= log Z = 0 <= "
            f"{b['upper']:.3f} ± {b['upper_stderr']:.3f}."
            for levels, b in z["bracket_of_the_data"].items()
        ),
        "",
        f"Against the flow of the same network: the standard deviation of -E - log p is {f['std_of_difference']:.3f} of "
        f"{f['std_of_log_density']:.2f} nats; held-out points with that noise have {f['nats_by_flow']:.3f} nats by the flow, "
        f"{f['nats_by_energy']:.3f} by the energy with its exact log Z, {f['nats_by_energy_alone']:.3f} by the energy alone.",
        "",
    ]
    rows = [
        (
            r["chain"],
            f"{r['step']:g}",
            f"{r['acceptance']:.3f}" if r["chain"] == "MALA" else "",
            f"{r['energy_off']:+.3f} ± {r['energy_stderr']:.3f}",
            f"{r['total_variation']:.3f}",
        )
        if "diverged" not in r
        else (r["chain"], f"{r['step']:g}", "", r["diverged"], "")
        for r in entry["chains"]
    ]
    head = ("chain", "step", "acceptance", "mean energy, off by", "total variation")
    chains = [
        f"{plan.chains:,} chains of {plan.length} transitions from N(0, I); as many exact samples have a total variation of "
        f"{entry['floor_of_total_variation']:.3f}.",
        "",
        *table(head, rows),
    ]
    levels = [
        (
            sigma,
            f"{at['of']:.3f}",
            f"{at['nats']:.3f}",
            f"{100 * at['relative']:.1f} %",
            f"{at['kl']:.4f}",
            f"{at['log_z']:+.3f}",
        )
        for sigma, at in entry["differences_at"].items()
    ]
    head_of_levels = (
        "sigma",
        "spread of log q, nats",
        "differences, off by (nats)",
        "of the spread",
        "KL(true, energy)",
        "log Z",
    )
    of = [(name, f"{c['kl']:.4f}", f"{100 * c['relative']:.1f} %") for name, c in entry["compositions"].items()]
    head_of_sums = ("composition", "KL(true, learned)", "differences, off by")
    return [*said, *table(head_of_levels, levels), *chains, *table(head_of_sums, of)]


get_config = Energy().get_config
