r"""Pictures of a process on points in the plane: both ways with some particles' paths, and the means of its reverse steps.

The law of the data is known (`Dataset.log_prob`), so the exact score of every noised marginal is known too, by quadrature:
the density on a fine grid is a mixture of narrow Gaussians, one a cell, whose noised marginals are closed forms
(`sde_lib.analytic`). Beside the network's stands that law's own mean of a reverse step,

    E[x_s | x_t] = (x_t + v score(x_t, t)) / a,    x_t = a x_s + sqrt(v) z,   a = alpha_t / alpha_s

which is Tweedie's formula for the transition from s to t.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data import Dataset
from data.transforms import Transform
from numerics import SampleStreams, expand_as, mix
from samplers import Ancestral, DDPMIndices, PredictorCorrector
from sde_lib import SDE, Score
from sde_lib.analytic import GaussianMixture
from workflow import progress

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.trained_run import TrainedRun

_FRAMES, _POINTS, _FOLLOWED, _TRAIL = 48, 1000, 10, 8
_TIMES = (0.05, 0.15, 0.4, 0.8)
"""Of T, at which means of reverse steps are compared."""


def law_on_grid(dataset: Dataset, transform: Transform, *, cells: int = 200) -> GaussianMixture | None:
    """The data's law in model units as a mixture of one narrow Gaussian a cell of a grid; None where its density is not known.

    The cells cover the training data and a tenth of their width around them. Each has the density's mass at its middle and the
    standard deviation h / sqrt(12) of a uniform law on its side h; cells of less than 1e-9 of the largest mass are left out.
    """
    if dataset.log_prob is None or dataset.event_shape != (2,):
        return None
    x = transform(dataset.split("train").x).double()
    low, high = x.amin(dim=0), x.amax(dim=0)
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    h = (high - low) / cells
    axes = [low[k] + h[k] * (torch.arange(cells, dtype=torch.float64) + 0.5) for k in range(2)]
    middles = torch.cartesian_prod(*axes)
    log_mass = dataset.log_prob(transform.inverse(middles)).double()
    kept = log_mass > log_mass.max() + math.log(1e-9)
    mass = (log_mass[kept] - log_mass.max()).exp()
    return GaussianMixture(middles[kept], (h / math.sqrt(12)).expand(int(kept.sum()), 2), mass)


def in_parts(score: Score, size: int = 50) -> Score:
    """The same score for a large batch, in parts: a mixture of many components takes memory for each."""

    def whole(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([score(a, b) for a, b in zip(torch.split(x, size), torch.split(t, size), strict=True)])

    return whole


def reverse_mean(sde: SDE, score: Score, x: Tensor, t: float, s: float) -> Tensor:
    """The mean of p(x_s | x_t) at `x` `(B, *)`, (x + v score) / a."""
    at, to = (torch.full((len(x),), v, dtype=torch.float64, device=x.device) for v in (t, s))
    v = sde.transition_std(to, at).square()
    return (x + expand_as(v, x) * score(x, at)) / expand_as(sde.alpha(at) / sde.alpha(to), x)


def report_process(run: TrainedRun, folder: RunFolder, *, steps: int) -> None:
    """Draws `process.gif` and `reverse_means.png`, and says how far the network's means are off.

    Args:
        steps: rows of the run's table.
    """
    times = moments(run.sde, steps)
    forward, backward = forward_path(run, times), reverse_path(run, times, steps)
    save_process(folder.path / "process.gif", forward, backward, times)
    lines = [
        f"The data on their way to noise, and noise on its way back by ancestral sampling; the paths of {_FOLLOWED} particles:",
        "",
        "![process](process.gif)",
    ]
    law = law_on_grid(run.dataset, run.transform)
    if law is not None:
        found = compare_means(run, law, rows=steps)
        save_means(folder.path / "reverse_means.png", found)
        errors = {f"{f['t']:g}": f["rms"] for f in found}
        lines += [
            "",
            "The step of a particle's mean from t to t / 2, by the network and by the data's own law; the "
            "root mean square",
            "difference in units of the step's standard deviation: "
            + ", ".join(f"{error:.3f} at t = {t}" for t, error in errors.items())
            + ".",
            "",
            "![means](reverse_means.png)",
        ]
        folder.update_results({"reverse_means": errors})
    folder.add_section("The process both ways", lines)


def moments(sde: SDE, rows: int) -> Tensor:
    """Times of frames `(K,)`, rising from t_min to T, rows of the table; more of them near the data, where shapes are."""
    u = torch.linspace(0, 1, _FRAMES, dtype=torch.float64)
    found = sorted({round(1 + float(v) ** 1.5 * (rows - 1)) for v in u})
    return torch.tensor(found, dtype=torch.float64) * (sde.T / rows)


def forward_path(run: TrainedRun, times: Tensor) -> Tensor:
    """`(K, n, 2)` states of the SDE itself at the `times` `(K,)`: a path, not separate draws."""
    sde = run.sde
    generator = torch.Generator().manual_seed(mix("forward path", run.setup.options.seed))
    x_0 = run.transform(run.dataset.split("test").x[:_POINTS]).double()
    x = sde.perturb(x_0, times[0], torch.randn(x_0.shape, generator=generator, dtype=torch.float64))
    path = [x]
    for s, t in zip(times[:-1], times[1:], strict=True):
        z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = sde.alpha(t) / sde.alpha(s) * x + sde.transition_std(s, t) * z
        path.append(x)
    return torch.stack(path)


def reverse_path(run: TrainedRun, times: Tensor, rows: int) -> Tensor:
    """`(K, n, 2)` states of ancestral sampling at the `times` `(K,)`, from the last to the first."""
    sampler = PredictorCorrector(
        predictor=Ancestral(), corrector=None, steps=rows - 1, grid=DDPMIndices(train_steps=rows), denoise=False
    )
    kept: list[Tensor] = []
    wanted = set((rows - times * (rows / run.sde.T)).round().long().tolist())

    def keep(info: Any) -> None:
        if info.step in wanted:
            kept.append(info.x.double().cpu())

    streams = SampleStreams(run.setup.options.seed, range(_POINTS))
    shape = (_POINTS, *run.dataset.event_shape)
    x_T = run.sde.prior_sample(shape, generator=streams, device=run.device)
    with torch.no_grad():
        sampler(run.sde, run.score, shape, x_T=x_T, generator=streams, callback=keep)
    return torch.stack([x_T.double().cpu(), *kept])


def save_process(file: Path, forward: Tensor, backward: Tensor, times: Tensor, *, seconds: float = 6.0) -> None:
    """Writes both ways side by side as a moving picture; of a followed particle's way the last frames are shown.

    Args:
        forward, backward: `(K, n, 2)`, the second from noise to data.
        times: `(K,)`, rising; the second is at them downwards.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    K, followed = len(times), min(_FOLLOWED, forward.shape[1])
    reach = 1.15 * float(torch.quantile(torch.cat([forward[0], forward[-1]]).abs().flatten(), 0.998))
    figure = Figure(figsize=(7, 3.7))
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.07, top=0.92, wspace=0.12)
    canvas: Any = FigureCanvasAgg(figure)
    sides = []
    for axes in figure.subplots(1, 2):
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes.tick_params(labelsize=7)
        cloud = axes.scatter([], [], s=3, linewidths=0, color="0.45")
        ways = [axes.plot([], [], color=f"C{j}", linewidth=0.9, alpha=0.7)[0] for j in range(followed)]
        heads = axes.scatter([], [], s=18, c=[f"C{j}" for j in range(followed)][:0], zorder=3)
        sides.append((axes, cloud, ways, heads))
    frames = []
    with progress.bar(total=K, name="drawing the process", unit="frame") as bar:
        for k in range(K):
            titles = (f"data to noise, t = {float(times[k]):.2f}", f"noise to data, t = {float(times[K - 1 - k]):.2f}")
            for (axes, cloud, ways, heads), path, title in zip(sides, (forward, backward), titles, strict=True):
                cloud.set_offsets(path[k].numpy())
                for j, way in enumerate(ways):
                    way.set_data(*path[max(0, k - _TRAIL) : k + 1, j].T.numpy())
                heads.set_offsets(path[k, :followed].numpy())
                heads.set_color([f"C{j}" for j in range(followed)])
                axes.set_title(title, fontsize=10)
            canvas.draw()
            frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()).quantize(48))
            bar.update(1)
    file.parent.mkdir(parents=True, exist_ok=True)
    durations = [max(20, round(800 * seconds / K))] * (K - 1) + [round(200 * seconds)]
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def compare_means(run: TrainedRun, law: GaussianMixture, *, rows: int, points: int = 300) -> list[dict[str, Any]]:
    """At each of some times: points of the marginal, the two means of a step to t / 2, and how far they differ.

    Args:
        rows: of the run's table; times are rounded to them.
    """
    sde, exact, found = run.sde, in_parts(law.score(run.sde)), []
    streams = SampleStreams(run.setup.options.seed, range(points))
    for row in dict.fromkeys(max(2, round(fraction * rows)) for fraction in _TIMES):
        t, s = (sde.T * r / rows for r in (row, max(1, row // 2)))
        x = law.marginal_sample(sde, points, t, generator=streams)
        with torch.no_grad():
            learned = reverse_mean(sde, run.score, x.to(run.device, torch.float32), t, s).double().cpu()
        known = reverse_mean(sde, exact, x, t, s)
        std = float(sde.transition_std(torch.tensor(s), torch.tensor(t)) * sde.sigma(s) / sde.sigma(t))
        rms = float((learned - known).square().sum(dim=1).mean().sqrt()) / std
        found.append({"t": t, "s": s, "x": x, "learned": learned, "exact": known, "rms": rms})
    return found


def save_means(file: Path, found: list[dict[str, Any]]) -> None:
    """Draws what `compare_means` found: arrows from x_t to the mean of x_s, the network's, the law's, and the first less the
    second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.1 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, one in zip(figure.subplots(len(found), 3, squeeze=False), found, strict=True):
        x = one["x"].numpy()
        moves = (
            (one["learned"] - one["x"], "the network"),
            (one["exact"] - one["x"], "the data's law"),
            (one["learned"] - one["exact"], f"difference, {one['rms']:.3f} sd"),
        )
        for axes, (move, title) in zip(row, moves, strict=True):
            color = move.norm(dim=1).numpy()
            largest = float(moves[1][0].norm(dim=1).max())
            axes.quiver(
                x[:, 0],
                x[:, 1],
                *move.T.numpy(),
                color,
                angles="xy",
                scale_units="xy",
                scale=1,
                width=0.005,
                clim=(0, largest),
            )
            axes.set(aspect="equal")
            axes.set_title(f"{title}; t = {one['t']:.2f} to {one['s']:.2f}", fontsize=9)
            axes.tick_params(labelsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
