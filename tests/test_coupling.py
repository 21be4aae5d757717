"""Coupling layers, their elementwise maps, networks and mixings: identities, inverses, scores, conditional twins."""

from __future__ import annotations

from itertools import pairwise

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import flowvi
from flowvi.errors import DimensionError, OptionError
from flowvi.transforms import (
    NICE,
    Coupling,
    Householder,
    RealNVP,
    conditional_householder,
    conditional_nice,
    conditional_real_nvp,
)
from flowvi.transforms.elementwise import Additive, Elementwise, InverseAffine, SoftClippedAffine
from flowvi.transforms.mixing import Permutation, Rotation, make_mixing, random_orthogonal
from flowvi.transforms.networks import ACTIVATIONS, DenseNetwork, dense, dense_backward, dense_pullback
from flowvi.transforms.registry import build


class ByAutograd(SoftClippedAffine):
    """The affine map with the derivatives that every elementwise map has."""

    forward_with_tape = Elementwise.forward_with_tape
    score = Elementwise.score
    backward = Elementwise.backward


class Cubic(Elementwise):
    """tau(x) = x + p^2 x^3, whose slope depends on x: needs all of the score's formula; inverse by Newton's steps."""

    num_params = 1

    def forward(self, x, params):
        c = params.squeeze(-1) ** 2
        return x + c * x**3, torch.log1p(3 * c * x**2)

    def inverse(self, y, params):
        c = params.squeeze(-1) ** 2
        x = y
        for _ in range(100):
            x = x - (x + c * x**3 - y) / (1 + 3 * c * x**2)
        return x, -torch.log1p(3 * c * x**2)


MAPS = (Additive(), SoftClippedAffine(), SoftClippedAffine(clip=0.5), InverseAffine(), ByAutograd(), Cubic())
CLASSES = (NICE, RealNVP)


