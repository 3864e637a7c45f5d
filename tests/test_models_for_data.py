"""A network for data of any shape: every class by name, what follows from the data, and rectangular images."""

import pytest
import torch

import models
from models import for_data, parameter_count, presets
from numerics import UserError

SMALL = {
    "auto": {},
    "mlp": {"width": 16, "depth": 1},
    "unet": {"channels": 8},
    "unet_1d": {"channels": 8},
    "captioned_unet": {"channels": 8, "class_names": ("bold a", "a b c"), "text_width": 16, "text_depth": 1},
    "ncsnpp": {"channels": 8, "blocks": 1},
    "adm": {"channels": 16, "blocks": 1, "groups": 4, "head_channels": 8, "learned_variance": False},
    "dit": {"width": 16, "depth": 1, "heads": 2},
    "refinenet": {"sigmas": (1.0, 0.5, 0.1), "channels": 4},
    "ncsn": {"channels": 4},
    "ncsnv2": {"channels": 4},
}
IMAGES = [(1, 8, 8), (1, 8, 16), (3, 9, 14)]
SHAPES = [(2,), (3, 16), (2, 9), *IMAGES]
LABEL = torch.tensor([1.0, 0.0])


def test_every_class_is_here():
    assert set(SMALL) == set(models.available()) - set(presets.available())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_every_class_takes_the_data_or_says_why_not(name, shape):
    takes = {"auto": (1, 2, 3), "mlp": (1, 2, 3), "unet_1d": (2,)}.get(name, (3,))
    if len(shape) not in takes:
        expected = r"sequences \(C, L\): use unet or mlp" if name == "unet_1d" else r"images \(C, H, W\): use mlp"
        with pytest.raises(UserError, match=f"samples of shape .*; expected {expected}") as error:
            for_data(name, shape, **SMALL[name])
        assert "\n" not in str(error.value)
        return
    net = for_data(name, shape, **SMALL[name])
    x = torch.randn(2, *shape, requires_grad=True)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    y = net(x, LABEL)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert bool(x.grad.isfinite().all())
    gradients = {n: p.grad for n, p in net.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    described = models.networks.describe(net)
    models.create(described["name"], **described["options"]).load_state_dict(net.state_dict())


@pytest.mark.parametrize("shape", IMAGES[1:], ids=str)
@pytest.mark.parametrize("name", ["unet", "ncsnpp", "adm", "dit", "ncsn", "ncsnv2"])
def test_an_oblong_images_every_pixel_counts_and_keeps_its_place(name, shape):
    """The output depends on every pixel, and a corner's pixel moves it most at that corner."""
    torch.manual_seed(0)
    net = for_data(name, shape, **SMALL[name]).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.rand(1, *shape, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(lambda z: net(z, LABEL[:1].double()).square().sum(), x)
    assert bool((gradient.abs() > 0).all())  # the output depends on every pixel
    with torch.no_grad():
        assert net(x.transpose(2, 3), LABEL[:1].double()).shape == (1, shape[0], shape[2], shape[1])
        for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            moved = x.clone()
            moved[..., row, column] += 1e-4
            change = (net(moved, LABEL[:1].double()) - net(x, LABEL[:1].double())).abs().sum(dim=(0, 1))
            near = change.new_zeros(change.shape, dtype=torch.bool)
            rows = slice(0, 4) if row == 0 else slice(-4, None)
            near[rows, slice(0, 4) if column == 0 else slice(-4, None)] = True
            assert float(change[near].mean()) > float(change[~near].mean())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("unet", (1, 8, 8), (4,)),  # the lowest level
        ("unet", (1, 8, 16), (8,)),
        ("unet", (3, 9, 14), (7,)),
        ("ncsnpp", (3, 32, 32), (16,)),
        ("ncsnpp", (1, 28, 28), (14,)),
        ("ncsnpp", (3, 9, 14), (14,)),
        ("ncsnpp", (1, 16, 32), (16,)),
        ("ncsnpp", (1, 8, 8), ()),
        ("ncsnpp", (3, 24, 24), (12,)),
        ("ncsnpp", (3, 23, 23), (12,)),
        ("ncsnpp", (3, 22, 22), (22,)),
        ("adm", (3, 64, 64), (32, 16, 8)),
        ("adm", (3, 40, 64), (32, 16, 8)),
        ("adm", (3, 28, 28), (28, 14, 7)),
    ],
)
def test_attention_goes_to_the_levels_nearest_to_the_default(name, shape, expected):
    with torch.device("meta"):
        net = for_data(name, shape, **SMALL[name])
    assert net.options["image_size"] == max(shape[1:])
    assert net.options["attention_resolutions"] == expected


