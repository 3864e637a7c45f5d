"""A run's bound over the levels of its chain: `bound_levels.png`, an entry of results.json and a section of report.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from likelihood import GaussianChain
from numerics import SampleStreams
from samplers import DDPMIndices
from workflow.bound_levels import levels_of, save_levels
from workflow.chain_bound import clean, own_reading

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.trained_run import TrainedRun


def chain_of(run: TrainedRun, *, rows: int, evaluations: int, variance: str) -> GaussianChain:
    """The chain over `evaluations` of the `rows` of a run's table, from its first row to its last, as equally spaced as whole
    numbers allow."""
    grid = DDPMIndices(train_steps=rows, spacing="linspace")
    times = grid(run.sde, evaluations - 1).flip(0)
    return GaussianChain(sde=run.sde, times=times, variance=variance)  # type: ignore[arg-type]


def report_levels(
    run: TrainedRun, folder: RunFolder, variances: Mapping[str, str], *, rows: int, draws: int, images: int
) -> None:
    """Measures and draws the terms of the bound, of what the network was trained on.

    Args:
        variances: the chain's, by the name to show.
        rows: N of the run's table.
        draws: of image and noise for each level; images: of the split from which they are drawn.
    """
    reading = own_reading(run.setup)
    data = run.dataset.split(run.setup.protocol.split)
    few = data.x[:images].to(run.device)
    seed = run.setup.options.seed
    x_0, grey, log_det = clean(run, few, reading, SampleStreams(seed, data.ids[:images]))
    found = {}
    for name, variance in variances.items():
        chain = chain_of(run, rows=rows, evaluations=rows, variance=variance)
        found[name] = levels_of(
            chain,
            run.score,
            x_0,
            data=grey,
            transform=None if grey is None else run.transform,
            log_det=log_det,
            draws=draws,
            generator=torch.Generator(device=run.device).manual_seed(seed),
        )
    picture = folder.path / "bound_levels.png"
    save_levels(picture, found, chain.times)
    folder.update_results({"bound_levels": {"reading": reading, **{name: v.asdict() for name, v in found.items()}}})
    lines = [
        f"- {name}: {v.total:.3f} ± {v.stderr:.3f} bits/dim over {chain.steps + 2:,} terms, {draws} draws of image "
        "and noise each"
        for name, v in found.items()
    ]
    folder.add_section(
        "The bound term by term",
        [f"Of {reading}, {len(few)} of the {run.setup.protocol.split} split, by the variance of p(x_s | x_t):", "", *lines, "",
         f"![bound by level]({picture.name})"],
    )  # fmt: skip
    print("\nthe bound term by term")
    for line in lines:
        print(f"  {line.removeprefix('- ')}")
