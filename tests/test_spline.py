"""Rational-quadratic splines: the function itself, its hand-written derivatives, and the flows made of it."""

from __future__ import annotations

import copy
from functools import partial

import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.errors import DimensionError, OptionError
from flowvi.transforms import (
    AutoregressiveSpline,
    NeuralSpline,
    RationalQuadratic,
    conditional_neural_spline,
    neural_spline,
)
from flowvi.transforms import spline as module
from flowvi.transforms.elementwise import Elementwise
from flowvi.transforms.registry import build
from flowvi.transforms.spline import _solve

LAYERS = {
    "coupling": partial(NeuralSpline, num_flows=3),
    "autoregressive, for sampling": AutoregressiveSpline,
    "autoregressive, for densities": partial(AutoregressiveSpline, fast="inverse"),
}


def make(num_bins: int = 8, bound: float = 5.0, *, size: int = 400, scale: float = 3.0, reach: float = 7.0):
    """A spline, points inside and outside its box, and wild parameters."""
    torch.manual_seed(0)
    spline = RationalQuadratic(num_bins, bound)
    x = reach * (2 * torch.rand(size, 2, dtype=torch.float64) - 1)
    return spline, x, scale * torch.randn(size, 2, spline.num_params, dtype=torch.float64)


def perturbed(layer, scale: float = 0.4):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            fan_in = p.shape[-1] if p.dim() == 2 else 1
            p.add_(scale * fan_in**-0.5 * torch.randn_like(p))
    return layer


# The function.


@pytest.mark.parametrize("num_bins", [2, 8, 20])
def test_zero_parameters_are_the_identity(num_bins):
    spline, x, params = make(num_bins)
    y, log_slope = spline.forward(x, torch.zeros_like(params))
    assert torch.allclose(y, x, atol=1e-14)
    assert torch.allclose(log_slope, torch.zeros_like(x), atol=1e-14)
    assert torch.allclose(spline.inverse(x, torch.zeros_like(params))[0], x, atol=1e-14)


def test_two_bins_against_the_paper_by_hand():
    """Two equal bins in x, at a point whose value and slope by the paper's formulas are easy to write down."""
    spline = RationalQuadratic(num_bins=2, bound=1.0)
    # Shares 1/2, 1/2 in x; nearly 3/4, 1/4 in y; slope 1 at all three knots.
    raw = torch.log(torch.tensor(3.0, dtype=torch.float64)) / module.DAMPING
    params = torch.tensor([0, 0, raw, 0, 0], dtype=torch.float64)
    h = 2 * (module.MIN_SHARE / 2 + (1 - module.MIN_SHARE) * 0.75)
    xi = torch.tensor(0.3, dtype=torch.float64)  # in the first bin, x = -1 + .3
    t = xi * (1 - xi)
    expected = -1 + h * (h * xi**2 + t) / (h + (2 - 2 * h) * t)
    slope = h**2 * (xi**2 + 2 * h * t + (1 - xi) ** 2) / (h + (2 - 2 * h) * t) ** 2
    y, log_slope = spline.forward(-1 + xi, params)
    assert y.item() == pytest.approx(expected.item(), abs=1e-12)
    assert log_slope.item() == pytest.approx(slope.log().item(), abs=1e-12)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_monotone_and_smooth_over_the_bound(scale):
    spline = RationalQuadratic()
    torch.manual_seed(1)
    params = scale * torch.randn(20, 1, spline.num_params, dtype=torch.float64)
    line = torch.linspace(-5.5, 5.5, 2001, dtype=torch.float64)
    y, _ = spline.forward(line.expand(20, -1), params.expand(20, 2001, -1))
    assert (y.diff(dim=-1) > 0).all()
    for edge in (-5.0, 5.0):
        x = torch.tensor([edge - 1e-9, edge + 1e-9], dtype=torch.float64).expand(20, -1)
        y, log_slope = spline.forward(x, params.expand(20, 2, -1))
        assert torch.allclose(y, x, atol=1e-5)
        assert torch.allclose(log_slope, torch.zeros_like(x), atol=1e-3)


