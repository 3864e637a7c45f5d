r"""Variational diffusion models: the bound as the loss, and a noise schedule that is learned with the network.

    -log p(x) <= E[-log p(x | z_0)] + KL(q(z_1 | x) || N(0, I)) + 1/2 E_t gamma'(t) |eps - eps_hat(z_t, gamma(t))|^2
    z_t = alpha x + sigma eps,   alpha^2 = sigmoid(-gamma),   sigma^2 = sigmoid(gamma)
    p(k | z_0) proportional to N(z_0; alpha c_k, sigma^2)

(Kingma et al. 2021, arXiv:2107.00630, sections 3.5, 4 and 5.) x are grey values at their bins' centres c_k, of which
the network is shown sines; it is told gamma. So the last term depends on the schedule by its two end points alone, which stay
(`models.schedule`), and the schedule is taught to make its estimate vary less (`training.vdm`).

The run states the bound in bits/dim. It then shows the invariance for the trained network under three schedules, the bound of
chains of 10, 100 and 1,000 steps, and what is gained where the forward process is learned too: a mean and a scale for each
pixel in q(z_t | x) (`models.learned_forward`), between a VAE's encoder and a fixed diffusion.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

import samplers
from data import Dataset, Split
from data.transforms import Transform
from likelihood import Bins, elbo
from models import VDM, FixedSchedule, LearnedForward, MonotoneSchedule, PixelEncoder, ScoreModel, networks
from models.schedule import AsItIs
from numerics import Catalogue, SampleStreams, UserError, normal, require_count, uniform
from sde_lib import SDE, ScheduledVPSDE
from sde_lib.scheduled import Schedule
from training import LearnedForwardLoss, VDMLoss
from training.streams import StepStreams
from workflow import presets, progress
from workflow.beside import seeded, train_beside
from workflow.defaults import base_config
from workflow.report import table
from workflow.score_model import score_model
from workflow.sections import section
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.score import Scored
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun


@dataclass(frozen=True, kw_only=True)
class LearnedSchedule:
    """A monotone schedule from `gamma_min` at the data to `gamma_max` at the noise, with `units` steps between them.

    Without a `gamma_min` the noise of z_0 is a sixth of a grey level: the paper's -13.3 for 256 levels in [-1, 1], -7.9 for 17,
    and for points as for 17.
    """

    gamma_min: float | None = None
    gamma_max: float = 5.0
    units: int = 64

    def on(self, transform: Transform) -> LearnedSchedule:
        """Those of the data that `transform` maps to model units."""
        if self.gamma_min is not None:
            return self
        level = 2 / _DIGITS if transform.levels is None else math.exp(transform.log_det)
        return replace(self, gamma_min=2 * math.log(level / 6))

    def make(self) -> MonotoneSchedule:
        """A fresh one, nearly linear."""
        first = 2 * math.log(2 / _DIGITS / 6) if self.gamma_min is None else self.gamma_min
        return MonotoneSchedule(gamma_min=first, gamma_max=self.gamma_max, units=self.units)


_DIGITS = 17  # grey levels
SCHEDULES: Catalogue[LearnedSchedule] = Catalogue("schedule", {"learned": LearnedSchedule})
OBJECTIVES: Catalogue[Any] = Catalogue("objective", {"vdm": VDMLoss}, derived=("times", "t_min"))


class VariationalDiffusion(System):
    """The bound, trained with its schedule."""

    name = "vdm"
    counts_evaluations = True
    about = (
        "Variational diffusion models (Kingma et al. 2021, arXiv:2107.00630): the bound as the loss, a learned monotone "
        "schedule, the bound's invariance to it, and a learned forward process."
    )
    help: ClassVar[Mapping[str, str]] = {
        "sde.gamma_min": "gamma = -log SNR at the data's end; None for a noise of a sixth of a grey level",
        "sde.gamma_max": "gamma at the noise's end",
        "sde.units": "width of the schedule's network",
        "bound.compared": "images of the comparisons",
        "learned_forward.steps": "steps of training with a learned forward process, and without; 0 for none",
        "learned_forward.width": "width of the forward process's networks",
    }

    def get_config(self) -> ConfigDict:
        """The digits' settings."""
        config = base_config("vdm")
        config.sde = section(SCHEDULES, "learned")
        # sines that turn once in two grey levels and once in one, the paper's 2^6 and 2^7 for 256 levels
        config.model.grey_level_features = (0.5, 1.0)
        config.training.update({"dequantize": False, "steps": 1000})
        config.threads = 2  # a third less time on two free cores
        config.training.objective = section(OBJECTIVES, "vdm")
        config.sampling.sampler = section(samplers.SAMPLERS, "ancestral", steps=250)
        # draws of level and noise for each image's bound, and images of the comparisons
        config.bound = ConfigDict({"draws": 64, "compared": 100})
        # steps of training with a learned forward process, and without, to compare; 0: none. width of its networks
        config.learned_forward = ConfigDict({"steps": 250, "width": 256})
        return config

    @property
    def presets(self) -> Mapping[str, presets.Changes]:
        """Those of a score of images."""
        return presets.of(self.name)

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the schedule in place of an SDE."""
        return {**super().catalogues, "sde": SCHEDULES, "training.objective": OBJECTIVES}

    def sde(self, config: Config) -> SDE:
        """The SDE of a fresh schedule."""
        made: LearnedSchedule = SCHEDULES.make(config["sde"])
        return ScheduledVPSDE(schedule=AsItIs(made.make()))

    def model(self, config: Config, sde: SDE, dataset: Dataset, transform: Transform, data_std: float) -> nn.Module:
        """A score model that owns the schedule."""
        own = SCHEDULES.make(config["sde"]).on(transform)
        made = score_model(config, sde, dataset, transform, data_std)
        return VDM(
            made.net,
            own.make(),
            made.parametrization,
            conditioning=made.conditioning,
            data_std=made.data_std,
            data_range=made.data_range,
        )

    def check(self, config: Config) -> None:
        """The numbers of the bound and of what is beside it."""
        require_count(config["bound"]["draws"], "config.bound.draws", 8)
        require_count(config["bound"]["compared"], "config.bound.compared", 2)
        require_count(config["learned_forward"]["steps"], "config.learned_forward.steps", 0)
        require_count(config["learned_forward"]["width"], "config.learned_forward.width", 1)
        if config["model"]["conditioning"]["name"] != "log_snr":
            raise UserError(
                f"got config.model.conditioning={config['model']['conditioning']['name']!r}; expected 'log_snr', which is "
                "-gamma: the bound is free of the schedule for a network that is told gamma alone"
            )
        if config["training"]["dequantize"]:
            raise UserError(
                "got config.training.dequantize=True; expected False: this bound is of grey values at their bins' centres"
            )

    def score(self, run: TrainedRun) -> Scored | None:
        """The bound in bits/dim, of the continuous model."""
        setup, begun = run.setup, time.perf_counter()
        data = _data(setup, setup.protocol.limit)
        bits, noise = bound(run, data, draws=setup.config["bound"]["draws"])
        n = len(bits)
        entry = {
            **_mean(bits),
            "monte_carlo_stderr": noise,
            "kind": "bound",
            "unit": "bits/dim",
            "reason": "",
            "split": setup.protocol.split,
            "images": n,
            "draws": setup.config["bound"]["draws"],
            "seconds": time.perf_counter() - begun,
        }
        of = "" if run.dataset.levels is not None else " of a density"
        entry["text"] = (
            f"bound {entry['mean']:.3f} ± {entry['stderr']:.3f} bits/dim{of} ({n:,} {setup.noun}s, Monte Carlo {noise:.3f})"
        )
        run.folder.update_results({"bits_per_dim": entry})
        return None

    def rehearsal(self, setup: Setup) -> Setup:
        """With few draws, images and steps."""
        c = setup.config
        small = {
            "bound": {"draws": 8, "compared": min(8, c["bound"]["compared"])},
            "learned_forward": {**c["learned_forward"], "steps": min(2, c["learned_forward"]["steps"])},
        }
        return replace(setup, config={**c, **small})

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of the network on an image, one of training as three."""
        c = setup.config
        own = 6 * c["learned_forward"]["steps"] * setup.options.batch_size
        return float(own + min(images, c["bound"]["compared"]) * c["bound"]["draws"] * 9)

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The schedule and the bound's invariance to it, chains, and a learned forward process."""
        _invariance(run, folder)
        _chains(run, folder)
        if run.setup.config["learned_forward"]["steps"]:
            _learned_forward(run, folder)


