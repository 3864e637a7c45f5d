r"""The diffusion-based deep generative model, as the hierarchical VAE that it is.

    q(z_i | z_{i-1}) = N(sqrt(1 - beta) z_{i-1}, beta I),   z_0 = x
    p(z_T) = N(0, I),   p(z_{i-1} | z_i) = N(mu_i(z_i), diag v_i(z_i)),   p(x | z_1)
    -ELBO = E_q[-log p(x | z_1) + sum over i < T of log q(z_i | z_{i-1}) / p(z_i | z_{i+1}) + log q(z_T | z_{T-1}) / p(z_T)]

(Sohl-Dickstein et al. 2015, arXiv:1503.03585; with T = 5, beta = 0.6, a network for each step and a tanh decoder of unit
variance, Tomczak 2022, "Deep Generative Modeling", chapter 4.) `models.ddgm` has the bound and its two estimates.

The run trains with the sampled estimate, draws by the chain and states the bound in nats: a decoder of unit variance costs at
least log2(sqrt(2 pi) / width) bits/dim, 4.33 for 17 grey levels, which is more than log2(17) = 4.09 of no model at all. It then
trains the same model with the closed-form estimate beside it, and, with the decoder of grey values, a network that all steps
share for chains of 5 to 1,000 steps that lose as much in all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from ml_collections import ConfigDict
from torch import Tensor

from data import Dataset, Split
from data.transforms import Transform
from evaluation.pictures import save_grid, shown_channels
from models.ddgm import DDGM, Decoder, GreyGaussian, OwnSteps, SharedSteps, UnitGaussian
from numerics import Catalogue, SampleStreams, UserError, normal, require_choice, require_count, require_range
from sde_lib import TableVPSDE
from training import Callback, NegativeELBO, OneStepELBO, TrainState
from workflow import progress
from workflow.beside import seeded, train_beside
from workflow.curves import curve, read_metrics
from workflow.defaults import base_config
from workflow.draw import Drawn, Samples, draw_by
from workflow.report import table
from workflow.sections import section
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.score import Scored
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

ESTIMATORS = ("sampled", "closed_form")
DECODERS = ("gaussian", "grey")


@dataclass(frozen=True, kw_only=True)
class ConstantChain:
    """T = `steps` steps of one `beta`."""

    steps: int = 5
    beta: float = 0.6

    def __post_init__(self) -> None:
        require_count(self.steps, "steps", 2)
        require_range(self.beta, "beta", 1e-6, 1 - 1e-6)

    @property
    def betas(self) -> tuple[float, ...]:
        """beta_1 ... beta_T."""
        return (self.beta,) * self.steps

    @property
    def sde(self) -> TableVPSDE:
        """The SDE through the chain."""
        return TableVPSDE(betas=self.betas)

    def of(self, steps: int) -> ConstantChain:
        """As many steps that lose as much of x in all: the same abar_T."""
        return ConstantChain(steps=steps, beta=-math.expm1(self.steps / steps * math.log1p(-self.beta)))


CHAINS: Catalogue[ConstantChain] = Catalogue("chain", {"constant": ConstantChain})
NETWORKS: Catalogue[OwnSteps] = Catalogue("network", {"perceptrons": OwnSteps}, derived=("dim", "steps"))
OBJECTIVES: Catalogue[Any] = Catalogue("objective", {"elbo": NegativeELBO}, derived=("steps",))


class DiffusionDGM(System):
    """The hierarchical VAE with a fixed encoder."""

    name = "ddgm"
    about = (
        "The diffusion-based deep generative model: a hierarchical VAE of five steps with a network each (Sohl-Dickstein et "
        "al. 2015, arXiv:1503.03585; Tomczak 2022): its bound by two estimates, samples, and chains of up to 1,000 steps."
    )
    help: ClassVar[Mapping[str, str]] = {
        "sde.steps": "T, the steps of the chain",
        "sde.beta": "the variance that each step adds",
        "decoder": "p(x | z_1): gaussian, of unit variance, or grey, the mass in a grey value's bin",
        "beside.steps": "steps of training of the same model with the closed-form estimate; 0 for none",
        "chains.lengths": "values of T of the chains with a shared network and the decoder of grey values",
        "chains.steps": "steps of training of each of them; 0 for none",
        "chains.draws": "draws for each image's bound of each of them",
    }
    no_score = (
        "its samples come from its own chain (experiments/ddgm.py, sample.py --sampler own), and of the same chain's score "
        "from the system ddpm"
    )

    def get_config(self) -> ConfigDict:
        """The digits' settings."""
        config = base_config("ddgm")
        # the digits' bin centres from -1 to 1: 2 k / 16 - 1, not 2 k / 17 - 1
        config.data.low, config.data.high = -1.0625, 1.0625
        config.sde = section(CHAINS, "constant")
        config.model = section(NETWORKS, "perceptrons")
        config.model.class_conditional = False
        # p(x | z_1): gaussian, of unit variance; or grey, the mass in a grey value's bin, of a learned variance
        config.decoder = "gaussian"
        config.training.update({"steps": 3000, "dequantize": False, "split": "fit", "learning_rate": 1e-3})
        config.training.objective = section(OBJECTIVES, "elbo")
        config.sampling = ConfigDict({"n": config.sampling.get_ref("n")})
        # chains whose terms are averaged for each image's bound
        config.bound = ConfigDict({"draws": 16})
        # steps of training for the same model with the closed-form estimate; 0: none
        config.beside = ConfigDict({"steps": 3000})
        # T of the chains with a shared network and the decoder of grey values, and steps of training for each; 0: none
        config.chains = ConfigDict({"lengths": (5, 10, 20, 50, 100, 1000), "steps": 1500, "draws": 2})
        return config

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the chain, its networks and its bound."""
        everything = {**super().catalogues, "sde": CHAINS, "model": NETWORKS, "training.objective": OBJECTIVES}
        gone = ("model.parametrization", "model.conditioning", "sampling.sampler", "sampling.second")
        return {path: catalogue for path, catalogue in everything.items() if path not in gone}

    def chain(self, config: Config) -> ConstantChain:
        """The chain of the section `sde`."""
        made: ConstantChain = CHAINS.make(config["sde"])
        return made

    def sde(self, config: Config) -> TableVPSDE:
        """The SDE through the chain."""
        return self.chain(config).sde

    def model(  # type: ignore[override]
        self, config: Config, sde: TableVPSDE, dataset: Dataset, transform: Transform, data_std: float
    ) -> DDGM:
        """A network for each step, and the decoder that the configuration names."""
        chain, width = self.chain(config), config["model"]["width"]
        data_range = (float(config["data"]["low"]), float(config["data"]["high"]))
        decoder = decoder_of(config["decoder"], dataset, transform, data_range)
        return seeded(
            config["seed"],
            lambda: DDGM(
                OwnSteps(dim=dataset.dim, steps=chain.steps, width=width, decoder=decoder),
                chain.betas,
                decoder,
                data_range=data_range,
            ),
        )

    def objective(self, config: Config) -> NegativeELBO:
        """The negative ELBO over all steps."""
        made: NegativeELBO = OBJECTIVES.make(config["training"]["objective"])
        return replace(made, steps=self.chain(config).steps)

    def check(self, config: Config) -> None:
        """The numbers of what is beside the model."""
        require_choice(config["decoder"], "config.decoder", DECODERS)
        require_count(config["bound"]["draws"], "config.bound.draws", 2)
        require_count(config["beside"]["steps"], "config.beside.steps", 0)
        require_count(config["chains"]["steps"], "config.chains.steps", 0)
        require_count(config["chains"]["draws"], "config.chains.draws")
        for length in config["chains"]["lengths"]:
            require_count(length, "config.chains.lengths", 2)

    def callbacks(self, setup: Setup, folder: RunFolder) -> Sequence[Callback]:
        """The held-out negative ELBO by both estimates."""
        return (HeldOutBound(setup),) if setup.validation else ()

    def draw(self, run: TrainedRun) -> Mapping[str, Drawn]:
        """Samples by the chain: the means of the decoder."""
        return draw_by(run, {"chain": lambda: self.samples(run, run.setup.n)})

    @torch.no_grad()
    def samples(self, run: TrainedRun, n: int, *, first: int = 0, seed: int | None = None) -> Samples:
        """The means of the decoder at the chain's end."""
        setup, model = run.setup, model_of(run.setup)
        streams = SampleStreams(setup.options.seed if seed is None else seed, torch.arange(first, first + n))
        x = model.sample((n, *setup.dataset.event_shape), generator=streams, device=setup.device).cpu()
        return Samples(x=x, nfe=model.steps, sampler="DDGM.sample()")

    def score(self, run: TrainedRun) -> Scored | None:
        """The bound, in nats an image for the density, in bits/dim for the decoder of grey values."""
        setup, begun = run.setup, time.perf_counter()
        data = setup.dataset.split(setup.protocol.split)
        data = data.take(slice(0, setup.protocol.limit or len(data)))
        nats = bound_of(model_of(setup), data, setup, draws=setup.config["bound"]["draws"], estimator="closed_form")
        entry = entry_of(nats, model_of(setup), setup, "closed_form")
        entry |= {"split": setup.protocol.split, "seconds": time.perf_counter() - begun}
        run.folder.update_results({"bits_per_dim": entry})
        return None

    def rehearsal(self, setup: Setup) -> Setup:
        """With few draws, and two short chains."""
        c = setup.config
        few = min(4, c["chains"]["steps"])
        small = {
            "bound": {"draws": min(2, c["bound"]["draws"])},
            "beside": {"steps": min(4, c["beside"]["steps"])},
            "chains": {"lengths": tuple(c["chains"]["lengths"])[:2], "steps": few, "draws": 1},
        }
        return replace(setup, config={**c, **small})

    def effort(self, setup: Setup, images: int) -> float:
        """Calls of a network on a batch, one of training as three."""
        c = setup.config
        chains = sum(3 * c["chains"]["steps"] + c["chains"]["draws"] * length for length in c["chains"]["lengths"])
        return float(3 * c["beside"]["steps"] * self.chain(c).steps + chains + 1)

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The pictures, both estimates side by side, and the chains of other lengths."""
        lines = _pictures(run, folder)
        folder.add_section("The hierarchy", lines)
        _estimates(run, folder)
        if run.setup.config["chains"]["steps"] and run.dataset.levels is not None:
            _chains(run, folder)


def decoder_of(name: str, dataset: Dataset, transform: Transform, data_range: tuple[float, float]) -> Decoder:
    """p(x | z_1) by name, its mean within what the data can be.

    Raises:
        UserError: grey values of data that have none.
    """
    if dataset.levels is None and name == "gaussian":
        x = transform.centres(dataset.split("train").x)
        return UnitGaussian(low=float(x.min()), high=float(x.max()))
    if dataset.levels is None:
        raise UserError(f"got decoder='grey' for {dataset.name}, which has no grey levels; expected decoder='gaussian'")
    low, high = data_range
    grey = GreyGaussian(bin_width=(high - low) / dataset.levels, low=low, high=high)
    first, last = grey.mean_range
    return grey if name == "grey" else UnitGaussian(low=first, high=last)


def model_of(setup: Setup) -> DDGM:
    """The model of a run of this system."""
    model = setup.model
    assert isinstance(model, DDGM)
    return model


@torch.no_grad()
def bound_of(model: DDGM, data: Split, setup: Setup, *, draws: int, estimator: str, shown: bool = True) -> Tensor:
    """The negative ELBO of stored data, `(n, draws)` nats, its noise keyed by the samples' ids."""
    found = []
    size = max(1, min(500, 2_000_000 // (model.steps * setup.dataset.dim)))
    name = f"bound over {model.steps} steps"
    with progress.bar(total=len(data) * draws, name=name, unit=setup.noun, shown=shown) as bar:
        for first in range(0, len(data), size):
            part = data.take(slice(first, first + size))
            x = setup.transform.centres(part.x.to(setup.device)).to(torch.float32)
            streams = SampleStreams(setup.options.seed, part.ids)
            each = []
            for _ in range(draws):
                eps = normal((len(x), model.steps, *x.shape[1:]), streams, device=setup.device, dtype=torch.float32)
                terms = model.terms(x, eps, estimator=estimator)  # type: ignore[arg-type]
                each.append(terms.double().sum(dim=1).cpu())
                bar.update(len(x))
            found.append(torch.stack(each, dim=1))
    return torch.cat(found)


def entry_of(nats: Tensor, model: DDGM, setup: Setup, estimator: str) -> dict[str, Any]:
    """What results.json says of a bound `(n, draws)`: of points in the data's own units, of images in model units."""
    in_nats = isinstance(model.decoder, UnitGaussian)
    unit = "nats" if in_nats else "bits/dim"
    if setup.dataset.levels is None:
        nats = nats - setup.dataset.dim * setup.transform.log_det
    per_image = nats.mean(dim=1) / (1 if in_nats else setup.dataset.dim * math.log(2))
    n = len(per_image)
    mean, stderr = float(per_image.mean()), float(per_image.std()) / math.sqrt(n) if n > 1 else math.nan
    reason = ""
    if in_nats and setup.dataset.levels is not None:
        least = (0.5 * math.log(2 * math.pi) - setup.transform.log_det) / math.log(2)
        uniform = math.log2(setup.dataset.levels)
        reason = (
            f"a density with a decoder of unit variance, which costs at least {least:.2f} bits/dim on {setup.dataset.levels} "
            f"levels, where uniform has {uniform:.2f}: in nats"
        )
    text = (
        f"negative ELBO {mean:.3f} ± {stderr:.3f} {unit}{f' a {setup.noun}' if in_nats else ''} ({n:,} {setup.noun}s)"
    )
    return {
        "mean": mean,
        "stderr": stderr,
        "kind": "bound",
        "unit": unit,
        "reason": reason,
        "text": f"{text}; {reason}" if reason else text,
        "images": n,
        "draws": nats.shape[1],
        "estimator": estimator,
        "spread_over_draws": float(nats.std(dim=1).mean()) if nats.shape[1] > 1 else None,
    }


class HeldOutBound(Callback):
    """The negative ELBO of held-out data by both estimates, in nats, with the averaged weights and always the same noise.

    Args:
        setup: of the run.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.data = setup, setup.held_out.take(slice(0, setup.validation))

    def on_eval(self, state: TrainState) -> Mapping[str, float] | None:
        with state.averaged() as model:
            assert isinstance(model, DDGM)
            found = {
                f"nelbo_{estimator}": float(
                    bound_of(model, self.data, self.setup, draws=4, estimator=estimator, shown=False).mean()
                )
                for estimator in ESTIMATORS
            }
        return {"metric": found["nelbo_closed_form"], **found}


def _pictures(run: TrainedRun, folder: RunFolder) -> list[str]:
    """Real images and what the forward diffusion leaves of them, beside the samples."""
    setup, model = run.setup, model_of(run.setup)
    if len(setup.dataset.event_shape) != 3:
        return ["No pictures of data that are no images."]
    data = setup.dataset.split(setup.protocol.split).take(slice(0, 16))
    x = setup.transform.centres(data.x.to(setup.device)).to(torch.float32)
    eps = normal(
        (len(x), model.steps, *x.shape[1:]),
        SampleStreams(setup.options.seed, data.ids),
        device=setup.device,
        dtype=torch.float32,
    )
    zs = model.chain(x, eps)
    drawn = model.sample(
        tuple(x.shape), generator=SampleStreams(setup.options.seed, torch.arange(len(x))), device=setup.device
    )
    rows = shown_channels(torch.cat([zs[0], *zs[1:], drawn]))
    file, kept = folder.path / "samples" / "hierarchy.png", float(model.get_buffer("abar")[-1]) ** 0.5
    names = ("images", *(f"z_{i}" for i in range(1, model.steps + 1)), "samples")
    save_grid(file, setup.transform.to_unit(rows).cpu(), len(x), scale=max(1, round(24 / x.shape[-1])), rows=names)
    return [
        f"Real images, their z_1 to z_{model.steps} (noise, with {kept:.2f} x in the last), and samples from the prior down:",
        "",
        f"![hierarchy]({file.relative_to(folder.path).as_posix()})",
    ]


def _estimates(run: TrainedRun, folder: RunFolder) -> None:
    """One model by both estimates, and the same model trained with the other one."""
    setup = run.setup
    data = setup.dataset.split(setup.protocol.split)
    data = data.take(slice(0, setup.protocol.limit or len(data)))
    own, steps = setup.objective, setup.config["beside"]["steps"]
    assert isinstance(own, NegativeELBO)
    models = {own.estimator: model_of(setup)}
    if steps:
        other = next(e for e in ESTIMATORS if e != own.estimator)
        fresh = setup.system.model(setup.config, model_of(setup).sde, setup.dataset, setup.transform, 1.0)
        assert isinstance(fresh, DDGM)
        watched = (HeldOutBound(setup),) if setup.validation else ()
        models[other] = train_beside(
            setup, fresh, replace(own, estimator=other), steps=steps, folder=folder.path / "beside", callbacks=watched
        )
    found: dict[str, Any] = {}
    rows = []
    for trained, model in models.items():
        for estimator in ESTIMATORS:
            nats = bound_of(model, data, setup, draws=setup.config["bound"]["draws"], estimator=estimator)
            entry = entry_of(nats, model, setup, estimator)
            found[f"trained with {trained}, measured by {estimator}"] = entry
            # the error of the estimate on these images alone, which the choice of images is no part of
            noise = float(nats.var(dim=1).mean() / nats.shape[1] / len(nats)) ** 0.5
            rows.append(
                (
                    trained,
                    estimator,
                    f"{entry['mean']:.3f} ± {noise:.3f} {entry['unit']}",
                    f"{entry['spread_over_draws']:.2f} nats",
                    f"{setup.options.steps if trained == own.estimator else steps:,}",
                )
            )
    folder.update_results({"estimates": found})
    curves = _save_curves(folder, own.estimator)
    shown = [f"![validation]({curves})", ""] if curves else []
    folder.add_section(
        "Two estimates of one bound",
        [
            *table(
                ("trained with", "measured by", "negative ELBO (± by Monte Carlo)", "spread of one draw", "updates"),
                rows,
            ),
            *shown,
        ],
    )
    print("\nnegative ELBO")
    for row in rows:
        print(f"  trained with {row[0]}, measured by {row[1]}: {row[2]}, spread of one draw {row[3]}")


def _save_curves(folder: RunFolder, own: str) -> str | None:
    """The held-out negative ELBO in the course of both trainings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    other = next(e for e in ESTIMATORS if e != own)
    any_there = False
    for name, place in ((own, folder.path), (other, folder.path / "beside")):
        steps, values = curve(read_metrics(place), "eval/nelbo_closed_form")
        if steps:
            axes.plot(
                steps, values, marker="o", markersize=3, label=f"trained with the {name.replace('_', '-')} estimate"
            )
            any_there = True
    if not any_there:
        return None
    axes.set_xlabel("step")
    axes.set_ylabel("negative ELBO, nats")
    axes.set_title("held-out images, averaged weights", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(folder.path / "validation.png", dpi=100)
    return "validation.png"


def _chains(run: TrainedRun, folder: RunFolder) -> None:
    """Bits/dim over the number of steps, with a shared network and the decoder of grey values."""
    setup, own = run.setup, run.setup.config["chains"]
    system = setup.system
    assert isinstance(system, DiffusionDGM)
    data = setup.dataset.split(setup.protocol.split)
    data = data.take(slice(0, setup.protocol.limit or len(data)))
    data_range = model_of(setup).data_range
    decoder = decoder_of("grey", setup.dataset, setup.transform, data_range)
    base, width, dim = system.chain(setup.config), setup.config["model"]["width"], setup.dataset.dim
    found, rows = {}, []
    for length in own["lengths"]:
        chain, begun = base.of(length), time.perf_counter()
        model = seeded(
            setup.options.seed,
            lambda chain=chain: DDGM(  # type: ignore[misc]
                SharedSteps(dim=dim, betas=chain.betas, width=width), chain.betas, decoder, data_range=data_range
            ),
        )
        model = train_beside(setup, model, OneStepELBO(steps=length), steps=own["steps"])
        nats = bound_of(model, data, setup, draws=own["draws"], estimator="closed_form")
        entry = entry_of(nats, model, setup, "closed_form")
        found[str(length)] = {**entry, "beta": chain.beta, "seconds": time.perf_counter() - begun}
        rows.append((f"{length:,}", f"{chain.beta:.4g}", f"{entry['mean']:.3f} ± {entry['stderr']:.3f}"))
        print(f"  {length:,} steps of beta {chain.beta:.4g}: {entry['mean']:.3f} ± {entry['stderr']:.3f} bits/dim")
    folder.update_results({"chains": found})
    picture = _save_chains(folder, found)
    folder.add_section(
        "Chains of other lengths",
        [
            f"One network for all steps, the decoder of grey values, {own['steps']:,} steps of training for each; all chains "
            "lose as much in all:",
            "",
            *table(("T", "beta", "bits/dim, at most"), rows),
            f"![bits/dim over T]({picture})",
        ],
    )


def _save_chains(folder: RunFolder, found: Mapping[str, Mapping[str, Any]]) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lengths = [int(k) for k in found]
    axes.errorbar(
        lengths,
        [e["mean"] for e in found.values()],
        [e["stderr"] for e in found.values()],
        marker="o",
        markersize=4,
        capsize=2,
    )
    axes.set_xscale("log")
    axes.set_xlabel("T, steps of the chain")
    axes.set_ylabel("bits/dim, at most")
    axes.grid(alpha=0.25)
    figure.savefig(folder.path / "chains.png", dpi=100)
    return "chains.png"


get_config = DiffusionDGM().get_config
