"""Tails: the map, its weights against Student t distributions, and what it does to a fit."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.errors import OptionError
from flowvi.transforms import Tails, conditional_tails, tails
from flowvi.transforms.tails import _bend, _curvature, _phi


def at_weights(left: float, right: float, dim: int = 1, dtype: torch.dtype = torch.float64) -> Tails:
    layer = Tails(dim).to(dtype)
    with torch.no_grad():
        layer.left.fill_(2 * math.atanh(left / 2))
        layer.right.fill_(2 * math.atanh(right / 2))
    return layer


def test_against_the_formula():
    x = torch.tensor([[-2.0], [-0.5], [0.5], [2.0]], dtype=torch.float64)
    heavy = at_weights(0.3, 1.0)
    expected = [
        -math.sqrt(math.expm1(0.3 * 4) / 0.3),
        -math.sqrt(math.expm1(0.3 * 0.25) / 0.3),
        math.sqrt(math.expm1(0.25)),
        math.sqrt(math.expm1(4.0)),
    ]
    assert torch.allclose(heavy(x).squeeze(), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    light = at_weights(-0.3, -1.0)
    expected = [-math.sqrt(math.log1p(0.3 * 4) / 0.3), math.sqrt(math.log1p(4.0))]
    assert torch.allclose(light(x[[0, 3]]).squeeze(), torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(torch.cat(heavy.weights()), torch.tensor([0.3, 1.0], dtype=torch.float64))


def test_the_map_at_minus_lambda_is_the_inverse():
    x = 3 * torch.randn(50, 1, dtype=torch.float64)
    for weight in (0.2, 1.0, 1.5):
        there, back = at_weights(weight, weight), at_weights(-weight, -weight)
        assert torch.allclose(back(there(x)), x, atol=1e-12)
        assert torch.allclose(there.inv(x.clone()), back(x), atol=1e-12)


@pytest.mark.parametrize("u", [1e-30, 1e-8, 1e-3, 0.3, 0.999, 1.0, 1.001, 5.0, 80.0, 700.0])
def test_phi_and_its_derivative_to_full_accuracy(u):
    """Against series for small u, and closed forms for large u; the joint at u = 1 shows in neither."""
    t = torch.tensor(u, dtype=torch.float64, requires_grad=True)
    value = _phi(t)
    slope = torch.autograd.grad(value, t)[0]
    if u < 1e-2:
        expected, expected_slope = u / 4 + u * u / 48 - u**4 / 5760, 1 / 4 + u / 24 - u**3 / 1440
    else:
        expected = 0.5 * math.log(math.expm1(u) / u) if u < 100 else 0.5 * (u - math.log(u))
        expected_slope = 0.5 * (1 / -math.expm1(-u) - 1 / u)
    assert value.item() == pytest.approx(expected, rel=1e-13)
    assert slope.item() == pytest.approx(expected_slope, rel=1e-12)


def test_weight_zero_is_inside_the_family():
    """The identity, with the derivative by lambda, x^3 / 4, that both sides share."""
    x = torch.tensor([-2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    for weight in (0.0, -1e-9, 1e-9):
        lam = torch.full_like(x, weight).requires_grad_()
        y, log_slope = _bend(x, lam)
        assert torch.allclose(y, x, atol=1e-7)
        assert torch.allclose(torch.autograd.grad(y.sum(), lam)[0], x**3 / 4, rtol=1e-6)
        assert torch.allclose(log_slope, 0 * x, atol=1e-7)


def test_curvature_is_the_log_slopes_derivative():
    torch.manual_seed(0)
    x = (2 * torch.randn(200, dtype=torch.float64)).requires_grad_()
    lam = 0.7 * torch.randn(200, dtype=torch.float64)
    expected = torch.autograd.grad(_bend(x, lam)[1].sum(), x)[0]
    assert torch.allclose(_curvature(x.detach(), lam), expected, atol=1e-11)


@pytest.mark.parametrize("df", [1.0, 2.0, 5.0])
def test_tail_is_that_of_a_student_t(df):
    """Log P(y > c) falls like -df log c, up to the half-logarithm of log c that a Gaussian tail has more."""
    layer = at_weights(1 / df, 1 / df)
    c = torch.tensor([[1e3], [1e6]], dtype=torch.float64)
    x = layer.inverse(c).squeeze()
    log_tail = torch.special.log_ndtr(-x)
    student = -df * c.log().squeeze()
    loss = 0.5 * torch.log(x[1] / x[0]).item() * 2  # P(x > t) is about exp(-t^2 / 2) / t
    assert (log_tail - student).diff().item() == pytest.approx(-loss, abs=0.05)


def test_in_two_dimensions_the_radius_is_exactly_a_student_ts():
    """Bailey 1994: the Rayleigh radius r becomes sqrt(df expm1(r^2 / df)), the radius of a bivariate t."""
    df, radius = 3.0, torch.tensor([[0.3], [1.0], [2.5]], dtype=torch.float64)
    out = at_weights(1 / df, 1 / df)(radius)
    survival_of_t = (1 + out**2 / df) ** (-df / 2)  # P(|t| > out) of the bivariate t
    assert torch.allclose(survival_of_t, torch.exp(-(radius**2) / 2), atol=1e-12)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.9, 1.9), (-1.9, 1.0), (0.2, -0.7)])
def test_float32_is_finite_and_comes_back(weights):
    layer = at_weights(*weights, dtype=torch.float32)
    x = torch.linspace(-6, 6, 401).unsqueeze(-1).requires_grad_()
    y, log_det = layer.forward_and_log_det(x)
    assert torch.isfinite(y).all()
    grads = torch.autograd.grad(log_det.sum(), (x, layer.left, layer.right))
    assert all(torch.isfinite(g).all() for g in grads)
    assert torch.allclose(layer.inverse(y), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2, 10])
def test_conditional_twin_is_the_plain_form_at_its_parameters(dim):
    torch.manual_seed(0)
    twin = conditional_tails(dim, context_dim=3).double()
    x, context = torch.randn(5, dim).double(), torch.randn(5, 3).double()
    assert torch.allclose(twin.condition(context)(x), x)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.3 * torch.randn_like(p))
    at = twin.condition(context)
    y = at(x)
    assert torch.allclose(at.inv(y.clone()), x, atol=1e-9)
    plain = Tails(dim).double()
    with torch.no_grad():
        for p, value in zip(plain.parameters(), at.params, strict=True):
            p.copy_(value[2])
    assert torch.allclose(plain(x[2]), y[2])
    assert torch.allclose(plain.log_abs_det_jacobian(x[2], plain(x[2])), at.log_abs_det_jacobian(x, y)[2])
    y.sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_student_t_needs_it():
    """On a heavy-tailed target a Gaussian fails its diagnosis (k-hat), and tails mend it; df is found."""
    df = 3.0
    target = flowvi.energies.StudentT(dim=2, df=df)
    options = {"num_steps": 250, "lr": 4e-2, "seed": 0, "progress": False, "verify": False, "anneal": False}
    plain = flowvi.fit(target, flow="affine", num_flows=1, base="diag", **options)
    heavy = flowvi.fit(target, flow="tails", num_flows=1, base="diag", **options)
    without, with_ = plain.diagnose().khat, heavy.diagnose().khat
    assert with_ < 0.3
    assert with_ < without - 0.2
    weights = torch.cat(heavy.flow.transforms[0].weights())
    assert torch.allclose(weights, torch.full_like(weights, 1 / df), atol=0.08)


def test_both_sides_are_learnt_apart():
    """Maximum likelihood on draws with one heavy and one light side finds both weights."""
    torch.manual_seed(0)
    truth = at_weights(0.6, -0.3)
    with torch.no_grad():
        y = truth(torch.randn(4000, 1, dtype=torch.float64))
    layer = Tails(1).double()
    flow = flowvi.Flow(dist.Normal(torch.zeros(1).double(), 1.0).to_event(1), [layer])
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -flow.log_prob(y).mean()
        value.backward()
        return value

    optimizer.step(loss)
    left, right = (w.item() for w in layer.weights())
    assert left == pytest.approx(0.6, abs=0.12)
    assert right == pytest.approx(-0.3, abs=0.12)


@pytest.mark.parametrize("most", [0.0, -1.0, 11.0])
def test_bad_arguments(most):
    with pytest.raises(OptionError, match="most must be a number in"):
        tails(2, most=most)
    with pytest.raises(OptionError, match="most must be a number in"):
        conditional_tails(2, 3, most=most)