def test_knots_are_where_the_parameters_say_from_both_sides():
    spline, _, params = make(size=30)
    params = params[:, :1]
    raw = params * module.DAMPING
    shares = torch.softmax(raw[..., :16].unflatten(-1, (2, 8)), -1)
    size = 10 * (module.MIN_SHARE / 8 + (1 - module.MIN_SHARE) * shares)
    knots = size.cumsum(-1)[..., :-1] - 5
    slopes = module.MIN_SLOPE + (1 - module.MIN_SLOPE) * (raw[..., 16:] + (raw[..., 16:] ** 2 + 4).sqrt()) / 2
    for j in range(7):
        for side in (-1e-11, 1e-11):
            y, log_slope = spline.forward(knots[..., 0, j] + side, params)
            assert torch.allclose(y, knots[..., 1, j], atol=1e-8)
            assert torch.allclose(log_slope.exp(), slopes[..., j], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_round_trip_float64(scale):
    spline, x, params = make(size=2000, scale=scale)
    y, log_slope = spline.forward(x, params)
    back, inverse_slope = spline.inverse(y, params)
    assert torch.allclose(back, x, atol=1e-9)
    assert torch.allclose(inverse_slope, -log_slope, atol=1e-7)


def test_round_trip_float32():
    spline, x, params = make(size=2000, scale=1.0)
    x, params = x.float(), params.float()
    y, _ = spline.forward(x, params)
    assert torch.allclose(spline.inverse(y, params)[0], x, atol=1e-4)
    exact = spline.forward(x.double(), params.double())[0]
    assert torch.allclose(y.double(), exact, atol=1e-4)


def test_inverse_is_as_good_in_float32_as_its_own_slope_allows():
    """An error of a few roundings of xi, and of r times dxi/dr; the quadratic formula's differences would add more."""
    torch.manual_seed(0)
    r = torch.rand(20000) ** 4
    r = torch.cat((r, 1 - r)).clamp(1e-7, 1 - 1e-7)
    s, d0, d1 = torch.exp(3 * torch.randn(3, r.numel()))
    wide = [v.double() for v in (r, s, d0, d1)]
    xi, co = _solve(*wide)
    _, s, d0, d1 = wide
    by_xi = s * (d1 * xi**2 + 2 * s * xi * co + d0 * co**2) / (s * (xi**2 + co**2) + (d0 + d1) * xi * co) ** 2
    by_r = wide[0] * (1 - wide[0]) / by_xi
    near = [v.double() for v in _solve(*(v.float() for v in wide))]
    eps = torch.finfo(torch.float32).eps
    assert ((near[0] - xi).abs() < 4 * eps * (xi + by_r)).all()
    assert ((near[1] - co).abs() < 4 * eps * (co + by_r)).all()
    assert torch.allclose(xi + co, torch.ones_like(xi), atol=1e-14)


@pytest.mark.parametrize("what", ["forward", "inverse"])
def test_gradients(what):
    spline, x, params = make(size=5, scale=2.0)
    x, params = x.requires_grad_(), params.requires_grad_()
    assert torch.autograd.gradcheck(getattr(spline, what), (x, params))


def test_log_slope_is_autograds():
    spline, x, params = make()
    x.requires_grad_()
    y, log_slope = spline.forward(x, params)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0].log(), log_slope, atol=1e-10)


@pytest.mark.parametrize("far", [5.0, 5.1, 1e3, 1e30])
def test_far_outside_the_box_it_is_the_identity_with_finite_gradients(far):
    spline = RationalQuadratic()
    params = torch.randn(6, spline.num_params, requires_grad=True)
    x = torch.tensor([-far, far]).repeat(3).requires_grad_()
    for f in (spline.forward, spline.inverse):
        y, log_slope = f(x, params)
        assert torch.allclose(y, x)
        assert torch.allclose(log_slope, torch.zeros(6), atol=1e-5)
        to_x, to_params = torch.autograd.grad((y + log_slope).sum(), (x, params))
        assert torch.isfinite(to_x).all()
        assert torch.isfinite(to_params).all()
        if far > 5:
            assert torch.equal(to_x, torch.ones(6))
            assert torch.equal(to_params, torch.zeros_like(params))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3, 1e6])
def test_float32_stays_finite_at_any_parameters(scale):
    spline, x, params = make(size=3000, scale=scale, reach=6.0)
    x, params = x.float().requires_grad_(), params.float().requires_grad_()
    for f in (spline.forward, spline.inverse):
        y, log_slope = f(x, params)
        grads = torch.autograd.grad(y.sum() + log_slope.sum(), (x, params))
        assert all(torch.isfinite(v).all() for v in (y, log_slope, *grads))
        assert (y.abs() <= x.abs().clamp_min(5.001)).all()


def test_tape_is_what_autograd_gives():
    spline, x, params = make(scale=1.5)

    class ByAutograd(Elementwise):
        """The same map without its closed forms."""

        forward = staticmethod(spline.forward)

    score, to_y, to_log_slope = torch.randn(3, *x.shape, dtype=torch.float64)
    for to_log in (None, to_log_slope, torch.randn(400, 1, dtype=torch.float64)):
        ours, theirs = (m.forward_with_tape(x, params) for m in (spline, ByAutograd()))
        assert torch.allclose(ours[0], theirs[0])
        assert torch.allclose(ours[1], theirs[1])
        for a, b in zip(
            spline.backward(ours[2], to_y, to_log), ByAutograd().backward(theirs[2], to_y, to_log), strict=True
        ):
            assert torch.allclose(a, b, atol=1e-9, rtol=1e-7)
    expected = ByAutograd().score(theirs[2], score)
    for a, b in zip(spline.score(ours[2], score), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-8, rtol=1e-7)
    in_one = spline.forward_with_score(x, params.clone().requires_grad_(), score)
    assert in_one[0].requires_grad
    assert in_one[1].requires_grad
    assert torch.allclose(in_one[2], expected[0], atol=1e-8, rtol=1e-7)
    assert torch.allclose(in_one[3], expected[1], atol=1e-8, rtol=1e-7)


