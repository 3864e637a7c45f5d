"""Other people's checkpoints: reproduced to rounding, read without running them, refused when they do not fit."""

import copy
import json
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models import CheckpointError, DiscreteIndex, RefineNet, ScoreModel, from_diffusers, load_score_sde
from models.checkpoint_reader import read_checkpoint
from models.ncsnv2_checkpoint import ncsnv2_model, translate_refinenet
from models.score_sde_checkpoint import score_sde_model, translate_ncsnpp
from numerics import UserError
from sde_lib import VESDE, VPSDE, SubVPSDE, TableVESDE, TableVPSDE, geometric_sigmas

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the reference numbers (../shared/reference) are absent"
)
FOLDERS = ["ddpmpp_vp", "ncsnpp_ve", "ddpm_vp", "ncsnv2", "nll_vp"]


ROUNDING = 3e-5
"""The reference's own: in float64 our ncsnpp_ve is 1.4e-5 from its float32 numbers."""


def relative(got, wanted):
    """The largest error of a sample against that sample's largest value."""
    got, wanted = got.flatten(1), torch.from_numpy(wanted).flatten(1)
    return float(((got - wanted).abs().amax(1) / wanted.abs().amax(1)).max())


@needs_reference
@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_outputs_of_the_published_code_are_reproduced(folder, weights):
    numbers = np.load(REFERENCE / folder / "io.npz")
    path = REFERENCE / folder
    model = load_score_sde(path / "checkpoint.pth", path / "config.json", weights=weights)
    x = torch.from_numpy(numbers["x"])
    with torch.no_grad():
        output = model.net(x, torch.from_numpy(numbers["labels"]))
        assert relative(output, numbers["output_ema" if weights == "ema" else "output_model"]) < ROUNDING
        if weights == "ema" and "t" in numbers:
            assert relative(model(x, torch.from_numpy(numbers["t"])), numbers["score_ema"]) < ROUNDING


# -- NCSN's own --------------------------------------------------------------------------------------------------


def ncsn_files(tmp_path, parts, *, size="64", **changes):
    """A conditional network of ours, written as ncsn's or ncsnv2's code would (list of so many parts); its path and config."""
    levels, channels = 4, 8
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = RefineNet(
            sigmas=geometric_sigmas(levels=levels), in_channels=1, channels=channels, size=size, conditional=True
        )
    state: dict[str, torch.Tensor] = {}
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for entry in translate_refinenet(net):
        (theirs,), value = entry.theirs, net.state_dict()[entry.ours]
        if entry.part is None:
            state[f"module.{theirs}"] = value
        else:
            pieces.setdefault(f"module.{theirs}", {})[entry.part[0]] = value
    state |= {name: torch.cat([found[i] for i in range(3)], dim=-1) for name, found in pieces.items()}
    model = {"sigma_begin": 1, "sigma_end": 0.01, "num_classes": levels, "ngf": channels, **changes}
    config = {"model": model, "data": {"dataset": "MNIST", "image_size": 28, "channels": 1, "logit_transform": False}}
    ema = {name: value + 0.1 for name, value in state.items()}
    torch.save([state, {"state": {}}, 3, 500, ema][:parts], tmp_path / "checkpoint.pth")
    return net, tmp_path / "checkpoint.pth", config


@needs_reference
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_ncsns_own_checkpoint_is_reproduced(weights):
    """ermongroup/ncsn keeps no averages, so its weights come whichever are asked for, and the card says which."""
    path = REFERENCE / "ncsn"
    numbers, config = np.load(path / "io.npz"), json.loads((path / "config.json").read_text())
    model = load_score_sde(path / "checkpoint.pth", path / "config.json", weights=weights)
    x = torch.from_numpy(numbers["x"])
    with torch.no_grad():
        assert relative(model.net(x, torch.from_numpy(numbers["labels"])), numbers["output_model"]) < 1e-5
        t = 1 - torch.from_numpy(numbers["labels"]).double() / (config["model"]["num_classes"] - 1)
        assert relative(model(x, t), numbers["output_model"]) < 1e-5  # the output is the score
    assert model.sde == VESDE(sigma_min=0.01, sigma_max=1.0) and model.data_range == (0, 1)
    assert model.conditioning == DiscreteIndex(levels=6, reverse=True)
    assert model.card == {"source": {"weights": "raw", "step": None}}


