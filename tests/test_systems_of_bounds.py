"""The systems ddgm, vdm, latent and flow_matching as run: their settings, what they refuse, and a rehearsal of each."""

import json
import math
from types import SimpleNamespace

import numpy
import pytest
import torch

from data.transforms import Rescale
from likelihood import Bins
from models import DDGM, VAE, VDM
from models.ddgm import GreyGaussian, OwnSteps
from numerics import UserError
from workflow import command_line, main, systems
from workflow.configuration import config_for
from workflow.setup import resolve
from workflow.systems.ddgm import ConstantChain, bound_of, entry_of
from workflow.systems.vdm import LearnedSchedule
from workflow.trained_run import load_run

NAMES = ("ddgm", "vdm", "latent", "flow_matching")


def test_the_papers_values_are_the_defaults():
    ddgm = config_for("ddgm")
    assert (ddgm["sde"]["steps"], ddgm["sde"]["beta"], ddgm["decoder"]) == (5, 0.6, "gaussian")
    assert ddgm["training"]["objective"]["estimator"] == "sampled"
    assert config_for("vdm")["sde"]["gamma_max"] == 5.0
    flow = config_for("flow_matching")
    assert flow["training"]["objective"]["weighting"]["name"] == "flow_matching"
    assert flow["training"]["objective"]["times"]["name"] == "uniform"


def test_grey_values_reach_both_ends_of_the_tanh():
    """2 k / 16 - 1 for k = 0 ... 16, not 2 k / 17 - 1, which never reaches 1."""
    setup = resolve(config_for("ddgm"))
    centres = setup.transform.centres(torch.tensor([0, 8, 16]))
    assert centres.tolist() == [-1.0, 0.0, 1.0]
    assert setup.model.decoder.unit_variance and isinstance(setup.model, DDGM)
    assert setup.options.dequantize is False


def test_chains_of_any_length_lose_as_much():
    base = ConstantChain()
    for steps in (5, 10, 1000):
        chain = base.of(steps)
        assert math.isclose((1 - chain.beta) ** steps, 0.4**5, rel_tol=1e-9)


def test_a_density_of_unit_variance_is_stated_in_nats_with_its_reason():
    setup = resolve(config_for("ddgm"))
    data = setup.dataset.split("test").take(slice(0, 20))
    nats = bound_of(setup.model, data, setup, draws=3, estimator="closed_form", shown=False)
    entry = entry_of(nats, setup.model, setup, "closed_form")
    assert (entry["kind"], entry["unit"]) == ("bound", "nats") and "4.33 bits/dim" in entry["reason"]
    # a fresh network says 0 and variance 1: log(2 pi)/2 + x^2/2 for the decoder, and so on; by the objective
    assert math.isclose(entry["mean"], float(nats.mean()))
    grey = resolve(config_for("ddgm", changes={"decoder": "grey"}))
    nats = bound_of(grey.model, data, grey, draws=2, estimator="closed_form", shown=False)
    entry = entry_of(nats, grey.model, grey, "closed_form")
    assert entry["unit"] == "bits/dim"
    assert math.isclose(entry["mean"], float(nats.mean()) / (64 * math.log(2)))


def test_a_samples_bound_does_not_depend_on_its_batch():
    setup = resolve(config_for("ddgm"))
    data = setup.dataset.split("test").take(slice(0, 6))
    whole = bound_of(setup.model, data, setup, draws=2, estimator="sampled", shown=False)
    last = bound_of(setup.model, data.take(slice(4, 6)), setup, draws=2, estimator="sampled", shown=False)
    torch.testing.assert_close(whole[4:], last, rtol=1e-5, atol=1e-4)


def test_the_vdms_weights_include_its_schedule_whose_ends_stay():
    setup = resolve(config_for("vdm"))
    assert isinstance(setup.model, VDM) and any(n.startswith("schedule.") for n, _ in setup.model.named_parameters())
    for p in setup.model.schedule.parameters():
        p.data += torch.randn(p.shape)
    first = -2 * math.log(2 / 17 / 6)
    assert math.isclose(float(setup.sde.log_snr(0.0)), first) and math.isclose(float(setup.sde.log_snr(1.0)), -5.0)


@pytest.mark.parametrize("levels", [2, 17, 256, 1000])
def test_the_first_latent_keeps_a_grey_level(levels):
    """The noise of z_0 is a sixth of a level, so that the bins cost next to nothing whatever their number."""
    transform = Rescale(levels=levels)
    made = LearnedSchedule().on(transform)
    k = torch.arange(levels).reshape(-1, 1).expand(-1, 20)
    sigma = math.exp(made.gamma_min / 2)
    z = transform.centres(k) + sigma * torch.randn(k.shape, generator=torch.Generator().manual_seed(0))
    bits = -Bins(transform=transform).log_prob(k, z, None, 1.0, sigma).mean() / (20 * math.log(2))
    assert float(bits) < 0.02
    assert LearnedSchedule(gamma_min=-3.0).on(transform).gamma_min == -3.0


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("ends", [(-1.0625, 1.0625), (0.0, 1.0), (-3.0, 3.0)])
def test_a_decoders_mean_reaches_the_outermost_grey_values(levels, ends):
    low, high = ends
    grey = GreyGaussian(bin_width=(high - low) / levels, low=low, high=high)
    centres = Rescale(levels=levels, low=low, high=high).centres(torch.tensor([0, levels - 1]))
    torch.testing.assert_close(grey.within(torch.tensor([-20.0, 20.0])), centres)
    net = OwnSteps(dim=1, steps=2, width=4, decoder=grey)
    torch.nn.init.constant_(net.decoder[-1].bias, 20.0)
    torch.testing.assert_close(net.decode(torch.zeros(1, 1))[0].flatten(), centres[1:])


