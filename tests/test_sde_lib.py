"""The contract of every SDE, and the oracles."""

import math

import pytest
import torch
from oracles import SDES

import sde_lib
from numerics import expand_as
from sde_lib import (
    FLOWS,
    VESDE,
    VPSDE,
    KernelSDE,
    PlainFlow,
    SubVPSDE,
    TableVESDE,
    TableVPSDE,
    WhitenedFlow,
    time_grids,
)
from sde_lib.analytic import EmpiricalDistribution, Gaussian, GaussianMixture

ALL_SDES = {
    **SDES,
    "vp_long": VPSDE(beta_min=0.2, beta_max=5.0, T=3.0),
    "table_vp": TableVPSDE(betas=torch.linspace(1e-4, 2e-2, 1000).tolist()),
    "table_ve": TableVESDE(sigmas=torch.logspace(-2, 1.5, 50).tolist()),
    "cosine": KernelSDE(alpha_fn=lambda t: torch.cos(1.57 * t), sigma_fn=lambda t: torch.sin(1.57 * t)),
}
each_sde = pytest.mark.parametrize("sde", ALL_SDES.values(), ids=ALL_SDES.keys())


def times(sde, n=64):
    generator = torch.Generator().manual_seed(0)
    return sde.T * (0.001 + 0.998 * torch.rand(n, generator=generator, dtype=torch.float64))