def test_attention_that_was_asked_for_is_kept_or_refused():
    assert for_data("ncsnpp", (1, 8, 16), attention_resolutions=(8, 4), channels=8).options[
        "attention_resolutions"
    ] == (8, 4)
    assert for_data("ncsnpp", (1, 16, 16), attention_resolutions=(), channels=8).options["attention_resolutions"] == ()
    with pytest.raises(UserError, match=r"attention_resolutions=\(5,\); expected some of 16, 8, 4, 2"):
        for_data("ncsnpp", (1, 8, 16), attention_resolutions=(5,), channels=8)


@pytest.mark.parametrize("name", presets.available())
def test_published_networks_keep_their_parameters(name):
    options = models.options(name)
    classes = options["num_classes"].default if "num_classes" in options else None
    with torch.device("meta"):
        net = for_data(name, (options["in_channels"].default, 32, 32), classes)
    assert parameter_count(net) == presets.PRESETS[name].parameters


@pytest.mark.parametrize("name", ["ddpm_256", "adm_imagenet128", "ncsnv2_lsun128"])
def test_published_networks_run_at_other_sizes(name):
    slim = {"channels": 16} if name.startswith("ncsnv2") else {"channels": 32, "blocks": 1}
    if name == "adm_imagenet128":
        slim["learned_variance"] = False
    net = for_data(name, (3, 9, 14), **slim)
    assert net(torch.randn(2, 3, 9, 14), LABEL).shape == (2, 3, 9, 14)


@pytest.mark.parametrize("name", ["auto", "mlp", "unet", "ncsnpp", "adm", "dit"])
def test_classes_are_those_of_the_data(name):
    net = for_data(name, (1, 8, 8), 3, **SMALL[name])
    assert net.num_classes == 3
    assert net(torch.randn(2, 1, 8, 8), LABEL, torch.tensor([0, 2])).shape == (2, 1, 8, 8)
    assert for_data(name, (1, 8, 8), 0, **SMALL[name]).num_classes is None


def test_auto_offers_the_options_of_both_and_passes_on_those_that_fit():
    names = ("auto", "mlp", "unet", "unet_1d")
    own = {name: set(models.options(name)) - set(models.NETWORKS.derived) for name in names}
    assert own["auto"] == own["mlp"] | own["unet"] | own["unet_1d"]
    everything = {"width": 24, "depth": 2, "channels": 16, "blocks": 2}
    assert for_data("auto", (5,), **everything).options["width"] == 24
    assert for_data("auto", (1, 8, 8), **everything).options["channels"] == 16


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("auto", {"widht": 3}, "option 'widht' for the network 'auto', did you mean 'width'"),
        ("auto", {"width": "a"}, "got width='a'; expected a value of type int"),
        ("unet", {"chanels": 3}, "option 'chanels' for the network 'unet', did you mean 'channels'"),
        ("unet", {"width": 3}, "option 'width' for the network 'unet'"),
        ("unet", {"image_size": 3}, "got image_size=3; expected no value, since it follows from the data"),
        ("mlp", {"dim": 3}, "got dim=3; expected no value"),
        ("vit", {}, "network 'vit', did you mean 'dit'"),
        ("refinenet", {}, "the network 'refinenet' without sigmas"),
        ("ncsnpp", {"groups": 0}, "groups=0"),
        ("ncsnpp", {"eps": -1.0}, "got eps=-1.0"),
        ("ncsnpp", {"out_channels": 0}, "out_channels=0"),
        ("ncsnpp", {"fir_kernel": (0, 0)}, r"got fir_kernel=\(0, 0\)"),
        ("ncsnpp", {"sigmas": ()}, "got 0 sigmas"),
        ("ncsnpp", {"fourier_features": ("a",)}, "fourier_features"),
        ("ncsnpp", {"multipliers": 3}, "multipliers=3"),
        ("adm", {"multipliers": ()}, r"got multipliers=\(\)"),
        ("adm", {"multipliers": ("a",)}, "got multipliers"),
        ("adm", {"multipliers": (0.001,)}, "got multipliers.*whole channels"),
        ("adm", {"head_channels": 0}, "head_channels=0"),
        ("ncsn", {"sigmas": (1.0, float("nan"))}, "got 2 sigmas"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        for_data(name, (1, 8, 8), **options)
    assert "\n" not in str(error.value)


def test_classes_for_a_network_without_are_refused():
    with pytest.raises(
        UserError, match="network 'ncsnv2' for 3 classes; expected one that takes classes, such as unet"
    ):
        for_data("ncsnv2", (1, 8, 8), 3)


@pytest.mark.parametrize("shape", [(0,), (1, 0, 3), (), (1.5,)])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(UserError, match="got event_shape="):
        for_data("auto", shape)
