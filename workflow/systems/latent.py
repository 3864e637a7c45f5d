r"""A score model in the latent space of a VAE, trained with it, against simpler priors.

    -log p(x) <= E_q[-log p(x | z)] - H(q(z | x)) + E_q[bound on -log p(z)]
    bound on -log p(z) = 1/2 integral over log_snr of E |eps - eps_hat(z_t, t)|^2 + the ends

(Vahdat, Kreis, Kautz 2021, "Score-based Generative Modeling in Latent Space", arXiv:2106.05931, in its simplest sound form: one
loss for encoder, decoder and score, with the likelihood weighting for all of them; `models.vae`.) z is small, so the score
model is an MLP, and a sample is a walk in the latent space and one decoding.

The run trains that model and states its bound in bits/dim. Beside it the same VAE is trained with N(0, I) and with a learned
mixture as its prior, and a deterministic autoencoder, which bounds nothing (kind "none"), but whose codes a score model of them
can draw. Directions of attributes in the latent space end it: the mean difference of latents with and without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from ml_collections import ConfigDict
from torch import Tensor

import samplers
from data import Dataset, Split
from data.transforms import Transform
from evaluation.pictures import save_grid, shown_channels
from likelihood import elbo
from models import MLP, VAE, MixturePrior, Preconditioned, ScoreModel, ScorePrior, StandardPrior
from models.ddgm import GreyGaussian
from models.vae import Prior
from numerics import Catalogue, SampleStreams, UserError, normal, require_choice, require_count, uniform
from samplers import Sampler
from sde_lib import SDE, VPSDE
from training import DSM, LatentELBO, LogNormal
from workflow import progress
from workflow.beside import seeded, train_beside
from workflow.defaults import base_config
from workflow.draw import Drawn, Samples, draw_by
from workflow.report import number, table
from workflow.sections import section
from workflow.setup import asks_learned_variance
from workflow.system import Config, System

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.score import Scored
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

PRIORS = ("score", "standard", "mixture")


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The sizes of encoder, decoder and prior.

    Args:
        latent: d, at most the numbers in a sample.
        width: of the hidden layers of encoder and decoder.
        score_width, score_depth: of the score model's MLP.
        components: of the mixture.
    """

    latent: int = 16
    width: int = 256
    score_width: int = 128
    score_depth: int = 3
    components: int = 50

    def __post_init__(self) -> None:
        for name in ("latent", "width", "score_width", "score_depth", "components"):
            require_count(getattr(self, name), name)


SDES: Catalogue[SDE] = Catalogue("SDE", {"vp": VPSDE})
NETWORKS: Catalogue[Networks] = Catalogue("network", {"vae": Networks})
OBJECTIVES: Catalogue[Any] = Catalogue("objective", {"latent_elbo": LatentELBO}, derived=("latent",))


