r"""The variational bound of a trained chain, in bits/dim, term by term.

    L_T + sum over i >= 2 of L_{i-1} + L_0        (Ho et al. 2020, arXiv:2006.11239, equations (5), (8) and (13))

with the posterior variance, over the very chain that was trained. It is read in two ways:

    of grey values          x_0 is the middle of each grey value's bin, L_0 the mass of a Gaussian in that bin: the paper's
    of dequantised images   x_0 has uniform noise in the bin, L_0 is a Gaussian density: what the flow's number is of, too

A network trained on dequantised images knows no grey values. Where sigma_1 is far below the bin's width w, the first reading
then pays KL(N(c, sigma_1^2) || uniform on the bin) = log(w / (sigma_1 sqrt(2 pi e))) for saying where in its bin x_1 is, and
the second gets it back through L_0: 1.51 bits/dim for 17 levels in [-1, 1] and sigma_1 = 0.01.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from likelihood import Bound, UniformDequantizer, elbo
from likelihood.bounds import DiscretizedGaussian
from numerics import SampleStreams
from workflow import progress
from workflow.chunks import Chunks
from workflow.report import number

if TYPE_CHECKING:
    from workflow.run_folder import RunFolder
    from workflow.setup import Setup
    from workflow.trained_run import TrainedRun

READINGS = ("grey values", "dequantised images")


def own_reading(setup: Setup) -> str:
    """The reading to quote: of what the network was trained on. With noise inside the grey values' bins it knows nothing of the
    values themselves."""
    return READINGS[int(setup.transform.levels is None or setup.options.dequantize)]


@dataclass(frozen=True, kw_only=True)
class ChainBound:
    """The bound of a set of images, from its terms in bits/dim.

    Attributes:
        terms: `(n, 3)`, L_T, sum of L_{i-1}, and L_0, of each image.
        errors: `(n, 2)`, the standard errors of the last two by Monte Carlo.
        heavy_tailed: `(n,)`, does an image's bar rest on few of its draws?
        nfe: evaluations of the score, for each image.
    """

    terms: Tensor
    errors: Tensor
    heavy_tailed: Tensor
    nfe: int

    @classmethod
    def of(cls, parts: Bound, dimensions: int, log_det: float) -> ChainBound:
        """From a bound in nats; `log_det` of the transform in nats a dimension, where a density was scored."""
        bits = dimensions * math.log(2)
        terms = torch.stack([parts.prior, parts.diffusion, parts.reconstruction - dimensions * log_det], dim=1) / bits
        errors = torch.stack([parts.diffusion_stderr, parts.reconstruction_stderr], dim=1) / bits
        return cls(terms=terms.cpu(), errors=errors.cpu(), heavy_tailed=parts.heavy_tailed.cpu(), nfe=parts.nfe)

    @classmethod
    def concatenate(cls, parts: Sequence[ChainBound]) -> ChainBound:
        """The bounds of several batches as one."""
        terms, errors, heavy = (torch.cat([getattr(p, n) for p in parts]) for n in ("terms", "errors", "heavy_tailed"))
        return cls(terms=terms, errors=errors, heavy_tailed=heavy, nfe=parts[0].nfe)

    @property
    def per_image(self) -> Tensor:
        """`(n,)`."""
        return self.terms.sum(dim=1)

    @property
    def stderr(self) -> float:
        """Of the mean, the spread over images and Monte Carlo together; NaN for one image."""
        return float(self.per_image.std()) / math.sqrt(len(self.terms)) if len(self.terms) > 1 else math.nan

    @property
    def monte_carlo_stderr(self) -> float:
        """What of it is due to the draws of step and noise."""
        return float(self.errors.square().sum().sqrt()) / len(self.terms)

    def asdict(self) -> dict[str, Any]:
        L_T, L, L_0 = self.terms.mean(dim=0).tolist()
        return {
            "mean": float(self.per_image.mean()),
            "stderr": self.stderr,
            "monte_carlo_stderr": self.monte_carlo_stderr,
            "terms": {"L_T": L_T, "L_1 + ... + L_(N-1)": L, "L_0": L_0},
            "images": len(self.terms),
            "heavy_tailed": int(self.heavy_tailed.sum()),
            "nfe": self.nfe,
        }

    def __str__(self) -> str:
        L_T, L, L_0 = self.terms.mean(dim=0).tolist()
        few = int(self.heavy_tailed.sum())
        tail = f"; the bars of {few:,} rest on few draws: take more" if few else ""
        return (
            f"{float(self.per_image.mean()):.3f} ± {self.stderr:.3f} bits/dim (Monte Carlo {self.monte_carlo_stderr:.3f}; "
            f"L_T {L_T:.4f}, sum of L_1 to L_(N-1) {L:.3f}, L_0 {L_0:.3f}; "
            f"{len(self.terms):,} images, {self.nfe} evaluations{tail})"
        )


def bound(
    run: TrainedRun, data: Tensor, reading: str, *, steps: int, draws: int, generator: SampleStreams
) -> ChainBound:
    """The bound of stored data `(B, *)`: grey values, or points, which have the second reading only.

    Args:
        steps: transitions between the chain's rows, N - 1: from t_1 = 1/N to T in equal parts. The reconstruction from x_1 is
            L_0.
        draws: of step and noise, for each image.
    """
    sde, transform, D = run.sde, run.transform, data[0].numel()
    x_0, grey, log_det = clean(run, data, reading, generator)
    decoder = None if grey is None else DiscretizedGaussian(transform=transform)
    parts = elbo(
        sde,
        run.score,
        x_0,
        decoder=decoder,
        data=grey,
        draws=draws,
        steps=steps,
        t_min=sde.t_min,
        data_std=run.model.data_std,
        generator=generator,
    )
    return ChainBound.of(parts, D, log_det)


def clean(run: TrainedRun, data: Tensor, reading: str, generator: SampleStreams) -> tuple[Tensor, Tensor | None, float]:
    """The x_0 `(B, *)` of stored data `(B, *)` in a reading, the grey values to be scored, if any, and the log-determinant
    that a density pays."""
    transform = run.transform
    if reading == "grey values":
        return transform.centres(data).to(torch.float32), data, 0.0  # a probability, not a density
    x_0 = transform.centres(data)
    if transform.levels is not None:
        x_0, _ = UniformDequantizer()(data, transform, run.sde, run.sde.t_min, generator=generator)
    return x_0.to(torch.float32), None, transform.log_det


def score_bound(run: TrainedRun, reading: str, *, steps: int, draws: int) -> tuple[ChainBound, Path]:
    """The bound of the images that the flow's number is of, in fixed chunks that are kept, and the folder of its parts."""
    protocol, seed = run.setup.protocol, run.setup.options.seed
    data = run.dataset.split(protocol.split)
    n = min(len(data), protocol.limit or len(data))
    size = protocol.batch_size or n
    stated = {
        "reading": reading,
        "split": protocol.split,
        "draws": draws,
        "steps": steps,
        "times": "by importance",
        "chunk": size,
        "sde": repr(run.sde),
        "model": run.fingerprint,
        "data": run.dataset.fingerprint,
        "images": n,
        "seed": seed,
        "torch": torch.__version__,
    }
    chunks = Chunks(run.folder.path / "vlb", reading.replace(" ", "_"), stated, n, size)
    with progress.bar(total=n, initial=chunks.done, name=f"bound of {reading}", unit=run.setup.noun) as bar:
        for k, first, last in chunks.todo(alone=True):
            ids = data.ids[first:last]
            part = bound(
                run,
                data.x[first:last].to(run.device),
                reading,
                steps=steps,
                draws=draws,
                generator=SampleStreams(seed, ids),
            )
            chunks.save(k, ids=ids, terms=part.terms, errors=part.errors, heavy_tailed=part.heavy_tailed, nfe=part.nfe)
            bar.update(last - first)
    parts = chunks.load("terms", "errors", "heavy_tailed", also=("nfe",), ids=data.ids)
    terms, errors, heavy = (
        torch.cat([torch.from_numpy(p[name]) for p in parts]) for name in ("terms", "errors", "heavy_tailed")
    )
    return ChainBound(terms=terms, errors=errors, heavy_tailed=heavy, nfe=int(parts[0]["nfe"])), chunks.folder


