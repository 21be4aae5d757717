"""Sylvester flows: their determinant against Jacobians, the exact inverse, and Q's orthonormality, for every kind."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

import flowvi
from flowvi.errors import OptionError
from flowvi.transforms import Planar, Sylvester, SylvesterStack, conditional_sylvester, sylvester
from flowvi.transforms.sylvester import _matrices, _orthonormal, _reflected

CASES = {
    "orthogonal": {},
    "orthogonal, M < D": {"num_neurons": 2},
    "one neuron": {"num_neurons": 1},
    "householder": {"kind": "householder"},
    "householder, M < D": {"kind": "householder", "num_neurons": 2, "num_reflections": 3},
    "householder, more reflections than D": {"kind": "householder", "num_reflections": 9},
    "triangular": {"kind": "triangular"},
    "triangular, reversed": {"kind": "triangular", "flip": True},
}


def perturbed(dim: int, scale: float = 0.7, dtype: torch.dtype = torch.float64, **options) -> Sylvester:
    torch.manual_seed(0)
    layer = Sylvester(dim, **options).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(scale * torch.randn_like(p))
    return layer


@pytest.fixture(params=CASES.values(), ids=CASES)
def options(request):
    return request.param


@pytest.fixture(params=[2, 5, 10, 50])
def dim(request):
    return request.param


def test_starts_as_the_identity(options, dim):
    x = torch.randn(4, dim)
    assert torch.equal(Sylvester(dim, **options)(x), x)


def test_log_det_inverse_and_score(options, dim):
    layer = perturbed(dim, scale=0.7 if dim < 50 else 0.2, **options)
    x, score = torch.randn(2, 6, dim, dtype=torch.float64)
    y, log_det, new = layer.forward_with_score(x, score)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda v: layer.forward_and_log_det(v)[0], v) for v in x]
    )
    assert torch.allclose(log_det, torch.linalg.slogdet(jacobian)[1], atol=1e-9)
    assert (torch.linalg.slogdet(jacobian)[0] > 0).all()
    assert torch.allclose(layer.inverse(y), x, atol=1e-8)
    leaf = x.clone().requires_grad_()
    pull = torch.autograd.grad(layer.forward_and_log_det(leaf)[1].sum(), leaf)[0]
    expected = torch.linalg.solve(jacobian.mT, (score - pull).unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(new, expected, atol=1e-8)


def test_inverse_of_any_point(options):
    layer = perturbed(5, scale=1.5, **options)
    y = 10 * torch.randn(100, 5, dtype=torch.float64)
    assert torch.allclose(layer(layer.inverse(y)), y, atol=1e-9)


def test_gradients(options):
    layer = perturbed(4, **options)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    params = tuple(layer.parameters())

    def both(x, *params):
        return *Sylvester._forward(x, *params, **layer._options), Sylvester._inverse_map(x, *params, **layer._options)

    assert torch.autograd.gradcheck(both, (x, *params))


def test_q_has_orthonormal_rows_and_r_keeps_the_layer_invertible(options, dim):
    layer = perturbed(dim, scale=5.0, **options)
    _, _, _, q, r, r_tilde, one_plus_m = _matrices(*layer.parameters(), **layer._options)
    assert torch.allclose(q @ q.mT, torch.eye(q.shape[0], dtype=q.dtype), atol=1e-12)
    assert torch.equal(r, torch.triu(r))
    assert torch.equal(r_tilde, torch.triu(r_tilde))
    assert (one_plus_m > 0).all()
    assert torch.allclose(1 + r.diagonal() * r_tilde.diagonal(), one_plus_m, atol=1e-9)


def test_float32_holds_the_constraint_at_any_parameters():
    """Where 1 + r r~ rounds to zero or below, the stored 1 + m is still positive, and so is the determinant."""
    for scale in (1e-6, 1.0, 30.0, 1e4):
        layer = Sylvester(3)
        with torch.no_grad():
            layer.triangles.copy_(scale * torch.randn(3, 3))
        y, log_det = layer.forward_and_log_det(torch.randn(500, 3))
        log_det.sum().backward()
        assert torch.isfinite(y).all()
        assert torch.isfinite(log_det).all()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_one_neuron_is_a_planar_layer():
    layer = perturbed(4, num_neurons=1)
    out, into, bias, *_, one_plus_m = _matrices(*layer.parameters(), **layer._options)
    planar = Planar(4).double()
    with torch.no_grad():
        planar.w.copy_(into[0])
        planar.bias.copy_(bias[0])
        s = one_plus_m - 1 / one_plus_m  # the squareplus' inverse, at which w.u gives this 1 + m
        planar.u.copy_(s * into[0] / into[0].square().sum())
    x = torch.randn(7, 4, dtype=torch.float64)
    assert torch.allclose(planar(x), layer(x), atol=1e-10)
    assert torch.allclose(planar.forward_and_log_det(x)[1], layer.forward_and_log_det(x)[1], atol=1e-10)
    assert out.shape == (1, 4)


def test_orthonormal_rows_are_smooth_where_lapack_changes_signs():
    """Gram-Schmidt does not jump when a pivot goes through zero, as a bare QR decomposition does."""
    rows = torch.tensor([[1e-9, 1.0, 0.3], [0.2, 0.1, 1.0]], dtype=torch.float64)
    other = rows.clone()
    other[0, 0] = -1e-9
    assert torch.allclose(_orthonormal(rows), _orthonormal(other), atol=1e-7)
    first = rows[0] / rows[0].norm()
    assert torch.allclose(_orthonormal(rows)[0], first)
    assert (_orthonormal(rows)[1] * rows[1]).sum() > 0


def test_reflections_are_their_product_one_by_one():
    v = torch.randn(4, 6, dtype=torch.float64)
    product = torch.eye(6, dtype=torch.float64)
    for row in v:
        product = product @ (torch.eye(6, dtype=torch.float64) - 2 * torch.outer(row, row) / row.dot(row))
    assert torch.allclose(_reflected(v, 6), product.mT, atol=1e-12)
    assert torch.allclose(_reflected(v, 2), product.mT[:2], atol=1e-12)
    v[1] = 0  # no direction, no reflection
    assert torch.isfinite(_reflected(v, 6)).all()


@pytest.mark.parametrize("dim", [1, 2, 10])
@pytest.mark.parametrize("kind", ["orthogonal", "householder", "triangular"])
def test_conditional_twin_is_the_plain_form_at_its_parameters(kind, dim):
    torch.manual_seed(0)
    twin = conditional_sylvester(dim, context_dim=3, kind=kind).double()
    x, context = torch.randn(5, dim).double(), torch.randn(5, 3).double()
    assert torch.allclose(twin.condition(context)(x), x)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.2 * torch.randn_like(p))
    at = twin.condition(context)
    y = at(x)
    assert torch.allclose(at.inv(y.clone()), x, atol=1e-9)
    plain = Sylvester(dim, kind=kind).double()
    with torch.no_grad():
        for p, value in zip(plain.parameters(), at.params, strict=True):
            p.copy_(value[2])
    assert torch.allclose(plain(x[2]), y[2])
    assert torch.allclose(plain.log_abs_det_jacobian(x[2], plain(x[2])), at.log_abs_det_jacobian(x, y)[2])
    score = torch.randn(5, dim).double()
    assert torch.allclose(plain.forward_with_score(x[2], score[2])[2], at.forward_with_score(x, score)[2][2])
    q = dist.ConditionalTransformedDistribution(dist.Normal(torch.zeros(dim).double(), 1.0), [twin])
    q.condition(context).log_prob(q.condition(context).rsample()).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert twin.condition(context[0])(torch.randn(7, dim).double()).shape == (7, dim)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("kind", ["orthogonal", "householder", "triangular"])
def test_stack_is_its_layers_in_a_row(kind, dim):
    torch.manual_seed(0)
    stack = SylvesterStack(dim, 4, kind=kind).double()
    x, score = torch.randn(2, 6, dim, dtype=torch.float64)
    assert torch.equal(stack(x), x)
    with torch.no_grad():
        for p in stack.parameters():
            p.add_(0.5 * torch.randn_like(p))
    y, log_det, s = x, 0.0, score
    for k in range(4):
        layer = Sylvester(dim, kind=kind, flip=k % 2 == 1).double()  # only the triangular kind has a flip
        with torch.no_grad():
            for p, whole in zip(layer.parameters(), stack.parameters(), strict=True):
                p.copy_(whole[k])
        y, part, s = layer.forward_with_score(y, s)
        log_det = log_det + part
    for ours, expected in zip(stack.forward_with_score(x, score), (y, log_det, s), strict=True):
        assert torch.allclose(ours, expected, atol=1e-10)
    assert torch.allclose(stack.forward_and_log_det(x)[1], log_det, atol=1e-10)
    assert torch.allclose(stack.inverse(y), x, atol=1e-9)


def test_one_layer_bends_every_coordinate_where_a_planar_layer_bends_one():
    """The paper's point: no single-neuron bottleneck. Four independent coordinates with two humps each."""

    def log_p(z):
        humps = torch.stack((z - 1.2, z + 1.2)) / 0.8
        return (-0.5 * humps.square()).logsumexp(0).sum(-1)

    options = {"dim": 4, "num_flows": 1, "num_steps": 250, "lr": 3e-2, "seed": 0, "progress": False, "verify": False}
    elbo = {}
    for flow in ("planar", "sylvester"):
        q = flowvi.fit(log_p, flow=flow, whiten=False, **options).flow
        with torch.no_grad():
            z, log_q = q.rsample_and_log_prob(8000)
            elbo[flow] = (log_p(z) - log_q).mean().item()
    assert elbo["sylvester"] > elbo["planar"] + 0.03


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sylvester(3, kind="round"), "kind must be one of orthogonal, householder, triangular"),
        (lambda: sylvester(3, num_neurons=4), "num_neurons must be an integer from 1 to D = 3"),
        (lambda: sylvester(3, num_neurons=0), "num_neurons must be"),
        (lambda: sylvester(3, kind="householder", num_reflections=0), "num_reflections must be a positive integer"),
        (lambda: sylvester(3, kind="triangular", num_neurons=2), "num_neurons = D = 3"),
        (lambda: SylvesterStack(3, 0), "num_flows must be a positive integer"),
        (lambda: conditional_sylvester(3, 2, kind="round"), "kind must be one of"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(OptionError, match=text):
        call()
