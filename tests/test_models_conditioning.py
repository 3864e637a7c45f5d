"""Labels: exact look-ups, and smoothness of the default one."""

import math

import pytest
import torch

from models import ContinuousTime, DiscreteIndex, LogSigma, LogSNR, Sigma
from models.embeddings import ClassEmbedding, FourierEmbedding, PositionalEmbedding, SmoothEmbedding
from sde_lib import VESDE, VPSDE, SubVPSDE, TableVESDE, TableVPSDE


def test_the_labels_of_the_published_networks():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert ContinuousTime()(VPSDE(), t).tolist() == [0.0, 249.75, 999.0]
    torch.testing.assert_close(Sigma()(VESDE(), t), VESDE().sigma(t))
    torch.testing.assert_close(LogSigma()(VESDE(), t), VESDE().sigma(t).log() / 4)


def test_the_index_of_every_step_of_a_ddpm_chain_is_exact():
    betas = tuple(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist())
    n = torch.arange(1000)
    t = (n + 1).double() / 1000
    sde = TableVPSDE(betas=betas)
    assert torch.equal(DiscreteIndex(levels=1000)(sde, t), n.double())
    assert torch.equal(DiscreteIndex(levels=1000)(sde, torch.tensor([0.0, 1e-5]).double()), torch.zeros(2).double())


@pytest.mark.parametrize("levels", [2, 10, 232, 1000])
def test_the_index_of_every_noise_level_of_a_ladder_is_exact(levels):
    sigmas = torch.logspace(math.log10(50), -2, levels, dtype=torch.float64)
    sde = TableVESDE(sigmas=tuple(sigmas.tolist()))
    t = 1 - torch.arange(levels).double() / (levels - 1)
    index = DiscreteIndex(levels=levels, reverse=True)(sde, t)
    assert torch.equal(index, torch.arange(levels).double())
    torch.testing.assert_close(sde.sigma(t), sigmas[index.long()])


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), SubVPSDE()], ids=lambda s: type(s).__name__)
def test_the_log_snr_label_is_of_order_one_and_monotone(sde):
    t = torch.linspace(sde.t_min, sde.T, 1000, dtype=torch.float64)
    label = LogSNR()(sde, t)
    assert 0.9 < float(label.abs().max()) < 3  # sub-VP at t_min: sigma is 1e-6, log-SNR 27.6
    assert bool((label.diff() < 0).all())


def test_the_smooth_embedding_has_no_frequency_above_its_top():
    """The slope of each feature is at most its frequency: at most `top`, and 1 for the label itself."""
    top = 2.5
    embedding = SmoothEmbedding(16, top=top).double()
    label = torch.linspace(-1.5, 1.5, 400, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(lambda u: embedding(u).sum(0), label)
    assert float(slope.abs().max()) <= top + 1e-12
    assert float(slope.abs().max()) > 0.95 * top
    fast = PositionalEmbedding(16).double()  # of 999 t: radians per unit of t
    quick = torch.autograd.functional.jacobian(lambda u: fast(999 * u).sum(0), torch.linspace(0, 0.01, 50).double())
    assert float(quick.abs().max()) > 900


def test_the_published_embeddings_are_their_formulas():
    label = torch.tensor([0.3, 41.0, 998.5], dtype=torch.float64)
    frequencies = torch.exp(-math.log(1e4) * torch.arange(4) / 3).double()
    phase = label[:, None] * frequencies
    got = PositionalEmbedding(8).double()(label)
    torch.testing.assert_close(got, torch.cat((phase.sin(), phase.cos()), 1), rtol=0, atol=1e-4)
    fourier = FourierEmbedding(8, scale=16.0).double()
    phase = 2 * math.pi * label.log()[:, None] * fourier.weight
    torch.testing.assert_close(fourier(label), torch.cat((phase.sin(), phase.cos()), 1), rtol=0, atol=1e-3)


def test_no_class_is_the_last_row_and_bad_labels_are_refused():
    classes = ClassEmbedding(3, 4)
    torch.testing.assert_close(classes(None, 2), classes(torch.tensor([3, 3]), 2))
    with pytest.raises(ValueError, match=r"shape \(3,\).*shape \(2,\)"):
        classes(torch.tensor([0, 1, 2]), 2)
    with pytest.raises(ValueError, match="integers"):
        classes(torch.tensor([0.0, 1.0]), 2)


@pytest.mark.parametrize(
    "make", [lambda: PositionalEmbedding(7), lambda: FourierEmbedding(3), lambda: SmoothEmbedding(2)]
)
def test_impossible_sizes_are_refused(make):
    with pytest.raises(ValueError, match="even number"):
        make()
