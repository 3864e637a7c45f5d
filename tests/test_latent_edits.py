"""Latent edits and SDEdit on laws whose flow and posterior are known."""

import math

import pytest
import torch
from oracles import SDES, gaussian

from likelihood import Method, attribute_direction, decode, edit_latents, encode, slerp_grid
from likelihood.latent import slerp
from numerics import Dopri5, SampleStreams, UserError
from samplers import DDIM, Custom, EulerMaruyama, PredictorCorrector, sdedit
from sde_lib import VPSDE
from sde_lib.analytic import Gaussian

LAW, METHOD = gaussian(), Method(Dopri5(rtol=1e-8, atol=1e-8))
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def data(n, seed=0):
    return LAW.sample(n, generator=torch.Generator().manual_seed(seed))


@each_sde
def test_changes_of_latents_are_the_flows_own_map(sde):
    """On a Gaussian the flow is affine, and whitening both ends is the identity."""
    x, d = data(3), torch.tensor([0.7, -0.3], dtype=torch.float64) * sde.prior_std
    found = edit_latents(sde, LAW.score(sde), x, [lambda z: z, lambda z: z + 2 * d, lambda z: 0.5 * z], method=METHOD)
    assert found.x.shape == (3, 3, 2) and bool(found.converged.all())
    assert float(found.round_trip_error.max()) < 1e-5
    torch.testing.assert_close(found.x[0], x, atol=1e-5, rtol=0)
    whitened = LAW.whiten(sde, encode(sde, LAW.score(sde), x, method=METHOD).x, sde.T)
    shift = LAW.whiten(sde, found.latent[1], sde.T) - whitened
    torch.testing.assert_close(LAW.whiten(sde, found.x[1], sde.t_min) - whitened, shift, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        LAW.whiten(sde, found.x[2], sde.t_min), LAW.whiten(sde, found.latent[2], sde.T), atol=1e-4, rtol=0
    )


def test_labels_go_along():
    class Own:
        """Scores of N(m_i, 1), one mean a sample."""

        def __init__(self, means):
            self.means = means

        def __call__(self, x, t):
            sde = VPSDE()
            return sde.alpha(t).unsqueeze(1) * self.means - x  # alpha^2 + sigma^2 = 1

        def take(self, index):
            return Own(self.means[index])

    means = torch.tensor([[-2.0], [1.0], [4.0]], dtype=torch.float64)
    found = edit_latents(VPSDE(), Own(means), means + 0.5, [lambda z: z, lambda z: z - 1.0], method=METHOD)
    torch.testing.assert_close(found.x[1], means - 0.5, atol=0.05, rtol=0)  # the latents of N(m, 1) are x - m, at T


def test_an_attributes_direction():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.tensor([3.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 0.0])
    has_a, has_b = (torch.rand(20000, generator=generator) < 0.5 for _ in range(2))
    z = torch.randn(20000, 4, generator=generator) + has_a.unsqueeze(1) * a + has_b.unsqueeze(1) * b
    found = attribute_direction(z, has_a)
    assert float((found - a).abs().max()) < 5 * 2 * 1.5 / math.sqrt(20000)
    shaped = attribute_direction(z.reshape(-1, 2, 2), has_a)
    torch.testing.assert_close(shaped.flatten(), found)
    for given in (has_a.tolist(), has_a.numpy()):
        assert torch.equal(attribute_direction(z, given), found)
    clean = attribute_direction(z, has_a, orthogonal_to=[b, 2 * b + a])
    assert abs(float(clean @ b)) < 1e-4 and abs(float(clean @ a)) < 1e-4
    alone = attribute_direction(z, has_a, orthogonal_to=[b])
    torch.testing.assert_close(alone, found - b * (found @ b) / (b @ b), atol=1e-5, rtol=1e-5)
    short = attribute_direction(z, has_a, orthogonal_to=[1e-20 * b, 2 * b + a])
    torch.testing.assert_close(short, clean)
    for bad, words in (
        ((z, has_a.float()), "booleans"),
        ((z, has_a[:3]), "booleans"),
        ((z, [[True], [False, True]]), "booleans"),
        ((z, torch.ones(20000, dtype=torch.bool)), "some of each"),
    ):
        with pytest.raises(UserError, match=words):
            attribute_direction(*bad)
    with pytest.raises(UserError, match="orthogonal"):
        attribute_direction(z, has_a, orthogonal_to=[b[:2]])


