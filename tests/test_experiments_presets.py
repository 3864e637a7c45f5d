"""Whole settings by name: every preset of every script makes its objects and runs from the script, on small files of the kind
that it reads; and the published networks train two steps."""

import itertools
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import test_data_files as made
import torch
from PIL import Image

from data import from_tensor
from experiments import sub_vp, ve, vp
from models import for_data
from numerics import UserError
from training import train
from workflow import configuration, presets, setup, systems

pytestmark = pytest.mark.usefixtures("loose_pilots")

SCRIPTS = {"vp": vp, "ve": ve, "sub_vp": sub_vp}
SIZES = {"digits": (1, 8), "fashion_mnist": (1, 28), "cifar10": (3, 32), "cifar10_deep": (3, 32), "image_256": (3, 256)}
PARAMETERS = {
    ("cifar10", "vp"): 61_804_419,
    ("cifar10", "ve"): 62_758_787,
    ("cifar10_deep", "sub_vp"): 106_632_579,
    ("cifar10_deep", "ve"): 107_586_947,
}


def pictures(name: str, n: int = 4):
    """Random images of the preset's size, 256 grey levels (17 for the digits)."""
    channels, size = SIZES[name]
    x = torch.randint(0, 17 if name == "digits" else 256, (n, channels, size, size), dtype=torch.uint8)
    return from_tensor(x, levels=17 if name == "digits" else 256)


def with_data(monkeypatch, dataset):
    """Resolves configurations on these data, whatever they name."""
    monkeypatch.setattr(
        setup, "load_data", lambda section: (dataset, dataset.transform(section["low"], section["high"]))
    )


def config_of(script, preset, **changes):
    system = systems.create(script)
    config = configuration.default_config(system, preset)
    configuration.change(config, system, {name.replace("__", "."): value for name, value in changes.items()})
    return configuration.plain(config)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_makes_its_objects(name, script, monkeypatch):
    config, dataset = config_of(script, name), pictures(name)
    with_data(monkeypatch, dataset)
    made = []

    def on_meta(*arguments, **options):
        with torch.device("meta"):
            made.append(for_data(*arguments, **options))
        return torch.nn.Identity()

    monkeypatch.setattr("models.for_data", on_meta)
    resolved = setup.resolve(config)
    count = sum(p.numel() for p in made[0].parameters() if p.requires_grad)
    assert count == PARAMETERS.get((name, script), count)
    assert resolved.options.steps == config["training"]["steps"]
    if name != "digits" and script == "ve":  # the largest distance between two images in this range is of that order
        size = math.prod(dataset.event_shape) ** 0.5 * (config["data"]["high"] - config["data"]["low"])
        assert 0.3 * size < resolved.sde.sigma_max < 1.3 * size