def test_a_bound_on_points_is_of_the_datas_own_units():
    """Standardised data's nats and the logarithm of the scale, so that the number compares with other systems'."""
    setup = resolve(config_for("ddgm", changes={"data.name": "swiss_roll"}))
    entry = entry_of(torch.zeros(4, 2), setup.model, setup, "closed_form")
    assert entry["mean"] == pytest.approx(-2 * setup.transform.log_det) and entry["mean"] != 0
    assert "a point" in entry["text"] and "image" not in entry["text"]
    low, high = setup.model.decoder.mean_range  # all points are within the mean's range
    x = setup.transform.centres(setup.dataset.split("train").x)
    assert low <= float(x.min()) < -1 < 1 < float(x.max()) <= high


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("ddgm", {"sde.steps": 1}, "steps=1"),
        ("ddgm", {"sde.beta": 1.0}, "beta=1.0"),
        ("ddgm", {"model.width": 0}, "width=0"),
        ("ddgm", {"model.width": -1}, "width=-1"),
        ("ddgm", {"decoder": "other"}, "decoder='other'"),
        ("ddgm", {"decoder": "grey", "data.name": "moons"}, "no grey levels"),
        ("vdm", {"sde.gamma_min": 6.0}, "expected one that rises"),
        ("vdm", {"training.dequantize": True}, "expected False"),
        ("latent", {"model.latent": 65}, "latent=65 for data of 64 numbers"),
        ("latent", {"data.name": "moons"}, "no grey levels"),
        ("latent", {"prior": "other"}, "prior='other'"),
        ("flow_matching", {"sde.T": 1.0}, "expected T < 1"),
        ("flow_matching", {"compared.evaluations": 0}, "evaluations"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, change, words):
    with pytest.raises(UserError) as caught:
        resolve(config_for(name, changes=change))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ddgm", "latent"])
def test_a_system_without_a_score_says_what_to_use(name):
    setup = resolve(config_for(name))
    with pytest.raises(UserError, match="has no score") as caught:
        _ = setup.sde
    assert systems.create(name).no_score in str(caught.value)


@pytest.mark.parametrize(("name", "changes"), [("ddgm", {}), ("latent", {}), ("jem", {"study.chain_length": 3})])
def test_samples_of_a_system_without_a_score_are_keyed_by_their_number(name, changes):
    setup = resolve(config_for(name, changes=changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh decoder's last layer is zero, so that all samples are alike
        for p in setup.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    run = SimpleNamespace(setup=setup)
    all_of_them, some = setup.system.samples(run, 6), setup.system.samples(run, 3, first=2)
    torch.testing.assert_close(some.x, all_of_them.x[2:5], atol=1e-5, rtol=0)
    others = setup.system.samples(run, 3, first=2, seed=setup.options.seed + 1)
    assert float((others.x - some.x).abs().max()) > 1e-3 and others.sampler == some.sampler


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_goes_through(name, tmp_path):
    """A rehearsal leaves what every tool reads; a tool that needs what is not there refuses in one line."""
    folder = tmp_path / "run"
    assert main.main([name, "--dry_run", "--quiet", f"--workdir={folder}"]) == 0
    results = json.loads((folder / "results.json").read_text())
    bits = results["bits_per_dim"]
    expected = {"ddgm": ("bound", "nats"), "flow_matching": ("exact", "bits/dim")}.get(name, ("bound", "bits/dim"))
    assert (bits["kind"], bits["unit"]) == expected and math.isfinite(bits["mean"])
    assert {"sampler", "nfe", "seconds", "samples"} <= set(results["sampling"])
    report = (folder / "report.md").read_text()
    for own in {
        "ddgm": ("The hierarchy", "Two estimates of one bound", "Chains of other lengths"),
        "vdm": ("One bound, three schedules", "Chains of the same network", "A learned forward process"),
        "latent": ("Priors", "A deterministic autoencoder", "Directions of attributes"),
        "flow_matching": ("The velocity as a score, by all samplers", "A round of reflow"),
    }[name]:
        assert f"## {own}" in report
    for line in report.splitlines():
        if line.startswith("!["):
            assert (folder / line.split("(")[1].rstrip(")")).is_file()
    run = load_run(folder)
    if name in ("ddgm", "latent"):
        with pytest.raises(UserError, match="has no score"):
            _ = run.score
        with pytest.raises(UserError, match="has no score.*--sampler own"):
            main.main(["nll", "--run", str(folder), "--quiet"])
        own = ["--run", str(folder), "--quiet", "--sampler", "own"]
        assert main.main(["sample", *own, "--n", "5", "--batch_size", "3"]) == 0
        (part, _) = sorted((folder / "samples").glob("own-*/part_*.npz"))
        assert numpy.load(part)["x"].shape == (3, 1, 8, 8)
        assert main.main(["evaluate", *own, "--n", "50"]) == 0
        (entry,) = json.loads((folder / "results.json").read_text())["evaluation"].values()
        assert entry["sampler"] == results["sampling"]["sampler"]
        with pytest.raises(UserError, match="expected none"):
            main.main(["sample", *own, "--steps", "5"])
        with pytest.raises(UserError, match="--gif"):
            main.main(["sample", *own, "--gif", str(tmp_path / "a.gif")])
    assert isinstance(run.setup.model, {"ddgm": DDGM, "vdm": VDM, "latent": VAE}.get(name, object))


def test_the_command_line_knows_them():
    assert set(NAMES) <= set(systems.available())
    assert command_line.EXIT_CODES
