"""The system of inverse problems: its measures, what it refuses, and a run of all its stages."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_experiments import called, refused

from numerics import UserError, expand_as
from samplers import DPMSolver
from sde_lib import VPSDE, Grey, Mask, Measurement
from sde_lib.analytic import Gaussian
from workflow import command_line, inverse_problems, load_run, main, systems
from workflow.configuration import config_for
from workflow.inverse_problems import (
    METHODS,
    PROBLEMS,
    Problem,
    coverage,
    psnr,
    rank_p_value,
    report_inverse,
    restore,
)
from workflow.run_folder import RunFolder
from workflow.setup import resolve
from workflow.tools import restore as restore_tool


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_coverage_and_ranks_know_draws_of_one_law():
    S, B = 9, 300
    samples, truth = draws(S, B, 1, 4, 4), draws(B, 1, 4, 4, seed=1)
    covered = coverage(samples, truth)
    assert float(covered.mean()) == pytest.approx((S - 1) / (S + 1), abs=0.02)
    assert rank_p_value(samples, truth) > 0.01
    assert float(coverage(0.5 * samples, truth).mean()) < 0.65
    assert rank_p_value(0.5 * samples, truth) < 1e-6  # too sure
    assert rank_p_value(samples + 0.5, truth) < 1e-6


def test_psnr_of_a_known_error():
    truth = torch.zeros(2, 1, 4, 4)
    assert psnr(truth + 0.2, truth, 2.0).tolist() == pytest.approx([20.0, 20.0])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_has_singular_values(name, shape):
    problem = PROBLEMS[name]
    if not problem.fits(shape):
        assert name == "colourisation" and shape[0] == 1
        return
    operator = problem.operator(shape)
    measurement = Measurement(operator, operator(draws(2, *shape).float()), 0.1)
    assert measurement.svd is not None and measurement.event_shape == shape


@pytest.mark.parametrize("method", METHODS)
def test_restoring_is_better_than_guessing(method, monkeypatch):
    """With an exact score of smooth pictures; and a seed gives the same again."""
    place = torch.arange(16, dtype=torch.float64)
    distance = (
        (place // 4).unsqueeze(0) - (place // 4).unsqueeze(1),
        (place % 4).unsqueeze(0) - (place % 4).unsqueeze(1),
    )
    cov = 0.3 * torch.exp(-(distance[0] ** 2 + distance[1] ** 2) / 8) + 0.01 * torch.eye(16)
    sde, law = VPSDE(), Gaussian(torch.zeros(1, 4, 4), cov)
    truth = law.sample(6, generator=torch.Generator().manual_seed(0)).float()
    operator = PROBLEMS["super-resolution"].operator((1, 4, 4))
    measurement = Measurement(operator, operator(truth) + 0.1 * draws(6, 1, 2, 2).float(), 0.1)
    options = {"samples": 3, "steps": 30, "seed": 0, "data_std": 0.55}
    found = restore(sde, law.score(sde), measurement, method, truth.shape, **options)
    assert found.samples.shape == (3, 6, 1, 4, 4) and found.nfe >= 30
    guess = float(psnr(torch.zeros_like(truth), truth, 2.0).mean())
    assert float(psnr(found.samples.mean(dim=0), truth, 2.0).mean()) > guess + 3
    again = restore(sde, law.score(sde), measurement, method, truth.shape, **options)
    assert torch.equal(found.samples, again.samples)
    monkeypatch.setattr(inverse_problems, "_TOGETHER", 6)  # and it is the same whatever is drawn together
    apart = restore(sde, law.score(sde), measurement, method, truth.shape, **options)
    torch.testing.assert_close(apart.samples, found.samples, rtol=0, atol=2e-3)


def told_nothing(run, folder, monkeypatch, methods, problem):
    """By method, what `report_inverse` restores of the model's own truths with a standard normal's score, and those."""
    given = Gaussian(torch.zeros(1, 8, 8), torch.eye(64)).score(run.sde)
    monkeypatch.setattr(type(run), "score", property(lambda run: given))
    monkeypatch.setattr(inverse_problems, "PROBLEMS", {"nothing": problem})
    seen, row = {}, inverse_problems._row

    def kept(name, method, test, truth, own, own_truth, *rest):
        seen[method] = (own.samples, own_truth, test.samples, truth)
        return row(name, method, test, truth, own, own_truth, *rest)

    monkeypatch.setattr(inverse_problems, "_row", kept)
    report_inverse(
        run, RunFolder(folder), images=32, samples=2, steps=6, std=1.0, methods=methods, problems=("nothing",)
    )
    return seen


def test_truths_and_samples_share_no_random_numbers(tmp_path, monkeypatch):
    """Under a measurement that says nothing they are independent. With one stream for the truth i of the model and the first
    sample of image i they were correlated by 0.5 to 0.7."""
    run = load_run(Path("pretrained/vp_digits"), "cpu")
    problem = Problem(operator=lambda shape: Mask(torch.ones(shape)), std=1e4)
    for method, (own, own_truth, test, truth) in told_nothing(
        run, tmp_path, monkeypatch, tuple(METHODS), problem
    ).items():
        for samples, x in ((own, own_truth), (test, truth)):
            for sample in samples:
                both = torch.stack([sample.flatten(), x.flatten()])
                assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / x.numel() ** 0.5, method


def test_a_workdir_that_is_a_file_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(restore_tool, "report_inverse", lambda *_, **__: pytest.fail("the work was begun"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        done = called(restore_tool.main, "--run", "pretrained/vp_digits", f"--workdir={place}", "--quiet", check=False)
        refused(done, 2, f"got the folder {place}, and {tmp_path / 'file'} is a file")


def test_problems_that_images_do_not_have_are_refused_before_the_work(tmp_path):
    run = ("--run", "pretrained/vp_digits", "--methods", "DDNM", "--quiet", f"--workdir={tmp_path / 'no'}")
    refused(called(restore_tool.main, *run, "--problems", "colourisation", check=False), 2, "(1, 8, 8)", "inpainting")
    asked = config_for("inverse", changes={"inverse.problems": ("colourisation",)})
    with pytest.raises(UserError, match=r"config\.inverse\.problems"):
        resolve(asked)
    left_out = called(restore_tool.main, *run, "--problems=inpainting", "--sr3_steps=9", check=False)
    refused(left_out, 2, "got --sr3_steps=9 without super-resolution; expected it among --problems")
    asked = config_for("inverse", changes={"inverse.problems": ("inpainting",), "inverse.sr3_steps": 2})
    with pytest.raises(UserError, match=r"config\.inverse\.sr3_steps=2 without super-resolution"):
        resolve(asked)


def test_a_split_with_fewer_images_says_how_many_there_are(tmp_path, monkeypatch):
    run, there = load_run(Path("pretrained/vp_digits"), "cpu"), 4
    few = SimpleNamespace(x=run.dataset.split("test").x[:there])
    monkeypatch.setattr(type(run.dataset), "split", lambda self, name: few)
    report_inverse(
        run,
        RunFolder(tmp_path),
        images=8,
        samples=2,
        steps=1,
        std=0.1,
        methods=("DDNM",),
        problems=("blind denoising",),
    )
    found = json.loads((tmp_path / "results.json").read_text())["inverse"]
    assert found["images"] == there and f"{there} test images" in (tmp_path / "report.md").read_text()
    (row,) = found["rows"]
    assert (
        row["told"] != row["own_told"]
        and f"{row['own_told']:.3f} of the model's own" in (tmp_path / "report.md").read_text()
    )


def colours(side=4):
    """The law of smooth colour pictures whose channels go together, `(3, side, side)`."""
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    smooth = torch.exp(-torch.cdist(place, place).square() / 8)
    channels = torch.tensor([[0.30, 0.20, 0.05], [0.20, 0.25, 0.10], [0.05, 0.10, 0.20]], dtype=torch.float64)
    cov = torch.kron(channels, smooth) + 0.01 * torch.eye(3 * side**2, dtype=torch.float64)
    return Gaussian(torch.zeros(3, side, side, dtype=torch.float64), cov)


class ExactPosteriors:
    """The score of each sample's own posterior of a centred Gaussian, by the conditional Gaussian."""

    def __init__(self, sde, law, y, A, std):
        C = law.cov
        gain = C @ A.T @ torch.linalg.inv(A @ C @ A.T + std**2 * torch.eye(len(A), dtype=torch.float64))
        self.sde, self.means = sde, y.flatten(1).double() @ gain.T
        self.values, self.vectors = torch.linalg.eigh(C - gain @ A @ C)

    def __call__(self, x, t):
        alpha, sigma = (expand_as(v, x.flatten(1)) for v in (self.sde.alpha(t), self.sde.sigma(t)))
        off = (x.flatten(1).double() - alpha * self.means) @ self.vectors
        return -((off / (alpha**2 * self.values + sigma**2)) @ self.vectors.T).reshape(x.shape).to(x.dtype)


