r"""DDIM (Song, Meng, Ermon 2020, arXiv:2010.02502): DDPM's network, walked in few steps with or without noise.

    x_s = alpha_s D + sqrt(sigma_s^2 - w^2) eps + w z                                             equation (12)
    w = eta sqrt((1 - abar_s)/(1 - abar_t)) sqrt(1 - abar_t/abar_s),    abar = alpha^2            equation (16)

eta = 0 is deterministic, eta = 1 is DDPM's ancestral sampling. The network is trained as DDPM's. The run then makes the paper's
table 1 on its own data: eta 0, 0.2, 0.5, 1 and the larger variance sigma^ ("DDPM, sigma^" there) over 10 to 1,000
evaluations. It encodes test images by the loop walked backwards and by a solver of the flow, at the same cost, and says how
far each comes back; and it walks between two latents along a great circle (section 5.3). Scored as DDPM is by the flow;
DDIM's own chains have DDPM's objective and no likelihood of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from ml_collections import ConfigDict

from likelihood.latent import slerp
from numerics import Adams, SampleStreams, UserError, require_count, require_range
from samplers import DDIM, DDPMIndices, ProbabilityFlow, Sampler
from sde_lib import WhitenedFlow
from sde_lib.time_grids import Logistic
from workflow.sections import section
from workflow.system import Config
from workflow.systems.ddpm import CHAINS, DDPM, OBJECTIVES, SAMPLERS, Algorithm2

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun


class DDIMSystem(DDPM):
    """DDPM's chain and training; DDIM's steps."""

    name = "ddim"
    about = (
        "DDIM (Song, Meng, Ermon 2020, arXiv:2010.02502): one DDPM network drawn from with eta from 0 to 1 in 10 to "
        "1,000 steps; "
        "encoding and interpolation."
    )
    help: ClassVar[Mapping[str, str]] = {
        "sweep.eta": "values of eta",
        "sweep.evaluations": "numbers of evaluations",
        "sweep.all": "a further number of evaluations, for eta 0 and 1 alone",
        "sweep.samples": "samples for each Fréchet distance",
        "encoding.evaluations": "evaluations each way of a round trip",
        "encoding.images": "images that make the round trip",
        "encoding.pairs": "pairs of latents between which is interpolated",
        "encoding.between": "pictures of each interpolation",
    }

    def get_config(self) -> ConfigDict:
        """DDPM's settings, drawn from in 50 steps without noise."""
        config = self.chain_config(section(CHAINS, "ddpm"))
        config.training.objective = section(OBJECTIVES, "ddpm_simple")
        config.sampling.sampler = section(
            SAMPLERS, "ddim", steps=49, grid={"name": "ddpm", "spacing": "linspace", "train_steps": 1000}
        )
        # the sweep: eta; evaluations of the network, and those of eta 0 and 1 alone; samples a cell
        config.sweep = ConfigDict(
            {"eta": (0.0, 0.2, 0.5, 1.0), "evaluations": (10, 20, 50, 100), "all": 1000, "samples": 200}
        )
        # the round trip: evaluations each way, images; and pairs of latents between which there are so many steps
        config.encoding = ConfigDict({"evaluations": (10, 20, 50, 100, 200), "images": 64, "pairs": 6, "between": 9})
        # the flow of such a chain is hard to integrate: many steps on few images, where few steps would state a large error
        config.likelihood.update({"steps": 256, "limit": 100, "draws": 1, "probes": 1})
        return config

    def check(self, config: Config) -> None:
        """The sweep's and the encoding's numbers, against the chain."""
        steps, sweep, encoding = self.chain(config).steps, config["sweep"], config["encoding"]
        for name in ("sampler", "second"):
            grid = (config["sampling"][name] or {}).get("grid") or {}
            if grid.get("name") == "ddpm" and grid["train_steps"] != steps:
                raise UserError(
                    f"got train_steps={grid['train_steps']} for a chain of config.sde.steps={steps}; expected the same: "
                    f"--config.sampling.{name}.grid.train_steps={steps}"
                )
        for eta in sweep["eta"]:
            require_range(eta, "config.sweep.eta", 0, 1)
        require_count(sweep["samples"], "config.sweep.samples", 10)
        for name in ("images", "pairs", "between"):
            require_count(encoding[name], f"config.encoding.{name}", 2)
        all_of = (sweep["all"],) if sweep["all"] else ()
        for part, numbers, most in (
            ("sweep", (*sweep["evaluations"], *all_of), steps),
            ("encoding", encoding["evaluations"], steps - 1),
        ):
            for n in numbers:
                require_count(n, f"config.{part}.evaluations", 2)
                if n > most:
                    raise UserError(
                        f"got {n} evaluations in config.{part} on a chain of config.sde.steps={steps}; expected at most {most}"
                    )

    def rehearsal(self, setup: Setup) -> Setup:
        """With few evaluations and samples."""
        sweep = {**setup.config["sweep"], "evaluations": (4, 8), "all": 0, "samples": 16}
        encoding = {"evaluations": (4, 8), "images": 4, "pairs": 2, "between": 3}
        return replace(setup, config={**setup.config, "sweep": sweep, "encoding": encoding})

    def effort(self, setup: Setup, images: int) -> float:
        """Evaluations of images: of the sweep, of encoding and of interpolation."""
        sweep, encoding = setup.config["sweep"], setup.config["encoding"]
        drawn = (len(sweep["eta"]) + 1) * sum(sweep["evaluations"]) + 2 * sweep["all"]
        back = 4 * sum(encoding["evaluations"]) * encoding["images"]
        return float(drawn * sweep["samples"] + back + 50 * encoding["pairs"] * encoding["between"])

    def finish(self, run: TrainedRun, folder: RunFolder) -> None:
        """The sweep, the round trip and the interpolation."""
        self.report_sweep(run, folder)
        self.report_encoding(run, folder)
        self.report_interpolation(run, folder)

    def walk(self, config: Config, evaluations: int, eta: float, **options: Any) -> DDIM:
        """DDIM in that many evaluations, over rows of the chain as equally spaced as whole numbers allow; the last one gives
        D."""
        grid = DDPMIndices(train_steps=self.chain(config).steps, spacing="linspace")
        return DDIM(steps=evaluations - 1, eta=eta, grid=grid, **options)

    def report_sweep(self, run: TrainedRun, folder: RunFolder) -> None:
        """Eta by evaluations: table and heat map."""
        from workflow.sampler_table import Judge, fill

        config = run.setup.config
        sweep, chain = config["sweep"], self.chain(config)
        asked: dict[tuple[str, int], tuple[TrainedRun, Sampler]] = {}
        for eta in sweep["eta"]:
            more = (sweep["all"],) if sweep["all"] and eta in (0, 1) else ()
            for n in (*sweep["evaluations"], *more):
                asked[f"eta {eta:g}", n] = (run, self.walk(config, n, eta))
        for n in sweep["evaluations"]:
            larger = Algorithm2(steps=n - 1, variance="transition", spacing="linspace")
            asked["sigma^", n] = (run, larger.on(chain))
        judge = Judge.of(run.setup, sweep["samples"], quick=sweep["samples"] < 32)
        found = fill(judge, asked, title="DDIM by eta and evaluations", head="evaluations")
        found.save(folder.path / "ddim_sweep.png")
        folder.update_results({"ddim_sweep": found.asdict()})
        folder.add_section("Eta and the number of steps", [*found.lines(), "![sweep](ddim_sweep.png)"])
        print("\n" + "\n".join(found.lines()))

    def report_encoding(self, run: TrainedRun, folder: RunFolder) -> None:
        """Test data to latents and back, by the loop walked backwards and by a solver of the flow at the same cost."""
        from workflow.report import table

        config = run.setup.config
        encoding = config["encoding"]
        x = run.transform.centres(run.dataset.split("test").x[: encoding["images"]].to(run.device)).to(torch.float32)
        entries = []
        for n in encoding["evaluations"]:
            loop = self.walk(config, n + 1, 0.0, denoise=False)
            flow = ProbabilityFlow(
                solver=Adams(steps=n - 1, points=3, start="rising"),
                flow=WhitenedFlow(data_std=run.flow.data_std),
                grid=Logistic(),
                denoise=False,
            )
            entries.append({"evaluations": n, "loop": _round_trip(run, x, loop), "flow": _round_trip(run, x, flow)})
        noun = run.setup.noun
        lines = [
            f"{len(x)} test {noun}s to their latents and back, in so many evaluations each way; root mean square "
            "error an entry, "
            f"in model units, where the data's standard deviation is {run.flow.data_std:.3g}.",
            "",
            *table(
                ("evaluations each way", "DDIM's loop", "a solver of the flow"),
                [(str(e["evaluations"]), f"{e['loop']:.2g}", f"{e['flow']:.2g}") for e in entries],
            ),
        ]
        folder.update_results({"encoding": entries})
        folder.add_section("There and back", lines)
        print("\n" + "\n".join(lines))

    def report_interpolation(self, run: TrainedRun, folder: RunFolder) -> None:
        """A picture of what lies between pairs of latents, a row each."""
        from workflow.pictures import save_samples

        encoding = run.setup.config["encoding"]
        pairs, between = encoding["pairs"], encoding["between"]
        shape = (pairs, *run.dataset.event_shape)
        z = [
            run.sde.prior_sample(
                shape, generator=SampleStreams(run.setup.options.seed + k, range(pairs)), device=run.device
            )
            for k in (1, 2)
        ]
        latents = torch.stack([slerp(z[0], z[1], i / (between - 1)) for i in range(between)], dim=1).flatten(0, 1)
        evaluations = min(50, self.chain(run.setup.config).steps)
        walk = self.walk(run.setup.config, evaluations, 0.0)
        with torch.no_grad():
            x = walk(run.sde, run.score, latents.shape, x_T=latents).x.cpu()
        picture = folder.path / "interpolation.png"
        if len(run.dataset.event_shape) == 3:
            from evaluation.pictures import save_grid, shown_channels

            unit = shown_channels(run.transform.to_unit(x))
            save_grid(picture, unit, between, scale=max(1, round(40 / x.shape[-1])))
        else:
            save_samples(picture, x, run.setup)
        folder.add_section(
            "Between two latents",
            [f"{pairs} pairs of latents, {between} places on the great circle, {evaluations} evaluations, no noise:", "",
             f"![interpolation]({picture.name})"],
        )  # fmt: skip


def _round_trip(run: TrainedRun, x: torch.Tensor, sampler: DDIM | ProbabilityFlow) -> float:
    """The root mean square error an entry of `x` after encoding and sampling without noise."""
    with torch.no_grad():
        encoded = sampler.encode(run.sde, run.score, x)
        latent = encoded if isinstance(encoded, torch.Tensor) else encoded.x
        back = sampler(run.sde, run.score, tuple(x.shape), x_T=latent.to(torch.float32)).x
    return float((back - x).double().square().mean().sqrt())


get_config = DDIMSystem().get_config