QUICK = [
    "--config.training.steps=2",
    "--config.training.warmup=1",
    "--config.training.batch_size=2",
    "--config.training.log_every=1",
    "--config.training.eval_every=2",
    "--config.training.validation=2",
    "--config.training.precision=fp32",
    "--config.sampling.steps=1",
    "--config.sampling.second_steps=1",
    "--config.sampling.n=1",
    "--config.likelihood.steps=2",
    "--config.likelihood.limit=1",
    "--config.likelihood.probes=1",
    "--config.likelihood.draws=1",
    "--config.likelihood.batch_size=1",
    "--config.baselines=False",
]
# In place of the published networks, and of pictures of 256x256, which two cores would be at for long.
CUT_DOWN = ["--config.model.name=auto", "--config.model.channels=4", "--config.model.multipliers=(1, 1, 1, 1, 1)"]
CUT_DOWN += ["--config.model.grey_level_features=()"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of each kind of files, with as few of them as the data sets' validation parts allow."""
    root = tmp_path_factory.mktemp("files")
    (root / "fashion_mnist").mkdir()
    random = np.random.RandomState(0)
    for part, count in (("train", 5010), ("t10k", 4)):
        images, labels = random.randint(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        (root / "fashion_mnist" / f"{part}-images-idx3-ubyte").write_bytes(made.idx_bytes(images))
        (root / "fashion_mnist" / f"{part}-labels-idx1-ubyte").write_bytes(made.idx_bytes(labels))
    batches = root / "cifar10" / "cifar-10-batches-bin"
    batches.mkdir(parents=True)
    for name in [*made.CIFAR_TRAIN, "test_batch"]:
        images = random.randint(0, 256, (1002 if name in made.CIFAR_TRAIN else 4, 3072), np.uint8)
        (batches / f"{name}.bin").write_bytes(made.cifar_binary(images, np.arange(len(images)) % 10))
    (root / "image_folder").mkdir()
    for i in range(12):
        pixels = random.randint(0, 256, (300, 270, 3), np.uint8)
        Image.fromarray(pixels).save(root / "image_folder" / f"{i}.jpg")
    return root


QUICKLY = (("digits", "vp"), ("fashion_mnist", "ve"))


@pytest.mark.parametrize(
    ("name", "script"),
    [
        pair if pair in QUICKLY else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(presets.PRESETS, SCRIPTS)
    ],
)
def test_every_preset_runs_from_its_script(name, script, files, tmp_path):
    kind = presets.of(script)[name].get("data.name", "digits")
    root = [] if kind == "digits" else [f"--config.data.root={files / kind}"]
    network = CUT_DOWN if SIZES[name][0] == 3 else ["--config.model.channels=8"]
    size = min(32, SIZES[name][1])
    network = network + ([f"--config.data.size={size}"] if kind == "image_folder" else [])
    threads = ["--config.threads=1"]  # as the other tests: this process is theirs, too
    folder = tmp_path / "run"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SCRIPTS[script].main([f"--preset={name}", f"--workdir={folder}", *root, *QUICK, *network, *threads])
    results, config = (json.loads((folder / f"{n}.json").read_text()) for n in ("results", "config"))
    assert results["training"]["steps"] == 2 and results["bits_per_dim"]["images"] == 1
    assert config["data"]["name"] == kind
    with Image.open(folder / "samples" / f"{config['sampling']['sampler']['name']}.png") as picture:
        assert min(picture.size) >= size


def test_a_preset_decodes_to_its_own_size(files):
    config = config_of("vp", "image_256", data__root=str(files / "image_folder"))
    dataset, _ = setup.load_data(config["data"])
    assert dataset.event_shape == (3, 256, 256)


def test_options_of_the_data_reach_them(files, tmp_path):
    named = {"data__name": "image_folder", "data__root": str(files / "image_folder")}
    with pytest.raises(UserError, match="'image_folder' without size"):
        setup.load_data(config_of("vp", "digits", **named)["data"])
    more = {"data__size": (12, 10), "data__channels": 1, "data__cache": str(tmp_path / "cache")}
    dataset, _ = setup.load_data(config_of("vp", "digits", **named, **more)["data"])
    assert dataset.event_shape == (1, 12, 10)
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1
    with pytest.raises(UserError, match=r"config\.data\.size: got the option 'size' for the data set 'digits'"):
        config_of("vp", "digits", data__size=12)


@pytest.mark.parametrize(
    ("shape", "dtype", "model"),
    [
        ((40, 1), np.float32, "channels=8"),
        ((40, 3), np.float32, "channels=8"),
        pytest.param((40, 2, 16), np.float32, "channels=8", marks=pytest.mark.slow),
        pytest.param((40, 5, 8, 8), np.float32, "channels=8", marks=pytest.mark.slow),
        ((40, 1, 8, 8), np.float64, "channels=8"),
        ((40, 2, 8, 8), np.uint8, "channels=8"),
        ((40, 3, 8, 6), np.uint8, "channels=8"),
        pytest.param((40, 1, 8, 16), np.uint8, "channels=8", marks=pytest.mark.slow),
        ((40, 1, 8, 8), np.uint16, "channels=8"),
        pytest.param((40, 2, 2, 2, 3), np.float32, "channels=8", marks=pytest.mark.slow),
    ],
)
def test_a_users_own_array_trains_and_is_drawn(shape, dtype, model, tmp_path):
    values = np.random.RandomState(0).uniform(0, 256, shape).astype(dtype)
    np.save(tmp_path / "mine.npy", values)
    arguments = [
        "--config.data.name=arrays",
        f"--config.data.root={tmp_path / 'mine.npy'}",
        f"--config.model.{model}",
    ]
    vp.main([*arguments, *QUICK, "--config.sampling.n=5", f"--workdir={tmp_path / 'run'}"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["training"]["steps"] == 2
    for name in ("pc", "dpm_solver", "step_00000002"):
        with Image.open(tmp_path / "run" / "samples" / f"{name}.png") as picture:
            assert len(set(picture.convert("L").getdata())) > 1


@pytest.mark.parametrize("script", ["ddpm", "iddpm", "ddim", "edm", "flow_matching", "vdm", "classes"])
def test_a_preset_keeps_what_the_system_is(script, monkeypatch):
    """The meaning of the network's output is the system's; a published one of another meaning is not offered."""
    own = config_of(script, "digits")["model"]["parametrization"]["name"]
    offered = presets.of(script)
    assert {"digits", "fashion_mnist"} <= set(offered)
    assert ("cifar10" in offered) == (script not in ("iddpm", "vdm", "classes")) and "image_256" not in offered
    for name in offered:
        config = config_of(script, name)
        assert config["model"]["parametrization"]["name"] == own
        with_data(monkeypatch, pictures(name))
        monkeypatch.setattr("models.for_data", lambda *arguments, **options: torch.nn.Identity())
        monkeypatch.setattr("models.ScoreModel.learned_variance", script == "iddpm")
        if script != "classes":
            assert setup.resolve(config).sde is not None


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="did you mean 'fashion_mnist'"):
        config_of("vp", "fashion")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_published_cifar10_settings_train(script, monkeypatch):
    """Two steps of two images on random data. Published blocks begin as the identity: most weights wait behind a zero."""
    with_data(monkeypatch, pictures("cifar10"))
    made = setup.resolve(config_of(script, "cifar10"))
    before = {k: v.clone() for k, v in made.model.net.state_dict().items()}
    options = replace(made.options, steps=2, batch_size=2, warmup=1, log_every=1, progress=False)
    result = train(made.model, made.training_data, made.transform, options, objective=made.objective)
    assert all(math.isfinite(loss) for _, loss in result.losses)
    moved = [not torch.equal(v, before[k]) for k, v in made.model.net.state_dict().items() if v.is_floating_point()]
    assert sum(moved) > 0.2 * len(moved), (sum(moved), len(moved))
