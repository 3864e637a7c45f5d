"""The parts of samplers: steps, predictors and correctors of a user, state, presets, and the names that make them."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass

import pytest
import torch
from oracles import SDES, mixture
from torch import Tensor

import numerics
import samplers
from numerics import RK4, Adams, Dopri5, Heun, SampleStreams, SciPy, UserError
from samplers import (
    CORRECTIONS,
    CORRECTORS,
    DDIM,
    DEIS,
    PREDICTORS,
    SAMPLERS,
    SEEDS,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    AnnealedLangevinCorrector,
    ClipDenoised,
    Corrector,
    DPMSolver,
    DynamicThreshold,
    EulerMaruyama,
    HeunEDM,
    Karras,
    Langevin,
    LogSNR,
    Predictor,
    PredictorCorrector,
    ProbabilityFlow,
    ReverseDiffusion,
    Run,
    Sampler,
    SamplingError,
    StatefulStep,
    Temperature,
    TorchSDE,
    UniPC,
)
from sde_lib import VESDE, VPSDE, PlainFlow, WhitenedFlow
from sde_lib.analytic import Gaussian

create = samplers.create


# -- the call ---------------------------------------------------------------------------------------------------------


def concrete(kind: type) -> list[type]:
    below = [c for sub in kind.__subclasses__() for c in concrete(sub)]
    return ([] if inspect.isabstract(kind) else [kind]) + below


def test_the_call_is_written_once() -> None:
    kinds = [c for c in concrete(Sampler) if c.__module__.startswith("samplers.")]
    assert len(kinds) >= 10
    for kind in kinds:
        assert kind.__call__ is Sampler.__call__, kind


def test_every_public_class_teaches_itself() -> None:
    """Its own docstring, with its arguments, and a formula or a source where it is a method."""
    for name in samplers.__all__:
        kind = getattr(samplers, name)
        if not inspect.isclass(kind):
            continue
        text = kind.__dict__.get("__doc__") or ""
        assert len(text) > 40 and "module's text" not in text, name
        if (
            dataclasses.is_dataclass(kind)
            and issubclass(kind, (Sampler, Predictor, Corrector))
            and kind in concrete(kind)
        ):
            for f in dataclasses.fields(kind):
                assert f.name in text, (name, f.name)
            assert "arXiv" in text, name


def test_sampling_errors_have_an_exit_code_of_their_own() -> None:
    assert SamplingError("x").exit_code == 4 != UserError("x").exit_code


# -- a user's own parts -----------------------------------------------------------------------------------------------


class Shrink(Predictor):
    """x_s = x_t + h_i score, with two evaluations that agree."""

    evaluations = 2

    def prepare(self, sde, times):
        now, h = times.tolist(), (-times.diff()).tolist()

        def step(i: int, x: torch.Tensor, run: Run) -> torch.Tensor:
            return x + h[i] * (run.score(x, now[i]) + run.score(x, now[i])) / 2

        return step


class Nudge(Corrector):
    """The documented contract and nothing more: no steps, no snr, no dataclass."""

    evaluations = 3

    def prepare(self, sde, times):
        now = times.tolist()

        def step(i: int, x: torch.Tensor, run: Run) -> torch.Tensor:
            for _ in range(3):
                x = x + 1e-3 * run.score(x, now[i])
            return x

        return step


class Recentre(Corrector):
    """A corrector that asks the score nothing."""

    evaluations = 0

    def prepare(self, sde, times):
        return lambda i, x, run: x - x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("sequence", ["corrector_first", "predictor_first"])
def test_parts_of_a_user_work_in_all_roles(sequence: str) -> None:
    sde, times = VPSDE(), torch.tensor([1.0, 0.6, 0.2, 0.01], dtype=torch.float64)
    score, x_T = mixture().score(sde), torch.ones(4, 2, dtype=torch.float64)

    def shrink(x, i):
        return x + float(times[i] - times[i + 1]) * score(x, times[i].expand(4))

    def nudge(x, i):
        for _ in range(3):
            x = x + 1e-3 * score(x, times[i].expand(4))
        return x

    for predictor, corrector, cost in ((Shrink(), Nudge(), 5), (None, Nudge(), 3), (Shrink(), None, 2)):
        sampler = PredictorCorrector(
            predictor=predictor, corrector=corrector, sequence=sequence, grid=times, denoise=False
        )
        assert sampler.evaluations == 3 * cost
        result = sampler(sde, score, (4, 2), x_T=x_T)
        assert result.nfe == 3 * cost
        x = x_T
        for i in range(3):
            if predictor is None:
                x = nudge(x, i + 1)
            elif corrector is None:
                x = shrink(x, i)
            else:
                x = shrink(nudge(x, i), i) if sequence == "corrector_first" else nudge(shrink(x, i), i + 1)
        assert float((result.x - x).abs().max()) < 1e-12
    within = PredictorCorrector(predictor=Shrink(), corrector=Nudge()).within(52)
    assert (within.steps, within.evaluations) == (10, 51)
    assert within(sde, score, (4, 2)).nfe == 51


def test_a_corrector_without_evaluations() -> None:
    sampler = PredictorCorrector(corrector=Recentre(), sequence="predictor_first", steps=4, denoise=False)
    result = sampler(VPSDE(), mixture().score(VPSDE()), (4, 2))
    assert result.nfe == sampler.evaluations == 4
    assert float(result.x.mean(dim=1).abs().max()) < 1e-6
    with pytest.raises(UserError, match="budget of 10"):
        PredictorCorrector(predictor=None, corrector=Recentre()).within(10)


def test_annealed_langevin_stands_for_its_corrector() -> None:
    chain = AnnealedLangevin(steps=3, step_size=1e-5, levels=7, denoise=False)
    assert chain.corrector == AnnealedLangevinCorrector(steps=3, step_size=1e-5)
    made = PredictorCorrector(corrector=chain, steps=5)
    assert made == PredictorCorrector(corrector=chain.corrector, steps=5)
    assert made.evaluations == 5 * (1 + 3) + 1
    assert not isinstance(chain, Corrector)
    assert {f.name for f in dataclasses.fields(AnnealedLangevinCorrector)} == {"snr", "steps", "step_size"}


# -- state ------------------------------------------------------------------------------------------------------------

WITH_STATE = {
    "dpm_solver_3": DPMSolver(order=3, steps=8),
    "dpm_solver_sde": DPMSolver(stochastic=True, steps=8),
    "unipc": UniPC(order=3, steps=8),
    "deis": DEIS(order=4, steps=8),
    "torchsde": TorchSDE(solver="srk", steps=8),
}


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_prepared_step_serves_runs_that_take_turns(name: str) -> None:
    """What a step remembers belongs to the run: two runs in turns give what each gives alone."""
    sampler, sde = WITH_STATE[name], VPSDE()
    score, times = mixture().score(sde), LogSNR()(sde, 8)
    step = sampler.method(sde, times)
    assert isinstance(step, StatefulStep)
    start = torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def begin(k):
        run = Run(sde, score, (), SampleStreams(k), start[k])
        return run, step.init(start[k], run)

    runs, states, x = [], [], [start[0], start[1]]
    for k in (0, 1):
        run, state = begin(k)
        runs.append(run)
        states.append(state)
    for i in range(8):
        for k in (0, 1):
            x[k], states[k] = step(i, x[k], runs[k], states[k])
    for k in (0, 1):
        alone = dataclasses.replace(sampler, grid=times, denoise=False)
        expected = alone(sde, score, (4, 2), x_T=start[k], generator=SampleStreams(k))
        assert torch.equal(x[k], expected.x)
        assert runs[k].nfe == expected.nfe


# -- presets ----------------------------------------------------------------------------------------------------------


def published_langevin(score, x, sigmas, t_of, steps: int, step_lr: float, generator):
    """The loop of NCSNv2's published code, for a score that takes times."""
    for sigma in sigmas:
        size = step_lr * (sigma / sigmas[-1]) ** 2
        for _ in range(steps):
            z = torch.randn(x.shape, dtype=x.dtype, generator=generator)
            x = x + size * score(x, t_of(sigma, x)) + (2 * size) ** 0.5 * z
    return x + sigmas[-1] ** 2 * score(x, t_of(sigmas[-1], x))


