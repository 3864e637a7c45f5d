"""Measures against closed forms, brute force, and the spread over repeated samples."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from data import DataError
from evaluation.estimate import Estimate, check_alike, jackknife
from evaluation.frechet import Moments, frechet_distance, frechet_distance_of_moments
from evaluation.inception_score import class_score
from evaluation.kernel import kernel_distance, mmd
from evaluation.neighbours import manifold, memorisation, nearest
from evaluation.sliced import sliced_wasserstein


def normal(n: int, d: int, seed: int, *, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, d), generator=generator, dtype=torch.float64) * scale + shift


def covariance(d: int, seed: int, rank: int | None = None) -> Tensor:
    a = normal(d, rank or d, seed)
    return a @ a.T


@pytest.mark.parametrize("d", [1, 3, 64, 400])
def test_frechet_distance_is_the_closed_form_of_diagonal_gaussians(d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    s1, s2 = torch.rand((2, d), generator=generator, dtype=torch.float64) * 3
    m1, m2 = normal(2, d, 1)
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    for a, b in ((Moments(m1, s1.square().diag()), Moments(m2, s2.square().diag())),):
        assert frechet_distance_of_moments(a, b) == pytest.approx(expected, abs=1e-10, rel=1e-10)
    # The same pair in rotated coordinates, where the matrices are full.
    q, _ = torch.linalg.qr(normal(d, d, 2))
    a = Moments(q @ m1, q @ s1.square().diag() @ q.T)
    b = Moments(q @ m2, q @ s2.square().diag() @ q.T)
    assert frechet_distance_of_moments(a, b) == pytest.approx(expected, abs=1e-9, rel=1e-10)


def test_frechet_distance_equals_the_matrix_square_root_form() -> None:
    a, b = Moments(normal(1, 6, 0)[0], covariance(6, 1)), Moments(normal(1, 6, 2)[0], covariance(6, 3))
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy())
    expected = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace())
    expected -= 2 * float(np.trace(root).real)
    assert frechet_distance_of_moments(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance_of_moments(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance_of_moments(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_fewer_samples_than_features_is_the_nuclear_norm_form() -> None:
    """tr (S1 S2)^(1/2) is the sum of the singular values of X Y^T for centred data matrices: no covariance at
    all."""
    x, y = normal(7, 40, 0), normal(11, 40, 1, scale=2.0)
    u, v = (x - x.mean(dim=0)) / math.sqrt(6), (y - y.mean(dim=0)) / math.sqrt(10)
    root = torch.linalg.svdvals(u @ v.T).sum()
    expected = float((x.mean(dim=0) - y.mean(dim=0)).square().sum() + u.square().sum() + v.square().sum() - 2 * root)
    assert frechet_distance(x, y).value == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_large_colour_images_is_cheap() -> None:
    """64x64 pixels of three channels: no matrix has the features' size."""
    x, y = normal(30, 12_288, 0), normal(40, 12_288, 1, scale=1.1)
    start = time.process_time()
    result = frechet_distance(x, y)
    assert time.process_time() - start < 5
    # Independent directions: tr S1 + tr S2 up to the small overlap of random subspaces.
    assert result.value == pytest.approx(12_288 * (1 / 30 + 1.21 / 40) + 12_288 * (1 + 1.21), rel=0.1)
    wide = torch.zeros(4200, 4200, dtype=torch.float64)
    with pytest.raises(DataError, match="4,200 samples of 4,200 features.*max_reference"):
        frechet_distance(wide, wide)


def test_frechet_distance_keeps_its_digits_when_variances_differ_by_many_orders() -> None:
    generator = torch.Generator().manual_seed(0)
    v1, v2 = (6 * torch.randn((2, 500), generator=generator, dtype=torch.float64)).exp()
    mean = torch.zeros(500, dtype=torch.float64)
    expected = float((v1.sqrt() - v2.sqrt()).square().sum())
    assert frechet_distance_of_moments(Moments(mean, v1.diag()), Moments(mean, v2.diag())) == pytest.approx(
        expected, rel=1e-12
    )
    # Of features, whose covariance has lost what lies below its rounding: against exact arithmetic in the features.
    x, y = normal(40, 3, 0) * torch.tensor([1.0, 1e-6, 1e-9]), normal(50, 3, 1) * torch.tensor([1.0, 1e-6, 1e-9])
    a, b = (z - z.mean(dim=0) for z in (x[:, 2:], y[:, 2:]))
    last = float((x[:, 2].mean() - y[:, 2].mean()) ** 2 + (a.std() - b.std()) ** 2)
    assert frechet_distance(x[:, 2:], y[:, 2:]).value == pytest.approx(last, rel=1e-9)