@pytest.mark.parametrize("size", ["64", "128"])
@pytest.mark.parametrize("parts", [2, 4, 5])
def test_ncsn_in_the_lists_of_both_repositories(tmp_path, parts, size):
    """`NCSN` and `NCSNdeeper` of ncsnv2 differ from ncsn's in the list around them."""
    switches = {} if parts == 2 else {"ema": parts == 5, "normalization": "InstanceNorm++", "nonlinearity": "elu"}
    net, checkpoint, config = ncsn_files(tmp_path, parts, size=size, **switches)
    x, index = torch.rand(2, 1, 28, 28), torch.tensor([0, 3])
    for weights in ("raw", "ema"):
        model = load_score_sde(checkpoint, config, weights)
        with torch.no_grad():
            same = torch.equal(model.net(x, index), net.eval()(x, index))
        assert same is (weights == "raw" or parts < 5)
        assert model.card["source"] == {
            "weights": "raw" if parts < 5 else weights,
            "step": None if parts == 2 else 500,
        }


def test_a_list_that_should_hold_averages_and_does_not_is_refused(tmp_path):
    _, checkpoint, config = ncsn_files(tmp_path, 4, ema=True)
    with pytest.raises(CheckpointError, match="ask for weights='raw'"):
        load_score_sde(checkpoint, config)
    load_score_sde(checkpoint, config, "raw")


