"""On a GPU: every sampler, likelihood, objective and network gives the CPU's numbers, and no loop waits for the device.

`make gpu` runs it; without a GPU everything is skipped. SCORE_SDE_TEST_DEVICE=cpu runs the same code on the CPU, which tests
the tests: what is compared is then the same by construction, and what asks CUDA is left out.
"""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import torch
from test_models_for_data import SMALL
from training_cases import digest, options, points, tiny_model

import models
import samplers
import training
from evaluation import frechet_distance, kernel_distance, manifold, mmd, nearest, sliced_wasserstein
from guidance import DPS, MomentMatching, PiGDM, posterior
from likelihood import Exact, Hutchinson, accurate, elbo, fast, log_likelihood
from models import Preconditioned, ScoreModel, presets
from numerics import SampleStreams, normal
from sde_lib import (
    VESDE,
    VPSDE,
    Downsample,
    Linear,
    Mask,
    Masks,
    Measurement,
    SubVPSDE,
    TableVESDE,
    TableVPSDE,
    geometric_sigmas,
    linear_betas,
)
from sde_lib.analytic import Gaussian
from training import Callback, Interrupted, train
from training.streams import StepStreams

DEVICE = os.environ.get("SCORE_SDE_TEST_DEVICE", "cuda")
ON_CUDA = DEVICE.startswith("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_CUDA and not torch.cuda.is_available(), reason="needs a GPU (or SCORE_SDE_TEST_DEVICE=cpu)"),
]
cuda_only = pytest.mark.skipif(not ON_CUDA, reason="asks CUDA")

SDES = {"vp": VPSDE(), "ve": VESDE(sigma_max=10.0), "sub_vp": SubVPSDE()}
SIZES = {"ald": {"levels": 6}, "adaptive_sde": {}, "ode": {}}
OWN_NOISE = ("torchsde",)  # its Brownian path has a generator of its own on each device
CHOOSES_ITS_STEPS = ("adaptive_sde", "ode", "torchsde")


