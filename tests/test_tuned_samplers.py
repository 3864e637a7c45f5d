"""Samplers fitted to a model: against flows that are known exactly, on other noise than they were fitted to, kept in a run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import SDES, mixture
from test_experiments import called, refused

import samplers
from experiments import compare, sample, vp
from experiments import tune as tune_script
from numerics import Dopri5, SampleStreams, UserError
from samplers import DPMSolver, ProbabilityFlow
from samplers.tuned import Tuned
from samplers.tuning import HISTORY, Pairs, Student, plain_methods, rms, start, teach, tune
from sde_lib import VPSDE
from sde_lib.analytic import Gaussian
from sde_lib.time_grids import LogSNR
from workflow.tuned import FILE

pytestmark = pytest.mark.usefixtures("loose_pilots")

VARIANCES = torch.tensor([0.02, 0.1, 0.3, 0.6, 1.0, 1.5], dtype=torch.float64)
MEANS = torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)


def exact_map(sde, x_T):
    """Where the flow of N(m, diag v) takes x_T, denoised: x_t - alpha m grows like sqrt(alpha^2 v + sigma^2)."""

    def spread(t):
        return (sde.alpha(t) ** 2 * VARIANCES + sde.sigma(t) ** 2).sqrt()

    end, alpha = sde.t_end, sde.alpha(sde.t_end)
    off = spread(end) / spread(sde.T) * (x_T.double() - sde.alpha(sde.T) * MEANS)
    return MEANS + alpha * VARIANCES / spread(end) ** 2 * off


@pytest.mark.parametrize("name", SDES)
def test_a_tuned_sampler_comes_nearer_to_the_exact_map_of_a_gaussian(name):
    """At 5 evaluations, on new noise, at most a third of the best plain method's error."""
    sde = SDES[name]
    score = Gaussian(MEANS, VARIANCES).score(sde)
    found = tune(sde, score, (32, 6), evaluations=5, rounds=8, seed=0)
    x_T = sde.prior_sample((500, 6), generator=SampleStreams(99), dtype=torch.float32)
    truth = exact_map(sde, x_T)
    tuned, plain = (
        rms(s(sde, score, (500, 6), x_T=x_T).x - truth) for s in (found.tuned, samplers.create(**found.plain))
    )
    assert found.kept and found.sampler is found.tuned
    assert float(tuned.mean()) < float(plain.mean()) / 3
    assert found.tuned(sde, score, (2, 6)).nfe == 5 == samplers.create(**found.plain).evaluations
    # what is stated of the judging noise is what other noise gives
    assert float(tuned.mean()) == pytest.approx(float(found.tuned_errors.mean()), rel=0.5)


def test_a_mixtures_flow_is_followed_on_new_noise():
    sde, law = VPSDE(), mixture()
    score = law.score(sde)
    found = tune(sde, score, (64, 2), evaluations=6, rounds=8, tolerance=1e-6, seed=1)
    x_T = sde.prior_sample((500, 2), generator=SampleStreams(5), dtype=torch.float32)
    flow = ProbabilityFlow(solver=Dopri5(rtol=1e-8, atol=1e-8), denoise=True)
    truth = flow(sde, score, (500, 2), x_T=x_T).x
    tuned, plain = (
        rms(s(sde, score, (500, 2), x_T=x_T).x - truth) for s in (found.tuned, samplers.create(**found.plain))
    )
    less = plain - tuned
    assert found.kept and float(less.mean()) > 3 * float(less.std()) / 500**0.5