@each_sde
class TestContract:
    def test_f_and_g_are_the_derivatives_of_the_kernel(self, sde):
        """alpha' = f alpha and (sigma^2)' = 2 f sigma^2 + g^2."""
        t = times(sde).requires_grad_()
        alpha, variance = sde.alpha(t), sde.sigma(t).square()
        slope = (
            torch.autograd.grad(alpha.sum(), t)[0] if alpha.requires_grad else torch.zeros_like(alpha)
        )  # VE's alpha is a constant
        assert torch.allclose(slope, sde.f(t) * alpha, rtol=1e-9, atol=1e-12)
        (slope,) = torch.autograd.grad(variance.sum(), t)
        assert torch.allclose(slope, 2 * sde.f(t) * variance + sde.g(t).square(), rtol=1e-9, atol=1e-12)

    def test_transitions_compose(self, sde):
        """Chapman-Kolmogorov: 0 -> s -> t is 0 -> t, in mean and in variance."""
        s, t = times(sde).sort().values.chunk(2)
        x_0 = torch.ones(len(s), 3, dtype=torch.float64)
        mean_s, std_s = sde.marginal(x_0, s)
        mean_t, std_st = sde.transition(mean_s, s, t)
        factor = expand_as(sde.alpha(t) / sde.alpha(s), x_0)
        expected_mean, expected_std = sde.marginal(x_0, t)
        assert torch.allclose(mean_t, expected_mean, rtol=1e-12)
        total = (factor * std_s).square() + std_st.square()
        assert torch.allclose(total, expected_std.square(), rtol=1e-10)

    def test_time_of_log_snr_inverts(self, sde):
        t = times(sde)
        assert torch.allclose(sde.time_of_log_snr(sde.log_snr(t)), t, rtol=1e-9)
        assert bool((sde.log_snr(t.sort().values).diff() < 0).all())

    def test_coefficients_are_float64_in_the_shape_of_t(self, sde):
        for t in (torch.tensor(0.3), torch.rand(5), 0.3):
            shape = torch.as_tensor(t).shape
            for function in (sde.alpha, sde.sigma, sde.f, sde.g, sde.log_snr, sde.diffusion):
                assert function(t).shape == shape and function(t).dtype == torch.float64

    @pytest.mark.parametrize("shape", [(5, 5), (5, 1, 4, 4), (5, 2, 7)])
    def test_every_method_takes_any_event_shape_and_both_shapes_of_time(self, sde, shape):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        score = Gaussian(torch.zeros(shape[1:]), torch.ones(math.prod(shape[1:]))).score(sde)
        t = times(sde, 5)
        rows = [
            torch.cat([method(x[i : i + 1], t[i]) for i in range(5)])
            for method in (
                sde.drift,
                lambda x, t: sde.marginal(x, t)[0],
                lambda x, t: sde.transition(x, t / 2, t)[0],
                lambda x, t: sde.flow(score, x, t),
                lambda x, t: sde.reverse_drift(score, x, t),
            )
        ]
        whole = [
            sde.drift(x, t),
            sde.marginal(x, t)[0],
            sde.transition(x, t / 2, t)[0],
            sde.flow(score, x, t),
            sde.reverse_drift(score, x, t),
        ]
        for a, b in zip(rows, whole):
            assert torch.allclose(a, b, rtol=1e-12)
        with pytest.raises(ValueError, match=r"expected \(\) or \(5,\)"):
            sde.drift(x, torch.rand(4))

    def test_flow_leaves_the_oracles_density_where_it_belongs(self, sde):
        """(6): for a Gaussian the flow is linear, and moving along it keeps the whitened coordinate."""
        oracle = Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([[1.0, 0.6], [0.6, 0.5]]))
        t = times(sde, 8)
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        h = 1e-5 * sde.T
        velocity = sde.flow(oracle.score(sde), x, t)
        ahead, behind = oracle.whiten(sde, x + h * velocity, t + h), oracle.whiten(sde, x - h * velocity, t - h)
        change = (ahead - behind) / (2 * h)
        assert change.abs().max() < 1e-4 * (1 + oracle.whiten(sde, x, t).abs().max())

    def test_prior_is_a_normal_law(self, sde):
        z = sde.prior_sample((40_000, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert float(z.std() / sde.prior_std) == pytest.approx(1, abs=4.5 / math.sqrt(2 * z.numel()))
        law = torch.distributions.Normal(0.0, torch.tensor(sde.prior_std, dtype=torch.float64))
        assert torch.allclose(sde.prior_log_prob(z[:9]), law.log_prob(z[:9]).sum(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "table_vp"])
def test_sigma_keeps_its_digits_near_zero(name, dtype):
    """Against 50-digit arithmetic, at the very times that arrive."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 50
    sde = ALL_SDES[name]
    for t in (1e-8, 1e-7, 1e-6, 1e-5, 1e-3, 0.3, 1.0):
        t = torch.tensor(t, dtype=dtype)
        exact = mpmath.mpf(float(t))
        B = exact * mpmath.mpf("0.1") + exact**2 * mpmath.mpf("19.9") / 2
        if name == "table_vp":
            B = mpmath.mpf(float(sde.integral(t.double())))
        expected = {
            "vp": mpmath.sqrt(-mpmath.expm1(-B)),
            "table_vp": mpmath.sqrt(-mpmath.expm1(-B)),
            "sub_vp": -mpmath.expm1(-B),
            "ve": mpmath.mpf("0.01") * mpmath.mpf(5000) ** exact,
        }[name]
        assert abs(float(sde.sigma(t)) / float(expected) - 1) < 1e-13


def test_transition_keeps_its_digits_for_near_times():
    sde, s = VPSDE(), torch.tensor(0.5, dtype=torch.float64)
    t = s + 1e-9
    variance = float(sde.transition_std(s, t)) ** 2
    assert variance == pytest.approx(float(sde.g(s)) ** 2 * float(t - s), rel=1e-6)


def test_defaults_are_those_of_song_et_al():
    vp, ve, sub = VPSDE(), VESDE(), SubVPSDE()
    assert (vp.beta_min, vp.beta_max, ve.sigma_min, ve.sigma_max) == (0.1, 20.0, 0.01, 50.0)
    assert (vp.t_min, vp.t_end, sub.t_end, ve.t_end) == (1e-5, 1e-3, 1e-3, 1e-5)
    assert (vp.prior_std, sub.prior_std, ve.prior_std) == (1.0, 1.0, pytest.approx(50.0))
    t = times(vp)
    assert bool((sub.sigma(t) < vp.sigma(t)).all())  # what its name says


def test_tables_agree_with_their_chains():
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
    sde = TableVPSDE(betas=betas.tolist())
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(sde.alpha(steps), (1 - betas).cumprod(0).sqrt(), rtol=1e-12)
    ladder = TableVESDE(sigmas=[1.0, 0.5, 0.1])
    assert torch.allclose(
        ladder.sigma(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.1, 0.5, 1.0]).double(), rtol=1e-7
    )


def test_long_tables_are_named_by_what_tells_them_apart():
    """A protocol states its SDE: a thousand numbers in a word, and one of them changed in its last digit in another."""
    betas = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64).tolist()
    sde, same = TableVPSDE(betas=betas), TableVPSDE(betas=list(betas))
    assert repr(sde) == repr(same) and len(repr(sde)) < 150
    assert repr(sde).startswith("TableVPSDE(betas=<1000 from 0.0001 to 0.02, sha256 ") and "T=1.0, t_min=1e-05" in repr(
        sde
    )
    betas[500] = math.nextafter(betas[500], 1)
    others = [TableVPSDE(betas=betas), TableVPSDE(betas=betas[:999]), TableVPSDE(betas=same.betas, t_min=1e-3)]
    assert len({repr(sde), *map(repr, others)}) == 4
    ladder = TableVESDE(sigmas=torch.linspace(0.1, 2.0, 100).tolist())
    assert len(repr(ladder)) < 150 and repr(ladder) != repr(TableVESDE(sigmas=torch.linspace(0.1, 2.0, 101).tolist()))
    few = TableVESDE(sigmas=[1.0, 0.5, 0.1])
    assert eval(repr(few)) == few


class TestGrids:
    def test_own_times_are_a_grid_like_the_others(self):
        sde, times = VPSDE(), [0.9, 0.4, 0.1, 0.01]
        grid = time_grids.Custom(times=times)
        assert isinstance(grid, time_grids.TimeGrid) and grid.steps == 3
        assert (grid.t_start, grid.t_end) == (0.9, 0.01)
        assert grid(sde, 3).tolist() == grid.between(sde, 0.9, 0.01, 3).tolist() == times
        assert time_grids.Custom(times=times, t_start=0.9, t_end=0.01) == grid
        for options, message in (({"t_end": 0.1}, "t_end=0.1 for times"), ({"t_start": 1.0}, "t_start=1.0 for times")):
            with pytest.raises(ValueError, match=message):
                time_grids.Custom(times=times, **options)
        for steps, start in ((4, 0.9), (3, 1.0)):
            with pytest.raises(ValueError, match="expected steps=3 between these ends"):
                grid.between(sde, start, 0.01, steps)
        with pytest.raises(ValueError, match="the SDE's"):
            time_grids.Custom(times=[1.0, 1e-7])(sde, 1)

    @pytest.mark.parametrize("name", [n for n in time_grids.available() if n not in ("custom", "step_density", "ddpm")])
    def test_between_goes_from_end_to_end(self, name):
        for sde in SDES.values():
            times = time_grids.create(name).between(sde, 0.8, 0.02, 7)
            assert times.shape == (8,) and (float(times[0]), float(times[-1])) == (0.8, 0.02)
            assert bool((times.diff() < 0).all())

    def test_names_and_options_are_the_classes_own(self):
        grid = time_grids.create("karras", rho=3.0, t_end=0.01)
        assert grid == time_grids.Karras(rho=3.0, t_end=0.01)
        assert time_grids.create("custom", times=[1.0, 0.1]) == time_grids.Custom(times=[1.0, 0.1])
        for made in (grid, time_grids.Custom(times=[1.0, 0.1]), time_grids.DDPMIndices(spacing="trailing")):
            assert time_grids.create(**time_grids.describe(made)) == made
        assert list(time_grids.options("karras")) == ["t_start", "t_end", "rho"]
        assert FLOWS.create("whitened", data_std=0.5) == WhitenedFlow(data_std=0.5)
        assert sde_lib.options("ve")["sigma_max"].default == 50.0


def test_create_and_describe_are_inverse():
    for name in ("vp", "ve", "sub_vp", "table_vp"):
        described = sde_lib.describe(ALL_SDES[name])
        assert described["name"] == name
        assert sde_lib.create(**described) == ALL_SDES[name]
    with pytest.raises(ValueError, match=r"got the SDE 'vpp', did you mean 'vp'\?; expected one of vp, ve"):
        sde_lib.create("vpp")
    with pytest.raises(
        ValueError,
        match="'beta_mim' for the SDE 'vp', did you mean 'beta_min'.; expected some of beta_min, beta_max, T",
    ):
        sde_lib.create("vp", beta_mim=1.0)
    with pytest.raises(ValueError, match="betas"):
        sde_lib.create("table_vp")
    with pytest.raises(ValueError, match="class KernelSDE, which has no name"):
        sde_lib.describe(ALL_SDES["cosine"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: VPSDE(beta_min=3.0, beta_max=1.0),
        lambda: VPSDE(beta_min="a"),
        lambda: SubVPSDE(beta_max=math.inf),
        lambda: VESDE(sigma_min=0.0),
        lambda: VESDE(sigma_min="a"),
        lambda: VESDE(sigma_max=math.inf),
        lambda: VESDE(T=math.nan),
        lambda: VPSDE(t_min=None),
        lambda: VPSDE(t_min=2.0),
        lambda: TableVPSDE(betas=[0.1, 1.5]),
        lambda: TableVESDE(sigmas=[1.0, 1.0]),
        lambda: KernelSDE(alpha_fn=lambda t: 1 + t, sigma_fn=lambda t: 1 + 0 * t),
    ],
)
def test_impossible_sdes_are_refused(make):
    with pytest.raises(ValueError, match=r"^got .*expected"):
        make()


@each_sde
@pytest.mark.parametrize("t", [-0.1, 1.01, math.nan], ids=str)
def test_a_number_that_is_no_time_is_refused(sde, t):
    """In each method that takes a state; the values of a tensor are not looked at, which would make a GPU's host wait."""
    x, t = torch.zeros(3, 2), t * sde.T
    score = lambda x, t: -x
    for use in (
        lambda: sde.drift(x, t),
        lambda: sde.marginal(x, t),
        lambda: sde.perturb(x, t, x),
        lambda: sde.transition(x, 0.5, t),
        lambda: sde.transition(x, t, sde.T),
        lambda: sde.reverse_drift(score, x, t),
        lambda: sde.flow(score, x, t),
    ):
        with pytest.raises(ValueError, match=r"got t=.*; expected a time in \[0, "):
            use()
    assert sde.marginal(x, 0)[0].shape == sde.marginal(x, sde.T)[0].shape == x.shape


def oracles(shape=(2,)):
    generator = torch.Generator().manual_seed(5)
    D = math.prod(shape)
    A = torch.randn(D, D, generator=generator, dtype=torch.float64) / math.sqrt(D)
    means = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return {
        "gaussian": Gaussian(means[0], A @ A.T + 0.05 * torch.eye(D)),
        "diagonal": Gaussian(means[0], torch.linspace(0.1, 1, D)),
        "mixture": GaussianMixture(means, torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.2, 0.3, 0.5])),
        "points": EmpiricalDistribution(means),
    }


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
@pytest.mark.parametrize("name", ["gaussian", "diagonal", "mixture", "points"])
@pytest.mark.parametrize("shape", [(2,), (1, 2, 3)])
class TestOracles:
    def test_score_is_the_gradient_of_the_density(self, sde, name, shape):
        oracle = oracles(shape)[name]
        x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
        t = times(sde, 6) * 0.9 + 0.1
        (slope,) = torch.autograd.grad(oracle.log_prob(sde, x, t).sum(), x)
        assert torch.allclose(oracle.score(sde)(x.detach(), t), slope, rtol=1e-8, atol=1e-10)

    def test_samples_have_the_density_that_is_stated(self, sde, name, shape):
        """E[exp(q - log p)] = 1 for any density exp(q), here a wide normal one: the density is normalised and the samples
        are its own."""
        oracle, n, t = oracles(shape)[name], 20_000, 0.7 * sde.T
        x = oracle.marginal_sample(sde, n, t, generator=torch.Generator().manual_seed(3)).flatten(1)
        mean, cov = x.mean(dim=0), torch.cov(x.T) * 0.7
        q = torch.distributions.MultivariateNormal(mean, cov).log_prob(x)
        ratio = (q - oracle.log_prob(sde, x.reshape(n, *shape), t)).exp()
        assert float(ratio.mean()) == pytest.approx(1, abs=4.5 * float(ratio.std()) / math.sqrt(n))


