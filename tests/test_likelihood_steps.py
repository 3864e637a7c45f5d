"""Steps for a tolerance: kept on other samples, at a bounded number of evaluations, and said where it cannot be."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from oracles import SDES

from data.transforms import Standardize
from likelihood import (
    Coloured,
    Exact,
    Hutchinson,
    Method,
    NoDequantization,
    Refinement,
    accurate,
    bits_per_dim,
    choose_steps,
    companion_error,
    fast,
    log_likelihood,
    pilot_grid,
)
from likelihood.draw_places import AGAIN, COMPANIONS, MOST_DOUBLINGS, PREDICTORS
from likelihood.image_set import ImageSet
from likelihood.pilot import fallback_grid
from likelihood.steps import choice_of, ladder
from likelihood.survey import order_of
from numerics import Adams, Dopri5, SampleStreams, UserError, expand_as
from sde_lib import CountedScore, WhitenedFlow
from sde_lib.analytic import GaussianMixture

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
D = 8


def law():
    means = 0.7 * torch.randn(3, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianMixture(means, torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.2, 0.3, 0.5]))


def samples(n, seed, sde=SDES["vp"]):
    return law().marginal_sample(sde, n, sde.t_min, generator=torch.Generator().manual_seed(seed))


class Rough:
    """The law's score and a ripple in time, as networks have that are told sines of 999 t: a change of the score by `size` in
    `turns` turns."""

    def __init__(self, sde, turns, size=0.05):
        self.sde, self.score, self.turns, self.size = sde, law().score(sde), turns, size

    def __call__(self, x, t):
        wave = self.size * torch.sin(2 * math.pi * self.turns * t + 3 * x.sum(dim=1))
        return self.score(x, t) + expand_as(wave / self.sde.sigma(t), x)


def bits_off(sde, x, method, score=None):
    """|error| `(B,)` bits/dim of a method, exact trace: against the closed form, or for another score the adaptive solver."""
    if score is None:
        prior = lambda z: law().log_prob(sde, z, sde.T)
        found = log_likelihood(sde, law().score(sde), x, method=method, divergence=Exact(), prior=prior)
        truth = law().log_prob(sde, x, sde.t_min)
    else:
        tight = accurate(tolerance=1e-7, data_std=0.8)
        found, other = (log_likelihood(sde, score, x, method=m, divergence=Exact()) for m in (method, tight))
        truth = other.log_prob
    return (found.log_prob - truth).abs() / (D * math.log(2))


@each_sde
@pytest.mark.parametrize("tolerance", [1e-2, *(pytest.param(t, marks=pytest.mark.slow) for t in (1e-3, 1e-4))])
def test_the_tolerance_is_kept_on_other_samples(sde, tolerance):
    pilot, x = samples(8, 1, sde), samples(64, 2, sde)
    choice = choose_steps(sde, law().score(sde), pilot, tolerance=tolerance)
    assert choice.reached and choice.warning == "" and choice.error <= 0.6 * tolerance
    method = choice.method(data_std=float(pilot.std()))
    assert float(bits_off(sde, x, method).mean()) < tolerance
    # and not by far more steps than it takes
    assert float(bits_off(sde, x, method.with_steps(choice.steps // 2)).mean()) > tolerance / 4


@pytest.mark.slow
def test_a_tighter_tolerance_and_a_rougher_score_take_more_steps():
    sde = SDES["vp"]
    smooth = [choose_steps(sde, law().score(sde), samples(16, 1), tolerance=t).steps for t in (1e-2, 1e-3, 1e-4)]
    assert smooth == sorted(smooth) and smooth[0] < smooth[-1]
    rough = choose_steps(sde, Rough(sde, 20), samples(16, 1), tolerance=1e-3)
    assert rough.reached and rough.steps > smooth[1]
    off = bits_off(sde, samples(16, 2), rough.method(data_std=0.8), Rough(sde, 20))
    assert float(off.mean()) < 1e-3


def test_what_no_number_of_steps_reaches_is_said_and_bounded():
    sde = SDES["vp"]
    counted = CountedScore(Rough(sde, 3000, size=0.5))
    with pytest.warns(
        UserWarning, match="no number of steps up to 32 was seen to reach 0.0001 bits/dim: these erred by"
    ):
        method = fast(sde, counted, samples(8, 1), tolerance=1e-4, most=32)
    assert method.solver.steps == 32
    assert counted.nfe < 1806 + 12 + 16 + 24 + 32 + 48 + 7
    assert log_likelihood(sde, counted, samples(4, 2), method=method, divergence=Exact()).converged.all()


def test_images_that_err_like_all_others_are_not_solved_beyond_the_limit():
    """Where the tolerance is out of reach, "far above it" would be all of them."""
    sde, score = SDES["vp"], Rough(SDES["vp"], 300, size=0.3)
    with pytest.warns(UserWarning, match="no number of steps up to 16"):
        method = fast(sde, score, samples(16, 1), tolerance=1e-6, most=16)
    found = log_likelihood(sde, score, samples(200, 2), method=method, divergence=Exact())
    assert float((found.refined > 0).double().mean()) < 0.15


class Own:
    """A score that knows something of every sample: here, which one it is."""

    def __init__(self, score, numbers):
        self.score, self.numbers = score, numbers

    def __call__(self, x, t):
        assert len(x) == len(self.numbers)
        return self.score(x, t)

    def take(self, index):
        return Own(self.score, self.numbers[index])


@pytest.mark.parametrize("wish", [{"steps": 8}, {"tolerance": 0.1}])
def test_what_a_score_knows_of_single_samples_goes_along(wish):
    sde = SDES["vp"]
    fast(sde, Own(law().score(sde), torch.arange(16)), samples(16, 1), **wish)


def test_fixed_steps_are_fixed():
    sde, score = SDES["vp"], law().score(SDES["vp"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = fast(sde, score, samples(8, 1), steps=7, tolerance=1e-9)
    assert method.solver.steps == 7 and method.refinement is None


def test_the_limit_of_steps_itself_can_be_chosen():
    """There is a rung above it, as high as it may be."""
    assert list(ladder(16)) == [12, 16, 24] and list(ladder(40)) == [12, 16, 24, 32, 48]
    for most in (512, 2048, 8192):
        assert list(ladder(most))[-2:] == [most, 3 * most // 2]


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"tolerance": -1.0}, {"most": 8}])
def test_wrong_wishes_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        fast(SDES["vp"], law().score(SDES["vp"]), samples(8, 1), **options)
    with pytest.raises(UserError, match=next(iter(options))):  # beside fixed steps as well
        fast(SDES["vp"], law().score(SDES["vp"]), samples(8, 1), steps=10, **options)


def test_no_image_is_solved_again_with_draws_that_something_else_uses():
    at = [(k + 1) * AGAIN for k in range(MOST_DOUBLINGS + 1)]
    assert at[-2] < PREDICTORS <= at[-1]
    Refinement(ratio=1.0, above=1.0, times=MOST_DOUBLINGS)
    with pytest.raises(UserError, match=f"times={MOST_DOUBLINGS + 1}; expected at most {MOST_DOUBLINGS}"):
        Refinement(ratio=1.0, above=1.0, times=MOST_DOUBLINGS + 1)


class TestPilot:
    def test_its_evaluations_are_bounded(self):
        """A score that changes 100,000 times in the time of the flow makes an adaptive solver creep."""
        sde = SDES["vp"]
        counted = CountedScore(Rough(sde, 1e5, size=3.0))
        grid = pilot_grid(sde, counted, samples(8, 1))
        assert counted.nfe <= 1806
        assert grid == fallback_grid(sde, sde.t_min)

    def test_a_choice_counts_the_passes_of_the_samples_that_took_them(self):
        """In the pilot finished samples leave the batch; the climb has the exact trace, a product for each dimension."""
        sde, x = SDES["vp"], law().sample(16, generator=torch.Generator().manual_seed(1)).float()
        placed, whole = CountedScore(law().score(sde)), CountedScore(law().score(sde))
        flow = WhitenedFlow(data_std=0.7)
        pilot_grid(sde, placed, x[:8], flow=flow)
        choice = choose_steps(sde, whole, x, tolerance=1e-2, data_std=0.7)
        assert placed.evaluated < 8 * placed.nfe
        assert choice.passes == 3 * placed.evaluated + (1 + 2 * D) * (whole.evaluated - placed.evaluated)

    @each_sde
    def test_the_grid_without_a_pilot_serves(self, sde):
        method = Method(Adams(steps=96, points=5, start="rising"), grid=fallback_grid(sde, sde.t_min))
        assert float(bits_off(sde, samples(32, 2, sde), method).mean()) < 1e-2

    def test_a_score_that_is_not_finite_is_refused(self):
        with pytest.raises(UserError, match="the score not being finite"):
            pilot_grid(SDES["vp"], lambda x, t: x * math.nan, samples(8, 1))


class TestRefinement:
    sde = SDES["vp"]
    coarse = fast(sde, law().score(sde), samples(8, 1), steps=12)

    def method(self, **options):
        return replace(self.coarse, refinement=Refinement(**{"ratio": 1.0, "above": 0.01, **options}))

    def test_samples_with_large_errors_are_solved_again(self):
        score, x = law().score(self.sde), samples(64, 2)
        plain = log_likelihood(self.sde, score, x, method=self.coarse, divergence=Exact())
        chosen = plain.state_error > plain.state_error.median()
        above = float(plain.state_error.median())
        found = log_likelihood(self.sde, score, x, method=self.method(above=above, times=1), divergence=Exact())
        assert torch.equal(found.refined > 0, chosen)
        assert torch.equal(found.log_prob[~chosen], plain.log_prob[~chosen])
        finer = log_likelihood(self.sde, score, x[chosen], method=self.coarse.with_steps(24), divergence=Exact())
        assert torch.allclose(found.log_prob[chosen], finer.log_prob, atol=1e-12)
        assert torch.equal(found.evaluations, torch.where(chosen, 13 + 25, 13)) and found.nfe == 13 + 25
        off = bits_off(self.sde, x, self.coarse), bits_off(self.sde, x, self.method(above=above))
        assert float(off[1].mean()) < 0.5 * float(off[0].mean())

    def test_a_sample_is_its_own_with_fresh_probes(self):
        score, x = law().score(self.sde), samples(12, 2)

        def value(ids):
            return log_likelihood(
                self.sde, score, x[ids], method=self.method(above=0.002), generator=SampleStreams(5, ids)
            )

        everyone, order = value(torch.arange(12)), torch.tensor([7, 3, 11])
        some = value(order)
        assert int((everyone.refined > 0).sum()) > 0
        assert torch.allclose(some.log_prob, everyone.log_prob[order], atol=1e-9)
        assert torch.equal(some.refined, everyone.refined[order])
        # fresh probes have no error of their own; the state's says it
        expected = D * everyone.state_error
        assert torch.allclose(everyone.solver_error, expected)

    @pytest.mark.parametrize("divergence", [Hutchinson(probes=2, fresh=False), Coloured(spacing=2, fresh=False)])
    def test_one_probe_along_the_path_stays_a_samples_own(self, divergence):
        """Solved again it is the solution of more steps with the same probe, to the last digit; of any draw."""
        score, x = law().score(self.sde), samples(12, 2).reshape(12, 1, 2, 4)

        def flat(x, t):
            return score(x.flatten(1), t).reshape(x.shape)

        def value(method, draw):
            streams = SampleStreams(5, torch.arange(12), draw=draw)
            return log_likelihood(self.sde, flat, x, method=method, divergence=divergence, generator=streams)

        above = float(value(self.coarse, 0).state_error.median())
        for draw in (0, 7):
            found = value(self.method(above=above, times=1), draw)
            again = found.refined > 0
            assert 0 < int(again.sum()) < 12
            finer = value(self.coarse.with_steps(24), draw)
            assert torch.allclose(found.log_prob[again], finer.log_prob[again], atol=1e-9)

    def test_probes_stay_unbiased(self):
        """The mean over probes is the solution with the exact trace, also of those that were solved again."""
        score, x = law().score(self.sde), samples(1, 2).expand(2000, -1)
        method = self.method(above=1e-9, times=1)
        exact = log_likelihood(self.sde, score, x[:1], method=method, divergence=Exact())
        found = log_likelihood(self.sde, score, x, method=method, divergence=Hutchinson(), generator=SampleStreams(0))
        assert int(found.refined.min()) == 1
        spread = float(found.log_prob.std()) / math.sqrt(2000)
        assert abs(float(found.log_prob.mean() - exact.log_prob[0])) < 3.5 * spread

    def test_bits_per_dim_counts_them(self):
        score, x = law().score(self.sde), samples(40, 2)
        found = bits_per_dim(
            self.sde, score, x, Standardize(), method=self.method(), draws=2, generator=SampleStreams(0)
        )
        k = int((found.refined > 0).sum())
        assert k > 0 and f"{k} points solved again with more steps" in str(found) and found.asdict()["refined"] == k
        assert bool((found.evaluations >= 26).all()) and bool((found.evaluations[found.refined > 0] > 26).all())

    def test_no_number_serves_two_solutions(self, monkeypatch):
        """Several draws of the noise, each solved again twice: every probe has numbers of its own."""
        score, x, used = law().score(self.sde), samples(3, 2), []
        words = SampleStreams.words

        def noted(self, shape, *, device=None):
            ids = range(shape[0]) if self.ids is None else self.ids.tolist()
            used.extend((i, self.draw) for i in ids)
            return words(self, shape, device=device)

        monkeypatch.setattr(SampleStreams, "words", noted)
        method = self.method(above=1e-12, times=2)
        divergence = Hutchinson(probes=2)
        found = bits_per_dim(
            self.sde,
            score,
            x,
            Standardize(),
            method=method,
            draws=3,
            divergence=divergence,
            companions=3,
            generator=SampleStreams(0),
        )
        assert int(found.refined.min()) == 2 and len(used) >= 3 * 3 * (13 + 25 + 49) + 9
        companions = [place for place in used if place[1] >= COMPANIONS]
        assert len(set(companions)) == 3 and len(companions) == 9  # one probe for the three solutions
        assert len(set(used)) == len(used) - 6

    def test_no_number_of_a_survey_serves_twice(self, monkeypatch):
        """Values of many draws, their repetitions, both solved again, what more steps change, the order, and the pilot's."""
        images = samples(8, 2).float()
        survey_of = ImageSet(
            self.sde,
            law().score(self.sde),
            images,
            Standardize(),
            method=replace(self.method(above=1e-12, times=2), solver=Adams(steps=8, points=3)),
            dequantizer=NoDequantization(),
            divergence=None,
            draws=5,
            data_std=1.0,
            seed=0,
            batch_size=8,
        )
        index, uses = torch.arange(2), {}
        words = SampleStreams.words

        def noted(self, shape, *, device=None):
            ids = range(shape[0]) if self.ids is None else self.ids.tolist()
            uses[use].update((self.seed, i, self.draw) for i in ids)
            return words(self, shape, device=device)

        monkeypatch.setattr(SampleStreams, "words", noted)
        for use, ask in {
            "values": lambda: survey_of.values(index, 0, False),
            "repetitions": lambda: survey_of.values(index, 1, False),
            "predictors": lambda: survey_of.paid(index, range(10)),
            "compared": lambda: survey_of.compare_steps(index, twice=True),
            "order": lambda: order_of(8, 0),
            "pilot": lambda: choose_steps(self.sde, law().score(self.sde), images, tolerance=1.0),
            "companions": lambda: companion_error(
                self.sde, law().score(self.sde), images[:3], method=self.coarse, generator=SampleStreams(0)
            ),
        }.items():
            uses[use] = set()
            ask()
            assert uses[use]
        assert len(set().union(*uses.values())) == sum(len(numbers) for numbers in uses.values())

    def test_it_wants_fixed_steps(self):
        with pytest.raises(
            UserError, match="got a refinement with Dopri5 on NoneType; expected a solver of fixed steps"
        ):
            Method(Dopri5(), refinement=Refinement(ratio=1.0, above=1.0))
        with pytest.raises(UserError, match="above"):
            Refinement(ratio=1.0, above=0.0)


