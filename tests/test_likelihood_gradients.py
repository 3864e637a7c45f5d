"""Derivatives of log-densities: by the adjoint, and by backpropagation through the solver, against closed forms."""

from __future__ import annotations

import pytest
import torch
from oracles import SDES, mixture
from torch import Tensor

from likelihood import Exact, Hutchinson, Method, log_likelihood
from numerics import Adams, Dopri5, SampleStreams, TorchDiffEq
from sde_lib.analytic import Gaussian

each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


class GaussianScore(torch.nn.Module):
    """The score of N(mean, exp(2 log_std)), diagonal, with parameters to differentiate by."""

    def __init__(self, sde, dtype=torch.float64) -> None:
        super().__init__()
        self.sde = sde
        self.mean = torch.nn.Parameter(torch.tensor([0.3, -0.4], dtype=dtype))
        self.log_std = torch.nn.Parameter(torch.tensor([-0.5, 0.2], dtype=dtype))

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.sde.alpha(t).unsqueeze(-1), self.sde.sigma(t).unsqueeze(-1)
        return alpha * self.mean, alpha.square() * (2 * self.log_std).exp() + sigma.square()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        mean, variance = self.moments(t)
        return ((mean - x) / variance).to(x.dtype)

    def log_prob(self, x: Tensor, t: float) -> Tensor:
        mean, variance = self.moments(torch.tensor(t, dtype=torch.float64))
        return torch.distributions.Normal(mean, variance.sqrt()).log_prob(x).sum(dim=1)


def solvers(parameters):
    return {
        "adjoint": TorchDiffEq("dopri5", 1e-8, adjoint=True, parameters=tuple(parameters)),
        "through torchdiffeq": TorchDiffEq("dopri5", 1e-8),
        "through dopri5": Dopri5(rtol=1e-8, atol=1e-8),
        "through adams": Adams(steps=150, points=4),
    }


@each_sde
@pytest.mark.parametrize("name", solvers(()).keys())
def test_gradients_in_data_and_parameters_are_those_of_the_closed_form(sde, name):
    model = GaussianScore(sde)
    x = torch.tensor([[0.1, 0.2], [-1.0, 0.9], [0.6, -1.5]], dtype=torch.float64, requires_grad=True)
    wanted = (x, *model.parameters())
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    expected = torch.autograd.grad((weights * model.log_prob(x, sde.t_min)).sum(), wanted)
    found = log_likelihood(
        sde,
        model,
        x,
        divergence=Exact(),
        method=Method(solvers(model.parameters())[name]),
        prior=lambda z: model.log_prob(z, sde.T),
        create_graph=True,
    )
    assert torch.allclose(found.log_prob, model.log_prob(x, sde.t_min), atol=1e-4)
    # error control sees the values only, and torchdiffeq's last value comes from an interpolation of order 4
    tolerance = 1e-2 if name == "through torchdiffeq" else 1e-3
    for got, want in zip(torch.autograd.grad((weights * found.log_prob).sum(), wanted), expected):
        assert torch.allclose(got, want, rtol=tolerance, atol=tolerance)


def test_adjoint_of_a_mixture_is_its_score():
    """Not linear, so that the trace depends on x and its derivative counts."""
    sde = SDES["vp"]
    score = mixture().score(sde)
    x = torch.tensor([[-0.8, 0.3], [0.1, 0.1]], dtype=torch.float64, requires_grad=True)
    found = log_likelihood(
        sde,
        score,
        x,
        divergence=Exact(),
        method=Method(TorchDiffEq("dopri5", 1e-7, adjoint=True)),
        prior=lambda z: mixture().log_prob(sde, z, sde.T),
        create_graph=True,
    )
    (slope,) = torch.autograd.grad(found.log_prob.sum(), x)
    assert torch.allclose(slope, score(x.detach(), torch.tensor(sde.t_min)), rtol=1e-3, atol=1e-3)


def test_adjoint_of_a_float32_network_with_a_probe():
    """The network's dtype stays its own; the state is float64; the parameters' gradients come back in float32."""
    sde = SDES["vp"]
    model = GaussianScore(sde, torch.float32)
    x = torch.tensor([[0.1, 0.2], [-1.0, 0.9]])
    # the Jacobian is diagonal, so a probe of signs gives the exact trace
    found = log_likelihood(
        sde,
        model,
        x,
        divergence=Hutchinson(),
        method=Method(TorchDiffEq("dopri5", 1e-5, adjoint=True, parameters=tuple(model.parameters()))),
        generator=SampleStreams(0),
        create_graph=True,
    )
    wanted = tuple(model.parameters())
    gradients = torch.autograd.grad(found.log_prob.mean(), wanted)
    expected = torch.autograd.grad(model.log_prob(x, sde.t_min).mean(), wanted)
    assert all(g.dtype == torch.float32 for g in gradients)
    assert all(torch.allclose(g, e, rtol=1e-2, atol=1e-2) for g, e in zip(gradients, expected))


def test_a_way_back_that_cannot_be_gone_says_so():
    """A network that is finite going forwards and not on the way back."""
    sde, law = SDES["vp"], Gaussian(torch.zeros(2), torch.ones(2))
    score, broken = law.score(sde), []
    x = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    found = log_likelihood(
        sde,
        lambda x, t: score(x, t) * (float("nan") if broken else 1.0),
        x,
        method=Method(TorchDiffEq(adjoint=True)),
        generator=SampleStreams(0),
        create_graph=True,
    )
    broken.append(True)
    with pytest.raises(ArithmeticError, match="backward integration of torchdiffeq that ended at u"):
        found.log_prob.sum().backward()


def test_parameters_without_the_adjoint_are_refused():
    with pytest.raises(ValueError, match="got 1 parameters for TorchDiffEq"):
        TorchDiffEq(parameters=(torch.zeros(1),))