@pytest.fixture(autouse=True)
def _float32_products():
    """Products in float32, not TF32, or nothing would agree to more than three digits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def never_waits():
    """Raises where the host waits for the device."""
    if not ON_CUDA:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pair(sde, **more):
    """The same small network on the CPU and on the device."""
    here = tiny_model(sde, wild=True, **more).eval().requires_grad_(False)
    there = tiny_model(sde, wild=True, **more).eval().requires_grad_(False).to(DEVICE)
    return here, there


def sampler_of(name):
    return samplers.create(name, **SIZES.get(name, {"steps": 6}))


def close(there, here, tolerance):
    """Within `tolerance` of the largest value."""
    assert there.device.type == torch.device(DEVICE).type
    there, here = there.detach().cpu().double(), here.detach().double()
    assert bool(there.isfinite().all())
    assert float((there - here).abs().max()) <= tolerance * max(1.0, float(here.abs().max()))


# -- samplers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", SDES)
@pytest.mark.parametrize("name", samplers.available())
def test_samples_are_the_cpus(name, process):
    sde = SDES[process]
    here, there = pair(sde)
    shape, ids = (6, 2), torch.arange(6)
    expected = sampler_of(name)(sde, here, shape, generator=SampleStreams(3, ids))
    found = sampler_of(name)(sde, there, shape, generator=SampleStreams(3, ids), device=DEVICE)
    if name in OWN_NOISE:
        assert found.x.device.type == torch.device(DEVICE).type and bool(found.x.isfinite().all())
    else:
        close(found.x, expected.x, 2e-2 if name in CHOOSES_ITS_STEPS else 1e-3)


@pytest.mark.parametrize("process", SDES)
@pytest.mark.parametrize("name", [n for n in samplers.available() if n not in CHOOSES_ITS_STEPS])
def test_no_samplers_loop_waits(name, process):
    """From the first step's end to the last one's: the check of the samples, after it, looks once."""
    sde = SDES[process]
    _, there = pair(sde)
    sampler = sampler_of(name)
    with contextlib.ExitStack() as stack:

        def watch(info):
            if info.step == 1:
                stack.enter_context(never_waits())
            if info.step == info.steps:
                stack.close()

        sampler(sde, there, (6, 2), generator=SampleStreams(3, torch.arange(6)), device=DEVICE, callback=watch)


# -- likelihoods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", SDES)
@pytest.mark.parametrize("divergence", [Exact(), Hutchinson(probes=1), Hutchinson(probes=2)], ids=repr)
@pytest.mark.parametrize("way", ["fast", "accurate"])
def test_likelihoods_are_the_cpus(process, divergence, way):
    sde, x = SDES[process], torch.randn(5, 2)
    here, there = pair(sde)
    method = fast(sde, here, x, steps=12) if way == "fast" else accurate(tolerance=1e-5)

    def scored(model, data):
        streams = SampleStreams(4, torch.arange(5))
        return log_likelihood(sde, model, data, method=method, divergence=divergence, generator=streams)

    close(scored(there, x.to(DEVICE)).log_prob, scored(here, x).log_prob, 1e-3)


@pytest.mark.parametrize("name", ["mask", "masks", "linear", "downsample"])
def test_samples_given_a_measurement_are_the_cpus(name):
    """The operator's own tensors stay on the CPU, as a script makes them."""
    sde, x = VPSDE(), normal((2, 1, 4, 4), SampleStreams(5))
    seen = normal((2, 1, 4, 4), SampleStreams(6)) > 0
    operator = {
        "mask": Mask(seen[0]),
        "masks": Masks(seen),
        "linear": Linear(normal((5, 16), SampleStreams(7)), shape=(1, 4, 4)),
        "downsample": Downsample(2),
    }[name]
    law = Gaussian(torch.zeros(1, 4, 4), torch.linspace(0.1, 1, 16))
    index = torch.tensor([1])

    def found(device):
        m, score = Measurement(operator, operator(x.to(device)), 0.2), law.score(sde)
        yield samplers.DDNM(measurement=m, steps=6)(sde, score, x.shape, generator=SampleStreams(0), device=device).x
        for method in (MomentMatching(), PiGDM(), DPS()):
            given = posterior(sde, score, m, method=method)
            yield samplers.DDIM(steps=6)(sde, given, x.shape, generator=SampleStreams(0), device=device).x
            yield given.take(index.to(device))(x.to(device)[1:], torch.tensor(0.5))

    for there, here in zip(found(DEVICE), found("cpu"), strict=True):
        close(there, here, 1e-4)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, mmd, sliced_wasserstein, manifold, nearest])
def test_measures_of_samples_are_the_cpus(measure):
    x, y = (normal((40, 3), SampleStreams(seed)) for seed in (8, 9))
    assert repr(measure(x.to(DEVICE), y.to(DEVICE))) == repr(measure(x, y))


@pytest.mark.parametrize("process", SDES)
def test_bounds_are_the_cpus(process):
    sde, x = SDES[process], torch.randn(5, 2)
    here, there = pair(sde)
    expected = elbo(sde, here, x, draws=16, generator=SampleStreams(5, torch.arange(5)))
    found = elbo(sde, there, x.to(DEVICE), draws=16, generator=SampleStreams(5, torch.arange(5)))
    close(found.diffusion, expected.diffusion, 1e-3)
    close(found.prior, expected.prior, 1e-4)


# -- networks and objectives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in models.available() if n not in presets.available()])
def test_networks_and_their_gradients_are_the_cpus(name):
    torch.manual_seed(0)
    net = models.for_data(name, (1, 16, 16), **SMALL[name])
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, label = torch.randn(2, 1, 16, 16), torch.tensor([0.0, 1.0])

    def outcome(place):
        net.to(place).zero_grad()
        output = net(x.to(place), label.to(place))
        output.square().mean().backward()
        return output, [p.grad.clone() for p in net.parameters() if p.grad is not None]

    expected, slopes = outcome("cpu")
    expected = expected.detach().clone()
    found, found_slopes = outcome(DEVICE)
    close(found, expected, 1e-3)
    for a, b in zip(found_slopes, slopes, strict=True):
        close(a, b, 1e-3)


class Learned(torch.nn.Module):
    """A network whose second half is a variance's place."""

    learned_variance = True

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 4)

    def forward(self, x, label, class_label=None):
        return self.line(torch.cat([x, label.unsqueeze(1)], 1))