@pytest.mark.parametrize("ask", [fast, choose_steps, lambda *a: fast(*a, steps=8)], ids=["fast", "choose", "steps"])
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(8, D, dtype=torch.uint8), "uint8; expected a floating batch"),
        (torch.zeros(8), "x of shape"),
        (torch.zeros(0, D), "x of shape"),
        (torch.full((8, D), math.nan), "8 samples with values that are not finite"),
    ],
)
def test_a_pilot_of_no_data_is_refused(ask, x, says):
    with pytest.raises(UserError, match=says):
        ask(SDES["vp"], law().score(SDES["vp"]), x)


def test_a_choice_can_be_written_down():
    choice = choose_steps(SDES["ve"], law().score(SDES["ve"]), samples(8, 1), tolerance=1e-2)
    assert choice_of(json.loads(json.dumps(choice.asdict()))) == choice
    with pytest.raises(UserError, match="got a choice of steps that cannot be read"):
        choice_of({"knots": [0.0, 1.0], "density": [1.0]})
    for wrong in (
        {"knots": ["a", 1.0], "density": [1.0]},
        {"knots": [0.0, math.nan], "density": [1.0]},
        {"steps": "many"},
        {"tolerance": None},
        {"error": "small"},
        {"passes": -1},
        {"refinement": {"ratio": "a", "above": 1.0}},
    ):
        with pytest.raises(UserError, match="got a choice of steps that cannot be read"):
            choice_of({**choice.asdict(), **wrong})