def test_frechet_distance_refuses_what_is_no_covariance() -> None:
    mean, good = torch.zeros(2), torch.eye(2)
    for bad, match in (
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1"),
    ):
        for pair in ((Moments(mean, bad), Moments(mean, good)), (Moments(mean, good), Moments(mean, bad))):
            with pytest.raises(DataError, match=match):
                frechet_distance_of_moments(*pair)


def test_frechet_distance_of_constant_samples_is_the_closed_form() -> None:
    x, y = torch.ones(5, 3, dtype=torch.float64), normal(50, 3, 0)
    expected = float((y.mean(dim=0) - 1).square().sum() + y.var(dim=0).sum())
    result = frechet_distance(x, y)
    assert result.value == pytest.approx(expected, rel=1e-12)
    assert result.stderr == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(frechet_distance(y[:2], y).stderr)


def test_frechet_error_is_the_jackknife_done_slowly() -> None:
    x, y = normal(103, 4, 0, shift=2.0), normal(200, 4, 1)
    slow = jackknife(103, lambda index: frechet_distance(x[index], y).value)
    assert frechet_distance(x, y).stderr == pytest.approx(slow, rel=1e-9)


def test_frechet_distance_equals_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    a, b = Moments(normal(1, 32, 0)[0], covariance(32, 1)), Moments(normal(1, 32, 2)[0], covariance(32, 3))
    theirs = fid._compute_fid(a.mean, a.covariance, b.mean, b.covariance)
    assert frechet_distance_of_moments(a, b) == pytest.approx(float(theirs), rel=1e-4)


def spread(measure, *, repeats: int = 60, n: int = 120, fresh_reference: bool = False) -> tuple[float, float]:
    """Standard deviation over repeated samples, and the mean of the stated standard errors."""
    reference = normal(300, 3, 99)
    values, errors = [], []
    for seed in range(repeats):
        other = normal(300, 3, 1000 + seed) if fresh_reference else reference
        result: Estimate = measure(normal(n, 3, seed, scale=1.3, shift=0.4), other)
        values.append(result.value)
        errors.append(result.stderr)
    return float(np.std(values, ddof=1)), float(np.mean(errors))


@pytest.mark.parametrize(
    ("measure", "fresh"),
    [
        (frechet_distance, False),
        (sliced_wasserstein, False),
        (lambda x, y: kernel_distance(x, y, resamples=50), True),
        (lambda x, y: mmd(x, y, resamples=50), True),
        (lambda x, y: manifold(x, y).precision, False),
        (lambda x, y: manifold(x, y).density, False),
    ],
    ids=["frechet", "sliced", "kernel", "mmd", "precision", "density"],
)
def test_stated_standard_errors_are_the_spread_over_repeats(measure, fresh: bool) -> None:
    """60 repeats know a standard deviation to 9 %; 4 times that is allowed."""
    actual, stated = spread(measure, fresh_reference=fresh)
    assert abs(stated / actual - 1) < 0.36


def test_kernel_distances_equal_brute_force() -> None:
    x, y = normal(7, 4, 0), normal(9, 4, 1, shift=0.5)

    def brute(kernel) -> float:
        def mean(a, b, same: bool) -> float:
            return float(
                np.mean([kernel(a[i], b[j]) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)])
            )

        return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)

    cubic = brute(lambda a, b: (float(a @ b) / 4 + 1) ** 3)
    assert kernel_distance(x, y).value == pytest.approx(cubic, rel=1e-12)
    median = float(torch.pdist(y).median())
    widths = [median / 2, median, 2 * median]
    gaussian = brute(lambda a, b: np.mean([math.exp(-float((a - b).square().sum()) / (2 * s**2)) for s in widths]))
    assert mmd(x, y).value == pytest.approx(gaussian, rel=1e-10)
    assert mmd(100 * x, 100 * y).value == pytest.approx(gaussian, rel=1e-9)


def test_kernel_distances_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(50, 4, 0), normal(60, 4, 1)
    whole = kernel_distance(x, y), mmd(x, y), manifold(x, y)
    monkeypatch.setattr("evaluation.kernel._ROWS", 7)
    monkeypatch.setattr("evaluation.neighbours._ROWS", 7)
    parts = kernel_distance(x, y), mmd(x, y), manifold(x, y)
    for a, b in zip(whole[:2], parts[:2], strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-9)
        assert a.interval == pytest.approx(b.interval, rel=1e-9)
    assert whole[2] == parts[2]


