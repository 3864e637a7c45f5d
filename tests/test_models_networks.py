"""Every network: gradients, independence of samples, determinism, sizes, and the transformations that torch offers."""

import math

import pytest
import torch

import models
from models import ADM, MLP, NCSN, DiT, NCSNpp, NCSNv2, UNet, parameter_count
from models.attention import AttentionBlock
from models.input_features import FourierFeatures

NETWORKS = {
    "mlp": (lambda **k: MLP(12, width=16, depth=2, **k), (3, 2, 2)),
    "unet": (lambda **k: UNet(channels=8, num_classes=3, **k), (1, 8, 8)),
    "ddpm": (
        lambda **k: NCSNpp(
            image_size=8,
            channels=8,
            multipliers=(1, 2),
            blocks=1,
            attention_resolutions=(4,),
            residual_block="ddpm",
            skip_rescale=False,
            **k,
        ),  # fmt: skip
        (3, 8, 8),
    ),
    "ncsnpp": (
        lambda **k: NCSNpp(
            image_size=8,
            channels=8,
            multipliers=(1, 2),
            blocks=1,
            attention_resolutions=(4,),
            fir_kernel=(1, 3, 3, 1),
            progressive_input="residual",
            progressive_output="output_skip",
            embedding="fourier",
            scale_by_sigma=True,
            **k,
        ),  # fmt: skip
        (3, 8, 8),
    ),
    "adm": (
        lambda **k: ADM(
            image_size=8,
            channels=8,
            multipliers=(1, 2),
            blocks=1,
            attention_resolutions=(4,),
            groups=4,
            head_channels=4,
            num_classes=3,
            **k,
        ),  # fmt: skip
        (3, 8, 8),
    ),
    "dit": (lambda **k: DiT(image_size=8, width=16, depth=2, heads=2, num_classes=3, **k), (3, 8, 8)),
    "ncsn": (lambda **k: NCSN(channels=4, **k), (3, 8, 8)),
    "ncsnv2": (lambda **k: NCSNv2(channels=4, **k), (3, 8, 8)),
}
LABEL = torch.tensor([0.5, 1.0, 2.0, 3.0])
every_network = pytest.mark.parametrize("name", NETWORKS)


def build(name, **options):
    """The network with no weight at zero, and four samples for it."""
    make, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make(**options)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    return net.eval(), torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))


@every_network
def test_gradients_are_finite_differences(name):
    net, x = build(name)
    net, x = net.double(), x.double().requires_grad_()
    g = torch.Generator().manual_seed(2)
    parameters = list(net.parameters())
    weight = torch.randn(net(x, LABEL).shape, generator=g, dtype=torch.float64)
    directions = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in (x, *parameters)]

    def f():
        return (net(x, LABEL.double()) * weight).sum()

    gradients = torch.autograd.grad(f(), (x, *parameters))
    for tensors, ds, gs in (
        ([x], directions[:1], gradients[:1]),
        (parameters, directions[1:], gradients[1:]),
    ):
        slope = sum(float((d * g_).sum()) for d, g_ in zip(ds, gs, strict=True))
        h, values = 1e-6, []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for p, d in zip(tensors, ds, strict=True):
                    p.add_(d, alpha=sign * h)
                values.append(float(f()))
        assert math.isclose((values[0] - values[1]) / (2 * h), slope, rel_tol=1e-5, abs_tol=1e-5)