def perturb(module: nn.Module, scale: float = 0.7) -> nn.Module:
    """A module in float64 away from its start, with outputs of order one."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * p.shape[-1] ** -0.5 * torch.randn_like(p) if p.dim() > 1 else scale * torch.randn_like(p))
    return module


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Elementwise maps.


@pytest.mark.parametrize("tau", MAPS, ids=repr)
def test_elementwise_maps(tau):
    x, params = randn(20, 3).requires_grad_(), randn(20, 3, tau.num_params).requires_grad_()
    y, log_slope = tau.forward(x, params)
    slope = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    assert torch.allclose(slope.log(), log_slope)
    back, log_back = tau.inverse(y, params)
    assert torch.allclose(back, x)
    assert torch.allclose(log_back, -log_slope)
    still, zero = tau.forward(x, torch.zeros_like(params))
    assert torch.equal(still, x)
    assert not zero.any()


@pytest.mark.parametrize("tau", MAPS, ids=repr)
@pytest.mark.parametrize("grad", [True, False])
def test_elementwise_derivatives(tau, grad):
    x, params, s, g = randn(20, 3).requires_grad_(), randn(20, 3, tau.num_params).requires_grad_(), *randn(2, 20, 3)
    h = randn(20, 1)
    y, log_slope = tau.forward(x, params)
    with torch.set_grad_enabled(grad):
        y_again, log_again, tape = tau.forward_with_tape(x, params)
        new, to_params = tau.score(tape, s)
        pulled, pulled_without = tau.backward(tape, g, h), tau.backward(tape, g, None)
    assert torch.allclose(y_again, y)
    assert torch.allclose(log_again, log_slope)
    assert not any(v.requires_grad for v in (y_again, log_again, new, to_params, *pulled))

    def pull(value, *inputs):
        return torch.autograd.grad(value + 0 * y.sum(), inputs, retain_graph=True)

    curvature = pull(log_slope.sum(), x)[0] if log_slope.requires_grad else 0.0
    assert torch.allclose(new, (s - curvature) / log_slope.exp())
    assert torch.allclose(to_params, pull((y * new.detach()).sum() + log_slope.sum(), params)[0])
    for got, value in ((pulled, (y * g).sum() + (log_slope * h).sum()), (pulled_without, (y * g).sum())):
        for a, b in zip(got, pull(value, x, params), strict=True):
            assert torch.allclose(a, b)


def test_soft_clip_bounds_the_log_scale():
    params = torch.tensor([[[0.0, 1e6]], [[0.0, -1e6]]])
    assert torch.allclose(SoftClippedAffine(2.0).forward(torch.ones(2, 1), params)[1], torch.tensor([[2.0], [-2.0]]))
    with pytest.raises(OptionError, match="clip must be a positive number"):
        RealNVP(2, clip=0.0)


# Networks.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("num_in", [0, 3])
def test_network_by_hand_is_autograds(activation, hidden, context_dim, num_in):
    net = DenseNetwork(num_in, hidden, 4, context_dim, activation)
    x, context = randn(6, num_in).requires_grad_(), randn(6, context_dim) if context_dim else None
    assert not net.double()(x, context).any()
    perturb(net)
    out = net(x, context)
    weights, biases = net.flat_layers(x.shape[:-1], context)
    with torch.no_grad():
        by_hand, inputs = dense(x, weights, biases, activation)
    assert torch.allclose(by_hand, out)
    g = randn(6, 4)
    with torch.no_grad():
        pulled = dense_pullback(g, weights, inputs, activation)
        to_x, to_weights, to_biases = dense_backward(g, weights, inputs, [b.dim() > 1 for b in biases], activation)
    expected = torch.autograd.grad(out, [x, *net.parameters()], g, materialize_grads=True)
    assert torch.allclose(pulled, expected[0])
    assert torch.allclose(to_x, expected[0])
    known = [
        (p, to_p) for p, to_p in zip([*weights, *biases], [*to_weights, *to_biases], strict=True) if p.requires_grad
    ]
    through = torch.autograd.grad(
        [p for p, _ in known], [*net.parameters()], [to_p for _, to_p in known], materialize_grads=True
    )
    for a, b in zip(through, expected[1:], strict=True):
        assert torch.allclose(a, b)


def test_network_refuses():
    with pytest.raises(OptionError, match="activation must be one of relu, tanh, elu"):
        RealNVP(2, activation="sin")
    with pytest.raises(OptionError, match="hidden_dims must be positive"):
        RealNVP(2, hidden_dims=(0,))
    with pytest.raises(OptionError, match=r"condition\(context\)"):
        RealNVP(2, context_dim=3)(torch.zeros(2))


# Mixings.


@pytest.mark.parametrize("kind", ["perm", "orth", "none"])
@pytest.mark.parametrize("dim", [1, 2, 10, 50])
def test_mixing_is_orthogonal_in_every_dtype(kind, dim):
    mixing = make_mixing(kind, dim)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        mixing.to(dtype)
        m = mixing(torch.eye(dim, dtype=dtype))
        assert torch.allclose(m.mT @ m, torch.eye(dim, dtype=dtype), atol=tolerance)
        x = torch.randn(3, 4, dim, dtype=dtype)
        assert torch.allclose(mixing.undo(mixing(x)), x, atol=10 * tolerance)


@pytest.mark.parametrize("make", [NICE, RealNVP])
def test_a_start_away_from_the_identity(make):
    x = torch.randn(2000, 3)
    moved = [(make(3, num_flows=2, start=size)(x) - x).square().mean().sqrt().item() for size in (0.0, 0.1, 1.0)]
    assert moved[0] < 1e-6
    assert 0.005 < moved[1] < 0.2 < moved[2] < 3
    network = DenseNetwork(0, (), 4)  # a bias alone has no weights to draw
    network.stir(1.0)
    assert not network(torch.empty(5, 0)).any()


def test_real_nvp_in_the_direction_of_its_source():
    torch.manual_seed(0)
    one = perturb(RealNVP(3, 1, mixing="none"))
    x = torch.randn(5, 3, dtype=torch.float64)
    a, b = x.split((1, 2), -1)
    shift, raw = one.networks[0](a).unflatten(-1, (2, 2)).unbind(-1)
    log_scale = 2 * torch.tanh(raw / 2)
    layer = RealNVP(3, 1, mixing="none", direction="inverse").double()
    layer.networks[0].load_state_dict(one.networks[0].state_dict())
    z, log_det = layer.inverse_and_log_det(x)
    assert torch.allclose(z, torch.cat((a, b * log_scale.exp() + shift), -1))
    assert torch.allclose(log_det, log_scale.sum(-1))
    with pytest.raises(OptionError, match="direction"):
        RealNVP(3, direction="up")


@pytest.mark.parametrize("mixing", ["perm", "none"])
def test_in_the_plane_the_two_coordinates_take_turns(mixing):
    for seed in range(5):
        torch.manual_seed(seed)
        flow, moved = NICE(2, num_flows=6, mixing=mixing), []
        for network in flow.networks:
            with torch.no_grad():
                network.layers[-1].bias.fill_(1.0)
                moved.append(int((flow(torch.zeros(2)) + 0).argmax()))
                network.layers[-1].bias.zero_()
        assert all(a != b for a, b in pairwise(moved))


def test_random_orthogonal_is_uniform():
    first = torch.stack([random_orthogonal(3) for _ in range(2000)])
    assert first.mean(0).abs().max() < 0.07  # 0 +- .013 if uniform; QR alone has a diagonal of one sign
    assert first.square().mean(0).sub(1 / 3).abs().max() < 0.04
    assert 0.45 < (torch.linalg.det(first) > 0).float().mean() < 0.55


def test_given_mixings_and_unknown_ones():
    x = torch.arange(3.0)
    assert Permutation(3, torch.tensor([2, 0, 1]))(x).tolist() == [2, 0, 1]
    assert Rotation(2, torch.tensor([[0.0, 1], [-1, 0]]))(torch.tensor([3.0, 4.0])).tolist() == [4, -3]
    with pytest.raises(OptionError, match="mixing must be one of perm, orth, none"):
        NICE(2, mixing="shuffle")


@pytest.mark.parametrize("dim", [2, 5, 50])
def test_householder_is_a_rotation(dim):
    t = perturb(Householder(dim, num_pairs=3))
    matrix = t(torch.eye(dim, dtype=torch.float64)).detach()
    eye = torch.eye(dim, dtype=torch.float64)
    assert torch.allclose(matrix.mT @ matrix, eye, atol=1e-12)
    assert torch.linalg.det(matrix).item() == pytest.approx(1)
    assert not torch.allclose(matrix, eye, atol=0.1)
    product = eye
    for v, w in zip(t.v, t.w, strict=True):
        for n in (v, w):
            product = product @ (eye - 2 * torch.outer(n, n) / (n @ n))
    assert torch.allclose(t(eye), product.mT)


def test_householder_reaches_a_given_rotation():
    target = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    t = Householder(2)
    for _ in range(100):
        loss = (t(torch.eye(2)) - target).square().sum()
        with torch.no_grad():
            for p, g in zip(t.parameters(), torch.autograd.grad(loss, list(t.parameters())), strict=True):
                p.sub_(0.05 * g)
    assert loss.item() < 1e-6


def test_householder_at_a_zero_vector_and_bad_arguments():
    t = Householder(3)
    with torch.no_grad():
        t.v.zero_()
    t(torch.ones(3)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in t.parameters())
    with pytest.raises(OptionError, match="D = 1"):
        conditional_householder(1, 2)
    with pytest.raises(OptionError, match="num_pairs must be a positive integer"):
        Householder(3, 0)


# Coupling layers.


@pytest.mark.parametrize("mixing", ["perm", "orth", "none"])
@pytest.mark.parametrize("dim", [1, 2, 7])
def test_nice_keeps_volumes(mixing, dim):
    t = perturb(NICE(dim, 5, mixing=mixing))
    x = randn(9, dim)
    y, log_det = t.forward_and_log_det(x)
    assert not torch.allclose(x, y, atol=0.1)
    assert torch.equal(log_det, torch.zeros(9, dtype=torch.float64))
    assert torch.linalg.det(torch.autograd.functional.jacobian(t, x[0])).item() == pytest.approx(1)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dim", [1, 2, 3, 10])
def test_one_layer_moves_half_and_a_pair_moves_all(cls, dim):
    x = randn(9, dim)
    for _ in range(5):
        one, pair = perturb(cls(dim, 1)), perturb(cls(dim, 2))
        assert ((one(x) - x).abs() > 1e-9).any(0).sum() == dim - dim // 2
        assert ((pair(x) - x).abs() > 1e-9).any(0).all()


def test_seed_decides_the_halves():
    def order(seed):
        torch.manual_seed(seed)
        return build("nice", 10, 4)[0].mixings[1].order.tolist()

    assert order(3) == order(3) != order(4)


@pytest.mark.parametrize("tau", [Additive(), SoftClippedAffine(), ByAutograd(), Cubic()], ids=repr)
@pytest.mark.parametrize("mixing", ["perm", "orth"])
@pytest.mark.parametrize(("dim", "num_flows"), [(1, 2), (2, 1), (5, 3)])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_pass_with_score_is_the_ordinary_one(tau, mixing, dim, num_flows, context_dim):
    t = perturb(Coupling(dim, tau, num_flows, mixing=mixing, hidden_dims=(6, 5), context_dim=context_dim))
    x, s, context = randn(4, 3, dim).requires_grad_(), randn(4, 3, dim), randn(4, 1, 2) if context_dim else None
    y, log_det = t.forward_given(x, context)
    y_s, log_det_s, new = t.score_given(x, s, context)
    assert torch.allclose(y_s, y)
    assert torch.allclose(log_det_s, log_det)
    assert not new.requires_grad
    g, h = randn(4, 3, dim), randn(4, 3)
    leaves = [x, *t.parameters()]
    for rest in (1.0, 0.0):
        expected = torch.autograd.grad((y * g).sum() + rest * (log_det * h).sum(), leaves, retain_graph=True)
        value = (y_s * g).sum() + (rest * (log_det_s * h).sum() if rest else 0.0)
        for a, b in zip(torch.autograd.grad(value, leaves, retain_graph=True), expected, strict=True):
            assert torch.allclose(a, b, atol=1e-10)
    curvature = torch.autograd.grad(log_det.sum() + 0 * y.sum(), x, retain_graph=True)[0]
    for i in range(4):
        at = None if context is None else context[i, 0]
        jacobian = torch.autograd.functional.jacobian(lambda v, at=at: t.forward_given(v, at)[0], x[i, 1].detach())
        expected = torch.linalg.solve(jacobian.mT, s[i, 1] - curvature[i, 1])
        assert torch.allclose(new[i, 1], expected, atol=1e-9)
    with torch.no_grad():
        again = t.score_given(x, s, context)
    assert torch.allclose(again[2], new)
    assert not again[0].requires_grad


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("mixing", ["perm", "orth"])
def test_fifty_dimensions(cls, mixing):
    t = perturb(cls(50, 4, mixing=mixing))
    x = 2 * randn(20, 50)
    y, log_det = t.forward_and_log_det(x)
    back, log_back = t.inverse_and_log_det(y)
    assert torch.allclose(back, x, atol=1e-6)
    assert torch.allclose(log_back, -log_det, atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(t, x[0])
    assert log_det[0].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-6)
    flow = flowvi.Flow(dist.Normal(torch.zeros(50).double(), 1.0).to_event(1), [t])
    z, log_q, score = flow.rsample_with_score(20)
    leaf = z.detach().requires_grad_()
    value = flow.log_prob(leaf)
    assert torch.allclose(log_q, value, atol=1e-6)
    assert torch.allclose(score, torch.autograd.grad(value.sum(), leaf)[0], atol=1e-5)


def test_one_dimension_is_an_elementwise_map():
    t = perturb(RealNVP(1, 2))
    x = randn(5, 1)
    slopes = t(x).diff(dim=0) / x.diff(dim=0)
    assert torch.allclose(slopes, t.log_abs_det_jacobian(x, t(x))[0].exp())


# Conditional twins.


@pytest.mark.parametrize("make", [conditional_nice, conditional_real_nvp, conditional_householder])
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_conditional_twin(make, dim):
    if make is conditional_householder and dim == 1:
        pytest.skip("refuses D = 1")
    twin = make(dim, context_dim=3).double()
    x, context = randn(5, dim), randn(5, 3)
    assert torch.allclose(twin.condition(context)(x), x)  # the identity at the start, for every context
    perturb(twin)
    at = twin.condition(context)
    y = at(x)
    assert torch.allclose(at.inv(y.clone()), x, atol=1e-9)
    other = twin.condition(context.flip(0))(x)
    assert ((other - y).abs() > 1e-9).any(0).all()
    one = twin.condition(context[0])
    jacobian = torch.autograd.functional.jacobian(lambda v: one(v), x[0])
    expected = torch.linalg.slogdet(jacobian)[1]
    assert torch.allclose(at.log_abs_det_jacobian(x, y)[0], expected, atol=1e-9)
    for shape, batch in (((3,), (5,)), ((5, 3), (5,)), ((2, 1, 3), (2, 5))):
        there = twin.condition(randn(*shape))
        z, log_det, score = there.forward_with_score(x, randn(5, dim))
        assert z.shape == score.shape == (*batch, dim)
        assert log_det.shape == batch
        assert torch.allclose(there(x), z)
    base = dist.Normal(torch.zeros(5, dim).double(), 1.0).to_event(1)
    flow = flowvi.Flow(base, [at])
    leaf = flow.sample().requires_grad_()
    value = flow.log_prob(leaf)
    expected = torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0]
    assert torch.allclose(flow.score(leaf.detach()), expected, atol=1e-8)
    value.sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    with pytest.raises((DimensionError, RuntimeError)):
        twin.condition(randn(5, 4))(x)


@pytest.mark.parametrize("cls", CLASSES)
def test_plain_transform_is_the_twin_with_its_context_in_the_bias(cls):
    """A context shifts the first layer: a plain transform with that shift in its first bias is the same map."""
    torch.manual_seed(1)
    twin = (conditional_nice if cls is NICE else conditional_real_nvp)(4, context_dim=3)
    perturb(twin)
    context, x = randn(3), randn(6, 4)
    plain = cls(4, 2).double()
    missing = plain.load_state_dict(
        {k.removeprefix("transform."): v for k, v in twin.state_dict().items() if "context" not in k}
    )
    assert not missing.missing_keys
    with torch.no_grad():
        for mine, theirs in zip(plain.networks, twin.transform.networks, strict=True):
            mine.layers[0].bias.add_(theirs.context_layer(context))
    assert torch.allclose(plain(x), twin.condition(context)(x))


def test_registered_names_and_options():
    flow = flowvi.Flow.from_spec(
        flowvi.FlowSpec("real_nvp", 3, 5, "diag", {"mixing": "orth", "hidden_dims": [8], "activation": "tanh"})
    )
    assert isinstance(flow.transforms[0].mixings[2], Rotation)
    assert flow.transforms[0].num_flows == 5
    twin = flowvi.Flow.from_spec(flow.spec)
    twin.load_state_dict(flow.state_dict())
    x = torch.randn(4, 3)
    assert torch.equal(twin.transforms[0](x), flow.transforms[0](x))
    for cls in CLASSES:
        with pytest.raises(OptionError, match="num_flows must be a positive integer"):
            cls(2, 0)
