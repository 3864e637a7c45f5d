"""Broadcasting, random streams and solvers of initial value problems."""

import math

import pytest
import torch

from numerics import (
    RK4,
    Adams,
    Dopri5,
    Heun,
    SampleStreams,
    SciPy,
    Status,
    TorchDiffEq,
    batch_time,
    expand_as,
    normal,
    rademacher,
    uniform,
)
from numerics.multistep import integration_weights
from numerics.streams import philox


class TestExpandAs:
    def test_multiplies_along_the_batch_also_when_batch_and_dimension_are_equal(self):
        c, x = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3, 3)
        assert torch.equal(expand_as(c, x) * x, torch.tensor([[1.0] * 3, [2.0] * 3, [3.0] * 3]))

    def test_casts_coefficients_to_the_state_but_leaves_a_mask_a_mask(self):
        x = torch.zeros(2, 1, 4, 4)
        assert expand_as(torch.tensor([1.0, 2.0], dtype=torch.float64), x).dtype == torch.float32
        assert expand_as(torch.tensor([True, False]), x).dtype == torch.bool

    @pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 4), (4, 5)])
    def test_refuses_other_shapes_naming_both(self, shape):
        with pytest.raises(ValueError, match=r"\(4, 5, 6\)") as error:
            expand_as(torch.ones(shape), torch.ones(4, 5, 6))
        assert str(tuple(shape)) in str(error.value)

    def test_time_of_the_wrong_shape_is_refused(self):
        with pytest.raises(ValueError, match=r"got t of shape \(2,\) for x of shape \(3, 2\)"):
            batch_time(torch.ones(2), torch.ones(3, 2))
        assert batch_time(0.5, torch.ones(3, 2)).tolist() == [0.5] * 3