@every_network
def test_every_parameter_is_used(name):
    net, x = build(name)
    class_label = torch.tensor([0, 1, 2, 0]) if net.num_classes else None
    (net(x, LABEL, class_label).square().sum()).backward()
    unused = [n for n, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not unused


@every_network
def test_permuting_the_batch_permutes_the_result_exactly(name):
    net, x = build(name)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        assert torch.equal(net(x[order], LABEL[order]), net(x, LABEL)[order])


@every_network
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    net, x = build(name)
    other = x.clone()
    other[1:] = 100.0
    with torch.no_grad():
        alone, among = net(x, LABEL)[0], net(other, LABEL)[0]
    torch.testing.assert_close(alone, among, rtol=1e-5, atol=1e-5)


def test_evaluation_is_deterministic_and_training_drops_out():
    net = UNet(channels=8, dropout=0.5)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.rand(2, 1, 8, 8)
    net.eval()
    assert torch.equal(net(x, LABEL[:2]), net(x, LABEL[:2]))
    net.train()
    assert not torch.equal(net(x, LABEL[:2]), net(x, LABEL[:2]))


@every_network
@pytest.mark.parametrize("size", [(9, 9), (8, 13), (11, 10)])
def test_odd_and_rectangular_sizes(name, size):
    net, x = build(name)
    if name == "mlp":
        with pytest.raises(ValueError, match="expected 12"):
            net(torch.rand(2, 1, *size), LABEL[:2])
        return
    x = torch.rand(2, x.shape[1], *size)
    with torch.no_grad():
        y = net(x, LABEL[:2])
    assert y.shape[-2:] == size
    assert bool(y.isfinite().all())
    x[..., -1, -1] += 1.0  # the last pixel is seen
    with torch.no_grad():
        assert not torch.equal(net(x, LABEL[:2])[..., -1, -1], y[..., -1, -1])


@every_network
def test_recomputed_activations_change_no_gradient(name):
    plain, x = build(name)
    saving, _ = build(name, checkpoint_activations=True)
    plain(x, LABEL).square().sum().backward()
    saving(x, LABEL).square().sum().backward()
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad)


@pytest.mark.parametrize(
    "name",
    ["mlp", "unet", *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS if n not in ("mlp", "unet"))],
)
def test_compiles_without_a_graph_break(name):
    net, x = build(name)
    class_label = torch.tensor([0, 1, 2, 0]) if net.num_classes else None
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="eager")(x, LABEL, class_label)
        torch.testing.assert_close(compiled, net(x, LABEL, class_label))
    torch.compiler.reset()


@every_network
def test_bf16_autocast_stays_close_and_keeps_norms_in_float32(name):
    net, x = build(name)
    inside = []
    for module in net.modules():
        if type(module).__name__ in ("GroupNorm", "InstanceNormPlus", "NoiseLevelEmbedding"):
            module.register_forward_hook(lambda m, i, o: inside.append((type(m).__name__, o.dtype)))
    with torch.no_grad():
        exact = net(x, LABEL)
        inside.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(x, LABEL)
    assert float((half.float() - exact).norm() / exact.norm()) < 0.05
    assert all(dtype == torch.float32 for kind, dtype in inside if kind == "NoiseLevelEmbedding")


def test_group_norm_takes_its_statistics_in_float32(monkeypatch):
    """bf16 comes in and goes out; in between it is float32, also under autocast."""
    seen = []
    original = torch.nn.functional.group_norm
    monkeypatch.setattr(
        torch.nn.functional, "group_norm", lambda h, *a, **k: (seen.append(h.dtype), original(h, *a, **k))[1]
    )
    x = (100 + 0.5 * torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    norm = models.normalization.GroupNorm(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x)
    assert (seen, y.dtype) == ([torch.float32], torch.bfloat16)
    exact = original(x.double(), norm.num_groups, eps=1e-6)
    torch.testing.assert_close(y.double(), exact, rtol=0.01, atol=0.01)


@every_network
def test_vector_jacobian_products_under_vmap_and_forward_mode(name):
    """What exact divergences need: many pullbacks at once; and Jacobian-vector products that agree with them."""
    net, x = build(name)
    net, x = net.double(), x.double()
    g = torch.Generator().manual_seed(3)
    y, pull = torch.func.vjp(lambda z: net(z, LABEL.double()), x)
    v = torch.randn(3, *y.shape, generator=g, dtype=torch.float64)
    u = torch.randn(x.shape, generator=g, dtype=torch.float64)
    pulled = torch.vmap(lambda w: pull(w)[0])(v)
    torch.testing.assert_close(pulled[1], pull(v[1])[0])
    pushed = torch.func.jvp(lambda z: net(z, LABEL.double()), (x,), (u,))[1]
    torch.testing.assert_close((pushed * v[0]).sum(), (u * pulled[0]).sum())


def test_attention_does_not_know_the_order_of_pixels():
    block = AttentionBlock(8, heads=2, init_scale=1.0).double()
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))

    def shuffle(z):
        return z.flatten(2)[..., order].view_as(z)

    torch.testing.assert_close(block(shuffle(x)), shuffle(block(x)))


