"""ScoreModel: conversions, types, errors, classes, other SDEs, energies, folders."""

import json

import pytest
import torch

from models import (
    ADM,
    DATA,
    MLP,
    NOISE,
    SCORE,
    VELOCITY,
    ContinuousTime,
    DiscreteIndex,
    EnergyModel,
    LogSNR,
    NCSNpp,
    NCSNv2,
    Preconditioned,
    ScoreModel,
    Sigma,
    UNet,
)
from numerics import UserError, expand_as
from sde_lib import VESDE, VPSDE, KernelSDE, SubVPSDE, analytic

ALL = [NOISE, DATA, VELOCITY, SCORE, Preconditioned(data_std=0.7)]
T = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)


def randomised(net):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    return net.eval()


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Oracle(torch.nn.Module):
    """A network that knows the answer: it outputs the target for the exact score, under the label t."""

    def __init__(self, sde, parametrization, score):
        super().__init__()
        self.sde, self.parametrization, self.score = sde, parametrization, score
        self.calls = 0
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, seen, t):
        self.calls += 1
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        scale = self.parametrization.scale_input(torch.ones_like(seen), alpha, sigma)
        x = seen / scale
        eps = -expand_as(sigma, x) * self.score(x, t)
        x_0 = (x - expand_as(sigma, x) * eps) / expand_as(alpha, x)
        return self.parametrization.target(x_0, eps, alpha, sigma)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), SubVPSDE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("parametrization", ALL, ids=lambda p: type(p).__name__)
def test_every_parametrisation_of_the_exact_answer_is_the_exact_score(parametrization, sde, x):
    exact = analytic.Gaussian(mean=torch.zeros(4).double(), cov=torch.diag(torch.tensor([0.1, 0.5, 1.0, 2.0]).double()))
    score = exact.score(sde)
    net = Oracle(sde, parametrization, score)
    model = ScoreModel(net, sde, parametrization, conditioning=ContinuousTime(scale=1.0))
    s = score(x, T)
    alpha, sigma = expand_as(sde.alpha(T), x), expand_as(sde.sigma(T), x)
    x_0 = (x + sigma**2 * s) / alpha
    for got, wanted in (
        (model(x, T), s),
        (model.score(x, T), s),
        (model.noise(x, T), -sigma * s),
        (model.denoised(x, T), x_0),
        (model.velocity(x, T), -alpha * sigma * s - sigma * x_0),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)
    assert net.calls == 5  # one each


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_cast_in_and_one_out(dtype):
    seen = []
    net = randomised(UNet(channels=8))
    net.register_forward_pre_hook(lambda m, args: seen.extend(a.dtype for a in args))
    model = ScoreModel(net, VPSDE(), Preconditioned())
    x = torch.randn(3, 1, 8, 8).to(dtype)
    assert model(x, T).dtype == dtype
    assert seen == [torch.float32, torch.float32]
    assert model.output(x, T).dtype == torch.float32


def test_a_scalar_time_is_the_same_time_for_all(x):
    model = ScoreModel(randomised(MLP(4)), VPSDE(), Preconditioned())
    torch.testing.assert_close(model(x, torch.tensor(0.3)), model(x, torch.full((3,), 0.3)), rtol=0, atol=1e-6)


def test_small_times_in_float32_keep_their_digits(x):
    """Coefficients are float64: right to 1e-6 at t = 1e-5, where float32 loses a percent."""
    sde, sd = VPSDE(), 0.5
    silent = MLP(4)  # its output layer starts at zero
    model = ScoreModel(silent, sde, Preconditioned(data_std=sd))
    t = torch.full((3,), 1e-5)
    exact = -x / expand_as(sde.alpha(t) ** 2 * sd**2 + sde.sigma(t) ** 2, x)
    torch.testing.assert_close(model(x.float(), t).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (1,)])
def test_a_time_of_the_wrong_shape_is_one_line(shape, x):
    model = ScoreModel(MLP(4), VPSDE())
    for call in (model, model.noise, model.denoised, model.velocity, model.output):
        with pytest.raises(ValueError, match="shape") as error:
            call(x, torch.full(shape, 0.5))
        assert "\n" not in str(error.value)