@pytest.mark.parametrize(("rtol", "atol"), [(0.02, 0.0), (0.0, 0.02), (0.02, 0.02), (0.01, 0.04), (0.004, 0.004)])
@pytest.mark.parametrize("name", SDES)
def test_the_adaptive_solvers_tolerance_is_the_larger_of_the_two(name: str, rtol: float, atol: float) -> None:
    """Jolicoeur-Martineau et al. 2021, algorithm 1, by hand: the error of the first attempt against max(atol, rtol max(|x'|,
    |x'_before|)), over steps on both sides of where it is accepted."""
    sde = SDES[name]
    score = Gaussian(torch.tensor([0.3, -0.6]), 0.25 * torch.ones(2)).score(sde)
    g = torch.Generator().manual_seed(2)
    x = sde.sigma(torch.tensor(sde.T)).float() * torch.randn(8, 2, generator=g)
    outcomes = set()
    for h in (1e-5, 1e-4, 5e-4, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16):
        z = torch.randn(8, 2, generator=torch.Generator().manual_seed(5))
        T, s = torch.full((8,), 1.0).double(), torch.full((8,), 1.0 - h).double()

        def half(y: Tensor, t: Tensor, h: float = h, z: Tensor = z) -> Tensor:
            noise = float(sde.g(t[0])) * math.sqrt(h) * z
            return x - h * sde.reverse_drift(score, y, t) + noise

        first = half(x, T)
        better = (first + half(first, s)) / 2
        error = (
            (first - better) / torch.maximum(torch.tensor(atol), rtol * torch.maximum(first.abs(), x.abs()))
        ).double()
        expected = error.square().mean(dim=1).sqrt()
        seen: list[Tensor] = []
        sampler = AdaptiveSDE(rtol=rtol, atol=atol, first_step=h, max_steps=1)
        with pytest.raises(SamplingError, match="max_steps=1"):
            sampler(
                sde,
                score,
                (8, 2),
                x_T=x,
                generator=torch.Generator().manual_seed(5),
                callback=lambda i, seen=seen: seen.append(i.t),  # type: ignore[misc]
            )
        clear = (expected - 1).abs() > 1e-3
        accepted = seen[0] < 1
        assert torch.equal(accepted[clear], (expected <= 1)[clear])
        outcomes |= set(accepted.tolist())
    assert outcomes == {True, False}