class Latent(System):
    """A VAE whose prior is a score model."""

    name = "latent"
    about = (
        "A score model in the latent space of a VAE, trained jointly (LSGM in its simplest sound form: Vahdat et al. 2021, "
        "arXiv:2106.05931), against N(0, I), a mixture, and a deterministic autoencoder."
    )
    help: ClassVar[Mapping[str, str]] = {
        "prior": "prior of the codes: score, standard or mixture",
        "bound.latents": "codes drawn for each image's bound",
        "beside.steps": "steps of training for each of the other priors and the deterministic autoencoder; 0 for none",
    }
    no_score = (
        "its score is of latents: experiments/latent.py and sample.py --sampler own draw by it; images have a score in "
        "the systems vp, ve, sub_vp"
    )

    def get_config(self) -> ConfigDict:
        """The digits' settings."""
        config = base_config("latent")
        # the digits' bin centres from -1 to 1
        config.data.low, config.data.high = -1.0625, 1.0625
        # latents have no structure below the encoder's own noise, so the score stops at a noise of 0.01
        config.sde = section(SDES, "vp", t_min=1e-3, t_end=1e-3)
        config.model = section(NETWORKS, "vae")
        config.model.class_conditional = False
        # score, standard or mixture
        config.prior = "score"
        config.training.update({"steps": 4000, "dequantize": False, "learning_rate": 1e-3, "validation": 0})
        config.training.objective = section(OBJECTIVES, "latent_elbo")
        # the sampler of latents
        config.latent_sampler = section(samplers.SAMPLERS, "dpm_solver", steps=30)
        config.sampling = ConfigDict({"n": config.sampling.get_ref("n")})
        # draws of z for each image's bound, and of level and noise for each z
        config.bound = ConfigDict({"latents": 4, "draws": 16})
        # steps of training for each of the other priors and the deterministic autoencoder; 0: none
        config.beside = ConfigDict({"steps": 4000})
        return config

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the VAE's networks and bound."""
        everything = {**super().catalogues, "sde": SDES, "model": NETWORKS, "training.objective": OBJECTIVES}
        everything["latent_sampler"] = samplers.SAMPLERS
        gone = ("model.parametrization", "model.conditioning", "sampling.sampler", "sampling.second")
        return {path: catalogue for path, catalogue in everything.items() if path not in gone}

    def networks(self, config: Config) -> Networks:
        """The sizes."""
        made: Networks = NETWORKS.make({k: v for k, v in config["model"].items() if k != "class_conditional"})
        return made

    def model(self, config: Config, sde: SDE, dataset: Dataset, transform: Transform, data_std: float) -> VAE:
        """The VAE with the prior of the configuration."""
        return self.with_prior(config["prior"], config, sde, dataset)

    def with_prior(self, name: str, config: Config, sde: SDE, dataset: Dataset, deterministic: bool = False) -> VAE:
        """The same VAE, from the same first weights, with the prior of that name.

        Raises:
            UserError: data without grey levels, or a latent larger than the data.
        """
        sizes, levels = self.networks(config), dataset.levels
        if levels is None:
            raise UserError(
                f"got the system latent for {dataset.name}, which has no grey levels; expected images: its decoder is of grey "
                "values, use --config.data.name=digits"
            )
        low, high = float(config["data"]["low"]), float(config["data"]["high"])
        decoder = GreyGaussian(bin_width=(high - low) / levels, low=low, high=high)

        def make() -> VAE:
            vae = VAE(
                dim=dataset.dim,
                latent=sizes.latent,
                decoder=decoder,
                prior=StandardPrior(),
                width=sizes.width,
                deterministic=deterministic,
                data_range=(low, high),
            )
            vae.sde = sde
            vae.prior = prior_of(name, sizes, sde)
            return vae

        return seeded(config["seed"], make)

    def objective(self, config: Config) -> LatentELBO:
        """The joint bound."""
        made: LatentELBO = OBJECTIVES.make(config["training"]["objective"])
        return replace(made, latent=self.networks(config).latent)

    def check(self, config: Config) -> None:
        """The prior, and the numbers of the bound."""
        require_choice(config["prior"], "config.prior", PRIORS)
        require_count(config["bound"]["latents"], "config.bound.latents")
        require_count(config["bound"]["draws"], "config.bound.draws", 8)
        require_count(config["beside"]["steps"], "config.beside.steps", 0)
        self.latent_sampler(config)

    def latent_sampler(self, config: Config) -> Sampler:
        """The sampler of latents."""
        if config["latent_sampler"]["name"] == "none":
            raise UserError("got config.latent_sampler='none'; expected a sampler: it draws the latents")
        made: Sampler = samplers.SAMPLERS.make(config["latent_sampler"])
        if asks_learned_variance(made):
            raise UserError(
                "got variance='learned' in config.latent_sampler, whose score says none; expected 'posterior' or 'transition'"
            )
        return made

    def draw(self, run: TrainedRun) -> Mapping[str, Drawn]:
        """Latents from the prior, decoded."""
        return draw_by(run, {"prior": lambda: self.samples(run, run.setup.n)})

    def samples(self, run: TrainedRun, n: int, *, first: int = 0, seed: int | None = None) -> Samples:
        """Decoded latents from the prior; the evaluations are those of the score of latents."""
        sampler, seed = self.latent_sampler(run.setup.config), run.setup.options.seed if seed is None else seed
        streams = SampleStreams(seed, torch.arange(first, first + n))
        x, nfe = drawn_from(vae_of(run.setup), run.setup, sampler, n, streams)
        return Samples(x=x, nfe=nfe, sampler=repr(sampler))

    def score(self, run: TrainedRun) -> Scored | None:
        """The joint bound in bits/dim."""
        setup, begun = run.setup, time.perf_counter()
        parts = bound_of(vae_of(setup), _data(setup), setup)
        entry = {**entry_of(parts), "split": setup.protocol.split, "seconds": time.perf_counter() - begun}
        run.folder.update_results({"bits_per_dim": entry})
        return None

    def rehearsal(self, setup: Setup) -> Setup:
        """With few draws and steps."""
        c = setup.config
        small = {
            "bound": {"latents": 1, "draws": 8},
            "beside": {"steps": min(4, c["beside"]["steps"])},
        }
        return replace(setup, config={**c, **small})

    def effort(self, setup: Setup, images: int) -> float:
        """Steps of training, and evaluations of a batch."""
        c = setup.config
        return float(5 * c["beside"]["steps"] + c["bound"]["latents"] * c["bound"]["draws"] * images / 100 + 200)

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The other priors, the deterministic autoencoder, and directions of attributes."""
        if run.setup.config["beside"]["steps"]:
            _priors(run, folder)
            _autoencoder(run, folder)
        _attributes(run, folder)


def prior_of(name: str, sizes: Networks, sde: SDE) -> Prior:
    """p(z) by name."""
    if name == "standard":
        return StandardPrior()
    if name == "mixture":
        return MixturePrior(dim=sizes.latent, components=sizes.components)
    return ScorePrior(latent_score(sizes, sde, data_std=1.0))


def latent_score(sizes: Networks, sde: SDE, *, data_std: float) -> ScoreModel:
    """A score model of latents, which begins as that of N(0, data_std^2 I)."""
    net = MLP(sizes.latent, width=sizes.score_width, depth=sizes.score_depth)
    return ScoreModel(net, sde, Preconditioned(data_std=data_std))


def vae_of(setup: Setup) -> VAE:
    """The model of a run of this system."""
    model = setup.model
    assert isinstance(model, VAE)
    return model


def _streams(setup: Setup, n: int) -> SampleStreams:
    """Of the run's first `n` samples."""
    return SampleStreams(setup.options.seed, torch.arange(n))