def test_what_it_was_made_from_is_readable():
    sde, net = SubVPSDE(), MLP(2)
    model = ScoreModel(net, sde, Preconditioned(data_std=0.3), data_range=(0, 1))
    assert (model.net, model.sde, model.parametrization) == (net, sde, Preconditioned(data_std=0.3))
    assert (model.conditioning, model.data_std, model.data_range) == (LogSNR(), 0.3, (0.0, 1.0))
    assert ScoreModel(net, sde, NOISE).data_std is None
    assert "SubVPSDE" in repr(model)


def test_what_is_no_sde_or_parametrization_is_refused():
    with pytest.raises(ValueError, match="got parametrization='noise'; expected an object such as NOISE"):
        ScoreModel(MLP(2), VPSDE(), "noise")
    with pytest.raises(ValueError, match="got sde='vp'; expected an object such as VPSDE()"):
        ScoreModel(MLP(2), "vp")


@pytest.mark.parametrize(
    ("net", "conditioning", "message"),
    [
        (
            lambda: NCSNv2(channels=4),
            LogSNR(),
            r"labels from -1.* to 1.381; expected the indices 0 to 231 .*DiscreteIndex\(levels=232",
        ),
        (
            lambda: NCSNv2(channels=4),
            DiscreteIndex(levels=1000, reverse=True),
            "from 0 to 999; expected the indices 0 to 231",
        ),
        (lambda: UNet(channels=8, embedding="fourier"), LogSNR(), "take.* logarithm; expected numbers > 0"),
        (lambda: MLP(4, embedding="fourier"), LogSNR(), "take.* logarithm; expected numbers > 0"),
    ],
)
def test_labels_that_mean_nothing_to_the_network_are_refused(net, conditioning, message):
    with pytest.raises(UserError, match=message):
        ScoreModel(net(), VPSDE(), conditioning=conditioning)


def test_labels_that_the_network_knows_pass():
    ScoreModel(NCSNv2(channels=4), VESDE(), SCORE, conditioning=DiscreteIndex(levels=232, reverse=True))
    ScoreModel(UNet(channels=8, embedding="fourier"), VESDE(), conditioning=Sigma())


def test_classes_are_carried_and_taken(x):
    model = ScoreModel(randomised(MLP(4, num_classes=5)), VPSDE())
    labels = torch.tensor([0, 3, 4])
    score = model.condition(labels)
    torch.testing.assert_close(score(x, T), model(x, T, labels))
    keep = torch.tensor([2, 0])
    torch.testing.assert_close(score.take(keep)(x[keep], T[keep]), score(x, T)[keep])
    torch.testing.assert_close(model.condition([0, 3, 4])(x, T), score(x, T))
    torch.testing.assert_close(model.condition(3)(x, T), model(x, T, torch.tensor([3, 3, 3])))
    assert model.condition(3).take(keep)(x[keep], T[keep]).shape == (2, 4)
    torch.testing.assert_close(model.condition(None)(x, T), model(x, T))
    assert not torch.allclose(model.condition(None)(x, T), model.condition(3)(x, T))
    for name in ("score", "noise", "denoised", "velocity"):
        torch.testing.assert_close(getattr(score, name)(x, T), getattr(model, name)(x, T, labels))


def test_wrong_classes_are_refused(x):
    with pytest.raises(ValueError, match="no classes"):
        ScoreModel(MLP(4), VPSDE()).condition(3)
    model = ScoreModel(MLP(4, num_classes=5), VPSDE())
    with pytest.raises(ValueError, match="integers"):
        model.condition(torch.tensor([0.5, 1.0, 2.0]))
    for wrong in ("cat", [0.5, 1.0, 2.0], [[0], [1, 2]]):
        with pytest.raises(ValueError, match=r"got labels.*; expected integers"):
            model.condition(wrong)
    with pytest.raises(ValueError, match=r"expected integers of shape \(3,\)"):
        model.condition(torch.tensor([0, 1]))(x, T)