def _data(setup: Setup, limit: int) -> Split:
    data = setup.dataset.split(setup.protocol.split)
    return data.take(slice(0, limit or len(data)))


def _mean(values: Tensor) -> dict[str, float]:
    n = len(values)
    return {"mean": float(values.mean()), "stderr": float(values.std()) / math.sqrt(n) if n > 1 else math.nan}


def bound(run: TrainedRun, data: Split, *, draws: int, steps: int | None = None) -> tuple[Tensor, float]:
    """The bound of stored data in bits/dim, `(n,)`, and what of the mean's standard error is due to the draws.

    Args:
        steps: of a chain; None for the continuous model.
    """
    setup, found, errors = run.setup, [], []
    name = "bound" if steps is None else f"bound of {steps:,} steps"
    with progress.bar(total=len(data), name=name, unit=setup.noun) as bar:
        for first in range(0, len(data), 100):
            part = data.take(slice(first, first + 100))
            stored = part.x.to(setup.device)
            grey = setup.transform.levels is not None
            parts = elbo(
                run.sde,
                run.score,
                setup.transform.centres(stored).to(torch.float32),
                decoder=Bins(transform=setup.transform) if grey else None,
                data=stored if grey else None,
                draws=draws,
                steps=steps,
                data_std=run.model.data_std,
                generator=SampleStreams(setup.options.seed, part.ids),
            )
            log_det = 0.0 if grey else setup.transform.log_det
            found.append(parts.bits_per_dim(setup.dataset.dim, log_det).cpu())
            errors.append((parts.stderr / (setup.dataset.dim * math.log(2))).cpu())
            bar.update(len(part))
    noise = float(torch.cat(errors).square().sum().sqrt()) / len(data)
    return torch.cat(found), noise