def _data(setup: Setup) -> Split:
    data = setup.dataset.split(setup.protocol.split)
    return data.take(slice(0, setup.protocol.limit or len(data)))


@torch.no_grad()
def latents_from(
    prior: Prior, setup: Setup, sampler: Sampler, n: int, d: int, streams: SampleStreams
) -> tuple[Tensor, int]:
    """`n` latents `(n, d)` from a prior, and the evaluations of a score that they took."""
    if isinstance(prior, ScorePrior):
        made = sampler(prior.model.sde, prior.model, (n, d), generator=streams, device=setup.device)
        return made.x, made.nfe
    eps = normal((n, d), streams, device=setup.device, dtype=torch.float32)
    if isinstance(prior, MixturePrior):
        u = uniform((n, 1), streams, device=setup.device, dtype=torch.float32).squeeze(1)
        return prior.sample(eps, u), 0
    return eps, 0


@torch.no_grad()
def drawn_from(model: VAE, setup: Setup, sampler: Sampler, n: int, streams: SampleStreams) -> tuple[Tensor, int]:
    """`n` samples: the decoder's means at latents from the prior, on the CPU; and the evaluations of a score."""
    z, nfe = latents_from(model.prior, setup, sampler, n, model.latent, streams)
    return model.decode(z, setup.dataset.event_shape)[0].cpu(), nfe


@torch.no_grad()
def bound_of(model: VAE, data: Split, setup: Setup) -> Tensor:
    """The bound of stored data, `(n, 3)` bits/dim: -log p(x | z), minus the entropy, and the cross-entropy (or its bound)."""
    own, found = setup.config["bound"], []
    with progress.bar(total=len(data), name="joint bound", unit=setup.noun) as bar:
        for first in range(0, len(data), 100):
            part = data.take(slice(first, first + 100))
            x = setup.transform.centres(part.x.to(setup.device)).to(torch.float32)
            streams = SampleStreams(setup.options.seed, part.ids)
            total = torch.zeros(len(x), 3, dtype=torch.float64, device=x.device)
            for _ in range(own["latents"]):
                eps = normal((len(x), 3, model.latent), streams, device=x.device, dtype=torch.float32)
                u = uniform((len(x), 1), streams, device=x.device, dtype=torch.float32).squeeze(1)
                parts = list(model.parts(x, eps, u))
                if isinstance(model.prior, ScorePrior):
                    mean, log_var = model.encode(x)
                    z = mean + (log_var / 2).exp() * eps[:, 0]
                    score = model.prior.model
                    parts[2] = elbo(score.sde, score, z, draws=own["draws"], data_std=1.0, generator=streams).nats
                total += torch.stack([p.double() for p in parts], dim=1) / own["latents"]
            found.append(total.cpu())
            bar.update(len(x))
    return torch.cat(found) / (setup.dataset.dim * math.log(2))