def test_kernel_distances_are_unbiased_when_the_laws_are_equal() -> None:
    values = [kernel_distance(normal(20, 3, 2 * s), normal(25, 3, 2 * s + 1), resamples=2).value for s in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(200)
    covered = 0
    for seed in range(60):
        low, high = mmd(normal(60, 2, seed, shift=0.7), normal(60, 2, seed + 500)).interval
        # The law's own value: E exp(-|x-y|^2 / 2 s^2) is closed for Gaussians, but the widths follow the
        # data; a large sample's value stands for it.
        covered += low <= _LARGE_MMD <= high
    assert covered >= 48  # of 60; 57 expected at 95 %


_LARGE_MMD = mmd(normal(2500, 2, 7, shift=0.7), normal(2500, 2, 8), resamples=2).value


def test_density_and_coverage_of_equal_laws_are_their_exact_expectations() -> None:
    n, m, k = 40, 60, 5
    results = [manifold(normal(m, 3, 2 * s), normal(n, 3, 2 * s + 1)) for s in range(300)]
    density = np.array([r.density.value for r in results])
    coverage = np.array([r.coverage.value for r in results])
    expected = 1 - math.prod((n - j) / (n + m - j) for j in range(1, k + 1))
    assert abs(density.mean() - 1) < 4 * density.std() / math.sqrt(300)
    assert abs(coverage.mean() - expected) < 4 * coverage.std() / math.sqrt(300)


def test_manifold_by_hand_on_a_line() -> None:
    """Data at 0, 1, 3, 7: with k = 1 the radii are 1, 1, 2, 4. Samples at 0.5, 10.5, 20: radii 10, 9.5,
    9.5."""
    data = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    samples = torch.tensor([[0.5], [10.5], [20.0]])
    result = manifold(samples, data, k=1, k_density=1)
    assert result.precision.value == pytest.approx(2 / 3)  # 0.5 and 10.5 lie in a ball
    assert result.recall.value == 1.0
    assert result.density.value == pytest.approx((2 + 1 + 0) / 3)
    assert result.coverage.value == pytest.approx(3 / 4)  # 3's ball [1, 5] holds none


def test_manifold_of_copies_and_of_constants() -> None:
    x = normal(30, 4, 0, shift=100.0)
    copies = manifold(x, x)
    assert copies.precision.value == copies.recall.value == copies.coverage.value == 1.0
    constant = torch.full((30, 4), 3.7)
    assert manifold(constant, constant).precision.value == 1.0
    # Data that repeat have balls of radius zero, which hold copies all the same.
    repeated = manifold(x[:10], x.repeat(7, 1))
    assert repeated.precision.value == 1.0
    collapsed = manifold(x[:1].repeat(30, 1), x)
    assert collapsed.precision.value == 1.0
    assert collapsed.recall.value == pytest.approx(1 / 30)


def test_shares_of_nothing_and_of_all_are_known_with_an_error() -> None:
    """At n = 200 a share that was not seen may well be 1 / n."""
    x = normal(200, 3, 0)
    far = manifold(x + 1000, x)
    assert (far.precision.value, far.recall.value) == (0.0, 0.0)
    for share in (far.precision, far.recall, far.coverage, manifold(x, x).precision):
        assert share.stderr == pytest.approx(1 / 400, rel=0.01)
    assert far.density.stderr == pytest.approx(1 / 400 / 5, rel=0.01)


def test_nearest_looks_at_bytes_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 256, (n, 6), generator=generator, dtype=torch.uint8) for n in (9, 50))
    whole = nearest(x.double(), y.double())
    rows = []

    def counting(samples: Tensor, reference: Tensor, least: int) -> tuple[Tensor, Tensor]:
        rows.append(len(reference))
        return check_alike(samples, reference, least)

    monkeypatch.setattr("evaluation.neighbours._ROWS", 7)
    monkeypatch.setattr("evaluation.neighbours.check_alike", counting)
    parts = nearest(x, y)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
    assert max(rows) == 7 and sum(rows) == 50


def test_memorisation_of_copies_and_of_independent_data() -> None:
    training, fresh, held_out = normal(500, 4, 0), normal(300, 4, 1), normal(300, 4, 2)
    clean = memorisation(fresh, held_out, training)
    assert not clean.suspicious
    assert abs(clean.share.value - 0.05) < 3 * clean.share.stderr
    some = memorisation(torch.cat([training[:60] + 1e-3, fresh[60:]]), held_out, training)
    assert some.suspicious
    assert some.samples[1] < 3e-3 < some.held_out[0]
    assert "look for memorised" in str(some)