def _invariance(run: TrainedRun, folder: RunFolder) -> None:
    """The diffusion's part by uniform times, under the learned schedule and two others: one mean, several variances."""
    setup, model = run.setup, cast(VDM, run.setup.model)
    data = _data(setup, setup.config["bound"]["compared"])
    x = setup.transform.centres(data.x.to(setup.device)).to(torch.float32)
    learned = model.schedule
    ends = {"gamma_min": learned.gamma_min, "gamma_max": learned.gamma_max}
    schedules: dict[str, Schedule] = {
        "learned": AsItIs(learned),
        "linear": FixedSchedule(**ends),
        "quadratic": FixedSchedule(**ends, power=2.0),
    }
    rows, found = [], {}
    draws = setup.config["bound"]["draws"]
    for name, schedule in schedules.items():
        sde = ScheduledVPSDE(schedule=schedule)
        means = []
        for i in range(draws):
            streams = StepStreams(setup.options.seed, i, setup.device)
            t = torch.rand(len(x), generator=streams.generator("time"), dtype=torch.float64, device=setup.device)
            eps = normal(x.shape, streams.generator("noise"), device=setup.device, dtype=x.dtype)
            with torch.no_grad():
                eps_hat = model.noise_under(sde, sde.perturb(x, t, eps), t)
            error = (eps - eps_hat).flatten(1).double().square().mean(dim=1)
            means.append(schedule.slope(t) / 2 * error / math.log(2))
        each = torch.stack(means).cpu()  # independent times: every entry is an estimate
        value, stderr = float(each.mean()), float(each.std()) / math.sqrt(each.numel())
        found[name] = {"mean": value, "stderr": stderr, "spread": float(each.std()), "estimates": each.numel()}
        rows.append((name, f"{value:.4f} ± {stderr:.4f}", f"{float(each.std()):.3f}"))
    folder.update_results({"invariance": found})
    picture = _save_schedules(folder, schedules)
    folder.add_section(
        "One bound, three schedules",
        [
            f"The diffusion's part of the bound, bits/dim, by uniform independent times on {len(x)} {setup.noun}s, for the one "
            "trained network, which is told gamma:",
            "",
            *table(("schedule", "mean", "spread of one estimate"), rows),
            f"![schedules]({picture})",
        ],
    )
    print("\nthe diffusion's part of the bound under three schedules, bits/dim")
    for row in rows:
        print(f"  {row[0]}: {row[1]}, spread of one estimate {row[2]}")


def _save_schedules(folder: RunFolder, schedules: Mapping[str, Any]) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    t = torch.linspace(0, 1, 200, dtype=torch.float64)
    for name, schedule in schedules.items():
        axes.plot(t, schedule(t).detach().cpu(), label=name)
    axes.set_xlabel("t")
    axes.set_ylabel("gamma = - log SNR")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(folder.path / "schedules.png", dpi=100)
    return "schedules.png"


def _chains(run: TrainedRun, folder: RunFolder) -> None:
    """The bound of chains along the learned schedule, and of their limit."""
    setup = run.setup
    data = _data(setup, setup.config["bound"]["compared"])
    rows, found = [], {}
    for steps in (10, 100, 1000, None):
        bits, noise = bound(run, data, draws=setup.config["bound"]["draws"], steps=steps)
        name = "continuous" if steps is None else f"{steps:,}"
        found[name] = {**_mean(bits), "monte_carlo_stderr": noise}
        rows.append((name, f"{float(bits.mean()):.3f} ± {noise:.3f}"))
    folder.update_results({"chains": found})
    folder.add_section(
        "Chains of the same network",
        table(("steps", f"bits/dim, at most, on {len(data)} {setup.noun}s (± by Monte Carlo)"), rows),
    )


