"""A mask of its own for each sample: every method and sampler treats sample i as `Mask` of mask i alone does."""

from __future__ import annotations

import pytest
import torch
from oracles import SDES
from test_measurements import random
from test_posterior import METHODS, law, states
from test_posterior_samplers import ALL

from evaluation import exact_posterior
from guidance import Mask, Masks, Measurement, MomentMatching, posterior
from numerics import SampleStreams, UserError
from samplers import ProbabilityFlow

MASKS = torch.tensor([[1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 1]]).reshape(4, 2, 3)
Y = random(4, 2, 3, seed=21)


def apart(i, std):
    """Sample i's measurement by one mask."""
    return Measurement(Mask(MASKS[i]), Y[i : i + 1], std)


@pytest.mark.parametrize("std", [0.3, torch.tensor([[0.2], [0.5]], dtype=torch.float64)], ids=["number", "entries"])
def test_moment_matching_is_each_samples_exact_posterior(std):
    sde, oracle = SDES["vp"], law((2, 3))
    x, t = states(sde, oracle, 4)
    found = posterior(sde, oracle.score(sde), Measurement(Masks(MASKS), Y, std), method=MomentMatching(iterations=8))(
        x, t
    )
    for i in range(4):
        truth = exact_posterior(oracle, apart(i, std)).score(sde)(x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_each_mask_alone(method):
    sde, oracle = SDES["sub_vp"], law((2, 3))
    x, t = states(sde, oracle, 4)
    make = lambda m: posterior(sde, oracle.score(sde), m, method=METHODS[method])
    given = make(Measurement(Masks(MASKS), Y, 0.2))
    together = given(x, t)
    for i in range(4):
        torch.testing.assert_close(make(apart(i, 0.2))(x[i : i + 1], t[i : i + 1]), together[i : i + 1])
    index = torch.tensor([2, 0])
    torch.testing.assert_close(given.take(index)(x[index], t[index]), together[index])


@pytest.mark.parametrize("std", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("kind", ALL)
def test_samples_are_those_of_each_mask_alone(kind, std):
    if kind == "twisted_smc" and std < 0.3:
        return  # it divides by the noise
    sde, oracle = SDES["vp"], law((2, 3))
    sampler = ALL[kind](Measurement(Masks(MASKS), Y, std))
    options = {"dtype": torch.float64}
    together = sampler(sde, oracle.score(sde), (4, 2, 3), generator=SampleStreams(3), **options).x
    for i in range(4):
        index = torch.tensor([i])
        for one in (ALL[kind](apart(i, std)), sampler.take(index)):
            alone = one(sde, oracle.score(sde), (1, 2, 3), generator=SampleStreams(3, index), **options).x
            torch.testing.assert_close(alone, together[index], rtol=1e-6, atol=1e-6)
    if std == 0:
        assert torch.equal(torch.where(MASKS.bool(), together, 0.0).float(), torch.where(MASKS.bool(), Y, 0.0).float())


def test_samples_that_leave_an_adaptive_solver_keep_their_masks():
    sde, oracle = SDES["ve"], law((2, 3))
    given = posterior(sde, oracle.score(sde), Measurement(Masks(MASKS), Y, 0.3), method=MomentMatching(iterations=7))
    sampler = ProbabilityFlow()
    x_T = sde.prior_std * random(4, 2, 3, seed=5)
    together = sampler(sde, given, (4, 2, 3), x_T=x_T).x
    for i in range(4):
        index = torch.tensor([i])
        exact = exact_posterior(oracle, apart(i, 0.3)).score(sde)
        assert float((sampler(sde, exact, (1, 2, 3), x_T=x_T[index]).x - together[index]).abs().max()) < 1e-3


def test_holes_may_hold_anything():
    y = torch.where(MASKS.bool(), Y, float("nan"))
    assert torch.equal(Measurement(Masks(MASKS), y, 0.1).y, torch.where(MASKS.bool(), Y, 0.0))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Measurement(Mask(MASKS), Y, 0.1), r"Masks\(masks\)"),
        (lambda: Measurement(Masks(MASKS), Y[:1], 0.1), "one mask a sample"),
        (lambda: Measurement(Masks(MASKS[:3]), Y, 0.1), "one mask a sample"),
        (lambda: Measurement(Masks(torch.ones_like(MASKS[:, :1])), Y, 0.1), "every channel"),
        (lambda: Masks(MASKS[0, 0]), "masks of shape"),
        (lambda: Masks(MASKS * 2), "zeros and ones"),
        (lambda: Masks(torch.cat([MASKS, torch.zeros_like(MASKS[:1])])), "leave out"),
        (
            lambda: ALL["ddnm"](Measurement(Masks(MASKS), Y, 0.1))(
                SDES["vp"], law((2, 3)).score(SDES["vp"]), (2, 2, 3)
            ),
            "take",
        ),
    ],
)
def test_what_is_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()
