r"""Is a classifier right as often as it says?

With p_i the probabilities of sample i, k_i the likeliest class and y_i the true one:

    accuracy    share of k_i = y_i
    log-loss    mean of -log p_i(y_i), nats
    Brier       mean of sum_k (p_i(k) - [k = y_i])^2                                    (Brier 1950)
    ECE         sum over bins b of the confidence p_i(k_i) of  n_b / n |accuracy_b - confidence_b|

(the expected calibration error of Guo et al. 2017, arXiv:1706.04599, equation (5), with bins of equal numbers of samples; of
equal confidences every sample counts with their mean, so that the order of samples is nothing to it). Of a finite set the ECE
of a perfectly calibrated classifier is not 0, so it comes with its `floor`: the mean of what it would be if every prediction
came true with just the probability it states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, as_values, plain
from numerics import mix, require_count

__all__ = ["Calibration", "calibration", "share"]

_REPLICATES = 200


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How right a classifier is, and how right it says it is.

    Args:
        accuracy, log_loss, brier: with standard errors over the samples; log_loss in nats.
        ece: expected calibration error; its standard error is the spread of `floor`'s replicates.
        floor: the ECE of a calibrated classifier with these confidences, and its spread from set to set.
        confidence, frequency, counts: of each bin, the mean confidence, the share that is right, and the number of samples.
    """

    accuracy: Estimate
    log_loss: Estimate
    brier: Estimate
    ece: Estimate
    floor: Estimate
    confidence: tuple[float, ...]
    frequency: tuple[float, ...]
    counts: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        named = {name: getattr(self, name).to_dict() for name in ("accuracy", "log_loss", "brier", "ece", "floor")}
        return {
            **named,
            "confidence": [plain(v) for v in self.confidence],
            "frequency": [plain(v) for v in self.frequency],
            "counts": list(self.counts),
        }

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy}, log-loss {self.log_loss} nats, Brier {self.brier}, "
            f"ECE {self.ece} (calibrated: {self.floor})"
        )


def calibration(log_probs: Tensor, labels: Tensor, *, bins: int = 10) -> Calibration:
    """The calibration of log-probabilities `(N, K)` (logits will do) against true classes `(N,)`.

    Args:
        bins: of equal numbers of samples, by confidence.

    Raises:
        DataError: shapes that do not fit, fewer than two samples, labels that are no classes 0 ... K-1, or values that are NaN
            or no real numbers.
        UserError: no bins.
    """
    labels = as_values(labels, "labels")
    log_probs = as_values(log_probs, "log-probabilities")
    if log_probs.ndim != 2 or log_probs.shape[1] == 0 or labels.shape != log_probs.shape[:1] or len(labels) < 2:
        raise DataError(
            f"got log-probabilities {tuple(log_probs.shape)} and labels {tuple(labels.shape)}; expected (N, K) and (N,), "
            "N >= 2, K >= 1"
        )
    require_count(bins, "bins")
    if not log_probs.is_floating_point():
        raise DataError(f"got log-probabilities of {log_probs.dtype}; expected real floating-point numbers")
    logs = log_probs.detach().cpu().to(torch.float64).log_softmax(dim=1)
    if bool(logs.isnan().any()):
        raise DataError("got log-probabilities that are NaN; expected numbers: look at those samples")
    K = log_probs.shape[1]
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"got labels of {labels.dtype}; expected integers, classes 0 to {K - 1}")
    truth = labels.cpu().to(torch.int64)
    if not 0 <= int(truth.min()) <= int(truth.max()) < K:
        raise DataError(f"got labels from {int(truth.min())} to {int(truth.max())}; expected classes 0 to {K - 1}")
    p, n = logs.exp(), len(truth)
    confidence, chosen = p.max(dim=1)
    right = (chosen == truth).double()
    off = p.clone()
    off[torch.arange(n), truth] -= 1
    _, alike = confidence.round(decimals=6).unique(return_inverse=True)  # but for rounding of the logits
    parts = confidence.argsort(stable=True).tensor_split(min(bins, n))
    generator = torch.Generator().manual_seed(mix("calibration"))  # a small seed may be the data's own
    made_up = (torch.rand(_REPLICATES, n, generator=generator, dtype=torch.float64) < confidence).double()
    made_up, evened = _evened(made_up, alike), _evened(right.unsqueeze(0), alike)
    floors = _ece(confidence, made_up, parts)
    spread = float(floors.std())
    return Calibration(
        accuracy=share(right),
        log_loss=_mean(-logs[torch.arange(n), truth]),
        brier=_mean(off.square().sum(dim=1)),
        ece=Estimate(value=float(_ece(confidence, evened, parts)), stderr=spread),
        floor=Estimate(value=float(floors.mean()), stderr=spread),
        confidence=tuple(float(confidence[part].mean()) for part in parts),
        frequency=tuple(float(evened[0, part].mean()) for part in parts),
        counts=tuple(len(part) for part in parts),
    )


def share(right: Tensor) -> Estimate:
    """The share of ones in `(N,)`, with half a count added to its error in quadrature, so that 100 % has one too (Wilson
    1927).

    Raises:
        DataError: none at all.
    """
    n = len(right)
    if n == 0:
        raise DataError("got no samples to be right about; expected one or more")
    value = float(right.double().mean())
    return Estimate(value=value, stderr=math.sqrt(value * (1 - value) / n + 1 / (4 * n * n)))


def _evened(right: Tensor, alike: Tensor) -> Tensor:
    """Outcomes `(R, N)`, the mean of each group `(N,)` in its samples' place: which of equals is in which bin is chance."""
    counts = torch.bincount(alike).double()
    sums = torch.zeros(len(right), len(counts), dtype=torch.float64).index_add_(1, alike, right)
    return (sums / counts)[:, alike]


def _ece(confidence: Tensor, right: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """The error `(R,)` of R sets of outcomes `(R, N)`."""
    n = len(confidence)
    return torch.stack([(right[:, part] - confidence[part]).sum(dim=1).abs() / n for part in parts]).sum(dim=0)


def _mean(values: Tensor) -> Estimate:
    return Estimate(value=float(values.mean()), stderr=float(values.std()) / math.sqrt(len(values)))