def entry_of(parts: Tensor) -> dict[str, Any]:
    """What results.json says of a bound."""
    bits, n = parts.sum(dim=1), len(parts)
    mean, stderr = float(bits.mean()), float(bits.std()) / math.sqrt(n) if n > 1 else math.nan
    names = ("reconstruction", "minus the entropy", "cross-entropy")
    return {
        "mean": mean,
        "stderr": stderr,
        "kind": "bound",
        "unit": "bits/dim",
        "reason": "",
        "text": f"joint bound {mean:.3f} ± {stderr:.3f} bits/dim ({n:,} images)",
        "images": n,
        "parts": dict(zip(names, parts.mean(dim=0).tolist(), strict=True)),
    }


def _priors(run: TrainedRun, folder: RunFolder) -> None:
    """The same VAE with each prior: bounds and samples."""
    setup, system = run.setup, run.setup.system
    assert isinstance(system, Latent)
    own, sampler, n = setup.config["prior"], system.latent_sampler(setup.config), 16
    found, rows, images = {}, [], []
    for name in (own, *(p for p in PRIORS if p != own)):
        begun = time.perf_counter()
        model = vae_of(setup)
        if name != own:
            fresh = system.with_prior(name, setup.config, model.sde, setup.dataset)
            model = train_beside(setup, fresh, setup.objective, steps=setup.config["beside"]["steps"])
        parts = bound_of(model, _data(setup), setup)
        entry = {**entry_of(parts), "seconds": time.perf_counter() - begun}
        found[name] = entry
        updates = setup.options.steps if name == own else setup.config["beside"]["steps"]
        rows.append(
            (
                name,
                f"{number(entry['mean'])} ± {number(entry['stderr'])}",
                *(f"{v:.3f}" for v in entry["parts"].values()),
                f"{updates:,}",
            )
        )
        images.append(drawn_from(model, setup, sampler, n, _streams(setup, n))[0])
    folder.update_results({"priors": found})
    picture = folder.path / "samples" / "priors.png"
    save_grid(
        picture,
        shown_channels(setup.transform.to_unit(torch.cat(images))),
        n,
        scale=max(1, round(24 / images[0].shape[-1])),
        rows=[name for name, *_ in rows],
    )
    folder.add_section(
        "Priors",
        [
            *table(
                ("prior", "bits/dim, at most", "reconstruction", "minus the entropy", "cross-entropy", "updates"), rows
            ),
            "Samples, a row for each:",
            "",
            f"![priors]({picture.relative_to(folder.path).as_posix()})",
        ],
    )
    print("\nthe same VAE with other priors, bits/dim at most")
    for row in rows:
        print(f"  {row[0]}: {row[1]}")


