"""The exact log-likelihood of two images under a published code's network: see the reference folder's README."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from likelihood import Exact, encode, log_likelihood, pilot_grid
from models import load_score_sde
from numerics import Adams, Dopri5

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "nll_vp"

pytestmark = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the reference numbers (../shared/reference/nll_vp) are absent"
)


def reference() -> tuple:
    """The model, the images `(2, 1, 8, 8)`, and the known values."""
    model = load_score_sde(REFERENCE / "checkpoint.pth", REFERENCE / "config.json").eval()
    with np.load(REFERENCE / "nll.npz") as known:
        values = {name: torch.from_numpy(known[name]) for name in ("data", "log_prob", "prior_logp")}
    return model, values["data"].float(), values


def test_one_latent_has_the_prior_density_of_the_reference():
    """The flow without its trace, which costs a hundredth."""
    model, x, known = reference()
    found = encode(model.sde, model, x[:1], solver=Dopri5(rtol=1e-5, atol=1e-5), t_min=1e-5)
    assert float(model.sde.prior_log_prob(found.x)) == pytest.approx(float(known["prior_logp"][0]), abs=0.02)


@pytest.mark.slow
def test_one_image_with_the_exact_trace_on_a_coarse_grid():
    """64 steps were measured to be 1.8e-3 bits/dim off."""
    model, x, known = reference()
    pilot = (0.6 * torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    grid = pilot_grid(model.sde, model, pilot)
    found = log_likelihood(
        model.sde, model, x[:1], divergence=Exact(), solver=Adams(steps=64, points=4), grid=grid, t_min=1e-5
    )
    assert float((found.log_prob - known["log_prob"][:1]).abs()) / (64 * math.log(2)) < 5e-3