def test_a_learned_variance_is_left_out_of_the_score():
    net = randomised(
        ADM(image_size=8, channels=8, multipliers=(1,), blocks=1, attention_resolutions=(), groups=4, head_channels=4)
    )
    model = ScoreModel(net, VPSDE(), conditioning=ContinuousTime())
    x = torch.randn(3, 3, 8, 8)
    assert model.output(x, T).shape == (3, 6, 8, 8)
    torch.testing.assert_close(model.noise(x, T), model.output(x, T)[:, :3])


# -- under another SDE ---------------------------------------------------------------------------------------

EDM = KernelSDE(
    alpha_fn=torch.ones_like, sigma_fn=lambda t: t, T=80.0, t_min=2e-3, t_end=2e-3
)  # Karras et al. 2022: sigma(t) = t


@pytest.mark.parametrize("other", [VESDE(), SubVPSDE(t_min=1e-3), EDM], ids=lambda s: type(s).__name__)
def test_the_exact_score_under_another_sde_is_that_sdes_exact_score(other, x):
    exact = analytic.Gaussian(mean=torch.ones(4).double(), cov=torch.eye(4).double() * 0.3)
    own = VPSDE()
    net = Oracle(own, NOISE, exact.score(own))
    view = ScoreModel(net, own, NOISE, conditioning=ContinuousTime(scale=1.0)).under(other)
    t = T * other.T
    torch.testing.assert_close(view(x, t), exact.score(other)(x, t), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        view.denoised(x, t), (x + expand_as(other.sigma(t) ** 2, x) * view(x, t)) / expand_as(other.alpha(t), x)
    )


def test_the_flow_under_another_sde_is_the_same_flow(x):
    """In y = x / alpha and kappa, both probability flows are dy/dkappa = eps: a path of one is a path of the other."""
    own, other = VPSDE(), VESDE(sigma_min=0.01, sigma_max=50.0)
    model = ScoreModel(randomised(MLP(4)).double(), own, Preconditioned())
    view = model.under(other)
    kappa = torch.tensor(2.0, dtype=torch.float64).log(), torch.tensor(0.1, dtype=torch.float64).log()

    def integrate(score, sde, x, steps=400):
        log_kappas = torch.linspace(float(kappa[0]), float(kappa[1]), steps + 1, dtype=torch.float64)
        times = sde.time_of_log_snr(-2 * log_kappas)
        for t, s in zip(times[:-1], times[1:], strict=True):  # Heun
            slope = sde.flow(score, x, t)
            guess = x + (s - t) * slope
            x = x + (s - t) * (slope + sde.flow(score, guess, s)) / 2
        return x / sde.alpha(times[-1])

    with torch.no_grad():
        start = 2 * x
        t = own.time_of_log_snr(-2 * kappa[0])
        a = integrate(model, own, start * own.alpha(t), 400)
        b = integrate(view, other, start, 400)
        coarse = integrate(view, other, start, 200)
    assert float((a - b).abs().max()) < float((coarse - b).abs().max()) + 1e-5
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_view_does_not_extrapolate(x):
    model = ScoreModel(MLP(4), VPSDE())
    with pytest.raises(ValueError, match="expected -10.05 to 13.81, where the model was trained"):
        model.under(VESDE(sigma_min=0.01, sigma_max=500.0))(x, torch.tensor(1.0))
    with pytest.raises(ValueError, match="log-SNR"):
        model.under(EDM)(x, torch.tensor(1e-4))
    same = model.under(VPSDE())  # the ends themselves are inside
    for t in (1.0, 1e-5):
        torch.testing.assert_close(
            same(x, torch.tensor(t).double()), model(x, torch.tensor(t).double()), rtol=1e-5, atol=1e-5
        )


def test_a_view_of_a_conditioned_model_keeps_its_classes(x):
    model = ScoreModel(randomised(MLP(4, num_classes=3)), VPSDE())
    view = model.condition(torch.tensor([0, 1, 2])).under(VESDE())
    keep = torch.tensor([2, 1])
    torch.testing.assert_close(view.take(keep)(x[keep], T[keep]), view(x, T)[keep])


# -- energies ------------------------------------------------------------------------------------------------


def test_the_score_is_minus_the_energys_gradient():
    model = EnergyModel(randomised(UNet(channels=8)).double(), SubVPSDE(), data_std=0.4)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    energy = model.energy(x, T)
    assert energy.shape == (3,)
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    with torch.no_grad():
        torch.testing.assert_close(model(x.detach(), T), -gradient)