def report_bound(run: TrainedRun, folder: RunFolder, *, steps: int, draws: int) -> None:
    """Scores a run by the bound, beside its flow: in results.json, report.md and on the terminal."""
    begun = time.perf_counter()
    scores: dict[str, dict[str, Any]] = {}
    for reading in READINGS if run.transform.levels is not None else READINGS[1:]:
        result, parts = score_bound(run, reading, steps=steps, draws=draws)
        where = parts.relative_to(folder.path).as_posix()
        scores[reading] = {**result.asdict(), "text": str(result), "parts": where}
    own = scores[own_reading(run.setup)]
    entry = {"mean": own["mean"], "stderr": own["stderr"], "kind": "bound", "unit": "bits/dim", **scores}
    seconds = time.perf_counter() - begun
    results = folder.update_results({"vlb": {**entry, "split": run.setup.protocol.split, "seconds": seconds}})
    flow = results["bits_per_dim"]
    rows = [(f"chain's bound, {reading}", value["text"]) for reading, value in scores.items()]
    rows.append(
        ("flow of the SDE view, dequantised images", f"{number(flow['mean'])} ± {number(flow['stderr'])} bits/dim")
    )
    folder.add_section("One network, two models", [f"- {name}: {text}" for name, text in rows])
    print("\none network, two models: the chain and the flow")
    for name, text in rows:
        print(f"  {name}: {text}")
