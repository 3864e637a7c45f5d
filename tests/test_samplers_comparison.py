"""The comparison of samplers: budgets, the same noise for all, measures and pictures."""

from __future__ import annotations

import json
import math

import pytest
import torch
from oracles import mixture

import data
from evaluation.sampler_comparison import compare_samplers, dataset_quality, flow_error
from samplers import DDIM, DDNM, DPMSolver, HeunEDM, ProbabilityFlow, SampleStreams
from sde_lib import VPSDE, Mask, Measurement
from sde_lib.analytic import EmpiricalDistribution

SDE = VPSDE()


def test_the_flow_error_falls_with_the_budget_and_faster_for_higher_orders() -> None:
    score = mixture().score(SDE)
    x_T = mixture().marginal_sample(SDE, 30, SDE.T, generator=torch.Generator().manual_seed(0))
    seen = []
    comparison = compare_samplers(
        SDE,
        score,
        {"ddim": DDIM(), "dpm_solver": DPMSolver(), "heun": HeunEDM(), "flow": ProbabilityFlow(denoise=True)},
        (30, 2),
        nfe=(2, 21, 41),
        quality=flow_error(SDE, score, x_T),
        x_T=x_T,
        batch_size=8,
        progress=seen.append,
    )
    rows = {(row.name, row.budget): row for row in comparison.rows}
    assert list(comparison.rows) == seen
    # 2 evaluations are no step of Heun's method; an adaptive method runs once
    assert [(row.name, row.budget) for row in comparison.rows] == [
        *(("ddim", n) for n in (2, 21, 41)),
        *(("dpm_solver", n) for n in (2, 21, 41)),
        *(("heun", n) for n in (21, 41)),
        ("flow", None),
    ]
    assert all(row.nfe == row.budget for row in comparison.rows if row.budget is not None)
    error = {key: row.quality["flow error"].value for key, row in rows.items()}
    assert error["ddim", 21] / error["ddim", 41] == pytest.approx(2, abs=0.3)
    assert error["dpm_solver", 21] / error["dpm_solver", 41] > 3
    assert error["flow", None] < 1e-3
    assert rows["ddim", 41].code == "DDIM(steps=40)"
    text = str(comparison).splitlines()
    assert len(text) == 10
    assert text[0].split()[:3] == ["sampler", "nfe", "seconds"]
    json.dumps(comparison.to_dict())


def test_all_methods_start_from_the_same_noise_whatever_the_batch() -> None:
    score = mixture().score(SDE)
    runs = [
        compare_samplers(
            SDE, score, {"a": DDIM(eta=1.0), "b": DDIM(eta=0.5)}, (9, 2), nfe=(5,), batch_size=size, seed=3
        )
        for size in (9, 4)
    ]
    for a, b in zip(runs[0].rows, runs[1].rows, strict=True):
        assert float((a.samples - b.samples).abs().max()) < 1e-5
    alone = DDIM(eta=1.0, steps=4)(SDE, score, (9, 2), generator=SampleStreams(3))
    assert float((runs[0].rows[0].samples - alone.x).abs().max()) < 1e-5


def test_a_samplers_measurements_go_along_with_the_batches() -> None:
    y = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = DDNM(measurement=Measurement(Mask([1, 0]), y, 0.0))
    found = [
        compare_samplers(SDE, mixture().score(SDE), {"ddnm": sampler}, (9, 2), nfe=[5], batch_size=n).rows[0].samples
        for n in (9, 4)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1][:, 0].double(), y[:, 0], rtol=0, atol=1e-5)


def test_against_a_data_set_with_pictures(tmp_path) -> None:
    digits = data.create("digits")
    transform = data.Rescale(levels=digits.levels)
    train = digits.split("train").x[:200]
    score = EmpiricalDistribution(transform.centres(train)).score(SDE)
    comparison = compare_samplers(
        SDE,
        score,
        {"ddim": DDIM(), "dpm_solver": DPMSolver()},
        (40, 1, 8, 8),
        nfe=(10, 30),
        quality=dataset_quality(digits, transform, measures=("SW",)),
    )
    (key,) = comparison.rows[0].quality
    assert key.startswith("SW[")
    assert all(math.isfinite(row.quality[key].value) for row in comparison.rows)
    comparison.save_plot(tmp_path / "quality.png")
    comparison.save_contact_sheet(tmp_path / "sheet.png", columns=8)
    from PIL import Image

    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 2 * (8 * 9 + 1) and sheet.size[1] == 2 * (4 * 9 + 1)  # the rows' names beside them
    with Image.open(tmp_path / "quality.png") as plot:
        assert plot.size[0] > 500


def test_bad_input() -> None:
    score = mixture().score(SDE)
    for options in ({"nfe": ()}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least one sampler"):
            compare_samplers(SDE, score, {"ddim": DDIM()}, (4, 2), **options)
    with pytest.raises(ValueError, match="at least one sampler"):
        compare_samplers(SDE, score, {}, (4, 2))
    with pytest.raises(ValueError, match="which is one step"):
        compare_samplers(SDE, score, {"heun": HeunEDM()}, (4, 2), nfe=(1, 2))
    with pytest.raises(ValueError, match="expected shape"):
        compare_samplers(SDE, score, {"ddim": DDIM()}, (4, 2), x_T=torch.zeros(3, 2))
    with pytest.raises(data.DataError, match="no measure"):
        compare_samplers(SDE, score, {"ddim": DDIM()}, (4, 2), nfe=(5,)).save_plot("nowhere.png")
    with pytest.raises(ValueError, match="as x_T"):
        flow_error(SDE, score, torch.zeros(3, 2))(torch.zeros(4, 2))