def test_a_switch_of_ncsn_that_is_not_supported_is_refused(tmp_path):
    _, checkpoint, config = ncsn_files(tmp_path, 2, batch_norm=True)
    with pytest.raises(UserError, match="batch_norm=True"):
        load_score_sde(checkpoint, config)
    config["model"]["batch_norm"] = False
    content = torch.load(checkpoint)
    content[0] = {n: v[:, : v.shape[1] * 2 // 3] if n.endswith("embed.weight") else v for n, v in content[0].items()}
    torch.save(content, checkpoint)  # plain instance normalisation, of CondRefineNetDeeperDilated
    with pytest.raises(CheckpointError, match="misshapen"):
        load_score_sde(checkpoint, config)


@needs_reference
def test_averaged_weights_are_the_default_and_differ():
    path = REFERENCE / "ddpmpp_vp"
    ema, raw = (load_score_sde(path / "checkpoint.pth", path / "config.json", *w) for w in ((), ("raw",)))
    assert not torch.equal(ema.net.stem.weight, raw.net.stem.weight)
    assert (ema.card["source"]["weights"], raw.card["source"]["weights"]) == ("ema", "raw")
    with pytest.raises(ValueError, match="weights='mean'; expected one of 'ema', 'raw'"):
        load_score_sde(path / "checkpoint.pth", path / "config.json", "mean")


@needs_reference
def test_each_model_comes_with_its_own_process_and_data():
    models = {f: load_score_sde(REFERENCE / f / "checkpoint.pth", REFERENCE / f / "config.json") for f in FOLDERS}
    assert models["ddpmpp_vp"].sde == VPSDE(beta_min=0.1, beta_max=20.0)
    assert models["ncsnpp_ve"].sde == VESDE(sigma_min=0.01, sigma_max=50.0)
    assert models["ddpmpp_vp"].data_range == (-1, 1)
    assert models["ncsnpp_ve"].data_range == models["ncsnv2"].data_range == (0, 1)
    ddpm = models["ddpm_vp"]
    assert len(ddpm.sde.betas) == 1000
    assert (ddpm.sde.betas[0], ddpm.sde.betas[-1]) == (0.1 / 1000, 20.0 / 1000)
    assert ddpm.conditioning == DiscreteIndex(levels=1000)
    assert models["ncsnv2"].conditioning == DiscreteIndex(levels=10, reverse=True)
    numbers = np.load(REFERENCE / "ncsnv2" / "io.npz")
    t = 1 - torch.arange(10).double() / 9
    torch.testing.assert_close(
        models["ncsnv2"].sde.sigma(t), torch.from_numpy(numbers["sigmas"]).double(), rtol=1e-6, atol=0
    )


@needs_reference
def test_a_discrete_model_scores_at_its_own_steps():
    """The DDPM network's score at step n is -output / sqrt(1 - alpha_bar_n), to rounding."""
    path = REFERENCE / "ddpm_vp"
    numbers = np.load(path / "io.npz")
    model = load_score_sde(path / "checkpoint.pth", path / "config.json")
    n = torch.from_numpy(numbers["labels"]).double()
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[n.long().numpy()]
    wanted = -numbers["output_ema"] / np.sqrt(1 - alpha_bar).reshape(-1, 1, 1, 1)
    with torch.no_grad():
        score = model(torch.from_numpy(numbers["x"]), (n + 1) / 1000)
    assert relative(score.double(), wanted) < 1e-5


@needs_reference
@pytest.mark.parametrize("folder", ["ncsnpp_ve", "ncsnv2", "ddpm_vp"])
def test_a_loaded_model_can_be_saved_in_our_own_format(folder, tmp_path):
    path = REFERENCE / folder
    numbers = np.load(path / "io.npz")
    load_score_sde(path / "checkpoint.pth", path / "config.json").save_pretrained(tmp_path)
    again = ScoreModel.from_pretrained(tmp_path)
    with torch.no_grad():
        output = again.net(torch.from_numpy(numbers["x"]), torch.from_numpy(numbers["labels"]))
    assert relative(output, numbers["output_ema"]) < ROUNDING
    assert again.card["source"]["weights"] == "ema"


# -- a small checkpoint of our own, in score_sde's layout ----------------------------------------------------

CONFIG = {
    "data": {"centered": True, "image_size": 8, "num_channels": 1},
    "model": {
        "name": "ncsnpp", "nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4],
        "resamp_with_conv": True, "conditional": True, "fir": False, "fir_kernel": [1, 3, 3, 1], "skip_rescale": True,
        "resblock_type": "biggan", "progressive": "none", "progressive_input": "none", "progressive_combine": "sum",
        "embedding_type": "positional", "init_scale": 0.0, "scale_by_sigma": False, "dropout": 0.1,
        "nonlinearity": "swish", "normalization": "GroupNorm", "num_scales": 100, "sigma_min": 0.01, "sigma_max": 50.0,
        "beta_min": 0.1, "beta_max": 20.0,
    },
    "training": {"sde": "vpsde", "continuous": True},
}  # fmt: skip


def changed(section, **values):
    config = copy.deepcopy(CONFIG)
    config[section].update(values)
    return config


def layout(config):
    """A random checkpoint in the layout of that config's network."""
    net = score_sde_model(config).net
    own, g = net.state_dict(), torch.Generator().manual_seed(0)
    names = {name: own[e.ours] for e in translate_ncsnpp(net) for name in e.theirs}
    state = OrderedDict({"module.sigmas": torch.ones(100, dtype=torch.float64)})
    for name, ours in names.items():
        shape = list(ours.shape)
        if "NIN" in name:
            parts = 3 if ours.shape[0] % 3 == 0 and ours.shape[0] != (ours.shape[1] if ours.ndim > 1 else 0) else 1
            shape = [shape[0] // parts] if ours.ndim == 1 else [shape[1], shape[0] // parts]
        state["module." + name] = torch.randn(shape, generator=g)
    shadow = [v + 1 for k, v in state.items() if k != "module.sigmas"]
    ema = {"decay": 0.999, "num_updates": 1, "shadow_params": shadow}
    return {"optimizer": {"lr": np.float64(2e-4)}, "model": state, "ema": ema, "step": 7}


@pytest.fixture
def checkpoint():
    return layout(CONFIG)


def saved(content, tmp_path, **options):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_numpy_scalars_and_both_file_formats_are_read(checkpoint, tmp_path, zipped):
    path = saved(checkpoint, tmp_path, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(path)["optimizer"]["lr"] == 2e-4
    model = load_score_sde(path, CONFIG, "raw")
    torch.testing.assert_close(model.net.stem.weight.data, checkpoint["model"]["module.all_modules.2.weight"])
    averaged = load_score_sde(path, CONFIG)
    torch.testing.assert_close(averaged.net.stem.weight.data, checkpoint["model"]["module.all_modules.2.weight"] + 1)


def test_every_difference_is_named(checkpoint, tmp_path):
    state = checkpoint["model"]
    state["module.extra"] = torch.zeros(2)
    del state["module.all_modules.2.bias"]
    state["module.all_modules.2.weight"] = torch.zeros(8, 2, 3, 3)
    with pytest.raises(CheckpointError, match="1 missing.*1 unexpected.*1 misshapen") as error:
        load_score_sde(saved(checkpoint, tmp_path), CONFIG, "raw")
    assert error.value.missing == ("all_modules.2.bias",)
    assert error.value.unexpected == ("extra",)
    assert error.value.misshapen == ("all_modules.2.weight: (8, 2, 3, 3), expected (8, 1, 3, 3)",)
    assert "\n" not in str(error.value)


def test_a_shifted_list_of_averages_is_found(checkpoint, tmp_path):
    shadow = checkpoint["ema"]["shadow_params"]
    with pytest.raises(CheckpointError, match="got 1 tensors in ema.shadow_params; expected"):
        load_score_sde(saved({**checkpoint, "ema": {"shadow_params": shadow[:1]}}, tmp_path), CONFIG)
    shifted = [shadow[1], shadow[0], *shadow[2:]]
    with pytest.raises(CheckpointError, match="of other shapes than the parameters: all_modules.0.weight"):
        load_score_sde(saved({**checkpoint, "ema": {"shadow_params": shifted}}, tmp_path), CONFIG)


def test_a_checkpoint_of_another_architecture_is_refused(checkpoint, tmp_path):
    path = saved(checkpoint, tmp_path)
    for other in (
        changed("model", ch_mult=[1, 2, 2]),
        changed("model", nf=16),
        changed("model", fir=True, progressive_input="residual"),
    ):
        with pytest.raises(CheckpointError, match="does not hold the network that the config describes"):
            load_score_sde(path, other)
    for content in ([1, 2], {"state": 1}, torch.zeros(2)):
        with pytest.raises(CheckpointError, match="expected score_sde's"):
            load_score_sde(saved(content, tmp_path), CONFIG)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("model", attention="new"), "got the unknown switch config.model.attention;"),
        (changed("model", name="unet"), "config.model.name='unet'"),
        (changed("model", nonlinearity="relu"), "nonlinearity='relu'; expected 'swish'"),
        (changed("model", resblock_type="resnet"), "residual_block='resnet'"),
        (changed("model", conditional=False), "conditional=False; expected 'True'"),
        (changed("training", sde="cld"), "config.training.sde='cld'"),
        (changed("data", image_size=9), "image_size=9; expected a multiple of 2.*halves it 1 times"),
        ({k: v for k, v in CONFIG.items() if k != "data"}, "sections"),
        ({**CONFIG, "data": {"centered": True, "image_size": 8}}, "got config.data without 'num_channels'"),
    ],
)
def test_configurations_that_cannot_be_are_refused_in_one_line(config, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load_score_sde(saved(checkpoint, tmp_path), config)
    assert "\n" not in str(error.value)


def test_a_config_file_must_be_json(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert load_score_sde(saved(checkpoint, tmp_path), tmp_path / "config.json").card["source"]["step"] == 7
    (tmp_path / "config.json").write_text("model: ncsnpp")
    for path, message in ((tmp_path / "config.json", "is not JSON"), (tmp_path / "none.json", "which does not exist")):
        with pytest.raises(ValueError, match=message):
            load_score_sde(saved(checkpoint, tmp_path), path)


def test_each_training_sde_is_recognised(tmp_path):
    assert score_sde_model(changed("training", sde="subvpsde")).sde == SubVPSDE()
    discrete = score_sde_model(changed("training", sde="vesde", continuous=False))
    assert discrete.conditioning == DiscreteIndex(levels=100, reverse=True)
    assert isinstance(score_sde_model(changed("training", continuous=False)).sde, TableVPSDE)
    model = {
        "sigma_begin": 1,
        "sigma_end": 0.1,
        "num_classes": 10,
        "sigma_dist": "uniform",
        "ngf": 4,
        "nonlinearity": "elu",
    }
    data = {"dataset": "CIFAR10", "channels": 3, "rescaled": True, "logit_transform": False}
    uniform = ncsnv2_model({"model": model, "data": data})
    assert isinstance(uniform.sde, TableVESDE)
    assert uniform.data_range == (-1, 1)
    t = 1 - torch.arange(10).double() / 9
    torch.testing.assert_close(uniform.sde.sigma(t), torch.linspace(1, 0.1, 10).double(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="config.data.dataset='MNIST'"):
        ncsnv2_model({"model": model, "data": {**data, "dataset": "MNIST"}})


# -- hostile and broken files --------------------------------------------------------------------------------


class Canary:
    """A pickle of this touches a file when it is loaded by a careless reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare pickle"])
def test_a_file_that_would_run_code_is_refused_and_does_not(kind, checkpoint, tmp_path):
    canary = tmp_path / "canary"
    content = {**checkpoint, "optimizer": Canary(canary)}
    path = tmp_path / "checkpoint.pth"
    if kind == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="refused") as error:
        load_score_sde(path, CONFIG)
    assert "\n" not in str(error.value)
    if kind != "bare pickle":
        assert "system" in str(error.value)
    assert not canary.exists()
    torch.load(path, weights_only=False) if kind != "bare pickle" else pickle.loads(path.read_bytes())
    assert canary.exists()  # the trap was real


def test_a_disguised_numpy_scalar_is_refused(checkpoint, tmp_path):
    """An object dtype would let a NumPy scalar carry anything."""

    class Disguised:
        def __reduce__(self):
            return np.float64(1).__reduce__()[0], (np.dtype("O"), b"x")

    with pytest.raises(CheckpointError):
        read_checkpoint(saved({**checkpoint, "optimizer": Disguised()}, tmp_path))


@pytest.mark.parametrize("keep", [0, 3, 0.1, 0.5, 0.99, -1])
def test_a_file_cut_short_is_refused(keep, checkpoint, tmp_path):
    path = saved(checkpoint, tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError) as error:
        load_score_sde(path, CONFIG)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bombs_are_refused(checkpoint, tmp_path):
    path = saved(checkpoint, tmp_path)
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        for name in archive.namelist():
            out.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(bomb)
    giant = saved({"a": [torch.zeros(1).expand(10**12)]}, tmp_path)
    with pytest.raises(CheckpointError, match="larger than its own data"):
        read_checkpoint(giant)


def test_noise_is_no_checkpoint(tmp_path):
    path = tmp_path / "noise.pth"
    path.write_bytes(struct.pack("<200d", *np.random.default_rng(0).normal(size=200)))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="which does not exist"):
        read_checkpoint(tmp_path / "absent.pth")


# -- diffusers -----------------------------------------------------------------------------------------------


class Namespace(dict):
    __getattr__ = dict.get


class FakeUNet(torch.nn.Module):
    """The call and the configuration of a UNet2DModel."""

    config = Namespace(num_class_embeds=None, center_input_sample=True)

    def forward(self, x, timestep, class_labels=None, return_dict=True):
        return (x * timestep.view(-1, 1, 1, 1),)


def scheduler(name, **config):
    defaults = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    return {"_class_name": name, **defaults, **config}


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_diffusers_schedule_is_the_sde_through_its_betas(schedule):
    model = from_diffusers(FakeUNet(), scheduler("DDIMScheduler", beta_schedule=schedule))
    n = torch.tensor([0, 400, 999])
    if schedule == "squaredcos_cap_v2":
        f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    else:
        p = 1 if schedule == "linear" else 2
        betas = np.linspace(1e-4 ** (1 / p), 0.02 ** (1 / p), 1000) ** p
    t = (n + 1).double() / 1000
    alpha_bar = torch.from_numpy(np.cumprod(1 - betas))[n]
    torch.testing.assert_close(model.sde.alpha(t).square(), alpha_bar, rtol=1e-9, atol=0)
    x = torch.ones(3, 1, 2, 2)
    torch.testing.assert_close(model.noise(x, t)[:, 0, 0, 0], n.float())


def test_the_other_diffusers_switches():
    t = torch.tensor([0.5])
    x = torch.ones(1, 1, 2, 2)
    velocity = from_diffusers(FakeUNet(), scheduler("DDPMScheduler", prediction_type="v_prediction"))
    torch.testing.assert_close(velocity.velocity(x, t), 499 * x)
    ve = from_diffusers(FakeUNet(), scheduler("ScoreSdeVeScheduler", sigma_min=0.01, sigma_max=90.0))
    assert ve.sde == VESDE(sigma_min=0.01, sigma_max=90.0)
    assert ve.data_range == (0, 1)
    torch.testing.assert_close(ve(x, t), ve.sde.sigma(t).float() * x)
    with pytest.raises(ValueError, match="scheduler='PNDMScheduler'"):
        from_diffusers(FakeUNet(), scheduler("PNDMScheduler"))
    with pytest.raises(ValueError, match="beta_schedule='sigmoid'"):
        from_diffusers(FakeUNet(), scheduler("DDPMScheduler", beta_schedule="sigmoid"))
    with pytest.raises(ValueError, match="expected both"):
        from_diffusers(FakeUNet())


# What DDPMScheduler and DDIMScheduler write down (diffusers 0.35), with other values than the neutral ones.
FIELDS = {
    "trained_betas": None, "variance_type": "fixed_small", "clip_sample": True, "prediction_type": "epsilon",
    "thresholding": False, "dynamic_thresholding_ratio": 0.995, "clip_sample_range": 1.0, "sample_max_value": 1.0,
    "timestep_spacing": "leading", "steps_offset": 0, "rescale_betas_zero_snr": False, "set_alpha_to_one": True,
    "_diffusers_version": "0.35.1",
}  # fmt: skip


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_the_whole_of_a_schedulers_fields_is_read(name):
    model = from_diffusers(FakeUNet(), scheduler(name, **FIELDS))
    assert model.sde.betas == from_diffusers(FakeUNet(), scheduler(name)).sde.betas
    clip = {"name": "clip_denoised", "low": -1.0, "high": 1.0}
    assert model.card["sampling"] == {"variance": "posterior", "corrections": [clip]}
    assert model.card["scheduler"]["timestep_spacing"] == "leading"
    for changes, expected in (
        ({"clip_sample": False}, {"variance": "posterior", "corrections": []}),
        ({"clip_sample_range": 2.0}, {"variance": "posterior", "corrections": [{**clip, "low": -2.0, "high": 2.0}]}),
        ({"variance_type": "fixed_large"}, {"variance": "transition", "corrections": [clip]}),
        ({"thresholding": True, "clip_sample": False}, {"variance": "posterior", "corrections": [clip]}),
        ({"thresholding": True, "clip_sample_range": 3.0}, {"variance": "posterior", "corrections": [clip]}),
    ):
        model = from_diffusers(FakeUNet(), scheduler(name, **{**FIELDS, **changes}))
        assert model.card["sampling"] == expected
        import samplers

        made = samplers.create("ddim", corrections=model.card["sampling"]["corrections"])
        assert len(made.corrections) == len(expected["corrections"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_karras_sigmas", True), ("use_exponential_sigmas", True), ("use_beta_sigmas", True), ("use_flow_sigmas", True),
        ("final_sigmas_type", "zero"), ("sigma_min", 0.02), ("lower_order_final", True), ("solver_order", 2),
        ("variance_type", "learned"), ("variance_type", "fixed_large_log"), ("prediction_type", "flow_prediction"),
        ("beta_schedule", "laplace"), ("timestep_spacing", "log"), ("sample_max_value", "1"), ("beta_start", "a"),
        ("clip_sample_range", float("nan")), ("rescale_betas_zero_snr", "yes"), ("rescale_timesteps", 2),
        ("num_train_timesteps", True),
    ],
)  # fmt: skip
def test_a_field_that_is_not_understood_is_refused_by_name(field, value):
    for name in ("DDPMScheduler", "DDIMScheduler"):
        with pytest.raises(UserError, match=f"scheduler.{field}=") as refused:
            from_diffusers(FakeUNet(), scheduler(name, **{**FIELDS, field: value}))
        assert "\n" not in str(refused.value)
    from_diffusers(FakeUNet(), scheduler("DDPMScheduler", **FIELDS, use_karras_sigmas=False, final_sigmas_type=None))


def test_a_threshold_that_we_do_not_have_is_refused():
    with pytest.raises(UserError, match="sample_max_value=1.5"):
        from_diffusers(FakeUNet(), scheduler("DDPMScheduler", thresholding=True, sample_max_value=1.5))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_schedule_without_signal_at_its_end(schedule):
    """Lin et al. 2024, algorithm 1, by hand; 0.00006 at index 998 of the linear one, where the schedule itself has 0.00642."""
    given = scheduler("DDIMScheduler", beta_schedule=schedule, prediction_type="v_prediction")
    plain = from_diffusers(FakeUNet(), given).sde
    model = from_diffusers(FakeUNet(), {**given, "rescale_betas_zero_snr": True})
    root = np.sqrt(np.cumprod(1 - np.asarray(plain.betas)))
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    t = torch.arange(1, 1001).double() / 1000
    alpha = model.sde.alpha(t).numpy()
    np.testing.assert_allclose(alpha[:-1], expected[:-1], rtol=1e-6)
    assert 0 < alpha[-1] <= 1e-3 * alpha[-2]
    if schedule == "linear":
        assert (f"{alpha[998]:.5f}", f"{plain.alpha(t)[998]:.5f}") == ("0.00006", "0.00642")
    assert bool(model.sde.log_snr(t).isfinite().all())
    assert bool(model.denoised(torch.ones(2, 1, 2, 2), torch.tensor(1.0)).isfinite().all())


def test_betas_that_were_given_are_the_schedule():
    betas = np.linspace(1e-3, 0.1, 20).tolist()
    model = from_diffusers(FakeUNet(), scheduler("DDPMScheduler", trained_betas=betas, num_train_timesteps=20))
    np.testing.assert_allclose(model.sde.betas, betas)
    assert model.conditioning == DiscreteIndex(levels=20)
    with pytest.raises(UserError, match="20 scheduler.trained_betas for num_train_timesteps=1000"):
        from_diffusers(FakeUNet(), scheduler("DDPMScheduler", trained_betas=betas))


def test_learned_variances_need_a_network_that_has_them():
    wide = FakeUNet()
    wide.config = Namespace(in_channels=1, out_channels=2)
    wide.forward = lambda x, t, class_labels=None, return_dict=True: (torch.cat([x * t.view(-1, 1, 1, 1), 0.5 * x], 1),)
    model = from_diffusers(wide, scheduler("DDPMScheduler", variance_type="learned_range"))
    x, t = torch.ones(2, 1, 2, 2), torch.tensor([0.5, 0.7])
    score, place = model.score_and_variance(x, t)
    torch.testing.assert_close(score, model(x, t))
    torch.testing.assert_close(place, torch.full_like(x, 0.75))  # (v + 1) / 2 of v = 0.5
    with pytest.raises(UserError, match="from 1 to 2 channels"):
        from_diffusers(wide, scheduler("DDPMScheduler"))
    wide.config = Namespace(in_channels=1, out_channels=1)
    with pytest.raises(UserError, match="learned_range"):
        from_diffusers(wide, scheduler("DDPMScheduler", variance_type="learned_range"))


def test_the_fields_of_earlier_versions():
    early = {"tensor_format": "pt", "predict_epsilon": False}
    model = from_diffusers(FakeUNet(), scheduler("DDPMScheduler", **early))
    torch.testing.assert_close(
        model.denoised(torch.ones(1, 1, 2, 2), torch.tensor([0.5])), torch.full((1, 1, 2, 2), 499.0)
    )
    model = from_diffusers(
        FakeUNet(),
        {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 50.0, "snr": 0.17, "correct_steps": 2,
         "sampling_eps": 1e-4, "num_train_timesteps": 1500, "tensor_format": "pt"},
    )  # fmt: skip
    assert model.sde == VESDE(sigma_min=0.01, sigma_max=50.0, t_end=1e-4)
    assert model.card["sampling"] == {"steps": 1500, "corrector": {"name": "langevin", "snr": 0.17, "steps": 2}}
    with pytest.raises(UserError, match="scheduler.snr='a'"):
        from_diffusers(FakeUNet(), scheduler("ScoreSdeVeScheduler", snr="a"))


def test_a_network_of_classes_asks_for_one():
    unet = FakeUNet()
    unet.config = Namespace(num_class_embeds=10)
    model = from_diffusers(unet, scheduler("DDPMScheduler"))
    x, t = torch.ones(1, 1, 2, 2), torch.tensor([0.5])
    model.condition(3)(x, t)
    with pytest.raises(UserError, match="10 classes"):
        model(x, t)
    unet.config = Namespace(class_embed_type="timestep")
    with pytest.raises(UserError, match="class_embed_type='timestep'"):
        from_diffusers(unet, scheduler("DDPMScheduler"))


class StandIn(torch.nn.Module):
    """In the place of UNet2DModel where diffusers is not installed: reads a folder as that does."""

    def __init__(self):
        super().__init__()
        self.config, self.weight = Namespace(), torch.nn.Parameter(torch.zeros(3))

    @classmethod
    def from_pretrained(cls, folder, *, local_files_only, use_safetensors):
        from safetensors.torch import load_file

        assert local_files_only and use_safetensors and (Path(folder) / "config.json").is_file()
        made = cls()
        made.load_state_dict(load_file(Path(folder) / "diffusion_pytorch_model.safetensors"))
        return made


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_both_layouts_of_a_pipeline_and_both_kinds_of_weights(tmp_path, monkeypatch, layout, suffix):
    from safetensors.torch import save_file

    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(UNet2DModel=StandIn))
    network, place = (tmp_path, tmp_path) if layout == "flat" else (tmp_path / "unet", tmp_path / "scheduler")
    for folder in (network, place):
        folder.mkdir(exist_ok=True)
    (network / "config.json").write_text("{}")
    (place / "scheduler_config.json").write_text(json.dumps(scheduler("DDPMScheduler")))
    with pytest.raises(UserError, match="without weights"):
        from_diffusers(tmp_path)
    weights = network / f"diffusion_pytorch_model.{suffix}"
    state = {"weight": torch.tensor([1.0, 2.0, 3.0])}
    save_file(state, weights) if suffix == "safetensors" else torch.save(state, weights)
    assert from_diffusers(tmp_path).net.unet.weight.tolist() == [1, 2, 3]
    if suffix == "bin":
        torch.save({**state, "canary": Canary(tmp_path / "touched")}, weights)
        with pytest.raises(CheckpointError, match="refused"):
            from_diffusers(tmp_path)
        assert not (tmp_path / "touched").exists()


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a diffusers pipeline"):
        from_diffusers(tmp_path)


def test_a_real_diffusers_pipeline(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is optional, and not installed")
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    model = from_diffusers(tmp_path)
    x, n = torch.randn(3, 3, 8, 8), torch.tensor([0, 10, 999])
    with torch.no_grad():
        torch.testing.assert_close(model.noise(x, (n + 1).double() / 1000), unet(x, n).sample)
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "config.json").write_bytes((tmp_path / "unet" / "config.json").read_bytes())
    (flat / "scheduler_config.json").write_bytes((tmp_path / "scheduler" / "scheduler_config.json").read_bytes())
    torch.save(unet.state_dict(), flat / "diffusion_pytorch_model.bin")
    with torch.no_grad():
        torch.testing.assert_close(from_diffusers(flat).noise(x, (n + 1).double() / 1000), unet(x, n).sample)