def coloured(method, images, samples=4, steps=50, std=0.1):
    """Grey pictures of known colours, coloured: samples `(S, B, 3, 4, 4)` and truths."""
    sde, law, operator = VPSDE(), colours(), Grey()
    truth = law.sample(images, generator=torch.Generator().manual_seed(0)).float()
    seen = Measurement(operator, operator(truth) + std * draws(images, 1, 4, 4, seed=1).float(), std)
    A = operator(torch.eye(48).reshape(48, 3, 4, 4)).flatten(1).T.double()

    def exact(sde, score, some, steps, data_std):
        return DPMSolver(order=2, stochastic=True, steps=steps), ExactPosteriors(sde, law, some.y, A, std)

    options = {"samples": samples, "steps": steps, "seed": 2, "data_std": 0.5, "ways": {**METHODS, "exact": exact}}
    return restore(sde, law.score(sde), seen, method, truth.shape, **options).samples, truth


def covered(samples, truth):
    """The mean coverage and its standard error."""
    each = coverage(samples, truth)
    return float(each.mean()), float(each.std()) / len(each) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", *METHODS])
def test_colours_of_grey_pictures_are_covered_as_often_as_they_should_be(method):
    """By what is a posterior of colours; what takes y for true, or only pulls to it, is too sure (docs/guidance.md)."""
    samples, truth = coloured(method, 600)
    found, error = covered(samples, truth)
    if method in ("DPS", "Replacement", "RePaint", "DDNM"):
        assert 0.5 < found < 0.6 - 3 * error
        return
    assert abs(found - 0.6) < 3 * error
    middle = samples.mean(dim=0)
    narrow, _ = covered(middle + 0.9 * (samples - middle), truth)
    assert narrow < 0.6 - 3 * error  # a tenth too narrow would be seen


