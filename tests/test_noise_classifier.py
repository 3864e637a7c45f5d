"""The classifier of noisy samples against the exact posterior, and calibration against what is calibrated by construction."""

import math

import pytest
import torch

from data import DataError, from_tensor
from evaluation import calibration
from guidance import classifier_guidance
from models import NoiseClassifier
from numerics import UserError
from sde_lib import VPSDE
from sde_lib.analytic import GaussianMixture
from training import LogNormal, TrainingOptions, train_noise_classifier

LAW = GaussianMixture(torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]]), torch.full((3,), 0.4), torch.ones(3))


def labelled(n, seed):
    """Samples of the mixture with their components."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    x = LAW.means[labels] + LAW.stds[labels] * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x.float(), labels


def test_it_learns_the_posterior_at_every_noise_level():
    sde = VPSDE()
    x, labels = labelled(8000, 0)
    split = from_tensor(x, labels, name="mixture", seed=0).split("train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = NoiseClassifier((2,), 3, sde, data_std=0.7, width=32)
    options = TrainingOptions(steps=200, batch_size=256, learning_rate=5e-3, warmup=20, schedule="cosine", ema=(0.97,))
    before = [p.clone() for p in classifier.parameters()]
    train_noise_classifier(classifier, sde, split, None, options, times=LogNormal(mean=-0.5, std=1.5), num_classes=3)
    assert not classifier.training and any((a != b).any() for a, b in zip(before, classifier.parameters()))
    x, _ = labelled(1000, 1)
    for t in (0.01, 0.2, 0.5, 0.9):
        at = torch.full((len(x),), t, dtype=torch.float64)
        eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        x_t = sde.perturb(x, at, eps)
        exact = LAW.responsibilities(sde, x_t, at).log()
        found = classifier(x_t, at).double().log_softmax(dim=1)
        divergence = (exact.exp() * (exact - found)).sum(dim=1).mean()
        assert float(divergence) < 0.02, t  # nats; predicting the prior costs up to 0.8
    guided = classifier_guidance(sde, LAW.score(sde), classifier, 0, 1.0)
    assert guided(x.double(), at).dtype == torch.float64  # the state of an ODE, the network in its own dtype


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 5), (4,), (2, 6)])
def test_shapes(shape):
    classifier = NoiseClassifier(shape, 4, VPSDE(), width=8)
    x = torch.randn(5, *shape)
    logits = classifier(x, torch.tensor(0.5))
    assert logits.shape == (5, 4)
    torch.testing.assert_close(classifier(x[3:], torch.tensor(0.5)), logits[3:], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="got x of shape"):
        classifier(torch.randn(5, *shape, 2), torch.tensor(0.5))
    with pytest.raises(UserError, match="num_classes=1"):
        NoiseClassifier(shape, 1, VPSDE())


class TestCalibration:
    def drawn(self, n, seed=0):
        """Log-probabilities, and classes drawn from them."""
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
        return logits.log_softmax(dim=1), labels

    def test_what_is_calibrated_is_found_to_be(self):
        log_probs, labels = self.drawn(4000)
        found = calibration(log_probs, labels)
        assert abs(found.ece.value - found.floor.value) < 3.5 * found.ece.stderr
        entropy = -(log_probs.exp() * log_probs).sum(1).mean()
        assert abs(found.log_loss.value - float(entropy)) < 4 * found.log_loss.stderr
        certainty = log_probs.exp().max(1).values
        assert abs(found.accuracy.value - float(certainty.mean())) < 4 * found.accuracy.stderr
        assert abs(found.brier.value - float((1 - log_probs.exp().square().sum(1)).mean())) < 4 * found.brier.stderr
        assert sum(found.counts) == 4000 and len(found.counts) == 10

    def test_what_says_too_much_is_found_to(self):
        log_probs, labels = self.drawn(4000)
        found = calibration(3 * log_probs, labels)
        assert found.ece.value > found.floor.value + 10 * found.ece.stderr
        assert found.confidence[-1] > found.frequency[-1]

    def test_by_hand(self):
        probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5]])
        found = calibration(probs.log(), torch.tensor([0, 1, 1, 0]), bins=2)
        assert found.accuracy.value == 0.75
        assert math.isclose(found.log_loss.value, -sum(map(math.log, (0.9, 0.8, 0.4, 0.5))) / 4, rel_tol=1e-6)
        assert math.isclose(found.brier.value, (0.02 + 0.08 + 0.72 + 0.5) / 4, rel_tol=1e-6)
        # bins {0.5 right, 0.6 wrong} and {0.8 right, 0.9 right}
        assert math.isclose(found.ece.value, 0.5 * abs(0.5 - 0.55) + 0.5 * abs(1 - 0.85), rel_tol=1e-5)

    def test_refuses(self):
        with pytest.raises(DataError, match="expected"):
            calibration(torch.zeros(3, 2), torch.zeros(2))
        with pytest.raises(DataError, match="NaN"):
            calibration(torch.full((3, 2), math.nan), torch.zeros(3))