def test_an_energy_model_has_a_symmetric_jacobian(x):
    model = EnergyModel(randomised(MLP(4)).double(), VPSDE())
    jacobian = torch.autograd.functional.jacobian(lambda z: model(z[None], T[:1])[0], x[0])
    torch.testing.assert_close(jacobian, jacobian.T)
    plain = ScoreModel(model.net.net, VPSDE(), Preconditioned())
    jacobian = torch.autograd.functional.jacobian(lambda z: plain(z[None], T[:1])[0], x[0])
    assert not torch.allclose(jacobian, jacobian.T)


def test_an_energy_model_learns_through_its_second_derivative(x):
    model = EnergyModel(randomised(MLP(4, width=16, depth=1)).double(), VPSDE())

    def loss():
        return model.output(x, T).square().mean()

    p = model.net.net.input.weight
    (gradient,) = torch.autograd.grad(loss(), p)
    direction, h = torch.randn_like(p), 1e-6
    with torch.no_grad():
        p.add_(direction, alpha=h)
        up = float(loss())
        p.add_(direction, alpha=-2 * h)
        down = float(loss())
    assert float((gradient * direction).sum()) == pytest.approx((up - down) / (2 * h), rel=1e-5)


def test_a_silent_energy_is_a_gaussians(x):
    sde, sd = VPSDE(), 0.5
    model = EnergyModel(MLP(4).double(), sde, data_std=sd)
    variance = sde.alpha(T) ** 2 * sd**2 + sde.sigma(T) ** 2
    torch.testing.assert_close(model.energy(x, T), x.square().sum(1) / (2 * variance))


# -- folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        lambda: ScoreModel(
            MLP(4, num_classes=3), SubVPSDE(beta_max=15.0), Preconditioned(data_std=0.3), data_range=(0, 1)
        ),
        lambda: ScoreModel(UNet(channels=8, embedding="fourier"), VESDE(sigma_max=20.0), SCORE, conditioning=Sigma()),
        lambda: ScoreModel(
            NCSNpp(image_size=8, channels=8, multipliers=(1,), attention_resolutions=(), blocks=1),
            VPSDE(),
            VELOCITY,
            conditioning=DiscreteIndex(levels=50),
        ),  # fmt: skip
    ],
    ids=["mlp", "unet", "ncsnpp"],
)
def test_a_saved_model_comes_back(model, tmp_path):
    model = model()
    randomised(model.net)
    x = torch.randn(3, 4) if isinstance(model.net, MLP) else torch.rand(3, model.net.options["in_channels"], 8, 8)
    model.save_pretrained(tmp_path / "m", card={"results": {"bits_per_dim": {"mean": 1.9}}, "training": {"steps": 10}})
    again = ScoreModel.from_pretrained(tmp_path / "m")
    t = torch.tensor([0.2, 0.5, 0.8])
    with torch.no_grad():
        assert torch.equal(again(x, t), model(x, t))
    assert not again.training
    for name in ("sde", "parametrization", "conditioning", "data_range", "data_std"):
        assert getattr(again, name) == getattr(model, name)
    assert again.card == {"results": {"bits_per_dim": {"mean": 1.9}}, "training": {"steps": 10}}
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "card.json").read_text() == (tmp_path / "m" / "card.json").read_text()


@pytest.fixture
def folder(tmp_path):
    ScoreModel(MLP(4), VPSDE()).save_pretrained(tmp_path)
    return tmp_path


def test_a_flipped_bit_in_the_weights_is_found(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        ScoreModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "card.json"])
def test_an_incomplete_folder_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}"):
        ScoreModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("network", {"name": "resnet", "options": {}}, "network 'resnet'"),
        ("network", {"name": "mlp", "options": {"dim": 5}}, "does not fit the network"),
        ("network", {"name": "mlp", "options": {"dims": 5}}, "dims"),
        ("sde", {"name": "vq"}, "SDE 'vq'"),
        ("parametrization", {"name": "x0"}, "parametrization 'x0'"),
        ("conditioning", {"name": "clock"}, "conditioning 'clock'"),
        ("format", 99, "format 99"),
    ],
)
def test_a_card_that_says_something_else_is_refused(folder, key, value, message):
    card = json.loads((folder / "card.json").read_text())
    card[key] = value
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=message):
        ScoreModel.from_pretrained(folder)