def test_nearest_finds_copies() -> None:
    reference = normal(2000, 8, 0, shift=50.0)
    distance, index = nearest(reference[[5, 1999]], reference)
    assert index.tolist() == [5, 1999]
    assert distance.tolist() == [0.0, 0.0]
    far, _ = nearest(reference[:1] + 1000.0, reference)
    brute = (reference[:1] + 1000.0 - reference).norm(dim=1).min()
    assert float(far) == pytest.approx(float(brute), rel=1e-12)


def test_sliced_wasserstein_closed_forms() -> None:
    x = normal(100, 5, 0)
    # A shift by d moves every projection by theta . d: E (theta . d)^2 = |d|^2 / F.
    shifted = sliced_wasserstein(x + 2.0, x, directions=4000)
    assert shifted.value**2 == pytest.approx(4.0, rel=0.05)
    assert sliced_wasserstein(x, x).value == 0.0
    # In one dimension it is the Wasserstein distance, exactly, for unequal numbers too.
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0], [5.0]])
    exact = math.sqrt((1 / 6) * 1 + (1 / 3) * 16)  # on (1/3, 1/2): 0 to 1; on (2/3, 1): 1 to 5
    assert sliced_wasserstein(a, b).value == pytest.approx(exact, rel=1e-12)
    assert sliced_wasserstein(a.repeat(3, 1), b.repeat(2, 1)).value == pytest.approx(exact, rel=1e-12)
    scaled = sliced_wasserstein(2 * x, x, directions=500).value / x.square().mean().sqrt()
    assert float(scaled) == pytest.approx(1.0, rel=0.05)


def test_class_score_closed_forms() -> None:
    eye = torch.eye(10, dtype=torch.float64).repeat(5, 1)
    sure = torch.log(eye.clamp(min=1e-300))
    assert class_score(sure).value == pytest.approx(10.0, rel=1e-12)
    assert class_score(torch.full((20, 10), -math.log(10.0))).value == pytest.approx(1.0, rel=1e-12)
    assert class_score(sure[torch.arange(50) % 10 < 3]).value == pytest.approx(3.0, rel=1e-12)
    with pytest.raises(DataError, match="log_softmax"):
        class_score(torch.zeros(5, 10))


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = normal(200, 1, 0)[:, 0]
    stated = jackknife(200, lambda index: float(x[index].mean()), groups=200)
    assert stated == pytest.approx(float(x.std()) / math.sqrt(200), rel=1e-10)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, mmd, sliced_wasserstein, manifold, nearest])
def test_bad_features_are_refused(measure) -> None:
    good = normal(20, 3, 0)
    broken = good.clone()
    broken[4, 1] = math.nan
    for x, y, match in (
        (broken, good, "NaN or infinite for 1 of 20"),
        (good, broken, "reference features that are NaN"),
        (good[0], good, r"expected \(N, F\)"),
        (good[:0], good, "features of 0 samples"),
        (good, good[:, :2], "expected the same"),
        (good * 1e200, good, "features up to .*scale them"),
        (good.to(torch.complex128), good, "complex128; expected a tensor of real numbers"),
        (good.numpy(), good, "ndarray; expected a tensor"),
    ):
        with pytest.raises(DataError, match=match):
            measure(x, y)
    if measure is not nearest:
        with pytest.raises(DataError, match="features of 1 samples; expected at least"):
            measure(good[:1], good)


@pytest.mark.parametrize("measure", [frechet_distance, kernel_distance, mmd, sliced_wasserstein, manifold, nearest])
def test_features_are_taken_to_the_cpu_first(measure) -> None:
    """Where the measures' generators are; of "meta" there is nothing to take, and torch says so."""
    for x, y in ((normal(20, 3, 0).to("meta"), normal(20, 3, 1)), (normal(20, 3, 0), normal(20, 3, 1).to("meta"))):
        with pytest.raises(NotImplementedError, match="copy out of meta"):
            measure(x, y)


def test_other_refusals() -> None:
    good = normal(20, 3, 0)
    with pytest.raises(DataError, match="reference half of whose"):
        mmd(good, torch.zeros(20, 3))
    with pytest.raises(DataError, match="k=0"):
        manifold(good, good, k=0)
    with pytest.raises(DataError, match="directions=0"):
        sliced_wasserstein(good, good, directions=0)
    with pytest.raises(DataError, match="resamples=1"):
        mmd(good, good, resamples=1)
    with pytest.raises(DataError, match=r"expected \(3, 3\)"):
        frechet_distance_of_moments(Moments(good[0], good), Moments(good[0], covariance(3, 0)))
