"""Laws on a grid against closed forms."""

import math

import pytest
import torch
from oracles import mixture

from evaluation import Plane, save_plot, save_surfaces
from evaluation.pictures import Panel, _reach
from numerics import UserError
from sde_lib import VESDE

SDE = VESDE(sigma_min=1e-4, sigma_max=10.0)
PLANE = Plane(half=5.0, n=200)


def log_density(law, sigma=0.0):
    t = float(SDE.time_of_log_snr(torch.tensor(-2 * math.log(sigma), dtype=torch.float64))) if sigma else 0.0
    return lambda x: law.log_prob(SDE, x, t)


def test_an_energy_gets_its_normaliser():
    law = PLANE.law(lambda x: log_density(mixture())(x) - 3.25)
    assert law.log_z == pytest.approx(-3.25, abs=1e-9) and float(law.mass.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(law.log_p.flatten(), log_density(mixture())(PLANE.points), rtol=0, atol=1e-9)


def test_noise_and_its_score_are_those_of_the_mixture():
    sigma = 0.3
    q, score = PLANE.law(log_density(mixture())).blurred(sigma)
    exact = log_density(mixture(), sigma)
    y = PLANE.points.requires_grad_()
    (slope,) = torch.autograd.grad(exact(y).sum(), y)
    seen = (q.log_p > -12).flatten()
    torch.testing.assert_close(
        q.log_p.flatten()[seen], exact(PLANE.points)[seen], rtol=0, atol=1e-6
    )  # the oracle has sigma_min too
    torch.testing.assert_close(score.reshape(-1, 2)[seen], slope[seen], rtol=0, atol=1e-5)


def test_divergences_of_gaussians():
    """N(0, v) against N(m, u): Fisher and KL in closed form."""
    v, u, m = 0.5, 0.8, 0.4
    p = PLANE.law(lambda x: -x.square().sum(1) / (2 * v))
    q = PLANE.law(lambda x: -(x - m).square().sum(1) / (2 * u))
    of_p, of_q = p.field(lambda x: -x / v), p.field(lambda x: -(x - m) / u)
    expected = 2 * (v * (1 / v - 1 / u) ** 2 + (m / u) ** 2)
    assert p.fisher(of_p, of_q) == pytest.approx(expected, rel=1e-6)
    assert p.kl(q) == pytest.approx(math.log(u / v) + (v + m**2) / u - 1, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Plane(half=-1.0), "half"),
        (lambda: PLANE.law(lambda x: x.square().sum(1)), "at the edges"),
        (lambda: PLANE.law(lambda x: -x.sum(1).sqrt()), "not bounded"),
        (lambda: PLANE.law(log_density(mixture())).blurred(0.01), "take a larger n"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_what_no_panel_shows_is_cut_off():
    """The square holds all values above the floor, and all points, and is never larger than the grid."""
    law = Plane(half=10.0, n=201).law(lambda x: -x.square().sum(1) / 2)
    values = {"p": law.log_p - law.log_p.max()}
    assert _reach(values, {}, 10.0, above=-8.0) == pytest.approx(1.1 * 4.0, abs=0.12)  # |x|^2 / 2 = 8
    assert _reach(values, {"p": torch.tensor([[0.0, -6.0]])}, 10.0, above=-8.0) == pytest.approx(6.6)
    assert _reach(values, {"p": torch.tensor([[0.0, 60.0]])}, 10.0, above=-8.0) == 10.0


def test_pictures_are_written(tmp_path):
    law = PLANE.law(log_density(mixture()))
    surfaces, cloud = {"p": law.log_p, "q": law.log_p}, {"p": torch.zeros(3, 2)}
    save_surfaces(tmp_path / "a.png", surfaces, 5.0, points=cloud, span=8.0, unit="nats")
    save_surfaces(tmp_path / "c.png", {str(i): law.log_p for i in range(5)}, 5.0)
    save_plot(tmp_path / "b.png", [Panel(title="t", x="x", y="y", lines={"l": ([1, 2], [3, 4])}, log="xy")])
    assert all((tmp_path / f).stat().st_size > 1000 for f in ("a.png", "b.png", "c.png"))
