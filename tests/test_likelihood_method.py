"""One method for everything: what it resolves, obeys and refuses; names; the companions' error; data without grey levels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracles import SDES, gaussian, mixture

import likelihood
from data.transforms import Rescale, Standardize
from likelihood import (
    Coloured,
    Exact,
    Hutchinson,
    Method,
    NoDequantization,
    TruncatedNormal,
    UniformDequantizer,
    accurate,
    bits_per_dim,
    companion_error,
    decode,
    encode,
    estimate_noise_level,
    fast,
    interpolate,
    log_likelihood,
    round_trip,
    sample_with_log_prob,
    survey,
)
from numerics import RK4, Adams, Dopri5, SampleStreams, UserError
from sde_lib import CountedScore, PlainFlow, WhitenedFlow
from sde_lib.analytic import GaussianMixture
from sde_lib.time_grids import Custom, Karras, LogSNR

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
TIGHT = Dopri5(rtol=1e-6, atol=1e-6)


def exact(law, sde, method, x):
    """log p at `x` by the flow with the exact trace and the law's own marginal at T."""
    prior = lambda z: law.log_prob(sde, z, sde.T)
    return log_likelihood(sde, law.score(sde), x, method=method, divergence=Exact(), prior=prior).log_prob


def test_its_defaults():
    assert Method() == Method(Dopri5(rtol=1e-5, atol=1e-5), flow=WhitenedFlow(), grid=None, t_min=None)
    assert [Method().time(sde) for sde in SDES.values()] == [sde.t_min for sde in SDES.values()]
    assert accurate(tolerance=1e-6, t_min=1e-3) == Method(
        Dopri5(rtol=1e-6, atol=1e-6, max_steps=1000), flow=WhitenedFlow(), t_min=1e-3
    )


@each_sde
class TestTimes:
    """The density is that of x_t at the time that was asked for, in closed form."""

    def values(self, sde, method, t):
        law = gaussian()
        x = law.marginal_sample(sde, 4, t, generator=torch.Generator().manual_seed(0))
        return exact(law, sde, method, x), law.log_prob(sde, x, t)

    def test_t_min_is_obeyed(self, sde):
        found, truth = self.values(sde, Method(TIGHT, t_min=0.05), 0.05)
        assert torch.allclose(found, truth, atol=1e-4)

    @pytest.mark.parametrize(
        "grid", [LogSNR(t_end=0.05), Custom(times=torch.linspace(1, 0, 61)[:58])], ids=lambda g: type(g).__name__
    )
    def test_a_grids_end_is_t_min(self, sde, grid):
        method = Method(RK4(steps=57), grid=grid)
        assert method.time(sde) == pytest.approx(0.05)
        found, truth = self.values(sde, method, 0.05)
        assert torch.allclose(found, truth, atol=1e-3)
        x = gaussian().sample(2)  # stating the same time beside it changes nothing
        stated = replace(method, t_min=method.time(sde))
        assert torch.equal(exact(gaussian(), sde, stated, x), exact(gaussian(), sde, method, x))

    def test_fast_carries_its_t_min(self, sde):
        law = gaussian()
        method = fast(sde, law.score(sde), law.sample(8), steps=64, t_min=0.05)
        assert method.t_min == 0.05
        found, truth = self.values(sde, method, 0.05)
        assert torch.allclose(found, truth, atol=1e-3)

    def test_every_function_goes_to_that_time(self, sde):
        """From the marginal at T, which the whitened coordinates of a Gaussian are kept from."""
        law, t = gaussian(), 0.05
        score, method = law.score(sde), Method(TIGHT, t_min=t)
        x = law.marginal_sample(sde, 4, t, generator=torch.Generator().manual_seed(0))
        z = encode(sde, score, x, method=method).x
        assert torch.allclose(law.whiten(sde, z, sde.T), law.whiten(sde, x, t), atol=1e-4)
        assert torch.allclose(decode(sde, score, z, method=method).x, x, atol=1e-4)
        assert float(round_trip(sde, score, x, method=method).error.max()) < 1e-4
        assert torch.allclose(interpolate(sde, score, x, x, [0.5], method=method).x[0], x, atol=1e-4)
        drawn = sample_with_log_prob(sde, score, (4, 2), x_T=z, method=method, divergence=Exact())
        assert torch.allclose(drawn.x, x, atol=1e-4)