def test_a_grid_between_four_data():
    sde, corners = VPSDE(), data(4)
    found = slerp_grid(sde, LAW.score(sde), corners, 3, 5, method=METHOD)
    assert found.x.shape == (3, 5, 2) and found.round_trip_error.shape == (4,) and bool(found.converged.all())
    ends = torch.stack([found.x[0, 0], found.x[0, -1], found.x[-1, 0], found.x[-1, -1]])
    torch.testing.assert_close(ends, corners, atol=1e-5, rtol=0)
    z = found.latent
    middle = decode(sde, LAW.score(sde), z[1, 2].unsqueeze(0), method=METHOD).x
    torch.testing.assert_close(found.x[1, 2], middle[0], atol=1e-6, rtol=0)

    edge = slerp(z[0, :1], z[0, -1:], 0.25)
    torch.testing.assert_close(z[0, 1], edge[0])
    between = slerp(slerp(z[0, :1], z[0, -1:], 0.75), slerp(z[2, :1], z[2, -1:], 0.75), 0.5)
    torch.testing.assert_close(z[1, 3], between[0])
    with pytest.raises(UserError, match="3 corners"):
        slerp_grid(sde, LAW.score(sde), corners[:3], 3, 5)
    with pytest.raises(UserError, match="rows=1"):
        slerp_grid(sde, LAW.score(sde), corners, 1, 5)
    for change, words in (
        (lambda z: z[:2], "shape"),
        (lambda z: z * math.nan, "not finite from a change"),
        (lambda z: None, "NoneType from a change"),
    ):
        with pytest.raises(UserError, match=words):
            edit_latents(sde, LAW.score(sde), corners, [change])


def test_a_change_that_writes_into_its_latents_changes_no_other():
    sde, x = VPSDE(), data(4)
    both = edit_latents(sde, LAW.score(sde), x, [lambda z: z.mul_(0.5), lambda z: z], method=METHOD)
    torch.testing.assert_close(both.x[1], x, atol=1e-4, rtol=0)
    assert float((both.x[0] - x).abs().max()) > 0.1


class TestSDEdit:
    @each_sde
    @pytest.mark.parametrize("log_snr", [-1.0, 1.5])
    def test_the_law_of_the_result(self, sde, log_snr):
        """On N(0, v) data the result given x is Gaussian: mean g x and variance v sigma^2 / V + (v alpha / V)^2 sigma^2, with
        V = alpha^2 v + sigma^2 and g = v alpha^2 / V."""
        v, n = 0.5, 4000
        law = Gaussian(torch.zeros(1), torch.full((1,), v))
        t = float(sde.time_of_log_snr(log_snr))
        a, s = float(sde.alpha(t)), float(sde.sigma(t))
        V = a**2 * v + s**2
        sampler = PredictorCorrector(predictor=EulerMaruyama(), corrector=None, steps=400)
        x = torch.full((n, 1), 1.5, dtype=torch.float64)
        found = sdedit(sampler, sde, law.score(sde), x, t_start=t, generator=SampleStreams(0))
        mean, variance = v * a**2 / V * 1.5, v * s**2 / V + (v * a / V * s) ** 2
        assert abs(float(found.x.mean()) - mean) < 4 * math.sqrt(variance / n) + 0.01
        assert abs(float(found.x.var()) / variance - 1) < 4 * math.sqrt(2 / n) + 0.02
        assert math.isclose(float(found.distance.square().mean()), float((found.x - x).square().mean()), rel_tol=1e-4)

    def test_from_t_end_up_nothing_changes_and_refusals(self):
        sde, x = VPSDE(), data(5)
        near = sdedit(DDIM(steps=5), sde, LAW.score(sde), x, t_start=2e-3, generator=SampleStreams(0))
        same = sdedit(DDIM(steps=5), sde, LAW.score(sde), x, t_start=torch.tensor(2e-3), generator=SampleStreams(0))
        torch.testing.assert_close(same.x, near.x)
        assert float(near.distance.max()) < 0.1
        for sampler, t, words in (
            (DDIM(steps=5), 1e-4, "t_start"),
            (DDIM(steps=5), 2.0, "time in"),
            (DDIM(steps=5), -1.0, "t_start=-1"),
            (DDIM(grid=Custom(times=(1.0, 0.5, 0.1))), 0.5, "rule"),
        ):
            with pytest.raises(UserError, match=words):
                sdedit(sampler, sde, LAW.score(sde), x, t_start=t)
        with pytest.raises(UserError, match="floating"):
            sdedit(DDIM(steps=5), sde, LAW.score(sde), x.long(), t_start=0.5)