def objective_case(name):
    """The objective, and a model that it can train."""
    chain, ladder = TableVPSDE(betas=linear_betas(steps=50)), TableVESDE(sigmas=geometric_sigmas(levels=50))
    made = {
        "ddpm_simple": (training.DDPMSimple(), tiny_model(chain, wild=True)),
        "smld": (training.SMLD(), tiny_model(ladder, wild=True)),
        "vlb": (training.VLB(steps=50), tiny_model(chain, wild=True)),
    }
    if name == "hybrid":
        torch.manual_seed(1)
        return training.Hybrid(steps=50), ScoreModel(Learned(), chain)
    return made.get(name) or (training.create(name), tiny_model(wild=True))


@pytest.mark.parametrize("name", training.available())
def test_objectives_and_their_gradients_are_the_cpus(name):
    objective, model = objective_case(name)
    x = torch.rand(8, 2) - 0.5
    draws = objective.draw(model.sde, x.shape, StepStreams(0, 0, torch.device("cpu")))

    def outcome(place):
        model.to(place).zero_grad()
        on = {key: value.to(place) for key, value in draws.items()}
        loss = objective.loss(model, x.to(place), on, None)
        loss.mean().backward()
        return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, slopes = outcome("cpu")
    expected = expected.detach().clone()
    found, found_slopes = outcome(DEVICE)
    close(found, expected, 1e-3)
    for a, b in zip(found_slopes, slopes, strict=True):
        close(a, b, 1e-3)


# -- training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", training.available())
def test_no_step_of_training_waits(name):
    """Between two reports; the first steps make what the later ones reuse."""
    objective, model = objective_case(name)
    with contextlib.ExitStack() as stack:

        class Watch(Callback):
            def on_step(self, state):
                if state.step == 3:
                    stack.enter_context(never_waits())
                if state.step == 9:
                    stack.close()

        chosen = options(steps=12, log_every=12, ema=(0.9,), power_ema=(0.1,))
        train(model.to(DEVICE), points(), None, chosen, objective=objective, callbacks=[Watch()])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_as_float32_does(precision):
    losses = [
        train(tiny_model(wild=True).to(DEVICE), points(), None, options(precision=p)).losses
        for p in ("fp32", precision)
    ]
    assert losses[0] != losses[1]
    assert losses[1][-1][1] == pytest.approx(losses[0][-1][1], rel=0.05)


def test_compiled_training_gives_the_plain_network_back():
    torch.compiler.reset()
    losses = []
    for flag in (False, True):
        model = tiny_model(wild=True).to(DEVICE)
        losses.append([v for _, v in train(model, points(), None, options(compile=flag)).losses])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    x = torch.randn(4, 2, device=DEVICE)
    method = fast(model.sde, model.eval(), x, steps=4)
    found = log_likelihood(model.sde, model, x, divergence=Hutchinson(probes=2), method=method)
    assert bool(found.log_prob.isfinite().all())


def test_a_run_goes_on_bit_for_bit(tmp_path):
    class Stop(Callback):
        def on_step(self, state):
            if state.step == 5:
                state.interruption.requested = signal.SIGTERM

    chosen = options(checkpoint_every=5)
    train(tiny_model().to(DEVICE), points(), None, chosen, folder=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tiny_model().to(DEVICE), points(), None, chosen, folder=tmp_path / "parts", callbacks=[Stop()])
    train(tiny_model(seed=1).to(DEVICE), points(), None, chosen, folder=tmp_path / "parts", resume=True)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


@cuda_only
def test_memory_does_not_grow_and_activations_can_be_saved():
    sde = VPSDE()
    net = models.UNet(image_size=16, channels=16, multipliers=(1, 2))
    model = ScoreModel(net, sde, Preconditioned(data_std=0.5)).to(DEVICE).eval()
    held = []
    for _ in range(4):
        samplers.create("dpm_solver", steps=5)(sde, model, (16, 1, 16, 16), device=DEVICE)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[1]
    peaks = []
    for again in (False, True):
        net.checkpoint_activations = again
        torch.cuda.reset_peak_memory_stats()
        model.noise(torch.randn(64, 1, 16, 16, device=DEVICE), torch.full((64,), 0.5, device=DEVICE)).mean().backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < peaks[0]