@pytest.mark.parametrize("side", [4, 16])
def test_fused_and_plain_attention_agree(side, monkeypatch):
    block = AttentionBlock(8, heads=2, init_scale=1.0).double()
    x = torch.randn(2, 8, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr("models.attention._FUSED_FROM", 1)
    fused = block(x)
    monkeypatch.setattr("models.attention._FUSED_FROM", 10**9)
    torch.testing.assert_close(fused, block(x))


def test_ncsnv2_sees_no_noise_level_but_divides_by_it():
    net, x = build("ncsnv2")
    index = torch.tensor([0, 50, 100, 231])
    with torch.no_grad():
        y = [net(x[:1].expand(4, -1, -1, -1), index.float())[i] * float(net.sigmas[n]) for i, n in enumerate(index)]
    for z in y[1:]:
        torch.testing.assert_close(z, y[0], rtol=1e-4, atol=1e-5)


def test_classes_and_noise_levels_change_the_result():
    net, x = build("unet")
    with torch.no_grad():
        y = net(x, LABEL, torch.tensor([0, 1, 2, 0]))
        assert not torch.allclose(y, net(x, LABEL, torch.tensor([1, 1, 2, 0])))
        assert not torch.allclose(y, net(x, LABEL + 0.1, torch.tensor([0, 1, 2, 0])))
        torch.testing.assert_close(net(x, LABEL), net(x, LABEL, torch.full((4,), 3)))


def test_scale_by_sigma_divides_by_the_label_or_by_the_table():
    common = {"image_size": 8, "channels": 8, "multipliers": (1,), "blocks": 1, "attention_resolutions": ()}
    x = torch.rand(3, 3, 8, 8)
    torch.manual_seed(0)
    plain = NCSNpp(embedding="fourier", init_scale=1.0, **common)
    scaled = NCSNpp(embedding="fourier", init_scale=1.0, scale_by_sigma=True, **common)
    scaled.load_state_dict(plain.state_dict())
    sigma = torch.tensor([0.1, 2.0, 50.0])
    torch.testing.assert_close(scaled(x, sigma) * sigma.view(3, 1, 1, 1), plain(x, sigma))
    plain = NCSNpp(init_scale=1.0, **common)
    table = NCSNpp(init_scale=1.0, scale_by_sigma=True, sigmas=(50.0, 2.0, 0.1), **common)
    table.load_state_dict(plain.state_dict())
    index = torch.tensor([2.0, 1.0, 0.0])
    torch.testing.assert_close(table(x, index) * sigma.view(3, 1, 1, 1), plain(x, index))


def test_uncentred_networks_map_the_unit_interval():
    common = {
        "image_size": 8,
        "channels": 8,
        "multipliers": (1,),
        "blocks": 1,
        "attention_resolutions": (),
        "init_scale": 1.0,
    }
    centred, uncentred = NCSNpp(**common), NCSNpp(centered=False, **common)
    uncentred.load_state_dict(centred.state_dict())
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(uncentred(x, LABEL[:2]), centred(2 * x - 1, LABEL[:2]))


def test_sine_features_turn_once_per_grey_level():
    levels = torch.arange(17).view(1, 1, 17, 1) / 8 - 1.0
    features = FourierFeatures((8.0,))
    same = features(levels)
    torch.testing.assert_close(same[:, 1:], same[:, 1:, :1].expand(-1, -1, 17, -1), rtol=0, atol=2e-5)
    moved = features(levels + 1 / 32)  # a quarter of a level
    torch.testing.assert_close(moved[:, 1], torch.ones(1, 17, 1), rtol=0, atol=2e-5)
    net, _ = build("unet", fourier_features=(8.0, 4.0))
    assert net.stem.in_channels == 5


def test_a_tiny_unet_has_the_advertised_size():
    assert 0.3e6 < parameter_count(UNet()) < 0.5e6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NCSNpp(image_size=8), "no level has resolution 16"),
        (lambda: NCSNpp(residual_block="resnet"), "got residual_block='resnet'; expected one of 'biggan', 'ddpm'"),
        (lambda: NCSNpp(progressive_input="sum"), "progressive_input='sum'"),
        (lambda: NCSNpp(progressive_output="both"), "progressive_output='both'"),
        (lambda: NCSNpp(combine="add"), "combine='add'"),
        (lambda: NCSNpp(embedding="none"), "embedding='none'"),
        (lambda: NCSNpp(scale_by_sigma=True), "got scale_by_sigma=True; expected a label"),
        (lambda: NCSNpp(conditional=False, num_classes=3), "num_classes=3 with conditional=False"),
        (lambda: ADM(image_size=8, attention_resolutions=(7,)), "no level has resolution 7"),
        (lambda: DiT(width=30, heads=4), "width=30"),
        (lambda: NCSNv2(sigmas=(1.0, 2.0)), "strictly falling"),
        (lambda: NCSNv2(size="512"), "size='512'"),
        (lambda: UNet(channels=0), "channels=0; expected integers >= 1"),
        (lambda: UNet(multipliers=()), r"multipliers=\(\); expected integers >= 1"),
        (lambda: UNet(multipliers=(1, 1.5)), r"multipliers=\(1, 1.5\)"),
        (lambda: UNet(in_channels="a"), "in_channels='a'"),
        (lambda: UNet(image_size=0), "image_size=0"),
        (lambda: UNet(heads=0), "heads=0"),
        (lambda: UNet(dropout=2.0), r"dropout=2.0; expected a number in \[0, 1\)"),
        (lambda: ADM(channels=0), "channels=0"),
        (lambda: DiT(patch=0), "patch=0"),
        (lambda: NCSN(channels=0), "channels=0"),
        (lambda: MLP(0), "dim=0"),
        (lambda: models.create("vit"), r"got the network 'vit', did you mean 'dit'\?; expected one of auto, mlp, "),
        (lambda: models.create("mlp", dim=2, widht=3), r"'widht' for the network 'mlp', did you mean 'width'\?"),
        (lambda: models.presets.create("ddpm"), "got the preset 'ddpm'"),
    ],
)
def test_impossible_networks_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "mlp"])
def test_what_is_no_batch_of_images_is_refused(name):
    net, x = build(name)
    for wrong in (x[:, 0], x.flatten(1), torch.cat([x, x], dim=1)):
        with pytest.raises(ValueError, match=r"got x of shape \(4, .*; expected images \(B, [13], H, W\)"):
            net(wrong, LABEL)


@every_network
def test_every_network_can_be_made_again_from_its_name_and_options(name):
    net, x = build(name)
    described = models.networks.describe(net)
    again = models.create(described["name"], **described["options"])
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x, LABEL), net(x, LABEL))


@every_network
def test_channels_last_changes_nothing(name):
    net, x = build(name)
    with torch.no_grad():
        y = net(x, LABEL)
        if x.ndim == 4:
            net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(net(x, LABEL), y, rtol=1e-4, atol=1e-4)