class TestFallback:
    def test_what_is_not_better_is_not_kept(self):
        sde = VPSDE()
        score = Gaussian(MEANS, VARIANCES).score(sde)
        found = tune(sde, score, (16, 6), evaluations=3, rounds=3)
        noise = 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for errors in (
            found.plain_errors,
            found.plain_errors + noise,
            torch.full_like(noise, torch.inf),
            torch.full_like(noise, torch.nan),
        ):
            worse = replace(found, tuned_errors=errors)
            assert not worse.kept and worse.sampler == samplers.create(**found.plain)
            says = "not surely better" if worse.gain[0] > 0 else "not better"
            assert f"{says}: the plain one is kept" in str(worse)

    def test_a_method_that_fails_is_never_the_plain_one(self, monkeypatch):
        """The first of them, whose samples are not numbers."""
        tried = list(plain_methods(4))
        broken, errors = samplers.create(**tried[0]), Pairs.errors
        monkeypatch.setattr(
            Pairs, "errors", lambda self, s, *more: errors(self, s, *more) * (math.nan if s == broken else 1)
        )
        sde = VPSDE()
        found = tune(sde, Gaussian(MEANS, VARIANCES).score(sde), (16, 6), evaluations=4, rounds=1)
        assert found.plain != tried[0] and bool(found.plain_errors.isfinite().all())

    def test_a_fit_never_becomes_worse_on_its_own_noise(self):
        """Where every step that it tries leads uphill it stays where it began."""

        class Lost(Student):
            def _normal(self, *given):
                normal, slope = super()._normal(*given)
                return normal, -slope

        sde = VPSDE()
        score = Gaussian(MEANS, VARIANCES).score(sde)
        pairs, _ = teach(sde, score, (8, 6))
        first = start(sde, LogSNR()(sde, 4))
        stayed, moved = (
            kind(sde=sde, score=score, pairs=pairs, batch_size=8).fitted(first, rounds=2) for kind in (Lost, Student)
        )
        before, lost, fitted = (float(pairs.errors(s, sde, score, 8).mean()) for s in (first, stayed, moved))
        assert lost == pytest.approx(before, rel=1e-5) and fitted < before / 2

    def test_it_is_fitted_and_judged_on_noise_that_no_tool_draws_from(self):
        sde = VPSDE()
        score = Gaussian(MEANS, VARIANCES).score(sde)
        fit, judge = teach(sde, score, (8, 6), seed=0)
        drawn = sde.prior_sample((8, 6), generator=SampleStreams(0), dtype=torch.float32)
        for one, other in ((fit.noise, drawn), (judge.noise, drawn), (fit.noise, judge.noise)):
            assert float((one[:, None] - other).abs().amax(dim=-1).min()) > 0.01

    def test_pairs_made_beforehand_count_as_they_do_made_on_the_way(self):
        sde, seen = VPSDE(), [0]
        law = Gaussian(MEANS, VARIANCES).score(sde)

        def score(x, t):
            seen[0] += len(x)
            return law(x, t)

        pairs = teach(sde, score, (8, 6))
        assert pairs[0].nfe + pairs[1].nfe == seen[0] > 0 and min(p.seconds for p in pairs) > 0
        given = tune(sde, score, (8, 6), evaluations=3, rounds=1, pairs=pairs)
        assert given.nfe == seen[0]
        assert tune(sde, score, (8, 6), evaluations=3, rounds=1).nfe == given.nfe

    def test_plain_methods_all_take_so_many_evaluations(self):
        found = [samplers.create(**options) for options in plain_methods(4)]
        assert len(set(map(repr, found))) == len(found) and {s.evaluations for s in found} == {4}