def test_ncsn_v2_steps_as_far_as_published() -> None:
    """CIFAR-10: sigmas 50 ... 0.01 in 232 levels of 5 steps, step_lr = 6.2e-6, denoised."""
    sde = VESDE(sigma_min=0.01, sigma_max=50.0, t_end=0.0, t_min=0.0)
    score = mixture().score(sde)
    x_T = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = AnnealedLangevin.ncsn_v2()(sde, score, (5, 2), x_T=x_T, generator=torch.Generator().manual_seed(1))
    sigmas = [50.0 * (0.01 / 50.0) ** (i / 231) for i in range(232)]

    def t_of(sigma, x):
        return torch.full((len(x),), math.log(sigma / 0.01) / math.log(50.0 / 0.01), dtype=torch.float64)

    x = published_langevin(score, x_T, sigmas, t_of, 5, 6.2e-6, torch.Generator().manual_seed(1))
    assert float((result.x - x).abs().max()) < 1e-8
    assert result.nfe == 232 * 5 + 1


# -- options ----------------------------------------------------------------------------------------------------------


def test_the_sequence_and_its_older_name() -> None:
    first, second = PredictorCorrector(), PredictorCorrector(sequence="predictor_first")
    assert first.sequence == "corrector_first"
    assert PredictorCorrector(order="predictor_first") == second != first
    assert PredictorCorrector(order="corrector_first") == first
    assert repr(second) == "PredictorCorrector(sequence='predictor_first')"
    changed = dataclasses.replace(second, steps=7)
    assert (changed.sequence, changed.steps) == ("predictor_first", 7)
    assert dataclasses.replace(changed, order="corrector_first").sequence == "corrector_first"
    with pytest.raises(UserError, match="sequence='sideways'"):
        PredictorCorrector(order="sideways")


