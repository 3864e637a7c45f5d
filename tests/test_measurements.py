"""Measurements: operators, adjoints and singular values, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from guidance import posterior
from numerics import UserError, conjugate_gradients
from samplers import DDNM
from sde_lib import VPSDE, Blur, Downsample, Grey, Linear, LinearMap, Mask, Masks, Measurement


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kernel():
    """Not symmetric, so that a convolution is not its own adjoint."""
    return random(3, 5, seed=1)


# an operator and the shape of one sample
OPERATORS = {
    "linear": (Linear(random(3, 6)), (6,)),
    "linear_of_pictures": (Linear(random(5, 12), shape=(1, 3, 4)), (1, 3, 4)),
    "linear_without_full_rank": (Linear(random(4, 2) @ random(2, 6)), (6,)),
    "mask": (Mask(random(2, 4, 4) > 0), (2, 4, 4)),
    "downsample": (Downsample(2), (3, 4, 6)),
    "downsample_line": (Downsample(3, axes=1), (6,)),
    "blur": (Blur(kernel()), (2, 6, 7)),
    "blur_line": (Blur(random(3)), (6,)),
    "grey": (Grey(), (3, 4, 4)),
    "functions": (LinearMap(lambda x: x.cumsum(1), lambda y: y.flip(1).cumsum(1).flip(1)), (6,)),
}
WITH_SVD = [name for name in OPERATORS if name != "functions"]


def matrix(operator, event):
    D = math.prod(event)
    return operator(torch.eye(D, dtype=torch.float64).reshape(D, *event)).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_transpose(name):
    operator, event = OPERATORS[name]
    y = operator(random(2, *event))
    A = matrix(operator, event)
    m = y[0].numel()
    transposed = operator.adjoint(torch.eye(m, dtype=torch.float64).reshape(m, *y.shape[1:])).flatten(1)
    torch.testing.assert_close(transposed, A, atol=1e-12, rtol=0)
    measurement = Measurement(operator, y, 0.1)
    assert measurement.linear and measurement.event_shape == event and not measurement.noiseless


@pytest.mark.parametrize("name", WITH_SVD)
def test_the_coordinates_are_a_singular_value_decomposition(name):
    operator, event = OPERATORS[name]
    x = random(2, *event)
    measurement = Measurement(operator, operator(x), 0.3)
    svd = measurement.svd
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    close(svd.left(measurement.y), svd.values * svd.right(x))
    # V^T V = I, A^+ A is a projection onto what is seen, and nothing else is
    seen = svd.lift(svd.right(x))
    close(svd.right(seen), svd.right(x))
    close(operator(x - seen), torch.zeros_like(measurement.y))
    D = math.prod(event)
    singular = torch.linalg.svdvals(matrix(operator, event))
    close(svd.values.sort(descending=True).values, singular[: len(svd.values)])
    assert float(singular[len(svd.values) :].sum()) < 1e-10 and len(svd.values) <= D
    assert bool((svd.noise == 0.3).all())


def test_noise_for_each_entry_keeps_its_place():
    noise = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, True]])
    assert Measurement(Mask(mask), random(1, 2, 2), noise).svd.noise.tolist() == [0.1, 0.3, 0.4]
    # a matrix: rows divided by their noise, so that what is left is 1
    A, std = random(3, 5), torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    x = random(4, 5)
    found = Measurement(Linear(A), x @ A.T, std).svd
    torch.testing.assert_close(found.left(x @ A.T), found.values * found.right(x), atol=1e-10, rtol=0)
    assert bool((found.noise == 1).all())
    torch.testing.assert_close(found.values, torch.linalg.svdvals(A / std.unsqueeze(1)), atol=1e-10, rtol=0)
    assert Measurement(Blur(kernel()), random(1, 1, 6, 6), torch.rand(1, 6, 6) + 0.1).svd is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", [1e-8, 1e-6, 1e-2, 1e2, 1e6, 1e8])
def test_an_accurate_row_does_not_make_rounding_of_the_others(ratio, dtype):
    """Rows divided by unlike noises, or of unlike size: as many singular values as the matrix has rank, with their digits."""
    A, sizes = random(4, 6), torch.tensor([1.0, ratio, 3.0, 1.0], dtype=torch.float64)
    A[3] = A[0] - 2 * A[2]
    x, y = random(2, 6).to(dtype), torch.zeros(1, 4, dtype=dtype)
    full = torch.linalg.svdvals((A[[1, 0, 2]] / sizes[[1, 0, 2], None]).T)
    for matrix, std in ((A, sizes), (A / sizes.unsqueeze(1), 1.0), (A / sizes.unsqueeze(1), 0.0)):
        svd = Measurement(Linear(matrix.to(dtype)), y, std if isinstance(std, float) else std.to(dtype)).svd
        assert len(svd.values) == 3 and bool((svd.noise == (1.0 if std is sizes else std)).all())
        off = svd.left(x @ matrix.to(dtype).T) - svd.values * svd.right(x)
        assert bool((off.abs() <= (1e-6 if dtype == torch.float32 else 1e-12) * (svd.values + svd.noise)).all())
    three = Measurement(Linear(A[:3].to(dtype)), y[:, :3], sizes[:3].to(dtype)).svd
    torch.testing.assert_close(three.values, full.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_blur_keeps_what_double_precision_tells_from_nothing():
    """h = 1 + 2 a cos has a smallest value of 1e-8 here, which is rounding of float32 alone."""
    weights = torch.tensor([0.5 - 5e-9, 1.0, 0.5 - 5e-9], dtype=torch.float64)
    double, single = (
        Measurement(Blur(weights), torch.zeros(1, 6, dtype=d), 0.0).svd for d in (torch.float64, torch.float32)
    )
    assert len(double.values) == 6 and float(double.values.min()) == pytest.approx(1e-8, rel=1e-6)
    assert len(single.values) == 5


def test_blur_is_a_convolution():
    weights, x = kernel(), random(1, 1, 8, 9)
    padded = torch.nn.functional.pad(x, (2, 2, 1, 1), mode="circular")
    expected = torch.nn.functional.conv2d(padded, weights.flip(0, 1).reshape(1, 1, 3, 5))
    torch.testing.assert_close(Blur(weights)(x), expected, atol=1e-12, rtol=0)
    ones = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(Blur.gaussian(1.0, size=5)(ones), ones)


def test_downsampling_is_average_pooling_and_grey_the_luma():
    x = random(2, 3, 4, 6)
    torch.testing.assert_close(Downsample(2)(x), torch.nn.functional.avg_pool2d(x, 2))
    torch.testing.assert_close(Grey()(x)[:, 0], 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])


@pytest.mark.parametrize("name", [*OPERATORS, "masks"])
def test_an_operator_goes_where_the_data_are(name):
    """Its tensors are made on the CPU; "meta" has no values, but mixed devices raise there as they do on a GPU."""
    operator, event = OPERATORS[name] if name != "masks" else (Masks(random(2, 5) > 0), (5,))
    x = random(2, *event).to("meta")
    y = operator(x)
    assert y.device.type == "meta" and operator.adjoint(y).device.type == "meta"
    if name in ("mask", "masks", "downsample", "grey"):  # the others look at values
        svd = operator.svd(torch.ones(y.shape[1:], device="meta"))
        parts = (svd.values, svd.noise, svd.left(y), svd.right(x), svd.lift(svd.left(y)))
        assert all(part.device.type == "meta" for part in parts)


def test_a_measurement_in_half_precision_is_kept_in_float32():
    """The state is in float32 at least, and a half-precision y would be compared, and decomposed, in its own digits."""
    y = random(2, 3).half()
    made = Measurement(Linear(random(3, 6)), y, torch.full((3,), 0.1))
    assert made.y.dtype == torch.float32 and torch.equal(made.y, y.float())
    svd = made.svd
    assert svd.values.dtype == torch.float32
    torch.testing.assert_close(svd.left(made.y).square().sum(), made.y.square().sum())


@pytest.mark.parametrize(
    ("operator", "says"),
    [
        (lambda x: torch.fft.fft(x), "makes torch.complex128 of x; expected real numbers"),
        (lambda x: x.argmax(dim=1, keepdim=True).expand_as(x), "makes torch.int64 of x"),
        (lambda x: x.tolist(), "makes list of x"),
    ],
)
def test_what_is_no_real_measurement_is_refused_in_one_line(operator, says):
    with pytest.raises(UserError, match=says):
        Measurement(operator, random(2, 4), 0.1).residual(random(2, 4))


def test_what_an_operator_cannot_say_is_observed_is_refused():
    class Fails(Mask):
        def observed(self, y):
            return y @ torch.ones(9, 9)

    with pytest.raises(UserError, match="observed cannot take"):
        Measurement(Fails([1, 0]), torch.ones(1, 2), 0.1)


def test_taking_samples_takes_their_measurements():
    operator = Linear(random(2, 4))
    own = Measurement(operator, random(5, 2), 0.1)
    index = torch.tensor([3, 0, 3])
    assert torch.equal(own.take(index).y, own.y[index])
    shared = Measurement(operator, random(1, 2), 0.1)
    assert shared.take(index) is shared


def test_the_log_likelihood_is_the_normal_one_up_to_a_constant():
    A, x, std = random(3, 5), random(2, 5, seed=2), torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    measurement = Measurement(Linear(A), random(1, 3, seed=3), std)
    normal = torch.distributions.Normal(x @ A.T, std).log_prob(measurement.y).sum(dim=1)
    found = measurement.log_likelihood(x)
    torch.testing.assert_close(found - found[0], normal - normal[0])


def test_conjugate_gradients_solve_each_system_alone():
    M = random(3, 6, 6)
    M = M @ M.mT + 0.1 * torch.eye(6, dtype=torch.float64)
    b = random(3, 6, seed=5) * torch.tensor([[1.0], [1e-6], [1e6]], dtype=torch.float64)
    b[1] = 0  # nothing to do
    apply = lambda M: lambda x: (M @ x.unsqueeze(2)).squeeze(2)
    found, residual, indefinite = conjugate_gradients(apply(M), b, 12)
    assert float(residual.max()) < 1e-8 and residual[1] == 0 and not indefinite.any()
    torch.testing.assert_close(found, torch.linalg.solve(M, b), atol=1e-12, rtol=1e-6)
    alone = conjugate_gradients(apply(M[2:]), b[2:], 12).x
    torch.testing.assert_close(alone, found[2:], rtol=1e-12, atol=0)
    # singular but consistent, as without noise
    v = random(1, 6)
    singular = lambda x: v * (x * v).sum(dim=1, keepdim=True)
    torch.testing.assert_close(singular(conjugate_gradients(singular, 2 * v, 5).x), 2 * v)


def test_conjugate_gradients_tell_too_few_iterations_from_no_such_matrix():
    """Two systems of four eigenvalues, one of them below 0 in the second."""
    M = torch.stack([torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, -3.0, 4.0])]).double()
    b = torch.ones(2, 4, dtype=torch.float64)
    for n in (1, 2, 4):
        x, residual, indefinite = conjugate_gradients(lambda p: M * p, b, n)
        torch.testing.assert_close(residual, (b - M * x).norm(dim=1) / b.norm(dim=1), atol=1e-12, rtol=1e-9)
        assert indefinite.tolist() == [False, n >= 2]
        assert (residual > 1e-9).tolist() == [n < 4, True]


def wrong(operator):
    return LinearMap(operator, lambda y: 1.01 * operator.adjoint(y))


LARGE = {
    "linear": (Linear(random(40, 3 * 64 * 64)), (3 * 64 * 64,)),
    "mask": (Mask(random(3, 64, 64) > 0), (3, 64, 64)),
    "masks": (Masks(random(1, 3, 64, 64) > 0), (3, 64, 64)),
    "downsample": (Downsample(4), (3, 64, 64)),
    "blur": (Blur(kernel()), (3, 64, 64)),
    "grey": (Grey(), (3, 64, 64)),
    "functions": (LinearMap(lambda x: x.cumsum(1), lambda y: y.flip(1).cumsum(1).flip(1)), (3 * 64 * 64,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LARGE)
def test_of_large_data_right_adjoints_pass_and_slightly_wrong_ones_do_not(name, dtype):
    """A difference of 1 % is far below what <A u, v> of independent u and v differs by from one u to the next."""
    operator, event = LARGE[name]
    y = operator(random(1, *event).to(dtype))
    assert Measurement(operator, y, 0.1).event_shape == event
    if name != "masks":
        for factor in (1.01, 0.999):
            with pytest.raises(UserError, match="adjoint"):
                Measurement(LinearMap(operator, lambda y, factor=factor: factor * operator.adjoint(y)), y, 0.1)
    if name in ("mask", "downsample", "blur", "grey"):
        one = torch.zeros_like(y).flatten(1)
        one[:, -1] = 10.0  # an adjoint that is wrong in one entry only

        def off(y):
            return operator.adjoint(y) + (y.flatten(1) * one).sum().reshape(1, *(1,) * len(event)) / 100

        with pytest.raises(UserError, match="adjoint"):
            Measurement(LinearMap(operator, off), y, 0.1)


def test_noise_counts_where_something_is_observed():
    mask, std = torch.tensor([1, 0]), torch.tensor([0.1, 0.0])
    hole = Measurement(Mask(mask), torch.ones(1, 2), std)
    assert not hole.noiseless and bool(hole.log_likelihood(torch.zeros(1, 2)).isfinite())
    assert Measurement(Mask(1 - mask), torch.ones(1, 2), std).noiseless
    assert Measurement(Masks(torch.stack([mask, 1 - mask])), torch.ones(2, 2), std).noiseless


def test_lists_and_arrays_are_operators():
    assert Mask([1, 0])(torch.ones(1, 2)).tolist() == [[1.0, 0.0]]
    assert Masks([[1, 0]])(torch.ones(1, 2)).tolist() == [[1.0, 0.0]]
    assert torch.equal(Linear(random(2, 3).numpy()).matrix, random(2, 3))
    torch.testing.assert_close(Blur([0.25, 0.5, 0.25])(torch.ones(1, 1, 5)), torch.ones(1, 1, 5))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Mask("left"), "mask='left'"),
        (lambda: Linear([[1.0], [1.0, 2.0]]), "equal lengths"),
        (lambda: Linear(random(2, 3) / 0), "finite"),
        (lambda: Blur.gaussian(0.0, size=5), "std"),
        (lambda: Blur.gaussian(1.0, size=4), "odd"),
        (lambda: Measurement(LinearMap(lambda x: x @ random(3, 6).T, lambda y: y), random(1, 3), 0.1), "forward map"),
        (lambda: Measurement(LinearMap(lambda x: x @ random(3, 6).T, lambda y: None), random(1, 3), 0.1), "NoneType"),
        (lambda: Measurement(LinearMap(lambda x: None, lambda y: y), random(1, 3), 0.1), "forward map"),
        (lambda: Measurement(LinearMap(lambda x: x, lambda y: y.squeeze(9)), random(1, 3), 0.1), "adjoint cannot"),
        (lambda: Measurement(LinearMap(lambda x: x, lambda y: y.sum()), random(1, 3), 0.1), "expected data"),
        (lambda: Measurement(Masks([[1, 0]]), random(1, 2), 0.1).check(random(3, 2)), "one of each"),
        (
            lambda: Measurement(Linear(random(3, 6)), random(1, 3), 0.1).check(torch.ones(1, 6, dtype=torch.int64)),
            "int64",
        ),
        (lambda: Mask(torch.tensor([1, 0j])), "real"),
        (lambda: Grey("abc")(random(1, 3)), "weights='abc'"),
        (lambda: Measurement(Mask([1, 0]), random(1, 2), True), "std=True"),
        (lambda: Measurement(Mask([1, 0]), random(1, 2), torch.tensor([0.1, 0.1j])), "std"),
        (lambda: DDNM(measurement=random(3, 4)), "got a Tensor for a measurement"),
        (lambda: posterior(VPSDE(), lambda x, t: -x, random(3, 4)), "got a Tensor for a measurement"),
    ],
)
def test_what_was_a_traceback_is_refused_in_one_line(make, says):
    with pytest.raises(UserError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Measurement(wrong(OPERATORS["linear"][0]), random(1, 3), 0.1), "adjoint"),
        (lambda: Measurement(wrong(OPERATORS["blur"][0]), random(1, 2, 6, 7).float(), 0.1), "adjoint"),
        (lambda: Measurement(LinearMap(lambda x: x + 1, lambda y: y), random(1, 3), 0.1), "not linear"),
        (lambda: Measurement(LinearMap(lambda x: x.flip(1) * x, lambda y: y), random(1, 3), 0.1), "not linear"),
        (lambda: Measurement(Mask(torch.ones(4)), random(1, 3), 0.1), "mask of shape"),
        (lambda: Measurement(Mask(torch.ones(4, 4)), random(1, 3, 4, 4), 0.1), "every channel"),
        (lambda: Mask(torch.zeros(4)), "at least one 1"),
        (lambda: Mask(torch.full((4,), 0.5)), "zeros and ones"),
        (lambda: Mask("seen"), "mask='seen'"),
        (lambda: Masks([[1, 0], [1]]), "masks="),
        (lambda: Blur.gaussian(0.0, size=5), "std"),
        (lambda: Linear(random(3)), "matrix"),
        (lambda: Linear(random(3, 6), shape=(2, 2)), "6 columns"),
        (lambda: Linear(random(3, 6), shape=(-2, -3)), "6 columns"),
        # right for one sample, and for more of them another with every batch
        (
            lambda: Measurement(LinearMap(lambda x: x.flip(0), lambda y: y.flip(0)), random(1, 3), 0.1),
            "batch has others",
        ),
        (
            lambda: Measurement(LinearMap(lambda x: x, lambda y: y / len(y)), random(1, 3), 0.1),
            "adjoint for a sample is another",
        ),
        (lambda: Downsample(2)(random(1, 3, 4, 5)), "crop or pad"),
        (lambda: Downsample(0), "factor"),
        (lambda: Blur(random(2, 2)), "odd"),
        (lambda: Blur(random(5, 5))(random(1, 1, 3, 3)), "at least as many"),
        (lambda: Grey(())(random(1, 3)), "weights"),
        (lambda: Grey()(random(1, 4, 2, 2)), "weights"),
        (lambda: Measurement(Linear(random(3, 6)), random(1, 4), 0.1), "expected"),
        (lambda: Measurement(Linear(random(3, 6)), random(3), 0.1), "real numbers"),
        (lambda: Measurement(Linear(random(3, 6)), torch.ones(1, 3, dtype=torch.int64), 0.1), "real numbers"),
        (lambda: Measurement(Linear(random(3, 6)), random(1, 3) / 0, 0.1), "finite"),
        (lambda: Measurement(Linear(random(3, 6)), random(1, 3), -0.1), "std"),
        (lambda: Measurement(Linear(random(3, 6)), random(1, 3), torch.ones(4)), "std"),
        (lambda: Measurement(Linear(random(3, 6)), random(1, 3), float("nan")), "std"),
        (lambda: Measurement(Linear(random(3, 6)), random(1, 3), "low"), "std='low'"),
        (lambda: Measurement("mask", random(1, 3), 0.1), "operator"),
        (lambda: Measurement(Linear(random(3, 6)), random(2, 3), 0.1).check(random(3, 6)), "take"),
        (lambda: Measurement(Linear(random(3, 6)), random(1, 3), 0.1).check(random(3, 7)), "that shape"),
    ],
)
def test_what_is_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_holes_may_hold_anything():
    y = torch.tensor([[1.0, float("nan")]])
    assert Measurement(Mask(torch.tensor([1, 0])), y, 0.1).y.tolist() == [[1.0, 0.0]]


class Centred(Masks):
    """Each sample less the batch's mean, though there is `take`."""

    def __call__(self, x):
        return super().__call__(x - x.mean(dim=0) if len(x) > 1 else x)

    def adjoint(self, y):
        return self(y)


class NoAdjoint:
    def __init__(self, weights):
        self.weights = weights

    def __call__(self, x):
        return (self.weights * (x - x.mean(dim=0) if len(x) > 1 else x)).square()

    def take(self, index):
        return NoAdjoint(self.weights[index])


def test_operators_of_each_samples_own_take_it_alone_too():
    ones, y = torch.ones(6, 2), random(6, 2)
    assert Measurement(Masks(ones), y, 0.3).linear and Measurement(Masks(ones[:1]), y[:1], 0.3).linear
    with pytest.raises(UserError, match="for a sample is another where the batch has others"):
        Measurement(Centred(ones), y, 0.3)
    assert Measurement(Centred(ones[:1]), y[:1], 0.3).linear  # of one sample there is nothing to see
    mixing = Measurement(NoAdjoint(ones), y, 0.3)
    with pytest.raises(UserError, match="value for a sample is another where the batch has others"):
        mixing.residual(random(6, 2, seed=1))