class TestFit:
    def test_it_starts_from_a_known_method(self):
        sde, law = VPSDE(), mixture()
        times = LogSNR()(sde, 6)
        known = DPMSolver(order=2, lower_order_final=False, denoise=False, grid=times)
        for made in (start(sde, times, history=2), Tuned.from_dict(start(sde, times, history=2).asdict())):
            x, y = (s(sde, law.score(sde), (20, 2), generator=SampleStreams(0)).x for s in (made, known))
            assert torch.allclose(x, y, atol=1e-5)

    def test_its_derivatives_are_those_of_whole_runs(self):
        """A run that begins at the changed step gives what the whole changed run gives, in float64."""
        from samplers.tuning import _Form

        sde, law = VPSDE(), mixture()
        score = law.score(sde)
        pairs, _ = teach(sde, score, (8, 2))
        pairs = replace(pairs, noise=pairs.noise.double(), x=pairs.x.double())
        student = Student(sde=sde, score=score, pairs=pairs, batch_size=8, step=1e-4)
        form = _Form.of(sde, start(sde, LogSNR()(sde, 5)))
        theta = 0.02 * torch.randn(form.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        off, columns = student._columns(form, theta, torch.arange(8))

        def end(at):
            return form.sampler(at)(sde, score, (8, 2), x_T=pairs.noise).x

        assert form.size == 4 + 5 + (1 + 2 + 3 * HISTORY)
        assert torch.allclose(off, end(theta) - pairs.x, atol=1e-9)
        for j in range(form.size):
            moved = theta.clone()
            moved[j] += 1e-4
            assert torch.allclose(columns[j], (end(moved) - end(theta)) / 1e-4, atol=1e-5), form.places[j]

    def test_the_same_seed_gives_the_same_fit(self):
        sde, law = VPSDE(), mixture()
        a, b = (tune(sde, law.score(sde), (8, 2), evaluations=3, rounds=2, seed=s) for s in (3, 3))
        assert a.tuned == b.tuned and a.plain == b.plain
        assert a.tuned != tune(sde, law.score(sde), (8, 2), evaluations=3, rounds=2, seed=4).tuned

    def test_what_is_refused(self):
        sde, score = VPSDE(), mixture().score(VPSDE())
        with pytest.raises(UserError, match="evaluations=1"):
            tune(sde, score, (8, 2), evaluations=1)
        for shape in ((4, 2), 8, (8,)):
            with pytest.raises(UserError, match="8 samples or more"):
                tune(sde, score, shape, evaluations=3)
        with pytest.raises(UserError, match="a size of shape=0"):
            tune(sde, score, (8, 0), evaluations=3)
        with pytest.raises(UserError, match="seed=-1"):
            tune(sde, score, (8, 2), evaluations=3, seed=-1)
        with pytest.raises(UserError, match="got tolerance=1 for the tight solution; expected at most 0.01"):
            teach(sde, score, (8, 2), tolerance=1.0)
        pairs = teach(sde, score, (8, 2), tolerance=1e-2)
        for shape in ((16, 3), (8, 3), (9, 2)):
            with pytest.raises(UserError, match="pairs of noise \\(8, 2\\) and samples \\(8, 2\\) for shape="):
                tune(sde, score, shape, evaluations=3, pairs=pairs)
        with pytest.raises(UserError, match="pairs of noise"):
            tune(sde, score, (8, 2), evaluations=3, pairs=(pairs[0], teach(sde, score, (9, 2), tolerance=1e-2)[1]))
        made = start(sde, LogSNR()(sde, 3))
        assert made.within(3) is made
        with pytest.raises(UserError, match="tuned to 3; expected 3"):
            made.within(4)
        with pytest.raises(UserError, match="expected False"):
            replace(made, denoise=True)
        with pytest.raises(UserError, match="expected the times"):
            replace(made, grid=LogSNR())
        for change in (
            {"of_x": [1.0]},
            {"weights": [[1.0], [1.0, 2.0, 3.0], [1.0]]},
            {"of_x": [1.0, float("nan"), 1.0]},
        ):
            with pytest.raises(UserError, match="expected 3 factors"):
                Tuned.from_dict({**made.asdict(), **change})
        with pytest.raises(UserError, match="cannot be read"):
            Tuned.from_dict({"times": [1.0, 0.5]})


def test_a_run_keeps_its_tuned_sampler_and_refuses_others(tmp_path):
    """tune, then sample by what it left; another model, another number, a damaged file."""
    run, other = tmp_path / "run", tmp_path / "other"
    few = [f"--config.training.{name}=4" for name in ("steps", "warmup", "checkpoint_every", "batch_size")]
    few += [
        "--config.data.name=moons",
        "--config.data.train=400",  # the comparison measures distances to all of them
        "--config.data.validation=50",
        "--config.data.test=200",
        "--config.model.width=16",
        "--config.likelihood.limit=5",
        "--config.likelihood.steps=3",
        "--config.sampling.n=10",
    ]
    called(
        vp.main, f"--workdir={run}", *few, "--config.sampling.steps=2", "--config.sampling.second_steps=2", "--quiet"
    )
    shutil.copytree(Path(__file__).parents[1] / "pretrained" / "vp_digits", other)
    refused(
        called(sample.main, "--run", run, "--sampler", "tuned", check=False), 2, "no sampler was tuned", "tune.py --run"
    )
    done = called(
        tune_script.main, "--run", run, "--nfe", "2,3", "--n", 8, "--rounds", 1, "--tolerance", 1e-2, "--quiet"
    )
    assert "2 evaluations: from the flow" in done.stdout and "3 evaluations: from the flow" in done.stdout
    kept = json.loads((run / FILE).read_text())["samplers"]
    assert [e["evaluations"] for e in kept] == [2, 3]
    done = called(sample.main, "--run", run, "--sampler", "tuned", "--steps", 3, "--n", 2, "--quiet")
    expected = Tuned.from_dict(kept[1]["tuned"]) if kept[1]["kept"] else samplers.create(**kept[1]["plain"])
    assert f"by {expected!r}: 3 evaluations" in done.stdout
    # whatever the fit was, both ways of drawing are read
    for decision in (True, False):
        kept[1]["kept"] = decision
        (run / FILE).write_text(json.dumps({"samplers": kept}))
        done = called(sample.main, "--run", run, "--sampler", "tuned", "--steps", 3, "--n", 2, "--quiet")
        assert ("by Tuned(" in done.stdout) == decision
    again = called(tune_script.main, "--run", run, "--nfe", 3, "--n", 8, "--rounds", 1, "--tolerance", 1e-2, "--quiet")
    assert "3 evaluations" in again.stdout and len(json.loads((run / FILE).read_text())["samplers"]) == 2
    versus = ("--samplers", "tuned,ddim", "--n", 40, "--measures", "SW", "--quiet")
    called(compare.main, "--run", run, *versus, "--nfe", "2,3,4")
    rows = json.loads((run / "compare.json").read_text())["rows"]
    assert [(r["name"], r["nfe"]) for r in rows] == [("tuned", 2), ("tuned", 3), ("ddim", 2), ("ddim", 3), ("ddim", 4)]
    refused(called(compare.main, "--run", run, *versus, "--nfe", "7", check=False), 2, "expected one of 2, 3")
    refused(called(compare.main, "--run", other, *versus, check=False), 2, "no sampler was tuned")
    shutil.copy(run / FILE, other / FILE)
    draw = ("--sampler", "tuned", "--n", 2, "--quiet")
    refused(called(sample.main, "--run", other, *draw, "--steps", 3, check=False), 2, "tuned to other weights")
    refused(
        called(sample.main, "--run", run, *draw, "--steps", 7, check=False), 2, "got --steps 7", "expected one of 2, 3"
    )
    refused(called(sample.main, "--run", run, *draw, check=False), 2, "expected one of 2, 3")
    refused(called(sample.main, "--run", run, *draw, "--option", "order=2", check=False), 2, "got --option order")
    refused(called(tune_script.main, "--run", run, "--nfe", "1", check=False), 2, "integers >= 2")
    refused(called(tune_script.main, "--run", run, "--nfe", "six", check=False), 2, ">= 2 separated by commas")
    refused(called(tune_script.main, "--run", run, "--rounds", 0, check=False), 2, "integer >= 1")
    refused(called(tune_script.main, "--run", run, "--n", 4, check=False), 2, "integer >= 8")
    for text in ("{", '{"samplers": [{"model": "x"}]}', '{"samplers": 3}'):
        (run / FILE).write_text(text)
        refused(called(sample.main, "--run", run, *draw, "--steps", 3, check=False), 2, FILE)