def _learned_forward(run: TrainedRun, folder: RunFolder) -> None:
    """The same network trained for the same steps without and with a learned forward process, by the same bound."""
    setup, own = run.setup, run.setup.config["learned_forward"]
    if setup.dataset.levels is None:
        return
    model = cast(VDM, setup.model)
    ends = {"gamma_min": model.schedule.gamma_min, "gamma_max": model.schedule.gamma_max}
    sde = ScheduledVPSDE(schedule=FixedSchedule(**ends))
    data = _data(setup, setup.config["bound"]["compared"])
    found, rows, per_image = {}, [], {}
    for name in ("fixed", "learned"):
        begun = time.perf_counter()
        # the same first weights for both
        described = networks.describe(model.net)
        net = seeded(
            setup.options.seed,
            lambda d=described: networks.create(d["name"], **d["options"]),  # type: ignore[misc]
        )
        made = ScoreModel(
            net,
            sde,
            model.parametrization,
            conditioning=model.conditioning,
            data_std=model.data_std,
            data_range=model.data_range,
        )
        encoder: nn.Module = Nothing()
        if name == "learned":
            encoder = seeded(setup.options.seed, lambda: PixelEncoder(dim=setup.dataset.dim, width=own["width"]))
        forward = train_beside(setup, LearnedForward(made, encoder, **ends), LearnedForwardLoss(), steps=own["steps"])
        parts = forward_bound(forward, data, setup, draws=setup.config["bound"]["draws"])
        bits = parts.sum(dim=1)
        per_image[name] = bits
        found[name] = {
            **_mean(bits),
            "parts": dict(zip(("reconstruction", "prior", "diffusion"), parts.mean(dim=0).tolist(), strict=True)),
            "seconds": time.perf_counter() - begun,
        }
        rows.append((name, f"{float(bits.mean()):.3f}", *(f"{float(v):.3f}" for v in parts.mean(dim=0))))
    gain = _mean(per_image["fixed"] - per_image["learned"])
    folder.update_results({"learned_forward": {**found, "gain": gain, "steps": own["steps"]}})
    text = f"The learned forward process gains {gain['mean']:.3f} ± {gain['stderr']:.3f} bits/dim, image by image."
    folder.add_section(
        "A learned forward process",
        [
            f"{own['steps']:,} steps of training each; bits/dim, at most, on {len(data)} {setup.noun}s:",
            "",
            *table(("forward process", "bound", "reconstruction", "prior", "diffusion"), rows),
            text,
        ],
    )
    print(f"\n{text}")


class Nothing(nn.Module):
    """A(x) = B(x) = 0: the fixed forward process."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two zeros of the shape of `x`."""
        return torch.zeros_like(x), torch.zeros_like(x)


@torch.no_grad()
def forward_bound(model: LearnedForward, data: Split, setup: Setup, *, draws: int) -> Tensor:
    """(3) of `models.learned_forward` for grey values, `(n, 3)` bits/dim: reconstruction, prior, diffusion.

    Levels are stratified over the draws; the decoder is p(k | z_0) proportional to N(z_0; alpha c_k, sigma^2), with z_0
    drawn from the learned q.
    """
    decoder, found = Bins(transform=setup.transform), []
    span = model.gamma_max - model.gamma_min
    with progress.bar(total=len(data) * draws, name="bound of a forward process", unit=setup.noun) as bar:
        for first in range(0, len(data), 100):
            part = data.take(slice(first, first + 100))
            stored = part.x.to(setup.device)
            x, streams = setup.transform.centres(stored).to(torch.float32), SampleStreams(setup.options.seed, part.ids)
            low = torch.full((len(x),), model.gamma_min, dtype=torch.float64, device=x.device)
            alpha, sigma = float((-low[0]).sigmoid().sqrt()), float(low[0].sigmoid().sqrt())
            reconstruction = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            for _ in range(4):
                z = model.noised(x, low, normal(x.shape, streams, device=x.device, dtype=x.dtype))
                reconstruction = reconstruction - decoder.log_prob(stored, z, None, alpha, sigma) / 4
            u = uniform((len(x), draws), streams, device=x.device, dtype=torch.float64)
            diffusion = torch.zeros_like(reconstruction)
            for j in range(draws):
                gamma = model.gamma_min + span * (j + u[:, j]) / draws
                eps = normal(x.shape, streams, device=x.device, dtype=x.dtype)
                diffusion += span / draws * model.diffusion(x, gamma, eps).double()
                bar.update(len(x))
            found.append(torch.stack([reconstruction, model.prior(x).double(), diffusion], dim=1).cpu())
    return torch.cat(found) / (setup.dataset.dim * math.log(2))


get_config = VariationalDiffusion().get_config