class TestStreams:
    @pytest.mark.parametrize(
        ("counter", "key", "expected"),
        [
            # known answers of the Random123 distribution, philox4x32 with 10 rounds
            ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ],
    )
    def test_philox_gives_the_published_numbers(self, counter, key, expected):
        words = philox(tuple(torch.tensor([c]) for c in counter), key)
        assert tuple(int(w) for w in words) == expected

    @pytest.mark.parametrize("draw", [normal, uniform, rademacher])
    def test_a_sample_does_not_depend_on_its_batch(self, draw):
        whole = SampleStreams(7)
        a, b = draw((6, 2, 3), whole), draw((6, 2, 3), whole)
        ids = torch.tensor([4, 1])
        part = SampleStreams(7, ids)
        assert torch.equal(draw((2, 2, 3), part), a[ids])
        assert torch.equal(draw((2, 2, 3), part), b[ids])
        assert not torch.equal(a, b)

    def test_taken_streams_go_on_in_the_middle(self):
        whole = SampleStreams(3, [5, 6, 7])
        normal((3, 4), whole)
        some = whole.take(torch.tensor([False, True, True]))
        assert torch.equal(normal((2, 4), some), normal((3, 4), whole)[1:])

    def test_the_law_of_the_draws(self):
        n = 400_000
        z = SampleStreams(11).normal((n // 100, 100)).flatten()
        u = SampleStreams(12).uniform((n // 100, 100)).flatten()
        s = rademacher((n // 100, 100), SampleStreams(13)).flatten()
        for value, expected, variance in (
            (z.mean(), 0, 1),
            (z.square().mean(), 1, 2),
            (z.pow(4).mean(), 3, 96),
            ((z[1:] * z[:-1]).mean(), 0, 1),
            (u.mean(), 0.5, 1 / 12),
            (u.square().mean(), 1 / 3, 4 / 45),
            (s.mean(), 0, 1),
            ((s[1:] * s[:-1]).mean(), 0, 1),
        ):
            assert abs(float(value) - expected) < 4.5 * math.sqrt(variance / n)
        assert float(u.min()) >= 0 and float(u.float().max()) < 1

    def test_a_draw_of_the_wrong_batch_is_refused(self):
        with pytest.raises(ValueError, match="batch of 3 from streams of 2"):
            normal((3, 2), SampleStreams(0, [1, 2]))


def pendulum(u, y):
    """y' = -y sin(u + 0.5) x (1, 2, 3): y = y_0 exp(rate (cos(u + 0.5) - cos 0.5)). The phase keeps odd derivatives from
    vanishing at the start, which would flatter a method's first steps."""
    rate = torch.arange(1, y[0].shape[1] + 1, dtype=torch.float64)
    return (-y[0] * torch.sin(u + 0.5).unsqueeze(1) * rate,)


def pendulum_at(y_0, u):
    rate = torch.arange(1, y_0.shape[1] + 1, dtype=torch.float64)
    return y_0 * torch.exp(rate * (math.cos(u + 0.5) - math.cos(0.5)))


class Counted:
    """The pendulum's field, counting its evaluations."""

    calls = 0

    def __call__(self, u, y):
        self.calls += 1
        return pendulum(u, y)


Y_0 = torch.tensor([[1.0, 0.5, 2.0], [-1.0, 3.0, 0.1]], dtype=torch.float64)


class TestSolvers:
    @pytest.mark.parametrize(
        ("make", "order"),
        [
            (lambda n: Heun(steps=n), 2),
            (lambda n: RK4(steps=n), 4),
            (lambda n: Adams(steps=n, points=2), 2),
            (lambda n: Adams(steps=n, points=3), 3),
            (lambda n: Adams(steps=n, points=4), 4),
            (lambda n: Adams(steps=n, points=5), 5),
            (lambda n: Adams(steps=n, points=5, start="rising"), 3),
        ],
    )
    @pytest.mark.parametrize("uneven", [False, True])
    def test_declared_order_is_measured(self, make, order, uneven):
        if uneven and getattr(make(1), "start", "") == "rising":
            pytest.skip("a grid that is fine at the start hides the order of the first steps")
        errors = []
        for n in (40, 80, 160, 320, 640, 1280):
            nodes = 3 * torch.linspace(0, 1, n + 1, dtype=torch.float64) ** 1.5 if uneven else None
            found = make(n)(pendulum, (Y_0,), 0.0, 3.0, nodes=nodes)
            errors.append(float((found.y[0] - pendulum_at(Y_0, 3.0)).abs().max()))
        slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
        assert make(1).order == order
        settled = [s for s, e in zip(slopes, errors[1:]) if e > 1e-12]
        agreeing = [b for a, b in zip(settled, settled[1:]) if abs(a - b) < 0.1]  # doubled until two slopes agree
        assert agreeing and abs(agreeing[0] - order) < 0.2, slopes
        evaluations = []
        found = make(7)(lambda u, y: (evaluations.append(1), pendulum(u, y))[1], (Y_0,), 0.0, 3.0)
        assert int(found.evaluations[0]) == len(evaluations)

    @pytest.mark.parametrize("points", [2, 3, 4, 5])
    def test_integration_weights_are_exact_for_polynomials(self, points):
        at = [1.0, 0.6, 0.5, 0.1, -0.3][:points]
        for degree in range(points):
            value = sum(w * u**degree for w, u in zip(integration_weights(at, (0.6, 1.3)), at))
            assert value == pytest.approx((1.3 ** (degree + 1) - 0.6 ** (degree + 1)) / (degree + 1), abs=1e-13)

    @pytest.mark.parametrize("points", [2, 3, 4, 5])
    def test_a_known_factor_of_the_slopes_is_integrated_exactly(self, points):
        """weight times a polynomial: exact on any grid, as is the polynomial without one."""

        class Field:
            def weight(self, u):
                return 1 / torch.cosh(3 * u)

            def __call__(self, u, y):
                return ((self.weight(u) * u ** (points - 2)).unsqueeze(1).expand_as(y[0]),)

        nodes = torch.tensor([-2.0, -1.7, -1.0, -0.2, 0.4, 0.5, 1.5], dtype=torch.float64)
        y_0 = torch.zeros(1, 1, dtype=torch.float64)
        u = torch.linspace(-2.0, 1.5, 200_001, dtype=torch.float64)
        truth = torch.trapezoid(u ** (points - 2) / torch.cosh(3 * u), u)
        error = lambda start: abs(
            float(Adams(steps=6, points=points, start=start)(Field(), (y_0,), -2.0, 1.5, nodes=nodes).y[0]) - truth
        )
        if points <= 3:  # the first step has two points
            assert error("rising") < 1e-8
        weights = integration_weights(nodes[: points - 1].tolist(), (0.4, 1.1), Field().weight)
        inside = (u >= 0.4) & (u <= 1.1)
        value = sum(
            w * float(Field().weight(v)) * float(v) ** (points - 2) for w, v in zip(weights, nodes[: points - 1])
        )
        assert value == pytest.approx(
            float(torch.trapezoid((u ** (points - 2) / torch.cosh(3 * u))[inside], u[inside])), abs=1e-4
        )

    @pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10])
    def test_dopri5_meets_its_tolerance_both_ways(self, tolerance):
        solver = Dopri5(rtol=tolerance, atol=tolerance)
        there = solver(pendulum, (Y_0,), 0.0, 3.0)
        assert (there.y[0] - pendulum_at(Y_0, 3.0)).abs().max() < 30 * tolerance
        assert float(there.error[0].max()) < 100 * tolerance
        back = solver(pendulum, there.y, 3.0, 0.0)
        assert (back.y[0] - Y_0).abs().max() < 300 * tolerance

    def test_dopri5_steps_per_sample(self):
        """A sample's value and its evaluations are those that it has alone, whatever else is in the batch."""
        stiff = torch.tensor([1.0, 40.0, 1.0, 400.0], dtype=torch.float64)

        class Field:
            def __init__(self, rates):
                self.rates = rates

            def take(self, index):
                return Field(self.rates[index])

            def __call__(self, u, y):
                return (-self.rates.unsqueeze(1) * (y[0] - torch.cos(u).unsqueeze(1)),)

        y_0 = torch.ones(4, 2, dtype=torch.float64)
        together = Dopri5()(Field(stiff), (y_0,), 0.0, 2.0)
        for i in range(4):
            alone = Dopri5()(Field(stiff[i : i + 1]), (y_0[i : i + 1],), 0.0, 2.0)
            assert torch.equal(alone.y[0][0], together.y[0][i])
            assert int(alone.evaluations) == int(together.evaluations[i])
        assert int(together.evaluations[3]) > 2 * int(together.evaluations[0])

    def test_a_sample_that_fails_leaves_the_others_alone(self):
        def field(u, y):
            hole = (y[0] > 10) & (u.unsqueeze(1) > 1.5)
            return (torch.where(hole, math.nan, 0.1 * y[0]),)

        y_0 = torch.tensor([[1.0], [11.0], [2.0]], dtype=torch.float64)
        found = Dopri5()(field, (y_0,), 0.0, 3.0)
        assert found.status.tolist() == [Status.DONE, Status.NONFINITE, Status.DONE]
        assert found.u[1] == pytest.approx(1.5, abs=1e-6)
        assert torch.allclose(found.y[0][[0, 2]], y_0[[0, 2]] * math.exp(0.3), rtol=1e-5)
        fixed = RK4(steps=30)(field, (y_0,), 0.0, 3.0)
        assert fixed.status.tolist() == found.status.tolist()
        assert fixed.u[1] == pytest.approx(1.5, abs=0.11)

    def test_limits_end_the_integration_with_a_status(self):
        explosion = Dopri5()(lambda u, y: (y[0].square(),), (Y_0[:1].abs(),), 0.0, 3.0)
        assert explosion.status.tolist() in ([Status.UNDERFLOW], [Status.NONFINITE])
        assert Dopri5(max_steps=3)(pendulum, (Y_0,), 0.0, 3.0).status.tolist() == [Status.MAX_STEPS] * 2

    @pytest.mark.parametrize("solver", [SciPy("RK45", 1e-9), SciPy("DOP853", 1e-9), TorchDiffEq("dopri5", 1e-9)])
    def test_outside_solvers_agree_and_are_guarded(self, solver):
        found = solver(pendulum, (Y_0,), 0.0, 3.0)
        assert (found.y[0] - pendulum_at(Y_0, 3.0)).abs().max() < 1e-7
        broken = solver(lambda u, y: (y[0] * math.nan,), (Y_0,), 0.0, 3.0)
        assert broken.status.tolist() == [Status.NONFINITE] * 2
        assert bool(broken.y[0].isnan().all())
        seen = []
        solver(lambda u, y: (seen.append(float(u.max())), -y[0])[1:], (Y_0,), 0.0, 3.0)
        assert max(seen) <= 3.0

    def test_gradients_go_through_the_steps(self):
        y_0 = Y_0.clone().requires_grad_()
        for solver in (Dopri5(rtol=1e-9, atol=1e-9), RK4(steps=100), Adams(steps=400, points=4)):
            (slope,) = torch.autograd.grad(solver(pendulum, (y_0,), 0.0, 3.0).y[0].sum(), y_0)
            assert torch.allclose(slope, pendulum_at(torch.ones_like(Y_0), 3.0), rtol=1e-6)

    @pytest.mark.parametrize(("tolerance", "close"), [(1e-2, 0.02), (1e-3, 2e-3), (1e-5, 1e-4)])
    def test_the_adjoint_of_a_flow_that_contracts(self, tolerance, close):
        """dx/du = -a x and dv/du = -x, of which x + v at 1 is known. The way back from the end alone goes astray."""
        errors = []
        for kept in (16, 1):
            a, y = torch.tensor(12.0, dtype=torch.float64, requires_grad=True), Y_0[:, :1].abs() + 1
            solver = TorchDiffEq("dopri5", tolerance, adjoint=True, kept=kept, parameters=(a,))
            end = solver(lambda u, y, a=a: (-a * y[0], -y[0]), (y, torch.zeros_like(y)), 0.0, 1.0).y
            (slope,) = torch.autograd.grad(end[0].sum() + end[1].sum(), a)
            small = math.exp(-12.0)
            exact = float(y.sum()) * (-small + (1 - small) / 144 - small / 12)
            errors.append(abs(float(slope) / exact - 1))
        assert errors[0] < close and errors[1] > 10 * errors[0]

    def test_bad_options_are_refused(self):
        for make in (
            lambda: TorchDiffEq(adjoint=True, kept=0),
            lambda: Heun(steps=0),
            lambda: Adams(points=9),
            lambda: Adams(start="cold"),
            lambda: Dopri5(rtol=1e-16, atol=0.0),
            lambda: Dopri5(rtol=-1),
            lambda: SciPy("RK54"),
            lambda: TorchDiffEq("tsit5"),
        ):
            with pytest.raises(ValueError, match=r"^got .*; expected"):
                make()
        with pytest.raises(ValueError, match="monotone"):
            Heun()(pendulum, (Y_0,), 0.0, 1.0, nodes=torch.tensor([0.0, 0.5, 0.4]))

    @pytest.mark.parametrize("solver", [Heun(), RK4(), Adams()], ids=lambda s: type(s).__name__)
    def test_nodes_that_do_not_span_the_interval_are_refused(self, solver):
        for ends in ((0.0, 0.9), (0.1, 1.0), (1.0, 0.0), (0.0, 1.1)):
            with pytest.raises(ValueError, match="expected nodes that begin and end there"):
                solver(pendulum, (Y_0,), 0.0, 1.0, nodes=torch.linspace(*ends, 5))
        solver(pendulum, (Y_0,), 0.0, 0.3, nodes=torch.linspace(0, 0.3, 5, dtype=torch.float32))  # but for rounding

    @pytest.mark.parametrize("solver", [Dopri5(), SciPy(), TorchDiffEq()], ids=lambda s: type(s).__name__)
    def test_adaptive_solvers_refuse_what_is_for_a_grid(self, solver):
        for options in ({"nodes": torch.linspace(0, 1, 5)}, {"keep_path": True}):
            with pytest.raises(ValueError, match=f"with {type(solver).__name__}, which chooses its own steps"):
                solver(pendulum, (Y_0,), 0.0, 1.0, **options)
        assert solver.evaluations(7) is None
        with pytest.raises(ValueError, match="expected a solver of fixed steps"):
            solver.with_steps(7)

    @pytest.mark.parametrize(
        "solver", [Heun(), RK4(), Adams(points=2), Adams(points=5), Adams(points=5, start="rising")], ids=repr
    )
    def test_the_cost_of_fixed_steps_is_known_beforehand(self, solver):
        for steps in (1, 2, 3, 9):
            seen, field = [], Counted()
            note = lambda u, y, seen=seen: seen.append(float(u[0]))
            found = solver.with_steps(steps)(field, (Y_0,), 0.0, 3.0, keep_path=True, callback=note)
            assert field.calls == solver.evaluations(steps) == int(found.evaluations[0])
            assert seen == pytest.approx(found.nodes[1:].tolist()) and len(found.path) == steps + 1

    @pytest.mark.parametrize("make", [lambda **o: SciPy(rtol=1e-3, **o), lambda **o: TorchDiffEq(rtol=1e-3, **o)])
    def test_an_absolute_tolerance_of_zero_is_one(self, make):
        """Of a solution that falls to 1e-9 the relative error has to be small, which an absolute tolerance forgives."""
        decay = lambda u, y: (-7 * y[0],)
        error = lambda solver: float(
            (solver(decay, (Y_0[:, :1].abs(),), 0.0, 3.0).y[0] / math.exp(-21) - 1).abs().max()
        )
        assert error(make(atol=0.0)) < 0.05 < error(make())
        with pytest.raises(ValueError, match="one of them > 0"):
            type(make())(rtol=0.0, atol=0.0)

    def test_the_order_of_outside_solvers_is_that_of_their_method(self):
        assert [SciPy(m).order for m in ("RK45", "RK23", "DOP853")] == [5, 3, 8]
        assert [TorchDiffEq(m).order for m in ("dopri5", "dopri8", "bosh3")] == [5, 8, 3]


def test_the_error_of_adams_adds_its_steps_as_if_their_signs_were_independent():
    """With two points a step's difference is h/2 (k_n - k_{n+1}), the trapezoid's minus the rectangle's at the new node."""
    nodes = torch.linspace(0, 3, 31, dtype=torch.float64)
    found = Adams(steps=30, points=2)(
        lambda u, y: (torch.cos(9 * u).unsqueeze(1),), (torch.zeros(2, 1, dtype=torch.float64),), 0.0, 3.0, nodes=nodes
    )
    steps = 0.05 * torch.cos(9 * nodes).diff()
    assert torch.allclose(found.error[0], steps.square().sum().sqrt().expand(2), rtol=1e-9)