def test_batches_of_parameters_broadcast_and_vmap():
    spline, x, params = make(size=6)
    shared = params[0]
    y, log_slope = spline.forward(x, shared)
    assert torch.equal(y, spline.forward(x, shared.expand(6, 2, -1))[0])
    assert torch.allclose(torch.func.vmap(spline.forward, in_dims=(0, None))(x, shared)[0], y)
    slopes = torch.func.vmap(torch.func.vmap(torch.func.grad(lambda v, p: spline.forward(v, p)[0])))(x, params)
    assert torch.allclose(slopes.log(), spline.forward(x, params)[1], atol=1e-10)
    leaf = shared.clone().requires_grad_()
    total = torch.autograd.grad(spline.forward(x, leaf)[0].sum(), leaf)[0]
    assert total.shape == shared.shape
    assert log_slope.shape == x.shape


# The flows.


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dim", [1, 2, 5, 50])
def test_layers(layer, dim):
    torch.manual_seed(0)
    t = layer(dim).double()
    x = 2 * torch.randn(20, dim, dtype=torch.float64)
    assert torch.allclose(t(x), x, atol=1e-12)  # the identity at the start
    perturbed(t)
    y, log_det = t.forward_and_log_det(x)
    assert not torch.allclose(y, x)
    back, log_det_back = t.inverse_and_log_det(y)
    assert torch.allclose(back, x, atol=1e-6)
    assert torch.allclose(log_det_back, -log_det, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(lambda v: t.forward_and_log_det(v)[0], x[0])
    assert log_det[0].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-6)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_path_score(layer, dim):
    t = perturbed(layer(dim).double())
    flow = flowvi.Flow(dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1), [t])
    z, log_q, score = flow.rsample_with_score(50)
    fresh = z.detach().clone().requires_grad_()
    value = flow.log_prob(fresh)
    assert torch.allclose(log_q, value, atol=1e-8)
    assert torch.allclose(score, torch.autograd.grad(value.sum(), fresh)[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_conditional_twin(kind, dim):
    twin = conditional_neural_spline(dim, context_dim=3, kind=kind).double()
    x, context = torch.randn(6, dim).double(), torch.randn(6, 3).double()
    assert torch.allclose(twin.condition(context)(x), x, atol=1e-12)
    perturbed(twin)
    at = twin.condition(context)
    y = at(x)
    assert torch.allclose(at.inv(y.clone()), x, atol=1e-8)
    one = twin.condition(context[2])
    assert torch.allclose(one(x[2]), y[2], atol=1e-12)
    assert torch.allclose(one.log_abs_det_jacobian(x[2], one(x[2])), at.log_abs_det_jacobian(x, y)[2])
    assert not torch.allclose(twin.condition(context[1])(x[2]), y[2])
    jacobian = torch.autograd.functional.jacobian(lambda v: twin.condition(context[0])(v), x[0])
    assert torch.allclose(at.log_abs_det_jacobian(x, y)[0], torch.linalg.slogdet(jacobian)[1], atol=1e-8)
    at.forward_and_log_det(x)[1].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in twin.parameters() if p.grad is not None)
    with pytest.raises(DimensionError, match="C = 3"):
        twin.condition(torch.randn(6, 2).double())


def test_stacks():
    assert build("neural_spline", 3, 4)[0].num_flows == 4
    layers = build("neural_spline", 3, 4, kind="autoregressive", num_bins=5, bound=3.0)
    assert len(layers) == 4
    assert layers[0].elementwise.num_params == 14
    twin = copy.deepcopy(layers[0])
    x = torch.randn(4, 3)
    assert torch.equal(twin(x), layers[0](x))


def test_one_spline_of_one_coordinate_fits_two_modes():
    """Enough bends for two modes that are 4.3 standard deviations apart, where one planar layer has KL .05 or more."""

    def log_p(z):
        return torch.logaddexp(-0.5 * ((z - 1.5) / 0.7) ** 2, -0.5 * ((z + 1.5) / 0.7) ** 2).squeeze(-1)

    posterior = flowvi.fit(
        log_p, dim=1, flow="neural_spline", num_flows=1, num_bins=12, num_steps=300, lr=4e-2, whiten=False, seed=0,
        verify=False, progress=False,
    )  # fmt: skip
    log_z = torch.tensor(2 * 0.7 * (2 * torch.pi) ** 0.5).log().item()
    with torch.no_grad():
        z, log_q = posterior.flow.rsample_and_log_prob(20000)
        kl = (log_q - log_p(z)).mean().item() + log_z
    assert kl == pytest.approx(0, abs=0.015)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: RationalQuadratic(1), "num_bins must be a whole number of at least 2"),
        (lambda: RationalQuadratic(2.5), "num_bins must be a whole number"),
        (lambda: RationalQuadratic(bound=0.0), "bound must be a positive number"),
        (lambda: neural_spline(2, kind="cubic"), "kind must be one of coupling, autoregressive"),
        (lambda: neural_spline(0), "input_dim must be a positive integer"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(OptionError, match=text):
        call()