def test_a_card_that_is_no_json_is_refused(folder):
    (folder / "card.json").write_text('{"format": 1,')
    with pytest.raises(ValueError, match="which is not JSON"):
        ScoreModel.from_pretrained(folder)


def test_what_cannot_be_written_down_is_refused(tmp_path, x):
    with pytest.raises(ValueError, match="class Linear"):
        ScoreModel(torch.nn.Linear(2, 2), VPSDE()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="KernelSDE"):
        ScoreModel(MLP(2), EDM).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'sde'"):
        ScoreModel(MLP(2), VPSDE()).save_pretrained(tmp_path, card={"sde": 1})
    assert not any(tmp_path.iterdir())


def test_learned_variance_lies_between_its_bounds_and_samples() -> None:
    import models
    from samplers import Ancestral, PredictorCorrector

    torch.manual_seed(0)
    options = {"attention_resolutions": (), "head_channels": None, "heads": 1, "groups": 4, "learned_variance": True}
    net = models.ADM(in_channels=1, image_size=8, channels=16, multipliers=(1,), blocks=1, **options)
    sde = VPSDE()
    model = ScoreModel(net, sde).eval()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9])
    score, w = model.score_and_variance(x, t)
    assert torch.equal(score, model(x, t)) and w.shape == x.shape
    assert torch.allclose(w, torch.full_like(w, 0.5), atol=0.5)
    sampler = PredictorCorrector(predictor=Ancestral(variance="learned"), corrector=None, steps=3)
    assert sampler(sde, model, (2, 1, 8, 8)).nfe == 4
    plain = ScoreModel(models.MLP(2), sde)
    with pytest.raises(ValueError, match="no learned variance"):
        plain.score_and_variance(torch.zeros(1, 2), torch.tensor([0.5]))


class TestEnergyModel:
    def model(self, **options):
        net = MLP(2, width=16, depth=1, **options)
        return EnergyModel(randomised(net), VPSDE(), normalised=True)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_it_says_the_same_in_every_mode(self, mode):
        model, x = self.model(num_classes=3), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        t, y = torch.linspace(0.1, 0.9, 4), torch.tensor([0, 1, 2, 0])
        for read in (
            model.score,
            model.noise,
            model.denoised,
            model.velocity,
            model.energy,
            lambda *at: model.noise_and_slope(*at).noise,
            lambda *at: model.noise_and_slope(*at).slope,
        ):
            expected = read(x, t, y)
            with mode():
                found = (read(x, t, y), read(x.clone(), t.clone(), y.clone()))
            for one in found:
                torch.testing.assert_close(one, expected.detach(), rtol=1e-5, atol=1e-6)
                assert not one.requires_grad and expected.requires_grad

    def test_labels_are_one_class_for_each_or_for_all(self):
        model, x = self.model(num_classes=3), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
        t = torch.tensor(0.5)
        for read in (model.energy, lambda *at: model.noise_and_slope(*at).slope):
            torch.testing.assert_close(read(x, t, [0, 1, 2]), read(x, t, torch.tensor([0, 1, 2])))
            torch.testing.assert_close(read(x, t, 1), read(x, t, torch.tensor([1, 1, 1])))
            for labels, words in (
                ([0, 1, 7], "the label 7"),
                (torch.tensor([0, 1, -1]), "the label -1"),
                (torch.tensor([0, 1]), "for 3 samples"),
                ("cat", "integers"),
            ):
                with pytest.raises(UserError, match=words):
                    read(x, t, labels)
        with pytest.raises(UserError, match="no classes"):
            self.model().energy(x, t, torch.tensor([0, 1, 2]))

    def test_an_energy_is_not_rounded_as_x_is(self):
        """In bfloat16 one of 1,000 nats has steps of 4."""
        model, t = self.model(), torch.tensor(0.5)
        x = 30 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
        torch.testing.assert_close(model.energy(x, t), model.energy(x.float(), t), rtol=0, atol=0)
        assert model.energy(x[:0], t).shape == (0,)