def grey_values():
    return torch.randint(0, 17, (5, 1, 2, 2), generator=torch.Generator().manual_seed(0))


def test_bits_per_dim_takes_the_time_to_the_dequantiser():
    sde, times = SDES["vp"], []

    class Noted(UniformDequantizer):
        def __call__(self, images, transform, sde, t_min, **options):
            times.append(t_min)
            return super().__call__(images, transform, sde, t_min, **options)

    score = lambda x, t: -x
    bits_per_dim(sde, score, grey_values(), Rescale(levels=17), dequantizer=Noted(), method=Method(t_min=0.02))
    bits_per_dim(
        sde,
        score,
        grey_values(),
        Rescale(levels=17),
        dequantizer=Noted(),
        method=Method(RK4(steps=4), grid=LogSNR(t_end=0.03)),
    )
    assert times == [0.02, 0.03]


GREY = (torch.arange(160) % 17).to(torch.uint8).reshape(40, 1, 2, 2)
TRACED = [
    lambda **given: log_likelihood(SDES["vp"], lambda x, t: -x, torch.zeros(2, 2), **given),
    lambda **given: bits_per_dim(SDES["vp"], lambda x, t: -x, GREY, Rescale(levels=17), **given),
    lambda **given: survey(SDES["vp"], lambda x, t: -x, GREY, Rescale(levels=17), **given),
    lambda **given: sample_with_log_prob(SDES["vp"], lambda x, t: -x, (8, 2), **given),
    lambda **given: estimate_noise_level(
        SDES["vp"], lambda x, t: -x, torch.zeros(2, 2), generator=SampleStreams(0), **given
    ),
]
"""Whatever takes a divergence."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Method("dopri5"), "expected a solver of numerics"),
        (lambda: Method(Method()), "got a Method as the solver"),
        (lambda: Method(flow="whitened"), "expected a flow of sde_lib"),
        (lambda: Method(RK4(), grid="karras"), "expected a grid such as Karras"),
        (lambda: Method(grid=Karras()), "Dopri5, which chooses its own steps"),
        (lambda: Method(RK4(steps=7), grid=[1.0, 0.5, 0.1]), "a grid of 3 times; expected steps=2"),
        (lambda: Method(t_min=-1.0), "t_min=-1.0; expected a finite number > 0"),
        (lambda: Method(RK4(), grid=LogSNR(t_end=0.1), t_min=0.2), "a grid that ends at 0.1; expected one time"),
        (lambda: run(Method(RK4(), grid=LogSNR(t_start=0.9))), "starts at t = 0.9; expected T = 1"),
        (lambda: run(Method(RK4(), grid=[0.9, 0.5, 0.1])), "starts at t = 0.9; expected T = 1"),
        (lambda: run(Method(t_min=1.0)), r"t_min=1.0; expected a time in \(0, 1.0\)"),
        (lambda: run(Adams()), r"a solver; expected a Method: method=Method\(Adams"),
        (lambda: run({"solver": Adams()}), "expected a Method, such as"),
        (lambda: encode(SDES["vp"], lambda x, t: -x, torch.zeros(8)), r"\(8,\); .* as x.unsqueeze\(1\)"),
        (lambda: log_likelihood(SDES["vp"], lambda x, t: -x, torch.zeros(8)), r"\(8,\); .* as x.unsqueeze\(1\)"),
        (lambda: decode(SDES["vp"], lambda x, t: -x, torch.zeros(2, 2, dtype=torch.int64)), "got x of torch.int64"),
        (lambda: sample_with_log_prob(SDES["vp"], lambda x, t: -x, (8,)), r"shape=\(8,\); .* give \(8, 1\)"),
        (lambda: sample_with_log_prob(SDES["vp"], lambda x, t: -x, 8), r"shape=8; expected \(B, \*\)"),
        (lambda: sample_with_log_prob(SDES["vp"], lambda x, t: -x, (8, 2), dtype=torch.int64), "floating"),
        (lambda: companion_error(SDES["vp"], lambda x, t: -x, torch.zeros(2, 2), method=Method()), "cannot be refined"),
        *((lambda use=use: use(divergence=3), "got divergence=3; expected a way to get the trace") for use in TRACED),
        (lambda: TRACED[0](divergence=Exact), r"got divergence=<class .*Exact'>; expected"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def run(method):
    return log_likelihood(SDES["vp"], lambda x, t: -x, torch.zeros(2, 2), method=method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_dtype_that_was_asked_for(dtype):
    sde, seen = SDES["vp"], set()

    def score(x, t):
        seen.add(x.dtype)
        return mixture().score(sde)(x, t)

    for x_T in (None, torch.zeros(3, 2, dtype=torch.float32)):
        found = sample_with_log_prob(sde, score, (3, 2), x_T=x_T, dtype=dtype, generator=SampleStreams(0))
        assert found.x.dtype == dtype
    assert seen == {dtype}


class TestCompanions:
    def scored(self, **options):
        sde, law = SDES["vp"], likelihood_law()
        score = CountedScore(law.score(sde))
        method = Method(Adams(steps=12), flow=WhitenedFlow(data_std=0.5))
        return bits_per_dim(
            sde, score, grey_values(), Rescale(levels=17), method=method, generator=SampleStreams(0), **options
        )

    def test_the_larger_of_the_two_errors_is_stated(self):
        """With the exact trace the solver has an estimate of its own, which the companions do not overwrite."""
        alone, both = (self.scored(divergence=Exact(), companions=n) for n in (0, 3))
        assert torch.equal(alone.solver_error, both.solver_error) and bool(alone.solver_error.isfinite().all())
        assert bool(alone.companion_error.isnan().all())
        assert torch.equal(alone.stated_error, alone.solver_error)
        assert both.companion_error.isfinite().tolist() == [True] * 3 + [False] * 2
        larger = torch.maximum(both.solver_error[:3], both.companion_error[:3])
        assert torch.equal(both.stated_error, torch.cat([larger, both.solver_error[3:]]))
        assert both.asdict()["solver_error"] == pytest.approx(float(both.stated_error.mean()))

    def test_an_images_error_is_its_own(self):
        """Whatever its place and its batch: by its id where there are ids, else by one probe for all."""
        images = torch.randint(0, 17, (8, 1, 2, 2), generator=torch.Generator().manual_seed(0))
        sde, ids, order = SDES["vp"], torch.arange(8), torch.tensor([7, 2, 5, 4, 3, 6, 1, 0])
        law = GaussianMixture(torch.tensor([[0.4] * 4, [-0.4, 0.4, 0.0, 0.2]]), torch.tensor([0.3, 0.2]), torch.ones(2))
        score = lambda x, t: law.score(sde)(x.flatten(1), t).reshape(x.shape)
        method = Method(Adams(steps=12), flow=WhitenedFlow(data_std=0.5))

        def stated(which):
            streams = SampleStreams(1, ids[which])
            transform = Rescale(levels=17)
            return bits_per_dim(sde, score, images[which], transform, method=method, generator=streams).companion_error

        whole = stated(ids)
        assert float(whole.min()) > 0
        assert torch.allclose(stated(order), whole[order], rtol=1e-6)
        assert torch.allclose(stated(ids[5:6]), whole[5:6], rtol=1e-6)
        x = 2 * images.double() / 17 - 1
        for streams in (lambda which: None, lambda which: SampleStreams(1, which)):
            each = companion_error(sde, score, x, method=method, generator=streams(ids))
            alone = companion_error(sde, score, x[3:4], method=method, generator=streams(ids[3:4]))
            assert torch.allclose(each[3:4], alone, rtol=1e-9)

    def test_a_grid_of_own_times_has_none(self):
        sde = SDES["vp"]
        method = Method(RK4(), grid=torch.linspace(1, 1e-3, 9))
        found = bits_per_dim(sde, likelihood_law().score(sde), grey_values(), Rescale(levels=17), method=method)
        assert found.companion_nfe == 0 and bool(found.companion_error.isnan().all())


def likelihood_law():
    from sde_lib.analytic import Gaussian

    return Gaussian(torch.zeros(1, 2, 2), 0.3 * torch.ones(4))


class TestWithoutGreyLevels:
    def test_real_numbers_get_no_noise_and_their_density(self):
        sde, law = SDES["vp"], gaussian()
        transform = Standardize(shift=0.5, scale=2.0)
        x = law.marginal_sample(sde, 6, sde.t_min, generator=torch.Generator().manual_seed(0))
        found = bits_per_dim(
            sde,
            law.score(sde),
            transform.inverse(x),
            transform,
            method=Method(TIGHT),
            divergence=Exact(),
            prior=lambda z: law.log_prob(sde, z, sde.T),
            dtype=torch.float64,
        )
        truth = -(law.log_prob(sde, x, sde.t_min) - 2 * math.log(2.0)) / (2 * math.log(2))
        assert torch.allclose(found.per_image, truth, atol=1e-4)
        assert found.dequantization_stderr == 0.0

    @pytest.mark.parametrize("dequantizer", [UniformDequantizer(), TruncatedNormal()])
    def test_noise_for_real_numbers_is_refused(self, dequantizer):
        with pytest.raises(UserError, match="without levels, of data that are real numbers"):
            bits_per_dim(
                SDES["vp"],
                lambda x, t: -x,
                torch.zeros(2, 2),
                Standardize(shift=0.0, scale=1.0),
                dequantizer=dequantizer,
            )

    def test_grey_values_without_noise_are_refused(self):
        with pytest.raises(UserError, match="expected noise for grey values"):
            bits_per_dim(SDES["vp"], lambda x, t: -x, grey_values(), Rescale(levels=17), dequantizer=NoDequantization())

    def test_integers_are_refused(self):
        with pytest.raises(UserError, match="expected real numbers"):
            bits_per_dim(SDES["vp"], lambda x, t: -x, grey_values(), Standardize(shift=0.0, scale=1.0))


class TestNames:
    def test_every_name_makes_its_class(self):
        assert likelihood.create("hutchinson", probes=2) == Hutchinson(probes=2)
        assert likelihood.create("coloured", spacing=3) == Coloured(spacing=3)
        assert likelihood.create("exact") == Exact()
        assert likelihood.create("uniform") == likelihood.Uniform() == UniformDequantizer()
        assert likelihood.create("truncated_normal") == TruncatedNormal()
        assert likelihood.create("none") == NoDequantization()
        assert set(likelihood.available()) == {"exact", "hutchinson", "coloured", "uniform", "truncated_normal", "none"}
        assert list(likelihood.options("hutchinson")) == ["probes", "noise", "fresh", "rows"]
        for thing in (Hutchinson(probes=3, fresh=False), Coloured(sets=2), NoDequantization()):
            assert likelihood.create(**likelihood.describe(thing)) == thing

    def test_mistakes_are_named(self):
        with pytest.raises(
            UserError, match="'probe' for the trace estimator or dequantiser 'hutchinson', did you mean 'probes'"
        ):
            likelihood.create("hutchinson", probe=2)
        with pytest.raises(UserError, match="'hutchison', did you mean 'hutchinson'"):
            likelihood.create("hutchison")
        with pytest.raises(UserError, match="probes=0"):
            likelihood.create("hutchinson", probes=0)


def test_the_plain_flow_serves_all_of_it():
    sde, law = SDES["vp"], gaussian()
    x = law.marginal_sample(sde, 3, 0.01, generator=torch.Generator().manual_seed(0))
    found = exact(law, sde, Method(TIGHT, flow=PlainFlow(), t_min=0.01), x)
    assert torch.allclose(found, law.log_prob(sde, x, 0.01), atol=1e-4)
