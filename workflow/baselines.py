"""What simple densities reach in bits/dim, so that a score model's number has something beside it.

A single Gaussian and a mixture of ten full-covariance Gaussians are fitted to dequantised training images and scored on
dequantised test images, like the model; the per-pixel histograms give every grey value of every pixel its own
probability. What there is to choose (how much a covariance is regularised, how much a histogram is smoothed) is chosen
on the validation split.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from data import Dataset
from numerics import UserError


def bits_per_dim_of_baselines(dataset: Dataset, seed: int = 0) -> dict[str, float]:
    """Test bits/dim of the three, for a data set with grey levels (no histograms above 256): ten seconds for digits."""
    levels = dataset.levels
    if levels is None:
        raise UserError(f"got {dataset.name}, which has no grey levels; expected images")
    fit, validation, test = (dataset.split(name).x.flatten(1).numpy() for name in ("fit", "validation", "test"))
    # more levels than samples say nothing of each level
    histograms = {"per-pixel histograms": _histograms(fit, validation, test, levels)} if levels <= 256 else {}
    return {
        **histograms,
        "one Gaussian": _mixture(fit, validation, test, 1, seed),
        "ten full-covariance Gaussians": _mixture(fit, validation, test, 10, seed),
    }


def _histograms(fit: np.ndarray, validation: np.ndarray, test: np.ndarray, levels: int) -> float:
    D = fit.shape[1]
    counts = np.stack([np.bincount(fit[:, i], minlength=levels) for i in range(D)])

    def bits(images: np.ndarray, smoothing: float) -> float:
        p = (counts + smoothing) / (counts.sum(axis=1, keepdims=True) + smoothing * levels)
        return float(-np.log2(p[np.arange(D), images]).mean())

    best = min((0.03, 0.1, 0.3, 1.0, 3.0), key=lambda s: bits(validation, s))
    return bits(test, best)


def _mixture(fit: np.ndarray, validation: np.ndarray, test: np.ndarray, components: int, seed: int) -> float:
    from sklearn.mixture import GaussianMixture

    noise = torch.Generator().manual_seed(seed)

    def dequantized(images: np.ndarray) -> np.ndarray:
        noisy: np.ndarray = images + torch.rand(images.shape, generator=noise, dtype=torch.float64).numpy()
        return noisy

    fit_v, validation_v, test_v = dequantized(np.tile(fit, (2, 1))), dequantized(validation), dequantized(test)
    models = [
        GaussianMixture(components, reg_covar=reg, random_state=seed, max_iter=50).fit(fit_v)
        for reg in (0.03, 0.1, 0.3)
    ]
    best = max(models, key=lambda m: m.score(validation_v))
    return float(-best.score(test_v) / (test.shape[1] * math.log(2)))