def _autoencoder(run: TrainedRun, folder: RunFolder) -> None:
    """A deterministic autoencoder, and samples through a score model of its codes."""
    setup, system = run.setup, run.setup.system
    assert isinstance(system, Latent)
    steps, sizes = setup.config["beside"]["steps"], system.networks(setup.config)
    sde = vae_of(setup).sde
    fresh = system.with_prior("standard", setup.config, sde, setup.dataset, deterministic=True)
    model = train_beside(setup, fresh, setup.objective, steps=steps)
    with torch.no_grad():
        x = setup.transform.centres(setup.training_data.x.to(setup.device)).to(torch.float32)
        codes = model.encode(x)[0]
    centre, spread = codes.mean(dim=0), codes.std(dim=0).clamp(min=1e-6)
    whitened = ((codes - centre) / spread).cpu()
    score = seeded(setup.options.seed, lambda: latent_score(sizes, sde, data_std=1.0))
    pairs = Split(whitened, None, setup.training_data.ids)
    score = train_beside(setup, score, DSM(times=LogNormal(mean=-0.5, std=1.5)), steps=steps, pairs=pairs)
    sampler, n = system.latent_sampler(setup.config), min(16, len(_data(setup)))
    z, nfe = latents_from(ScorePrior(score), setup, sampler, n, sizes.latent, _streams(setup, n))
    plain, _ = latents_from(StandardPrior(), setup, sampler, n, sizes.latent, _streams(setup, n))
    with torch.no_grad():
        shape = setup.dataset.event_shape
        images = [model.decode(code * spread + centre, shape)[0].cpu() for code in (z, plain)]
        held = setup.transform.centres(_data(setup).x[:n].to(setup.device)).to(torch.float32)
        again = model.decode(model.encode(held)[0], shape)[0].cpu()
    rows = shown_channels(torch.cat([held.cpu(), again, *images]))
    picture = folder.path / "samples" / "autoencoder.png"
    names = ("held out", "reconstructed", "score of codes", "one Gaussian")
    save_grid(picture, setup.transform.to_unit(rows), n, scale=max(1, round(24 / shape[-1])), rows=names)
    reason = "a deterministic autoencoder has no density of images, and no bound on one"
    folder.update_results(
        {"autoencoder": {"bits_per_dim": {"mean": None, "kind": "none", "reason": reason}, "nfe": nfe}}
    )
    folder.add_section(
        "A deterministic autoencoder",
        [
            f"No bits/dim: {reason}. Rows: held-out images, their reconstructions, samples through a score model of the codes, "
            "and samples from one Gaussian of the codes' means and spreads:",
            "",
            f"![autoencoder]({picture.relative_to(folder.path).as_posix()})",
        ],
    )


def _attributes(run: TrainedRun, folder: RunFolder) -> None:
    """Directions in the latent space: more ink, and from each class's neighbour to it."""
    setup, model = run.setup, vae_of(run.setup)
    train = setup.training_data
    with torch.no_grad():
        x = setup.transform.centres(train.x.to(setup.device)).to(torch.float32)
        z = model.encode(x)[0]
        ink = x.flatten(1).mean(dim=1)
        directions = {"ink": _difference(z, ink > ink.median())}
        if train.labels is not None and len(known := torch.unique(train.labels)) > 1:
            for label in known.tolist()[:4]:
                name = setup.dataset.classes[label] if setup.dataset.classes else str(label)
                directions[f"class {name}"] = _difference(z, train.labels.to(z.device) == label)
        held = setup.transform.centres(_data(setup).x[:1].to(setup.device)).to(torch.float32)
        start = model.encode(held)[0]
        steps = torch.linspace(-2, 2, 9, device=z.device)
        shape = setup.dataset.event_shape
        moved = [model.decode(start + s * d, shape)[0] for d in directions.values() for s in steps]
        # how much a step of one along the first direction changes the ink of decoded images, as a check
        change = [float(model.decode(z[:500] + s * directions["ink"], shape)[0].mean()) for s in (-1.0, 0.0, 1.0)]
    lines = []
    if len(shape) == 3:
        picture = folder.path / "samples" / "attributes.png"
        save_grid(
            picture,
            shown_channels(setup.transform.to_unit(torch.cat(moved).cpu())),
            len(steps),
            scale=max(1, round(32 / shape[-1])),
            rows=list(directions),
        )
        lines = [
            f"One held-out image's latent moved by -2 to 2 mean differences: {', '.join(directions)}, a row for each.",
            "",
            f"![attributes]({picture.relative_to(folder.path).as_posix()})",
            "",
        ]
    lines.append(
        "Mean grey level of 500 decoded training images, moved by -1, 0, 1 along the ink's direction: "
        f"{', '.join(f'{v:.3f}' for v in change)}."
    )
    folder.update_results({"attributes": {"ink_at_-1_0_1": change}})
    folder.add_section("Directions of attributes", lines)


def _difference(z: Tensor, has: Tensor) -> Tensor:
    """The mean latent of those that have an attribute minus that of the others, `(d,)`; 0 where all are alike in it."""
    if bool(has.all()) or not bool(has.any()):
        return torch.zeros_like(z[0])
    return z[has].mean(dim=0) - z[~has].mean(dim=0)


get_config = Latent().get_config