@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
class TestPartsOfTheOracles:
    def test_responsibilities_are_bayes_rule(self, sde):
        law = oracles((1, 2, 3))["mixture"]
        x = torch.randn(5, 1, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        t = 0.3 * sde.T
        alone = [
            Gaussian(m, s.square()).log_prob(sde, x, t) + w.log()
            for m, s, w in zip(law.means, law.stds, law.weights, strict=True)
        ]
        expected = (torch.stack(alone, dim=1) - law.log_prob(sde, x, t).unsqueeze(1)).exp()
        assert torch.allclose(law.responsibilities(sde, x, t), expected, rtol=1e-9)

    def test_whitened_numbers_have_the_density_of_normal_ones(self, sde):
        """log p(x) = log N(z; 0, I) - 1/2 log det of the covariance."""
        for name in ("gaussian", "diagonal"):
            law = oracles((1, 2, 3))[name]
            x = torch.randn(5, 1, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            t = torch.linspace(0.1, 1, 5, dtype=torch.float64) * sde.T
            C = law.cov if law.cov.ndim == 2 else law.cov.diag()
            marginal = sde.alpha(t).square().reshape(5, 1, 1) * C
            marginal = marginal + sde.sigma(t).square().reshape(5, 1, 1) * torch.eye(6, dtype=torch.float64)
            normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
            expected = normal.log_prob(law.whiten(sde, x, t)).sum(dim=1) - marginal.logdet() / 2
            assert torch.allclose(law.log_prob(sde, x, t), expected, rtol=1e-9)


def test_oracles_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got cov of shape \(3, 3\)"):
        Gaussian(torch.zeros(2), torch.eye(3))
    with pytest.raises(ValueError, match=r"expected stds \(2,\) or \(2, 3\)"):
        GaussianMixture(torch.zeros(2, 3), torch.ones(3), torch.ones(2))


@each_sde
@pytest.mark.parametrize("flow", [WhitenedFlow(data_std=0.5), PlainFlow()])
def test_a_flow_is_the_probability_flow_in_other_variables(sde, flow):
    """x = c w: dx/dt = c' w + c (a w + b eps) du/dt is f x - g^2 score / 2."""
    t = (0.05 + 0.9 * times(sde, 16) / sde.T) * sde.T
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    oracle = Gaussian(torch.tensor([0.3, 0.0, -0.2]), torch.tensor([0.5, 1.0, 2.0]))
    score = oracle.score(sde)

    def slope(function):
        u = t.clone().requires_grad_()
        value = function(u)
        return torch.autograd.grad(value.sum(), u)[0] if value.requires_grad else torch.zeros_like(t)

    c = expand_as(flow.scale(sde, t), x)
    c_slope = expand_as(slope(lambda u: flow.scale(sde, u)), x)
    clock_slope = expand_as(slope(lambda u: flow.clock(sde, u)), x)
    a, b = (expand_as(v, x) for v in flow.coefficients(sde, t))
    w = x / c
    eps = -expand_as(sde.sigma(t), x) * score(x, t)
    assert torch.allclose(
        c_slope * w + c * (a * w + b * eps) * clock_slope, sde.flow(score, x, t), rtol=1e-8, atol=1e-9
    )
    assert torch.allclose(flow.time(sde, flow.clock(sde, t)), t, rtol=1e-9)
