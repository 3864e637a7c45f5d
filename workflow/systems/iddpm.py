r"""Improved DDPM (Nichol and Dhariwal 2021, arXiv:2102.09672): DDPM's chain with a better table and learned variances.

    abar_i = f(i/N) / f(0),  f(u) = cos((u + s)/(1 + s) pi/2)^2,  beta_i <= 0.999          equation (17)
    log v_i = w log beta_i + (1 - w) log beta~_i,   w = (second output + 1) / 2            equation (15)
    L_hybrid = L_simple + 0.001 L_vlb, the mean held fixed in L_vlb                        equation (16)

where beta~_1, which is 0, is replaced by beta~_2. L_vlb is estimated from one step as N times its term. With
`--config.training.objective=vlb --config.training.objective.times=loss_history` the bound itself is trained, its steps drawn in
proportion to the root of their mean square loss (section 3.3).

The run draws by ancestral sampling with the learned variance, and scores by the chain's bound with it (`vlb` in results.json,
steps drawn by importance) and by the flow. A DDPM is trained beside it by the same means, in RUN/ddpm; both are then drawn
from and bounded in 10, 25, 50, 100 and 1,000 evaluations. A chain over some of the rows keeps w and has its own beta and
beta~ (section 4).

At the cosine table's end alpha is 5e-5, and the denoised mean (x - sigma eps) / alpha multiplies the network's error by
20,000. So for images the mean is clipped to the data's range wherever a chain is drawn from or bounded, as in the published
code: the images lie in that range, so the clipped chain is the better model, and its bound is a bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from ml_collections import ConfigDict

from numerics import Catalogue, SampleStreams, UserError, require_count
from samplers import ClipDenoised, Correction
from samplers.corrections import CorrectedScore
from sde_lib import TableVPSDE
from training import VLB, DiscreteTime, Hybrid, LossHistory, Objective, cosine_betas
from workflow.chain_bound import READINGS, ChainBound, clean, own_reading
from workflow.sections import section
from workflow.system import Config
from workflow.systems.ddpm import DDPM, SAMPLERS, Algorithm2

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

EVALUATIONS = (10, 25, 50, 100, 1000)
_BESIDE = 1000
"""Betas of the DDPM that is trained beside."""


@dataclass(frozen=True, kw_only=True)
class CosineChain:
    """Betas of the cosine schedule in N = `steps` steps.

    Args:
        steps: N, at least 2.
        s: keeps the first betas from being too small, from 0 on; the paper's makes the first sigma a little less than the bin
            of 256 grey levels.
        largest: no beta is larger, in (0, 1).
    """

    steps: int = 1000
    s: float = 0.008
    largest: float = 0.999

    def __post_init__(self) -> None:
        require_count(self.steps, "steps", 2)
        if not 0 <= self.s < 1:
            raise UserError(f"got s={self.s}; expected a number in [0, 1), such as the paper's 0.008")
        if not 0 < self.largest < 1:
            raise UserError(f"got largest={self.largest}; expected a number in (0, 1), such as the paper's 0.999")

    @property
    def sde(self) -> TableVPSDE:
        """The SDE through the table, from its first row on."""
        betas = cosine_betas(steps=self.steps, s=self.s, largest=self.largest)
        return TableVPSDE(betas=betas, t_min=1 / self.steps, t_end=1 / self.steps)


CHAINS: Catalogue[CosineChain] = Catalogue("chain", {"cosine": CosineChain})
STEPS: Catalogue[Any] = Catalogue(
    "time sampler", {"discrete": DiscreteTime, "loss_history": LossHistory}, derived=("levels", "zero")
)
OBJECTIVES: Catalogue[Any] = Catalogue(
    "objective",
    {"hybrid": Hybrid, "vlb": VLB},
    parts={"times": STEPS},
    derived=("t_min", "steps", "bin_width", "low", "high"),
)


class IDDPM(DDPM):
    """The cosine chain, trained with L_hybrid."""

    name = "iddpm"
    about = (
        "Improved DDPM (Nichol and Dhariwal 2021, arXiv:2102.09672): cosine betas, learned variances, the hybrid "
        "loss; the bound "
        "and samples in few steps beside DDPM's."
    )
    help: ClassVar[Mapping[str, str]] = {
        "bound.images": "images of the whole chain's bound; 0 for all of the split",
        "few_steps.evaluations": "numbers of evaluations at which both models are compared",
        "few_steps.samples": "samples for each Fréchet distance",
        "few_steps.images": "images for each bound",
        "few_steps.beside": "the system that is trained beside this one for the comparison; none for no such",
    }

    def get_config(self) -> ConfigDict:
        """The digits' settings, on a chain of 1,000 betas."""
        config = self.chain_config(section(CHAINS, "cosine"))
        config.model.learned_variance = True
        config.training.objective = section(OBJECTIVES, "hybrid")
        # of each of the two networks, so that the run stays within minutes
        config.training.steps = 600
        config.threads = 2  # a third less time on two free cores
        config.sampling.sampler = section(SAMPLERS, "ancestral", steps=99, variance="learned", spacing="linspace")
        # the whole chain's bound, the number to quote, is cheap: of all images, where the flow's likelihood takes some
        config.bound = ConfigDict({"draws": 32, "images": 0})
        # few steps beside DDPM: how many samples and images, and numbers of evaluations; None trains no DDPM
        config.few_steps = ConfigDict({"evaluations": EVALUATIONS, "samples": 96, "images": 50, "beside": "ddpm"})
        # the flow of such a chain is hard to integrate: many steps on few images, where few steps would state a large error
        config.likelihood.update({"steps": 128, "limit": 50, "draws": 1, "probes": 1})
        return config

    @property
    def catalogues(self) -> Mapping[str, Catalogue[Any]]:
        """With the chain and the two losses that teach variances."""
        return {**super().catalogues, "sde": CHAINS, "training.objective": OBJECTIVES}

    def objective(self, config: Config) -> Objective:
        """L_hybrid, or L_vlb, over the chain's steps."""
        made: VLB = self.catalogues["training.objective"].make(config["training"]["objective"])
        learned = {"variance": "learned"} if config["training"]["objective"]["name"] == "vlb" else {}
        return replace(made, steps=self.chain(config).steps, **learned)  # type: ignore[arg-type]

    def check(self, config: Config) -> None:
        """The bound's draws, the numbers of evaluations, and a network without variances."""
        require_count(config["bound"]["draws"], "config.bound.draws", 8)
        require_count(config["bound"]["images"], "config.bound.images", 0)
        asked, steps = config["few_steps"], self.chain(config).steps
        for name in ("samples", "images"):
            require_count(asked[name], f"config.few_steps.{name}", 10)
        for n in asked["evaluations"]:
            require_count(n, "config.few_steps.evaluations", 2)
            if n > steps:
                raise UserError(
                    f"got config.few_steps.evaluations={asked['evaluations']} of a chain of config.sde.steps={steps}; "
                    "expected at "
                    f"most {steps} each"
                )
            if asked["beside"] == "ddpm" and n > _BESIDE:
                raise UserError(
                    f"got config.few_steps.evaluations={asked['evaluations']} beside a DDPM of {_BESIDE} betas; expected at "
                    f"most {_BESIDE} each, or --config.few_steps.beside=none"
                )
        if asked["beside"] not in ("ddpm", "none"):
            raise UserError(f"got config.few_steps.beside={asked['beside']!r}; expected 'ddpm' or 'none'")
        if not config["model"].get("learned_variance", True):
            raise UserError(
                "got config.model.learned_variance=False for iddpm, which learns variances; expected True: the system "
                "ddpm learns none"
            )

    def settled(self, setup: Setup) -> Setup:
        """The denoised mean is clipped in every sampler, unless other corrections are asked for: at the table's end alpha is
        5e-5, so without it the first step, of an ODE solver too, goes far out of the images' range and never comes back."""
        drawn_by = {
            name: sampler if sampler.corrections else replace(sampler, corrections=clip(setup))
            for name, sampler in setup.samplers.items()
        }
        made = replace(setup, samplers=drawn_by)
        if setup.dataset.levels is None or setup.options.dequantize:
            return made
        # grey values as they are: the last term is the mass of a bin, as it is scored, and no density
        assert isinstance(setup.objective, VLB)
        width, (low, high) = math.exp(setup.transform.log_det), setup.score_model.data_range
        return replace(made, objective=replace(setup.objective, bin_width=width, low=low, high=high))

    def rehearsal(self, setup: Setup) -> Setup:
        """With few draws, evaluations, samples and images."""
        few = {"evaluations": (4, 8), "samples": 16, "images": 10, "beside": setup.config["few_steps"]["beside"]}
        return replace(setup, config={**setup.config, "bound": {"draws": 8, "images": 10}, "few_steps": few})

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of images: of the bound, of samples and of their bounds, and three of each in a step of DDPM's
        training."""
        asked = setup.config["few_steps"]
        rows = 2 if asked["beside"] == "ddpm" else 1
        trained = (rows - 1) * 3 * setup.options.steps * setup.options.batch_size
        drawn = rows * sum(asked["evaluations"]) * asked["samples"]
        own = setup.config["bound"]["images"] or len(setup.dataset.split(setup.protocol.split))
        bounds = 2 * own + (1 + 2 * rows) * len(asked["evaluations"]) * asked["images"]
        return float(trained + drawn + bounds * setup.config["bound"]["draws"])

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The chain's bound with the learned variance, and both systems in few steps."""
        from workflow.sub_run import sub_run

        config = run.setup.config
        asked = config["few_steps"]
        self.report_own_bound(run, folder)
        runs = {"iddpm": run}
        if asked["beside"] == "ddpm":
            runs["ddpm"] = sub_run(run, "ddpm", "ddpm", {"sde.steps": _BESIDE})
        self.report_few_steps(runs, folder, quick=asked["samples"] < 32)

    def report_own_bound(self, run: TrainedRun, folder: RunFolder) -> None:
        """The bound over all rows, of images of the split that is scored, in results.json."""
        from workflow.chain_levels import chain_of

        rows, draws = self.chain(run.setup.config).steps, run.setup.config["bound"]["draws"]
        chain = chain_of(run, rows=rows, evaluations=rows, variance="learned")
        data = run.dataset.split(run.setup.protocol.split)
        n = min(len(data), run.setup.config["bound"]["images"] or len(data))
        found = {}
        for reading in READINGS if run.transform.levels is not None else READINGS[1:]:
            found[reading] = bound_of(run, chain, data.x[:n], data.ids[:n], reading, draws)
        own = found[own_reading(run.setup)]
        entry = {r: {**v.asdict(), "text": str(v)} for r, v in found.items()}
        summary = {"mean": float(own.per_image.mean()), "stderr": own.stderr, "kind": "bound", "unit": "bits/dim"}
        folder.update_results({"vlb": {**summary, "variance": "learned", **entry}})
        lines = [f"- chain's bound, {reading}: {value}" for reading, value in found.items()]
        folder.add_section("The bound with the learned variance", lines)
        print("\nthe bound with the learned variance")
        for line in lines:
            print(f"  {line.removeprefix('- ')}")

    def report_few_steps(self, runs: Mapping[str, TrainedRun], folder: RunFolder, *, quick: bool) -> None:
        """FD (or SW) and bits/dim of both systems by evaluations: tables, heat maps, results.json."""
        from workflow.chain_levels import chain_of
        from workflow.sampler_table import Judge, fill, save_heat_map

        run = runs["iddpm"]
        asked, draws = run.setup.config["few_steps"], run.setup.config["bound"]["draws"]
        rows = {name: r.setup.system.chain(r.setup.config).steps for name, r in runs.items()}  # type: ignore[attr-defined]
        kinds = [
            ("iddpm", "learned"),
            ("iddpm", "posterior"),
            ("iddpm", "transition"),
            ("ddpm", "posterior"),
            ("ddpm", "transition"),
        ]
        kinds = [(name, variance) for name, variance in kinds if name in runs]
        judge = Judge.of(run.setup, asked["samples"], quick=quick)
        samplers: dict[tuple[str, int], tuple[TrainedRun, Any]] = {}
        for name, variance in kinds:
            for n in asked["evaluations"]:
                # with all rows the fixed variances of one network are near each other: one of them is enough
                if n <= 100 or (name, variance) in (("iddpm", "learned"), ("ddpm", "posterior")):
                    walk = Algorithm2(
                        steps=n - 1,
                        variance=variance,  # type: ignore[arg-type]
                        spacing="linspace",
                        corrections=clip(run.setup),
                    )
                    chain = runs[name].setup.system.chain(runs[name].setup.config)  # type: ignore[attr-defined]
                    samplers[f"{name}, {variance}", n] = (runs[name], walk.on(chain))
        drawn = fill(judge, samplers, title="ancestral sampling in few steps", head="evaluations")
        data = run.dataset.split(run.setup.protocol.split)
        x, ids = data.x[: asked["images"]], data.ids[: asked["images"]]
        reading = own_reading(run.setup)
        bounds = {}
        for name, variance in kinds:
            for n in asked["evaluations"]:
                chain = chain_of(runs[name], rows=rows[name], evaluations=n, variance=variance)
                bounds[f"{name}, {variance}", n] = bound_of(runs[name], chain, x, ids, reading, draws)
        drawn.save(folder.path / "few_steps_samples.png")
        names, columns = list(dict.fromkeys(r for r, _ in bounds)), sorted({n for _, n in bounds})
        save_heat_map(
            folder.path / "few_steps_bound.png",
            {key: float(b.per_image.mean()) for key, b in bounds.items()},
            {key: b.stderr for key, b in bounds.items()},
            rows=names,
            columns=columns,
            head="evaluations",
            title=f"bound in bits/dim, {reading}",
        )
        from workflow.report import table

        body = [
            [r, *(f"{float(bounds[r, n].per_image.mean()):.3f} ± {bounds[r, n].stderr:.3f}" for n in columns)]
            for r in names
        ]
        shown = [
            f"The chain's bound in bits/dim, of {reading}, {len(x)} images (the same for all rows):",
            "",
            *table(("evaluations", *(f"{n:,}" for n in columns)), body),
        ]
        folder.update_results(
            {
                "few_steps": {
                    "samples": drawn.asdict(),
                    "bounds": [{"row": r, "evaluations": n, **b.asdict()} for (r, n), b in bounds.items()],
                    "reading": reading,
                }
            }
        )
        folder.add_section(
            "Few steps, beside DDPM" if "ddpm" in runs else "Few steps",
            [*drawn.lines(), "![samples](few_steps_samples.png)", "", *shown, "![bounds](few_steps_bound.png)"],
        )
        print("\n" + "\n".join([*drawn.lines(), *shown]))


def clip(setup: Setup) -> tuple[Correction, ...]:
    """To the range of images; nothing for points, which have none."""
    low, high = setup.score_model.data_range
    return () if setup.dataset.levels is None else (ClipDenoised(low=low, high=high),)


def bound_of(
    run: TrainedRun, chain: Any, x: torch.Tensor, ids: torch.Tensor, reading: str, draws: int, batch_size: int = 100
) -> ChainBound:
    """The bound of stored data `(n, *)` by a chain with clipped means, image by image; noise is keyed by the image's number."""
    score = CorrectedScore.around(run.sde, run.score, clip(run.setup))
    parts = []
    for first in range(0, len(x), batch_size):
        streams = SampleStreams(run.setup.options.seed, ids[first : first + batch_size])
        x_0, grey, log_det = clean(run, x[first : first + batch_size].to(run.device), reading, streams)
        found = chain.bound(
            score,
            x_0,
            data=grey,
            transform=None if grey is None else run.transform,
            draws=draws,
            data_std=run.model.data_std or 1.0,
            generator=streams,
        )
        parts.append(ChainBound.of(found, x_0[0].numel(), log_det))
    return ChainBound.concatenate(parts)


get_config = IDDPM().get_config