def test_a_grid_of_given_times_says_how_many_steps() -> None:
    times = [1.0, 0.5, 0.2, 0.01]
    assert DDIM(grid=times).steps == 3
    assert DDIM(grid=times, steps=3) == DDIM(grid=times)
    assert AnnealedLangevin(grid=times).levels == 4
    assert dataclasses.replace(DDIM(grid=times), eta=0.5).steps == 3
    with pytest.raises(UserError, match="got steps=7 and a grid of 4 times; expected steps=3: leave steps out"):
        DDIM(grid=times, steps=7)
    with pytest.raises(UserError, match="got levels=7 and a grid of 4 times; expected levels=4"):
        AnnealedLangevin(grid=times, levels=7)
    given = DDIM(steps=9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.steps = 3


# -- names ------------------------------------------------------------------------------------------------------------

ALONE = {"corrector": None}
NAMED = {
    "pc": PredictorCorrector(),
    "ald": AnnealedLangevin(),
    "ancestral": PredictorCorrector(predictor=Ancestral(), **ALONE),
    "reverse_diffusion": PredictorCorrector(predictor=ReverseDiffusion(), **ALONE),
    "euler_maruyama": PredictorCorrector(predictor=EulerMaruyama(), **ALONE),
    "ode": ProbabilityFlow(),
    "ddim": DDIM(),
    "dpm_solver": DPMSolver(),
    "unipc": UniPC(),
    "heun": HeunEDM(),
    "deis": DEIS(),
    "adaptive_sde": AdaptiveSDE(),
    "seeds": SEEDS(),
    "torchsde": TorchSDE(),
    "ddpm": PredictorCorrector(predictor=Ancestral(variance="posterior"), denoise=True, **ALONE),
    "euler": DDIM(eta=0.0),
    "euler_ancestral": DDIM(eta=1.0),
    "dpmpp_2m": DPMSolver(order=2, stochastic=False),
    "dpmpp_2m_sde": DPMSolver(order=2, stochastic=True),
    "dpmpp_3m_sde": DPMSolver(order=3, stochastic=True),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_makes_the_method_it_names(name: str) -> None:
    assert create(name) == NAMED[name]
    assert set(samplers.available()) == set(NAMED)


@pytest.mark.parametrize("name", [n for n in NAMED if n != "ode" and n != "adaptive_sde"])
def test_every_name_takes_the_shared_options(name: str) -> None:
    made = create(name, steps=6, grid={"name": "karras", "rho": 3.0}, corrections=["temperature"], clip=True)
    assert made.grid == Karras(rho=3.0)
    assert made.corrections == (Temperature(), ClipDenoised())
    assert getattr(made, "levels", None) == 6 or made.steps == 6


def test_the_names_of_the_field_make_that_method() -> None:
    """Euler and its ancestral form in y = x / alpha and kappa, as k-diffusion has them, written out."""
    sde, n = VPSDE(), 12
    score, x_T = (
        mixture().score(sde),
        torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    times = Karras()(sde, n)
    kappa = (sde.sigma(times) / sde.alpha(times)).tolist()

    def denoised(y, i):
        a, k = float(sde.alpha(times[i])), kappa[i]
        return y + k**2 * a * score(y * a, times[i].expand(len(y)))

    for name in ("euler", "euler_ancestral"):
        y, noise = x_T / float(sde.alpha(times[0])), SampleStreams(4)
        for i in range(n):
            up = 0.0
            if name == "euler_ancestral":
                up = (kappa[i + 1] ** 2 * (kappa[i] ** 2 - kappa[i + 1] ** 2) / kappa[i] ** 2) ** 0.5
            down = (kappa[i + 1] ** 2 - up**2) ** 0.5
            y = y + (y - denoised(y, i)) / kappa[i] * (down - kappa[i])
            if up:
                y = y + up * noise.normal((5, 2)).double()
        made = create(name, steps=n, grid="karras", denoise=False)
        x = made(sde, score, (5, 2), x_T=x_T, generator=SampleStreams(4)).x
        assert float((x - y * float(sde.alpha(times[-1]))).abs().max()) < 1e-9, name


def test_parts_by_name_by_mapping_and_as_objects() -> None:
    one = PredictorCorrector(predictor=Ancestral(variance="transition"), corrector=Langevin(snr=0.2, steps=2))
    for predictor in ({"name": "ancestral", "variance": "transition"}, Ancestral(variance="transition")):
        for corrector in ({"name": "langevin", "snr": 0.2, "steps": 2}, Langevin(snr=0.2, steps=2)):
            assert create("pc", predictor=predictor, corrector=corrector) == one
    assert create("pc", predictor={"name": "ancestral", "variance": "transition"}, snr=0.2, corrector_steps=2) == one
    assert create("pc", corrector="ald", snr=0.3).corrector == AnnealedLangevinCorrector(snr=0.3)
    assert create("pc", corrector={"name": "none"}) == PredictorCorrector(corrector=None)
    assert create("pc", order="predictor_first") == create("pc", sequence="predictor_first")
    assert create("ddim", grid=[1.0, 0.4, 0.1]) == DDIM(grid=[1.0, 0.4, 0.1])
    assert create("ddim", grid={"name": "custom", "times": (1.0, 0.4, 0.1)}) == DDIM(grid=[1.0, 0.4, 0.1])
    assert create("ode", solver={"name": "adams", "points": 4}, steps=7) == ProbabilityFlow(
        solver=Adams(points=4, steps=7)
    )
    assert create("ode", solver="scipy", rtol=1e-4) == ProbabilityFlow(solver=SciPy(rtol=1e-4))
    assert create("ode", flow="plain", solver="rk4") == ProbabilityFlow(flow=PlainFlow(), solver=RK4())
    assert create("ode", flow={"name": "whitened", "data_std": 0.5}, rtol=1e-3, atol=1e-6) == ProbabilityFlow(
        flow=WhitenedFlow(data_std=0.5), solver=Dopri5(rtol=1e-3, atol=1e-6)
    )
    assert create("ode", steps=12) == ProbabilityFlow(solver=Heun(steps=12))
    assert create("torchsde", solver="srk") == TorchSDE(solver="srk")
    threshold = {"name": "dynamic_threshold", "quantile": 0.9}
    assert create("ddim", corrections=threshold).corrections == (DynamicThreshold(quantile=0.9),)
    assert create("ddim", corrections=None).corrections == ()


FIELDS = {
    "pc": PredictorCorrector,
    "ald": AnnealedLangevin,
    "ode": ProbabilityFlow,
    **{n: type(s) for n, s in NAMED.items() if n not in ("pc", "ald", "ode") and type(s) is not PredictorCorrector},
}
FIXED = {"euler": {"eta"}, "euler_ancestral": {"eta"}, **{n: {"order", "stochastic"} for n in NAMED if "dpmpp" in n}}


def test_every_field_is_an_option_with_the_default_of_its_class() -> None:
    """Nothing that a class takes is out of a command line's reach, and nothing is said twice with two defaults."""
    for name, kind in FIELDS.items():
        found, made = samplers.options(name), NAMED[name]
        for f in dataclasses.fields(kind):
            if f.name in FIXED.get(name, ()):
                assert f.name not in found
                continue
            assert f.name in found, (name, f.name)
            if (name, f.name) in {("ald", "steps"), ("ode", "solver")}:
                continue  # ald's own steps are corrector_steps; without a solver, ode chooses by its steps
            assert found[f.name].default == getattr(made, f.name), (name, f.name)
    for name in ("ancestral", "reverse_diffusion", "euler_maruyama"):
        kind = PREDICTORS.entries[name]
        expected = {f.name for f in dataclasses.fields(kind)} | {"steps", "grid", "denoise", "corrections", "clip"}
        assert set(samplers.options(name)) == expected
    for catalogue in (PREDICTORS, CORRECTORS, CORRECTIONS, numerics.SOLVERS):
        for name, kind in catalogue.entries.items():
            assert set(catalogue.options(name)) == {f.name for f in dataclasses.fields(kind)}, name
    for name in NAMED:
        for option in samplers.options(name).values():
            assert not isinstance(option.annotation, str), (name, option)  # resolved: a command line can show its type


def test_another_catalogue_can_be_made_of_the_entries() -> None:
    """As a system does that has a sampler of its own."""
    own = numerics.Catalogue("sampler", {**SAMPLERS.entries, "mine": DDIM}, parts=SAMPLERS.parts)
    made = own.make({"name": "ddim", "clip": True, "grid": "karras"})
    assert made == DDIM(grid=Karras(), corrections=(ClipDenoised(),))
    assert own.make({"name": "torchsde", "solver": "srk"}) == TorchSDE(solver="srk")
    assert own.create("mine", steps=3) == DDIM(steps=3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: create("dmp_solver"), "did you mean 'dpm_solver'"),
        (
            lambda: create("pc", corector=None),
            "'corector' for the sampler 'pc', did you mean 'corrector'.*some of predictor",
        ),
        (lambda: create("dpmpp_2m", order=3), "'order' for the sampler 'dpmpp_2m'.*expected some of"),
        (lambda: create("euler", eta=1.0), "'eta' for the sampler 'euler'"),
        (
            lambda: create("pc", corrector={"name": "langevin", "srn": 1}),
            "'srn' for the corrector 'langevin', did you mean 'snr'",
        ),
        (lambda: create("pc", corrector={"snr": 1.0}), "a corrector without a name; expected one of langevin, ald"),
        (lambda: create("ode", solver="heun", atol=0.1), r"atol=0.1 for solver=Heun\("),
        (lambda: create("pc", corrector=Nudge(), snr=0.1), "expected an option that it takes, some of none"),
        (lambda: create("ddim", corrections="sharpen"), "the correction 'sharpen'"),
        (lambda: create("ddim", eta="much"), "got eta='much'; expected a value of type float"),
        (lambda: create("torchsde", solver="rk4"), "'euler', 'milstein', 'srk'"),
    ],
)
def test_bad_names_and_options_are_refused(make, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_a_bug_in_a_class_keeps_its_traceback(monkeypatch) -> None:
    def broken(self) -> None:
        raise TypeError("planted")

    monkeypatch.setattr(DDIM, "__post_init__", broken)
    with pytest.raises(TypeError, match="planted"):
        create("ddim")


def test_the_affine_steps_are_their_papers_formulas() -> None:
    """x_s from x_t, the score and one draw, written as the docstrings have them."""
    for sde in SDES.values():
        score, x = (
            mixture().score(sde),
            torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        )
        times = torch.tensor([0.8, 0.5], dtype=torch.float64)
        t, s = times
        value, z = score(x, t.expand(4)), SampleStreams(3).normal((4, 2)).double()
        a, v = sde.alpha(t) / sde.alpha(s), sde.transition_std(s, t) ** 2
        eps, D = -sde.sigma(t) * value, (x + sde.sigma(t) ** 2 * value) / sde.alpha(t)
        w = 0.4 * sde.sigma(s) * (1 - (sde.sigma(s) / sde.alpha(s) * sde.alpha(t) / sde.sigma(t)) ** 2).sqrt()
        h, f, g = t - s, sde.f(t), sde.g(t)
        mean = a * sde.sigma(s) ** 2 / sde.sigma(t) ** 2 * x + sde.alpha(s) * v / sde.sigma(t) ** 2 * D
        expected = {
            EulerMaruyama(stochasticity=0.7): x - h * (f * x - (1 + 0.49) / 2 * g**2 * value) + 0.7 * g * h.sqrt() * z,
            ReverseDiffusion(): (2 - a) * x + v * value + v.sqrt() * z,
            Ancestral(): mean + (v * sde.sigma(s) ** 2 / sde.sigma(t) ** 2).sqrt() * z,
            Ancestral(variance="transition"): mean + v.sqrt() * z,
            DDIM(eta=0.4): sde.alpha(s) * D + (sde.sigma(s) ** 2 - w**2).sqrt() * eps + w * z,
        }
        for method, x_s in expected.items():
            options = {"grid": times, "denoise": False}
            sampler = (
                dataclasses.replace(method, steps=1, **options)
                if isinstance(method, Sampler)
                else PredictorCorrector(predictor=method, corrector=None, **options)
            )
            found = sampler(sde, score, (4, 2), x_T=x, generator=SampleStreams(3)).x
            assert float((found - x_s).abs().max()) < 1e-9 * float(x_s.abs().max()), (method, sde)


@dataclass(frozen=True, kw_only=True, repr=False)
class Halve(samplers.GridSampler):
    """A sampler of a user: one function."""

    def method(self, sde, times):
        return lambda i, x, run: x / 2


def test_a_sampler_of_a_user_is_one_function() -> None:
    x_T = torch.ones(3, 2)
    result = Halve(steps=4, denoise=False)(VPSDE(), mixture().score(VPSDE()), (3, 2), x_T=x_T, keep_path=True)
    assert torch.equal(result.x, x_T / 16)
    assert (result.nfe, result.path.shape) == (0, (5, 3, 2))