def test_unknown_methods_are_refused():
    measurement = Measurement(PROBLEMS["denoising"].operator((1, 2, 2)), torch.zeros(1, 1, 2, 2), 0.1)
    with pytest.raises(UserError, match="MomentMatching"):
        restore(VPSDE(), lambda x, t: -x, measurement, "dsp", (1, 1, 2, 2), samples=1, steps=1, seed=0, data_std=0.5)


@pytest.mark.parametrize(
    "flag",
    [
        "--config.inverse.images=1",
        "--config.inverse.std=0.0",
        "--config.inverse.methods=('dsp',)",
        "--config.inverse.steps=0",
        "--config.inverse.problems=('undoing',)",
        "--config.inverse.problems=('inpainting', 'inpainting')",
        "--config.inverse.methods=('PiGDM', 'DDNM', 'PiGDM')",
    ],
)
def test_values_that_are_refused(flag):
    with pytest.raises(UserError, match=r"config\.inverse"):
        asked = command_line.parse_system(systems.create("inverse"), [flag])
        systems.create("inverse").check(asked.config)


def test_any_run_restores_and_is_told_the_level_that_the_likelihood_finds(tmp_path):
    folder, asked = tmp_path / "restored", ("--images", 4, "--samples", 2, "--steps", 4, "--quiet")
    names = ("--problems", "denoising,blind denoising", "--methods", "DDNM,PiGDM")
    called(restore_tool.main, "--run", "pretrained/vp_digits", *asked, *names, f"--workdir={folder}")
    rows = json.loads((folder / "results.json").read_text())["inverse"]["rows"]
    assert [(row["problem"], row["method"]) for row in rows] == [
        (p, m) for p in ("denoising", "blind denoising") for m in ("DDNM", "PiGDM")
    ]
    assert all(row["std"] == 0.5 for row in rows) and all(row["told"] == 0.5 for row in rows[:2])
    # 4 x 64 numbers: the error of a standard deviation is 0.022 at least
    assert rows[2]["told"] == rows[3]["told"] != 0.5 and abs(rows[2]["told"] - 0.5) < 0.08
    assert (folder / "samples" / "inverse_blind_denoising.png").is_file()
    assert (
        "Inverse problems" in (folder / "report.md").read_text() and not Path("pretrained/vp_digits/report.md").exists()
    )
    # another problem joins them; rows of other settings are not replaced in silence
    called(
        restore_tool.main,
        "--run",
        "pretrained/vp_digits",
        *asked,
        "--problems=deblurring",
        "--methods=PiGDM",
        f"--workdir={folder}",
    )
    both = json.loads((folder / "results.json").read_text())["inverse"]["rows"]
    assert [row for row in both if row["problem"] != "deblurring"] == rows and len(both) == 5
    fewer = (
        "--run",
        "pretrained/vp_digits",
        *asked,
        "--steps=3",
        "--problems=denoising",
        "--methods=DDNM",
        f"--workdir={folder}",
    )
    refused(called(restore_tool.main, *fewer, check=False), 2, "made with steps=4", "another --workdir")
    assert json.loads((folder / "results.json").read_text())["inverse"]["rows"] == both
    bad = called(restore_tool.main, "--run", "pretrained/vp_digits", "--problems", "undoing", check=False)
    refused(bad, 2, "problems=('undoing',)", "blind denoising")
    refused(
        called(restore_tool.main, "--run", "pretrained/vp_digits", "--images", 1, check=False),
        2,
        "--images",
        "expected an integer >= 2",
    )


@pytest.mark.slow
def test_a_dry_run_restores_by_every_method(tmp_path):
    folder = tmp_path / "inverse"
    main.main(["inverse", "--dry_run", "--quiet", f"--workdir={folder}"])
    found = json.loads((folder / "results.json").read_text())["inverse"]
    problems = [name for name, problem in PROBLEMS.items() if problem.fits((1, 8, 8))]
    assert [(row["problem"], row["method"]) for row in found["rows"]] == [(p, m) for p in problems for m in METHODS]
    assert all(row["psnr"] is not None for row in found["rows"])
    assert "## Inverse problems" in (folder / "report.md").read_text()
    for name in problems:
        assert (folder / "samples" / f"inverse_{name.replace(' ', '_')}.png").is_file()
